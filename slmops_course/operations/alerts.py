"""Alerts that really fire: Prometheus on this machine, reading a served model's metrics by the rules in `deploy/`."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slmops_course.errors import CourseError

START_S = 30.0  # what Prometheus gets to start in


class AlertError(CourseError):
    """Prometheus cannot run, or does not know what it is asked."""


@dataclass(frozen=True)
class Alert:
    """One alert: "pending" while its rule holds but not yet for long enough, then "firing"."""

    name: str
    state: str
    labels: Mapping[str, str]  # such as instance and kind
    summary: str
    description: str


class Prometheus:
    """Prometheus on loopback, until the end of its block.

    It reads `metrics_url` every `interval_s` seconds and keeps what it needs in `folder`. With `hurry` alerts fire as soon
    as their rules hold, without the minutes that they ask for otherwise: for a demonstration.
    Example:
        with serve_metrics(metrics) as server, Prometheus(rules, server.url, folder, hurry=True) as prometheus:
            …
            print(prometheus.wait_for("SlmopsDrift").summary)
    Raises AlertError where Prometheus is not installed, or does not start by these rules.
    """

    def __init__(
        self, rules: Path, metrics_url: str, folder: Path, *, interval_s: float = 1.0, hurry: bool = False,
        program: str = "prometheus",
    ):  # fmt: skip
        self._program = find_program(program)
        if self._program is None:
            raise AlertError(
                f"Prometheus is not installed: expected the program `{program}`; on Debian or Ubuntu run `sudo apt-get install "
                "--no-install-recommends prometheus`, elsewhere see https://prometheus.io/docs/prometheus/latest/installation/"
            )
        self.rules, self.metrics_url, self.folder, self.interval_s, self.hurry = rules, metrics_url, folder, interval_s, hurry
        self._process = None

    def __enter__(self) -> "Prometheus":
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.folder.mkdir(parents=True, exist_ok=True)
        rules = self.rules.read_text("utf-8")
        (self.folder / "rules.yml").write_text(re.sub(r"(?m)^( +for:) \S+$", r"\1 0s", rules) if self.hurry else rules, "utf-8")
        interval = f"{max(1, round(self.interval_s * 1000))}ms"
        target = urllib.parse.urlsplit(self.metrics_url)
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": "slmops", "metrics_path": target.path, "static_configs": [{"targets": [target.netloc]}]}
            ],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
        command = [
            self._program, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with open(self.folder / "prometheus.log", "wb") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Stop it. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def alerts(self) -> list[Alert]:
        """The alerts that are pending or firing now."""
        found = self._ask("alerts")["alerts"]
        return [
            Alert(
                a["labels"]["alertname"], a["state"], {k: v for k, v in a["labels"].items() if k != "alertname"},
                a["annotations"].get("summary", ""), a["annotations"].get("description", ""),
            )
            for a in found
        ]  # fmt: skip

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What a PromQL expression is now: labels and value of each series.

        Example: `query("slmops_requests_total")` -> [({"__name__": …, "instance": "127.0.0.1:41233", …}, 12.0)]
        """
        found = self._ask("query?" + urllib.parse.urlencode({"query": expression}))["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def wait_until(self, expression: str, *, timeout_s: float = 20.0) -> bool:
        """Wait until a PromQL expression has a value, such as `slmops_drift_ratio > 1`; False where it has none in time."""
        return self._wait(lambda: self.query(expression), timeout_s) is not None

    def wait_for(self, name: str, *, timeout_s: float = 20.0) -> Alert:
        """The first firing alert of that name. Raises AlertError when it does not fire in time."""
        firing = self._wait(lambda: [a for a in self.alerts() if (a.name, a.state) == (name, "firing")], timeout_s)
        if firing is None:
            raise AlertError(
                f"{name} has not fired within {timeout_s:g} s: expected its rule to hold; look at {self.url}/alerts."
            )
        return firing[0]

    def _wait(self, look: Callable[[], list], timeout_s: float) -> list | None:
        end = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > end:
                return None
            time.sleep(min(self.interval_s, 0.2))
        return found

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        log = (self.folder / "prometheus.log").read_text("utf-8", "replace")
        words = re.findall(r"level=error .*?err=(.+)", log) or log.strip().splitlines()[-1:] or ["it said nothing"]
        raise AlertError(f"Prometheus did not start ({words[0]}): expected rules that `promtool check rules` accepts; run it.")

    def _ask(self, what: str):
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{what}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            words = error.read().decode("utf-8", "replace")[:300]
            raise AlertError(f"Prometheus refused {what} ({words}): expected an expression in PromQL; correct it.") from error
        except OSError as error:
            raise AlertError(f"Prometheus does not answer ({error}): expected it to run; use it inside its block.") from error


def find_program(name: str) -> str | None:
    """Where a program of the Prometheus family is: on the path, or beside Python, where the Makefile puts it."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
