"""Inference opens no connection but loopback: in PyTorch, in ONNX Runtime GenAI, in Foundry Local and over its service."""

import pytest

from slmops_course.chat import TorchChatModel
from slmops_course.network import ConnectionLog
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
