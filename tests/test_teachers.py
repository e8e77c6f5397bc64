import json

import pytest

from slmops_course import teachers
from slmops_course.chat import RecordedChatModel, TorchChatModel, load_torch
from slmops_course.tasks import Example, Rejected, TaskError, load_task
from slmops_course.teachers import Labelled

TAXI, SELLER, BREAD = (
    "Think I left the card in a taxi",
    "The seller cancelled, when do I get it back?",
    "How do I bake bread?",
)
GOOD = '{"intent":"card_lost","urgency":"high"}'


@pytest.fixture
def labelled(tiny_task):
    """One usable answer, one that is not JSON, one with a value that the schema does not have."""
    recorded = {TAXI: GOOD, SELLER: "Your 'refund' is on its way", BREAD: '{"intent":"baking","urgency":"low"}'}
    return teachers.label_messages(tiny_task.splits["unlabelled"], RecordedChatModel(recorded), tiny_task)


def test_a_usable_answer_is_kept_with_its_message(labelled):
    assert labelled.kept == (Example("unlabelled-0", TAXI, {"intent": "card_lost", "urgency": "high"}),)


def test_an_unusable_answer_is_set_aside_with_the_reason_and_the_reply(labelled):
    by_id = {rejected.where: rejected for rejected in labelled.rejected}
    assert set(by_id) == {"unlabelled-1", "unlabelled-2"}
    assert "not JSON" in by_id["unlabelled-1"].reason
    assert by_id["unlabelled-1"].content == "Your 'refund' is on its way"
    assert by_id["unlabelled-2"].reason == "intent is 'baking', which is not one of its 3 allowed values"


def test_no_messages_give_no_labels(tiny_task):
    assert teachers.label_messages([], RecordedChatModel({}), tiny_task) == Labelled((), ())


def test_labels_come_back_from_disk_as_they_were(labelled, tmp_path):
    teachers.save_labelled(labelled, tmp_path)
    assert teachers.load_labelled(tmp_path) == labelled
    assert json.loads((tmp_path / "data_card.json").read_text("utf-8")) == teachers.data_card(labelled)


def test_the_data_card_counts_labels_and_reasons(labelled):
    card = teachers.data_card(labelled)
    assert (card["kept"], card["rejected"]) == (1, 2)
    assert card["labels"] == {"card_lost": 1}
    assert card["reasons"] == {
        "the reply is not JSON: …": 1,
        "intent is …, which is not one of its 3 allowed values": 1,
    }


def test_reasons_that_differ_only_in_what_they_quote_are_counted_together():
    rejected = tuple(Rejected(str(n), f"the reply is not JSON: {reply!r}", reply) for n, reply in enumerate(("it's", "no")))
    assert teachers.data_card(Labelled((), rejected))["reasons"] == {"the reply is not JSON: …": 2}


def test_the_data_card_of_nothing_is_empty():
    assert teachers.data_card(Labelled((), ())) == {"kept": 0, "rejected": 0, "reasons": {}, "labels": {}}


def write_key(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def test_a_key_is_read_by_id(tmp_path):
    path = write_key(tmp_path / "key.jsonl", {"id": "a", "answer": {"intent": "card_lost"}}, "")
    assert teachers.load_key(path) == {"a": {"intent": "card_lost"}}


def test_a_task_without_a_key_has_an_empty_one(tmp_path):
    assert teachers.load_key(tmp_path / "nowhere.jsonl") == {}


@pytest.mark.parametrize("line", ["{not json", '["a", "b"]', '{"id": "a"}', '{"id": "a", "answer": 3}'])
def test_a_malformed_row_of_a_key_is_named_with_its_line(tmp_path, line):
    path = write_key(tmp_path / "key.jsonl", {"id": "b", "answer": {"intent": "card_lost"}}, line)
    with pytest.raises(TaskError, match=r"key\.jsonl line 2 is .*: expected"):
        teachers.load_key(path)


def test_an_id_twice_in_a_key_is_named(tmp_path):
    row = {"id": "a", "answer": {"intent": "card_lost"}}
    with pytest.raises(TaskError, match="line 2 has the id 'a' again"):
        teachers.load_key(write_key(tmp_path / "key.jsonl", row, row))


def test_the_bundled_key_covers_every_unlabelled_message():
    from slmops_course.tasks import load_task

    task = load_task()
    key = teachers.load_key(task.folder / "unlabelled_key.jsonl")
    assert set(key) == {example.id for example in task.splits["unlabelled"]}


def two_labels():
    answers = ({"intent": "card_lost", "urgency": "high"}, {"intent": "refund_missing", "urgency": "low"})
    return Labelled(tuple(Example(str(n), f"message {n}", answer) for n, answer in enumerate(answers)), ())


def test_right_labels_are_all_right():
    labels = two_labels()
    key = {e.id: dict(e.answer) for e in labels.kept}
    assert teachers.label_accuracy(labels, key) == {"exact_match": 1.0, "intent": 1.0, "urgency": 1.0}


def test_one_wrong_field_makes_the_answer_wrong_and_that_field_alone():
    labels = two_labels()
    key = {e.id: dict(e.answer) for e in labels.kept}
    key["1"]["urgency"] = "high"
    assert teachers.label_accuracy(labels, key) == {"exact_match": 0.5, "intent": 1.0, "urgency": 0.5}


def test_labels_that_are_all_wrong_score_nothing():
    key = {"0": {"intent": "refund_missing", "urgency": "low"}, "1": {"intent": "card_lost", "urgency": "high"}}
    assert teachers.label_accuracy(two_labels(), key) == {"exact_match": 0.0, "intent": 0.0, "urgency": 0.0}


def test_rows_without_a_key_do_not_count():
    assert teachers.label_accuracy(two_labels(), {"0": {"intent": "card_lost", "urgency": "high"}})["exact_match"] == 1.0


def test_without_a_key_or_without_labels_there_is_no_accuracy():
    assert teachers.label_accuracy(two_labels(), {}) == {}
    assert teachers.label_accuracy(Labelled((), ()), {"0": {"intent": "card_lost"}}) == {}


def test_shingles_ignore_case_and_punctuation():
    assert teachers.shingles("Card lost!") == {"card ", "ard l", "rd lo", "d los", " lost"}
    assert teachers.shingles("CARD, lost?") == teachers.shingles("card lost")


def test_shingles_keep_the_vowel_signs_of_indian_scripts():
    assert teachers.shingles("कार्ड!") == {"कार्ड"}
    assert teachers.shingles("पैसा गया") != teachers.shingles("पीसी गयी")


def test_a_text_shorter_than_a_shingle_is_one_shingle():
    assert teachers.shingles("PIN") == {"pin"}
    assert teachers.shingles("") == {""}


def test_a_changed_word_is_a_near_duplicate_and_another_message_is_not():
    texts = ["My card was stolen on the train today", "my card was stolen on the bus today", "How do I bake bread?"]
    ((share, first, second),) = teachers.near_duplicates(texts)
    assert 0.6 <= share < 1
    assert {first, second} == set(texts[:2])


def test_near_duplicates_across_two_lists_leave_out_those_inside_one():
    texts = ["My card was stolen", "My card was stolen!"]
    assert teachers.near_duplicates(texts, ["How do I bake bread?"]) == []
    assert [share for share, _, _ in teachers.near_duplicates(texts, ["MY CARD WAS STOLEN"])] == [1.0, 1.0]


def test_no_texts_have_no_near_duplicates():
    assert teachers.near_duplicates([]) == []
    assert teachers.near_duplicates(["My card was stolen"], []) == []


@pytest.fixture(scope="module")
def loaded(tiny_model_folder):
    return load_torch(tiny_model_folder)


@pytest.fixture
def asks(tiny_task):
    return [tiny_task.messages(text) for text in (TAXI, SELLER, BREAD)]


def test_sampling_at_temperature_zero_always_says_what_the_model_answers(loaded, asks):
    answers = teachers.sample_answers(*loaded, asks, temperature=0, max_new_tokens=6)
    again = teachers.sample_answers(*loaded, asks, temperature=0, seed=1, max_new_tokens=6)
    greedy = TorchChatModel.from_loaded(*loaded, "tiny").generate(asks, max_new_tokens=6)
    assert answers == again == [[reply.text] * 3 for reply in greedy]


def test_sampling_at_a_high_temperature_varies_and_repeats_with_its_seed(loaded, asks):
    ask = {"temperature": 1.5, "count": 4, "max_new_tokens": 6}
    answers = teachers.sample_answers(*loaded, asks, **ask)
    assert [len(row) for row in answers] == [4, 4, 4]
    assert all(len(set(row)) > 1 for row in answers)
    assert answers == teachers.sample_answers(*loaded, asks, **ask)
    assert answers != teachers.sample_answers(*loaded, asks, **ask, seed=1)


def test_a_negative_sampling_temperature_is_refused(loaded, asks):
    with pytest.raises(teachers.TeacherError, match=r"-0\.5: expected 0 or more"):
        teachers.sample_answers(*loaded, asks, temperature=-0.5)


def test_the_recorded_teacher_gives_the_answers_of_the_key():
    task = load_task()
    teacher = teachers.recorded_teacher(task)
    labelled = teachers.label_messages(task.splits["unlabelled"], teacher, task)
    assert labelled.rejected == ()
    assert teachers.label_accuracy(labelled, teachers.load_key(task.folder / "unlabelled_key.jsonl"))["exact_match"] == 1


def test_a_task_without_a_key_has_no_recorded_teacher(tiny_task):
    with pytest.raises(teachers.TeacherError, match=r"no unlabelled_key.jsonl: expected .*course.teacher"):
        teachers.recorded_teacher(tiny_task)
