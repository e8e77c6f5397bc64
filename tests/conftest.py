"""What several test modules need: a task with three labels and a model so small that it answers in milliseconds."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from slmops_course.adapters import LoraSettings
from slmops_course.artifacts import Store
from slmops_course.models import write_tiny_model
from slmops_course.optimize import optimize
from slmops_course.pipeline import Course
from slmops_course.profiles import Profile
from slmops_course.students import StudentShape
from slmops_course.tasks import SPLITS, Task, load_task
from slmops_course.training import TrainingSettings, encode_rows
from slmops_course.tuning import Teaching

TINY_SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["card_lost", "refund_missing", "out_of_scope"]},
        "urgency": {"enum": ["low", "high"]},
    },
}
TINY_ROWS = {
    "train": [
        ("I lost my card on the bus", "card_lost", "high"),
        ("Where do I report a missing card?", "card_lost", "low"),
        ("Somebody took my purse, block the card now", "card_lost", "high"),
        ("My card must be somewhere at home", "card_lost", "low"),
        ("The shop says it paid me back, I see nothing", "refund_missing", "high"),
        ("How long does a refund take?", "refund_missing", "low"),
        ("Refund still missing and rent is due today", "refund_missing", "high"),
        ("No hurry, but my money has not come back", "refund_missing", "low"),
        ("What is the weather in Pune?", "out_of_scope", "low"),
        ("Tell me a joke", "out_of_scope", "low"),
        ("Who won the match yesterday?", "out_of_scope", "low"),
        ("Recommend a film for tonight", "out_of_scope", "low"),
    ],
    "dev": [
        ("Card gone, I am at the airport!", "card_lost", "high"),
        ("Returned the shoes, no money yet", "refund_missing", "low"),
        ("How tall is Everest?", "out_of_scope", "low"),
    ],
    "test": [
        ("Cannot find my card anywhere", "card_lost", "low"),
        ("Stolen card, act quickly", "card_lost", "high"),
        ("Refund promised last week, nothing here", "refund_missing", "low"),
        ("I need that refund before the hospital closes", "refund_missing", "high"),
        ("Write a poem about rain", "out_of_scope", "low"),
        ("Is it a holiday on Friday?", "out_of_scope", "low"),
    ],
    "unlabelled": [
        ("Think I left the card in a taxi", None, None),
        ("The seller cancelled, when do I get it back?", None, None),
        ("How do I bake bread?", None, None),
    ],
}
TINY = Profile(
    teacher=TrainingSettings(epochs=60, learning_rate=5e-3, batch_size=4, trained_layers=None),
    comparison=TrainingSettings(epochs=4, learning_rate=3e-3, batch_size=4),
    student=TrainingSettings(epochs=5, learning_rate=3e-3, batch_size=4, rounded_bits=4),
    student_shape=StudentShape(layers=2, tokens=300),
    logits=Teaching(temperature=2.0, label_share=0.3),
    teaching=Teaching(temperature=2.0, label_share=0.3, matched_layers=1),
    lora=LoraSettings(rank=4, alpha=8),
    lora_training=TrainingSettings(epochs=2, learning_rate=3e-3, batch_size=4),
    olive_rows=4,
    olive_training=TrainingSettings(epochs=1, learning_rate=1e-3, batch_size=4),
    unlabelled=None,
    sampled_messages=2,
    test_messages=None,
    base_messages=3,
    speed_messages=3,
)


@pytest.fixture(scope="session")
def tiny_task_folder(tmp_path_factory) -> Path:
    """A task folder with three labels, two fields and a handful of rows. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny_desk"
    folder.mkdir()
    (folder / "schema.json").write_text(json.dumps(TINY_SCHEMA), "utf-8")
    (folder / "prompt.txt").write_text("Answer with JSON: intent, urgency.\n", "utf-8")
    for split in SPLITS:
        lines = []
        for number, (text, intent, urgency) in enumerate(TINY_ROWS[split]):
            answer = {"answer": {"intent": intent, "urgency": urgency}} if intent else {}
            lines.append(json.dumps({"id": f"{split}-{number}", "text": text} | answer))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_task(tiny_task_folder) -> Task:
    return load_task(tiny_task_folder)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_task, tmp_path_factory) -> Path:
    """A model folder of about 300 KB, its tokenizer trained on the tiny task. It answers nonsense. Do not change it."""
    train = tiny_task.splits["train"]
    texts = [tiny_task.prompt, *(e.text for e in train), *(tiny_task.target(e.answer) for e in train)]
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny_model", texts=texts)


@pytest.fixture(scope="session")
def tiny_onnx_folder(tiny_model_folder, tiny_task, tmp_path_factory) -> Path:
    """The tiny model as int4 ONNX, made by Olive in some seconds. It answers nonsense. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "onnx-int4-rtn"
    optimize("int4-rtn", model=tiny_model_folder, task=tiny_task, folder=folder)
    return folder


@pytest.fixture(scope="module")
def course(tiny_task_folder, tiny_model_folder, tmp_path_factory):
    """A course on the tiny task and the tiny model, whose every stage takes a second or so; one for each test module."""
    store = Store(tmp_path_factory.mktemp("course") / "artifacts")
    made = Course(store, load_task(tiny_task_folder), model=str(tiny_model_folder))
    made.profile = TINY
    return made


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("Only root may mount a small disk to fill.")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def pytest_collection_modifyitems(items):
    """Quick tests first; then the chapters, which build the artifacts that the behaviour tests read."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, "test_behaviour" in item.nodeid))


@pytest.fixture
def loaded(tiny_model_folder):
    """The tiny model and its tokenizer, freshly loaded: a test may train the model."""
    from slmops_course.chat import load_torch

    return load_torch(tiny_model_folder)


@pytest.fixture
def model(loaded):
    """The tiny model in fp32, its embeddings frozen and all its layers learning."""
    loaded[0].requires_grad_(False)
    loaded[0].model.layers.requires_grad_(True)
    loaded[0].model.norm.requires_grad_(True)
    return loaded[0]


@pytest.fixture
def rows(loaded, tiny_task):
    """The tiny task's training rows."""
    return encode_rows(loaded[1], tiny_task, tiny_task.splits["train"])
