"""Azure's managed jobs: distillation with a teacher behind an endpoint, and fine-tuning on labelled rows.

Both take conversations as JSON lines. Azure runs the code, so nothing of these jobs can be tried here but their definition:
what is sent is built by Azure's own classes and can be looked at before it is sent.
Source: https://learn.microsoft.com/python/api/azure-ai-ml/azure.ai.ml.model_customization
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmops_course.cloud.definition import CloudError
from slmops_course.cloud.submit import quiet_azure
from slmops_course.endpoints import EndpointError, check_address, read_key
from slmops_course.tasks import Example, Task

TASK_TYPES = ("NLI", "NLU_QA", "CONVERSATION", "MATH", "SUMMARIZATION")
HIDDEN = "…"
KEY_FIELDS = ("key", "apikey", "secret", "sastoken", "pat", "password")


def write_conversations(task: Task, examples: Sequence[Example], path: Path, *, labelled: bool) -> Path:
    """Write messages as the managed jobs read them: `{"messages": [{"role": …, "content": …}, …]}` a line.

    With `labelled`, the desk's answer is the last turn: for fine-tuning. Without, the teacher is to write it.
    Raises CloudError when there is no example, or one without an answer where answers are wanted.
    """
    if not examples or (labelled and any(example.answer is None for example in examples)):
        raise CloudError(
            f"{len(examples)} examples for {path.name}: expected some, {'all labelled' if labelled else 'with a text'}; "
            "see the task's splits."
        )
    rows = []
    for example in examples:
        # A teacher that was never tuned on the desk has to be told what it may answer.
        turns = list(task.messages(example.text) if labelled else task.instructed_messages(example.text))
        if labelled:
            turns.append({"role": "assistant", "content": task.target(example.answer)})
        rows.append(json.dumps({"messages": turns}, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def distillation_job(
    *, teacher_name: str, teacher_url: str, student: str, training_data: str, validation_data: str,
    key_variable: str = "AZURE_TEACHER_KEY", task_type: str = "NLU_QA", hyperparameters: Mapping[str, str] | None = None,
    experiment: str = "slmops-distillation", name: str | None = None,
):  # fmt: skip
    """A managed distillation job: the teacher's endpoint labels the data, the student is fine-tuned on its replies.

    Example: distillation_job(teacher_name="deepseek-v3", teacher_url="https://….models.ai.azure.com/v1/chat/completions",
    student="azureml://registries/azureml-msr/models/Phi-4-mini-instruct/versions/1", training_data="train.jsonl", …)
    The teacher's key comes from the environment variable named `key_variable`. Azure's class writes it into a property of
    the job, in clear: it is in any dump, and whoever may read the job in the workspace may read it there. So take a key of
    its own for such a job, take it back afterwards, and look at a job with `visible_body` only.
    Raises CloudError for another kind of task, an address that is none, or a missing key.
    """
    if task_type not in TASK_TYPES:
        raise CloudError(f"There is no task type {task_type!r}: expected one of {', '.join(TASK_TYPES)}.")
    try:
        key = read_key(key_variable, check_address(teacher_url))
    except EndpointError as error:
        raise CloudError(str(error)) from None
    quiet_azure()
    from azure.ai.ml.entities import ServerlessConnection
    from azure.ai.ml.model_customization import EndpointRequestSettings, TeacherModelSettings, distillation

    settings = TeacherModelSettings(
        inference_parameters={"max_tokens": 64, "temperature": 0.0},
        endpoint_request_settings=EndpointRequestSettings(request_batch_size=8, min_endpoint_success_ratio=0.9),
    )
    job = distillation(
        experiment_name=experiment, data_generation_type="label_generation", data_generation_task_type=task_type,
        teacher_model_endpoint_connection=ServerlessConnection(name=teacher_name, endpoint=teacher_url, api_key=key),
        student_model=student, training_data=training_data, validation_data=validation_data, teacher_model_settings=settings,
        hyperparameters=dict(hyperparameters or {"learning_rate": "0.00002", "num_train_epochs": "1"}),
    )  # fmt: skip
    job.name = name
    return job


def fine_tuning_job(
    *, model: str, training_data: str, validation_data: str, output_name: str, hyperparameters: Mapping[str, str] | None = None,
    experiment: str = "slmops-fine-tuning", name: str | None = None,
):  # fmt: skip
    """A managed fine-tuning job on labelled conversations; the tuned model is registered as `output_name`.

    Azure's function fails with an UnboundLocalError where validation data is left out (azure-ai-ml 1.35): it is needed here.
    """
    quiet_azure()
    from azure.ai.ml.finetuning import FineTuningTaskType, create_finetuning_job

    return create_finetuning_job(
        model=model, task=FineTuningTaskType.CHAT_COMPLETION, training_data=training_data, validation_data=validation_data,
        output_model_name_prefix=output_name, experiment_name=experiment, name=name,
        hyperparameters=dict(hyperparameters or {"learning_rate": "0.00002", "num_train_epochs": "1"}),
    )  # fmt: skip


def visible_body(job) -> dict:
    """The body that would be sent, with every key in it replaced by "…". The one way to print or write a managed job.

    Raises CloudError should a secret of this process's environment still be in it.
    """
    body = _hide(_plain(job._to_rest_object()))
    text = json.dumps(body, default=str)
    leaked = [name for name, value in os.environ.items() if "KEY" in name and len(value) > 7 and value in text]
    if leaked:
        raise CloudError(f"The job holds the value of {leaked[0]} outside its key: expected none; take it out of the settings.")
    return body


def _plain(value):
    return value.as_dict() if hasattr(value, "as_dict") else value


def _hide(value):
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if name.lower().replace("_", "") in KEY_FIELDS and isinstance(part, str) else _hide(part)
            for name, part in value.items()
        }
    if isinstance(value, str) and value.startswith("{"):
        # Azure's class puts the whole connection, with its key, as JSON into a property of the job.
        with contextlib.suppress(ValueError):
            return json.dumps(_hide(json.loads(value)))
    return [_hide(part) for part in value] if isinstance(value, list) else value
