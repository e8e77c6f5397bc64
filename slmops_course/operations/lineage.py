"""Lineage: what a released model was made of and how, read from the manifests of the course's artifacts."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from slmops_course.artifacts import MANIFEST, Artifact, ArtifactError


def lineage_of(artifact: Artifact | Path) -> dict:
    """Every step on the way to an artifact, from the manifests beside it.

    A step has its stage, settings, inputs, code and libraries, and the hash of what came out. An input is named by the
    step that made it, and else by the hash of its contents: that is where the data of the task appear.

    Example: lineage_of(course.onnx("int8").path)["artifact"] -> "onnx-int8-5978c58fc582", and its "steps" ->
    {"onnx-int8-5978c58fc582": {"stage": "onnx-int8", "inputs": {"model": "student-cd2f8076ada9", "train": "9f0c…"}, …},
    "student-cd2f8076ada9": {…}, …}

    Raises ArtifactError for a folder that is no artifact.
    """
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    made_by: dict[str, Artifact] = {}
    for manifest in sorted(path.parent.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(ArtifactError):  # a damaged neighbor is no step on the way, or is named by its hash
            other = _read(manifest.parent)
            made_by.setdefault(other.digest, other)
    steps, waiting = {}, [_read(path)]
    while waiting:
        step = waiting.pop()
        if step.path.name in steps:
            continue
        found = {name: made_by.get(digest) for name, digest in step.manifest["inputs"].items()}
        waiting += filter(None, found.values())
        steps[step.path.name] = {
            "inputs": {name: found[name].path.name if found[name] else step.manifest["inputs"][name] for name in found},
            "sha256": step.digest,
            **{key: step.manifest[key] for key in ("stage", "settings", "code", "libraries")},
        }
    return {"artifact": path.name, "steps": steps}


def format_lineage(lineage: Mapping) -> str:
    """A lineage for a person: a line for each step and what it was made from, latest first; plain JSON if it has no steps.

    Example: "- onnx-int8-5978c58fc582 from model: student-cd2f8076ada9, train: 9f0c6a1e22b1…"
    """
    steps = lineage.get("steps")
    if not isinstance(steps, Mapping) or lineage.get("artifact") not in steps:
        return json.dumps(lineage, indent=1, ensure_ascii=False, sort_keys=True)
    lines, names = [], [lineage["artifact"]]
    for name in names:
        inputs = steps[name].get("inputs", {})
        lines.append(f"- {name} from {', '.join(f'{key}: {_short(value)}' for key, value in inputs.items()) or 'nothing else'}")
        for value in inputs.values():
            if value in steps and value not in names:
                names.append(value)
    return "\n".join(lines)


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) == 64 else value


def _read(folder: Path) -> Artifact:
    try:
        artifact = Artifact(folder, json.loads((folder / MANIFEST).read_text("utf-8")))
        missing = {"stage", "settings", "inputs", "code", "libraries", "files"} - artifact.manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder} has no readable {MANIFEST} ({type(error).__name__}): expected an artifact of the course; build it."
        ) from None
    if missing:
        raise ArtifactError(f"{folder.name}/{MANIFEST} has no {min(missing)}: expected an artifact's manifest; build it again.")
    return artifact
