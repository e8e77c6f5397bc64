"""A pipeline definition in Azure Machine Learning's YAML, read into plain values.

The checker, the local runner and the cost estimate read the file by this module; `azure-ai-ml` reads the same file when
it is submitted. Azure's package is not needed here.
Source of the format: https://learn.microsoft.com/azure/machine-learning/reference-yaml-job-pipeline
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from slmops_course.errors import CourseError

REFERENCE = re.compile(r"\$\{\{\s*([\w.\-]+)\s*\}\}")  # ${{parent.inputs.task}}
FOLDERS = ("uri_folder", "uri_file", "custom_model", "mlflow_model", "mltable")  # types that are paths, not values
KINDS = ("command", "parallel", "sweep")


class CloudError(CourseError):
    """A pipeline that cannot be read, run, priced or submitted."""


@dataclass(frozen=True)
class Port:
    """An input of a component: what it takes."""

    name: str
    type: str  # "integer", "number", "string", "boolean", or one of FOLDERS
    default: object = None
    optional: bool = False
    enum: tuple | None = None
    min: float | None = None
    max: float | None = None

    @property
    def is_folder(self) -> bool:
        return self.type in FOLDERS


@dataclass(frozen=True)
class Component:
    """What a step does, whatever pipeline it is in."""

    path: Path
    kind: str  # "command" or "parallel"
    inputs: Mapping[str, Port]
    outputs: Mapping[str, str]  # name -> type
    raw: Mapping  # the file

    @property
    def command(self) -> str:
        """The command with its ${{…}}; of a parallel component, the arguments of its entry script."""
        return str(self.raw.get("command") if self.kind == "command" else self._task.get("program_arguments", "")) or ""

    @property
    def environment(self) -> Mapping | str | None:
        return self.raw.get("environment") if self.kind == "command" else self._task.get("environment")

    @property
    def code(self) -> Path | None:
        """The folder that is uploaded, and in which the command is started."""
        found = self.raw.get("code") if self.kind == "command" else self._task.get("code")
        return None if found is None else self.path.parent / str(found)

    @property
    def entry_script(self) -> Path | None:
        """The script of a parallel component."""
        if "entry_script" not in self._task:
            return None
        return (self.code or self.path.parent) / str(self._task["entry_script"])

    @property
    def expected_minutes(self) -> float | None:
        """How long it is expected to take on its machine, by its tag; None where nobody said."""
        found = (self.raw.get("tags") or {}).get("expected_minutes")
        return None if found is None else float(found)

    @property
    def _task(self) -> Mapping:
        return self.raw.get("task") or {}


@dataclass(frozen=True)
class Step:
    """A component's place in a pipeline."""

    name: str
    kind: str  # one of KINDS
    component: Component
    inputs: Mapping[str, object]  # values, or text with a reference
    outputs: Mapping[str, object]
    compute: str | None
    raw: Mapping

    @cached_property
    def waits_for(self) -> set[str]:
        """The steps whose outputs it reads."""
        parts = [name.split(".") for value in self.inputs.values() for name in references(value)]
        return {part[2] for part in parts if len(part) > 2 and part[:2] == ["parent", "jobs"]}

    @property
    def search_space(self) -> Mapping:
        return self.raw.get("search_space") or {}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file with its components."""

    path: Path
    inputs: Mapping[str, object]  # a value, or {"type": "uri_folder", "path": …}
    outputs: Mapping[str, object]
    steps: Mapping[str, Step]
    raw: Mapping

    def order(self) -> list[str]:
        """The steps so that each comes after those it waits for. Raises CloudError for a cycle."""
        known = {name: step.waits_for & self.steps.keys() for name, step in self.steps.items()}
        try:
            return list(TopologicalSorter(known).static_order())
        except CycleError as error:
            raise CloudError(
                f"{self.path.name}: the steps {' -> '.join(reversed(error.args[1]))} wait for each other: expected an order; "
                "take one of these inputs from elsewhere."
            ) from None


def references(value: object) -> list[str]:
    """What is named in ${{…}}. Example: "--task ${{inputs.task}}" -> ["inputs.task"]; 3 -> []"""
    return REFERENCE.findall(value) if isinstance(value, str) else []


def read_yaml(path: Path) -> dict:
    """A YAML file that holds a mapping. Raises CloudError for anything else."""
    import yaml

    try:
        # The reader in C is ten times as fast, where it is there.
        found = yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CloudError(f"{path} cannot be read ({' '.join(str(error).split())}): expected a YAML file; mend it.") from None
    if not isinstance(found, dict):
        raise CloudError(f"{path} holds {type(found).__name__}: expected a YAML mapping; see deploy/azure/pipeline.yml.")
    return found


def load_pipeline(path: Path | str) -> Pipeline:
    """Read a pipeline and the components that it names; paths in a file are relative to that file.

    Example: load_pipeline("deploy/azure/pipeline.yml").order() -> ["shard", "teacher", "label", …, "release"]
    Raises CloudError for a file that is missing or of another form. What the files say is judged by `checks`.
    """
    path = Path(path)
    raw = read_yaml(path)
    if raw.get("type") != "pipeline" or not _mapping(raw, "jobs"):
        found = raw.get("type")
        raise CloudError(f"{path} is of type {found!r}: expected a pipeline with jobs; see deploy/azure/pipeline.yml.")
    default = (_mapping(raw, "settings")).get("default_compute")
    steps = {}
    for name, job in _mapping(raw, "jobs").items():
        kind = job.get("type") if isinstance(job, dict) else None
        file = job.get("trial" if kind == "sweep" else "component") if kind in KINDS else None
        if not isinstance(file, str):
            raise CloudError(
                f"{path.name}, jobs.{name}: it is of type {kind!r} and names no component file: expected one of "
                f"{', '.join(KINDS)} with `component:`, or `trial:` of a sweep; write it so."
            )
        component = load_component(path.parent / file.removeprefix("file:"))
        steps[name] = Step(
            name, kind, component, _mapping(job, "inputs"), _mapping(job, "outputs"), job.get("compute", default), job
        )
    return Pipeline(path, _mapping(raw, "inputs"), _mapping(raw, "outputs"), steps, raw)


def load_component(path: Path) -> Component:
    """Read a component's file. Raises CloudError for one that is missing or of another form."""
    raw = read_yaml(path)
    if raw.get("type") not in ("command", "parallel"):
        raise CloudError(f"{path} is of type {raw.get('type')!r}: expected a command or parallel component; see its neighbors.")
    inputs = {name: _port(path, name, spec) for name, spec in _mapping(raw, "inputs").items()}
    outputs = {name: str((spec or {}).get("type", "uri_folder")) for name, spec in _mapping(raw, "outputs").items()}
    return Component(path, raw["type"], inputs, outputs, raw)


def _port(path: Path, name: str, spec: object) -> Port:
    if not isinstance(spec, dict) or "type" not in spec:
        raise CloudError(f"{path.name}, inputs.{name}: expected a type, such as `type: integer`; write one.")
    enum = tuple(spec["enum"]) if spec.get("enum") else None
    return Port(
        name, spec["type"], spec.get("default"), bool(spec.get("optional")), enum, spec.get("min"), spec.get("max")
    )


def _mapping(raw: Mapping, key: str) -> dict:
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise CloudError(f"`{key}` holds {type(found).__name__}: expected a mapping of names; write `name: value` lines.")
    return found
