"""Drift is seen where messages really change, and not where only chance speaks."""

import json
import math
import threading
from collections import Counter

import numpy as np
import pytest

from slmops_course.evaluation import INVALID, judge
from slmops_course.operations.drift import (
    LARGE,
    NEW_PRODUCT,
    Drift,
    DriftError,
    DriftMonitor,
    Reference,
    confidence_drift,
    count_lengths,
    embedding_drift,
    length_edges,
    load_new_product,
    make_reference,
    messages_needed,
    population_stability,
    stability_limit,
    word_vectors,
)
from slmops_course.operations.monitoring import Metrics
from slmops_course.tasks import Example, TaskError, load_task
from slmops_course.validation import NEAR, similar_pairs

EVEN = {f"intent {n}": 20 for n in range(26)}  # 520 messages, as the desk's test split has


@pytest.fixture(scope="module")
def desk():
    return load_task()


@pytest.fixture(scope="module")
def ring(desk):
    return load_new_product(desk)


@pytest.fixture(scope="module")
def reference(desk):
    """The desk's test messages, answered rightly, and as sure as a good model is."""
    examples = desk.splits["test"]
    outcomes = judge(desk, examples, [desk.target(example.answer) for example in examples])
    return make_reference(desk, outcomes, confidences=sure(len(outcomes), seed=0))


def sure(count: int, *, seed: int, mean: float = 0.9) -> list[float]:
    return np.random.default_rng(seed).beta(9 * mean / (1 - mean), 9, count).tolist()


def kinds(found) -> set[str]:
    return {drift.kind for drift in found if drift.drifted}


# --- Population stability ---


def test_the_index_is_the_sum_over_the_categories():
    p, q = np.array([50.5, 50.5]) / 101, np.array([80.5, 20.5]) / 101
    expected = float(((q - p) * np.log(q / p)).sum())
    assert population_stability({"a": 50, "b": 50}, {"a": 80, "b": 20}) == pytest.approx(expected)
    assert expected == pytest.approx(0.406, abs=0.001)


def test_the_index_of_equal_shares_is_zero_and_it_knows_no_direction():
    assert population_stability({"a": 50, "b": 50}, {"b": 50, "a": 50}) == 0
    assert population_stability({"a": 9, "b": 1}, {"a": 1, "b": 9}) == population_stability({"a": 1, "b": 9}, {"a": 9, "b": 1})


def test_a_category_that_is_new_counts_and_one_that_is_gone_too():
    grown = population_stability({"a": 100}, {"a": 80, "ring": 20})
    assert grown > LARGE
    assert population_stability({"a": 80, "ring": 20}, {"a": 100}) == pytest.approx(grown)


@pytest.mark.parametrize(("expected", "observed"), [({}, {"a": 1}), ({"a": 1}, {}), ({"a": 1}, {"a": 0})])
def test_nothing_is_no_change_of_nothing(expected, observed):
    with pytest.raises(DriftError, match="expected some of both"):
        population_stability(expected, observed)


def unchanged_windows(messages: int, *, windows: int, seed: int) -> list[float]:
    """The index of windows drawn from the very shares they are compared with."""
    rng, names = np.random.default_rng(seed), sorted(EVEN)
    draws = rng.multinomial(messages, [1 / len(names)] * len(names), windows)
    sides = rng.multinomial(sum(EVEN.values()), [1 / len(names)] * len(names), windows)
    return [
        population_stability(dict(zip(names, side.tolist(), strict=True)), dict(zip(names, draw.tolist(), strict=True)))
        for side, draw in zip(sides, draws, strict=True)
    ]


def test_the_customary_limit_cries_wolf_over_small_windows_and_ours_does_not():
    values = unchanged_windows(100, windows=2000, seed=7)
    limit = stability_limit(EVEN, 100)
    assert np.mean([value > LARGE for value in values]) > 0.5
    assert np.mean([value > limit for value in values]) < 0.005


def test_chance_passes_a_limit_as_often_as_its_level_says():
    limit = stability_limit(EVEN, 60, level=0.95)
    assert limit > LARGE
    assert np.mean([value > limit for value in unchanged_windows(60, windows=2000, seed=8)]) == pytest.approx(0.05, abs=0.02)


def test_many_messages_leave_the_customary_limit():
    assert stability_limit(EVEN, 200) > stability_limit(EVEN, 300) > LARGE == stability_limit(EVEN, 5000)


def test_how_many_messages_are_needed_agrees_with_the_simulation():
    needed = messages_needed(sum(EVEN.values()), len(EVEN))
    assert stability_limit(EVEN, needed) == pytest.approx(LARGE, rel=0.05)
    assert messages_needed(516, 26) == 356
    assert messages_needed(200, 26) == math.inf, "too few expected messages"


def test_lengths_fall_into_bins_that_are_about_even():
    assert length_edges(range(1, 101), bins=4) == [25.75, 50.5, 75.25]
    assert count_lengths(range(1, 101), length_edges(range(1, 101), bins=4)) == {"0": 25, "1": 25, "2": 25, "3": 25}
    assert length_edges([5] * 50) == [5.0]
    assert count_lengths([], [5.0]) == {"0": 0, "1": 0}


# --- Confidence and vectors ---


def test_a_model_less_sure_than_before_is_noticed():
    found = confidence_drift([0.9] * 50, [0.9] * 25 + [0.2] * 25)
    assert (found.statistic, found.messages) == (0.5, 50)
    assert found.limit == pytest.approx(0.39, abs=0.001)
    assert found.drifted
    assert found.ratio == pytest.approx(0.5 / found.limit)
    assert str(found) == "confidence: 0.500 over 50 messages, limit 0.390: drift"


def test_a_model_as_sure_as_before_is_left_alone():
    assert not any(confidence_drift(sure(500, seed=1), sure(200, seed=seed)).drifted for seed in range(2, 42))


@pytest.mark.parametrize("few", [[], [0.5] * 19])
def test_few_confidences_or_vectors_are_not_compared(few):
    with pytest.raises(DriftError, match="expected at least 20 of each"):
        confidence_drift([0.9] * 50, few)
    with pytest.raises(DriftError, match="expected at least 20 of each"):
        embedding_drift(np.ones((50, 3)), np.ones((len(few), 3)))


def test_vectors_from_elsewhere_are_noticed():
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(100, 8)), rng.normal(size=(60, 8)) + 1
    assert embedding_drift(here, there).drifted
    wider = embedding_drift(here, 3 * rng.normal(size=(60, 8)))
    assert wider.drifted, "the mean is the same, the spread is not"


def test_vectors_from_the_same_place_pass_as_often_as_the_level_says():
    rng = np.random.default_rng(1)
    found = [embedding_drift(rng.normal(size=(60, 8)), rng.normal(size=(40, 8)), level=0.9, seed=seed) for seed in range(60)]
    assert 1 <= sum(drift.drifted for drift in found) <= 14
    assert abs(np.mean([drift.statistic for drift in found])) < 0.2 * np.mean([drift.limit for drift in found])


def test_the_same_vectors_everywhere_are_no_drift():
    assert not embedding_drift(np.ones((30, 4)), np.ones((30, 4))).drifted


def test_words_make_vectors_of_length_one_whatever_the_case_and_order():
    vectors = word_vectors(["Lost my card", "card LOST", "refund missing"])
    assert vectors.shape == (3, 2048)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1])
    assert vectors[0] @ vectors[1] == pytest.approx(1)
    assert vectors[0] @ vectors[2] == pytest.approx(0)


# --- The monitor, on messages that really change ---


def feed(monitor, examples, **options):
    for example, confidence in zip(examples, sure(len(examples), **options), strict=True):
        monitor.add(example.text, example.answer["intent"], confidence)


@pytest.fixture(scope="module")
def ordinary(desk):
    """Messages of the desk as they came before, not those of the reference, with what their writers had in mind."""
    lines = (desk.folder / "unlabelled_key.jsonl").read_text("utf-8").splitlines()
    answers = {row["id"]: row["answer"] for row in map(json.loads, lines)}
    return [Example(example.id, example.text, answers[example.id]) for example in desk.splits["unlabelled"]]


def test_ordinary_messages_are_no_drift_of_any_kind(reference, ordinary):
    for start in range(0, 1000, 200):
        monitor = DriftMonitor(reference, window=200)
        feed(monitor, ordinary[start : start + 200], seed=start + 1)
        found = monitor.check()
        assert [drift.kind for drift in found] == ["labels", "lengths", "confidence", "words"]
        assert kinds(found) == set(), "\n".join(map(str, found))


def test_a_new_product_is_noticed_by_its_words_when_a_quarter_of_the_messages_are_about_it(reference, ordinary, ring):
    monitor = DriftMonitor(reference, window=120)
    feed(monitor, ordinary[:120], seed=1)
    assert kinds(monitor.check()) == set(), "nothing new yet"
    for example in ring["train"]:
        monitor.add(example.text, example.answer["intent"])
    drift = next(drift for drift in monitor.check() if drift.kind == "words")
    assert drift.drifted, str(drift)


def test_an_incident_is_noticed_by_its_label(reference, ordinary):
    monitor = DriftMonitor(reference, window=100)
    feed(monitor, ordinary[:65], seed=1)
    feed(monitor, [e for e in ordinary[65:] if e.answer["intent"] == "top_up_failed"][:35], seed=2)
    assert "labels" in kinds(monitor.check())


def test_long_messages_and_a_doubting_model_are_noticed_each_by_its_figure(reference, ordinary):
    monitor = DriftMonitor(reference, window=200, embed=None)
    long = sorted(ordinary, key=lambda example: len(example.text))[-200:]
    feed(monitor, long, seed=1, mean=0.6)
    assert {"lengths", "confidence"} <= kinds(monitor.check())
    assert "words" not in {drift.kind for drift in monitor.check()}


def test_replies_that_are_no_answers_are_drift_of_labels(reference):
    monitor = DriftMonitor(reference, window=50, embed=None)
    for length in reference.lengths[:50]:
        monitor.add("x" * length, INVALID)
    assert kinds(monitor.check()) == {"labels"}


def test_nothing_is_said_before_the_window_is_full(reference, ordinary):
    monitor = DriftMonitor(reference, window=60)
    assert monitor.check() == []
    feed(monitor, ordinary[:59], seed=1)
    assert monitor.check() == []
    feed(monitor, ordinary[59:60], seed=2)
    assert len(monitor.check()) == 4
    assert monitor.check() is monitor.check(), "without a new message nothing is computed again"


def test_old_messages_leave_the_window(reference, ordinary):
    monitor = DriftMonitor(reference, window=100, embed=None)
    for _ in range(100):
        monitor.add("x", INVALID)
    assert kinds(monitor.check()) == {"labels", "lengths"}
    feed(monitor, ordinary[:100], seed=1)
    assert kinds(monitor.check()) == set()


def test_it_keeps_no_message_and_not_more_than_its_window(reference):
    monitor = DriftMonitor(reference, window=20)
    for number in range(100):
        monitor.add(f"xylophone-quartz {number}", INVALID)
    assert "xylophone" not in repr(vars(monitor))
    assert {name: len(kept) for name, kept in monitor._kept.items()} == {
        "labels": 20, "lengths": 20, "confidences": 0, "vectors": 20
    }  # fmt: skip


def test_many_threads_may_add(reference):
    monitor = DriftMonitor(reference, window=400, embed=None)
    threads = [threading.Thread(target=lambda: [monitor.add("x", INVALID) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.check()[0].messages == 400


def test_the_metrics_show_what_the_latest_monitor_sees(desk, reference, ordinary):
    metrics = Metrics(desk)
    first = DriftMonitor(reference, window=50, metrics=metrics)
    assert metrics.value("slmops_drift_ratio", kind="labels") is None
    feed(first, ordinary[:50], seed=1)
    shown = {drift.kind: metrics.value("slmops_drift_ratio", kind=drift.kind) for drift in first.check()}
    assert shown == {drift.kind: drift.ratio for drift in first.check()}
    assert metrics.value("slmops_drift_statistic", kind="labels") == first.check()[0].statistic
    DriftMonitor(reference, window=50, metrics=metrics)
    assert metrics.value("slmops_drift_ratio", kind="labels") is None, "after a new version the watch begins anew"


def test_a_reference_needs_outcomes_and_a_window_some_messages(desk, reference):
    with pytest.raises(DriftError, match="no outcomes to compare with"):
        make_reference(desk, [])
    with pytest.raises(DriftError, match="The window is 19 messages: expected at least 20"):
        DriftMonitor(reference, window=19)


def test_a_reference_counts_what_the_model_said_and_not_what_is_right(tiny_task):
    examples = tiny_task.splits["test"]
    outcomes = judge(tiny_task, examples, ['{"intent":"card_lost","urgency":"low"}'] * 5 + ["nonsense"])
    found = make_reference(tiny_task, outcomes, embed=None)
    assert found == Reference(
        {"card_lost": 5, "refund_missing": 0, "out_of_scope": 0, INVALID: 1}, tuple(len(e.text) for e in examples)
    )


def test_at_its_limit_a_figure_is_no_drift():
    assert not Drift("labels", 0.25, 0.25, 100).drifted
    assert Drift("labels", 0.26, 0.25, 100).drifted


# --- The new product's messages ---


def test_the_new_products_messages_are_good_and_half_are_kept_for_testing(desk, ring):
    assert {split: len(examples) for split, examples in ring.items()} == {"train": 30, "test": 30}
    everything = [*ring["train"], *ring["test"]]
    assert len({example.id for example in everything}) == 60
    assert [e.id for e in everything if desk.check_message(e.text) != e.text or not e.text.isprintable()] == []
    assert {example.answer["product"] for example in everything} == {"card"}
    counts = {split: Counter(e.answer["intent"] for e in examples) for split, examples in ring.items()}
    assert counts["train"] == counts["test"]
    sheet = NEW_PRODUCT.with_suffix(".md").read_text("utf-8")
    assert [intent for intent, count in counts["train"].items() if f"| {intent} | {count} | {count} |" not in sheet] == []


def test_no_message_of_the_new_product_nearly_repeats_another(desk, ring):
    new = [e.text for examples in ring.values() for e in examples]
    old = [e.text for examples in desk.splits.values() for e in examples]
    assert [(i, j) for i, j, _ in similar_pairs([*old, *new], threshold=NEAR - 0.1) if j >= len(old)] == []


def test_every_intent_of_the_new_product_has_the_urgency_rules_of_the_desk(ring):
    usual = {"card_lost": "high", "unknown_charge": "high", "limits": "low", "fees": "low"}
    calm = ("no hurry", "no rush", "whenever", "take all the time", "not pressing", "only asking")
    examples = [e for split in ring.values() for e in split]
    for example in examples:
        is_calm = any(word in example.text.lower() for word in calm)
        expected = "low" if is_calm else usual.get(example.answer["intent"], "normal")
        stated = example.answer["urgency"] == "high" != expected  # the message itself says why it cannot wait
        assert example.answer["urgency"] == expected or stated, example.text
    assert 8 <= sum(example.answer["urgency"] == "high" for example in examples) <= 30


def test_a_task_with_another_schema_cannot_take_the_new_product(tiny_task):
    with pytest.raises(TaskError, match=r"ring-train-00 does not fit the task tiny_desk"):
        load_new_product(tiny_task)


def test_the_file_holds_nothing_but_rows():
    rows = [json.loads(line) for line in NEW_PRODUCT.read_text("utf-8").splitlines()]
    assert {tuple(row) for row in rows} == {("id", "split", "text", "answer")}
