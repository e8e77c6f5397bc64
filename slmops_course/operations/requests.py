"""What a gateway reads: requests of the OpenAI-compatible API, checked before they are passed on, and the replies to them."""

import json
from collections.abc import Mapping, Sequence

from slmops_course.serving import bare_schema, json_grammar, plain_words
from slmops_course.tasks import Task

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MAX_TURNS = 64  # in one conversation
MAX_PARTS = 16  # of one message's text
QUOTED_CHARS = 300  # of what is said about a request that does not fit: it may quote the request


class Refusal(Exception):
    """A request that gets an error in place of a reply: an HTTP status and a sentence.

    Source of the error's form: https://platform.openai.com/docs/guides/error-codes
    """

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})

    @property
    def body(self) -> dict:
        """Example: Refusal(429, "Full.").body["error"] -> {"message": "Full.", "type": "rate_limit_error", "code": "429", …}"""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "code": str(self.status), "param": None}}


def request_schemas(task: Task, *, max_new_tokens: int) -> dict[str, dict]:
    """A JSON Schema of the requests that are passed on, by path.

    Everything is typed, because Foundry Local ignores a setting of the wrong type: with `"temperature": "0"` it samples. Of
    grammars only the task's own pass: there are some of 30 characters that take the runtime 200 MB.
    """
    tokens = {"type": "integer", "minimum": 1, "maximum": max_new_tokens}
    part = {"type": "object", "properties": {"type": {"enum": ["text", "input_text"]}, "text": {"type": "string"}}}
    parts = {"type": "array", "minItems": 1, "maxItems": MAX_PARTS, "items": _closed(part, "type", "text")}
    content = {"anyOf": [{"type": "string"}, parts]}
    turn = {"type": "object", "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": content}}
    turns = {"type": "array", "minItems": 1, "maxItems": MAX_TURNS, "items": _closed(turn, "role", "content")}
    shared = {
        "model": {"type": "string"},
        "stream": {"type": "boolean"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "user": {"type": "string"},
    }
    schemas = [dict(task.schema), bare_schema(task.schema)]
    formats = [{"type": "text"}, {"type": "lark_grammar", "lark_grammar": json_grammar(task.schema)}]
    chat = shared | {
        "messages": turns,
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "n": {"const": 1},
        "stream_options": _closed({"type": "object", "properties": {"include_usage": {"type": "boolean"}}}),
        "response_format": {"enum": formats + [{"type": "json_schema", "json_schema": schema} for schema in schemas]},
    }
    responses = shared | {
        "input": {"anyOf": [{"type": "string"}, turns]},
        "instructions": {"type": "string"},
        "max_output_tokens": tokens,
    }
    return {
        CHAT: _closed({"type": "object", "properties": chat}, "model", "messages"),
        RESPONSES: _closed({"type": "object", "properties": responses}, "model", "input"),
    }


def _closed(schema: dict, *required: str) -> dict:
    return schema | {"required": list(required), "additionalProperties": False}


def read_request(body: bytes, validator, *, max_new_tokens: int) -> dict:
    """The request in a body, always with a limit on its new tokens.

    `validator` is jsonschema's, of one of `request_schemas`. Raises Refusal with status 400 for what does not fit.
    """
    from jsonschema.exceptions import best_match

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        problem = best_match(validator.iter_errors(data))
    except RecursionError:
        raise Refusal(400, "The body is nested too deep: expected a request of a few levels.") from None
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON in UTF-8 ({str(error)[:QUOTED_CHARS]}): expected one object.") from None
    if problem is not None:
        where = ".".join(map(str, problem.absolute_path)) or "The body"
        raise Refusal(400, f"{where} does not fit: {problem.message[:QUOTED_CHARS]}.")
    names = ("max_tokens", "max_completion_tokens") if "messages" in data else ("max_output_tokens",)
    # 8.0 is an integer to JSON Schema, and nothing to the service.
    asked = [int(data.pop(name)) for name in names if name in data]
    return data | {names[0]: min(asked, default=max_new_tokens)}


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def message_text(data: Mapping) -> str:
    """The last message of a request: what the model is asked about."""
    content = data["messages"] if "messages" in data else data["input"]
    if not isinstance(content, str):
        content = content[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def read_reply(bodies: Sequence[Mapping]) -> tuple[str, int, int]:
    """Text, prompt tokens and output tokens of a whole answer, or of all the events of a streamed one.

    A count is 0 where the service gives none.
    """
    pieces, usage = [], {}
    for body in bodies:
        whole = body.get("response") or body  # the Responses API streams the whole answer once more at its end
        if whole.get("object") == "response":
            pieces = [part.get("text", "") for item in whole["output"] for part in item.get("content", ())]
        for choice in body.get("choices", ()):
            pieces.append((choice.get("delta") or choice.get("message") or {}).get("content") or "")
        usage = whole.get("usage") or usage
    pairs = (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens"))
    return "".join(pieces), *(usage.get(one, usage.get(other, 0)) for one, other in pairs)


def has_text(event: Mapping) -> bool:
    """Whether an event of a stream brings a piece of the reply: the first that does ends the time to first token."""
    return bool(event.get("delta") or read_reply([event])[0])


def upstream_refusal(status: int, body) -> Refusal | None:
    """What becomes of an answer of the service, or an event of one: None for a good one.

    Foundry Local begins a stream before it looks at the request, so its errors come with status 200 as well.
    """
    if not isinstance(body, Mapping):
        return Refusal(502, f"The model's service gave something else than JSON, with status {status}: ask again.")
    error = body.get("error") or (body.get("response") or {}).get("error")
    if not error and status == 200:
        return None
    words, kind = _error_words(error)
    if status == 200:
        status = 400 if kind == "invalid_request_error" else 500
    if status < 500:
        return Refusal(status, f"The model's service refused the request: {words}")
    return Refusal(502, f"The model's service failed on the request: {words}")


def _error_words(error) -> tuple[str, str]:
    """The message of an error without the place in the runtime's source that it starts with, and its kind."""
    if not isinstance(error, Mapping):
        return "it says no more", "server_error"
    message = str(error.get("message"))
    for prefix in ("Invalid request: ", "Inference failed: "):
        message = message.removeprefix(prefix)
    return plain_words(message).strip(), str(error.get("type") or error.get("code"))
