"""Azure's real client talks to a stand-in for its service on loopback: what it sends, and what it makes of refusals."""

import json
import re
import shutil
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed; it comes with slmops-course[azure]")

from azure_stand_in import SCOPE, Credential, StandIn, make_transport
from cloud_desk import PIPELINE, ROOT, change, copy_pipeline, small_pipeline

from slmops_course.cloud.checks import check_file
from slmops_course.cloud.definition import CloudError, load_pipeline
from slmops_course.cloud.submit import Workspace, build_job, connect, job_name, preview, read_workspace, submit
from slmops_course.network import ConnectionLog

# azure-ai-ml 1.35 is written for marshmallow 3, whose last release announces what version 4 takes away.
pytestmark = pytest.mark.filterwarnings("ignore::marshmallow.warnings.RemovedInMarshmallow4Warning")

DESK = Workspace("sub", "group", "desk")
INPUTS = {"task": "azureml:support_desk:1"}


@pytest.fixture(scope="module")
def azure(tmp_path_factory):
    """A stand-in with the pipeline submitted to it: resolving a job uploads the course's code, which takes its time.

    The code is a copy without environments: Azure's client looks at every file that .amlignore leaves out, too.
    """
    root = tmp_path_factory.mktemp("course")
    for name in ("slmops_course", "deploy"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".amlignore", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    with StandIn() as service, ConnectionLog() as log:
        client = connect(DESK, credential=Credential(), transport=make_transport(service.url))
        pipeline = load_pipeline(root / PIPELINE.relative_to(ROOT))
        job = build_job(pipeline, inputs=INPUTS)
        name = job.name
        first = submit(client, job)
        yield SimpleNamespace(
            service=service, client=client, pipeline=pipeline, job=job, name=name, first=first, log=log,
            body=service.sent("PUT", f"jobs/{name}")[0]["properties"],
        )  # fmt: skip


@pytest.fixture
def waits():
    return []


@pytest.fixture(scope="module")
def small(azure, tmp_path_factory):
    """A job of one step, whose code is uploaded already: sending it is quick."""
    return build_job(load_pipeline(small_pipeline(tmp_path_factory.mktemp("small"))), inputs=INPUTS)


@pytest.fixture
def send(azure, small, waits):
    """Submits the small job under a name that is new to the service, which then does what the script says."""
    azure.service.script.clear()

    def submit_once(*script, **options):
        small.name = f"desk-{len(azure.service.requests)}"
        azure.service.script[:] = [(method, f"jobs/{small.name}", step) for method, step in script]
        return submit(azure.client, small, sleep=waits.append, **options)

    return submit_once


def tried(azure) -> list[str]:
    """What was asked about the last job: "GET" looks it up, "PUT" sends it."""
    jobs = [(method, path) for method, path, _ in azure.service.requests if path.startswith("jobs/")]
    return [method for method, path in jobs if path == jobs[-1][1]]


def test_the_job_arrives_under_its_name_and_only_loopback_is_turned_to(azure):
    assert azure.first.created
    assert azure.first.name == azure.name == job_name(azure.pipeline, INPUTS)
    assert re.fullmatch(r"support-desk-[0-9a-f]{12}", azure.name)
    assert azure.first.url.startswith(f"https://ml.azure.com/runs/{azure.name}")
    assert azure.log.all != []
    assert azure.log.remote == []


def test_every_step_and_connection_of_the_file_is_in_the_body(azure):
    jobs = azure.body["jobs"]
    assert set(jobs) == set(azure.pipeline.steps)
    for name, step in azure.pipeline.steps.items():
        sent = {key: value["value"] for key, value in jobs[name]["inputs"].items()}
        assert sent == dict(step.inputs), name
        assert jobs[name]["type"] == step.kind
    assert jobs["distil"]["search_space"] == azure.pipeline.steps["distil"].search_space
    assert jobs["distil"]["limits"]["max_total_trials"] == 2
    assert jobs["teacher"]["computeId"] == f"{SCOPE}/computes/train-cluster"
    assert (jobs["label"]["mini_batch_size"], jobs["label"]["task"]["entry_script"]) == (1, "deploy/azure/entry/label.py")
    assert azure.body["settings"]["default_compute"].endswith("/computes/cpu-cluster")


def test_inputs_outputs_and_what_registers_the_model_are_in_the_body(azure):
    assert azure.body["inputs"]["task"] == {"uri": f"{SCOPE}/data/support_desk/versions/1", "jobInputType": "uri_folder"}
    plain = {name: value["value"] for name, value in azure.body["inputs"].items() if "value" in value}
    assert plain == {name: str(value) for name, value in azure.pipeline.inputs.items() if name != "task"}
    model = azure.body["outputs"]["model"]
    assert (model["jobOutputType"], model["assetName"]) == ("custom_model", "support_desk")


def test_commands_code_and_pins_are_uploaded_once_and_nothing_else(azure):
    commands = [body["properties"]["componentSpec"].get("command") for body in azure.service.sent("PUT", "components/")]
    wanted = [s.component.command.strip() for s in azure.pipeline.steps.values() if s.kind != "parallel"]
    assert sorted(filter(None, commands)) == sorted(wanted)
    environments = {body["properties"]["condaFile"] for body in azure.service.sent("PUT", "environments/")}
    assert len(environments) == 1
    assert "- torch==" in environments.pop()
    assert len(azure.service.sent("PUT", "codes/")) == 1
    names = {path.split("/", 5)[5] for path in azure.service.blobs}
    assert "slmops_course/cloud/steps.py" in names
    assert "deploy/azure/entry/label.py" in names
    outside = {name for name in names if not name.startswith("slmops_course/")}
    assert outside == {
        "deploy/azure/entry/label.py", "deploy/azure/Dockerfile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"
    }  # fmt: skip
    assert not any("__pycache__" in name for name in names)


def test_the_same_request_is_not_sent_twice(azure):
    azure.job.name = azure.name
    again = submit(azure.client, azure.job)
    assert (again.name, again.created) == (azure.name, False)
    assert len(azure.service.sent("PUT", f"jobs/{azure.name}")) == 1


def test_a_further_run_is_sent_on_request_under_another_name(azure):
    azure.job.name = azure.name
    again = submit(azure.client, azure.job, again=True)
    assert (again.name, again.created) == (f"{azure.name}-2", True)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_what_may_pass_is_tried_again(azure, send, waits, method, status):
    assert send((method, status)).created
    assert tried(azure).count("PUT") == (2 if method == "PUT" else 1)
    assert len(waits) == 1
    assert waits[0] == 0 if status == 429 else 1 <= waits[0] <= 2


def test_a_connection_cut_before_the_job_arrives_is_tried_again(azure, send, waits):
    assert send(("PUT", "cut")).created
    assert tried(azure) == ["GET", "PUT", "GET", "PUT"]
    assert len(waits) == 1


def test_a_job_whose_answer_was_lost_is_found_and_not_sent_again(azure, send):
    sent = send(("PUT", "cut after"))
    assert sent.created
    assert tried(azure) == ["GET", "PUT", "GET"]
    assert f"jobs/{sent.name}" in azure.service.resources


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "Azure refused the job .400 Code400: as the script says.*slmops cloud check"),
        (401, "Azure refused the job .401 Code401.: expected a valid sign-in; run `az login`"),
        (403, "403 Code403: as the script says.*expected a role such as AzureML Data Scientist"),
        (404, "404 Code404: as the script says.*expected the workspace, its clusters and data"),
        (409, "409 Code409: as the script says.*expected a name that is free"),
    ],
)
def test_a_refusal_is_one_sentence_and_not_tried_again(azure, send, waits, status, says):
    with pytest.raises(CloudError, match=says) as caught:
        send(("PUT", status))
    assert (tried(azure), waits) == (["GET", "PUT"], [])
    assert "plantedsignature" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_pass_is_given_up(azure, small, send, waits):
    with pytest.raises(CloudError, match=r"no usable answer in 3 attempts .the last: HTTP status 500"):
        send(*[("PUT", 500)] * 9, retries=2)
    assert (tried(azure).count("PUT"), len(waits)) == (3, 2)
    assert f"jobs/{small.name}" not in azure.service.resources


def test_where_no_service_answers_that_is_said(small, waits):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = connect(DESK, credential=Credential(), transport=make_transport(url))
    with pytest.raises(CloudError, match=r"no usable answer in 2 attempts .the last: ServiceRequestError"):
        submit(client, small, retries=1, sleep=waits.append)


def test_no_secret_is_in_what_is_sent_but_in_its_header(azure):
    assert all("plantedsignature" in token for token in azure.service.tokens)
    assert "plantedsignature" not in repr(azure.service.requests)
    assert "plantedsignature" not in repr(azure.service.blobs)


# --- Before anything is sent ---


def test_the_body_can_be_looked_at_before_anything_is_uploaded(azure):
    """What is shown is what was sent, but for the ids that only the service can give."""
    shown = preview(build_job(azure.pipeline, inputs=INPUTS))["properties"]
    assert json.loads(json.dumps(shown)) == shown
    assert set(shown["jobs"]) == set(azure.body["jobs"])
    for name, step in shown["jobs"].items():
        assert step["inputs"] == azure.body["jobs"][name]["inputs"]
    assert shown["inputs"] == azure.body["inputs"] | {"task": shown["inputs"]["task"]}
    assert shown["outputs"] == azure.body["outputs"]
    assert str(PIPELINE.parent) not in json.dumps(shown)


def test_azures_classes_read_the_endpoint_its_deployment_and_the_clusters():
    from azure.ai.ml import load_compute, load_online_deployment, load_online_endpoint

    endpoint = load_online_endpoint(PIPELINE.parent / "serving" / "endpoint.yml")
    deployment = load_online_deployment(PIPELINE.parent / "serving" / "deployment.yml")
    assert (endpoint.auth_mode, deployment.endpoint_name) == ("aad_token", endpoint.name)
    assert deployment.environment.inference_config["scoringRoute"]["path"] == "/score"
    body = deployment._to_rest_object(location="here").as_dict()
    assert body["sku"]["capacity"] == 1
    assert body["properties"]["instanceType"] == "Standard_F4s_v2"
    for name in ("cpu-cluster", "train-cluster"):
        cluster = load_compute(PIPELINE.parent / "compute" / f"{name}.yml")
        assert (cluster.name, cluster.type, cluster.min_instances) == (name, "amlcompute", 0), "it must cost nothing at rest"


def test_a_change_in_the_file_is_a_change_in_the_job(azure, tmp_path):
    pipeline = copy_pipeline(tmp_path)
    assert job_name(load_pipeline(pipeline), INPUTS) == azure.name
    change(pipeline, "max_total_trials: 2", "max_total_trials: 1")
    changed = build_job(load_pipeline(pipeline), inputs={**INPUTS, "recipe": "int8"})
    assert changed.name not in (azure.name, job_name(load_pipeline(pipeline), INPUTS))
    assert changed.jobs["distil"].limits.max_total_trials == 1
    assert changed.inputs["recipe"]._data == "int8"


def test_a_pipeline_with_a_problem_is_not_built(tmp_path):
    pipeline = change(copy_pipeline(tmp_path), "jobs.gather.outputs.labels", "jobs.gathr.outputs.labels")
    with pytest.raises(CloudError, match="cannot be submitted: distil: its input labels is taken from the step gathr"):
        build_job(load_pipeline(pipeline))
    for inputs, says in (({"shards": "many"}, "shards is 'many'"), ({"desk": "azureml:d:1"}, "has no input 'desk'")):
        with pytest.raises(CloudError, match=says):
            build_job(load_pipeline(PIPELINE), inputs=inputs)


def test_what_the_checker_finds_azures_own_validation_lets_through(tmp_path):
    """Why there is a checker: should this fail one day, Azure finds it too, and a line of ours can go."""
    from azure.ai.ml import load_job

    pipeline = copy_pipeline(tmp_path)
    for old, new in (
        ("jobs.gather.outputs.labels", "jobs.gathr.outputs.labels"), ("  shards: 4", "  shards: four"),
        ("  recipe: int4-rtn", "  recipe: int3"), ("outputs.shards}}", "outputs.shard}}"),
    ):  # fmt: skip
        change(pipeline, old, new)
    assert load_job(pipeline)._validate().passed
    assert len(check_file(pipeline)) == 4


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, None),
        ({"AZURE_SUBSCRIPTION_ID": " "}, None),
        ({"AZURE_SUBSCRIPTION_ID": "sub", "AZURE_RESOURCE_GROUP": "group", "AZURE_ML_WORKSPACE": "desk"}, DESK),
    ],
)
def test_a_workspace_is_named_whole_or_not_at_all(found, expected):
    assert read_workspace(found) == expected
    with pytest.raises(CloudError, match="AZURE_RESOURCE_GROUP is not set, and others are"):
        read_workspace({"AZURE_SUBSCRIPTION_ID": "sub", "AZURE_ML_WORKSPACE": "desk"})
