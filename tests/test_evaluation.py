"""Metrics: each has a case known right, one known wrong, and an empty one."""

import numpy as np
import pytest

from slmops_course import evaluation
from slmops_course.evaluation import EvaluationError, bootstrap, judge, macro_f1, mean_score, score_outcomes


@pytest.fixture
def examples(tiny_task):
    return tiny_task.splits["test"]


def right_replies(task, examples):
    return [task.target(example.answer) for example in examples]


def test_right_replies_score_one_on_every_metric(tiny_task, examples):
    scores = score_outcomes(tiny_task, judge(tiny_task, examples, right_replies(tiny_task, examples)))
    assert {score.value for score in scores.values()} == {1.0}
    assert set(scores) == {"exact_match", "intent", "urgency", "json_valid", "intent_macro_f1", "out_of_scope"}


def test_replies_that_are_no_json_score_zero_on_every_metric(tiny_task, examples):
    outcomes = judge(tiny_task, examples, ["I cannot help with that."] * len(examples))
    assert {score.value for score in score_outcomes(tiny_task, outcomes).values()} == {0.0}
    assert all("not JSON" in outcome.problem for outcome in outcomes)


def test_one_wrong_field_costs_the_exact_match_and_that_field_only(tiny_task, examples):
    replies = right_replies(tiny_task, examples)
    other = {"low": "high", "high": "low"}[examples[0].answer["urgency"]]
    replies[0] = tiny_task.target({**examples[0].answer, "urgency": other})
    scores = score_outcomes(tiny_task, judge(tiny_task, examples, replies))
    share = 1 - 1 / len(examples)
    assert scores["exact_match"].value == scores["urgency"].value == pytest.approx(share)
    assert scores["intent"].value == scores["json_valid"].value == 1.0


def test_nothing_to_score_is_refused(tiny_task):
    with pytest.raises(EvaluationError, match="no outcomes to score"):
        score_outcomes(tiny_task, [])


def test_macro_f1_of_a_case_done_by_hand():
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)


def test_macro_f1_leaves_out_labels_that_nobody_expected():
    assert macro_f1(["a", "a"], ["a", "b"]) == pytest.approx(2 / 3)


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for size in (1, 7, 300):
        expected, found = (rng.choice(list("abcdefg"), size).tolist() for _ in range(2))
        reference = f1_score(expected, found, labels=sorted(set(expected)), average="macro", zero_division=0)
        assert macro_f1(expected, found) == pytest.approx(reference)


def test_macro_f1_counts_a_label_that_is_never_found_as_zero():
    assert macro_f1(["a", "b"], ["a", "a"]) == pytest.approx((2 / 3) / 2)


def test_an_interval_of_half_the_rows_right_is_that_of_a_binomial():
    score = mean_score([True] * 200 + [False] * 200)
    half_width = 1.96 * (0.25 / 400) ** 0.5
    assert score.value == 0.5
    assert score.low == pytest.approx(0.5 - half_width, abs=0.01)
    assert score.high == pytest.approx(0.5 + half_width, abs=0.01)


def test_the_generic_bootstrap_agrees_with_the_binomial_one():
    hits = [i % 3 == 0 for i in range(300)]
    generic = bootstrap(lambda rows: sum(hits[i] for i in rows) / len(rows), len(hits))
    direct = mean_score(hits)
    assert generic.value == direct.value
    assert generic.low == pytest.approx(direct.low, abs=0.02)
    assert generic.high == pytest.approx(direct.high, abs=0.02)


def test_the_same_seed_gives_the_same_interval():
    assert mean_score([True, False, True], seed=3) == mean_score([True, False, True], seed=3)


def test_a_paired_difference_sees_only_the_rows_that_changed(tiny_task, examples):
    first = judge(tiny_task, examples, right_replies(tiny_task, examples))
    second = judge(tiny_task, examples, ["?", *right_replies(tiny_task, examples)[1:]])
    assert evaluation.paired_difference(first, second).value == pytest.approx(-1 / len(examples))
    assert evaluation.paired_difference(first, first).high == 0.0


def test_models_scored_on_different_messages_are_not_compared(tiny_task, examples):
    outcomes = judge(tiny_task, examples, right_replies(tiny_task, examples))
    with pytest.raises(EvaluationError, match="different messages"):
        evaluation.paired_difference(outcomes, outcomes[1:])


def test_slices_come_worst_first(tiny_task, examples):
    replies = [
        "?" if example.answer["intent"] == "refund_missing" else tiny_task.target(example.answer) for example in examples
    ]
    slices = evaluation.slice_scores(tiny_task, judge(tiny_task, examples, replies))
    assert next(iter(slices)) == "refund_missing"
    assert slices["refund_missing"].value == 0.0
    assert slices["card_lost"].value == 1.0


def test_outcomes_survive_a_round_trip_to_disk(tiny_task, examples):
    outcomes = judge(tiny_task, examples, ["a\u2028b\nc", *right_replies(tiny_task, examples)[1:]])
    assert evaluation.outcomes_from_json(evaluation.outcomes_to_json(outcomes)) == outcomes
