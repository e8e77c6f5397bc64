import csv
import json
import random
import shutil
from collections import Counter

import pytest

from slmops_course.artifacts import Store, content_digest
from slmops_course.tasks import (
    MAX_MESSAGE_CHARS,
    SPLITS,
    Example,
    TaskError,
    answer_problem,
    load_task,
    read_rows,
    task_inputs,
    write_csv_task,
)

GOOD_ANSWER = '"answer": {"intent": "card_lost", "urgency": "low"}'


@pytest.fixture(scope="module")
def desk():
    """The bundled task."""
    return load_task()


@pytest.fixture
def folder(tmp_path, tiny_task_folder):
    """A copy of the tiny task that a test may damage."""
    return shutil.copytree(tiny_task_folder, tmp_path / "my_desk")


# --- Loading a task folder ---


def test_the_bundled_task_loads_without_a_rejected_row(desk):
    assert desk.name == "support_desk"
    assert desk.rejected == ()
    assert list(desk.fields) == ["intent", "urgency", "product"]
    assert desk.label_field == "intent"
    assert desk.out_of_scope_label == "out_of_scope"
    assert desk.prompt.count("\n") == 0 < len(desk.prompt)
    assert all(desk.splits[split] for split in SPLITS)


def test_a_task_folder_loads_with_its_rows_in_order(tiny_task):
    assert tiny_task.fields == {"intent": ("card_lost", "refund_missing", "out_of_scope"), "urgency": ("low", "high")}
    assert {split: len(rows) for split, rows in tiny_task.splits.items()} == {
        "train": 12, "dev": 3, "test": 6, "unlabelled": 3,
    }  # fmt: skip
    assert tiny_task.splits["train"][0] == Example(
        "train-0", "I lost my card on the bus", {"intent": "card_lost", "urgency": "high"}
    )
    assert [row.answer for row in tiny_task.splits["unlabelled"]] == [None] * 3
    assert tiny_task.name == "tiny_desk"


def test_a_schema_is_closed_even_if_its_file_is_not(folder):
    task = load_task(folder)
    assert task.schema["required"] == ["intent", "urgency"]
    assert task.schema["additionalProperties"] is False


def test_a_task_may_have_no_out_of_scope_label_and_no_unlabelled_rows(folder):
    (folder / "schema.json").write_text('{"properties": {"mood": {"enum": ["good", "bad"]}}}', "utf-8")
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text('{"text": "hello", "answer": {"mood": "good"}}\n', "utf-8")
    (folder / "unlabelled.jsonl").unlink()
    task = load_task(folder)
    assert task.out_of_scope_label is None
    assert task.splits["unlabelled"] == ()
    assert "unlabelled.jsonl" not in task_inputs(task)


def test_the_inputs_of_an_artifact_are_the_files_of_the_task(tiny_task):
    assert set(task_inputs(tiny_task)) == {"schema.json", "prompt.txt", *(f"{split}.jsonl" for split in SPLITS)}
    assert all(path.is_file() for path in task_inputs(tiny_task).values())


BAD_ROWS = {
    "bad JSON": (b'{"id": "x", "text": "hi"', "it is not JSON in UTF-8"),
    "bad UTF-8": (b'{"id": "x", "text": "caf\xe9", ' + GOOD_ANSWER.encode() + b"}", "it is not JSON in UTF-8"),
    "nested without end": (b"[" * 100_000, "it is not JSON in UTF-8"),
    "a list": (b'["hi"]', "it is a JSON list, expected an object with text"),
    "no text": (b'{"id": "x", ' + GOOD_ANSWER.encode() + b"}", "it has no text"),
    "blank text": (b'{"id": "x", "text": "  ", ' + GOOD_ANSWER.encode() + b"}", "it has no text"),
    "a number as text": (b'{"id": "x", "text": 7, ' + GOOD_ANSWER.encode() + b"}", "it has no text"),
    "half a character": (b'{"id": "x", "text": "\\ud83d", ' + GOOD_ANSWER.encode() + b"}", "half a character"),
    "too long": (
        b'{"id": "x", "text": "' + b"a" * 2001 + b'", ' + GOOD_ANSWER.encode() + b"}",
        "its text has 2,001 characters, at most 2,000 are allowed",
    ),
    "no answer": (b'{"id": "x", "text": "hi"}', "the answer is a JSON NoneType, expected an object"),
    "an answer as text": (b'{"id": "x", "text": "hi", "answer": "card_lost"}', "the answer is a JSON str"),
    "missing field": (b'{"id": "x", "text": "hi", "answer": {"intent": "card_lost"}}', "the answer has no urgency"),
    "unknown field": (
        b'{"id": "x", "text": "hi", "answer": {"intent": "card_lost", "urgency": "low", "mood": "sad"}}',
        "an unknown field 'mood'",
    ),
    "unknown label": (
        b'{"id": "x", "text": "hi", "answer": {"intent": "card_eaten", "urgency": "low"}}',
        "intent is 'card_eaten', which is not one of its 3 allowed values",
    ),
    "duplicate id": (
        b'{"id": "train-3", "text": "hi", ' + GOOD_ANSWER.encode() + b"}",
        "the id 'train-3' is there twice",
    ),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_the_good_ones_are_used(folder, tiny_task, line, reason):
    path = folder / "train.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:5], line, *lines[5:]]))

    task = load_task(folder)

    (rejected,) = task.rejected
    assert rejected.where == "train.jsonl line 6"
    assert reason in rejected.reason
    assert rejected.content == line.decode("utf-8", "replace")
    assert task.splits == tiny_task.splits


def test_a_row_without_an_id_gets_its_line_number_and_may_clash_with_another(tmp_path):
    lines = '{"text": "a"}\n\n{"text": "c"}\n{"id": 5, "text": "d"}\n{"text": "e"}\n'
    (tmp_path / "rows.jsonl").write_text(lines, "utf-8")
    rows, rejected = read_rows(tmp_path / "rows.jsonl", fields=None)
    assert [(row.id, row.text) for row in rows] == [("1", "a"), ("3", "c"), ("5", "d")]
    assert [(bad.where, bad.reason) for bad in rejected] == [("rows.jsonl line 5", "the id 5 is there twice")]


def test_rows_may_end_in_windows_line_ends_and_hold_other_line_separators(tmp_path):
    lines = '{"id": "a", "text": "one\u2028two"}\r\n{"id": "b", "text": "b"}\r\n'
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    rows, rejected = read_rows(tmp_path / "rows.jsonl", fields=None)
    assert [row.text for row in rows] == ["one\u2028two", "b"]
    assert rejected == []


def test_every_bad_row_of_every_split_is_kept(folder):
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "a", encoding="utf-8") as file:
            file.write("nonsense\nmore nonsense\n")
    assert Counter(bad.where.split(" ")[0] for bad in load_task(folder).rejected) == {
        f"{split}.jsonl": 2 for split in SPLITS
    }


def test_an_unlabelled_row_needs_no_answer_and_an_answer_in_it_is_not_read(folder):
    (folder / "unlabelled.jsonl").write_text('{"id": "u", "text": "hi", "answer": {"intent": "card_lost"}}\n', "utf-8")
    assert load_task(folder).splits["unlabelled"] == (Example("u", "hi", None),)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("content", ["", "\n\n", "nonsense\n", None], ids=["empty", "blank", "all bad", "missing"])
def test_a_split_without_a_usable_row_is_refused(folder, split, content):
    path = folder / f"{split}.jsonl"
    path.unlink() if content is None else path.write_text(content, "utf-8")
    with pytest.raises(TaskError, match=rf"{split}\.jsonl has no usable row") as caught:
        load_task(folder)
    assert ("first problem: " in str(caught.value)) == (content == "nonsense\n")


@pytest.mark.parametrize("name", ["no/such/folder", "support_dask"])
def test_a_folder_without_a_schema_is_no_task(tmp_path, name):
    with pytest.raises(TaskError, match=r"is no task folder: expected schema\.json"):
        load_task(tmp_path / name)


BAD_SCHEMAS = {
    "not JSON": b"{",
    "not UTF-8": b'{"properties": {"intent": {"enum": ["caf\xe9"]}}}',
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "no properties": b'{"type": "object"}',
    "empty properties": b'{"properties": {}}',
    "properties as a list": b'{"properties": ["intent"]}',
    "no enum": b'{"properties": {"intent": {"type": "string"}}}',
    "an empty enum": b'{"properties": {"intent": {"enum": []}}}',
    "an enum of numbers": b'{"properties": {"intent": {"enum": [1, 2]}}}',
    "an enum that is a text": b'{"properties": {"intent": {"enum": "card_lost"}}}',
    "one field without an enum": b'{"properties": {"intent": {"enum": ["a"]}, "note": {}}}',
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_a_schema_that_describes_no_answer_is_refused(folder, schema):
    (folder / "schema.json").write_bytes(schema)
    with pytest.raises(TaskError, match=r"schema\.json does not describe an answer"):
        load_task(folder)


def test_a_task_without_a_prompt_is_refused(folder):
    (folder / "prompt.txt").unlink()
    with pytest.raises(TaskError, match=r"has no prompt\.txt"):
        load_task(folder)


def test_a_prompt_that_is_not_utf8_is_refused(folder):
    (folder / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TaskError, match=r"prompt\.txt"):
        load_task(folder)


# --- A folder of CSV files ---


def write_csv(path, rows, header=("text", "category"), encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])


def csv_rows(start, stop):
    topics = {"lost": "I lost card number", "refund": 'They said "soon", refund', "joke": "Tell me\njoke"}
    rows = [(f"{words} {n}", category) for category, words in topics.items() for n in range(start, stop)]
    return random.Random(0).sample(rows, len(rows))


@pytest.fixture
def csv_folder(tmp_path):
    """Three categories, thirty training and four test messages each, with commas, quotes and line breaks in them."""
    folder = tmp_path / "my_csv_desk"
    folder.mkdir()
    write_csv(folder / "train.csv", csv_rows(0, 30))
    write_csv(folder / "test.csv", csv_rows(30, 34))
    return folder


def test_a_folder_of_csv_files_becomes_a_task(csv_folder, tmp_path):
    task = load_task(csv_folder, store=Store(tmp_path / "store"))

    assert task.name == "my_csv_desk"
    assert task.fields == {"intent": ("joke", "lost", "refund")}
    assert task.rejected == ()
    for split, each in (("train", 20), ("dev", 5), ("test", 4)):
        counts = Counter(row.answer["intent"] for row in task.splits[split])
        assert counts == {"joke": each, "lost": each, "refund": each}
    texts = {split: {row.text for row in task.splits[split]} for split in SPLITS}
    assert texts["train"] | texts["dev"] | texts["unlabelled"] == {text for text, _ in csv_rows(0, 30)}
    assert texts["test"] == {text for text, _ in csv_rows(30, 34)}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 3 * 34
    truth = dict(csv_rows(0, 34))
    assert all(row.answer["intent"] == truth[row.text] for split in SPLITS[:3] for row in task.splits[split])


def test_csv_files_are_converted_once_until_they_change(csv_folder, tmp_path):
    store = Store(tmp_path / "store")
    first = load_task(csv_folder, store=store)
    assert load_task(csv_folder, store=store).folder == first.folder
    write_csv(csv_folder / "test.csv", csv_rows(30, 35))
    assert load_task(csv_folder, store=store).folder != first.folder


def test_the_same_csv_rows_and_seed_give_the_same_splits(tmp_path):
    def digest(name, seed):
        (tmp_path / name).mkdir()
        write_csv_task(csv_rows(0, 30), csv_rows(30, 34), tmp_path / name, seed=seed)
        return content_digest(tmp_path / name)

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


def test_csv_rows_are_not_sorted_by_category(csv_folder, tmp_path):
    task = load_task(csv_folder, store=Store(tmp_path / "store"))
    for split in ("train", "dev", "test"):
        labels = [row.answer["intent"] for row in task.splits[split]]
        assert labels != sorted(labels)


def test_csv_files_need_a_store(csv_folder):
    with pytest.raises(TaskError, match="store="):
        load_task(csv_folder)


def test_csv_files_with_other_columns_are_refused_with_their_names(csv_folder, tmp_path):
    write_csv(csv_folder / "train.csv", csv_rows(0, 30), header=("message", "label"))
    with pytest.raises(TaskError, match=r"train\.csv has the columns \['message', 'label'\]: expected text and"):
        load_task(csv_folder, store=Store(tmp_path / "store"))


@pytest.mark.parametrize("content", [b"", b"\n"], ids=["empty", "blank"])
def test_an_empty_csv_file_is_refused(csv_folder, tmp_path, content):
    (csv_folder / "test.csv").write_bytes(content)
    with pytest.raises(TaskError, match=r"test\.csv has the columns"):
        load_task(csv_folder, store=Store(tmp_path / "store"))


def test_a_csv_file_as_excel_saves_it_is_read(csv_folder, tmp_path):
    write_csv(csv_folder / "train.csv", csv_rows(0, 30), encoding="utf-8-sig")
    assert len(load_task(csv_folder, store=Store(tmp_path / "store")).splits["train"]) == 60


def test_a_csv_file_that_is_not_utf8_is_refused(csv_folder, tmp_path):
    write_csv(csv_folder / "train.csv", [("café", "lost")], encoding="latin-1")
    with pytest.raises(TaskError, match=r"train\.csv is not .* UTF-8"):
        load_task(csv_folder, store=Store(tmp_path / "store"))


def test_csv_rows_that_cannot_be_used_are_named(csv_folder, tmp_path):
    store = Store(tmp_path / "store")
    write_csv(csv_folder / "test.csv", [("", "lost"), *csv_rows(30, 34), ("hi", ""), ("hi", "new"), ("only text",)])
    for _ in range(2):  # made, then found
        task = load_task(csv_folder, store=store)
        reasons = sorted(bad.reason for bad in task.rejected)
        assert len(task.splits["test"]) == 12
        assert len(reasons) == 4
        assert reasons[0].startswith("intent is 'new'")
        assert reasons[1:3] == ["it has no category"] * 2
        assert reasons[3] == "it has no text"
        assert {bad.where.split(" ")[0] for bad in task.rejected} == {"test.csv", "test.jsonl"}


# --- Asking and answering ---


def test_a_target_is_compact_json_in_the_order_of_the_schema(tiny_task):
    assert tiny_task.target({"urgency": "low", "intent": "card_lost"}) == '{"intent":"card_lost","urgency":"low"}'


def test_every_bundled_answer_survives_being_written_and_parsed(desk):
    for split in ("train", "dev", "test"):
        for row in desk.splits[split]:
            assert desk.parse(desk.target(row.answer)) == row.answer


def test_a_reply_with_white_space_and_another_order_is_parsed(tiny_task):
    answer = tiny_task.parse(' {"urgency": "high",\n "intent": "card_lost"}\n')
    assert answer == {"intent": "card_lost", "urgency": "high"}


BAD_REPLIES = {
    "empty": ("", "the reply is not JSON: ''"),
    "prose": ("The card is lost.", "the reply is not JSON: 'The card is lost.'"),
    "JSON in prose": ('Sure: {"intent":"card_lost","urgency":"low"}', "the reply is not JSON"),
    "cut off": ('{"intent":"card_lost","urg', "the reply is not JSON"),
    "two answers": ('{"intent":"card_lost","urgency":"low"}{}', "the reply is not JSON"),
    "nested without end": ("[" * 100_000, "the reply is not JSON"),
    "a list": ('[{"intent":"card_lost","urgency":"low"}]', "the answer is a JSON list, expected an object"),
    "a text": ('"card_lost"', "the answer is a JSON str, expected an object"),
    "null": ("null", "the answer is a JSON NoneType, expected an object"),
    "a field missing": ('{"intent":"card_lost"}', "the answer has no urgency"),
    "an extra field": ('{"intent":"card_lost","urgency":"low","note":"x"}', "the answer has an unknown field 'note'"),
    "a wrong value": ('{"intent":"card_lost","urgency":"soon"}', "urgency is 'soon', which is not one of its 2"),
    "another case": ('{"intent":"Card_Lost","urgency":"low"}', "intent is 'Card_Lost', which is not one of its 3"),
    "a number": ('{"intent":1,"urgency":"low"}', "intent is '1', which is not"),
    "a list of values": ('{"intent":["card_lost"],"urgency":"low"}', "which is not one of its 3"),
    "an object": ('{"intent":{"card_lost":1},"urgency":"low"}', "which is not one of its 3"),
}


@pytest.mark.parametrize(("reply", "reason"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_reply_that_is_no_answer_is_refused_with_the_reason(tiny_task, reply, reason):
    with pytest.raises(TaskError) as caught:
        tiny_task.parse(reply)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_good_answer_has_no_problem(tiny_task):
    assert answer_problem({"intent": "card_lost", "urgency": "low"}, tiny_task.fields) is None


def test_a_tuned_model_is_asked_with_the_prompt_and_the_message_alone(tiny_task):
    assert tiny_task.messages("hi") == [
        {"role": "system", "content": "Answer with JSON: intent, urgency."},
        {"role": "user", "content": "hi"},
    ]


def test_an_untuned_model_is_told_every_allowed_value(tiny_task):
    system, user = tiny_task.instructed_messages("hi")
    assert system["role"] == "system"
    assert system["content"].startswith(tiny_task.prompt)
    assert "intent: card_lost, refund_missing, out_of_scope\nurgency: low, high" in system["content"]
    assert user == {"role": "user", "content": "hi"}


def test_examples_are_turns_between_the_instruction_and_the_message(tiny_task):
    shots = tiny_task.splits["train"][:2]
    turns = tiny_task.instructed_messages("hi", shots)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in turns[1::2]] == [shots[0].text, shots[1].text, "hi"]
    assert [tiny_task.parse(turn["content"]) for turn in turns[2::2]] == [shot.answer for shot in shots]


# --- Messages from outside ---


@pytest.mark.parametrize(
    "text",
    [
        "My card is gone",
        "Refund of ₹500 still missing 😡🙏🏽, order №7",
        "Café charged me twice — ça va?",
        "first line\n\tsecond line\r\n",
        "?!",
        "12345",
        "👨‍👩‍👧 flag 🇳🇵",
        "kripya madad karo, मेरा card kho gaya hai and I am at the station",
        "a" * MAX_MESSAGE_CHARS,
    ],
)
def test_a_fine_message_is_returned_stripped(desk, text):
    assert desk.check_message(f"  {text}\n") == text.strip()


BAD_MESSAGES = {
    "empty": ("", "The message is empty"),
    "blank": (" \n\t ", "The message is empty"),
    "invisible": ("\u200b\u200d\ufeff", "The message is empty"),
    "a character too long": ("a" * 2001, "The message has 2,001 characters: expected at most 2,000"),
    "far too long": ("a" * 100_000, "The message has 100,000 characters: expected at most 2,000"),
    "Devanagari": ("मेरा कार्ड खो गया है", "written in Devanagari script: this task was trained on Latin"),
    "Malayalam": ("എന്റെ കാർഡ് നഷ്ടപ്പെട്ടു", "written in Malayalam script"),
    "mostly Devanagari": ("मेरा कार्ड खो गया है please", "written in Devanagari script"),
    "a NUL": ("my card\x00 is gone", "holds 1 control characters, the first U+0000"),
    "an escape sequence": ("\x1b[31mred\x1b[0m", "holds 2 control characters, the first U+001B"),
    "half a character": ("card \ud83d gone", "holds 1 control characters, the first U+D83D"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_message_that_cannot_be_answered_is_refused_in_a_sentence(desk, text, sentence):
    with pytest.raises(TaskError) as caught:
        desk.check_message(text)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 250


def test_a_task_in_devanagari_takes_devanagari_and_refuses_latin(folder):
    row = {"text": "मेरा कार्ड खो गया है", "answer": {"intent": "card_lost", "urgency": "low"}}
    (folder / "train.jsonl").write_text(json.dumps(row), "utf-8")
    task = load_task(folder)
    assert task.scripts == {"DEVANAGARI"}
    assert task.check_message("कार्ड कहाँ है?") == "कार्ड कहाँ है?"
    with pytest.raises(TaskError, match="written in Latin script"):
        task.check_message("Where is my card?")


def test_a_script_in_a_few_training_messages_only_is_not_learned(folder):
    answer = {"intent": "card_lost", "urgency": "low"}
    texts = ["hello"] * 199 + ["नमस्ते"]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "answer": answer}) for t in texts), "utf-8")
    assert load_task(folder).scripts == {"LATIN"}


def test_a_task_without_letters_takes_every_script(folder):
    row = {"text": "12345", "answer": {"intent": "card_lost", "urgency": "low"}}
    (folder / "train.jsonl").write_text(json.dumps(row), "utf-8")
    assert load_task(folder).check_message("कार्ड") == "कार्ड"
