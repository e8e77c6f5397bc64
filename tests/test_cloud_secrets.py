"""A key planted in the environment is in no file that the cloud's commands write, and in nothing that they print."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed; it comes with slmops-course[azure]")

import nbformat
from azure_stand_in import Credential, StandIn, make_transport
from cloud_desk import PIPELINE, ROOT, small_pipeline
from nbclient import NotebookClient

from slmops_course.cloud.definition import load_pipeline
from slmops_course.cloud.local import run_pipeline
from slmops_course.cloud.submit import Workspace, build_job, connect, submit

# azure-ai-ml 1.35 is written for marshmallow 3, whose last release announces what version 4 takes away.
pytestmark = pytest.mark.filterwarnings("ignore::marshmallow.warnings.RemovedInMarshmallow4Warning")

KEY = "planted-key-that-nobody-may-see"
VARIABLES = ("AZURE_TEACHER_KEY", "AZURE_CLIENT_SECRET", "OPENAI_API_KEY", "HF_TOKEN")
SHOW_THE_BODY = """
from slmops_course.cloud.managed import distillation_job, visible_body
job = distillation_job(teacher_name="t", teacher_url="https://t.models.ai.azure.com/v1/chat/completions",
    student="azureml://registries/azureml/models/Phi-4-mini-instruct/versions/1", training_data="azureml:a:1",
    validation_data="azureml:b:1")
print(visible_body(job))
"""


@pytest.fixture
def planted(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, KEY)


def files_with(text: str, folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_search_finds_a_key_that_is_there(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log.bin").write_bytes(b"\xff" + KEY.encode())
    assert files_with(KEY, tmp_path) == ["log.bin"]


def test_the_commands_print_and_write_no_key(planted, tmp_path):
    for action in ("check", "plan"):
        command = [sys.executable, "-m", "slmops_course.cli", "--build", str(tmp_path / "build"), "cloud", action]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert KEY not in done.stdout + done.stderr
    assert files_with(KEY, tmp_path) == []


def test_a_local_run_writes_no_key_even_where_it_fails(planted, tiny_task_folder, tmp_path):
    inputs = {"task": tiny_task_folder, "model": "no-such-model", "shards": 2}
    with pytest.raises(Exception, match="There is no model 'no-such-model'") as caught:
        run_pipeline(load_pipeline(PIPELINE), tmp_path / "build", inputs=inputs)
    assert KEY not in str(caught.value)
    assert [path.name for path in (tmp_path / "build" / "artifacts").glob("cloud-shard-*")] != []
    assert files_with(KEY, tmp_path) == []


def test_a_submission_sends_dumps_and_logs_no_key(planted, tmp_path, caplog):
    caplog.set_level("DEBUG")
    (tmp_path / "copy").mkdir()
    with StandIn() as service:
        client = connect(Workspace("sub", "group", "desk"), credential=Credential(), transport=make_transport(service.url))
        job = build_job(load_pipeline(small_pipeline(tmp_path / "copy")), inputs={"task": "azureml:support_desk:1"})
        job.dump(tmp_path / "job.yml")
        service.script.append(("PUT", f"jobs/{job.name}", 500))
        sent = submit(client, job, sleep=lambda _: None)
    (tmp_path / "sent.json").write_text(json.dumps(service.requests), "utf-8")
    (tmp_path / "log.txt").write_text(caplog.text + repr(sent), "utf-8")
    (tmp_path / "code").write_bytes(b"".join(service.blobs.values()))
    assert "HTTP status 500" in caplog.text
    assert (tmp_path / "job.yml").stat().st_size > 1000
    assert files_with(KEY, tmp_path) == []
    assert files_with("plantedsignature", tmp_path) == []


def test_a_notebook_that_shows_a_managed_job_holds_no_key(planted, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW_THE_BODY)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    nbformat.write(notebook, tmp_path / "shown.ipynb")
    assert "connection_information" in (tmp_path / "shown.ipynb").read_text("utf-8")
    assert files_with(KEY, tmp_path) == []


def test_no_file_of_the_repositorys_pipeline_holds_anything_like_a_key():
    """Long random texts, as keys are: none has a reason to be in these files."""
    import re

    for path in [*PIPELINE.parent.rglob("*"), ROOT / ".amlignore"]:
        if path.is_file():
            assert re.findall(r"(?<![\w/.-])(?=\w*\d)(?=\w*[a-zA-Z])\w{32,}", path.read_text("utf-8")) == [], path.name
