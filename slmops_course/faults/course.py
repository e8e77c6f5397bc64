"""A course so small that every stage takes a second or so: what the pipeline's faults are tried on."""

import json
import logging
import os
from pathlib import Path

from slmops_course.adapters import LoraSettings
from slmops_course.artifacts import Store
from slmops_course.models import write_tiny_model
from slmops_course.pipeline import Course
from slmops_course.profiles import Profile
from slmops_course.students import StudentShape
from slmops_course.tasks import SPLITS, load_task
from slmops_course.training import TrainingSettings
from slmops_course.tuning import Teaching

DESK = "clinic"
ROWS = {"train": 12, "dev": 3, "test": 4, "unlabelled": 3}
_SHORT = TrainingSettings(epochs=2, learning_rate=3e-3, batch_size=4)
SMALL = Profile(
    teacher=TrainingSettings(epochs=4, learning_rate=3e-3, batch_size=4, trained_layers=None),
    comparison=_SHORT,
    student=TrainingSettings(epochs=2, learning_rate=3e-3, batch_size=4, rounded_bits=4),
    comparison_shape=StudentShape(layers=2, tokens=300),
    student_shape=StudentShape(layers=2, tokens=300),
    logits=Teaching(temperature=2.0, label_share=0.3),
    teaching=Teaching(temperature=2.0, label_share=0.3, matched_layers=1),
    lora=LoraSettings(rank=4, alpha=8),
    lora_training=_SHORT,
    olive_rows=4,
    olive_training=TrainingSettings(epochs=1, learning_rate=1e-3, batch_size=4),
    unlabelled=None,
    sampled_messages=2,
    test_messages=None,
    base_messages=2,
    speed_messages=2,
)
# The stages by what is asked for; each brings those it builds on. The last measures time, so its file differs every time.
STEPS = {
    "base": lambda course: course.base(),
    "teacher": lambda course: course.teacher(),
    "labels": lambda course: course.labels(),
    "label-checks": lambda course: course.label_checks(),
    "student-alone": lambda course: course.compared_student("alone"),
    "student-sequence": lambda course: course.compared_student("sequence"),
    "student-logit": lambda course: course.compared_student("logit"),
    "student": lambda course: course.student(),
    "lora": lambda course: course.lora(),
    "olive-lora": lambda course: course.olive_lora(),
    "olive-manners": lambda course: course.olive_manners(),
    "onnx-fp32": lambda course: course.onnx("fp32"),
    "onnx-int8": lambda course: course.onnx("int8"),
    "onnx-int4-rtn": lambda course: course.onnx("int4-rtn"),
    "onnx-int4-kquant": lambda course: course.onnx("int4-kquant"),
    "onnx-int4-gptq": lambda course: course.onnx("int4-gptq"),
    "outcomes-teacher": lambda course: course.outcomes_artifact("teacher"),
    "outcomes-student-int4-rtn": lambda course: course.outcomes_artifact("student int4-rtn"),
    "outcomes-foundry-service": lambda course: course.outcomes_artifact("foundry service"),
    "confidence-teacher": lambda course: course.confidence("teacher"),
    "knowledge-teacher": lambda course: course.knowledge("teacher"),
    "speed-student-int4-rtn": lambda course: course.speed("student int4-rtn"),
}


def write_material(folder: Path) -> Path:
    """Write the small task and the tiny model, `task/` and `model/`, into a folder, and return it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    desk, task = load_task(DESK), folder / "task"
    task.mkdir(parents=True)
    (task / "schema.json").write_text(json.dumps(desk.schema), "utf-8")
    (task / "prompt.txt").write_text(desk.prompt, "utf-8")
    for split in SPLITS:
        rows = [{"id": e.id, "text": e.text} | ({"answer": dict(e.answer)} if e.answer else {}) for e in desk.splits[split]]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: ROWS[split]]), "utf-8")
    train = load_task(task).splits["train"]
    write_tiny_model(folder / "model", texts=[desk.prompt, *(e.text for e in train), *(desk.target(e.answer) for e in train)])
    return folder


def open_small(material: Path, store: Path) -> Course:
    """The small course over a store, from what `write_material` wrote."""
    course = Course(Store(store), load_task(material / "task"), model=str(material / "model"))
    course.profile = SMALL
    return course


def build(material: Path, store: Path, steps: list[str], log: Path) -> None:
    """Build steps in order, and note in the log when a stage begins ("teacher: building") and ends: for a process apart."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that it finds no kernel on a hub
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(created)f %(message)s"))
    logger = logging.getLogger("slmops_course")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    course = open_small(material, store)
    for step in steps:
        STEPS[step](course)
