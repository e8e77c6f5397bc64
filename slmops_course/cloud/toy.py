"""A desk and a model small enough that the whole pipeline runs in half a minute: to see it work, not to use its result."""

import json
from collections.abc import Mapping
from pathlib import Path

from slmops_course.models import write_tiny_model
from slmops_course.operations.gate import MUST_PASS
from slmops_course.tasks import Task

SIZES = {"train": 32, "dev": 8, "test": 12, "unlabelled": 12}


def write_toy(task: Task, folder: Path) -> Mapping[str, object]:
    """Write a few of the task's shortest messages as a desk, and a model of two layers with random weights.

    Returns the inputs with which `local.run_pipeline` takes them through the pipeline. The must-pass message is one of the
    test's. The same task gives the same toy.
    """
    desk = folder / "desk"
    desk.mkdir(parents=True, exist_ok=True)
    chosen = {}
    for split, size in SIZES.items():
        ordered = sorted(task.splits[split] or task.splits["train"], key=lambda example: (len(example.text), example.id))
        chosen[split] = ordered[:size]
        rows = [
            {"id": e.id, "text": e.text} | ({"answer": dict(e.answer)} if split != "unlabelled" else {}) for e in chosen[split]
        ]
        (desk / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    must = {"id": "must-pass-0", "text": chosen["test"][0].text, "answer": dict(chosen["test"][0].answer)}
    (desk / MUST_PASS).write_text(json.dumps(must, ensure_ascii=False) + "\n", "utf-8")
    (desk / "prompt.txt").write_text("Answer with JSON.\n", "utf-8")
    (desk / "schema.json").write_text(json.dumps(dict(task.schema)), "utf-8")
    texts = [text for e in chosen["train"] for text in (e.text, task.target(e.answer))]
    write_tiny_model(folder / "model", texts=texts)
    return {
        "task": desk, "model": str(folder / "model"), "shards": 2, "teacher_epochs": 20, "teacher_learning_rate": 5e-3,
        "teacher_layers": 2, "student_epochs": 10, "student_layers": 2, "student_tokens": 300, "min_kept": 0.0,
        "min_messages": 12, "min_json_valid": 0.0, "min_score": 0.0,
    }  # fmt: skip
