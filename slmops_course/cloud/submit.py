"""Sending a job to Azure Machine Learning with Azure's own client: once, whatever the network does.

A job's name is made from what it would do, so the service itself can tell whether it has it already. Before every
attempt the name is looked up: a job that arrived although its answer was lost is found, not sent again.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slmops_course.cloud.checks import check_pipeline
from slmops_course.cloud.definition import CloudError, Pipeline
from slmops_course.cloud.local import with_inputs

log = logging.getLogger("slmops_course")

VARIABLES = {
    "subscription": "AZURE_SUBSCRIPTION_ID", "resource_group": "AZURE_RESOURCE_GROUP", "workspace": "AZURE_ML_WORKSPACE",
}  # fmt: skip
RETRIES = 4
LONGEST_WAIT_S = 60.0
PASSING = (408, 429, 500, 502, 503, 504)
ADVICE = {
    401: "expected a valid sign-in; run `az login`, or set the variables of a service principal, and submit again",
    403: "expected a role such as AzureML Data Scientist on the workspace; ask its owner",
    404: "expected the workspace, its clusters and data to be there; check the three variables and `az ml compute list`",
    409: "expected a name that is free; another job or version has it: change an input, or look at that job",
}


@dataclass(frozen=True)
class Workspace:
    """Where jobs are sent. It holds no secret: who asks is proved by Azure's own sign-in."""

    subscription: str
    resource_group: str
    workspace: str


@dataclass(frozen=True)
class Submitted:
    """A job that the service has."""

    name: str
    status: str
    url: str | None  # of its page in the studio
    created: bool  # False: it was there before


def read_workspace(environ: Mapping[str, str] = os.environ) -> Workspace | None:
    """The workspace that the environment names, or None if it names none. Raises CloudError for half a name.

    Example: {"AZURE_SUBSCRIPTION_ID": "…", "AZURE_RESOURCE_GROUP": "rg", "AZURE_ML_WORKSPACE": "desk"} -> Workspace(…)
    """
    found = {name: environ.get(variable, "").strip() for name, variable in VARIABLES.items()}
    missing = [VARIABLES[name] for name, value in found.items() if not value]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        raise CloudError(f"{', '.join(missing)} is not set, and others are: expected all of {', '.join(VARIABLES.values())}.")
    return Workspace(**found)


def connect(workspace: Workspace, *, credential=None, transport=None):
    """Azure's client for a workspace, its telemetry off. `transport` is for rehearsals.

    Without a credential, Azure's own sign-in is used: environment variables, a managed identity, or `az login`.
    Raises CloudError where azure-ai-ml is not installed.
    """
    quiet_azure()
    try:
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise CloudError(
            f"Azure's client is missing ({error}): expected azure-ai-ml; pip install -c constraints.txt -e '.[azure]'."
        ) from None
    options = {"transport": transport} if transport is not None else {}
    return MLClient(
        credential or DefaultAzureCredential(), workspace.subscription, workspace.resource_group, workspace.workspace,
        enable_telemetry=False, retry_total=0, show_progress=False, **options,
    )  # fmt: skip


def quiet_azure() -> None:
    """Keep azure-ai-ml from announcing every class that it calls experimental."""
    logging.getLogger("azure.ai.ml._utils._experimental").setLevel(logging.ERROR)


def build_job(pipeline: Pipeline, *, inputs: Mapping[str, object] | None = None):
    """The pipeline's file as azure-ai-ml reads it, with a name of its own. `inputs` replace values.

    Raises CloudError where the checker or Azure's validation finds fault.
    """
    quiet_azure()
    from azure.ai.ml import Input, load_job

    changed = with_inputs(pipeline, {name: value for name, value in (inputs or {}).items() if not is_remote(value)})
    problems = check_pipeline(changed)
    if problems:
        raise CloudError(f"{pipeline.path.name} cannot be submitted: {problems[0]}: expected none; see `slmops cloud check`.")
    job = load_job(pipeline.path)
    for name, value in (inputs or {}).items():
        if name not in pipeline.inputs:
            raise CloudError(f"The pipeline has no input {name!r}: expected one of {', '.join(pipeline.inputs)}.")
        kind = pipeline.inputs[name].get("type") if isinstance(pipeline.inputs[name], Mapping) else None
        setattr(job.inputs, name, Input(type=kind, path=str(value)) if kind else value)
    result = job._validate()  # what the client calls first; its result names the places
    if not result.passed:
        raise CloudError(f"Azure's validation refuses {pipeline.path.name} ({result.error_messages}): mend these places.")
    job.name = job_name(pipeline, inputs or {})
    return job


def preview(job) -> dict:
    """The body of a job before anything is uploaded: where the service gives ids, the component's or folder's name stands.

    Example: preview(build_job(pipeline))["properties"]["jobs"]["distil"]["search_space"]
    """
    return _without_objects(job._to_rest_object().as_dict())


def _without_objects(value):
    if isinstance(value, Mapping):
        return {name: _without_objects(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_objects(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return f"<{Path(value).name}>" if isinstance(value, str) and Path(value).is_absolute() else value
    return f"<{getattr(value, 'name', None) or type(value).__name__}>"


def job_name(pipeline: Pipeline, inputs: Mapping[str, object]) -> str:
    """A name made from all that decides what the job does: the same request has the same name.

    Example: "support-desk-3f2a91c07b5e"
    """
    files = sorted({pipeline.path, *(step.component.path for step in pipeline.steps.values())})
    parts = [file.read_text("utf-8") for file in files] + [json.dumps(dict(inputs), sort_keys=True, default=str)]
    code = Path(__file__).parent.parent
    parts += [file.read_text("utf-8") for file in sorted(code.rglob("*.py"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return f"{pipeline.raw.get('display_name', 'pipeline')}-{digest}"


def is_remote(value: object) -> bool:
    """Whether a value names data that Azure has already. Example: "azureml:support_desk:1" -> True; "my/desk" -> False"""
    return isinstance(value, str) and value.startswith(("azureml:", "https://", "wasbs:", "abfss:"))


def submit(
    client, job, *, again: bool = False, retries: int = RETRIES, sleep: Callable[[float], None] = time.sleep
) -> Submitted:
    """Send a job and return it as the service has it; one that is there already is returned and not sent.

    With `again`, a job that is there gets a further run under another name. What may pass (a cut connection, 408, 429, 5xx)
    is tried again `retries` times after waits that double.
    Raises CloudError for what does not pass, with what to do about it.
    """
    first = job.name
    found = _attempts(lambda: _find(client, job.name), retries, sleep)
    for number in range(2, 1000):
        if found is None or not again:
            break
        job.name = f"{first}-{number}"
        found = _attempts(lambda: _find(client, job.name), retries, sleep)
    if found is not None:
        return _submitted(found, created=False)
    lost = []

    def send():
        there = _find(client, job.name) if lost else None
        if there is not None:
            return there
        lost.append(1)
        return client.jobs.create_or_update(job)

    return _submitted(_attempts(send, retries, sleep), created=True)


def _find(client, name: str):
    from azure.core.exceptions import ResourceNotFoundError

    try:
        return client.jobs.get(name)
    except ResourceNotFoundError as error:
        if _code(error) == "ResourceGroupNotFound" or _code(error) == "ParentResourceNotFound":
            raise
        return None


def _attempts(call: Callable, retries: int, sleep: Callable[[float], None]):
    import tenacity

    backoff = tenacity.wait_exponential_jitter(max=LONGEST_WAIT_S)

    def wait_s(state) -> float:
        error = state.outcome.exception()
        seconds = backoff(state) if error.retry_after_s is None else min(error.retry_after_s, LONGEST_WAIT_S)
        log.info("Azure: %s; the next attempt is in %.1f s", error, seconds)
        return seconds

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Passing), stop=tenacity.stop_after_attempt(retries + 1), wait=wait_s,
        sleep=sleep, reraise=True,
    )  # fmt: skip
    try:
        return attempts(_translate, call)
    except _Passing as error:
        raise CloudError(
            f"Azure gave no usable answer in {retries + 1} attempts (the last: {error}): expected the service to be up; wait "
            "and submit again: a job that arrived is found, not sent twice."
        ) from None


def _translate(call: Callable):
    from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

    try:
        return call()
    except HttpResponseError as error:
        status = getattr(error, "status_code", None)
        words = f"{status} {_code(error) or ''}".strip()
        if status in PASSING:
            raise _Passing(f"HTTP status {words}", _retry_after(error)) from None
        if status is None and isinstance(error, ClientAuthenticationError):
            status, words = 401, "no sign-in worked"
        advice = ADVICE.get(status, "expected a request that the service takes; see `slmops cloud check`")
        said = "" if status == 401 else f": {_message(error)}"
        raise CloudError(f"Azure refused the job ({words}{said}): {advice}.") from None
    except AzureError as error:  # no answer at all
        raise _Passing(f"{type(error).__name__}, {_first_line(error)}", None) from None


class _Passing(Exception):
    """What another attempt may not meet."""

    def __init__(self, text: str, retry_after_s: float | None):
        super().__init__(text)
        self.retry_after_s = retry_after_s


def _retry_after(error) -> float | None:
    seconds = (error.response.headers.get("Retry-After", "") if error.response is not None else "") or ""
    return float(seconds) if seconds.isdecimal() else None


def _code(error) -> str | None:
    return getattr(getattr(error, "error", None), "code", None)


def _message(error) -> str:
    return " ".join(str(getattr(getattr(error, "error", None), "message", None) or _first_line(error)).split())[:200]


def _first_line(error) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _submitted(job, *, created: bool) -> Submitted:
    return Submitted(job.name, str(job.status), job.studio_url, created)
