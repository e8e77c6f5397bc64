"""The release gate says no to each thing that it judges, and yes only when nothing is left to say."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from slmops_course.errors import CourseError
from slmops_course.evaluation import EvaluationError, Outcome
from slmops_course.operations.gate import (
    DEVICES,
    Check,
    Evidence,
    GateError,
    GateReport,
    Limits,
    check_release,
    load_must_pass,
    must_pass_messages,
)
from slmops_course.tasks import load_task

INTENTS = ("card_lost", "refund_missing", "out_of_scope")
LIMITS = Limits(min_must_pass=0)


def outcome(number, *, right=True, valid=True, intent=None):
    expected = {"intent": intent or INTENTS[number % 3], "urgency": "low"}
    answer = (expected if right else {**expected, "urgency": "high"}) if valid else None
    return Outcome(f"test-{number}", f"message {number}", expected, json.dumps(answer), answer, None if valid else "not JSON")


def outcomes(count=150, *, wrong=(), invalid=()):
    return [outcome(n, right=n not in wrong, valid=n not in invalid) for n in range(count)]


def evidence(name="desk 2", **values):
    return Evidence(name, **({"outcomes": outcomes()} | values))


CURRENT = evidence("desk 1")


def judge(task, candidate, current=CURRENT, limits=LIMITS, **changed):
    return check_release(task, candidate, current=current, limits=replace(limits, **changed))


def failed(report):
    return [check.name for check in report.failures]


# --- The score ---


def test_a_candidate_as_good_as_the_current_version_passes(tiny_task):
    report = judge(tiny_task, evidence())
    assert report.passed
    assert [check.name for check in report.checks] == [
        "messages", "exact match", "JSON validity", "exact match against desk 1", "each intent against desk 1",
    ]  # fmt: skip
    assert str(report).startswith("PASSED: desk 2 on tiny_desk, compared with desk 1; 150 messages; any device.\n\n| check |")


def test_a_worse_candidate_is_refused_and_the_report_says_by_how_much(tiny_task):
    report = judge(tiny_task, evidence(outcomes=outcomes(wrong=range(15))))
    assert failed(report) == ["exact match against desk 1"]
    assert report.failures[0].found.startswith("-10.0 points [-1")
    assert report.failures[0].expected == "low end of the interval above -5.0 points"
    assert "REFUSED (exact match against desk 1): desk 2 on tiny_desk" in str(report)


def test_a_difference_within_the_margin_passes_only_when_enough_messages_show_it(tiny_task):
    def of(count):
        """One in fifty lost, whatever the count."""
        return evidence(outcomes=outcomes(count, wrong=range(0, count, 50))), evidence("desk 1", outcomes=outcomes(count))

    few, many = (judge(tiny_task, candidate, current) for candidate, current in (of(100), of(1000)))
    assert (failed(few), failed(many)) == (["exact match against desk 1"], [])


def test_a_much_better_candidate_passes(tiny_task):
    report = judge(tiny_task, evidence(), evidence("desk 1", outcomes=outcomes(wrong=range(60))))
    assert report.passed
    assert "+40.0 points" in str(report)


def test_a_handful_of_messages_proves_nothing(tiny_task):
    report = judge(tiny_task, evidence(outcomes=outcomes(12)), evidence("desk 1", outcomes=outcomes(12)))
    assert failed(report) == ["messages"]
    assert judge(tiny_task, evidence(outcomes=outcomes(12)), None, min_messages=12).passed


def test_a_version_that_is_worse_by_the_margin_is_let_through_in_few_cases_and_an_equal_one_in_most(tiny_task):
    """The one-sided error of the 95 % interval is 2.5 %; two models that differ on one message in ten, 400 messages."""
    rng, passed = np.random.default_rng(0), {}
    for drop in (0.0, 0.05):
        chances, passed[drop] = [0.05 - drop / 2, 0.05 + drop / 2, 0.9], 0
        for _ in range(40):
            change = rng.choice(3, 400, p=chances)  # 0: gained, 1: lost, 2: both right
            new = [outcome(n, right=c != 1, intent="card_lost") for n, c in enumerate(change)]
            old = [outcome(n, right=c != 0, intent="card_lost") for n, c in enumerate(change)]
            report = judge(tiny_task, evidence(outcomes=new), evidence("desk 1", outcomes=old), max_slice_drop=1.0)
            passed[drop] += report.passed
    assert passed[0.05] <= 3
    assert passed[0.0] >= 28


def test_a_first_release_is_judged_on_the_absolute_lines_and_says_so(tiny_task):
    report = judge(tiny_task, evidence(), None, min_score=0.9)
    assert (report.passed, report.current) == (True, None)
    assert [check.name for check in report.checks] == ["messages", "exact match", "JSON validity"]
    assert "a first release: there is no current version to compare with, so only absolute lines are judged" in str(report)
    assert failed(judge(tiny_task, evidence(outcomes=outcomes(wrong=range(16))), None, min_score=0.9)) == ["exact match"]


# --- Slices ---


def test_an_intent_that_falls_is_named_with_its_number_of_messages(tiny_task):
    cards = [n for n in range(150) if n % 3 == 0]
    report = judge(tiny_task, evidence(outcomes=outcomes(wrong=cards[:11])), max_score_drop=0.5)
    assert failed(report) == ["each intent against desk 1"]
    assert report.failures[0].found == "card_lost -22.0 points of 50 messages"
    assert report.failures[0].expected == "none of 3 drops by more than 20.0 points"


def test_an_intent_may_fall_by_just_the_margin(tiny_task):
    cards = [n for n in range(150) if n % 3 == 0]
    report = judge(tiny_task, evidence(outcomes=outcomes(wrong=cards[:10])), max_score_drop=0.5)
    assert report.passed
    assert "card_lost -20.0 points of 50 messages" in str(report)


def test_gains_elsewhere_do_not_make_up_for_a_fallen_intent(tiny_task):
    cards, refunds = ([n for n in range(150) if n % 3 == kind] for kind in (0, 1))
    old = evidence("desk 1", outcomes=outcomes(wrong=refunds))
    assert failed(judge(tiny_task, evidence(outcomes=outcomes(wrong=cards[:20])), old)) == ["each intent against desk 1"]


def test_how_often_equal_models_fall_somewhere_is_as_the_limits_say():
    """25 intents of 20 messages, one message in ten answered differently: net losses of each intent, convolved."""
    one, net = np.array([0.05, 0.9, 0.05]), np.array([1.0])
    for _ in range(20):
        net = np.convolve(net, one)
    for allowed, documented in ((3, 0.17), (4, 0.03)):
        assert 1 - net[: 20 + allowed + 1].sum() ** 25 == pytest.approx(documented, abs=0.01)
    assert "17 % of cases, more than 4 of 20 in 3 %" in Limits.__doc__


# --- JSON, must-pass messages, device ---


def test_replies_that_are_no_answer_are_counted(tiny_task):
    assert judge(tiny_task, evidence(outcomes=outcomes(invalid=range(3)))).passed
    report = judge(tiny_task, evidence(outcomes=outcomes(invalid=range(4))), max_score_drop=1.0)
    assert failed(report) == ["JSON validity"]
    assert report.failures[0].found.startswith("97.3% [")


def test_every_must_pass_message_must_be_answered_exactly(tiny_task):
    assert judge(tiny_task, evidence(must_pass=outcomes(3)), min_must_pass=3).passed
    report = judge(tiny_task, evidence(must_pass=outcomes(9, wrong=range(8))))
    assert failed(report) == ["must-pass messages"]
    assert report.failures[0].found.startswith("8 of 9 wrong: 'message 0' -> ")
    assert report.failures[0].found.endswith(" and 5 more")
    invalid = judge(tiny_task, evidence(must_pass=[outcome(0, valid=False)]))
    assert failed(invalid) == ["must-pass messages"]


def test_a_gate_without_must_pass_messages_is_refused_unless_the_limits_ask_for_none(tiny_task):
    with pytest.raises(GateError, match=r"asked 0 must-pass messages: expected at least 1; ask it those of must_pass_messages"):
        check_release(tiny_task, evidence())


def test_must_pass_messages_are_read_as_a_split_is(tiny_task, tiny_task_folder):
    assert load_must_pass(tiny_task_folder / "test.jsonl", tiny_task) == tiny_task.splits["test"]


def test_a_task_without_a_file_lends_one_dev_message_of_each_label_and_one_with_a_file_is_read(tiny_task, tmp_path):
    lent = must_pass_messages(tiny_task)
    assert {example.answer["intent"] for example in lent} == {e.answer["intent"] for e in tiny_task.splits["dev"]}
    assert len(lent) == len({example.answer["intent"] for example in lent}) <= 5
    assert all(example in tiny_task.splits["dev"] for example in lent)
    clinic = must_pass_messages(load_task("clinic"))
    assert len(clinic) == len({example.answer["intent"] for example in clinic}) == 5
    folder = shutil.copytree(tiny_task.folder, tmp_path / "desk")
    shutil.copy(folder / "test.jsonl", folder / "must_pass.jsonl")
    assert [e.text for e in must_pass_messages(load_task(folder))] == [e.text for e in tiny_task.splits["test"]]
    (folder / "must_pass.jsonl").write_text("", "utf-8")
    with pytest.raises(GateError, match="no must-pass message in"):
        must_pass_messages(load_task(folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no must-pass message in"),
        ('{"text": "hi", "answer": {"intent": "card_lost", "urgency": "soon"}}', r"must_pass\.jsonl line 1 cannot be used"),
        ('{"text": "hi"}', "line 1 cannot be used"),
    ],
)
def test_a_must_pass_file_with_a_bad_line_is_refused_whole(tiny_task, tmp_path, text, complaint):
    path = tmp_path / "must_pass.jsonl"
    good = (tiny_task.folder / "test.jsonl").read_text("utf-8")
    path.write_text(f"{text}\n{good if text else ''}", "utf-8")
    with pytest.raises(GateError, match=complaint):
        load_must_pass(path, tiny_task)
    with pytest.raises(GateError, match="no must-pass message"):
        load_must_pass(tmp_path / "nowhere.jsonl", tiny_task)


@pytest.mark.parametrize(
    ("name", "limit", "line"),
    [("latency_s", 0.5, "latency, median"), ("memory_bytes", 1000, "memory"), ("size_bytes", 1000, "size of files")],
)
def test_a_device_sets_limits(tiny_task, name, limit, line):
    for found, passes in ((limit, True), (limit * 1.1, False), (float("nan"), False)):
        report = judge(tiny_task, evidence(**{name: found}), None, **{f"max_{name}": limit}, device="a watch")
        assert failed(report) == ([] if passes else [line])
        assert str(report).splitlines()[0].endswith("; a watch.")
    with pytest.raises(GateError, match=f"desk 2 has no {name}: expected a measurement, because the limits for a watch"):
        judge(tiny_task, evidence(), None, **{f"max_{name}": limit}, device="a watch")


def test_a_median_does_not_stand_for_a_higher_percentile(tiny_task):
    wanted = {"max_latency_s": 1.0, "latency_percentile": 95}
    with pytest.raises(GateError, match="latency is the 50th percentile: expected at least the 95th"):
        judge(tiny_task, evidence(latency_s=0.1), None, **wanted)
    report = judge(tiny_task, evidence(latency_s=1.1, latency_percentile=99), None, **wanted)
    assert failed(report) == ["latency, 95th percentile"]


def test_every_named_device_asks_for_latency_memory_and_size(tiny_task):
    measured = evidence(latency_s=0.2, memory_bytes=400_000_000, size_bytes=90_000_000, must_pass=outcomes(2))
    for limits in DEVICES.values():
        assert check_release(tiny_task, measured, limits=limits).passed
        with pytest.raises(GateError, match="has no"):
            check_release(tiny_task, replace(measured, memory_bytes=None), limits=limits)


# --- Bad input ---


def test_nothing_to_judge_is_an_error(tiny_task):
    with pytest.raises(GateError, match="desk 2 has no outcomes to judge"):
        judge(tiny_task, evidence(outcomes=[]), None)
    with pytest.raises(CourseError):
        judge(tiny_task, evidence(), evidence("desk 1", outcomes=[]))


def test_two_versions_scored_on_different_messages_are_not_compared(tiny_task):
    others = [replace(o, id=f"other-{o.id}") for o in outcomes()]
    relabelled = [replace(o, expected={"intent": "card_lost", "urgency": "high"}) for o in outcomes()]
    for different in (outcomes(149), others, relabelled, outcomes()[::-1]):
        with pytest.raises((GateError, EvaluationError), match="that are not the same or do not expect the same answers"):
            judge(tiny_task, evidence(), evidence("desk 1", outcomes=different))


@pytest.mark.parametrize("name", ["max_score_drop", "max_slice_drop", "min_score", "min_json_valid"])
def test_a_limit_that_is_no_share_is_refused(name):
    for value in (-0.1, 1.1, 5, float("nan")):
        with pytest.raises(GateError, match=f"{name} is .*: expected a share between 0 and 1"):
            Limits(**{name: value})


# --- The report ---


def test_a_report_comes_back_from_its_json(tiny_task):
    candidate = evidence(outcomes=outcomes(wrong=range(30)), model_digest="ab" * 32)
    report = judge(tiny_task, candidate, replace(CURRENT, model_digest="cd" * 32))
    again = GateReport.from_json(report.to_json())
    assert again == report
    assert (again.model_digest, again.current_digest) == ("ab" * 32, "cd" * 32)
    assert not again.passed


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "{}", '{"checks": [{"name": "a"}]}', '{"checks": []}', "null", '{"checks": 3}']
)
def test_what_is_no_report_is_refused(text):
    with pytest.raises(GateError, match="This is no gate report"):
        GateReport.from_json(text)


def test_a_report_whose_lines_do_not_say_whether_they_passed_is_refused(tiny_task):
    text = judge(tiny_task, evidence(), None).to_json().replace('"passed": true', '"passed": "no"')
    with pytest.raises(GateError, match="passed is neither true nor false"):
        GateReport.from_json(text)


def test_a_report_without_lines_has_not_passed():
    report = GateReport("desk 2", None, "t", "d", 0, None, None, ())
    assert (report.passed, report.failures) == (False, ())
    assert str(report).startswith("REFUSED (there is no line)")


def test_a_reply_cannot_break_the_table():
    report = GateReport("desk 2", None, "t", "d", 1, None, None, (Check("a | b", "x\n| y \\| z |", "e", False),))
    rows = str(report).splitlines()[2:]
    assert [row.count("|") for row in rows] == [5, 5, 5]
