import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from slmops_course import serving
from slmops_course.chat import TorchChatModel
from slmops_course.optimize import optimize
from slmops_course.serving import (
    FoundryChatModel,
    FoundryLocal,
    GenAIChatModel,
    OpenAIChatModel,
    ServingError,
    bare_schema,
    check_onnx_folder,
    check_port_free,
    model_identifier,
    plain_words,
)

ENOUGH = 120  # tokens for any answer of the tiny task's schema, were it spelt letter by letter


@pytest.fixture(scope="module")
def foundry(tmp_path_factory):
    """Foundry Local with its service, for the tests that leave it as it is."""
    with FoundryLocal(tmp_path_factory.mktemp("foundry")) as running:
        running.start_service()
        yield running


@pytest.fixture
def model(foundry, tiny_onnx_folder):
    return foundry.load(tiny_onnx_folder)


@pytest.fixture
def conversations(tiny_task):
    return [tiny_task.messages(example.text) for example in tiny_task.splits["test"]]


def outside(code: str, *arguments) -> str:
    """Run code in a process of its own, since there is one Foundry Local a process; returns what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- ONNX Runtime GenAI ---


def test_answers_in_a_batch_equal_answers_one_by_one(tiny_onnx_folder, conversations):
    # The same message twice makes a batch of two; the others differ in length.
    asked = [*conversations, conversations[0]]
    with GenAIChatModel(tiny_onnx_folder) as chat:
        together = chat.generate(asked, max_new_tokens=12)
        singly = [chat.reply(conversation, max_new_tokens=12) for conversation in asked]
    assert [r.text for r in together] == [r.text for r in singly]
    assert [r.prompt_tokens for r in together] == [r.prompt_tokens for r in singly]
    assert together[0].text == together[-1].text


def test_the_fp32_conversion_answers_as_pytorch_does(tiny_model_folder, tiny_task, conversations, tmp_path):
    optimize("fp32", model=tiny_model_folder, task=tiny_task, folder=tmp_path / "fp32")
    with TorchChatModel(tiny_model_folder) as torch_chat, GenAIChatModel(tmp_path / "fp32") as onnx_chat:
        wanted = torch_chat.generate(conversations, max_new_tokens=8)
        given = onnx_chat.generate(conversations, max_new_tokens=8)
    assert [r.prompt_tokens for r in given] == [r.prompt_tokens for r in wanted]
    assert [r.text for r in given] == [r.text for r in wanted]


def test_no_more_tokens_come_than_were_asked_for(tiny_onnx_folder, conversations):
    with GenAIChatModel(tiny_onnx_folder) as chat:
        replies = chat.generate(conversations, max_new_tokens=3)
    assert all(0 < reply.output_tokens <= 3 for reply in replies)
    assert all(0 < reply.time_to_first_token_s <= reply.latency_s for reply in replies)


def test_no_conversations_give_no_replies(tiny_onnx_folder):
    with GenAIChatModel(tiny_onnx_folder) as chat:
        assert chat.generate([]) == []


def test_a_folder_without_a_model_is_refused_with_what_it_lacks(tmp_path, tiny_onnx_folder):
    shutil.copytree(tiny_onnx_folder, tmp_path / "half")
    (tmp_path / "half" / "model.onnx").unlink()
    with pytest.raises(ServingError, match=r"has no model\.onnx: expected an ONNX model"):
        GenAIChatModel(tmp_path / "half")
    with pytest.raises(ServingError, match=r"no genai_config\.json, no model\.onnx, no tokenizer\.json"):
        check_onnx_folder(tmp_path / "nowhere")


# --- Foundry Local in process ---


def test_foundry_local_answers_as_the_same_file_under_genai(model, tiny_onnx_folder, conversations):
    with GenAIChatModel(tiny_onnx_folder) as chat:
        wanted = [reply.text for reply in chat.generate(conversations, max_new_tokens=8)]
    given = FoundryChatModel(model).generate(conversations, max_new_tokens=8)
    assert [reply.text for reply in given] == wanted
    assert all(0 < reply.output_tokens <= 8 for reply in given)


def test_the_pieces_of_a_stream_joined_are_the_whole_reply(model, conversations):
    chat = FoundryChatModel(model)
    pieces = list(chat.stream(conversations[0], max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == chat.reply(conversations[0], max_new_tokens=12).text


def test_one_question_knows_nothing_of_the_one_before(model, conversations):
    chat = FoundryChatModel(model)
    first = chat.reply(conversations[0], max_new_tokens=8)
    chat.reply(conversations[1], max_new_tokens=8)
    again = chat.reply(conversations[0], max_new_tokens=8)
    assert (again.text, again.prompt_tokens) == (first.text, first.prompt_tokens)


def test_a_constrained_reply_fits_the_schema_even_from_an_untrained_model(model, tiny_task, conversations):
    free = FoundryChatModel(model).generate(conversations, max_new_tokens=ENOUGH)
    forced = FoundryChatModel(model, schema=tiny_task.schema).generate(conversations, max_new_tokens=ENOUGH)
    assert any(not reply.text.startswith("{") for reply in free)  # else this test proves nothing
    for reply in forced:
        assert tiny_task.target(tiny_task.parse(reply.text)) == reply.text  # compact, and fields in order


def test_a_request_that_does_not_fit_is_refused_in_plain_words(model):
    chat = FoundryChatModel(model)
    with pytest.raises(ServingError, match=r"refused the request \(request requires .* context length"):
        chat.reply([{"role": "user", "content": "word " * 3000}])
    with pytest.raises(ServingError, match="nothing to generate from"):
        chat.reply([{"role": "user", "content": ""}])


# --- Foundry Local's service ---


def test_the_service_answers_as_the_model_in_process(foundry, model, conversations):
    wanted = FoundryChatModel(model).generate(conversations, max_new_tokens=8)
    with OpenAIChatModel(foundry.start_service(), model.id) as chat:
        given = chat.generate(conversations, max_new_tokens=8)
    assert [reply.text for reply in given] == [reply.text for reply in wanted]
    assert [reply.prompt_tokens for reply in given] == [reply.prompt_tokens for reply in wanted]
    assert all(0 < reply.time_to_first_token_s <= reply.latency_s for reply in given)


def test_a_constrained_reply_over_http_fits_the_schema(foundry, model, tiny_task, conversations):
    with OpenAIChatModel(foundry.start_service(), model.id, schema=tiny_task.schema) as chat:
        for reply in chat.generate(conversations, max_new_tokens=ENOUGH):
            assert set(tiny_task.parse(reply.text)) == set(tiny_task.fields)


def test_fields_come_in_the_schemas_order_in_process_and_over_http(foundry, model, tiny_task, conversations):
    for fields in (["intent", "urgency"], ["urgency", "intent"]):
        schema = {**tiny_task.schema, "properties": {name: tiny_task.schema["properties"][name] for name in fields}}
        for chat in (
            FoundryChatModel(model, schema=schema),
            OpenAIChatModel(foundry.start_service(), model.id, schema=schema),
        ):
            assert list(json.loads(chat.reply(conversations[0], max_new_tokens=ENOUGH).text)) == fields


def test_the_responses_api_answers_with_the_same_text(foundry, model, tiny_task):
    text = tiny_task.splits["test"][0].text
    wanted = FoundryChatModel(model).reply(tiny_task.messages(text), max_new_tokens=8)
    with OpenAIChatModel(foundry.start_service(), model.id) as chat:
        response = chat.client.responses.create(
            model=model.id, instructions=tiny_task.prompt, input=text, temperature=0, max_output_tokens=8
        )
    assert response.output_text == wanted.text


def test_the_service_listens_on_loopback_only_and_starts_once(foundry):
    url = foundry.start_service()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/catalogs/local/v1")
    assert foundry.start_service() == url


def test_a_model_id_that_nobody_registered_is_refused(foundry, model, conversations):
    with (
        OpenAIChatModel(foundry.start_service(), "no-such-model") as chat,
        pytest.raises(ServingError, match=r"HTTP status 404.*no-such-model"),
    ):
        chat.reply(conversations[0])


def test_where_nothing_answers_that_is_said(conversations):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        OpenAIChatModel(f"http://127.0.0.1:{port}/v1", "any") as chat,
        pytest.raises(ServingError, match=rf"Nothing answers at http://127\.0\.0\.1:{port}/v1.*slmops serve"),
    ):
        chat.reply(conversations[0])


# --- Registering, versions ---


def test_versions_become_variants_newest_first(foundry, tiny_onnx_folder, conversations):
    first = foundry.load(tiny_onnx_folder, "versioned", version=1)
    second = foundry.load(tiny_onnx_folder, "versioned", version=2)
    assert foundry.versions("versioned") == ["versioned-generic-cpu:2", "versioned-generic-cpu:1"]
    replies = [FoundryChatModel(version).reply(conversations[0], max_new_tokens=5).text for version in (first, second)]
    assert replies[0] == replies[1]


def test_a_name_that_nobody_registered_has_no_versions(foundry):
    assert foundry.versions("nobody") == []


def test_another_folder_takes_the_place_of_a_loaded_version(foundry, tiny_onnx_folder, tmp_path):
    shutil.copytree(tiny_onnx_folder, tmp_path / "copy")
    assert foundry.load(tiny_onnx_folder, "moved").get_path() == str(tiny_onnx_folder)
    assert foundry.load(tmp_path / "copy", "moved").get_path() == str(tmp_path / "copy")


def test_a_folder_that_is_no_model_is_refused(foundry, tmp_path):
    with pytest.raises(ServingError, match=r"has no genai_config\.json"):
        foundry.load(tmp_path)


def test_a_damaged_model_is_refused_in_plain_words(foundry, tiny_onnx_folder, tmp_path):
    shutil.copytree(tiny_onnx_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ServingError, match=r"could not load damaged-generic-cpu:1 \(failed to load model"):
        foundry.load(tmp_path / "damaged", "damaged")


@pytest.mark.parametrize(("alias", "version"), [("Support Desk", 1), ("", 1), ("desk:x", 1), ("desk", 0), ("desk", -1)])
def test_names_and_versions_that_cannot_be_registered_are_refused(alias, version):
    with pytest.raises(ServingError, match="cannot be registered"):
        model_identifier(alias, version)


def test_an_id_has_name_hardware_and_version():
    assert model_identifier("support-desk", 3) == "support-desk-generic-cpu:3"


# --- Starting and stopping ---


def test_a_second_manager_is_refused(foundry, tmp_path):
    with pytest.raises(ServingError, match="runs in this process already"):
        FoundryLocal(tmp_path).start()


def test_what_is_not_running_says_so(tmp_path, tiny_onnx_folder):
    idle = FoundryLocal(tmp_path)
    with pytest.raises(ServingError, match="not running"):
        idle.load(tiny_onnx_folder)
    with pytest.raises(ServingError, match="not running"):
        idle.start_service()
    idle.close()


LIFE = """
import sys
from pathlib import Path
from slmops_course.serving import FoundryChatModel, FoundryLocal, OpenAIChatModel, ServingError

folder, data, ask = Path(sys.argv[1]), Path(sys.argv[2]), [{"role": "user", "content": "hi"}]
try:
    with FoundryLocal(data) as foundry:
        half = FoundryChatModel(foundry.load(folder)).stream(ask, max_new_tokens=9)
        next(half)
        url = foundry.start_service()
        raise ZeroDivisionError("a cell fails, with an answer half given")
except ZeroDivisionError:
    print("failed as planned")
try:
    OpenAIChatModel(url, "any").reply(ask)
except ServingError:
    print("service gone")

port = int(url.split(":")[2].split("/")[0])
with FoundryLocal(data, port=port) as foundry:
    print("registered still:", *foundry.versions())
    model = foundry.load(folder)
    url = foundry.start_service()
    print("same port:", f":{port}/" in url)
    print("answers:", OpenAIChatModel(url, model.id).reply(ask, max_new_tokens=4).output_tokens > 0)
foundry.close()
foundry.close()
print("closed three times")
"""


def test_after_an_error_everything_is_given_back_and_the_next_one_starts(tiny_onnx_folder, tmp_path):
    lines = outside(LIFE, tiny_onnx_folder, tmp_path / "data").splitlines()
    assert lines == [
        "failed as planned",
        "service gone",
        "registered still: support-desk-generic-cpu:1",
        "same port: True",
        "answers: True",
        "closed three times",
    ]


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path, tiny_onnx_folder):
    code = """
import socket, sys
from pathlib import Path
from slmops_course.serving import FoundryLocal, ServingError

with socket.create_server(("127.0.0.1", 0)) as other:
    try:
        FoundryLocal(Path(sys.argv[1]), port=other.getsockname()[1]).start()
    except ServingError as error:
        print(error)
with FoundryLocal(Path(sys.argv[1])) as foundry:
    print("starts afterwards")
"""
    first, second = outside(code, tmp_path / "data").splitlines()
    assert "is in use" in first
    assert "choose another" in first
    assert second == "starts afterwards"


def test_data_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    code = """
import sys
from pathlib import Path
from slmops_course.serving import FoundryLocal, ServingError

try:
    FoundryLocal(Path(sys.argv[1])).start()
except ServingError as error:
    print(error)
"""
    assert "could not start with its data in" in outside(code, tmp_path / "file" / "data")


def test_a_free_port_passes_and_an_impossible_one_does_not():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServingError, match=f"Port {port} is in use"):
            check_port_free(port)
    check_port_free(port)
    with pytest.raises(ServingError, match="Port 99999 is in use or not allowed"):
        check_port_free(99_999)


@pytest.mark.skipif(os.name != "posix", reason="other systems report a connection that has ended otherwise")
def test_a_port_whose_last_connection_has_just_ended_counts_as_free():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            client.recv(1)
    check_port_free(port)


def test_without_the_sdk_the_error_says_what_to_install():
    code = """
import sys
sys.modules["foundry_local_sdk"] = None
from pathlib import Path
from slmops_course.serving import FoundryLocal, ServingError

try:
    FoundryLocal(Path("unused")).start()
except ServingError as error:
    print(error)
"""
    assert "pip install foundry-local-sdk" in outside(code)


# --- Schemas and messages ---


def test_a_bare_schema_keeps_the_constraints_and_drops_the_annotations(tiny_task):
    bare = bare_schema({**tiny_task.schema, "$schema": "x", "title": "t", "description": "d"})
    assert bare["properties"] == tiny_task.schema["properties"]
    assert bare["required"] == ["intent", "urgency"]
    assert bare["x-guidance"] == {"whitespace_flexible": False}
    assert not {"$schema", "title", "description"} & set(bare)
    json.dumps(bare)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("manager.cc:519 void fl::Manager::StartWebService() web service is already running", "web service is already running"),
        ("a.cc:1 void fl::A::B(const std::string&, int) const it failed (badly)", "it failed (badly)"),
        ("some other error (with brackets)", "some other error (with brackets)"),
        ("", ""),
    ],
)
def test_errors_lose_the_place_in_the_runtimes_source(raw, plain):
    assert plain_words(ValueError(raw)) == plain


def test_the_served_name_can_be_registered():
    assert model_identifier(serving.SERVED_ALIAS, 1).startswith(serving.SERVED_ALIAS)
