"""What a run would cost is reckoned before it is spent, and nobody spends without a yes."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from slmops_course.cloud import commands
from slmops_course.cloud.cost import Prices, estimate, format_plan, read_prices
from slmops_course.cloud.definition import CloudError, load_pipeline
from slmops_course.cloud.local import with_inputs
from slmops_course.errors import CourseError

from cloud_desk import PIPELINE, change, copy_pipeline  # isort: skip

ONE = Prices({"Standard_D4s_v3": 0.6, "Standard_D8s_v3": 1.2}, "2026-01-01", "here", "USD", "a test")


def by_step(pipeline, prices=ONE):
    return {line.step: line for line in estimate(load_pipeline(pipeline), prices)}


def test_a_step_costs_its_time_and_its_machines_start():
    lines = by_step(PIPELINE)
    assert list(lines) == load_pipeline(PIPELINE).order()
    teacher = lines["teacher"]
    assert (teacher.machine, teacher.machines, teacher.expected_minutes) == ("Standard_D8s_v3", 1, 7 + 5)
    assert teacher.expected_cost == pytest.approx((7 + 5) / 60 * 1.2)
    assert teacher.most_cost == pytest.approx((120 + 5) / 60 * 1.2)


def test_a_sweep_pays_every_trial_and_a_parallel_step_every_machine():
    lines = by_step(PIPELINE)
    assert lines["distil"].machines == lines["label"].machines == 2
    assert lines["distil"].expected_cost == pytest.approx((9 * 2 + 5 * 2) / 60 * 1.2)
    assert lines["distil"].most_cost == pytest.approx((120 * 2 + 5 * 2) / 60 * 1.2)
    assert lines["label"].expected_cost == pytest.approx((1 + 5 * 2) / 60 * 0.6)
    assert lines["label"].most_cost == pytest.approx((30 * 3 * 4 + 5 * 2) / 60 * 0.6)


def test_the_most_follows_the_limits_of_the_file(tmp_path):
    pipeline = copy_pipeline(tmp_path)
    before = by_step(pipeline)["distil"].most_cost
    change(pipeline, "      timeout: 14400", "      timeout: 3600")
    assert by_step(pipeline)["distil"].most_cost == pytest.approx((60 * 2 + 5 * 2) / 60 * 1.2)
    assert by_step(pipeline)["distil"].most_cost < before
    change(pipeline, "max_total_trials: 2", "max_total_trials: 20")
    assert by_step(pipeline)["distil"].expected_cost == pytest.approx((9 * 20 + 5 * 2) / 60 * 1.2)


def test_no_estimate_is_better_than_one_without_a_limit_a_time_or_a_price(tmp_path):
    pipeline = copy_pipeline(tmp_path)
    with pytest.raises(CloudError, match="no price for Standard_D8s_v3: expected one of Standard_D4s_v3"):
        by_step(pipeline, Prices({"Standard_D4s_v3": 0.6}, "", "", "", ""))
    change(pipeline, "    limits: {timeout: 7200}\n", "")
    with pytest.raises(CloudError, match="teacher: its cost cannot be estimated: expected a timeout under limits"):
        by_step(pipeline)
    change(pipeline.parent / "components" / "shard.yml", '  expected_minutes: "1"', "  other: x")
    with pytest.raises(CloudError, match="shard: its cost cannot be estimated: expected expected_minutes"):
        by_step(pipeline)


def test_the_plan_says_where_its_prices_are_from():
    pipeline, prices = load_pipeline(PIPELINE), read_prices(PIPELINE.parent / "prices.json")
    lines = estimate(pipeline, prices)
    text = format_plan(pipeline, lines, prices)
    assert f"Prices of {prices.as_of}, eastus" in text
    assert f"{sum(line.expected_cost for line in lines):.2f}" in text
    assert all(name in text for name in pipeline.steps)
    assert format_plan(pipeline, [], prices).count("0.00") == 2


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"per_hour": {"a": "cheap"}}',
     '{"per_hour": {}, "as_of": "", "region": "", "currency": "", "source": ""}',
     '{"per_hour": {"a": 0}, "as_of": "", "region": "", "currency": "", "source": ""}'],
)  # fmt: skip
def test_a_table_without_prices_or_their_day_is_refused(text, tmp_path):
    (tmp_path / "p.json").write_text(text, "utf-8")
    with pytest.raises(CloudError, match=r"p\.json (is no price table|holds a price that is none)"):
        read_prices(tmp_path / "p.json")


# --- The command line ---


@pytest.fixture
def named(monkeypatch):
    """A workspace named by the environment."""
    for name, value in (("SUBSCRIPTION_ID", "sub"), ("RESOURCE_GROUP", "group"), ("ML_WORKSPACE", "desk")):
        monkeypatch.setenv(f"AZURE_{name}", value)


@pytest.fixture
def unnamed(monkeypatch):
    for name in ("SUBSCRIPTION_ID", "RESOURCE_GROUP", "ML_WORKSPACE"):
        monkeypatch.delenv(f"AZURE_{name}", raising=False)


def options(*words, build=Path("build")):
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    return SimpleNamespace(**vars(parser.parse_args([*words, "--pipeline", str(PIPELINE)])), build=build)


def refuse(*_):
    raise AssertionError("nobody may connect")


def test_check_says_what_is_wrong_by_its_exit_code(tmp_path, capsys):
    assert commands.run(options("check")) == 0
    pipeline = change(copy_pipeline(tmp_path), "  shards: 4", "  shards: four")
    wrong = options("check")
    wrong.pipeline = pipeline
    assert commands.run(wrong) == 1
    assert "shards is 'four'" in capsys.readouterr().out


def test_plan_prints_the_cost_and_sends_nothing(named, capsys):
    assert commands.run(options("plan"), connect=refuse) == 0
    out = capsys.readouterr().out
    assert "together" in out
    assert "It would go to the workspace desk in group." in out


def test_without_a_workspace_nothing_is_sent_and_that_is_said(unnamed, capsys):
    assert commands.run(options("plan"), connect=refuse) == 0
    assert commands.run(options("submit", "--yes"), connect=refuse) == 1
    assert capsys.readouterr().out.count("No workspace is named, so nothing is sent: set AZURE_SUBSCRIPTION_ID") == 2


@pytest.mark.parametrize("answer", ["", "no", "y", "yess"])
def test_nothing_is_sent_without_a_yes(named, answer, capsys):
    assert commands.run(options("submit"), ask=lambda _: answer, connect=refuse) == 1
    assert "Nothing was sent." in capsys.readouterr().out


def test_where_nobody_can_be_asked_nothing_is_spent(named):
    with pytest.raises(CourseError, match="expected a terminal, or --yes"):
        commands.run(options("submit"), connect=refuse)


@pytest.mark.parametrize("words", [["submit"], ["submit", "--yes"]])
def test_with_a_yes_it_goes_on(named, words):
    with pytest.raises(AssertionError, match="nobody may connect"):
        commands.run(options(*words), ask=lambda _: " YES ", connect=refuse)


def test_inputs_on_the_command_line_are_checked(unnamed):
    with pytest.raises(CloudError, match="no input 'shrads'"):
        commands.run(options("plan", "--set", "shrads", "2"))
    pipeline = with_inputs(load_pipeline(PIPELINE), {"shards": "8"})
    assert {line.step: line for line in estimate(pipeline, ONE)}["label"].most_cost > by_step(PIPELINE)["label"].most_cost


def test_the_table_that_comes_with_the_course_has_every_machine_of_its_files():
    import yaml

    per_hour = json.loads((PIPELINE.parent / "prices.json").read_text("utf-8"))["per_hour"]
    sizes = {yaml.safe_load(path.read_text("utf-8"))["size"] for path in (PIPELINE.parent / "compute").glob("*.yml")}
    sizes.add(yaml.safe_load((PIPELINE.parent / "serving" / "deployment.yml").read_text("utf-8"))["instance_type"])
    assert sizes <= per_hour.keys()
