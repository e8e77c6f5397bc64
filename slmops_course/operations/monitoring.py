"""What a served model does, in numbers that anybody may see: counts and times, never a message.

    metrics = Metrics(task, model="support-desk", version="3")
    served = MonitoredChatModel(model, task, metrics)
    with serve_metrics(metrics) as server:
        print(server.url)                       # http://127.0.0.1:…/metrics, for Prometheus or a browser
        served.reply(task.messages("where is my card"))

Names and units follow https://prometheus.io/docs/practices/naming/; what to count follows
https://prometheus.io/docs/practices/instrumentation/. Rules that raise alerts from these metrics, and a dashboard, are in
`deploy/`.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Conversation, Reply, TorchChatModel, prompt_ids
from slmops_course.errors import CourseError
from slmops_course.evaluation import INVALID
from slmops_course.serving import GenAIChatModel
from slmops_course.tasks import Task, TaskError
from slmops_course.textmetrics import log_probabilities
from slmops_course.training import Row

log = logging.getLogger("slmops_course")

# Upper ends in seconds. The course's models answer in 0.05 to 2 s: there each is at most twice the one before.
BUCKETS_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
BUCKETS_SURE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

Confidence = Callable[[Sequence[Conversation], Sequence[Reply]], Sequence[float]]
Watch = Callable[[str, str, float | None], None]  # a message, its predicted label, how sure the model was of its answer


class MonitoringError(CourseError):
    """Something that cannot be measured, or metrics that cannot be served."""


class Metrics:
    """The metrics of one served model, in a registry of their own: two models in one process do not mix.

    Every label has all its values from the start, each at 0: a rate over a counter that appears with its first event
    misses this event. `model` and `version` are shown as `slmops_model_info`.
    Example: `Metrics(task).text()` -> '# HELP slmops_requests_total Messages that were put to the model.\\n…'
    """

    def __init__(self, task: Task, *, model: str = "", version: str = ""):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        Info("slmops_model", "Which model answers.", registry=own).info({"model": model, "version": version})
        self.requests = Counter("slmops_requests", "Messages that were put to the model.", registry=own)
        self.errors = Counter("slmops_errors", "Messages on which the model failed, without a reply.", registry=own)
        self.invalid = Counter("slmops_invalid_replies", "Replies that are no JSON of the task's schema.", registry=own)
        self.unwatched = Counter("slmops_unwatched_replies", "Replies that monitoring itself failed on.", registry=own)
        self.in_progress = Gauge("slmops_requests_in_progress", "Messages taken and not answered yet.", registry=own)
        self.waiting = Gauge("slmops_requests_waiting", "Of these, the ones that wait for their turn.", registry=own)
        self.prompt_tokens = Counter("slmops_prompt_tokens", "Tokens that were read.", registry=own)
        self.output_tokens = Counter("slmops_output_tokens", "Tokens that were written.", registry=own)
        times = {"buckets": BUCKETS_S, "registry": own}
        self.first_token = Histogram(
            "slmops_time_to_first_token_seconds", "From a message's arrival to its reply's first token.", **times
        )
        self.duration = Histogram(
            "slmops_request_duration_seconds", "From a message's arrival to the end of its reply.", **times
        )
        self.confidence = Histogram(
            "slmops_confidence_ratio", "The probability that the model gives to its own answer, 0 to 1.",
            buckets=BUCKETS_SURE, registry=own,
        )  # fmt: skip
        predictions = Counter("slmops_predictions", "Replies by predicted label.", ["label"], registry=own)
        # Only values of the schema become label values, so that no reply can make a series of its own.
        self.predictions = {value: predictions.labels(value) for value in (*task.fields[task.label_field], INVALID)}
        self._drift = lambda: []
        own.register(_DriftCollector(self))

    def read_drift_from(self, check: Callable[[], Sequence]) -> None:
        """Ask `check` for the drift figures each time the metrics are read, see `drift.DriftMonitor`."""
        self._drift = check

    def text(self) -> str:
        """All metrics in Prometheus's text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode("utf-8")

    def value(self, name: str, **labels: str) -> float | None:
        """One sample, or None if there is none. Example: `value("slmops_predictions_total", label="fees")` -> 12.0"""
        return self.registry.get_sample_value(name, labels)


class _DriftCollector:
    """Makes the drift figures when metrics are read: they take some hundredths of a second, for which no request waits."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self):
        from prometheus_client.core import GaugeMetricFamily

        statistic = GaugeMetricFamily("slmops_drift_statistic", "How unlike the reference messages are.", labels=["kind"])
        ratio = GaugeMetricFamily("slmops_drift_ratio", "The statistic over its limit: above 1 is drift.", labels=["kind"])
        for drift in self._metrics._drift():
            statistic.add_metric([drift.kind], drift.statistic)
            ratio.add_metric([drift.kind], drift.ratio)
        yield from (statistic, ratio)


class MonitoredChatModel(ChatModel):
    """Any ChatModel, counted. It answers as the model does, and raises what the model raises.

    At most `at_once` calls reach the model together and the others wait their turn, which counts into their times; None:
    no limit. `confidence` says how sure the model was of replies, see `answer_confidence`; it is asked about every
    `confidence_every`-th reply, because it takes time. `watch` is told of every reply, see `drift.DriftMonitor.add`.
    Where one of these two fails, that is counted and logged, and the reply is given all the same.
    """

    def __init__(
        self, model: ChatModel, task: Task, metrics: Metrics, *, confidence: Confidence | None = None,
        confidence_every: int = 1, watch: Watch | None = None, at_once: int | None = None,
    ):  # fmt: skip
        if confidence_every < 1 or (at_once is not None and at_once < 1):
            raise MonitoringError(
                f"confidence_every is {confidence_every} and at_once is {at_once}: expected whole numbers from 1, or None for "
                "no limit of calls at once."
            )
        self.model, self.task, self.metrics, self.name = model, task, metrics, model.name
        self._confidence, self._confidence_every, self._watch = confidence, confidence_every, watch
        self._turns = threading.BoundedSemaphore(at_once) if at_once else contextlib.nullcontext()
        self._lock, self._replies = threading.Lock(), 0

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        metrics, count = self.metrics, len(conversations)
        start = time.perf_counter()
        metrics.in_progress.inc(count)
        try:
            with self._turn(count):
                waited_s = time.perf_counter() - start
                replies = self.model.generate(conversations, max_new_tokens=max_new_tokens)
        except BaseException:
            metrics.errors.inc(count)
            raise
        finally:
            metrics.in_progress.dec(count)
            metrics.requests.inc(count)
        labels = [self._count(reply, waited_s) for reply in replies]
        if self._watch or self._confidence:
            self._look(conversations, replies, labels)
        return replies

    def close(self):
        self.model.close()

    @contextlib.contextmanager
    def _turn(self, count: int):
        self.metrics.waiting.inc(count)
        with self._turns:
            self.metrics.waiting.dec(count)
            yield

    def _count(self, reply: Reply, waited_s: float) -> str:
        """Count a reply; returns its label."""
        metrics = self.metrics
        try:
            label = self.task.parse(reply.text)[self.task.label_field]
        except TaskError:
            label = INVALID
            metrics.invalid.inc()
        metrics.predictions[label].inc()
        metrics.prompt_tokens.inc(reply.prompt_tokens)
        metrics.output_tokens.inc(reply.output_tokens)
        metrics.first_token.observe(waited_s + reply.time_to_first_token_s)
        metrics.duration.observe(waited_s + reply.latency_s)
        return label

    def _look(self, conversations, replies: Sequence[Reply], labels: Sequence[str]) -> None:
        try:
            sure = self._how_sure(conversations, replies)
            for conversation, label, confidence in zip(conversations, labels, sure, strict=True):
                if confidence is not None:
                    self.metrics.confidence.observe(confidence)
                if self._watch:
                    self._watch(conversation[-1]["content"], label, confidence)
        except Exception as error:  # whatever it is: a person waits for the answer, which is there
            self.metrics.unwatched.inc(len(replies))
            log.warning("Monitoring failed on a reply (%s); the reply was given.", type(error).__name__)

    def _how_sure(self, conversations, replies: Sequence[Reply]) -> list[float | None]:
        sure: list[float | None] = [None] * len(replies)
        if self._confidence:
            with self._lock:
                first, self._replies = self._replies, self._replies + len(replies)
            asked = [i for i in range(len(replies)) if (first + i) % self._confidence_every == 0]
            found = self._confidence([conversations[i] for i in asked], [replies[i] for i in asked]) if asked else []
            for i, value in zip(asked, found, strict=True):
                sure[i] = value
        return sure


def answer_confidence(model: ChatModel, conversations: Sequence[Conversation], replies: Sequence[Reply]) -> list[float]:
    """The probability, 0 to 1, that a model gives to each whole reply of its own, the end token included.

    It takes the model one more pass over prompt and reply, without generating. For a MonitoredChatModel pass
    `confidence=functools.partial(answer_confidence, model)`.
    Raises MonitoringError for a model that does not show its probabilities, as Foundry Local's do not.
    """
    if isinstance(model, TorchChatModel):
        rows = []
        for conversation, reply in zip(conversations, replies, strict=True):
            prompt = prompt_ids(model.tokenizer, conversation)
            answer = model.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            rows.append(Row([*prompt, *answer, model.tokenizer.eos_token_id], len(prompt)))
        return [math.exp(value) for value in log_probabilities(model.model, rows)]
    if isinstance(model, GenAIChatModel):
        return [model.reply_probability(asked, reply.text) for asked, reply in zip(conversations, replies, strict=True)]
    raise MonitoringError(
        f"{model.name} does not show its probabilities: expected a PyTorch model or one under ONNX Runtime GenAI; open the "
        "same folder as one of these to ask how sure it is."
    )


class MetricsServer:
    """Metrics over HTTP on loopback until `close`, or to the end of its block."""

    def __init__(self, server, thread: threading.Thread):
        self._server, self._thread = server, thread
        self.url = f"http://127.0.0.1:{server.server_port}/metrics"

    def close(self) -> None:
        """Stop answering and free the port. Safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def serve_metrics(metrics: Metrics, *, port: int = 0) -> MetricsServer:
    """Serve metrics on a loopback port, 0 for any free one. There is no authentication, so no other address is offered.

    Raises MonitoringError when the port is taken or not allowed.
    """
    from prometheus_client import start_http_server

    try:
        return MetricsServer(*start_http_server(port, addr="127.0.0.1", registry=metrics.registry))
    except (OSError, OverflowError) as error:
        raise MonitoringError(
            f"Port {port} is in use or not allowed ({getattr(error, 'strerror', None) or error}): expected a free one; choose "
            "another, or 0 for any."
        ) from error
