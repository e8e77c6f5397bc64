"""The served model under load: Foundry Local behind the gateway, in a process of its own, and what it does without it."""

import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmops_course import soak
from slmops_course.artifacts import Store
from slmops_course.faults import Trial
from slmops_course.faults.clients import (
    KINDS,
    Question,
    block_texts,
    check_answer,
    check_script,
    learn_answers,
    must_answer,
    must_refuse,
    wild_request,
)
from slmops_course.faults.storms import KEPT_OPEN, storm, watch_memory
from slmops_course.operations.gateway import GatewayError
from slmops_course.operations.overhead import compare_replies, course_overhead, measure_overhead
from slmops_course.operations.served import Served, ServedApart
from slmops_course.rehearsal import RehearsalEndpoint

CLIENTS = 16
# A body is not drawn anew for every attempt to make it smaller: each costs a request.
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def served(tiny_onnx_folder, tiny_task):
    with ServedApart(tiny_onnx_folder, tiny_task) as running:
        yield running


@pytest.fixture(scope="module")
def questions(served, tiny_task):
    texts = [example.text for split in ("train", "dev", "test") for example in tiny_task.splits[split]]
    known = learn_answers(served, texts[:CLIENTS])
    assert len(known) == CLIENTS  # each has a reply of its own
    return known


# --- Storms ---


@pytest.mark.slow
def test_a_storm_costs_no_answer_no_memory_and_no_file(served, questions):
    def one_round(number):
        return storm(served, questions, clients=CLIENTS, seconds=1.5, seed=number)

    trial = watch_memory(served, one_round, rounds=3, margin_bytes=32 << 20)
    assert trial.lost == []
    assert trial.tried["a known question"] >= CLIENTS
    assert served.exit_code is None


@pytest.mark.slow
def test_clients_that_leave_in_the_reply_leave_no_connection_open(served, questions):
    def one_round(number):
        return storm(served, questions, clients=CLIENTS, seconds=2, kinds=["a client that leaves in the reply"], seed=number)

    assert watch_memory(served, one_round, rounds=2, margin_bytes=32 << 20).lost == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_client_gets_what_it_should(served, questions, kind):
    trial = storm(served, questions, clients=2, seconds=0.1, kinds=[kind], seed=1)
    assert trial.lost == []


@pytest.mark.slow
def test_every_block_of_unicode_gets_a_reply_or_a_refusal(served):
    texts = block_texts()
    assert len(texts) > 300
    assert [problem for text in texts if (problem := check_script(served, text))] == []


@QUICK
@given(rng=st.randoms(use_true_random=False))
def test_settings_of_any_type_get_a_reply_or_a_refusal(served, rng):
    assert must_answer(served, json.dumps(wild_request(rng, served.model)).encode()) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner),
    max_leaves=12,
)


@QUICK
@given(messages=JSON, body=st.binary(max_size=60))
def test_messages_of_any_shape_and_any_bytes_get_a_reply_or_a_refusal(served, messages, body):
    request = {"model": served.model, "messages": messages, "max_tokens": 2}
    assert must_answer(served, json.dumps(request).encode()) is None
    assert must_refuse(served, body) is None


# --- What a storm would notice ---


@pytest.mark.parametrize("kind", ["a known question", "a slow reader"])
def test_a_reply_that_is_not_the_known_one_is_lost(served, questions, kind):
    wrong = [Question(question.text, question.seed, "somebody else's") for question in questions[:1]]
    trial = storm(served, wrong, clients=1, seconds=0.1, kinds=[kind])
    assert any(sentence.startswith(f"{kind}: ") and "expected \"somebody else's\"" in sentence for sentence in trial.lost)
    assert trial.lost[-1].startswith("afterwards: ")


def test_the_seed_tells_two_clients_with_one_text_apart(served, questions):
    assert check_answer(served, questions[0]) is None
    same = Question(questions[0].text, questions[1].seed, questions[0].reply)
    assert check_answer(served, same) is not None


def test_a_reply_is_known_if_it_is_always_the_same_and_no_other_questions():
    numbers = itertools.count()
    for answer, known in ((lambda text: text.upper(), ["a", "b"]), (lambda text: "the same", ["a"])):
        with RehearsalEndpoint(answer) as service:
            learned = learn_answers(SimpleNamespace(gateway=service.url, model="m"), ["a", "b"])
        assert [question.text for question in learned] == known
    with RehearsalEndpoint(lambda text: str(next(numbers))) as service:
        stand_in = SimpleNamespace(gateway=service.url, model="m")
        assert learn_answers(stand_in, []) == []
        with pytest.raises(ValueError, match="'a' gets '0' and '1': expected one reply"):
            learn_answers(stand_in, ["a"])


def test_refusals_and_replies_in_another_form_are_losses(served):
    assert "status 404" in must_refuse(served, json.dumps(ask(served, model="x")).encode())
    assert "status 200" in must_refuse(served, json.dumps(ask(served)).encode())


class Counted:
    """Stands in for a served model: its memory and open files follow a list, one entry a look."""

    exit_code = None

    def __init__(self, megabytes, files):
        self.megabytes, self.files = list(megabytes), list(files)

    def resident_bytes(self):
        return self.megabytes.pop(0) * 10**6

    def descriptors(self):
        return self.files.pop(0) if len(self.files) > 1 else self.files[0]


@pytest.mark.parametrize(
    ("megabytes", "files", "lost"),
    [
        ([100, 101, 100, 101], [9, 9], []),
        ([100, 110, 120, 130], [9, 9], ["memory grew by 40.0 MB, expected at most 20"]),
        ([100, 130, 100, 100], [9, 9 + KEPT_OPEN], []),  # one peak is no slope
        ([100], [9, 40], ["31 files stayed open, expected at most 6"]),
    ],
)
def test_memory_that_grows_and_files_that_stay_open_are_losses(megabytes, files, lost):
    served, rounds = Counted(megabytes, files), len(megabytes)
    limits = {"margin_bytes": 20 * 10**6, "settle_s": 0.1}
    trial = watch_memory(served, lambda number: Trial("a storm", {"x": 1}), rounds=rounds, **limits)
    assert trial.lost == lost
    assert trial.tried == {"x": 1 + rounds}


# --- Foundry Local's service without the gateway: what is expected of it, as of foundry-local-sdk 2.2.1 ---


def direct(served, data, **options) -> httpx.Response:
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{served.direct}/chat/completions", content=content, headers=headers, timeout=30, **options)


def ask(served, **changes):
    return {"model": served.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0} | changes


@pytest.mark.slow
def test_a_body_nested_100000_deep_ends_the_services_process(tiny_onnx_folder, tiny_task):
    """Half a body of "[" is enough: the parser's stack is used up. Through the gateway it is a refusal, status 400."""
    deep = b"[" * 50_000 + b"]" * 50_000
    with ServedApart(tiny_onnx_folder, tiny_task) as served:
        assert must_refuse(served, deep[:60_000]) is None
        assert served.exit_code is None
        with pytest.raises(httpx.HTTPError):
            direct(served, deep)
        served.wait(20)
        assert served.exit_code == -signal.SIGSEGV


def test_a_streamed_request_that_is_refused_has_status_200(served):
    refused = ask(served, messages=[{"role": "user", "content": ""}])
    assert direct(served, refused).status_code == 400
    streamed = direct(served, refused | {"stream": True})
    assert (streamed.status_code, "invalid_request_error" in streamed.text) == (200, True)


def test_settings_of_a_wrong_type_are_ignored_in_silence(served):
    # So is "temperature": "0", which samples; and "max_tokens": "4", which plans for 2,048 tokens.
    assert direct(served, ask(served, stream="yes", n=-1, stream_options=7, tools=7)).status_code == 200
    assert "2048 output" in direct(served, ask(served, max_tokens="4")).text


def test_some_errors_are_no_json(served):
    for response in (direct(served, b'{"model": "\xff"}'), httpx.get(f"{served.direct}/nothing")):
        assert response.status_code in (404, 500)
        assert response.text.startswith("server=oatpp")


# --- Served in a process of its own, and what the gateway adds ---


def test_a_folder_that_is_no_model_is_not_served(tiny_onnx_folder, tiny_task, tmp_path):
    shutil.copytree(tiny_onnx_folder, tmp_path / "half")
    (tmp_path / "half" / "model.onnx").unlink()
    half = ServedApart(tmp_path / "half", tiny_task)
    with pytest.raises(GatewayError, match=r"half was not served .*has no model\.onnx"), half:
        pass


def test_a_served_models_metrics_are_at_the_address_that_it_names(served):
    page = httpx.get(Served(served.direct, served.gateway, served.model).metrics)
    assert page.status_code == 200
    assert f'slmops_model_info{{model="{served.model}",version=""}} 1.0' in page.text


def test_the_gateway_is_measured_beside_the_service(served, tiny_task):
    conversations = [tiny_task.messages(example.text) for example in tiny_task.splits["test"][:2]]
    overhead = measure_overhead(served, conversations, requests=4, max_new_tokens=8)
    assert overhead.requests == overhead.latency_s.added.count == 4
    for figure in (overhead.time_to_first_token_s, overhead.latency_s, overhead.output_tokens_per_s):
        assert figure.direct > 0
        assert figure.through > 0
    assert str(overhead).startswith("4 requests each way\ntime_to_first_token_s: ")
    with pytest.raises(GatewayError, match="0 requests over 2 conversations"):
        measure_overhead(served, conversations, requests=0)


@pytest.mark.slow
def test_the_courses_overhead_is_measured_once(tiny_onnx_folder, tiny_task, tmp_path):
    store = Store(tmp_path)

    def onnx(recipe):
        return store.build(f"onnx-{recipe}", settings={}, write=lambda folder: copy_into(tiny_onnx_folder, folder))

    course = SimpleNamespace(store=store, task=tiny_task, served_recipe="int4-rtn", onnx=onnx)
    overhead = course_overhead(course, requests=2)
    assert (overhead.requests, overhead.latency_s.added.count) == (2, 2)
    assert course_overhead(course, requests=2) == overhead  # to the last digit: it was read, not measured again
    assert course_overhead(course, requests=3).requests == 3


def copy_into(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)


def test_what_is_added_is_the_median_of_the_pairs():
    from slmops_course.chat import Reply

    def reply(first_s, latency_s):
        return Reply("x", 1, 10, first_s, latency_s)

    pairs = [(reply(0.1, 1.0), reply(0.11, 1.25)), (reply(0.2, 2.0), reply(0.22, 2.5)), (reply(0.1, 1.0), reply(0.3, 1.25))]
    overhead = compare_replies(pairs)
    assert overhead.time_to_first_token_s.added.value == pytest.approx(0.1)
    assert overhead.latency_s.added.value == pytest.approx(0.25)
    assert overhead.output_tokens_per_s.added.value == pytest.approx(-0.2)
    assert (overhead.output_tokens_per_s.direct, overhead.output_tokens_per_s.through) == (10, 8)


# --- The long form's own report, in short ---


@pytest.mark.slow
def test_the_soak_of_the_service_reports_every_trial(tiny_onnx_folder, tiny_task_folder):
    trials = []
    soak.soak_service(tiny_onnx_folder, tiny_task_folder, minutes=0.02, clients=4, seed=3, report=trials.append)
    assert [trial.name for trial in trials] == ["every block of Unicode", "a storm of 4 clients"]
    assert [trial.lost for trial in trials] == [[], []]
