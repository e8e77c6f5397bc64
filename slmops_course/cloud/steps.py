"""The pipeline's steps as plain commands, here and in the cloud: folders in, one folder out.

    python -m slmops_course.cloud.steps teacher --task FOLDER --model smollm2-135m --epochs 2 … --out FOLDER

Each is a few lines over the course's own stages. What a step prints is its log.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from slmops_course.cloud.definition import CloudError
from slmops_course.errors import CourseError

# The options of each step, and how each is read. All are needed: a default would be a second place for a setting.
STEPS: dict[str, dict[str, type]] = {
    "shard": {"task": Path, "shards": int, "out": Path},
    "teacher": {
        "task": Path, "model": str, "epochs": float, "learning_rate": float, "trained_layers": int, "out": Path,
    },
    "gather": {"task": Path, "labelled": Path, "min_kept": float, "out": Path},
    "distil": {
        "task": Path, "teacher": Path, "labels": Path, "epochs": float, "learning_rate": float, "layers": int, "tokens": int,
        "out": Path,
    },
    "optimize": {"task": Path, "student": Path, "recipe": str, "out": Path},
    "evaluate": {
        "task": Path, "onnx": Path, "device": str, "min_messages": int, "min_json_valid": float, "min_score": float,
        "out": Path,
    },
    "release": {"onnx": Path, "report": Path, "out": Path},
}  # fmt: skip
OPTIONS = {step: {f"--{name.replace('_', '-')}" for name in options} for step, options in STEPS.items()}
ARTIFACTS = "SLMOPS_ARTIFACTS"  # environment variable: where a fetched base model is kept; else it is fetched again


def make_parser() -> argparse.ArgumentParser:
    """The command line of all steps."""
    parser = argparse.ArgumentParser(prog="python -m slmops_course.cloud.steps")
    commands = parser.add_subparsers(dest="step", required=True)
    for step, options in STEPS.items():
        command = commands.add_parser(step)
        for name, kind in options.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=kind, required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a step; returns the exit code. An error that can be mended is one sentence and code 1."""
    try:
        carry_out(arguments)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def carry_out(arguments: Sequence[str] | None = None, *, environ: Mapping[str, str] = os.environ) -> None:
    """Carry out a step of the command line. Raises CourseError for what can be mended."""
    options = vars(make_parser().parse_args(arguments))
    step = options.pop("step")
    options["out"].mkdir(parents=True, exist_ok=True)
    if step in ("teacher", "distil"):
        options["environ"] = environ
    globals()[f"run_{step}"](**options)


def run_shard(*, task: Path, shards: int, out: Path) -> None:
    """Write the unlabelled messages as `shard-000.jsonl`, …, each message in one of them. Empty shards are left out."""
    messages = _load(task).splits["unlabelled"]
    if not messages or shards < 1:
        raise CloudError(
            f"There are {len(messages)} unlabelled messages for {shards} shards: expected at least one of each; "
            "see the task's unlabelled.jsonl."
        )
    for number in range(min(shards, len(messages))):
        rows = [{"id": message.id, "text": message.text} for message in messages[number::shards]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"shard-{number:03}.jsonl").write_text(text, "utf-8")


def run_teacher(
    *, task: Path, model: str, epochs: float, learning_rate: float, trained_layers: int, out: Path,
    environ: Mapping[str, str] = os.environ,
) -> None:  # fmt: skip
    """Fine-tune the base model on the labelled messages."""
    from slmops_course import training, tuning
    from slmops_course.artifacts import Store
    from slmops_course.models import get_model
    from slmops_course.profiles import PROFILES

    settings = replace(
        PROFILES["fast"].teacher, epochs=epochs, learning_rate=learning_rate, trained_layers=trained_layers
    )
    read = _load(task)
    with tempfile.TemporaryDirectory() as scratch:
        base = get_model(Store(environ.get(ARTIFACTS) or scratch), model)
        tuning.train_model(
            out, source=base.path, task=read, examples=read.splits["train"], settings=settings, freeze=training.freeze_below,
            shape=None, teacher=None, teaching=None, lora=None,
        )  # fmt: skip


def run_gather(*, task: Path, labelled: Path, min_kept: float, out: Path) -> None:
    """Put the shards' labels together, in the messages' order. Raises CloudError unless they are all there, once each."""
    from slmops_course import teachers

    parts = [teachers.load_labelled(folder) for folder in sorted(labelled.glob("shard-*")) if folder.is_dir()]
    kept = [example for part in parts for example in part.kept]
    rejected = [one for part in parts for one in part.rejected]
    order = {message.id: number for number, message in enumerate(_load(task).splits["unlabelled"])}
    found = [example.id for example in kept] + [one.where for one in rejected]
    if sorted(found) != sorted(order):
        raise CloudError(
            f"The shards hold labels of {len(found)} messages, {len(set(found) & order.keys())} of them known: expected each "
            f"of the task's {len(order)} unlabelled messages once; run the labelling step again."
        )
    if len(kept) < min_kept * len(order):
        raise CloudError(
            f"The teacher's labels of {len(kept)} of {len(order)} messages can be used: expected at least {min_kept:.0%}; look "
            "at the rejected ones, and train the teacher for longer or lower min_kept."
        )
    whole = teachers.Labelled(
        tuple(sorted(kept, key=lambda example: order[example.id])), tuple(sorted(rejected, key=lambda one: order[one.where]))
    )
    teachers.save_labelled(whole, out)


def run_distil(
    *, task: Path, teacher: Path, labels: Path, epochs: float, learning_rate: float, layers: int, tokens: int, out: Path,
    environ: Mapping[str, str] = os.environ,
) -> None:  # fmt: skip
    """Cut a student out of the teacher, train it, and log its exact match on the development messages."""
    from slmops_course import evaluation, teachers, training, tuning
    from slmops_course.chat import TorchChatModel
    from slmops_course.profiles import PROFILES
    from slmops_course.students import StudentShape

    read, profile = _load(task), PROFILES["fast"]
    tuning.train_model(
        out, source=teacher, task=read, examples=[*read.splits["train"], *teachers.load_labelled(labels).kept],
        settings=replace(profile.student, epochs=epochs, learning_rate=learning_rate), freeze=training.freeze_below,
        shape=StudentShape(layers=layers, tokens=tokens), teacher=teacher,
        teaching=replace(profile.teaching, matched_layers=min(profile.teaching.matched_layers, layers - 1)), lora=None,
    )  # fmt: skip
    with TorchChatModel(out, dtype=training.fast_dtype()) as chat:
        outcomes = evaluation.ask_and_judge(chat, read, read.splits["dev"])
    score = evaluation.score_outcomes(read, outcomes)["exact_match"].value
    (out / "metrics.json").write_text(json.dumps({"dev_exact_match": score}), "utf-8")
    log_metric("dev_exact_match", score, environ=environ)


def run_optimize(*, task: Path, student: Path, recipe: str, out: Path) -> None:
    """Make the student an ONNX model."""
    from slmops_course import optimize

    optimize.optimize(recipe, model=student, task=_load(task), folder=out)


def run_evaluate(
    *, task: Path, onnx: Path, device: str, min_messages: int, min_json_valid: float, min_score: float, out: Path
) -> None:
    """Measure the ONNX model and judge it; a refusal is a report like any other, which the next step acts on."""
    from slmops_course import evaluation
    from slmops_course.artifacts import Store
    from slmops_course.operations.gate import DEVICES, check_release
    from slmops_course.operations.release import gather_evidence
    from slmops_course.pipeline import Course

    if device not in DEVICES:
        raise CloudError(f"There is no device {device!r}: expected one of {', '.join(DEVICES)}.")
    with tempfile.TemporaryDirectory() as scratch:
        course = Course(Store(scratch), _load(task))
        evidence = gather_evidence(course, onnx, course.task.name)
    limits = replace(DEVICES[device], min_messages=min_messages, min_json_valid=min_json_valid, min_score=min_score)
    report = check_release(course.task, evidence, limits=limits)
    scores = evaluation.score_outcomes(course.task, evidence.outcomes)
    (out / "scores.json").write_text(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1), "utf-8")
    (out / "gate.json").write_text(report.to_json(), "utf-8")
    (out / "gate.md").write_text(f"{report}\n", "utf-8")
    print(report)


def run_release(*, onnx: Path, report: Path, out: Path) -> None:
    """Copy the model to where it is registered from. Raises CloudError for one that the gate refused or did not see."""
    from slmops_course.operations.bundles import bundle_digest, bundle_files
    from slmops_course.operations.gate import GateReport

    judged = GateReport.from_json((report / "gate.json").read_text("utf-8"))
    if judged.model_digest != bundle_digest(bundle_files(onnx)):
        raise CloudError("The gate's report is about other files than these: expected one on this model; evaluate it again.")
    if not judged.passed:
        lines = "; ".join(f"{check.name}: {check.found}, expected {check.expected}" for check in judged.failures)
        raise CloudError(f"The release gate refused the model ({lines}): nothing is registered; improve it and run again.")
    shutil.copytree(onnx, out, dirs_exist_ok=True)


def log_metric(name: str, value: float, *, environ: Mapping[str, str]) -> None:
    """Log a metric to the run that this process belongs to, if it belongs to one.

    Azure sets the variables MLFLOW_TRACKING_URI, MLFLOW_RUN_ID and MLFLOW_TRACKING_TOKEN for its jobs, the local runner the
    first two. An address azureml://… is the same as https://…, where MLflow's own client can talk to it: Azure's helper
    for R does so as well, https://learn.microsoft.com/azure/machine-learning/how-to-r-modify-script-for-production
    """
    uri = environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    from slmops_course.operations.book import Book

    address = f"https://{uri.removeprefix('azureml://')}" if uri.startswith("azureml://") else uri
    Book(address).ask("log_metric", environ.get("MLFLOW_RUN_ID", ""), name, value)


def _load(folder: Path):
    from slmops_course.tasks import load_task

    return load_task(folder)


if __name__ == "__main__":
    sys.exit(main())
