"""Alerts really fire: a real Prometheus reads a live model's metrics while its messages change."""

import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from slmops_course.chat import RecordedChatModel
from slmops_course.evaluation import ask_and_judge
from slmops_course.operations.alerts import AlertError, Prometheus, find_program
from slmops_course.operations.drift import DriftMonitor, load_new_product, make_reference
from slmops_course.operations.monitoring import Metrics, MonitoredChatModel, serve_metrics
from slmops_course.tasks import load_task

RULES = Path(__file__).parent.parent / "deploy" / "prometheus" / "alerts.yml"
INSTALL = "Prometheus is not here: `sudo apt-get install --no-install-recommends prometheus` brings it and promtool."

needs_prometheus = pytest.mark.skipif(find_program("prometheus") is None, reason=INSTALL)


@pytest.fixture(scope="module")
def desk():
    return load_task()


@pytest.fixture
def served(desk):
    """The desk with answers that were recorded, counted and watched for drift; and its metrics."""
    ring = load_new_product(desk)
    examples = [*desk.splits["test"], *ring["train"]]
    model = RecordedChatModel({example.text: desk.target(example.answer) for example in examples})
    metrics = Metrics(desk, model="recorded")
    reference = make_reference(desk, ask_and_judge(model, desk, desk.splits["test"]))
    monitor = DriftMonitor(reference, window=100, metrics=metrics)
    return MonitoredChatModel(model, desk, metrics, watch=monitor.add), metrics


@needs_prometheus
@pytest.mark.slow
def test_a_new_product_raises_the_alert_of_drift_and_nothing_else(desk, served, tmp_path):
    model, metrics = served
    ordinary = [desk.messages(example.text) for example in desk.splits["test"][:100]]
    new = [desk.messages(example.text) for example in load_new_product(desk)["train"]]
    model.generate(ordinary)
    metrics.text()  # the first look loads scikit-learn, which may take longer than the second that a reading may take
    with (
        serve_metrics(metrics) as server,
        Prometheus(RULES, server.url, tmp_path / "prometheus", hurry=True) as prometheus,
    ):
        assert prometheus.wait_until("slmops_requests_total == 100")
        assert prometheus.wait_until('slmops_drift_ratio{kind="words"} < 1')
        # The answers come from a table in no time, so nothing else may fire but that nobody asks between two batches.
        assert {alert.name for alert in prometheus.alerts()} <= {"SlmopsNoTraffic"}
        model.generate(new)
        alert = prometheus.wait_for("SlmopsDrift")
        assert alert.labels["kind"] == "words"
        assert alert.labels["instance"] == server.url.split("/")[2]
        assert re.search(r"^Drift of words at 127\.0\.0\.1:\d+: [\d.]+ times the limit$", alert.summary)
        assert "a new product" in alert.description
        assert {a.name for a in prometheus.alerts() if a.state == "firing"} <= {"SlmopsDrift", "SlmopsNoTraffic"}
        folder = prometheus.folder
        address = prometheus.url
    assert "alert: SlmopsDrift" in (folder / "rules.yml").read_text("utf-8")
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{address}/-/ready", timeout=5)


@needs_prometheus
@pytest.mark.slow
def test_replies_that_do_not_parse_raise_their_alert_and_a_dead_process_its_own(desk, served, tmp_path):
    model, metrics = served
    with Prometheus(RULES, (server := serve_metrics(metrics)).url, tmp_path, interval_s=0.2, hurry=True) as prometheus:
        with server:
            assert prometheus.wait_until("slmops_requests_total == 0")
            for number in range(60):  # that the table does not hold: its replies are empty
                model.reply(desk.messages(f"unheard of {number}"))
            assert prometheus.wait_for("SlmopsInvalidReplies").labels["severity"] == "page"
            with pytest.raises(AlertError, match=r"SlmopsDown has not fired within 0.3 s"):
                prometheus.wait_for("SlmopsDown", timeout_s=0.3)
            with pytest.raises(AlertError, match=r"Prometheus refused query.*parse error"):
                prometheus.query("rate(")
            assert not prometheus.wait_until("slmops_no_such_metric", timeout_s=0.3)
        assert prometheus.wait_for("SlmopsDown").labels["instance"] == server.url.split("/")[2]
    with pytest.raises(AlertError, match="Prometheus does not answer"):
        prometheus.alerts()
    prometheus.close()


@needs_prometheus
def test_rules_that_are_none_are_named_at_the_start(tmp_path):
    rules = tmp_path / "rules.yml"
    rules.write_text("groups: [{name: x, rules: [{alert: A, expr: 'rate('}]}]", "utf-8")
    with (
        pytest.raises(AlertError, match=r"Prometheus did not start \(.*could not parse.*promtool check rules"),
        Prometheus(rules, "http://127.0.0.1:9/metrics", tmp_path / "data"),
    ):
        pass


def test_without_prometheus_one_sentence_says_how_to_get_it(tmp_path):
    with pytest.raises(AlertError, match="Prometheus is not installed: expected the program `no-such-program`; on Debian"):
        Prometheus(RULES, "http://127.0.0.1:9/metrics", tmp_path, program="no-such-program")
