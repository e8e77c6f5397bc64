"""Endpoints are asked over real HTTP: a server on loopback that misbehaves as each test's script says."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict

import pytest

from slmops_course.chat import RecordedChatModel, Reply
from slmops_course.endpoints import (
    Budget,
    BudgetError,
    EndpointChatModel,
    EndpointError,
    Journal,
    Tokens,
    check_address,
    load_recorded,
    read_completion,
    read_key,
    record,
    worst_case,
)
from slmops_course.network import ConnectionLog
from slmops_course.rehearsal import RehearsalEndpoint, body, completion, cut, good, hang, status
from slmops_course.tasks import TaskError
from slmops_course.teachers import label_messages

KEY = "sk-a-key-that-nobody-may-see"
NO_LIMIT = Budget()
PRICED = {"price_per_million_input": 1.0, "price_per_million_output": 10.0}


def says(text, **options):
    return body(completion(text, **options))


def cut_without_length(handler, request):
    """Half an answer that says nowhere how long it is."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + completion("half")[:60].encode())


def hang_up(handler, request):
    """No answer at all, and the connection ends."""


@pytest.fixture
def serve():
    """Starts endpoints, each with its script."""
    with contextlib.ExitStack() as running:
        yield lambda *script: running.enter_context(RehearsalEndpoint(lambda text: f"re: {text}", *script))


@pytest.fixture
def waits():
    return []


@pytest.fixture
def teacher(waits):
    """Opens models on an endpoint that note what they would wait, instead of waiting."""
    opened = []

    def connect(endpoint, *, budget=NO_LIMIT, timeout_s=5.0, **options):
        options = {"key_variable": "SLMOPS_NO_SUCH_KEY", "sleep": waits.append} | options
        opened.append(EndpointChatModel(endpoint.url, "m", budget=budget, timeout_s=timeout_s, **options))
        return opened[-1]

    yield connect
    for model in opened:
        model.close()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SLMOPS_TEST_KEY", KEY)
    return KEY


def ask(*texts):
    return [[{"role": "system", "content": "Answer."}, {"role": "user", "content": text}] for text in texts]


def texts_of(replies):
    return [reply.text for reply in replies]


WORST = worst_case({"model": "m", "messages": ask("a")[0], "max_tokens": 8, "temperature": 0})
WORST_TOKENS = WORST.input + WORST.output


# --- A good answer ---


def test_replies_come_in_order_with_the_endpoints_token_counts(serve, teacher):
    endpoint = serve()
    replies = teacher(endpoint).generate(ask("a", "b"), max_new_tokens=8)
    assert texts_of(replies) == ["re: a", "re: b"]
    assert [(r.prompt_tokens, r.output_tokens) for r in replies] == [(20, 5)] * 2
    assert all(0 < r.time_to_first_token_s == r.latency_s for r in replies)
    assert endpoint.requests[0] == {"model": "m", "messages": ask("a")[0], "max_tokens": 8, "temperature": 0}


def test_no_conversations_are_no_requests(serve, teacher, tmp_path):
    endpoint = serve()
    assert teacher(endpoint, journal=tmp_path / "j.jsonl").generate([]) == []
    assert (endpoint.requests, (tmp_path / "j.jsonl").read_bytes()) == ([], b"")


def test_it_is_a_teacher_as_any_other(serve, teacher, tiny_task):
    right = '{"intent":"card_lost","urgency":"high"}'
    labelled = label_messages(
        tiny_task.splits["unlabelled"], teacher(serve(says(right), says(right[:-4], finish="length"), says(None))), tiny_task
    )
    assert [dict(example.answer) for example in labelled.kept] == [{"intent": "card_lost", "urgency": "high"}]
    assert [rejected.content for rejected in labelled.rejected] == [right[:-4], ""]


def test_a_reply_that_was_cut_at_the_limit_is_returned_once_and_its_task_rejects_it(serve, teacher, tiny_task):
    endpoint = serve(says('{"intent":"card_', finish="length"))
    reply = teacher(endpoint).reply(ask("a")[0])
    assert (reply.text, len(endpoint.requests)) == ('{"intent":"card_', 1)
    with pytest.raises(TaskError, match="not JSON"):
        tiny_task.parse(reply.text)


def test_a_schema_is_sent_as_openai_takes_it_or_not_at_all(serve, teacher, tiny_task):
    endpoint = serve()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **tiny_task.schema}
    teacher(endpoint, schema=schema).reply(ask("a")[0])
    teacher(endpoint, schema=schema, schema_form="none").reply(ask("a")[0])
    wrapped = {"name": "answer", "strict": True, "schema": dict(tiny_task.schema)}
    assert endpoint.requests[0]["response_format"] == {"type": "json_schema", "json_schema": wrapped}
    assert "response_format" not in endpoint.requests[1]
    with pytest.raises(EndpointError, match="expected 'openai' or 'none'"):
        teacher(endpoint, schema=schema, schema_form="grammar")


# --- What passes ---


@pytest.mark.parametrize(
    "trouble",
    [
        status(408), status(429), status(500), status(503, "<html>busy</html>", Content_Type="text/html"), status(529),
        cut, cut_without_length, hang_up, hang, body("{'single': 'quotes'}"), body("{}"), body("[]"), body("[" * 99_999),
        body(""), body("<html>sign in</html>", "text/html"), body(completion(["parts"])), body('{"choices": []}'),
    ],
    ids=[
        "408", "429", "500", "503", "529", "cut", "cut-without-length", "hang-up", "hang", "quotes", "object", "list",
        "deep", "empty", "html", "parts", "no-choice",
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_after_a_wait(serve, teacher, waits, trouble):
    endpoint = serve(trouble)
    start = time.perf_counter()
    replies = teacher(endpoint, timeout_s=0.3).generate(ask("a", "b"))
    assert time.perf_counter() - start < 5, "the timeout was not kept"
    assert texts_of(replies) == ["re: a", "re: b"]
    assert endpoint.asked == ["a", "a", "b"]
    assert len(waits) == 1


def test_waits_double_and_differ(serve, teacher, waits):
    teacher(serve(*[status(500)] * 5)).reply(ask("a")[0])
    teacher(serve(*[status(500)] * 5)).reply(ask("a")[0])
    for first, second, least in zip(waits[:5], waits[5:], (1, 2, 4, 8, 16), strict=True):
        assert least <= min(first, second) <= max(first, second) <= least + 1
    assert waits[:5] != waits[5:]


def test_no_wait_is_longer_than_a_minute(serve, teacher, waits):
    teacher(serve(*[status(500)] * 9), retries=9).reply(ask("a")[0])
    assert waits[-3:] == [60, 60, 60]


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("7", 7, 7), ("0", 0, 0), ("3600", 60, 60), ("Fri, 31 Dec 2100 23:59:59 GMT", 1, 2), ("-5", 1, 2), ("nan", 1, 2)],
)
def test_the_wait_is_what_the_endpoint_asks_for_up_to_a_minute(serve, teacher, waits, asked, least, most):
    teacher(serve(status(429, Retry_After=asked))).reply(ask("a")[0])
    assert least <= waits[0] <= most


def test_a_wait_is_logged_for_those_who_wonder(serve, teacher, caplog):
    with caplog.at_level(logging.INFO, "slmops_course"):
        teacher(serve(status(429, Retry_After="7"))).reply(ask("a")[0])
    assert [r.getMessage() for r in caplog.records if r.name == "slmops_course"] == [
        'm at 127.0.0.1: HTTP status 429 {"error": {"message": "not now"}}; the next attempt is in 7.0 s'
    ]


@pytest.mark.parametrize(
    ("trouble", "named"),
    [(status(503), "HTTP status 503 .*not now"), (hang, "Timeout"), (body("oops"), "no completion, 'oops'"), (cut, "Protocol")],
    ids=["503", "hang", "nonsense", "cut"],
)
def test_what_does_not_pass_is_given_up_in_one_sentence(serve, teacher, waits, trouble, named):
    endpoint = serve(good, *[trouble] * 3)
    with pytest.raises(EndpointError, match=f"no usable answer in 3 attempts .*{named}.*; 1 of 3 messages are answered"):
        teacher(endpoint, retries=2, timeout_s=0.2).generate(ask("a", "b", "c"))
    assert (endpoint.asked, len(waits)) == (["a", "b", "b", "b"], 2)


def test_where_nothing_listens_that_is_said_and_nothing_is_charged(waits):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with EndpointChatModel(url, "m", budget=NO_LIMIT, retries=2, sleep=waits.append) as model:
        with pytest.raises(EndpointError, match=r"no usable answer in 3 attempts .*ConnectError.*refused.*see that it is up"):
            model.reply(ask("a")[0])
        assert (len(waits), model.journal.spent) == (2, Tokens())


# --- What does not pass ---


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (400, "not now.*check the model's name, max_new_tokens and schema_form"),
        (401, "into the environment variable SLMOPS_NO_SUCH_KEY"),
        (403, "not now.*ask its owner for access"),
        (404, "not now.*base_url, which mostly ends in /v1"),
        (422, "not now.*check the model's name"),
    ],
)
def test_a_refusal_is_not_tried_again_and_says_what_to_do(serve, teacher, waits, code, advice):
    endpoint = serve(good, status(code))
    model = teacher(endpoint)
    with pytest.raises(EndpointError, match=f"refused to ask m .HTTP status {code}.*{advice}.*1 of 3 messages are answered"):
        model.generate(ask("a", "b", "c"))
    assert (endpoint.asked, waits) == (["a", "b"], [])
    assert texts_of(model.generate(ask("a", "b", "c"))) == ["re: a", "re: b", "re: c"]
    assert endpoint.asked == ["a", "b", "b", "c"]


@pytest.mark.parametrize(
    "url",
    [
        "", "api.openai.com/v1", "ftp://h/v1", "http:///v1", "http://[", "http://h:port/v1", "https://h/v1#x",
        f"https://{KEY}@h/v1", f"https://user:{KEY}@h/v1", f"https://h/v1?api-key={KEY}",
    ],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_key_is_refused_without_quoting_it(url):
    with pytest.raises(EndpointError, match="no plain address: expected one such as") as caught:
        EndpointChatModel(url, "m", budget=NO_LIMIT)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(("url", "host"), [("https://api.openai.com/v1", "api.openai.com"), ("http://[::1]:8000/", "::1")])
def test_a_plain_address_has_a_host(url, host):
    assert check_address(url) == host


# --- The journal ---


def test_a_resumed_run_asks_only_what_is_missing(serve, teacher, tmp_path):
    journal, endpoint = tmp_path / "new" / "j.jsonl", serve()
    first = teacher(endpoint, journal=journal).generate(ask("a", "b"))
    again = teacher(endpoint, journal=journal).generate(ask("c", "b", "a", "c"))
    assert endpoint.asked == ["a", "b", "c"]
    assert [again[2], again[1]] == first
    assert again[0] == again[3]
    assert len(journal.read_text("utf-8").splitlines()) == 3


def test_another_question_is_asked_anew(serve, teacher, tiny_task, tmp_path):
    journal, one, other = tmp_path / "j.jsonl", serve(), serve()
    for model, limit in (
        (teacher(one, journal=journal), 8),
        (teacher(one, journal=journal), 9),
        (teacher(one, journal=journal, schema=tiny_task.schema), 8),
        (teacher(other, journal=journal), 8),
    ):
        model.generate(ask("a"), max_new_tokens=limit)
    assert (len(one.requests), len(other.requests)) == (3, 1)


LABELLING = """
import sys
from pathlib import Path
from slmops_course.endpoints import Budget, EndpointChatModel

asks = [[{"role": "system", "content": "Answer."}, {"role": "user", "content": text}] for text in "abcde"]
with EndpointChatModel(sys.argv[1], "m", budget=Budget(), journal=Path(sys.argv[2]), key_variable="SLMOPS_TEST_KEY") as model:
    model.generate(asks)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a signal of POSIX systems")
def test_a_killed_run_goes_on_where_it_was(serve, teacher, tmp_path, key):
    reached = threading.Event()

    def stall(handler, request):
        reached.set()
        hang(handler, request)

    journal, endpoint = tmp_path / "j.jsonl", serve(good, good, stall)
    with subprocess.Popen([sys.executable, "-c", LABELLING, endpoint.url, str(journal)]) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert endpoint.asked == ["a", "b", "c"]
    replies = teacher(endpoint, journal=journal).generate(ask(*"abcde"))
    assert texts_of(replies) == [f"re: {letter}" for letter in "abcde"]
    assert endpoint.asked == ["a", "b", "c", "c", "d", "e"]


def test_a_line_cut_off_anywhere_costs_that_reply_only(serve, teacher, tmp_path):
    journal, endpoint = tmp_path / "j.jsonl", serve()
    teacher(endpoint, journal=journal).generate(ask("a", "b"))
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        journal.write_bytes(whole[:end])
        read = Journal(journal)
        with read.opened():
            kept = texts_of(read.replies.values())
            assert kept == (["re: a", "re: b"] if end == len(whole) - 1 else ["re: a"])
    for end in (first + 1, first + 40, len(whole) - 1):
        journal.write_bytes(whole[:end])
        assert texts_of(teacher(endpoint, journal=journal).generate(ask("a", "b", "c"))) == ["re: a", "re: b", "re: c"]
        assert [json.loads(line)["reply"]["text"][-1] for line in journal.read_bytes().splitlines()] == ["a", "b", "c"]
    assert endpoint.asked == ["a", "b", "b", "c", "b", "c", "c"]


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b"nonsense", b"[1]", b'{"key": "cut off', b"\xff", b'{"key": "k", "reply": {"text": "x"}, "charged": {}}',
        b'{"key": "k", "reply": null, "charged": {"input": "many"}}',
        json.dumps({"key": "k", "reply": asdict(Reply("", 1, 1, 0.0, 0.0)) | {"text": 1}, "charged": {}}).encode(),
    ],
)  # fmt: skip
def test_any_other_line_that_cannot_be_read_is_named_and_stays(serve, teacher, tmp_path, line):
    journal, endpoint = tmp_path / "j.jsonl", serve()
    teacher(endpoint, journal=journal).generate(ask("a"))
    spoilt = journal.read_bytes() + line + b"\n" + journal.read_bytes()
    journal.write_bytes(spoilt)
    with pytest.raises(EndpointError, match=r"j\.jsonl line 2 is b.*delete that line, or choose another file"):
        teacher(endpoint, journal=journal)
    assert (journal.read_bytes(), len(endpoint.requests)) == (spoilt, 1)


def test_a_file_that_is_no_journal_is_not_written_over(serve, teacher, tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"my only copy")
    with pytest.raises(EndpointError, match=r"notes\.txt line 1 is b'my only copy'"):
        teacher(serve(), journal=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_bytes() == b"my only copy"


def test_a_journal_that_cannot_be_written_is_refused_before_anything_is_paid(serve, teacher, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "j.jsonl", tmp_path):
        with pytest.raises(EndpointError, match=r"The journal .* cannot be used \(.*\): expected a file"):
            teacher(serve(), journal=path)


def test_on_a_full_disk_the_run_stops_and_goes_on_later(serve, teacher, small_disk):
    endpoint, filling = serve(good, says("x" * 400_000)), ask("a", "b")
    model = teacher(endpoint, journal=small_disk / "j.jsonl")
    with pytest.raises(EndpointError, match=r"cannot be used \(No space left on device\).*make room"):
        model.generate(filling)
    assert texts_of(teacher(endpoint, journal=small_disk / "j.jsonl").generate(filling)) == ["re: a", "re: b"]
    assert endpoint.asked == ["a", "b", "b"]


def test_two_runs_at_once_ask_nothing_twice(serve, teacher, tmp_path):
    endpoint, wanted, found = serve(), ask(*"abcdefgh"), []
    models = [teacher(endpoint, journal=tmp_path / "j.jsonl") for _ in range(2)]
    threads = [threading.Thread(target=lambda m=model: found.append(texts_of(m.generate(wanted)))) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[f"re: {letter}" for letter in "abcdefgh"]] * 2
    assert sorted(endpoint.asked) == list("abcdefgh")


def test_who_deletes_the_journal_asks_anew(serve, teacher, tmp_path):
    journal, endpoint = tmp_path / "j.jsonl", serve()
    model = teacher(endpoint, journal=journal)
    model.generate(ask("a", "b"))
    journal.unlink()
    model.generate(ask("b"))
    assert endpoint.asked == ["a", "b", "b"]
    assert len(journal.read_bytes().splitlines()) == 1
    assert model.journal.spent == Tokens(20, 5)


# --- The budget ---


def test_a_budget_of_tokens_stops_before_it_is_overspent_and_what_was_paid_is_kept(serve, teacher, tmp_path):
    journal, endpoint = tmp_path / "j.jsonl", serve()
    budget = Budget(max_tokens=25 * 3 + WORST_TOKENS - 1)  # after three replies of 25 tokens, one too few for a fourth
    model = teacher(endpoint, journal=journal, budget=budget)
    with pytest.raises(BudgetError) as caught:
        model.generate(ask(*"abcde"), max_new_tokens=8)
    assert str(caught.value) == (
        f"The budget is at its end: 75 tokens are spent and the next message may take {WORST_TOKENS} tokens, expected at "
        f"most {budget.max_tokens} tokens together; raise max_tokens to go on; 3 of 5 messages are answered and kept in "
        f"{journal}, where the next run goes on."
    )
    assert endpoint.asked == ["a", "b", "c"]
    assert texts_of(teacher(endpoint, journal=journal).generate(ask(*"abcde"), max_new_tokens=8))[3:] == ["re: d", "re: e"]
    assert endpoint.asked == list("abcde")


def test_a_request_that_just_fits_is_sent(serve, teacher):
    endpoint = serve()
    teacher(endpoint, budget=Budget(max_tokens=25 * 3 + WORST_TOKENS)).generate(ask(*"abcd"), max_new_tokens=8)
    assert endpoint.asked == list("abcd")


def test_a_budget_of_money_stops_before_it_is_overspent(serve, teacher):
    endpoint, worst = serve(), Budget(**PRICED).cost(WORST)
    budget = Budget(max_cost=2 * 70e-6 + worst - 1e-6, priced_on="2026-08-01", currency="EUR", **PRICED)
    model = teacher(endpoint, budget=budget)
    with pytest.raises(BudgetError, match=r"EUR 0\.000140 are spent .*at the prices of 2026-08-01.*raise max_cost.*2 of 4"):
        model.generate(ask(*"abcd"), max_new_tokens=8)
    assert endpoint.asked == ["a", "b"]
    assert model.journal.spent == Tokens(40, 10)


def test_an_empty_budget_sends_nothing(serve, teacher):
    endpoint = serve()
    for budget in (Budget(max_tokens=0), Budget(max_cost=0, **PRICED)):
        with pytest.raises(BudgetError, match="0 of 1 messages"):
            teacher(endpoint, budget=budget).generate(ask("a"))
    assert endpoint.requests == []


def test_what_earlier_runs_spent_counts_unless_it_shall_not(serve, teacher, tmp_path):
    journal, endpoint = tmp_path / "j.jsonl", serve()
    teacher(endpoint, journal=journal).generate(ask("a", "b"), max_new_tokens=8)
    with pytest.raises(BudgetError, match="50 tokens are spent"):
        teacher(endpoint, journal=journal, budget=Budget(max_tokens=WORST_TOKENS)).generate(ask("c"), max_new_tokens=8)
    own = Budget(max_tokens=WORST_TOKENS, count_earlier=False)
    assert texts_of(teacher(endpoint, journal=journal, budget=own).generate(ask("c"), max_new_tokens=8)) == ["re: c"]
    assert endpoint.asked == ["a", "b", "c"]


@pytest.mark.parametrize("trouble", [hang, cut, hang_up, body("oops")], ids=["hang", "cut", "hang-up", "nonsense"])
def test_an_answer_that_is_lost_on_the_way_is_charged_at_its_worst(serve, teacher, tmp_path, trouble):
    journal, endpoint = tmp_path / "j.jsonl", serve(*[trouble] * 9)
    budget = Budget(max_tokens=2 * WORST_TOKENS)
    for spent in (2 * WORST_TOKENS, 2 * WORST_TOKENS):  # the second run finds it in the journal
        with pytest.raises(BudgetError, match=f"{spent} tokens are spent.*0 of 1 messages"):
            teacher(endpoint, journal=journal, budget=budget, timeout_s=0.2).generate(ask("a"), max_new_tokens=8)
    assert len(endpoint.requests) == 2


def test_a_refusal_is_charged_nothing(serve, teacher):
    model = teacher(serve(status(429), status(503), status(400)))
    with pytest.raises(EndpointError, match="status 400"):
        model.reply(ask("a")[0])
    assert model.journal.spent == Tokens()


def test_an_endpoint_that_counts_no_tokens_is_charged_the_worst_case(serve, teacher):
    model = teacher(serve(says("hi", usage=None)))
    reply = model.reply(ask("a")[0], max_new_tokens=8)
    assert (reply.prompt_tokens, reply.output_tokens) == (0, 0)
    assert model.journal.spent == WORST


def test_the_worst_case_counts_every_byte_of_any_script():
    for text in ("card", "मेरा कार्ड खो गया", "🙂"):
        worst = worst_case({"messages": ask(text)[0], "max_tokens": 8})
        assert worst.input >= len(("Answer." + text).encode())
        assert worst.output == 8


def test_a_cost_is_tokens_times_prices():
    budget = Budget(max_cost=2, price_per_million_input=0.15, price_per_million_output=0.6)
    assert budget.cost(Tokens(1_000_000, 500_000)) == pytest.approx(0.45)
    assert budget.cost(Tokens()) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_cost": 1}, {"price_per_million_input": -1}, {"price_per_million_output": float("nan")}, {"max_tokens": -1},
        {"max_cost": float("nan"), **PRICED},
    ],
)  # fmt: skip
def test_a_limit_of_money_without_prices_and_a_number_that_is_none_are_refused(wrong):
    with pytest.raises(EndpointError, match="look them up for price_per_million_input"):
        Budget(**wrong)


# --- The key ---


def test_the_key_goes_to_the_endpoint_and_nowhere_else(serve, teacher, tmp_path, key, caplog):
    quoted = f'{{"error": {{"message": "no: {key}"}}}}'
    steps = [status(500, quoted), body(f"Bearer {key}"), says(f"your key is {key}"), status(400, quoted)]
    endpoint = serve(*steps, *(status(code, quoted) for code in (401, 403, 404, 503)))
    shown = []
    with caplog.at_level(logging.DEBUG):
        model = teacher(endpoint, key_variable="SLMOPS_TEST_KEY", journal=tmp_path / "j.jsonl", budget=Budget(max_tokens=9999))
        shown += texts_of(model.generate(ask("a")))
        for _ in range(4):
            with pytest.raises(EndpointError) as caught:
                model.generate(ask("b"))
            shown += traceback.format_exception(caught.value)
        giving_up = teacher(serve(status(503, quoted)), key_variable="SLMOPS_TEST_KEY", retries=0)
        with pytest.raises(EndpointError, match="no: …") as caught:
            giving_up.reply(ask("b")[0])
        shown += traceback.format_exception(caught.value)
    assert set(endpoint.keys) == {f"Bearer {key}"}
    shown += [repr(model), str(vars(model)), repr(model.journal), repr(model.budget), caplog.text]
    shown += [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert "your key is …" in shown
    assert [text for text in shown if key in text] == []


def test_what_a_service_says_of_a_key_that_it_refuses_is_not_quoted(serve, teacher):
    with pytest.raises(EndpointError, match="HTTP status 401") as caught:
        teacher(serve(status(401, "Incorrect API key provided: sk-a-*****-see"))).reply(ask("a")[0])
    assert "sk-a" not in str(caught.value)


def test_without_a_key_only_loopback_is_asked():
    with pytest.raises(EndpointError, match=r"SLMOPS_NO_SUCH_KEY holds nothing: expected the key for models\.invalid; set it"):
        EndpointChatModel("https://models.invalid/v1", "m", budget=NO_LIMIT, key_variable="SLMOPS_NO_SUCH_KEY")
    assert read_key("SLMOPS_NO_SUCH_KEY", "127.0.0.1")


@pytest.mark.parametrize("value", [f"{KEY}\n{KEY}", f"{KEY} ", f"{KEY}\r\n", f"{KEY} x", f"“{KEY}”"])
def test_a_key_that_libraries_would_quote_in_their_errors_is_refused_without_quoting_it(monkeypatch, value):
    monkeypatch.setenv("SLMOPS_TEST_KEY", value)
    if value.strip() == KEY:  # a line break at its end, as files have
        assert read_key("SLMOPS_TEST_KEY", "models.invalid") == KEY
        return
    with pytest.raises(EndpointError, match="SLMOPS_TEST_KEY holds spaces or letters that no key has") as caught:
        read_key("SLMOPS_TEST_KEY", "models.invalid")
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_only_the_endpoint_is_turned_to(serve, teacher, tmp_path):
    endpoint = serve(status(429), cut)
    with ConnectionLog() as log:
        teacher(endpoint, journal=tmp_path / "j.jsonl").generate(ask("a", "b"))
    assert f"127.0.0.1:{endpoint.server_port}" in log.all
    assert log.remote == []


# --- Bodies and recordings ---


def test_a_completion_has_a_text_and_counts():
    assert read_completion(completion("hi", usage=(3, 4))) == ("hi", Tokens(3, 4))
    assert read_completion(completion(None, usage=None)) == ("", Tokens())


def test_recorded_answers_come_back_as_they_were(tmp_path):
    teacher = RecordedChatModel({"a": '{"x":"é"}', "b": ""})
    record(teacher, ask("a", "b", "a"), tmp_path / "r.jsonl")
    assert load_recorded(tmp_path / "r.jsonl").answers == teacher.answers
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    record(teacher, [], tmp_path / "r.jsonl")
    assert load_recorded(tmp_path / "r.jsonl").answers == {}


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", "[]", '{"text": "b"}', '{"text": "b", "reply": 1}', '{"text": "a", "reply": "another"}']
)
def test_a_recorded_line_of_another_form_is_named(tmp_path, line):
    (tmp_path / "r.jsonl").write_text(f'{{"text": "a", "reply": "x"}}\n\n{line}\n', "utf-8")
    with pytest.raises(EndpointError, match=r"r\.jsonl line 3 is "):
        load_recorded(tmp_path / "r.jsonl")
    with pytest.raises(EndpointError, match="there is no such file"):
        load_recorded(tmp_path / "nowhere.jsonl")
