"""The gateway over real HTTP: in front of Foundry Local with the tiny model, and of a service that misbehaves as scripted."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest
from jsonschema import Draft202012Validator

from slmops_course.operations.gateway import GatewayError, Limits, serve_gateway
from slmops_course.operations.monitoring import Metrics
from slmops_course.operations.requests import (
    CHAT,
    RESPONSES,
    Refusal,
    message_text,
    read_reply,
    read_request,
    request_schemas,
    upstream_refusal,
)
from slmops_course.operations.streams import event_data, is_last, split_events
from slmops_course.rehearsal import RehearsalEndpoint, body, hang, status
from slmops_course.serving import FoundryLocal, OpenAIChatModel, ServingError, json_grammar

RIGHT = '{"intent":"card_lost","urgency":"high"}'
USER = [{"role": "user", "content": "my card is gone"}]
ASK = {"model": "m", "messages": USER}


@pytest.fixture(scope="module")
def foundry(tmp_path_factory, tiny_onnx_folder):
    with FoundryLocal(tmp_path_factory.mktemp("foundry")) as running:
        running.model_id = running.load(tiny_onnx_folder).id
        yield running


@pytest.fixture
def metrics(tiny_task):
    return Metrics(tiny_task)


@pytest.fixture
def start(tiny_task, metrics):
    """Starts gateways; they end with the test."""
    with contextlib.ExitStack() as running:
        def run(upstream, *, metrics=metrics, **options):
            return running.enter_context(serve_gateway(upstream, tiny_task, metrics, **options))

        yield run


@pytest.fixture
def gateway(start, foundry):
    return start(foundry.start_service())


@pytest.fixture
def service():
    """Starts services with scripts; see rehearsal."""
    with contextlib.ExitStack() as running:
        yield lambda *script: running.enter_context(RehearsalEndpoint(lambda text: RIGHT, *script))


@pytest.fixture
def request_of(foundry):
    """A request to the tiny model; a setting of None leaves it out."""

    def make(messages=USER, **settings):
        data = {"model": foundry.model_id, "messages": messages, "max_tokens": 6, "temperature": 0} | settings
        return {name: value for name, value in data.items() if value is not None}

    return make


def post(gateway, data, *, path=CHAT, **options) -> httpx.Response:
    return httpx.post(gateway.url.removesuffix("/v1") + path, json=data, timeout=30, trust_env=False, **options)


def error_of(response: httpx.Response) -> str:
    """The sentence of an error in the API's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["code"] == str(response.status_code)
    return error["message"]


def events(text: str) -> list[dict]:
    return [data for data in map(event_data, text.encode().split(b"\n\n")) if data]


def delta(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def stream(*steps):
    """A step of a script that streams: bytes are sent, an Event is waited for."""

    def play(handler, request):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for step in steps:
            if isinstance(step, bytes):
                handler.wfile.write(step)
            else:
                assert step.wait(20)

    return play


def eventually(check, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    return check()


# --- The same answers as the service ---


def test_a_reply_is_the_services_own_whole_and_streamed(gateway, foundry, request_of):
    direct = httpx.post(f"{foundry.start_service()}/chat/completions", json=request_of(), trust_env=False).json()
    whole = post(gateway, request_of()).json()
    assert whole["choices"] == direct["choices"]
    assert whole["usage"] == direct["usage"]
    response = post(gateway, request_of(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text.endswith("data: [DONE]\n\n")
    usage = direct["usage"]
    assert read_reply(events(response.text)) == (
        direct["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["completion_tokens"],
    )  # fmt: skip


def test_the_counts_of_a_stream_are_shown_to_clients_that_asked_and_always_counted(gateway, metrics, request_of):
    for options, shown in ((None, 0), ({"include_usage": False}, 0), ({"include_usage": True}, 1)):
        response = post(gateway, request_of(stream=True, stream_options=options))
        assert sum(event["choices"] == [] for event in events(response.text)) == shown
    assert metrics.value("slmops_output_tokens_total") == 3 * 6
    assert metrics.value("slmops_prompt_tokens_total") > 0


def test_the_course_and_openais_client_work_through_it(gateway, foundry, metrics, tiny_task):
    conversations = [tiny_task.messages(example.text) for example in tiny_task.splits["test"][:2]]
    with (
        OpenAIChatModel(foundry.start_service(), foundry.model_id, schema=tiny_task.schema) as direct,
        OpenAIChatModel(gateway.url, foundry.model_id, schema=tiny_task.schema) as through,
    ):
        wanted, given = (chat.generate(conversations, max_new_tokens=120) for chat in (direct, through))
        assert [reply.text for reply in given] == [reply.text for reply in wanted]
        assert [reply.output_tokens for reply in given] == [reply.output_tokens for reply in wanted]
        assert foundry.model_id in [model.id for model in through.client.models.list()]
        response = through.client.responses.create(
            model=foundry.model_id, instructions="Answer.", input="hi", temperature=0, max_output_tokens=5
        )
        assert response.usage.output_tokens == 5
        pieces = through.client.responses.create(
            model=foundry.model_id, instructions="Answer.", input="hi", temperature=0, max_output_tokens=5, stream=True
        )
        assert "".join(piece.delta for piece in pieces if piece.type == "response.output_text.delta") == response.output_text
    labels = [tiny_task.parse(reply.text)["intent"] for reply in given]
    assert metrics.value("slmops_invalid_replies_total") == 2  # the two of the Responses API, which were not constrained
    assert metrics.value("slmops_predictions_total", label=labels[0]) == labels.count(labels[0])


def test_a_request_without_a_limit_gets_the_gateways(gateway, request_of):
    # The service itself would plan for 2,048 tokens and refuse, because the tiny model's context holds 512.
    assert post(gateway, request_of(max_tokens=None)).json()["usage"]["completion_tokens"] <= Limits().new_tokens
    assert post(gateway, request_of(max_tokens=3.0)).json()["usage"]["completion_tokens"] == 3


def test_an_event_is_passed_on_before_the_next_one_comes(service, start):
    seen = threading.Event()
    gateway = start(service(stream(delta("one"), seen, delta("two"), b"data: [DONE]\n\n")).url)
    with httpx.stream("POST", f"{gateway.url}/chat/completions", json=ASK | {"stream": True}) as response:
        pieces = response.iter_raw()
        assert b"one" in next(pieces)
        seen.set()
        assert b"two" in b"".join(pieces)


# --- Refused before it reaches the service ---


MISFITS = {
    "a text for a number": ({"temperature": "0"}, "temperature does not fit: '0' is not of type 'number'"),
    "a number that is too high": ({"top_p": 5}, "top_p does not fit: 5 is greater than the maximum"),
    "more tokens than allowed": ({"max_tokens": 10**30}, "max_tokens does not fit"),
    "no tokens": ({"max_tokens": 0}, "max_tokens does not fit"),
    "true for a number": ({"max_tokens": True}, "max_tokens does not fit"),
    "several answers": ({"n": 3}, "n does not fit: 1 was expected"),
    "no messages": ({"messages": []}, "messages does not fit"),
    "a message that is none": ({"messages": [7]}, r"messages\.0 does not fit: 7 is not of type 'object'"),
    "a role that nobody has": ({"messages": [{"role": "boss", "content": "x"}]}, r"messages\.0\.role does not fit"),
    "a content of nothing": ({"messages": [{"role": "user", "content": None}]}, r"messages\.0\.content does not fit"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\.0\.content"),
    "a strange grammar": (
        {"response_format": {"type": "lark_grammar", "lark_grammar": "start: /(a{1000}){1000}/"}},
        "response_format does not fit",
    ),
    "tools": ({"tools": []}, r"Additional properties are not allowed \('tools' was unexpected\)"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_with_its_place(tiny_task, settings, words):
    validator = Draft202012Validator(request_schemas(tiny_task, max_new_tokens=8)[CHAT])
    data = json.dumps({"model": "m", "messages": USER} | settings).encode()
    with pytest.raises(Refusal, match=words) as refused:
        read_request(data, validator, max_new_tokens=8)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 600


NO_JSON = {
    "nothing": b"", "half an object": b'{"model"', "not UTF-8": b'{"model": "\xff"}', "UTF-16": '{"model": 1}'.encode("utf-16"),
    "not a number": b'{"temperature": NaN}', "a number of 5,000 digits": b"1" * 5000, "a list": b"[]", "null": b"null",
    "100,000 levels": b"[" * 100_000, "100,000 closed levels": b"[" * 100_000 + b"]" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("data", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_no_object_of_json_is_refused(tiny_task, data):
    validator = Draft202012Validator(request_schemas(tiny_task, max_new_tokens=8)[CHAT])
    with pytest.raises(Refusal, match=r"is not JSON in UTF-8|nested too deep|does not fit") as refused:
        read_request(data, validator, max_new_tokens=8)
    assert refused.value.status == 400


def test_what_fits_passes_with_one_limit(tiny_task):
    validators = {path: Draft202012Validator(schema) for path, schema in request_schemas(tiny_task, max_new_tokens=8).items()}
    grammar = {"type": "lark_grammar", "lark_grammar": json_grammar(tiny_task.schema)}
    chat = {"model": "m", "messages": USER, "max_tokens": 7.0, "max_completion_tokens": 5, "response_format": grammar}
    data = read_request(json.dumps(chat).encode(), validators[CHAT], max_new_tokens=8)
    assert data == {"model": "m", "messages": USER, "response_format": grammar, "max_tokens": 5}
    response = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hé 😀 \ud800"}]}]}
    assert read_request(json.dumps(response).encode(), validators[RESPONSES], max_new_tokens=8)["max_output_tokens"] == 8


def test_every_refusal_has_the_apis_form_and_is_counted(gateway, foundry, metrics, request_of):
    base, big = gateway.url.removesuffix("/v1"), b'{"model": "' + b"a" * Limits().body_bytes + b'"}'
    kind = {"Content-Type": "application/json"}
    # The last of these would end Foundry Local's process, see tests/test_service_load.py.
    answers = {
        404: httpx.get(f"{base}/v1/nothing"),
        405: httpx.get(base + CHAT),
        415: httpx.post(base + CHAT, content=b"{}", headers={"Content-Type": "text/plain"}),
        413: httpx.post(base + CHAT, content=big, headers=kind),
        400: httpx.post(base + CHAT, content=b"[" * 60_000, headers=kind),
    }
    for code, response in answers.items():
        assert (response.status_code, bool(error_of(response))) == (code, True)
        assert metrics.value("slmops_refused_requests_total", status=str(code)) == 1
    elsewhere = httpx.get(f"{base}/metrics", headers={"Host": "evil.example:80"})
    assert (elsewhere.status_code, "evil.example" in error_of(elsewhere)) == (400, True)
    chunked = httpx.post(base + CHAT, content=iter([big, big]), headers=kind)  # its length is not said before
    assert (chunked.status_code, f"{2 * len(big):,} bytes" in error_of(chunked)) == (413, True)
    assert metrics.value("slmops_requests_total") == 0
    assert post(gateway, request_of()).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_service_refuses_has_a_status_and_plain_words(gateway, metrics, request_of, streamed):
    # Asked for a stream, the service itself gives status 200 and an event with the error.
    long = post(gateway, request_of([{"role": "user", "content": "word " * 2000}], stream=streamed))
    assert long.status_code == 400
    assert error_of(long).startswith("The model's service refused the request: request requires")
    empty = post(gateway, request_of([{"role": "user", "content": ""}], stream=streamed))
    assert (empty.status_code, "nothing to generate from" in error_of(empty)) == (400, True)
    assert post(gateway, request_of(model="nobody", stream=streamed)).status_code == 404
    counted = [metrics.value("slmops_refused_requests_total", status=code) for code in ("400", "404")]
    assert (counted, metrics.value("slmops_errors_total")) == ([2, 1], 0)


# --- Waiting, giving up, falling over ---


def test_one_more_than_may_wait_is_told_to_come_again(service, start, metrics):
    upstream = service(hang, hang)
    gateway = start(upstream.url, limits=Limits(at_once=1, waiting=1))
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(post(gateway, ASK))) for _ in range(2)]
    for number, client in enumerate(clients):
        client.start()
        assert eventually(lambda number=number: metrics.value("slmops_requests_in_progress") == number + 1)
    assert metrics.value("slmops_requests_waiting") == 1
    refused = post(gateway, ASK)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert "1 requests wait already" in error_of(refused)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert len(upstream.requests) == 1
    upstream.released.set()
    for client in clients:
        client.join(20)
    assert len(upstream.requests) == 2
    assert eventually(lambda: not any(metrics.value(f"slmops_requests_{name}") for name in ("waiting", "in_progress")))


def test_a_dropped_client_stops_the_request_and_frees_its_turn(service, start, metrics):
    stopped = threading.Event()

    def endless(handler, request):
        try:
            stream(*[delta("x")] * 100_000)(handler, request)
        except OSError:  # nobody reads it any more
            stopped.set()

    gateway = start(service(endless, body(json.dumps({"choices": []}))).url, limits=Limits(at_once=1))
    with httpx.stream("POST", f"{gateway.url}/chat/completions", json=ASK | {"stream": True}) as response:
        assert b"x" in next(response.iter_raw())
    assert stopped.wait(20)
    assert post(gateway, ASK).status_code == 200
    assert eventually(lambda: metrics.value("slmops_dropped_clients_total") == 1)
    assert metrics.value("slmops_errors_total") == 0


def test_a_client_that_leaves_with_its_whole_reply_is_counted_and_not_dropped(service, start, metrics):
    seen = threading.Event()  # the service's stream ends only when the client has left, as OpenAI's client does at [DONE]
    gateway = start(service(stream(delta(RIGHT), b"data: [DONE]\n\n", seen)).url)
    with httpx.stream("POST", f"{gateway.url}/chat/completions", json=ASK | {"stream": True}) as response:
        pieces = b""
        for piece in response.iter_raw():
            pieces += piece
            if b"[DONE]" in pieces:
                break
        assert metrics.value("slmops_predictions_total", label="card_lost") == 1
    seen.set()
    assert eventually(lambda: metrics.value("slmops_requests_in_progress") == 0)
    assert [metrics.value(f"slmops_{name}_total") for name in ("requests", "errors", "dropped_clients")] == [1, 0, 0]


def test_a_client_that_drops_while_it_waits_takes_no_turn(service, start, metrics):
    upstream = service(hang)
    gateway = start(upstream.url, limits=Limits(at_once=1))
    first = threading.Thread(target=post, args=(gateway, ASK))
    first.start()
    assert eventually(lambda: len(upstream.requests) == 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(gateway.url + "/chat/completions", json=ASK, timeout=0.3)
    assert eventually(lambda: metrics.value("slmops_requests_waiting") == 0)
    upstream.released.set()
    first.join(20)
    assert len(upstream.requests) == 1


def test_a_reply_or_a_body_that_takes_too_long_is_given_up(service, start, metrics):
    gateway = start(service(hang, stream(delta("half"), threading.Event())).url, limits=Limits(timeout_s=0.3))
    late = post(gateway, ASK)
    assert (late.status_code, error_of(late)[:35]) == (504, "The reply was not done within 0.3 s")
    half = post(gateway, ASK | {"stream": True})
    assert [event.get("error", {}).get("code") for event in events(half.text)] == [None, "504"]
    assert metrics.value("slmops_errors_total") == 2
    port = int(gateway.url.split(":")[2].removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        client.sendall(head.encode() + b"{")
        assert b" 408 " in client.recv(4096)


def test_a_service_that_fails_is_a_bad_gateway(service, start, metrics):
    cut = b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n'
    half = b"%x\r\n%b\r\n" % (len(delta("half")), delta("half"))
    upstream = service(
        status(500, '{"error": {"message": "Inference failed: a.cc:1 void fl::A::B() no memory", "type": "server_error"}}'),
        status(500, "server=oatpp\ncode=500"), body("<p>hello</p>"), stream(),
        lambda handler, request: handler.wfile.write(cut + half),
    )  # fmt: skip
    gateway = start(upstream.url)
    words = [(answer.status_code, error_of(answer)) for answer in (post(gateway, ASK) for _ in range(3))]
    assert words == [
        (502, "The model's service failed on the request: no memory"),
        (502, "The model's service gave something else than JSON, with status 500: ask again."),
        (502, "The model's service gave something else than JSON, with status 200: ask again."),
    ]
    assert "without an event" in error_of(post(gateway, ASK | {"stream": True}))
    *_, last = events(post(gateway, ASK | {"stream": True}).text)
    assert last["error"]["message"].startswith("The model's service does not answer (RemoteProtocolError)")
    assert [metrics.value(f"slmops_{name}_total") for name in ("requests", "errors")] == [5, 5]


def test_where_no_service_is_the_gateway_lives_and_is_not_ready(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    gateway = start(f"http://127.0.0.1:{port}/v1")
    base = gateway.url.removesuffix("/v1")
    assert httpx.get(f"{base}/health/live").json() == {"status": "live"}
    ready, asked = httpx.get(f"{base}/health/ready"), post(gateway, ASK)
    assert (ready.status_code, asked.status_code, httpx.get(f"{gateway.url}/models").status_code) == (503, 502, 503)
    assert "does not answer (ConnectionRefusedError)" in error_of(ready)
    assert "does not answer (ConnectionRefusedError)" in error_of(asked)


# --- Counting ---


def test_a_live_run_shows_in_the_metrics(gateway, foundry, metrics, request_of):
    base = gateway.url.removesuffix("/v1")
    assert httpx.get(f"{base}/health/ready").json() == {"status": "ready", "models": [foundry.model_id]}
    post(gateway, request_of())
    post(gateway, request_of(stream=True))
    page = httpx.get(gateway.metrics_url)
    assert page.headers["content-type"].startswith("text/plain; version=")
    for line in (
        "slmops_requests_total 2.0", "slmops_errors_total 0.0", "slmops_invalid_replies_total 2.0",
        'slmops_predictions_total{label="(invalid)"} 2.0', "slmops_output_tokens_total 12.0",
        "slmops_time_to_first_token_seconds_count 1.0", "slmops_request_duration_seconds_count 2.0",
        'slmops_refused_requests_total{status="429"} 0.0',
    ):  # fmt: skip
        assert f"\n{line}\n" in page.text
    first, whole = (metrics.value(f"slmops_{name}_seconds_sum") for name in ("time_to_first_token", "request_duration"))
    assert 0 < first < whole


def test_a_watch_is_told_of_every_reply_and_may_fail(service, start, metrics, caplog):
    told = []

    def watch(text, label, confidence):
        told.append((text, label, confidence))
        if text == "fail":
            raise ZeroDivisionError

    caplog.set_level(logging.WARNING, logger="slmops_course")
    gateway = start(service().url, watch=watch)
    for text in ("my card is gone", "fail"):
        assert post(gateway, {"model": "m", "messages": [{"role": "user", "content": text}]}).status_code == 200
    assert told == [("my card is gone", "card_lost", None), ("fail", "card_lost", None)]
    assert metrics.value("slmops_predictions_total", label="card_lost") == 2
    assert metrics.value("slmops_unwatched_replies_total") == 1
    assert caplog.messages == ["Monitoring failed on a reply (ZeroDivisionError); the reply was given."]


# --- Listening ---


def test_it_listens_on_loopback_only_and_gives_its_port_back(service, start, tiny_task):
    gateway = start(service().url)
    port = int(gateway.url.split(":")[2].removesuffix("/v1"))
    assert gateway.url.startswith("http://127.0.0.1:")
    with pytest.raises(ServingError, match=f"Port {port} is in use"):
        start(service().url, port=port, metrics=Metrics(tiny_task))
    gateway.close()
    gateway.close()
    assert start(service().url, port=port, metrics=Metrics(tiny_task)).url == gateway.url


def test_a_service_elsewhere_and_limits_that_let_nothing_through_are_refused(start):
    for elsewhere in ("http://192.0.2.1:80/v1", "https://example.org/v1", "nonsense"):
        with pytest.raises(GatewayError, match="expected one on this machine"):
            start(elsewhere)
    for wrong in ({"at_once": 0}, {"body_bytes": -1}, {"waiting": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}):
        with pytest.raises(GatewayError, match="expected numbers above 0"):
            Limits(**wrong)
    assert Limits(waiting=0).waiting == 0


# --- Requests and replies in all their forms ---


def test_the_last_event_of_a_stream_is_known_by_its_mark_not_by_its_text():
    assert is_last(b"data: [DONE]\n\n")
    assert is_last(b'event: response.completed\ndata: {"type": "response.completed", "response": {}}\n\n')
    assert not any(map(is_last, (b"", delta("data: [DONE]"), delta('"type": "response.completed"'))))


def test_the_last_message_is_what_is_asked():
    assert message_text({"messages": [{"role": "system", "content": "Answer."}, *USER]}) == "my card is gone"
    assert message_text({"input": "hi"}) == "hi"
    assert message_text({"input": [{"role": "user", "content": [{"type": "text", "text": a} for a in "ab"]}]}) == "ab"


def test_a_reply_is_read_from_a_whole_answer_and_from_events():
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    assert read_reply([{"choices": [{"message": {"content": "hi"}}], "usage": usage}]) == ("hi", 3, 2)
    assert read_reply([event_data(delta("h")), event_data(delta("i")), {"choices": [], "usage": usage}]) == ("hi", 3, 2)
    answer = {"object": "response", "output": [{"content": [{"text": "hi"}]}], "usage": {"input_tokens": 3, "output_tokens": 2}}
    assert read_reply([answer]) == read_reply([{"delta": "hi"}, {"response": answer}]) == ("hi", 3, 2)
    assert read_reply([]) == read_reply([{}]) == read_reply([{"choices": [{"message": {"content": None}}]}]) == ("", 0, 0)


def test_an_answer_of_the_service_is_good_refused_or_failed():
    error = {"error": {"message": "chat_session.cc:7 int fl::A(int) too long", "type": "invalid_request_error"}}
    assert upstream_refusal(200, {"choices": []}) is None
    assert upstream_refusal(200, {"response": {"error": None}}) is None
    late = {"response": {"error": {"code": "server_error", "message": "m"}}}
    found = [upstream_refusal(*answer) for answer in ((404, error), (200, error), (200, late), (500, {}), (200, []))]
    assert [refusal.status for refusal in found] == [404, 400, 502, 502, 502]
    assert str(found[0]) == "The model's service refused the request: too long"


def test_events_are_whole_however_the_bytes_arrive():
    import asyncio

    async def collect(size):
        async def chunks():
            for start in range(0, len(sent), size):
                yield sent[start : start + size]

        return [event async for events in split_events(chunks()) for event in events]

    sent = delta("one") + delta("two") + b"data: [DONE]\n\n"
    for size in (1, 7, len(sent)):
        assert asyncio.run(collect(size)) == [delta("one"), delta("two"), b"data: [DONE]\n\n"]
    sent = delta("one") + b"data: half"
    assert asyncio.run(collect(9)) == [delta("one"), b"data: half"]
    sent = b""
    assert asyncio.run(collect(9)) == []


def test_the_data_of_an_event_is_its_object_if_it_has_one():
    assert event_data(b'event: a\ndata: {"a":\ndata: 1}\n\n') == {"a": 1}
    assert event_data(b"data: [DONE]\n\n") == event_data(b": a comment\n\n") == event_data(b"") == {}
