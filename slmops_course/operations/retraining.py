"""The next version: the student in production, trained a little further on what people corrected."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from slmops_course import losses, students, tasks, training, tuning
from slmops_course.artifacts import Artifact
from slmops_course.chat import load_torch
from slmops_course.errors import CourseError
from slmops_course.tasks import Example
from slmops_course.training import Batch, TrainingSettings

# Short and with a low rate: what it knows is to stay. Rounded as in the student's own training, because int4 is served.
SETTINGS = TrainingSettings(epochs=1, learning_rate=5e-4, rounded_bits=4)
TEMPERATURE = 2.0
REPLAYED = 1373  # of the task's own training messages: every second one of the bundled desk's
TIMES = 8  # how often each correction is among them: there are few


class RetrainingError(CourseError):
    """Corrections that nothing can be learned from."""


def retrain(
    course, corrections: Sequence[Example], *, settings: TrainingSettings = SETTINGS, replayed: int = REPLAYED,
    times: int = TIMES,
) -> Artifact:  # fmt: skip
    """The student, trained on corrections among messages that it knew, on which it is to go on saying what it said.

    Example: `course.onnx("int4-rtn", retrain(course, corrections.kept))`
    Raises RetrainingError without corrections, and for one that has no answer.
    """
    unlabelled = [example.id for example in corrections if example.answer is None]
    if unlabelled or not corrections:
        found = f"{unlabelled[0]} has no answer" if unlabelled else "There is no correction"
        raise RetrainingError(f"{found}: expected messages with answers that people gave; see feedback.collect_corrections.")
    student, own = course.student(), course.task.splits["train"]
    known = own[:: max(1, len(own) // max(1, replayed))]

    def write(folder: Path) -> None:
        model, tokenizer = load_torch(student.path, dtype=training.fast_dtype())
        rows = training.encode_rows(tokenizer, course.task, [*known, *list(corrections) * times])
        states, head, _ = tuning.teacher_states(student.path, rows)
        training.freeze_below(model, settings.trained_layers)
        loss = keep_and_learn(states, head, known=len(known), temperature=TEMPERATURE)
        (folder / "history.json").write_text(json.dumps(training.train(model, rows, settings, loss=loss)), "utf-8")
        students.save_model(model, tokenizer, folder)

    said = [[example.text, dict(example.answer)] for example in corrections]
    recipe = {"training": asdict(settings), "known": len(known), "times": times, "numbers": training.numbers(), "said": said}
    return course.store.build(
        "retrained", settings=recipe, inputs={"student": student, **tasks.task_inputs(course.task)}, write=write,
        code=(keep_and_learn, tuning.teacher_states, *tuning.deciding_code(shape=None, teaching=None, lora=None)),
    )  # fmt: skip


def keep_and_learn(old_states: Sequence, old_head, *, known: int, temperature: float) -> Callable:
    """A loss that draws the first `known` rows to what the model said before, and the others to their new answers.

    `old_states` and `old_head` are the old model's, as `tuning.teacher_states` gives them: the distribution of each answer
    token is kept, not only the answer. Trained on answers alone, the bundled desk's student lost 5.6 points on its test.
    Source: Li, Hoiem, "Learning without Forgetting", 2016, https://arxiv.org/abs/1606.09282
    """
    import torch
    from torch.nn import functional

    def loss(model, batch: Batch):
        is_new = torch.cat([torch.full((len(old_states[i]),), i >= known) for i in batch.indexes])
        logits, parts = training.answer_logits(model, batch), []
        if is_new.any():
            parts.append(functional.cross_entropy(logits[is_new], batch.targets[is_new], reduction="sum"))
        if not is_new.all():
            with torch.no_grad():
                states = torch.cat([old_states[i] for i in batch.indexes if i < known])
                before = training.project(states, lambda rows: rows @ old_head.T)
                wanted = functional.log_softmax(before / temperature, dim=-1)
            given = functional.log_softmax(logits[~is_new] / temperature, dim=-1)
            parts.append(temperature**2 * losses.forward_divergence(given, wanted) * len(states))
        return sum(parts) / len(is_new)

    return loss
