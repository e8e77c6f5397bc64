"""What the tests of the cloud share: the course's pipeline, and values with which a tiny model goes through it in seconds."""

import json
import shutil
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
AZURE = ROOT / "deploy" / "azure"
PIPELINE = AZURE / "pipeline.yml"

TINY_INPUTS = {
    "shards": 2, "teacher_epochs": 60, "teacher_learning_rate": 5e-3, "teacher_layers": 2, "student_epochs": 60,
    "student_layers": 2, "student_tokens": 300, "min_kept": 0.0, "min_messages": 6, "min_json_valid": 0.0, "min_score": 0.0,
}  # fmt: skip


def copy_pipeline(folder: Path) -> Path:
    """The pipeline and what lies beside it, to be changed; its paths out of the folder still lead to the repository."""
    copied = shutil.copytree(AZURE, folder / "deploy" / "azure")
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", ".amlignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "slmops_course").symlink_to(ROOT / "slmops_course")
    return copied / "pipeline.yml"


def small_pipeline(folder: Path) -> Path:
    """The pipeline's first step alone."""
    pipeline = copy_pipeline(folder)
    whole = yaml.safe_load(pipeline.read_text("utf-8"))
    inputs = {name: whole["inputs"][name] for name in ("task", "shards")}
    small = whole | {"jobs": {"shard": whole["jobs"]["shard"]}, "outputs": {}, "inputs": inputs}
    pipeline.write_text(yaml.safe_dump(small), "utf-8")
    return pipeline


def change(path: Path, old: str, new: str) -> Path:
    """Replace a text that is there in a file."""
    text = path.read_text("utf-8")
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new), "utf-8")
    return path


def with_must_pass(task_folder: Path, folder: Path) -> Path:
    """The tiny task with a must-pass message that a trained tiny model answers: one of its training rows."""
    copied = shutil.copytree(task_folder, folder / "desk")
    row = json.loads((copied / "train.jsonl").read_text("utf-8").splitlines()[0])
    (copied / "must_pass.jsonl").write_text(json.dumps({**row, "id": "must-0"}) + "\n", "utf-8")
    return copied
