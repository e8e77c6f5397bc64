"""What `deploy/` ships for Prometheus and Grafana fits what a live model really reports; promtool is the judge."""

import itertools
import json
import re
import shutil
import subprocess
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slmops_course.chat import TorchChatModel
from slmops_course.evaluation import judge
from slmops_course.operations.alerts import find_program
from slmops_course.operations.drift import DriftMonitor, make_reference
from slmops_course.operations.gateway import LIMITS, Gateway
from slmops_course.operations.monitoring import Metrics, MonitoredChatModel, answer_confidence, serve_metrics
from slmops_course.tasks import Example

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))
PROMTOOL = find_program("promtool")
FOREIGN = {"up", "ALERTS"}  # made by Prometheus itself

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None,
    reason="promtool is not here: `sudo apt-get install --no-install-recommends prometheus` brings it (Debian, Ubuntu).",
)


def promtool(*arguments, text: str | None = None, folder: Path = RULES.parent) -> subprocess.CompletedProcess:
    return subprocess.run([PROMTOOL, *map(str, arguments)], input=text, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def live(tiny_task, tiny_model_folder) -> str:
    """What a real model's metrics are over HTTP, after 24 messages that it answered and one that it failed on."""
    chat, metrics = TorchChatModel(tiny_model_folder), Metrics(tiny_task, model="tiny", version="1")
    answer = {"intent": "card_lost", "urgency": "low"}
    examples = [Example(f"x{number}", f"message number {number} about my card", answer) for number in range(24)]
    conversations = [tiny_task.messages(example.text) for example in examples]
    replies = chat.generate(conversations, max_new_tokens=4)
    confidences = answer_confidence(chat, conversations, replies)
    reference = make_reference(tiny_task, judge(tiny_task, examples, [r.text for r in replies]), confidences=confidences)
    monitor = DriftMonitor(reference, window=20, metrics=metrics)
    with (
        MonitoredChatModel(chat, tiny_task, metrics, confidence=partial(answer_confidence, chat), watch=monitor.add) as served,
        serve_metrics(metrics) as server,
    ):
        served.generate(conversations, max_new_tokens=4)
        with pytest.raises(ValueError, match="max_new_tokens"):
            served.generate(conversations[:1], max_new_tokens=-1)
        Gateway("http://127.0.0.1:9/v1", tiny_task, metrics, limits=LIMITS)  # it has two figures of its own
        with urllib.request.urlopen(server.url, timeout=10) as reading:
            return reading.read().decode("utf-8")


def sample_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads. Example: 'sum by (le) (rate(a_total{b="c"}[5m]))' -> {"a_total"}"""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]|\b(?:by|on|without|ignoring)\s*\([^)]*\)', "", expression)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - {"and", "or", "unless", "by", "on", "bool"}


def rule_expressions() -> dict[str, str]:
    """The expression of every alert, as promtool's YAML reader would find them."""
    import yaml

    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panel_expressions() -> list[str]:
    """The dashboard's expressions, with an interval in the place of Grafana's own."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    notes = [note["expr"] for note in DASHBOARD["annotations"]["list"]]
    return [expression.replace("$__rate_interval", "5m") for expression in targets + notes]


# --- The live metrics ---


@needs_promtool
def test_promtool_has_nothing_to_say_against_what_a_live_model_reports(live):
    done = promtool("check", "metrics", text=live)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a_ratio 1\n", "no help text"), ("# HELP a_ms x\n# TYPE a_ms counter\na_ms 1\n", '"_total" suffix'), ("a b\n", "pars")],
)
def test_promtool_does_say_something_against_bad_metrics(text, complaint):
    done = promtool("check", "metrics", text=text)
    assert done.returncode
    assert complaint in done.stdout + done.stderr


def test_the_live_run_really_counted(live):
    found = {sample.name: sample.value for family in text_string_to_metric_families(live) for sample in family.samples}
    assert (found["slmops_requests_total"], found["slmops_errors_total"]) == (25, 1)
    assert found["slmops_confidence_ratio_count"] == found["slmops_request_duration_seconds_count"] == 24
    kinds = re.findall(r'slmops_drift_ratio\{kind="(\w+)"\}', live)
    assert sorted(kinds) == ["confidence", "labels", "lengths", "words"]


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up{job=\"x\"} == 0", {"up"}),
        ("histogram_quantile(0.95, sum by (instance, le) (rate(a_bucket[10m]))) > 2\n and on (b) c >= 20", {"a_bucket", "c"}),
        ('sum(rate(a{le="0.5", intent=~"b|c"}[5m])) / scalar(sum(d))', {"a", "d"}),
        ("1 > 0", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_the_metrics_of_an_expression_are_found(expression, names):
    assert metric_names(expression) == names


def test_every_metric_of_the_rules_and_of_the_dashboard_is_one_that_a_live_model_reports(live):
    known = sample_names(live) | FOREIGN | {"process_resident_memory_bytes"}  # the last one on Linux only
    read = {name for expression in [*rule_expressions().values(), *panel_expressions()] for name in metric_names(expression)}
    assert len(read) > 15
    assert sorted(read - known) == []


def test_every_metric_that_a_model_reports_is_on_the_dashboard(live):
    shown = {name for expression in panel_expressions() for name in metric_names(expression)}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in sample_names(live) if name.startswith("slmops")}
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    missing = {name for name in families - named if f"{name}_total" not in named}
    assert sorted(missing) == []


def test_bucket_ends_and_labels_that_are_asked_for_exist(live):
    expressions = "\n".join([*rule_expressions().values(), *panel_expressions()])
    for metric, end in re.findall(r'(\w+_bucket)\{[^}]*le="([^"]+)"', expressions):
        assert f'{metric}{{le="{end}"}}' in live
    assert 'slmops_predictions_total{label="card_lost"}' in live


# --- Rules ---


@needs_promtool
def test_rules_and_configuration_are_good_and_the_configuration_reads_the_rules():
    assert promtool("check", "rules", RULES.name).returncode == 0
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(rule_expressions())} rules found" in done.stdout


@needs_promtool
def test_the_rules_pass_their_own_tests():
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize(
    "mutate",
    [lambda expression: f"({expression}) and vector(1) < 0", lambda expression: "vector(1)"],
    ids=["never", "always"],
)
def test_the_rules_tests_notice_every_rule_that_never_or_always_fires(tmp_path, mutate):
    import yaml

    rules = yaml.safe_load(RULES.read_text("utf-8"))
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = mutate(rule["expr"].strip())
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), "utf-8")
    shutil.copy(RULES.parent / "alerts_test.yml", tmp_path)
    assert promtool("check", "rules", "alerts.yml", folder=tmp_path).returncode == 0
    done = promtool("test", "rules", "alerts_test.yml", folder=tmp_path)
    noticed = set(re.findall(r"alertname: (\w+)", done.stdout + done.stderr))
    assert sorted(set(rule_expressions()) - noticed) == []


@needs_promtool
@pytest.mark.parametrize(
    "limits",
    [
        [
            ("SlmopsErrors", "> 0.02", "> 0.0005"), ("SlmopsInvalidReplies", "> 0.01", "> 0.2"),
            ("SlmopsSlow", "0.95", "0.999"), ("SlmopsQueue", "> 8", "> 90"),
            ("SlmopsDrift", "> 1", "> 0.8"), ("SlmopsLowConfidence", "> 0.15", "> 0.05"),
            ("SlmopsNoTraffic", "[1h]", "[10m]"), ("SlmopsDown", 'up{job="slmops"}', "up"),
        ],
        [
            ("SlmopsErrors", ">= 20", ">= 1"), ("SlmopsInvalidReplies", ">= 20", ">= 1"), ("SlmopsSlow", ">= 20", ">= 1"),
            ("SlmopsLowConfidence", ">= 50", ">= 1"), ("SlmopsDrift", "> 1", "> 2"),
        ],
    ],
    ids=["limits", "fewest"],
)  # fmt: skip
def test_the_rules_tests_notice_other_limits(tmp_path, limits):
    text = RULES.read_text("utf-8")
    for alert, before, after in limits:
        start = text.index(f"alert: {alert}")
        assert before in text[start : text.index("for:", start)], alert
        text = text[:start] + text[start:].replace(before, after, 1)
    (tmp_path / "alerts.yml").write_text(text, "utf-8")
    shutil.copy(RULES.parent / "alerts_test.yml", tmp_path)
    done = promtool("test", "rules", "alerts_test.yml", folder=tmp_path)
    noticed = set(re.findall(r"alertname: (\w+)", done.stdout + done.stderr))
    assert sorted({alert for alert, *_ in limits} - noticed) == []


def test_every_alert_says_what_happened_and_what_to_do():
    import yaml

    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) == 8
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "look"), rule["alert"]
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"], rule["alert"]
        assert len(rule["annotations"]["description"].split()) > 15, rule["alert"]
        assert re.fullmatch(r"\d+[mh]", rule["for"]), rule["alert"]


def test_prometheus_reads_loopback_only():
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8")
    targets = re.findall(r"(?m)^ +- targets: (.*)$", text)
    assert targets == ['["127.0.0.1:9464"]']


# --- The dashboard ---


def test_panels_have_their_own_ids_and_places_and_all_they_need():
    panels = DASHBOARD["panels"]
    assert [id for id, count in Counter(panel["id"] for panel in panels).items() if count > 1] == []
    taken = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        columns, rows = (range(place[start], place[start] + place[size]) for start, size in (("x", "w"), ("y", "h")))
        taken.update(itertools.product(columns, rows))
        assert panel["title"], panel["id"]
        assert len(panel["description"].split()) > 5, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [t["refId"] for t in panel["targets"]] == list("ABC"[: len(panel["targets"])]), panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert max(taken.values()) == 1, "two panels lie on one another"
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_the_dashboard_asks_for_the_chosen_device_everywhere(live):
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "instance"}
    asked = re.fullmatch(r"label_values\((\w+), instance\)", variables["instance"]["query"]["query"])
    assert asked[1] in sample_names(live)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            count = len(re.findall(r'instance=~"\$instance"', target["expr"]))
            assert count == len(re.findall(r"\b(?:slmops|process)_\w+", target["expr"])), target["expr"]


@needs_promtool
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path):
    def check(expressions: list[str]) -> subprocess.CompletedProcess:
        rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions)]
        (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}), "utf-8")
        return promtool("check", "rules", "panels.yml", folder=tmp_path)

    done = check(panel_expressions())
    assert done.returncode == 0, done.stderr
    assert f"{len(panel_expressions())} rules found" in done.stdout
    assert check(["sum(rate(slmops_requests_total[5m])"]).returncode != 0, "a missing bracket is noticed"


def test_grafanas_own_model_of_a_dashboard_takes_it_and_gives_it_back():
    pytest.importorskip("grafana_foundation_sdk", reason="`pip install grafana-foundation-sdk` brings Grafana's own model.")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    # The title and text of annotations are Prometheus's own and not in the general model.
    assert sorted(lost(DASHBOARD, back)) == ["annotations.list.0.textFormat", "annotations.list.0.titleFormat"]
    misspelt = {"panels": [{"type": "stat", "gridPosition": {}}]}
    assert lost(misspelt, json.loads(JSONEncoder().encode(Dashboard.from_json(misspelt)))) == ["panels.0.gridPosition"]


def lost(before, after, path: str = "") -> list[str]:
    """Where two JSON values differ, seen from the first."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [place for key in before for place in lost(before[key], after.get(key), f"{path}.{key}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [place for n, pair in enumerate(zip(before, after, strict=True)) for place in lost(*pair, f"{path}.{n}")]
    return [] if before == after else [path]
