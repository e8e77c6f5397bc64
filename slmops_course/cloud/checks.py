"""What Azure's own validation lets through and the service, or nobody, would find later.

`azure-ai-ml` 1.35 checks the form of the files. It accepts a reference to a step, an input or an output that is not
there, a cycle, a value outside an enum, and text where a number is expected.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from slmops_course.cloud.definition import (
    REFERENCE,
    CloudError,
    Component,
    Pipeline,
    Port,
    Step,
    read_yaml,
    references,
)

SAMPLING = ("grid", "random", "bayesian", "sobol")
DISTRIBUTIONS = ("choice", "uniform", "loguniform")
TYPES = {"integer": (int,), "number": (int, float), "string": (str,), "boolean": (bool,)}


def check_pipeline(pipeline: Pipeline) -> list[str]:
    """Say what is wrong with a pipeline, one sentence each; an empty list means that it can be run and submitted.

    Example: ["distil: its input labels is taken from the step gathr, which is not there; the steps are shard, …"]
    """
    problems = []
    try:
        pipeline.order()
    except CloudError as error:
        problems.append(str(error))
    for step in pipeline.steps.values():
        problems += [f"{step.name}: {problem}" for problem in _check_step(pipeline, step)]
    problems += _check_outputs(pipeline)
    for component in {step.component.path: step.component for step in pipeline.steps.values()}.values():
        problems += [f"{component.path.name}: {problem}" for problem in _check_component(component)]
    return problems


def _check_step(pipeline: Pipeline, step: Step) -> Iterator[str]:
    ports = step.component.inputs
    given = step.inputs.keys() | step.search_space.keys()
    for name in given - ports.keys():
        yield f"it sets the input {name}, which its component does not have; it has {_names(ports)}"
    for name, port in ports.items():
        if name not in given and port.default is None and not port.optional:
            yield f"its component's input {name} is not set and has no default; set it under inputs"
    for name, value in step.inputs.items():
        if name in ports:
            yield from _check_input(pipeline, step, ports[name], value)
    for name, value in step.outputs.items():
        if name not in step.component.outputs:
            yield f"it sets the output {name}, which its component does not have; it has {_names(step.component.outputs)}"
        for reference in references(value):
            if reference.split(".")[:2] != ["parent", "outputs"] or reference.split(".")[-1] not in pipeline.outputs:
                yield f"its output {name} is {reference}, which is no output of the pipeline; it has {_names(pipeline.outputs)}"
    yield from _check_compute(pipeline, step)
    if step.kind == "sweep":
        yield from _check_sweep(step)
    elif (step.kind == "parallel") != (step.component.kind == "parallel"):
        yield f"it is of type {step.kind} and its component of type {step.component.kind}; make them the same"


def _check_input(pipeline: Pipeline, step: Step, port: Port, value: object) -> Iterator[str]:
    named = references(value)
    if isinstance(value, str) and ("${{" in value) and (len(named) != 1 or not REFERENCE.fullmatch(value.strip())):
        yield f"its input {port.name} is {value!r}; expected one reference such as ${{{{parent.inputs.task}}}} and nothing else"
        return
    if not named:
        yield from (f"its input {problem}" for problem in value_problems(port, value))
        return
    parts = named[0].split(".")
    if parts[:2] == ["parent", "inputs"] and len(parts) == 3:
        if parts[2] not in pipeline.inputs:
            has = _names(pipeline.inputs)
            yield f"its input {port.name} is the pipeline's input {parts[2]}, which is not there; it has {has}"
            return
        found = pipeline.inputs[parts[2]]
        if isinstance(found, Mapping) and "path" in found:
            if not port.is_folder:
                yield f"its input {port.name} is of type {port.type} and gets the folder {parts[2]}"
        else:
            from_where = f"(from the pipeline's input {parts[2]})"
            yield from (f"its input {problem} {from_where}" for problem in value_problems(port, found))
    elif parts[:2] == ["parent", "jobs"] and len(parts) == 5 and parts[3] == "outputs":
        if parts[2] not in pipeline.steps:
            has = _names(pipeline.steps)
            yield f"its input {port.name} is taken from the step {parts[2]}, which is not there; the steps are {has}"
        elif parts[4] not in pipeline.steps[parts[2]].component.outputs:
            has = _names(pipeline.steps[parts[2]].component.outputs)
            yield f"its input {port.name} is the output {parts[4]} of {parts[2]}, which is not there; it has {has}"
        elif not port.is_folder:
            yield f"its input {port.name} is of type {port.type} and gets a folder from the step {parts[2]}"
    else:
        yield f"its input {port.name} is {named[0]}; expected parent.inputs.NAME or parent.jobs.STEP.outputs.NAME"


def value_problems(port: Port, value: object) -> list[str]:
    """Why a value does not fit an input. Azure takes texts of numbers too, so "3" is an integer.

    Example: Port("shards", "integer", min=1), "four" -> ["shards is 'four'; expected an integer"]
    """
    if port.is_folder:
        path = value.get("path") if isinstance(value, Mapping) else value
        return [] if isinstance(path, str) and path else [f"{port.name} is {value!r}; expected a folder"]
    if port.type not in TYPES:
        return [f"{port.name} is of the type {port.type!r}; expected one of {', '.join((*TYPES, 'uri_folder'))}"]
    number = _number(value) if port.type in ("integer", "number") else None
    if port.type in ("integer", "number"):
        if number is None or (port.type == "integer" and number != int(number)):
            return [f"{port.name} is {value!r}; expected {'an integer' if port.type == 'integer' else 'a number'}"]
    elif not isinstance(value, TYPES[port.type]):
        return [f"{port.name} is {value!r}; expected a {port.type}"]
    if port.enum and value not in port.enum:
        return [f"{port.name} is {value!r}; expected one of {', '.join(map(str, port.enum))}"]
    if number is not None and port.min is not None and number < port.min:
        return [f"{port.name} is {value}; expected at least {port.min}"]
    if number is not None and port.max is not None and number > port.max:
        return [f"{port.name} is {value}; expected at most {port.max}"]
    return []


def _number(value: object) -> float | None:
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and number == number and abs(number) != float("inf") else None


def _check_compute(pipeline: Pipeline, step: Step) -> Iterator[str]:
    if not step.compute:
        yield "it has no compute and the pipeline no default_compute; name a cluster, such as azureml:cpu-cluster"
    elif compute_file(pipeline, step.compute) is None:
        yield f"its compute {step.compute} has no file in {pipeline.path.parent / 'compute'}; write one or correct the name"


def compute_file(pipeline: Pipeline, compute: str) -> Path | None:
    """The cluster's definition beside the pipeline. Example: "azureml:cpu-cluster" -> compute/cpu-cluster.yml"""
    path = pipeline.path.parent / "compute" / f"{str(compute).removeprefix('azureml:')}.yml"
    return path if path.is_file() else None


def _check_sweep(step: Step) -> Iterator[str]:
    raw = step.raw
    algorithm = raw.get("sampling_algorithm")
    algorithm = algorithm.get("type") if isinstance(algorithm, Mapping) else algorithm
    if algorithm not in SAMPLING:
        yield f"its sampling_algorithm is {algorithm!r}; expected one of {', '.join(SAMPLING)}"
    objective = raw.get("objective") or {}
    if objective.get("goal") not in ("minimize", "maximize") or not objective.get("primary_metric"):
        yield f"its objective is {dict(objective)}; expected a goal, minimize or maximize, and a primary_metric"
    for name in ("max_total_trials", "max_concurrent_trials", "timeout", "trial_timeout"):
        limit = (raw.get("limits") or {}).get(name)
        if (_number(limit) or 0) < 1:
            yield f"its limit {name} is {limit!r}; expected a number of at least 1: a sweep costs money"
    if not step.search_space:
        yield "it searches nothing; expected an input's name and its values under search_space"
    for name, space in step.search_space.items():
        if name in step.inputs:
            yield f"{name} is both set and searched; take it out of one"
        kind = space.get("type") if isinstance(space, Mapping) else None
        if kind not in DISTRIBUTIONS:
            yield f"its search_space {name} is of type {kind!r}; expected one of {', '.join(DISTRIBUTIONS)}"
        elif algorithm == "grid" and kind != "choice":
            yield f"its search_space {name} is {kind}; a grid needs a choice of values"
        elif name in step.component.inputs:
            values = space.get("values") or [] if kind == "choice" else [space.get("min_value"), space.get("max_value")]
            if not values:
                yield f"its search_space {name} has no values; list some"
            for value in values:
                yield from (f"its search_space {problem}" for problem in value_problems(step.component.inputs[name], value))


def _check_outputs(pipeline: Pipeline) -> Iterator[str]:
    for name, output in pipeline.outputs.items():
        from_steps = [
            (step, port) for step in pipeline.steps.values() for port, value in step.outputs.items()
            if references(value) == [f"parent.outputs.{name}"]
        ]  # fmt: skip
        if len(from_steps) != 1:
            wanted = f"${{{{parent.outputs.{name}}}}}"
            yield f"the pipeline's output {name} is written by {len(from_steps)} steps; expected one with {wanted}"
            continue
        step, port = from_steps[0]
        wanted, made = (output or {}).get("type", "uri_folder"), step.component.outputs.get(port)
        if made is not None and wanted != made:
            yield f"the pipeline's output {name} is of type {wanted} and {step.name} writes {made}; make them the same"
    for name, value in pipeline.inputs.items():
        path = value.get("path") if isinstance(value, Mapping) else None
        local = isinstance(path, str) and not path.startswith(("azureml:", "http://", "https://", "wasbs:", "abfss:"))
        if local and not (pipeline.path.parent / path).exists():
            yield f"the pipeline's input {name} is the folder {path}, which is not there; correct the path"


def _check_component(component: Component) -> Iterator[str]:
    named = set(references(component.command)) | set(references(component.raw.get("input_data")))
    declared = {f"inputs.{name}" for name in component.inputs} | {f"outputs.{name}" for name in component.outputs}
    for reference in sorted(named - declared):
        yield f"its command names {reference}, which it does not declare"
    for name in sorted(declared - named):
        yield f"it declares {name} and its command never uses it"
    for port in component.inputs.values():
        if port.default is not None:
            yield from (f"the default of {problem}" for problem in value_problems(port, port.default))
    yield from _check_environment(component)
    if component.kind == "parallel":
        yield from _check_parallel(component)
    else:
        yield from _check_command(component)


def _check_environment(component: Component) -> Iterator[str]:
    environment = component.environment
    if not environment:
        yield "it has no environment; expected an image and a conda_file, as its neighbors have"
    elif isinstance(environment, Mapping) and "build" in environment:
        build = environment["build"] or {}
        folder = component.path.parent / str(build.get("path", ""))
        if not (folder / str(build.get("dockerfile_path", "Dockerfile"))).is_file():
            yield f"its environment is built from {build}, where no Dockerfile is; correct the path"
    elif isinstance(environment, Mapping):
        conda = environment.get("conda_file")
        if not environment.get("image"):
            yield "its environment has neither a build path nor an image; give it one"
        if isinstance(conda, str) and not (component.path.parent / conda).is_file():
            yield f"its environment's conda_file {conda} is not there; correct the path"


def _check_parallel(component: Component) -> Iterator[str]:
    if component.entry_script is None or not component.entry_script.is_file():
        script = (component.raw.get("task") or {}).get("entry_script")
        yield f"its entry script {script!r} is not there; correct task.code or the name"
    if not references(component.raw.get("input_data")):
        yield "it has no input_data; expected the input whose files are shared out, such as ${{inputs.shards}}"
    size = _number(component.raw.get("mini_batch_size"))
    if size is None or size < 1 or size != int(size):
        yield f"its mini_batch_size is {component.raw.get('mini_batch_size')!r}; expected a number of files, such as \"1\""


def _check_command(component: Component) -> Iterator[str]:
    """Ask the step's own command line whether it takes these options."""
    from slmops_course.cloud.steps import OPTIONS

    words = shlex.split(REFERENCE.sub("0", component.command))
    if words[:3] != ["python", "-m", "slmops_course.cloud.steps"]:
        return
    if component.code is None or not (component.code / "slmops_course" / "cloud" / "steps.py").is_file():
        yield f"its code {component.raw.get('code')} does not hold the course, which its command calls; correct the path"
    step = words[3] if len(words) > 3 else None
    if step not in OPTIONS:
        yield f"its command calls the step {step!r}; expected one of {', '.join(OPTIONS)}"
        return
    options = {word for word in words[4:] if word.startswith("--")}
    for option in sorted(options - OPTIONS[step]):
        yield f"its command sets {option}, which the step {step} does not take; it takes {', '.join(sorted(OPTIONS[step]))}"
    for option in sorted(OPTIONS[step] - options):
        yield f"its command does not set {option}, which the step {step} needs"


def check_file(path: Path | str) -> list[str]:
    """`check_pipeline` for a file; one that cannot be read is a problem too."""
    from slmops_course.cloud.definition import load_pipeline

    try:
        return check_pipeline(load_pipeline(path))
    except CloudError as error:
        return [str(error)]


def machine_type(pipeline: Pipeline, step: Step) -> str:
    """The size of machine that a step runs on, by its cluster's file. Raises CloudError where there is none.

    Example: "Standard_D4s_v3"
    """
    path = compute_file(pipeline, step.compute or "")
    size = read_yaml(path).get("size") if path else None
    if not size:
        raise CloudError(f"{step.name}: its compute {step.compute} has no size of machine: expected one in its file; write it.")
    return str(size)


def _names(of: Mapping) -> str:
    return ", ".join(of) or "none"
