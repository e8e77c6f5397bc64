"""Managed jobs are built by Azure's own classes; what would be sent is looked at, and holds no key that can be seen."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed; it comes with slmops-course[azure]")

from slmops_course.cloud.definition import CloudError
from slmops_course.cloud.managed import distillation_job, fine_tuning_job, visible_body, write_conversations

# azure-ai-ml 1.35 is written for marshmallow 3, whose last release announces what version 4 takes away.
pytestmark = pytest.mark.filterwarnings("ignore::marshmallow.warnings.RemovedInMarshmallow4Warning")

KEY = "sk-planted-key-that-nobody-may-see"
STUDENT = "azureml://registries/azureml/models/Phi-4-mini-instruct/versions/1"
URL = "https://teacher.eastus2.models.ai.azure.com/v1/chat/completions"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("AZURE_TEACHER_KEY", KEY)


def distil(**changes):
    given = {"teacher_name": "deepseek-v3", "teacher_url": URL, "student": STUDENT, "training_data": "azureml:train:1",
             "validation_data": "azureml:dev:1"}  # fmt: skip
    return distillation_job(**{**given, **changes})


def test_a_distillation_job_names_teacher_student_data_and_task(key):
    body = visible_body(distil())["properties"]
    assert body["jobType"] == "FineTuning"
    assert body["fineTuningDetails"]["model"]["uri"] == STUDENT
    assert body["fineTuningDetails"]["trainingData"]["uri"] == "azureml:train:1"
    assert body["fineTuningDetails"]["validationData"]["uri"] == "azureml:dev:1"
    assert body["properties"]["azureml.data_generation_task_type"] == "NLU_QA"
    assert body["properties"]["azureml.data_generation_type"] == "label_generation"
    assert body["properties"]["azureml.teacher_model.temperature"] == "0.0"
    assert json.loads(body["properties"]["azureml.connection_information"])["target"] == URL


def test_the_teachers_key_is_in_the_job_and_not_in_what_is_shown(key):
    """The first line holds Azure's package to what the chapter says of it."""
    job = distil()
    assert KEY in json.dumps(job._to_rest_object().as_dict())
    assert KEY not in json.dumps(visible_body(job), default=str)
    assert KEY not in repr(job.name)


def test_a_key_in_another_place_is_not_shown_either(key):
    with pytest.raises(CloudError, match="holds the value of AZURE_TEACHER_KEY outside its key"):
        visible_body(distil(hyperparameters={"learning_rate": KEY}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task_type": "INTENT"}, "no task type 'INTENT': expected one of NLI, NLU_QA"),
        ({"teacher_url": "https://user:pw@h/v1"}, "no plain address"),
        ({"key_variable": "SLMOPS_NO_SUCH_KEY"}, "SLMOPS_NO_SUCH_KEY holds nothing: expected the key for teacher.eastus2"),
    ],
)
def test_a_job_that_cannot_work_is_not_built(key, changes, says):
    with pytest.raises(CloudError, match=says):
        distil(**changes)


def test_a_fine_tuning_job_names_model_data_and_what_is_registered():
    job = fine_tuning_job(model=STUDENT, training_data="azureml:train:1", validation_data="azureml:dev:1", output_name="desk")
    body = visible_body(job)["properties"]
    assert body["jobType"] == "FineTuning"
    assert body["fineTuningDetails"]["taskType"] == "chatCompletion"
    assert body["fineTuningDetails"]["hyperParameters"]["num_train_epochs"] == "1"
    assert body["outputs"]["registered_model"] == {"assetName": "desk", "jobOutputType": "mlflow_model"}


def test_without_validation_data_azures_function_fails_so_ours_asks_for_it():
    from azure.ai.ml.finetuning import create_finetuning_job

    with pytest.raises(UnboundLocalError):
        create_finetuning_job(model=STUDENT, task="chat_completion", training_data="azureml:t:1", output_model_name_prefix="d")
    with pytest.raises(TypeError, match="validation_data"):
        fine_tuning_job(model=STUDENT, training_data="azureml:train:1", output_name="desk")


def test_conversations_are_written_as_the_jobs_read_them(tiny_task, tmp_path):
    train, unlabelled = tiny_task.splits["train"], tiny_task.splits["unlabelled"]
    rows = write_conversations(tiny_task, train, tmp_path / "a.jsonl", labelled=True).read_text("utf-8").splitlines()
    turns = json.loads(rows[0])["messages"]
    assert len(rows) == len(train)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert tiny_task.parse(turns[-1]["content"]) == train[0].answer
    asked = write_conversations(tiny_task, unlabelled, tmp_path / "b.jsonl", labelled=False).read_text("utf-8")
    turns = json.loads(asked.splitlines()[0])["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert "card_lost, refund_missing, out_of_scope" in turns[0]["content"]
    for wrong in ([], unlabelled):
        with pytest.raises(CloudError, match=f"{len(wrong)} examples for c.jsonl"):
            write_conversations(tiny_task, wrong, tmp_path / "c.jsonl", labelled=True)


def test_the_packages_modules_load_without_azure():
    code = "import sys, slmops_course.cloud.managed, slmops_course.cloud.submit; print({'azure'} & set(sys.modules) or [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
