"""A model as it is served in earnest: Foundry Local, its service, and the gateway in front, in this process or one apart.

    with ServedApart(folder, task) as served:
        print(served.gateway, served.direct)    # base addresses for any OpenAI client
        print(served.resident_bytes())

`python -m slmops_course.operations.served SPEC.json` is that process apart: clients that are measured or that do harm must not
share the server's memory or its interpreter lock.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from slmops_course.operations.gateway import LIMITS, GatewayError, Limits, serve_gateway
from slmops_course.operations.monitoring import Metrics
from slmops_course.serving import FoundryLocal
from slmops_course.tasks import Task, load_task


@dataclass(frozen=True)
class Served:
    """The addresses of a served model, each a base for OpenAI clients, and the model's id."""

    direct: str  # Foundry Local's own service
    gateway: str
    model: str

    @property
    def metrics(self) -> str:
        """The address that Prometheus reads."""
        return f"{self.gateway.removesuffix('/v1')}/metrics"


@contextlib.contextmanager
def serve_model(folder: Path, task: Task, *, data_folder: Path, port: int = 0, limits: Limits = LIMITS) -> Iterator[Served]:
    """Serve an ONNX folder in this process, to the end of the block. `port` is the gateway's; 0 is any free one.

    Raises ServingError and GatewayError as its parts do.
    """
    with FoundryLocal(data_folder) as foundry:
        model = foundry.load(folder)
        direct = foundry.start_service()
        with serve_gateway(direct, task, Metrics(task, model=model.id), port=port, limits=limits) as gateway:
            yield Served(direct, gateway.url, model.id)


class ServedApart:
    """A model served by a process of its own, to the end of the block. That process ends with this one, however it ends."""

    def __init__(self, folder: Path, task: Task, *, limits: Limits = LIMITS):
        self.folder, self.task, self.limits = folder, task, limits

    def __enter__(self) -> "ServedApart":
        import psutil

        self._scratch = tempfile.TemporaryDirectory()
        spec = {"folder": str(self.folder), "task": str(self.task.folder), "limits": asdict(self.limits)}
        spec["data_folder"] = str(Path(self._scratch.name) / "foundry")
        (path := Path(self._scratch.name) / "spec.json").write_text(json.dumps(spec), "utf-8")
        self._errors = open(Path(self._scratch.name) / "errors.txt", "w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(path)], env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise GatewayError(f"{self.folder} was not served ({self.last_words}): expected an ONNX model's folder.")
        served = Served(**json.loads(line))
        self.direct, self.gateway, self.model = served.direct, served.gateway, served.model
        self._watched = psutil.Process(self._process.pid)
        return self

    def __exit__(self, *error):
        self._process.stdin.close()  # asks it to end
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        self.last_words = (self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
        self._errors.close()
        self._scratch.cleanup()

    @property
    def exit_code(self) -> int | None:
        """None while the process runs; minus the signal's number where one ended it."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> None:
        """Wait for the process to end. Raises subprocess.TimeoutExpired where it goes on."""
        self._process.wait(timeout_s)

    def resident_bytes(self) -> int:
        """The process's resident memory now."""
        return self._watched.memory_info().rss

    def descriptors(self) -> int:
        """The files, sockets and pipes that the process has open now (on Windows: its handles)."""
        count = getattr(self._watched, "num_fds", None) or self._watched.num_handles
        return count()


def main(spec_path: str) -> None:
    """Serve until standard input ends, having printed the addresses as a line of JSON."""
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    task, limits = load_task(spec["task"]), Limits(**spec["limits"])
    with serve_model(Path(spec["folder"]), task, data_folder=Path(spec["data_folder"]), limits=limits) as served:
        print(json.dumps(asdict(served)), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
