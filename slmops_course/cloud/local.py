"""Executes a pipeline file on this machine: the same steps, commands, values and connections as in the cloud.

Each step's result is an artifact, so a step that was finished before, with the same command, inputs and course, is not
run again. What is not the same: steps run one after the other, in this machine's environment, and a sweep tries its
values in the order of the file.
"""

import functools
import itertools
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_course.artifacts import Artifact, Store, content_digest
from slmops_course.cloud import entry, steps
from slmops_course.cloud.checks import check_pipeline, value_problems
from slmops_course.cloud.definition import REFERENCE, CloudError, Pipeline, Step, references
from slmops_course.errors import CourseError

Execute = Callable[[Sequence[str], Mapping[str, str]], None]
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """What a local run made: the artifact and output folder of each step, each sweep's trials, and what was registered."""

    outputs: Mapping[str, Mapping[str, Path]]  # step -> output -> folder
    artifacts: Mapping[str, Artifact]
    trials: Mapping[str, Sequence[Mapping]]  # sweep -> [{"learning_rate": 0.001, "dev_exact_match": 0.7}, …]
    registered: Mapping[str, object]  # output of the pipeline -> operations.versions.Version


def run_pipeline(
    pipeline: Pipeline, build: Path, *, inputs: Mapping[str, object] | None = None, execute: Execute | None = None
) -> Run:
    """Run every step of a pipeline. `inputs` replace values of the pipeline's own.

    Artifacts go into `build/artifacts`, named outputs into the registry in `build/registry`. `execute` carries out a command
    with further environment variables; see `run_process` (the default: a process of its own) and `run_here`.
    Example: run_pipeline(load_pipeline("deploy/azure/pipeline.yml"), Path("build")).trials["distil"]
    Raises CloudError for a pipeline that `check_pipeline` finds fault with, before anything runs, and for a step that fails.
    """
    pipeline = with_inputs(pipeline, inputs or {})
    problems = check_pipeline(pipeline)
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise CloudError(f"{pipeline.path.name} cannot be run: {problems[0]}{more}: expected none; see `slmops cloud check`.")
    state = _State(pipeline, Store(build / "artifacts"), build, execute or run_process)
    for name in pipeline.order():
        step = pipeline.steps[name]
        run = {"command": _run_command, "parallel": _run_parallel, "sweep": _run_sweep}[step.kind]
        state.artifacts[name] = run(state, step)
    registered = {name: version for name in pipeline.outputs if (version := _register(state, name)) is not None}
    outputs = {name: state.outputs(name) for name in state.artifacts}
    return Run(outputs, state.artifacts, state.trials, registered)


def with_inputs(pipeline: Pipeline, inputs: Mapping[str, object]) -> Pipeline:
    """The pipeline with other values of its inputs. Raises CloudError for an input that it does not have."""
    from dataclasses import replace

    for name in inputs:
        if name not in pipeline.inputs:
            raise CloudError(f"The pipeline has no input {name!r}: expected one of {', '.join(pipeline.inputs)}.")
    given = {
        name: {**pipeline.inputs[name], "path": str(Path(value).resolve())}
        if isinstance(pipeline.inputs[name], Mapping) and isinstance(value, str | Path) else value
        for name, value in inputs.items()
    }  # fmt: skip
    return replace(pipeline, inputs={**pipeline.inputs, **given})


def run_process(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Carry out a command in a process of its own; `python` is this one. Raises CloudError with its last words."""
    words = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths, **variables}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CloudError(f"{' '.join(command[:4])} failed ({last}): expected it to end well; mend that and run again.")


def run_here(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Carry out a step of the course in this process: for rehearsals, where starting Python takes longer than the work."""
    modules = {
        "slmops_course.cloud.steps": lambda words: steps.carry_out(words, environ={**os.environ, **variables}),
        "slmops_course.cloud.entry": lambda words: entry.run_specification(Path(words[0])),
    }
    if list(command[:2]) != ["python", "-m"] or command[2] not in modules:
        raise CloudError(f"{command[:3]} is no step of the course: expected python -m slmops_course.cloud.steps …")
    try:
        modules[command[2]](list(command[3:]))
    except CourseError as error:
        what = " ".join(command[:4])
        raise CloudError(f"{what} failed ({error}): expected it to end well; mend that and run again.") from None


@dataclass
class _State:
    pipeline: Pipeline
    store: Store
    build: Path
    execute: Execute

    def __post_init__(self):
        self.artifacts: dict[str, Artifact] = {}
        self.trials: dict[str, list[dict]] = {}

    def outputs(self, name: str) -> dict[str, Path]:
        step = self.pipeline.steps[name]
        return {output: self.artifacts[name].path / output for output in step.component.outputs}

    def values(self, step: Step, found: Mapping[str, object] | None = None) -> dict[str, object]:
        """The step's inputs as plain values and paths; `found` are those of a sweep's trial."""
        values = {name: port.default for name, port in step.component.inputs.items() if port.default is not None}
        for name, value in {**step.inputs, **(found or {})}.items():
            values[name] = self._value(value)
        problems = [p for name, value in values.items() if not isinstance(value, Path)
                    for p in value_problems(step.component.inputs[name], value)]  # fmt: skip
        if problems:
            raise CloudError(f"{step.name}: {problems[0]}; correct it.")
        return values

    def _value(self, value: object) -> object:
        named = references(value)
        parts = named[0].split(".") if named else []
        if parts[:2] == ["parent", "jobs"]:
            return self.outputs(parts[2])[parts[4]]
        if parts[:2] == ["parent", "inputs"]:
            value = self.pipeline.inputs[parts[2]]
        if isinstance(value, Mapping) and "path" in value:
            return (self.pipeline.path.parent / value["path"]).resolve()
        return value

    def finish(self, step: Step, values: Mapping[str, object], write: Callable[[Path], None], stage: str) -> Artifact:
        """The step's artifact, made by `write` where it is not there."""
        # A model may be given as a folder of this machine: its contents count, not where it lies.
        folders = {name: Path(value) for name, value in values.items() if isinstance(value, str) and Path(value).is_dir()}
        inputs = folders | {name: value for name, value in values.items() if isinstance(value, Path)}
        plain = {name: value for name, value in values.items() if name not in inputs}
        made_by = {artifact.path: artifact for artifact in self.artifacts.values()}
        sources = {name: made_by.get(path.parent, path) for name, path in inputs.items()}
        return self.store.build(
            f"cloud-{stage}", settings={"command": step.component.command, "values": plain, "course": _course_digest()},
            inputs=sources, write=lambda folder: write(folder) and None,
        )  # fmt: skip


def _run_command(state: _State, step: Step, found: Mapping[str, object] | None = None, stage: str | None = None,
                 variables: Mapping[str, str] | None = None) -> Artifact:  # fmt: skip
    values = state.values(step, found)

    def write(folder: Path) -> None:
        outputs = {name: folder / name for name in step.component.outputs}
        for path in outputs.values():
            path.mkdir()
        state.execute(fill_in(step.component.command, values, outputs), {**_variables(state), **(variables or {})})

    return state.finish(step, values, write, stage or step.name)


def fill_in(command: str, values: Mapping[str, object], outputs: Mapping[str, Path]) -> list[str]:
    """A component's command as words, its ${{…}} filled in. A value with a space stays one word.

    Example: fill_in("--task ${{inputs.task}}", {"task": Path("my desk")}, {}) -> ["--task", "my desk"]
    """
    table = {f"inputs.{name}": value for name, value in values.items()}
    table |= {f"outputs.{name}": path for name, path in outputs.items()}
    return [REFERENCE.sub(lambda match: str(table[match[1]]), word) for word in shlex.split(command)]


def _run_parallel(state: _State, step: Step) -> Artifact:
    values, raw = state.values(step), step.component.raw
    shards = values[references(raw["input_data"])[0].split(".")[1]]

    def write(folder: Path) -> None:
        outputs = {name: folder / name for name in step.component.outputs}
        for path in outputs.values():
            path.mkdir()
        spec = {
            "script": str(step.component.entry_script.resolve()),
            "arguments": fill_in(step.component.command, values, outputs),
            "files": [str(file) for file in sorted(shards.iterdir()) if file.is_file()],
            "batch_size": int(raw["mini_batch_size"]),
            "retries": int((raw.get("retry_settings") or {}).get("max_retries", 2)),
            "failures": int(raw.get("mini_batch_error_threshold", -1)),
        }
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "spec.json"
            path.write_text(json.dumps(spec), "utf-8")
            state.execute(["python", "-m", "slmops_course.cloud.entry", str(path)], _variables(state))

    return state.finish(step, values, write, step.name)


def _run_sweep(state: _State, step: Step) -> Artifact:
    goal, metric = step.raw["objective"]["goal"], step.raw["objective"]["primary_metric"]
    trials = []
    for number, found in enumerate(search_points(step)):
        book, run_id = _tracked(state.build, f"{step.name}-{number}")
        variables = {"MLFLOW_TRACKING_URI": book.uri, "MLFLOW_RUN_ID": run_id}
        artifact = _run_command(state, step, found, f"{step.name}-trial", variables)
        logged = _kept_metrics(state, artifact, book.ask("get_run", run_id).data.metrics)
        if metric not in logged:
            raise CloudError(
                f"{step.name}: trial {number} logged {sorted(logged) or 'no metric'}: expected {metric}, the sweep's "
                "primary_metric; name another, or log it."
            )
        trials.append((artifact, {**found, metric: logged[metric]}))
    best = {"maximize": max, "minimize": min}[goal](trials, key=lambda trial: trial[1][metric])
    state.trials[step.name] = [trial for _, trial in trials]
    return best[0]


def _kept_metrics(state: _State, artifact: Artifact, logged: Mapping[str, float]) -> Mapping[str, float]:
    """What a trial logged; of one that was finished in an earlier run, what it logged then."""
    path = state.build / "cloud" / "metrics" / f"{artifact.path.name}.json"
    if logged or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(logged)), "utf-8")
    return json.loads(path.read_text("utf-8"))


def search_points(step: Step, *, seed: int = 0) -> list[dict]:
    """The values that a sweep tries, up to max_total_trials: all of a grid, or drawn at random.

    Example: learning_rate: choice of 0.001 and 0.002 -> [{"learning_rate": 0.001}, {"learning_rate": 0.002}]
    Raises CloudError for an algorithm that only the service knows.
    """
    algorithm = step.raw["sampling_algorithm"]
    algorithm = algorithm["type"] if isinstance(algorithm, Mapping) else algorithm
    most, space = int(step.raw["limits"]["max_total_trials"]), step.search_space
    if algorithm == "grid":
        points = itertools.product(*(part["values"] for part in space.values()))
        return [dict(zip(space, point, strict=True)) for point in itertools.islice(points, most)]
    if algorithm != "random":
        raise CloudError(f"{step.name}: the local runner searches by grid or random, not by {algorithm}; choose one of them.")
    rng = random.Random(seed)
    return [{name: _draw(part, rng) for name, part in space.items()} for _ in range(most)]


def _draw(part: Mapping, rng: random.Random) -> object:
    if part["type"] == "choice":
        return rng.choice(part["values"])
    drawn = rng.uniform(part["min_value"], part["max_value"])
    return math.exp(drawn) if part["type"] == "loguniform" else drawn


def _tracked(build: Path, name: str) -> tuple:
    """A new run in an MLflow book in the build folder, as Azure makes one for each trial: the book and the run's id."""
    from filelock import FileLock

    from slmops_course.operations.book import open_file

    folder = build / "cloud"
    folder.mkdir(parents=True, exist_ok=True)
    book = open_file(folder.resolve() / "metrics.db", FileLock(folder / "metrics.lock"))
    return book, book.ask("create_run", "0", run_name=name).info.run_id


def _register(state: _State, name: str):
    """Register a named output of the pipeline, with its lineage, and the gate's report if its step had one."""
    from slmops_course.operations.gate import GateReport
    from slmops_course.operations.lineage import lineage_of
    from slmops_course.operations.registry import Registry

    output = state.pipeline.outputs[name] or {}
    if not output.get("name"):
        return None
    step, port = next(
        (step, port) for step in state.pipeline.steps.values() for port, value in step.outputs.items()
        if references(value) == [f"parent.outputs.{name}"]
    )  # fmt: skip
    reports = [path / "gate.json" for path in state.values(step).values() if isinstance(path, Path)]
    report = next((GateReport.from_json(path.read_text("utf-8")) for path in reports if path.is_file()), None)
    registry = Registry(state.build / "registry")
    artifact = state.artifacts[step.name]
    return registry.register(output["name"], artifact.path / port, lineage=lineage_of(artifact), report=report)


def _variables(state: _State) -> dict[str, str]:
    return {steps.ARTIFACTS: str(state.store.root.resolve()), "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def _course_digest() -> str:
    """A hash of the course's own code: Azure, too, runs a step again when its environment changed."""
    import hashlib

    files = sorted(PACKAGE.rglob("*.py"))
    return hashlib.sha256("".join(content_digest(file) for file in files).encode()).hexdigest()[:16]
