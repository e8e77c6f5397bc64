"""Models in processes of their own, converted there and asked by lines of JSON: how every other runtime becomes a ChatModel.

A worker prints {"ready": true}, then answers each line {"messages": […], "max_new_tokens": 48} with one line: {"text",
"prompt_ids", "output_ids", "first_s", "latency_s"}, or {"error": "…"}. Its times begin where it reads the request. So a
runtime may need another language, or libraries that this process does not have, and its memory is its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Conversation, Reply
from slmops_course.errors import CourseError

WORKERS = Path(__file__).parent / "workers"
GRACE_S = 2  # between asking a worker to end and ending it
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


class RuntimesError(CourseError):
    """A runtime that is not installed, that failed, or that cannot take a model."""


def convert_apart(
    script: str, folder: Path, out: Path, *options: str, expected: str, env: Mapping[str, str] | None = None
) -> Path:
    """Let a script of the folder `workers` convert a model folder; `out`, a file or folder, appears when it is whole.

    The script is given `folder`, the path to write to, and the options. What lay at `out` is replaced. Returns `out`.
    Raises RuntimesError, with the script's last words and with what it `expected`, when it fails; `out` is then as it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        partial = Path(scratch) / out.name
        command = [sys.executable, "-P", str(WORKERS / script), str(folder), str(partial), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET, **(env or {})})
        if done.returncode or not partial.exists():
            words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimesError(
                f"{script} failed on {folder.name} ({words[:200]}): expected {expected}; check its config.json."
            )
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(partial, out)
    return out


class WorkerChatModel(ChatModel):
    """A model that a worker process answers for. Use it as a context manager, so that the process ends.

    Example: `WorkerChatModel([sys.executable, "-P", "worker.py", "model"], name="MLX")`
    Raises RuntimesError when the worker does not start, ends, or says that it cannot answer.
    """

    def __init__(self, command: Sequence[str], *, name: str, folder: Path | None = None, env: Mapping[str, str] | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                encoding="utf-8", cwd=folder, env={**os.environ, **QUIET, **(env or {})},
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise RuntimesError(
                f"{name} could not be started ({error}): expected {command[0]} on this machine; install it, then run the "
                "same command again."
            ) from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        return [self._reply(self.ask(conversation, max_new_tokens=max_new_tokens)) for conversation in conversations]

    def ask(self, conversation: Conversation, *, max_new_tokens: int = MAX_NEW_TOKENS) -> dict:
        """The worker's whole answer, with the token ids of prompt and reply, as the module's docstring has it."""
        request = {"messages": list(conversation), "max_new_tokens": max_new_tokens}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has ended, or was closed: reading says so
            pass
        return self._read()

    def processor_s(self) -> float:
        """The processor time that the worker has used since it started, in seconds, all its threads together."""
        import psutil

        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    @staticmethod
    def _reply(answer: Mapping) -> Reply:
        counts = len(answer["prompt_ids"]), len(answer["output_ids"])
        return Reply(answer["text"], *counts, answer["first_s"], answer["latency_s"])

    def _read(self) -> dict:
        line = "" if self._process.stdout.closed else self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            raise RuntimesError(
                f"{self.name} ended without an answer ({line.strip()[:200] or self._last_words()}): expected a whole model of "
                "its format; convert it again, and check that the runtime is installed."
            ) from None
        if "error" in answer:
            raise RuntimesError(
                f"{self.name} cannot answer this message ({answer['error'][:200]}): expected a conversation that fits the "
                "model's context; shorten it."
            )
        return answer

    def _last_words(self) -> str:
        if self._errors.closed:
            return "it was closed"
        self._process.wait(60)  # its output has ended, so it is about to
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"exit code {self._process.poll()}"

    def close(self):
        """End the process. Safe to call twice."""
        if self._errors.closed:
            return
        with contextlib.suppress(OSError):  # a pipe whose other end is gone
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
