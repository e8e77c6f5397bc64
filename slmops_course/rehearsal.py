"""An OpenAI-compatible endpoint on loopback that misbehaves on purpose: to rehearse with before anything is paid for.

A step of its script is a function of the request's handler and the request. Steps are played one a request; when the
script has ended, every request gets a good answer.
"""

import json
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RehearsalEndpoint(ThreadingHTTPServer):
    """Listens on a free loopback port from entering a block to leaving it; `answer` turns a message into a reply.

    Example:
        with RehearsalEndpoint(lambda text: "{}", busy, cut) as endpoint:
            model = EndpointChatModel(endpoint.url, "any name", budget=Budget())
            model.reply(conversation)       # two attempts fail, the third is answered
        endpoint.requests                   # what was asked: three requests, as OpenAI's protocol has them
    """

    def __init__(self, answer: Callable[[str], str], *script: Callable):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.script = answer, deque(script)
        self.requests: list[dict] = []
        self.keys: list[str | None] = []  # the Authorization header of each request
        self.released = threading.Event()  # set to let go of requests that hang
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "RehearsalEndpoint":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.shutdown()
        self.server_close()

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        step = self.server.script.popleft() if self.server.script else good
        step(self, request)

    def send(self, code, text, headers=()):
        body = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def completion(text, *, finish: str = "stop", usage: tuple[int, int] | None = (20, 5)) -> str:
    """The body of a completion, with its counts of prompt and output tokens, or without."""
    counts = {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]} | counts)


def good(handler, request) -> None:
    """The answer, as it should be."""
    handler.send(200, completion(handler.server.answer(request["messages"][-1]["content"])))


def status(code: int, words: str = '{"error": {"message": "not now"}}', **headers) -> Callable:
    """A step that refuses with an HTTP status."""
    return lambda handler, request: handler.send(code, words, headers)


busy = status(429, Retry_After="0")
broken = status(500)


def body(text: str, kind: str = "application/json") -> Callable:
    """A step that answers with another body, such as a page for signing in."""
    return lambda handler, request: handler.send(200, text, {"Content-Type": kind})


def cut(handler, request) -> None:
    """Half an answer: the connection ends within the body."""
    handler.send(200, completion("half")[:60], {"Content-Length": 500})


def hang(handler, request) -> None:
    """No answer at all, and the connection stays."""
    handler.server.released.wait(30)
