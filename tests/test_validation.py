"""The validator: each check has data that is right, data that is wrong, and none. Splits: shares, labels, no leak."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from slmops_course.tasks import Example, Rejected, load_task
from slmops_course.teachers import near_duplicates
from slmops_course.validation import (
    PLACES,
    SplitError,
    evenness,
    script_of,
    similar_pairs,
    split_examples,
    validate_task,
)

LOW = {"intent": "card_lost", "urgency": "low"}
HIGH = {"intent": "card_lost", "urgency": "high"}
LOST = "I lost my card on the bus"  # train-0, high
WORDS = (
    "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder",
    "marble", "needle", "orange", "pencil", "quartz", "ribbon", "saddle", "tunnel", "urchin", "velvet", "walnut", "zipper",
)  # fmt: skip


@pytest.fixture(scope="module")
def desk():
    return load_task()


def with_rows(task, split, *rows):
    """The task with rows added to a split, each a text and an answer or None; their ids are new-0, new-1, …"""
    added = tuple(Example(f"new-{number}", text, answer) for number, (text, answer) in enumerate(rows))
    return replace(task, splits={**task.splits, split: (*task.splits[split], *added)})


def found(task, check, where):
    (finding,) = [f for f in validate_task(task).findings if (f.check, f.where) == (check, where)]
    return finding


def pairs_of(finding):
    return [(twin.id, twin.other) for twin in finding.twins]


# --- The whole report ---


def test_the_bundled_desk_has_nothing_to_stop_for_and_nothing_to_look_at(desk):
    report = validate_task(desk)
    assert [f.sentence for f in (*report.of("stop"), *report.of("look"))] == []
    assert [fact.messages for fact in report.splits] == [len(desk.splits[split]) for split in PLACES]
    assert all(f.sentence.endswith("nothing to do.") for f in report.findings)


def test_a_report_puts_the_worst_first_and_every_sentence_says_what_was_expected(tiny_task):
    findings = validate_task(with_rows(tiny_task, "test", (LOST, LOW))).findings
    assert [f.severity for f in findings] == sorted((f.severity for f in findings), key=("stop", "look", "fine").index)
    assert {f.severity for f in findings} == {"stop", "look", "fine"}
    assert all(": expected " in f.sentence and "; " in f.sentence for f in findings)


def test_the_text_is_aligned_names_rows_and_is_the_same_every_time(tiny_task):
    task = with_rows(tiny_task, "test", (LOST, LOW))
    text = validate_task(task).text()
    assert text == validate_task(task).text()
    table = text.split("\n\n")[1].splitlines()
    assert table[0].index("characters") == table[1].index("33/44/44")
    assert "stop  leakage, train -> test: 1 of 7 messages nearly repeat one of train, 1 of them exactly" in text
    assert "new-0 ~ train-0 (1.00)" in text
    assert "fine  empty: train, unlabelled, dev, test" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_task_without_messages_is_stopped_by_its_sizes_alone(tiny_task):
    report = validate_task(replace(tiny_task, splits=dict.fromkeys(PLACES, ())))
    assert {(f.check, f.where) for f in report.of("stop") if f.check == "size"} == {
        ("size", "train"), ("size", "dev"), ("size", "test"),
    }  # fmt: skip
    assert {f.check for f in report.of("stop")} == {"size", "missing"}
    assert "train       0" in report.text()


# --- Rows and sizes ---


def test_rejected_rows_are_named_with_their_reasons(tiny_task_folder, tmp_path):
    folder = shutil.copytree(tiny_task_folder, tmp_path / "desk")
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"text": ""}\n' + json.dumps({"text": "hi", "answer": {"intent": "baking", "urgency": "low"}}) + "\n")
    finding = found(load_task(folder), "rejected", "train.jsonl")
    assert finding.severity == "stop"  # two of 14 are more than one in twenty
    assert finding.sentence.startswith("2 of 14 rows were rejected: expected none")
    assert finding.ids[0] == "train.jsonl line 13: it has no text"
    assert "line 14: intent is 'baking'" in finding.ids[1]


def test_a_rejected_row_among_many_is_only_worth_a_look(desk):
    one = replace(desk, rejected=(Rejected("test.jsonl line 3", "it has no text", "{}"),))
    assert found(one, "rejected", "test.jsonl").severity == "look"
    assert found(desk, "rejected", "all files").severity == "fine"


def test_rejected_rows_of_a_csv_file_are_counted_among_all_splits_made_of_it(tiny_task):
    one = replace(tiny_task, rejected=(Rejected("train.csv line 3", "it has no text", "{}"),))
    assert found(one, "rejected", "train.csv").sentence.startswith("1 of 19 rows")


def test_a_small_test_split_is_worth_a_look_and_an_empty_one_stops(desk, tiny_task):
    assert found(desk, "size", "test").severity == "fine"
    assert found(tiny_task, "size", "test").severity == "look"
    assert found(tiny_task, "size", "train").severity == "fine"
    none = replace(tiny_task, splits={**tiny_task.splits, "test": (), "unlabelled": ()})
    assert found(none, "size", "test").severity == "stop"
    assert found(none, "size", "unlabelled").severity == "fine"


def test_a_message_that_shows_nothing_stops(tiny_task):
    finding = found(with_rows(tiny_task, "train", ("\u200b\u200b", LOW), ("🙂", LOW)), "empty", "train")
    assert (finding.severity, finding.ids) == ("stop", ("new-0",))
    assert found(tiny_task, "empty", "train").severity == "fine"


def test_a_very_long_message_is_named(tiny_task):
    finding = found(with_rows(tiny_task, "test", ("refund " * 40, LOW)), "length", "test")
    assert (finding.severity, finding.ids) == ("stop", ("new-0",))  # one of seven is more than one in twenty
    assert "over 176 characters" in finding.sentence  # four times the 44 of the longest training message
    assert found(tiny_task, "length", "test").severity == "fine"


def test_one_long_message_among_many_is_worth_a_look(desk):
    assert found(with_rows(desk, "test", ("refund " * 150, None)), "length", "test").severity == "look"


def test_lengths_are_counted_in_characters_and_with_a_tokenizer_in_tokens(tiny_task):
    def words(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [text.split() for text in texts]}

    texts = ["a", "b c", "d e f g h"]
    task = replace(tiny_task, splits={**tiny_task.splits, "test": tuple(Example(text, text, LOW) for text in texts)})
    (*_, plain), (*_, counted) = validate_task(task).splits, validate_task(task, tokenizer=words).splits
    assert (plain.split, plain.chars, plain.tokens) == ("test", (3, 9, 9), None)
    assert counted.tokens == (2, 5, 5)
    assert "2/5/5" in validate_task(task, tokenizer=words).text()


def test_a_real_tokenizer_serves(tiny_task, tiny_model_folder):
    from transformers import AutoTokenizer

    tokens = validate_task(tiny_task, tokenizer=AutoTokenizer.from_pretrained(tiny_model_folder)).splits[0].tokens
    assert 0 < tokens[0] <= tokens[1] <= tokens[2]


# --- Scripts ---


@pytest.mark.parametrize(
    ("letter", "script"), [("a", "LATIN"), ("É", "LATIN"), ("क", "DEVANAGARI"), ("മ", "MALAYALAM"), ("ж", "CYRILLIC")]
)
def test_a_letter_tells_its_script(letter, script):
    assert script_of(letter) == script


def test_a_message_in_a_script_that_is_rare_in_train_is_named(tiny_task):
    rows = [("मेरा कार्ड खो गया है", LOW), ("खो card", LOW), ("🙂 123", LOW), ("Bonjour à tous", LOW)]
    finding = found(with_rows(tiny_task, "test", *rows), "script", "test")
    assert (finding.severity, finding.ids) == ("look", ("new-0",))
    assert "expected Latin" in finding.sentence
    assert found(tiny_task, "script", "test").severity == "fine"


def test_a_script_that_train_has_too_is_not_rare(tiny_task):
    both = with_rows(with_rows(tiny_task, "train", ("मेरा बिल कहाँ है", LOW)), "test", ("मेरा कार्ड खो गया है", LOW))
    assert found(both, "script", "test").severity == "fine"
    assert list(validate_task(both).splits[0].scripts) == ["LATIN", "DEVANAGARI"]


def test_shares_of_scripts_are_those_of_letters(tiny_task):
    one = replace(tiny_task, splits={**tiny_task.splits, "train": (Example("a", "abc, 123 кот x!", LOW),)})
    assert validate_task(one).splits[0].scripts == {"LATIN": 4 / 7, "CYRILLIC": 3 / 7}


# --- Duplicates, leakage, contradictions ---


def test_exact_and_near_duplicates_inside_a_split_are_named_with_both_ids(tiny_task):
    rows = [("i lost my card   on the BUS", HIGH), (f"{LOST} today", HIGH), ("Nothing alike here", HIGH)]
    finding = found(with_rows(tiny_task, "train", *rows), "duplicates", "train")
    assert pairs_of(finding) == [("new-0", "train-0"), ("new-1", "train-0")]
    assert [twin.exact for twin in finding.twins] == [True, False]
    assert finding.sentence.startswith("2 of 15 messages nearly repeat an earlier one, 1 of them exactly")
    assert finding.severity == "stop"  # more than one in ten
    assert found(tiny_task, "duplicates", "train").twins == ()


def test_a_duplicate_among_many_messages_is_worth_a_look(desk):
    first = desk.splits["train"][0]
    assert found(with_rows(desk, "train", (first.text, first.answer)), "duplicates", "train").severity == "look"


def test_an_exact_copy_in_test_stops_and_names_both_ids(desk):
    first = desk.splits["train"][0]
    finding = found(with_rows(desk, "test", (first.text.upper(), first.answer)), "leakage", "train -> test")
    assert (finding.severity, pairs_of(finding)) == ("stop", [("new-0", first.id)])


def test_a_near_copy_in_test_is_worth_a_look_and_many_stop(desk):
    copies = [(f"{e.text} Oh dear.", e.answer) for e in desk.splits["train"][:40]]
    assert found(with_rows(desk, "test", copies[0]), "leakage", "train -> test").severity == "look"
    assert found(with_rows(desk, "test", *copies), "leakage", "train -> test").severity == "stop"
    assert found(desk, "leakage", "train -> test").severity == "fine"


def test_a_test_message_among_those_the_teacher_labels_is_leakage(tiny_task):
    text = tiny_task.splits["unlabelled"][0].text
    assert found(with_rows(tiny_task, "test", (text, LOW)), "leakage", "unlabelled -> test").severity == "stop"


def test_a_training_message_among_the_unlabelled_is_only_worth_a_look(tiny_task):
    finding = found(with_rows(tiny_task, "unlabelled", (LOST, None)), "leakage", "train -> unlabelled")
    assert (finding.severity, pairs_of(finding)) == ("look", [("new-0", "train-0")])


def test_one_message_with_two_answers_is_a_contradiction(tiny_task):
    finding = found(with_rows(tiny_task, "train", (LOST, LOW)), "contradictions", "train")
    assert (finding.severity, pairs_of(finding)) == ("stop", [("new-0", "train-0")])
    assert found(with_rows(tiny_task, "train", (LOST, HIGH)), "contradictions", "train").severity == "fine"
    assert found(with_rows(tiny_task, "test", (LOST, LOW)), "contradictions", "train -> test").severity == "stop"


def test_a_near_copy_with_another_answer_is_worth_a_look(tiny_task):
    finding = found(with_rows(tiny_task, "train", (f"{LOST} today", LOW)), "contradictions", "train")
    assert (finding.severity, [twin.exact for twin in finding.twins]) == ("look", [False])


def test_similar_pairs_are_those_of_the_teachers_module(desk):
    texts = [e.text for e in desk.splits["train"][:150]]
    texts += [text + " Thanks" for text in texts[:40]] + [text.upper() for text in texts[:10]] + ["PIN", "pin!"]
    mine = sorted((share, *sorted((texts[i], texts[j]))) for i, j, share in similar_pairs(texts))
    assert mine == sorted((share, *sorted(pair)) for share, *pair in near_duplicates(texts))
    assert len(mine) > 40


def test_more_texts_than_one_block_are_compared_with_each_other():
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a < b]
    far = [*texts, texts[0], texts[270]]
    assert [(i, j) for i, j, share in similar_pairs(far, threshold=1.0)] == [(0, len(texts)), (270, len(texts) + 1)]


def test_texts_without_words_are_alike_where_they_are_equal():
    assert similar_pairs(["🙂", "🙁", "🙂", "?!"]) == [(0, 2, 1.0)]
    assert similar_pairs(["one"]) == similar_pairs([]) == []


# --- Labels ---


def test_a_value_that_never_occurs_stops_in_train_and_is_worth_a_look_in_test(tiny_task):
    kept = {s: tuple(e for e in tiny_task.splits[s] if e.answer["intent"] != "card_lost") for s in ("train", "test")}
    task = replace(tiny_task, splits={**tiny_task.splits, **kept})
    assert [(f.severity, f.ids) for f in (found(task, "missing", f"intent in {s}") for s in kept)] == [
        ("stop", ("card_lost",)), ("look", ("card_lost",)),
    ]  # fmt: skip
    assert found(tiny_task, "missing", "intent in train").severity == "fine"
    assert validate_task(task).splits[0].labels["intent"] == {"out_of_scope": 4, "refund_missing": 4, "card_lost": 0}


def test_a_value_with_few_rows_or_a_tenth_of_the_commonest_is_rare(desk, tiny_task):
    assert found(tiny_task, "rare", "intent in train").ids == ("card_lost", "out_of_scope", "refund_missing")
    assert found(desk, "rare", "intent in train").severity == "fine"
    fees = [e for e in desk.splits["train"] if e.answer["intent"] == "fees"]
    fewer = tuple(e for e in desk.splits["train"] if e not in fees[15:])  # 15 of fees, 154 out of scope
    finding = found(replace(desk, splits={**desk.splits, "train": fewer}), "rare", "intent in train")
    assert (finding.severity, finding.ids) == ("look", ("fees",))


@pytest.mark.parametrize(
    ("counts", "value"),
    [([50, 50], 1.0), ([90, 10], 0.469), ([100, 0], 0.0), ([7, 7, 7], 1.0), ([5], 1.0), ([0, 0], 1.0), ([], 1.0)],
)
def test_evenness_of_cases_done_by_hand(counts, value):
    assert evenness(counts) == pytest.approx(value, abs=0.0005)


# --- Splits ---

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}


def messages(label, count, start=0):
    """Messages of one label that share no wording: two words each, another pair for every number."""
    pairs = [(a, b) for a in WORDS for b in WORDS if a < b][start : start + count]
    return [Example(f"{label}-{n}", f"{a} {b}", {"intent": label}) for n, (a, b) in enumerate(pairs)]


def split(examples, shares=SHARES, seed=0):
    return split_examples(examples, shares=shares, label_field="intent", seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_labels_are_kept_and_every_row_is_in_one_split(seed):
    examples = [*messages("often", 200), *messages("seldom", 20, start=200)]
    splits = split(examples, seed=seed)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 176, "dev": 22, "test": 22}
    assert {name: Counter(e.answer["intent"] for e in rows)["seldom"] for name, rows in splits.items()} == {
        "train": 16, "dev": 2, "test": 2,
    }  # fmt: skip
    assert sorted((e for rows in splits.values() for e in rows), key=examples.index) == examples


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_stay_on_one_side(seed):
    examples = messages("a", 60)
    twins = [replace(e, id=f"{e.id}-{n}", text=e.text + "!" * n) for e in examples[:30] for n in (1, 2)]
    splits = split([*examples, *twins], shares={"train": 0.5, "test": 0.5}, seed=seed)
    assert near_duplicates([e.text for e in splits["train"]], [e.text for e in splits["test"]], threshold=0.6) == []
    assert abs(len(splits["train"]) - 60) <= 3


def test_the_same_seed_gives_the_same_splits_in_the_rows_order_and_another_seed_others():
    examples = messages("a", 100)
    assert split(examples, seed=3) == split(examples, seed=3)
    assert split(examples, seed=3) != split(examples, seed=4)
    train = split(examples)["train"]
    assert list(train) == sorted(train, key=examples.index)


def test_splits_of_the_desk_pass_the_validator(desk):
    splits = split(desk.splits["train"])
    again = replace(desk, splits={**splits, "unlabelled": desk.splits["unlabelled"]})
    assert validate_task(again).of("stop") == ()


@pytest.mark.parametrize(
    "shares",
    [{}, {"train": 1.0}, {"train": 0.8, "test": 0.1}, {"train": 1.2, "test": -0.2}, {"train": 1.0, "test": 0.0},
     {"train": 0.97, "test": 0.03}, {"train": float("nan"), "test": 0.5}, {"a": 1 / 3, "b": 1 / 7, "c": 11 / 21},
     {"a": 1 / 8, "b": 3 / 8, "c": 1 / 12, "d": 5 / 12}],
    ids=str,
)  # fmt: skip
def test_impossible_shares_are_refused_in_a_sentence(shares):
    with pytest.raises(SplitError, match=r"The shares are .*: expected two or more that add up to 1 .*; try train 0\.8"):
        split(messages("a", 100), shares=shares)


def test_thirds_are_possible():
    third = {"a": 1 / 3, "b": 0.333, "c": 1 / 3}
    assert [len(rows) for rows in split(messages("a", 90), shares=third).values()] == [30, 30, 30]


def test_a_label_with_too_few_rows_is_named_and_copies_do_not_count():
    few = messages("few", 9, start=100)
    copies = [replace(few[0], id=f"copy-{n}") for n in range(5)]
    with pytest.raises(SplitError, match=r"The label 'few' has 9 messages .* expected at least 10, one a fold"):
        split([*messages("a", 50), *few, *copies])
    assert len(split([*messages("a", 50), *messages("few", 10, start=100)])["test"]) == 6


def test_no_examples_and_examples_without_the_label_are_refused():
    with pytest.raises(SplitError, match="There are no examples: expected labelled messages"):
        split([])
    with pytest.raises(SplitError, match="The example 'u' has no intent"):
        split([*messages("a", 50), Example("u", "not labelled")])
