"""Clients of a served model, good and bad: what each does, and what must come of it.

Some ask questions whose replies are known, so that a reply meant for somebody else is noticed.
"""

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from slmops_course.operations.requests import CHAT, read_reply
from slmops_course.operations.served import ServedApart
from slmops_course.operations.streams import event_data

NEW_TOKENS = 12  # of each answer: enough to tell answers apart
PATIENCE_S = 120.0  # of a client that waits for its answer
REFUSED = (400, 413, 415, 429)  # what a bad request may get; 5xx is the service's own fault


@dataclass(frozen=True)
class Question:
    """A message, the seed it is asked with, and the reply that it gets when it is asked alone.

    Sampled with a seed even a model that knows nothing gives every question a reply of its own, and always the same.
    """

    text: str
    seed: int
    reply: str


def learn_answers(served: ServedApart, texts: Sequence[str]) -> list[Question]:
    """Ask each text alone, twice. A text whose reply another has already is left out: mixed up, the two would look alike.

    Raises ValueError where the two replies to a text differ.
    """
    questions: list[Question] = []
    for seed, text in enumerate(texts):
        first, second = (_reply_of(_post(served, _question(served, text, seed))) for _ in range(2))
        if first != second:
            raise ValueError(f"{text!r} gets {first!r} and {second!r}: expected one reply, because it is asked with a seed.")
        if first not in [question.reply for question in questions]:
            questions.append(Question(text, seed, first))
    return questions


def check_answer(served: ServedApart, question: Question, *, streamed: bool = False) -> str | None:
    """What is wrong with the reply to a known question, or None."""
    status, text = _post(served, _question(served, question.text, question.seed, stream=streamed))
    if status != 200:
        return f"status {status} for {question.text!r}: {text[:200]}"
    reply = _reply_of((status, text))
    return None if reply == question.reply else f"{question.text!r} got {reply!r}, expected {question.reply!r}"


def check_script(served: ServedApart, text: str) -> str | None:
    """What is wrong with what a text of any script gets, which may be a reply or a refusal, or None."""
    return must_answer(served, json.dumps(_request(served, text)).encode())


# --- What clients do: each returns what was lost, or None ---


def _known(served, rng, questions):
    return check_answer(served, rng.choice(questions), streamed=rng.random() < 0.5)


def _slow_reader(served, rng, questions):
    """Reads its stream a few bytes at a time."""
    question = rng.choice(questions)
    with _open(served) as client:
        client.sendall(_http(_question(served, question.text, question.seed, stream=True)))
        received = b""
        while b"data: [DONE]" not in received:
            piece = client.recv(200)
            if not piece:
                return f"the stream ended after {len(received)} bytes"
            received += piece
            time.sleep(0.002)
    text = received.partition(b"\r\n\r\n")[2].decode()
    # The body is chunked: lines of a length in hexadecimal stand between the events.
    reply = read_reply([event_data(line.encode()) for line in text.splitlines()])[0]
    return None if reply == question.reply else f"{question.text!r} got {reply!r}, expected {question.reply!r}"


def _leaves_in_the_reply(served, rng, questions):
    with _open(served) as client:
        client.sendall(_http(_request(served, rng.choice(questions).text, stream=True, max_tokens=200)))
        client.recv(rng.randrange(1, 400))


def _leaves_in_its_request(served, rng, questions):
    whole = _http(_request(served, rng.choice(questions).text))
    with _open(served) as client:
        client.sendall(whole[: rng.randrange(1, len(whole))])


def _too_big(served, rng, questions):
    return must_refuse(served, json.dumps(_request(served, "a" * rng.randrange(70_000, 2_000_000))).encode())


def _nested_deep(served, rng, questions):
    """What ends Foundry Local's process when it comes to it, see tests/test_service_load.py."""
    levels = rng.randrange(50_000, 60_000)  # within the limit of a body's size
    return must_refuse(served, rng.choice((b"[", b'{"a":')) * levels)


def _malformed(served, rng, questions):
    """A good body with some bytes changed, cut or doubled. Now and then it stays good."""
    data = bytearray(json.dumps(_request(served, rng.choice(questions).text)).encode())
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data))
        data[place : place + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    return must_answer(served, bytes(data))


def _wrong_types(served, rng, questions):
    return must_answer(served, json.dumps(wild_request(rng, served.model)).encode())


def _huge_prompt(served, rng, questions):
    text = " ".join(rng.choice(questions).text for _ in range(rng.randrange(300, 800)))[:50_000]
    return must_answer(served, json.dumps(_request(served, text)).encode())


def _empty_prompt(served, rng, questions):
    return must_answer(served, json.dumps(_request(served, rng.choice(("", " ", "\n\n", "\0", "\u200b")))).encode())


def _any_script(served, rng, questions):
    return check_script(served, rng.choice(block_texts()))


KINDS: dict[str, Callable] = {
    "a known question": _known,
    "a slow reader": _slow_reader,
    "a client that leaves in the reply": _leaves_in_the_reply,
    "a client that leaves in its request": _leaves_in_its_request,
    "a body too big": _too_big,
    "a body nested deep": _nested_deep,
    "a malformed body": _malformed,
    "wrong types": _wrong_types,
    "a huge prompt": _huge_prompt,
    "an empty prompt": _empty_prompt,
    "a text of any script": _any_script,
}


def block_texts(characters: int = 8) -> list[str]:
    """One message for every block of Unicode, of its first characters, with halves of surrogate pairs among them.

    Source: https://www.unicode.org/Public/UCD/latest/ucd/Blocks.txt, as fontTools has it
    """
    from fontTools.unicodedata import Blocks

    starts = [*Blocks.RANGES, 0x110000]
    pairs = zip(starts, starts[1:], Blocks.VALUES, strict=False)
    return ["".join(map(chr, range(start, min(end, start + characters)))) for start, end, name in pairs if name != "No_Block"]


def wild_request(rng: random.Random, model: str) -> dict:
    """A request whose settings have any type and size. Example: {"model": …, "messages": [], "temperature": "x", "n": -1}"""
    values = (
        None, True, -1, 0, 1, 3.5, 1e308, 2**31, 2**63, 10**40, "", "x", "\ud800", [], [None], {}, {"a": {}}, [[[]]],
        {"role": "user"}, [{"role": "user"}], [{"role": "user", "content": "hi"}], [{"role": "nobody", "content": []}],
        {"type": "json_schema"},
        {"type": "lark_grammar", "lark_grammar": "start: ("}, {"include_usage": 1},
    )  # fmt: skip
    names = (
        "model", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "stream", "stream_options", "seed",
        "tools", "tool_choice", "response_format", "logit_bias", "user", "input", "",
    )  # fmt: skip
    good = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    return good | {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))}


# --- Asking and judging ---


def _request(served: ServedApart, text: str, **settings) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"model": served.model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0} | settings


def _question(served: ServedApart, text: str, seed: int, **settings) -> dict:
    return _request(served, text, temperature=1.0, seed=seed, **settings)


def _post(served: ServedApart, request: dict | bytes) -> tuple[int, str]:
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    # Not httpx, whose every new client prepares for TLS, which takes longer than a tiny model's answer.
    connection = http.client.HTTPConnection(urlsplit(served.gateway).netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def _reply_of(answer: tuple[int, str]) -> str:
    text = answer[1]
    bodies = [json.loads(text)] if text.startswith("{") else [event_data(event.encode()) for event in text.split("\n\n")]
    return read_reply(bodies)[0]


def must_refuse(served: ServedApart, data: bytes) -> str | None:
    """What is wrong with what a bad body gets, or None where that is a refusal in its form."""
    status, text = _post(served, data)
    return _form_problem(status, text) if status in REFUSED else f"status {status} for {data[:60]!r}: {text[:200]}"


def must_answer(served: ServedApart, data: bytes) -> str | None:
    """What is wrong with what a strange body gets, or None where that is a reply or a refusal, each in its form."""
    status, text = _post(served, data)
    if status == 200:
        return None if '"choices"' in text else f"status 200 and no reply for {data[:200]!r}: {text[:200]}"
    return _form_problem(status, text) if status in (*REFUSED, 404) else f"status {status} for {data[:300]!r}: {text[:200]}"


def _form_problem(status: int, text: str) -> str | None:
    try:
        error = json.loads(text)["error"]
        formed = isinstance(error["message"], str) and isinstance(error["type"], str) and error["code"] == str(status)
    except (ValueError, LookupError, TypeError):
        formed = False
    return None if formed else f"status {status} without the API's form of an error: {text[:200]}"


def _open(served: ServedApart) -> socket.socket:
    address = urlsplit(served.gateway)
    return socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)


def _http(request: dict) -> bytes:
    data = json.dumps(request).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
