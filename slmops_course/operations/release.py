"""From a built model to a version in the registry: measure it, judge it at the gate, register it with the report."""

import json
from pathlib import Path

from slmops_course import benchmark, evaluation, optimize, tasks
from slmops_course.operations.bundles import bundle_digest, bundle_files
from slmops_course.operations.gate import DEVICES, Evidence, GateError, check_release, must_pass_messages
from slmops_course.operations.lineage import lineage_of
from slmops_course.operations.registry import Registry
from slmops_course.operations.versions import PRODUCTION, Version


def gather_evidence(course, folder: Path, name: str) -> Evidence:
    """What an ONNX model's folder makes of the test and must-pass messages, and its speed and memory on this machine.

    It is measured once for the same files, and what the scoreboard measured of them already is taken from there.
    """
    task, contender = course.task, _contender_of(course, folder)
    must_pass = must_pass_messages(task)
    test = task.splits["test"][: course.profile.test_messages]
    timed = task.splits["dev"][: course.profile.speed_messages]

    def write(out: Path) -> None:
        with benchmark.open_model("genai", folder) as chat:
            answered = {"must_pass": evaluation.ask_and_judge(chat, task, must_pass)}
            answered["test"] = course.outcomes(contender) if contender else evaluation.ask_and_judge(chat, task, test)
        for split, outcomes in answered.items():
            (out / f"{split}.jsonl").write_text(evaluation.outcomes_to_json(outcomes), "utf-8")
        asks = [task.messages(example.text) for example in timed]
        speed = course.speed(contender) if contender else benchmark.measure_speed("genai", folder, asks)
        (out / "speed.json").write_text(json.dumps({"latency_s": speed.latency_s, "memory_bytes": speed.memory_bytes}), "utf-8")

    files = bundle_files(folder)
    artifact = course.store.build(
        "evidence", write=write, inputs=tasks.task_inputs(course.task),
        settings={
            "files": files, "messages": len(test), "timed": len(timed),
            "must_pass": [[example.text, task.target(example.answer)] for example in must_pass],
        },
        code=(gather_evidence, evaluation.judge, benchmark.time_replies, benchmark.CHAT_MODELS["genai"]),
    )  # fmt: skip
    outcomes = {
        split: evaluation.outcomes_from_json((artifact.path / f"{split}.jsonl").read_text("utf-8"))
        for split in ("test", "must_pass")
    }
    return Evidence(
        name, outcomes["test"], outcomes["must_pass"], **artifact.json("speed.json"),
        size_bytes=optimize.model_bytes(folder), model_digest=bundle_digest(files),
    )  # fmt: skip


def _contender_of(course, folder: Path) -> str | None:
    """The scoreboard's name of an artifact of the student, where the folder is one."""
    recipes = [recipe for recipe in optimize.RECIPES if folder.name.startswith(f"onnx-{recipe}-")]
    return next((f"student {recipe}" for recipe in recipes if course.onnx(recipe).path == folder), None)


def release(course, registry: Registry, folder: Path, *, name: str | None = None, device: str = "laptop") -> Version:
    """Register an artifact's folder with its lineage and the gate's report for a device. It is not promoted by that.

    The gate compares it with the version in production, if there is one; what is in production already is not judged again.
    Example: `release(course, registry, course.onnx("int4-rtn").path).report.passed` -> True
    Raises GateError for an unknown device.
    """
    if device not in DEVICES:
        raise GateError(f"There is no device {device!r}: expected one of {', '.join(DEVICES)}.")
    name, files = name or course.task.name, bundle_files(folder)
    versions = registry.versions(name)
    current = next((version for version in versions if PRODUCTION in version.aliases), None)
    if current is not None and current.files == files:
        return current
    number = next((version.number for version in versions if version.files == files), len(versions) + 1)
    candidate = gather_evidence(course, folder, f"{name} {number}")
    before = None
    if current is not None:
        before = gather_evidence(course, registry.get(name, current.number).folder, f"{name} {current.number}")
    report = check_release(course.task, candidate, current=before, limits=DEVICES[device])
    return registry.register(name, folder, lineage=lineage_of(folder), report=report)
