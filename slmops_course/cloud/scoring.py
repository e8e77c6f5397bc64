"""The server inside an online endpoint's container: `POST /score` with a message, the desk's answer comes back.

    python -m slmops_course.cloud.scoring --port 8080

Azure mounts the registered model and names its folder in AZUREML_MODEL_DIR. Azure's own scoring server,
azureml-inference-server-http, asks for a Flask that the course's pins exclude; this one needs Python alone, and Azure
lets a container bring its own: https://learn.microsoft.com/azure/machine-learning/how-to-deploy-custom-container
"""

import argparse
import json
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from slmops_course.cloud.definition import CloudError
from slmops_course.errors import CourseError

log = logging.getLogger("slmops_course")

MAX_BODY_BYTES = 64_000


def model_folder(root: Path) -> Path:
    """The folder with genai_config.json at or below the mounted one. Raises CloudError unless there is exactly one.

    Example: /var/azureml-app/azureml-models/support_desk/1 -> /var/azureml-app/azureml-models/support_desk/1/model
    """
    found = sorted(path.parent for path in root.rglob("genai_config.json"))
    if len(found) != 1:
        raise CloudError(
            f"{root} holds {len(found)} models: expected one with genai_config.json; see the deployment's `model`."
        )
    return found[0]


class ScoringServer(ThreadingHTTPServer):
    """Answers `POST /score` with {"message": …}; `/live` says that the process is up, `/ready` that it has its model.

    One message is answered at a time: the model has one session. A body or a message that cannot be used is status 400
    with the reason, a reply that is no answer of the desk is 422 with the reply.
    """

    def __init__(self, address: tuple[str, int], chat, task):
        super().__init__(address, _Handler)
        self.chat, self.task, self.lock = chat, task, threading.Lock()

    def answer(self, body: bytes) -> tuple[int, dict]:
        """Example: b'{"message": "I lost my card"}' -> (200, {"answer": {"intent": "card_lost", …}})"""
        try:
            message = json.loads(body)["message"]
            if not isinstance(message, str):
                raise TypeError
            message = self.task.check_message(message)
        except (ValueError, KeyError, TypeError, RecursionError):
            return 400, {"error": 'The body is no request: expected {"message": "…"} in JSON.'}
        except CourseError as error:
            return 400, {"error": str(error)}
        with self.lock:
            reply = self.chat.reply(self.task.messages(message)).text
        try:
            return 200, {"answer": self.task.parse(reply)}
        except CourseError as error:
            return 422, {"error": str(error), "reply": reply}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = {"/live": "alive", "/ready": "ready"}
        self._send(*((200, {"status": known[self.path]}) if self.path in known else (404, {"error": "There is no such page."})))

    def do_POST(self):
        length = self.headers.get("Content-Length") or ""
        if self.path != "/score":
            return self._send(404, {"error": "There is no such page: expected POST /score."})
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            found = length or "not given"
            return self._send(413, {"error": f"The body's length is {found}: expected at most {MAX_BODY_BYTES} bytes."})
        body = self.rfile.read(int(length))
        try:
            return self._send(*self.server.answer(body))
        except Exception:  # the next request must be answered all the same
            log.exception("a message could not be answered")
            return self._send(500, {"error": "The message could not be answered; see the container's log."})

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass  # a line a request would hold nothing but its time; messages are never logged


def main(arguments: list[str] | None = None) -> None:
    """Serve until the container is stopped. The task is the bundled desk, or the folder in SLMOPS_TASK."""
    from slmops_course.serving import GenAIChatModel
    from slmops_course.tasks import BUNDLED_TASK, load_task

    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args(arguments)
    folder = model_folder(Path(os.environ.get("AZUREML_MODEL_DIR", "")))
    task = load_task(os.environ.get("SLMOPS_TASK", BUNDLED_TASK))
    with GenAIChatModel(folder) as chat, ScoringServer((options.host, options.port), chat, task) as server:
        print(f"ready on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
