"""Filters set labels aside with their reasons: each has a row that it must keep and one that it must not."""

import pytest

from slmops_course import filters
from slmops_course.evaluation import EvaluationError
from slmops_course.tasks import Example, Rejected
from slmops_course.teachers import Labelled, data_card

LOST, REFUND = {"intent": "card_lost", "urgency": "high"}, {"intent": "refund_missing", "urgency": "low"}
TAXI = "I left my card in the taxi last night"


@pytest.fixture
def labelled():
    kept = (
        Example("a", TAXI, LOST), Example("b", "Where is the money for the shoes?", REFUND),
        Example("c", "My purse was stolen on the tram", LOST),
    )  # fmt: skip
    return Labelled(kept, (Rejected("x", "the reply is not JSON: ''", ""),))


def ids(labelled):
    return [example.id for example in labelled.kept]


def test_unsure_labels_are_set_aside_and_unknown_ones_kept(labelled):
    left = filters.drop_unsure(labelled, {"a": 0.9, "b": 0.59}, least=0.6)
    assert ids(left) == ["a", "c"]
    assert [r.where for r in left.rejected] == ["x", "b"]
    assert "less than 60% sure" in left.rejected[-1].reason
    assert ids(filters.drop_unsure(labelled, {"a": 0.6}, least=0.6)) == ["a", "b", "c"]


def test_sampled_answers_outvote_a_label(labelled, tiny_task):
    same, other = tiny_task.target(LOST), tiny_task.target(REFUND)
    samples = {"a": [same, same, other], "b": ["nonsense", same, same], "c": [same, other, other]}
    assert ids(filters.drop_disagreed(labelled, samples, tiny_task)) == ["a"]
    assert ids(filters.drop_disagreed(labelled, samples, tiny_task, least=0.3)) == ["a", "c"]
    assert ids(filters.drop_disagreed(labelled, {}, tiny_task)) == ["a", "b", "c"]


def test_copies_of_each_other_and_of_test_messages_are_set_aside(labelled):
    shouted = Labelled((*labelled.kept, Example("d", TAXI.upper() + "!", LOST)), ())
    assert ids(filters.drop_copies(shouted)) == ["a", "b", "c"]
    assert ids(filters.drop_copies(labelled, ["my purse was stolen on the tram."])) == ["a", "b"]
    assert ids(filters.drop_copies(labelled, [TAXI, TAXI])) == ["b", "c"], "copies among the others do not count"


def test_a_second_teacher_contests_only_what_it_labelled_otherwise(labelled):
    second = Labelled((Example("a", TAXI, LOST), Example("b", "", LOST)), ())
    assert ids(filters.drop_contested(labelled, second)) == ["a", "c"]


def test_no_row_is_lost_and_reasons_are_counted(labelled):
    left = filters.drop_copies(filters.drop_unsure(labelled, {"b": 0.1, "c": 0.2}, least=0.5), [TAXI])
    assert len(left.kept) + len(left.rejected) == 4
    assert list(data_card(left)["reasons"].values()) == [2, 1, 1]


def test_the_value_of_a_filter_is_measured_against_the_key(labelled):
    key = {"a": LOST, "b": LOST, "c": LOST}
    after = filters.drop_unsure(labelled, {"b": 0.1, "c": 0.2}, least=0.5)
    assert filters.filter_value(labelled, after, key) == {"kept": 1 / 3, "right": 1, "wrong caught": 1, "right lost": 0.5}
    with pytest.raises(EvaluationError, match="left none: expected some"):
        filters.filter_value(labelled, Labelled((), ()), key)
