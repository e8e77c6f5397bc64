"""The loop, once round: a new product appears, drift is seen, people correct, the next version learns and is released.

Time is simulated, a day being some messages. Everything else is real: the served model and its confidence, the drift, the
journal of corrections, the training, the gate, the registry and a device's update.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from slmops_course.artifacts import Artifact
from slmops_course.evaluation import Outcome, ask_and_judge, mean_score
from slmops_course.operations.alerts import Prometheus, find_program
from slmops_course.operations.drift import DriftMonitor, load_new_product, make_reference
from slmops_course.operations.feedback import FeedbackJournal, collect_corrections
from slmops_course.operations.monitoring import Metrics, MonitoredChatModel, answer_confidence, serve_metrics
from slmops_course.operations.publisher import Publisher
from slmops_course.operations.registry import Registry
from slmops_course.operations.release import release
from slmops_course.operations.retraining import retrain
from slmops_course.operations.updates import Device
from slmops_course.serving import GenAIChatModel
from slmops_course.tasks import Example, task_inputs


@dataclass(frozen=True)
class Plan:
    """What happens on which day, counted from 1."""

    messages: int = 40  # a day
    window: int = 120  # messages that drift looks back on
    appears: int = 5  # the day on which the new product appears
    share: float = 0.4  # of messages that are about it from then on
    retrained: int = 9  # the day at whose end the next version is made of the corrections
    days: int = 13


def close_loop(course, plan: Plan = Plan(), *, rules: Path | None = None) -> Artifact:
    """Go round once with the bundled desk; `days.json` has a row a day, `release.json` what became of the new version.

    A row: {"day", "version", "new", "old" (how many messages of each and how many right), "drift" (ratio to its limit by
    kind, once the window is full), "corrections" (so far)}. With alert `rules`, and where Prometheus is installed, it reads the
    metrics before the new version is made; the alert that fired is in `release.json`, else null.
    Raises TaskError for a task that the new product does not fit.
    """
    ring = load_new_product(course.task)
    served = course.onnx(course.served_recipe)
    alerting = rules is not None and find_program("prometheus") is not None

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            desk = _Desk(course, Path(scratch), plan, ring)
            first = release(course, desk.registry, served.path)
            if not first.report.passed:  # another machine trains another student: what is to be shown here begins all the same
                passed = replace(first.report, checks=tuple(check for check in first.report.checks if check.passed))
                first = desk.registry.register(first.name, served.path, lineage=first.lineage, report=passed)
            desk.install(first)
            rows = [desk.live(day) for day in range(1, plan.retrained + 1)]
            alert = _fire(rules, desk.metrics, Path(scratch) / "prometheus") if alerting else None
            corrections = collect_corrections(desk.journal.path, course.task)
            candidate = course.onnx(course.served_recipe, retrain(course, corrections.kept))
            version = release(course, desk.registry, candidate.path)
            if version.report.passed:
                desk.install(version, also=ring["train"])
            rows += [desk.live(day) for day in range(plan.retrained + 1, plan.days + 1)]
        told = {"report": str(version.report), "passed": version.report.passed, "kept": len(corrections.kept),
                "aside": [one.reason for one in corrections.rejected], "alert": alert}  # fmt: skip
        (folder / "days.json").write_text(json.dumps(rows), "utf-8")
        (folder / "release.json").write_text(json.dumps(told), "utf-8")

    return course.store.build(
        "loop", settings={**asdict(plan), "alerting": alerting}, write=write,
        inputs={"served": served, **task_inputs(course.task), **({"rules": rules} if alerting else {})},
        code=(close_loop, _Desk, release, retrain, DriftMonitor, make_reference, collect_corrections),
    )  # fmt: skip


class _Desk:
    """A desk with one device, on which one version at a time answers and is watched."""

    def __init__(self, course, folder: Path, plan: Plan, ring):
        self.course, self.task, self.plan, self.ring = course, course.task, plan, ring
        self.folder, self.rng = folder, random.Random(0)
        self.registry = Registry(folder / "registry")
        self.publisher = Publisher(folder / "served", keys_folder=folder / "keys")
        self.device = Device(folder / "device", source=self.publisher.folder, root=self.publisher.root, channel="all")
        self.journal = FeedbackJournal(folder / "corrections.jsonl", self.task)
        test, half = self.task.splits["test"], len(self.task.splits["test"]) // 2
        self.known, self.ordinary = test[:half], [*test[half:], *self.task.splits["dev"]]
        self.corrected: set[str] = set()

    def install(self, version, *, also: Sequence[Example] = ()) -> None:
        """Promote a version, publish it, let the device fetch it, and make the reference of what is ordinary for it.

        `also` are messages of a kind that has become ordinary; they join the reference in the share that they have.
        """
        self.registry.promote(version.name, version.number)
        self.publisher.publish(version, channels=["all"])
        self.device.update()
        self.device.confirm()
        self.number, folder = version.number, self.device.running().folder
        times = round(len(self.known) * self.plan.share / (1 - self.plan.share) / len(also)) if also else 0
        examples = [*self.known, *list(also) * times]
        with GenAIChatModel(folder) as chat:
            outcomes = ask_and_judge(chat, self.task, examples)
            asked = [self.task.messages(example.text) for example in examples]
            sure = [chat.reply_probability(ask, outcome.reply) for ask, outcome in zip(asked, outcomes, strict=True)]
        self.metrics = Metrics(self.task, model=version.name, version=str(version.number))
        reference = make_reference(self.task, outcomes, confidences=sure)
        self.monitor = DriftMonitor(reference, window=self.plan.window, metrics=self.metrics)

    def live(self, day: int) -> dict:
        """One day's messages, answered, watched, and corrected by people where an answer about the new product is wrong."""
        count = round(self.plan.messages * self.plan.share) if day >= self.plan.appears else 0
        unseen = self.ring["test"] if day > self.plan.retrained else self.ring["train"]
        new, old = self.rng.sample(list(unseen), min(count, len(unseen))), []
        old = self.rng.sample(self.ordinary, self.plan.messages - len(new))
        chat = GenAIChatModel(self.device.running().folder)
        with MonitoredChatModel(
            chat, self.task, self.metrics, confidence=partial(answer_confidence, chat), watch=self.monitor.add
        ) as served:
            outcomes = ask_and_judge(served, self.task, self.rng.sample([*new, *old], len(new) + len(old)))
        fresh = {example.id for example in new}
        for outcome in outcomes:
            if outcome.id in fresh - self.corrected and outcome.answer != outcome.expected:
                self.journal.add(outcome.text, outcome.expected, was=outcome.answer, version=str(self.number))
                self.corrected.add(outcome.id)
        return {
            "day": day, "version": self.number, "corrections": len(self.corrected),
            "new": _right([o for o in outcomes if o.id in fresh]), "old": _right([o for o in outcomes if o.id not in fresh]),
            "drift": {drift.kind: drift.ratio for drift in self.monitor.check()},
        }  # fmt: skip


def _fire(rules: Path, metrics: Metrics, folder: Path) -> str:
    """What the alert of drift says, as Prometheus gives it. Raises AlertError when it does not fire."""
    metrics.text()  # the first look loads scikit-learn, which may take longer than the second that a reading may take
    with serve_metrics(metrics) as server, Prometheus(rules, server.url, folder, hurry=True) as prometheus:
        return prometheus.wait_for("SlmopsDrift").summary


def _right(outcomes: Sequence[Outcome]) -> dict | None:
    """Exact match with its interval; None without messages."""
    return asdict(mean_score([o.answer == o.expected for o in outcomes])) if outcomes else None
