"""A teacher behind an address: any OpenAI-compatible endpoint, within a budget, paying for no answer twice.

A labelling run over a network meets rate limits, timeouts and half answers, and may be ended at any moment. So every
reply goes into a journal on disk before the next question is asked, and the next run asks only what is missing.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Conversation, RecordedChatModel, Reply
from slmops_course.errors import CourseError
from slmops_course.network import is_loopback

log = logging.getLogger("slmops_course")

LONGEST_WAIT_S = 60.0  # before another attempt, also where the endpoint's Retry-After asks for more
ADVICE = {
    400: "expected a request that this model takes; check the model's name, max_new_tokens and schema_form",
    401: "expected a key of this endpoint; put one into the environment variable {key_variable}",
    403: "expected a key that may use this model; ask its owner for access, or choose another model",
    404: "expected this address to know the model; check its name, and base_url, which mostly ends in /v1",
}


class EndpointError(CourseError):
    """An endpoint that cannot be asked or gives no usable answer, or a file of answers that cannot be used."""


class BudgetError(EndpointError):
    """The next question might cost more than the budget has left."""


@dataclass(frozen=True)
class Tokens:
    """What is paid for; the two have different prices."""

    input: int = 0
    output: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.input + other.input, self.output + other.output)


@dataclass(frozen=True)
class Budget:
    """What a run may spend. `Budget()` sets no limit: for a service of one's own.

    Example: Budget(max_cost=2, price_per_million_input=0.15, price_per_million_output=0.6, priced_on="2026-08-01")
    Raises EndpointError for a limit of money without prices, and for what is less than 0.
    """

    max_tokens: int | None = None  # input and output together
    max_cost: float | None = None  # in `currency`
    price_per_million_input: float = 0.0
    price_per_million_output: float = 0.0
    currency: str = "USD"
    priced_on: str = "an unknown day"  # when the prices were looked up: they change
    count_earlier: bool = True  # whether what earlier runs spent, by the journal, counts

    def __post_init__(self):
        prices = (self.price_per_million_input, self.price_per_million_output)
        numbers = (*prices, self.max_tokens or 0, self.max_cost or 0)
        if not all(number >= 0 for number in numbers) or (self.max_cost is not None and not any(prices)):
            raise EndpointError(
                f"The budget is {self}: expected nothing below 0, and with max_cost the endpoint's prices, else it limits "
                "nothing; look them up for price_per_million_input and price_per_million_output."
            )

    def cost(self, tokens: Tokens) -> float:
        """Example, with the prices above: Tokens(1_000_000, 500_000) -> 0.45"""
        return (tokens.input * self.price_per_million_input + tokens.output * self.price_per_million_output) / 1e6

    def check(self, spent: Tokens, worst: Tokens) -> None:
        """Raise BudgetError unless a request that takes `worst` at most still fits."""
        tokens = ("max_tokens", "{:,} tokens", lambda tokens: tokens.input + tokens.output, "")
        money = ("max_cost", f"{self.currency} {{:.6f}}", self.cost, f" at the prices of {self.priced_on}")
        for name, unit, amount, note in (tokens, money):
            limit, used, more = getattr(self, name), amount(spent), amount(worst)
            if limit is not None and used + more > limit:
                raise BudgetError(
                    f"The budget is at its end: {unit.format(used)} are spent and the next message may take "
                    f"{unit.format(more)}{note}, expected at most {unit.format(limit)} together; raise {name} to go on"
                )


class Journal:
    """The replies that were paid for, one JSON line each, on disk before the next question is asked.

    Without a path they are kept in memory only. A line without a reply stands for an answer that was lost on the way and
    may have been billed. A last line that was cut off, by a killed process, is written over; any other line that cannot
    be read raises EndpointError with its number. All lines are priced alike: keep one journal a model.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.replies: dict[str, Reply] = {}
        self.spent = Tokens()
        self._end = self._lines = 0  # how far the file is known

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the journal against other writers, having read what they wrote. A second process waits."""
        from filelock import FileLock

        if self.path is None:
            yield
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                self._read_on()
                yield
        except OSError as error:
            raise EndpointError(
                f"The journal {self.path} cannot be used ({error.strerror or error}): expected a file that can be "
                "written to, with space on its disk; choose another or make room, and run again."
            ) from None

    def add(self, key: str, reply: Reply | None, charged: Tokens) -> None:
        """Keep a reply, or what one that was lost may have cost."""
        self._take(key, reply, charged)
        if self.path is not None:
            row = {"key": key, "reply": reply and asdict(reply), "charged": asdict(charged)}
            self._append(json.dumps(row).encode())

    def _take(self, key: str, reply: Reply | None, charged: Tokens) -> None:
        self.spent += charged
        if reply:
            self.replies[key] = reply

    def _append(self, line: bytes) -> None:
        with open(self.path, "ab") as file:
            file.truncate(self._end)  # takes away a line that was cut off
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._end, self._lines = self._end + len(line) + 1, self._lines + 1

    def _read_on(self) -> None:
        with open(self.path, "a+b") as file:  # fails now, not after the first payment, where it cannot be written to
            if file.seek(0, os.SEEK_END) < self._end:
                self.__init__(self.path)  # somebody began anew
            file.seek(self._end)
            lines = file.readlines()
        for line in lines:
            try:
                self._take(*parse_line(line))
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n") and line[:7] == b'{"key":'[: len(line)]:
                    return  # cut off while it was written
                raise EndpointError(
                    f"{self.path} line {self._lines + 1} is {line[:40]!r}: expected a line of this course's journal; "
                    "delete that line, or choose another file."
                ) from None
            if line.endswith(b"\n"):
                self._end, self._lines = self._end + len(line), self._lines + 1
            else:
                self._append(line)  # whole, but for its line break


class EndpointChatModel(ChatModel):
    """A model behind any OpenAI-compatible chat-completions endpoint: OpenAI, Azure AI Foundry, vLLM, Ollama and others.

    Example:
        budget = Budget(max_cost=2, price_per_million_input=0.15, price_per_million_output=0.6, priced_on="2026-08-01")
        teacher = EndpointChatModel("https://api.openai.com/v1", "gpt-4o-mini", budget=budget, journal=Path("labels.jsonl"))

    The key comes from the environment variable named `key_variable`, and from nowhere else; loopback needs none.
    `schema` constrains the replies as OpenAI does (`schema_form="openai"`) or not at all ("none"). Rate limits, server
    errors, timeouts (`timeout_s` of silence), lost connections and bodies that are no completion are tried again
    `retries` times, after waits that double; other refusals are not. A reply cut off at `max_new_tokens` is returned as
    it is: parsing it will reject it.

    Before every attempt the budget must have room for its worst case: a token for every byte sent, and `max_new_tokens`.
    An answer that is lost on the way, or comes without its token counts, is charged that much. A process that is killed
    during a request may have paid for that one, which no journal can know.
    Raises BudgetError when the budget is at its end, else EndpointError; the journal has what was paid for either way.
    """

    def __init__(
        self, base_url: str, model: str, *, budget: Budget, journal: Path | None = None, schema: Mapping | None = None,
        schema_form: str = "openai", key_variable: str = "OPENAI_API_KEY", timeout_s: float = 60.0, retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        import openai

        if schema_form not in ("openai", "none"):
            raise EndpointError(f"schema_form is {schema_form!r}: expected 'openai' or 'none'; choose one of them.")
        host = check_address(base_url)
        key = read_key(key_variable, host)
        self.base_url, self.model, self.name = base_url.rstrip("/"), model, f"{model} at {host}"
        self.schema = schema if schema_form == "openai" else None
        self.key_variable, self.retries, self.sleep = key_variable, retries, sleep
        self.budget, self.journal = budget, Journal(journal)
        with self.journal.opened():
            if not budget.count_earlier:
                self.journal.spent = Tokens()
        self._client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=timeout_s, max_retries=0)

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        requests = [self._request(conversation, max_new_tokens) for conversation in conversations]
        keys = [self._key(request) for request in requests]
        with self.journal.opened():
            try:
                for key, request in zip(keys, requests, strict=True):
                    if key not in self.journal.replies:
                        self._ask(key, request)
            except EndpointError as error:
                answered = sum(key in self.journal.replies for key in keys)
                where = self.journal.path or "this object's memory"
                raise type(error)(
                    f"{error}; {answered} of {len(keys)} messages are answered and kept in {where}, where the next run goes on."
                ) from None
        return [self.journal.replies[key] for key in keys]

    def _request(self, conversation: Conversation, max_new_tokens: int) -> dict:
        messages = [{"role": message["role"], "content": message["content"]} for message in conversation]
        request = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0}
        if self.schema:
            schema = {key: value for key, value in self.schema.items() if key != "$schema"}
            wrapped = {"name": "answer", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        return request

    def _key(self, request: dict) -> str:
        return hashlib.sha256(json.dumps([self.base_url, request]).encode()).hexdigest()

    def _ask(self, key: str, request: dict) -> None:
        import tenacity

        backoff = tenacity.wait_exponential_jitter(max=LONGEST_WAIT_S)
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing), stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=lambda state: self._wait_s(state.outcome.exception(), backoff(state)), sleep=self.sleep, reraise=True,
        )  # fmt: skip
        try:
            attempts(self._attempt, key, request)
        except _Passing as error:
            raise EndpointError(
                f"{self.base_url} gave no usable answer in {self.retries + 1} attempts (the last: {error}): expected an "
                "OpenAI-compatible service; see that it is up and base_url is right, or wait, and run again"
            ) from None

    def _wait_s(self, error: "_Passing", backoff_s: float) -> float:
        wait_s = backoff_s if error.retry_after_s is None else min(error.retry_after_s, LONGEST_WAIT_S)
        log.info("%s: %s; the next attempt is in %.1f s", self.name, error, wait_s)
        return wait_s

    def _attempt(self, key: str, request: dict) -> None:
        worst = worst_case(request)
        self.budget.check(self.journal.spent, worst)
        start = time.perf_counter()
        try:
            text, used = read_completion(self._send(request))
        except _Passing as error:
            if error.lost:
                self.journal.add(key, None, worst)
            raise
        latency_s = time.perf_counter() - start
        self.journal.add(key, Reply(text, *astuple(used), latency_s, latency_s), used if used != Tokens() else worst)

    def _send(self, request: dict) -> str:
        """The body of the answer, without the key should the endpoint quote it."""
        import openai

        try:
            return self._hide_key(self._client.chat.completions.with_raw_response.create(**request).text)
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.response) from None
        except openai.APIConnectionError as error:
            cause = f"{type(error.__cause__).__name__} {error.__cause__}"
            # Where no connection came about, nothing was sent; else nobody knows.
            raise _Passing(self._hide_key(cause), lost=not cause.startswith("Connect")) from None

    def _refusal(self, status: int, response) -> Exception:
        # A service may quote parts of the key that it refuses.
        words = "" if status == 401 else " ".join(self._hide_key(response.text).split())[:200]
        said = f"HTTP status {status} {words}".strip()
        if status in (408, 409, 429) or status >= 500:
            return _Passing(said, retry_after_s=read_retry_after(response.headers))
        advice = ADVICE.get(status, ADVICE[400]).format(key_variable=self.key_variable)
        return EndpointError(f"{self.base_url} refused to ask {self.model} ({said}): {advice}, and run again")

    def _hide_key(self, text: str) -> str:
        return text.replace(self._client.api_key, "…")

    def close(self):
        self._client.close()


class _Passing(Exception):
    """What another attempt may not meet. `lost` where the answer was on its way, and so may have been billed."""

    def __init__(self, text: str, *, lost: bool = False, retry_after_s: float | None = None):
        super().__init__(text)
        self.lost, self.retry_after_s = lost, retry_after_s


def check_address(base_url: str) -> str:
    """The host of an endpoint's address. Raises EndpointError for one that is none, or that might hold a key.

    Example: "https://api.openai.com/v1" -> "api.openai.com"
    """
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(base_url)
        plain = not (parts.username or parts.query or parts.fragment or parts.port == 0)
        if plain and parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname
    raise EndpointError(
        "The endpoint's base_url is no plain address: expected one such as https://api.openai.com/v1, without a user, key "
        "or question mark; put the key into an environment variable."
    )


def read_key(variable: str, host: str) -> str:
    """The key in an environment variable; a service on loopback needs none.

    Raises EndpointError where there is none, and for one that libraries would quote in their errors.
    """
    key = os.environ.get(variable, "").strip() or ("not-needed-on-loopback" if is_loopback(host) else "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        found = "spaces or letters that no key has" if key else "nothing"
        raise EndpointError(
            f"The environment variable {variable} holds {found}: expected the key for {host}; set it and run again."
        )
    return key


def worst_case(request: Mapping) -> Tokens:
    """The most a request can take: no tokenizer makes more tokens than bytes; JSON's frame stands for the template's."""
    return Tokens(len(json.dumps(request, ensure_ascii=False).encode("utf-8", "replace")), request["max_tokens"])


def read_completion(body: str) -> tuple[str, Tokens]:
    """The text and the token counts of a completion's body; counts that it lacks are 0."""
    try:
        answer = json.loads(body)
        text, usage = answer["choices"][0]["message"]["content"] or "", answer.get("usage") or {}
        used = Tokens(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Passing(f"a body that is no completion, {body[:60]!r}", lost=True) from None
    return text, used


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds a service asks to wait; None where it does not, or names a date (RFC 9110, section 10.2.3)."""
    seconds = headers.get("retry-after", "")
    return float(seconds) if seconds.isdecimal() else None


def parse_line(line: bytes) -> tuple[str, Reply | None, Tokens]:
    """A journal's line as what `Journal.add` was given. Raises ValueError, KeyError or TypeError for another line."""
    row = json.loads(line)
    reply = row["reply"] and Reply(**row["reply"])
    if reply and not isinstance(reply.text, str):
        raise TypeError
    return row["key"], reply, Tokens(**row["charged"])


def record(model: ChatModel, conversations: Sequence[Conversation], path: Path, **options) -> None:
    """Write a teacher's answers as JSON lines `{"text": …, "reply": …}`, for those who cannot ask it."""
    replies = model.generate(conversations, **options)
    rows = [{"text": c[-1]["content"], "reply": r.text} for c, r in zip(conversations, replies, strict=True)]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, path)


def load_recorded(path: Path) -> RecordedChatModel:
    """The reverse of `record`. Raises EndpointError, with the line, for a row of another form or a text with two replies."""
    answers: dict[str, str] = {}
    lines = path.read_text("utf-8").split("\n") if path.is_file() else ["(there is no such file)"]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if answers.setdefault(row["text"], str(row["reply"])) != row["reply"]:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise EndpointError(
                f'{path.name} line {number} is {line[:60]!r}: expected {{"text": …, "reply": …}}, one reply a text; mend it.'
            ) from None
    return RecordedChatModel(answers)
