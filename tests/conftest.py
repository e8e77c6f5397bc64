"""What several test modules need: a task with three labels and a model so small that it answers in milliseconds."""

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections import namedtuple
from datetime import UTC, datetime
from pathlib import Path

import pytest

from slmops_course.adapters import LoraSettings
from slmops_course.artifacts import Store
from slmops_course.evaluation import Outcome
from slmops_course.models import write_tiny_model
from slmops_course.operations.gate import Evidence, check_release
from slmops_course.operations.publisher import Publisher
from slmops_course.operations.registry import Registry
from slmops_course.operations.updates import Device
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
    comparison_shape=StudentShape(layers=2, tokens=300),
    student_shape=StudentShape(layers=2, tokens=300, kept="ends"),
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


@pytest.fixture(scope="session")
def runtimes_folder() -> Path:
    """Where ExecuTorch and LiteRT are installed; a test that needs them runs only where somebody named such a folder."""
    if not os.environ.get("SLMOPS_RUNTIMES"):
        pytest.skip("ExecuTorch (120 MB) and LiteRT (740 MB) are not here: SLMOPS_RUNTIMES=FOLDER installs them there.")
    return Path(os.environ["SLMOPS_RUNTIMES"])


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


# --- Signed updates: a publisher, its versions and a device, with a clock that only a test moves ---

UpdateVersion = namedtuple("UpdateVersion", "name number folder files")  # what a publisher reads of a registry's version


class Clock:
    def __init__(self):
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_version(tmp_path):
    def make(number: int, **files: bytes) -> UpdateVersion:
        folder = tmp_path / f"version-{number}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return UpdateVersion("desk", number, folder, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})

    return make


@pytest.fixture
def versions(make_version):
    """Three versions on a base of 200,000 bytes: 2 changes the adapter, 3 the base."""
    base = b"base " * 40_000
    return [
        make_version(1, base=base, adapter=b"first" * 400, config=b"{}"),
        make_version(2, base=base, adapter=b"second" * 500, config=b"{}"),
        make_version(3, base=base[::-1], adapter=b"second" * 500, config=b"{}"),
    ]


@pytest.fixture
def publisher(tmp_path, clock, versions):
    """A publisher that offers version 1 to all and to the canaries."""
    made = Publisher(tmp_path / "served", keys_folder=tmp_path / "keys", clock=clock)
    made.publish(versions[0], channels=["all", "canary"])
    return made


@pytest.fixture
def make_device(tmp_path, clock, publisher):
    def make(name="device", **options):
        options = {"source": publisher.folder, "root": publisher.root, "channel": "canary", "clock": clock} | options
        return Device(tmp_path / name, **options)

    return make


@pytest.fixture
def device(make_device):
    """A device that runs version 1 and has confirmed it."""
    made = make_device()
    made.update()
    made.confirm()
    return made


@pytest.fixture
def while_inside():
    """Gives a call to make in the middle of something: there another thread has half a second to do what it is told."""

    def prepare(act) -> tuple:
        inside, done = threading.Event(), threading.Event()

        def other():
            inside.wait()
            act()
            done.set()

        def call(*arguments):
            if not inside.is_set():
                inside.set()
                done.wait(0.5)

        thread = threading.Thread(target=other)
        thread.start()
        return call, thread

    return prepare


# --- A registry of small versions, for what rolls them out ---


def _evidence(task, name: str, wrong: int = 0) -> Evidence:
    examples = task.splits["test"] * 20
    outcomes = [
        Outcome(f"m{number}", e.text, dict(e.answer), "", None if number < wrong else dict(e.answer), None)
        for number, e in enumerate(examples)
    ]
    return Evidence(name, outcomes, must_pass=outcomes[-3:])


@pytest.fixture(scope="session")
def kept_registry(tiny_task, tmp_path_factory) -> Path:
    """A registry with version 1 in production; 2 and 3 change the adapter, 4 the base, 5 failed the gate, 6 saw none."""
    folder = tmp_path_factory.mktemp("registry")
    registry = Registry(folder / "registry")
    current = _evidence(tiny_task, "desk 1")
    for number in range(1, 7):
        files = {
            "model.onnx": (b"base" if number != 4 else b"newer") * 30_000,
            "adapter.safetensors": f"adapter {number}".encode() * 300,
            "genai_config.json": b"{}",
        }
        bundle = folder / f"bundle-{number}"
        bundle.mkdir()
        for name, data in files.items():
            (bundle / name).write_bytes(data)
        candidate = _evidence(tiny_task, f"desk {number}", wrong=60 if number == 5 else 0)
        report = check_release(tiny_task, candidate, current=current if number > 1 else None)
        registry.register("desk", bundle, lineage={"made": number}, report=None if number == 6 else report)
    registry.promote("desk", 1)
    return folder / "registry"


@pytest.fixture
def registry(kept_registry, tmp_path) -> Registry:
    shutil.copytree(kept_registry, tmp_path / "registry")
    return Registry(tmp_path / "registry")
