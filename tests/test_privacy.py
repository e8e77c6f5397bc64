"""Inference opens no connection but loopback: in PyTorch, in ONNX Runtime GenAI, in Foundry Local and over its service."""

import pytest

from slmops_course.chat import TorchChatModel
from slmops_course.network import ConnectionLog, NetworkError, names_looked_up
from slmops_course.serving import FoundryChatModel, FoundryLocal, GenAIChatModel, OpenAIChatModel


@pytest.fixture
def asks(tiny_task):
    return [tiny_task.messages(example.text) for example in tiny_task.splits["test"]]


def test_pytorch_and_onnx_inference_open_no_connection(tiny_model_folder, tiny_onnx_folder, asks):
    with ConnectionLog() as log:
        for open_model in (lambda: TorchChatModel(tiny_model_folder), lambda: GenAIChatModel(tiny_onnx_folder)):
            with open_model() as chat:
                chat.generate(asks, max_new_tokens=4)
    assert log.all == []


def test_foundry_local_talks_to_loopback_only(tiny_onnx_folder, asks, tmp_path):
    with ConnectionLog() as log, FoundryLocal(tmp_path / "foundry") as foundry:
        model = foundry.load(tiny_onnx_folder)
        FoundryChatModel(model).generate(asks, max_new_tokens=4)
        with OpenAIChatModel(foundry.start_service(), model.id) as chat:
            chat.generate(asks, max_new_tokens=4)
    assert log.all != [], "the log must have seen the calls to the service on loopback"
    assert log.remote == []


@pytest.fixture
def boxed():
    """Skip where no process can be put into a network namespace of its own."""
    if names_looked_up("pass", wait_s=0) is None:
        pytest.skip("Here no process may have a network of its own: `unshare --user --net` is refused.")


def test_a_name_that_is_looked_up_is_heard_and_silence_is_empty(boxed):
    assert names_looked_up("import socket; socket.gethostbyname('example.org')", wait_s=0) == ["example.org"]
    assert names_looked_up("print(end='')", wait_s=0) == []


def test_code_that_fails_by_itself_is_no_silence(boxed):
    with pytest.raises(NetworkError, match="ZeroDivisionError"):
        names_looked_up("1 / 0", wait_s=0)


@pytest.mark.slow
def test_onnx_runtime_asks_for_no_address_once_the_course_is_imported(boxed):
    """The second half shows that the first one could fail: without the course's switch this version does ask."""
    loud = {"CI": "", "GITHUB_ACTIONS": "", "TF_BUILD": "", "ORT_DISABLE_TELEMETRY": ""}
    assert names_looked_up("import slmops_course, onnxruntime", environment=loud) == []
    assert names_looked_up("import onnxruntime", environment=loud) != [], "this version is silent: is the switch still needed?"
