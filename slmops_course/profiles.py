"""How long the path trains and on how much it measures: "fast" for two cores, "full" for those who have longer."""

from dataclasses import dataclass, replace

from slmops_course.adapters import LoraSettings
from slmops_course.students import StudentShape
from slmops_course.training import TrainingSettings
from slmops_course.tuning import Teaching


@dataclass(frozen=True)
class Profile:
    """How long and on how much the path trains and measures."""

    teacher: TrainingSettings  # of the base model on the labelled messages
    comparison: TrainingSettings  # of the students that are compared, just long enough to show their difference
    student: TrainingSettings  # of the student that goes on to be optimized and served
    comparison_shape: StudentShape  # of the students that are compared
    student_shape: StudentShape  # of the student that goes on
    logits: Teaching  # of the student that is compared and learns from the teacher's distribution
    teaching: Teaching  # of the student that goes on
    lora: LoraSettings
    lora_training: TrainingSettings
    olive_rows: int  # rows that Olive's own fine-tuning pass trains on
    olive_training: TrainingSettings  # of that pass: small batches, because it computes every token's whole distribution
    unlabelled: int | None  # unlabelled messages the teacher labels; None: all
    sampled_messages: int | None  # of these, those that it answers several times, for self-consistency; None: all
    test_messages: int | None  # test messages every model is scored on; None: all
    base_messages: int  # test messages the untuned base model is scored on, with its long prompt
    speed_messages: int


PROFILES = {
    "fast": Profile(
        teacher=TrainingSettings(epochs=2, learning_rate=8e-4, trained_layers=15),
        comparison=TrainingSettings(epochs=0.75, learning_rate=1.5e-3),
        student=TrainingSettings(epochs=3, learning_rate=1.5e-3, rounded_bits=4),
        comparison_shape=StudentShape(layers=10, tokens=12_288),
        student_shape=StudentShape(layers=10, tokens=12_288, kept="ends"),
        logits=Teaching(temperature=2.0, label_share=0.3),
        teaching=Teaching(temperature=2.0, label_share=0.3, matched_layers=3),
        lora=LoraSettings(trained_layers=15),
        lora_training=TrainingSettings(epochs=1, learning_rate=3e-3),
        olive_rows=192,
        olive_training=TrainingSettings(epochs=1, learning_rate=2e-3, batch_size=4),
        unlabelled=None,
        sampled_messages=128,
        test_messages=1000,
        base_messages=52,
        speed_messages=8,
    ),
}
PROFILES["full"] = replace(
    PROFILES["fast"],
    teacher=TrainingSettings(epochs=4, learning_rate=2e-4, trained_layers=24),
    comparison=TrainingSettings(epochs=3, learning_rate=1.5e-3),
    student=TrainingSettings(epochs=10, learning_rate=1e-3, rounded_bits=4),
    lora=LoraSettings(),
    lora_training=TrainingSettings(epochs=3, learning_rate=3e-3),
    olive_rows=1024,
    sampled_messages=None,
    test_messages=None,
    base_messages=516,
    speed_messages=50,
)
