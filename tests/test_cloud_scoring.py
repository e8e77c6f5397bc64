"""The endpoint's server is asked over HTTP, and Azure's classes read its files; the steps' environment is the course's."""

import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from slmops_course.chat import RecordedChatModel
from slmops_course.cloud.definition import CloudError
from slmops_course.cloud.environment import closure, conda_file, course_requirements
from slmops_course.cloud.scoring import MAX_BODY_BYTES, ScoringServer, model_folder
from slmops_course.doctor import read_pins

from cloud_desk import AZURE, ROOT  # isort: skip

ANSWER = {"intent": "card_lost", "urgency": "low"}


class Breaking(RecordedChatModel):
    """A model that fails at one message."""

    def generate(self, conversations, **options):
        if conversations[0][-1]["content"].startswith("Break"):
            raise RuntimeError("out of memory")
        return super().generate(conversations, **options)


@pytest.fixture
def server(tiny_task):
    chat = Breaking({"I lost my card": json.dumps(ANSWER), "Tell me": "a joke"})
    with ScoringServer(("127.0.0.1", 0), chat, tiny_task) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, path, body=None, **headers):
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_message_is_answered_and_the_probes_are(server):
    assert ask(server, "/score", {"message": " I lost my card "}) == (200, {"answer": ANSWER})
    assert ask(server, "/live") == (200, {"status": "alive"})
    assert ask(server, "/ready") == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"message": ""}, 400, "The message is empty"),
        ({"message": 3}, 400, "The body is no request"),
        ({"text": "x"}, 400, "The body is no request"),
        ([], 400, "The body is no request"),
        (b"{", 400, "The body is no request"),
        (b"\xff", 400, "The body is no request"),
        (b"x" * (MAX_BODY_BYTES + 1), 413, "expected at most"),
        ({"message": "Tell me"}, 422, "the reply is not JSON"),
        ({"message": "Break, please"}, 500, "could not be answered"),
    ],
    ids=["empty", "number", "field", "list", "json", "bytes", "long", "reply", "error"],
)
def test_what_cannot_be_answered_says_why_and_the_next_is_answered(server, body, status, says):
    found, content = ask(server, "/score", body)
    assert (found, says in content["error"]) == (status, True), content
    assert ask(server, "/score", {"message": "I lost my card"})[0] == 200


def test_other_pages_are_not_there(server):
    assert ask(server, "/")[0] == ask(server, "/train", {})[0] == 404


def test_the_mounted_model_is_found_wherever_it_lies(tmp_path):
    for depth in ("", "model/1"):
        folder = tmp_path / f"at-{len(depth)}" / depth
        folder.mkdir(parents=True)
        (folder / "genai_config.json").touch()
        assert model_folder(tmp_path / f"at-{len(depth)}") == folder
    (tmp_path / "none").mkdir()
    for wrong, count in ((tmp_path / "none", 0), (tmp_path, 2)):
        with pytest.raises(CloudError, match=f"holds {count} models"):
            model_folder(wrong)


def test_the_deployment_asks_what_the_server_answers():
    deployment = yaml.safe_load((AZURE / "serving" / "deployment.yml").read_text("utf-8"))
    endpoint = yaml.safe_load((AZURE / "serving" / "endpoint.yml").read_text("utf-8"))
    pipeline = yaml.safe_load((AZURE / "pipeline.yml").read_text("utf-8"))
    routes = deployment["environment"]["inference_config"]
    assert {name: route["path"] for name, route in routes.items()} == {
        "liveness_route": "/live", "readiness_route": "/ready", "scoring_route": "/score"
    }  # fmt: skip
    docker = (AZURE / "Dockerfile").read_text("utf-8")
    assert f'"--port", "{routes["scoring_route"]["port"]}"' in docker
    assert '"slmops_course.cloud.scoring"' in docker
    assert "-c constraints.txt" in docker
    assert deployment["endpoint_name"] == endpoint["name"]
    assert deployment["model"] == f"azureml:{pipeline['outputs']['model']['name']}@latest"


# --- The steps' environment ---


@pytest.mark.skipif(sys.platform != "linux", reason="the closure of a Linux environment is read from the one installed here")
def test_the_conda_file_is_the_courses_pins():
    pins = read_pins((ROOT / "constraints.txt").read_text("utf-8"))
    written = (AZURE / "conda.yml").read_text("utf-8")
    assert written == conda_file(pins, course_requirements(ROOT)), "write it anew: its first line says how"
    lines = yaml.safe_load(written)["dependencies"][-1]["pip"]
    assert f"torch=={pins['torch']}" in lines
    assert not [line for line in lines if line.startswith(("azure", "pytest", "opentelemetry"))]


def test_a_closure_holds_what_is_brought_in_and_leaves_out_what_is_not():
    pins = {"httpx": "1", "idna": "2", "torch": "3", "h2": "4"}
    assert closure(["httpx"], pins=pins) == ["httpx==1", "idna==2"]
    assert closure(["httpx; sys_platform == 'win32'"], pins=pins) == closure([], pins=pins) == []
    with pytest.raises(CloudError, match="no-such-library is not installed"):
        closure(["no-such-library"], pins=pins)


def test_what_is_uploaded_is_named_and_nothing_else():
    lines = (ROOT / ".amlignore").read_text("utf-8").splitlines()
    named = [line[2:] for line in lines if line.startswith("!/")]
    assert lines[1] == "*"
    assert all((ROOT / name.removesuffix("/**")).exists() for name in named)
    assert Path("deploy/azure/Dockerfile").as_posix() in named
