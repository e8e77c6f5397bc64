"""Corrections are stored whole, without personal data, and become training rows only where they can be trusted."""

import json
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from filelock import FileLock

from slmops_course.operations.feedback import FeedbackError, FeedbackJournal, collect_corrections, extend_task
from slmops_course.tasks import Example, read_rows

LOST = {"intent": "card_lost", "urgency": "high"}
JOKE = {"intent": "out_of_scope", "urgency": "low"}
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def journal(tmp_path, tiny_task):
    return FeedbackJournal(tmp_path / "feedback" / "corrections.jsonl", tiny_task, clock=lambda: NOON)


def lines(journal) -> list[dict]:
    return [json.loads(line) for line in journal.path.read_text("utf-8").splitlines()]


# --- Storing ---


def test_a_correction_is_stored_masked_with_what_the_model_had_said(journal):
    row = journal.add(" My ring is gone, call 98765 43210 ", LOST, was=JOKE, version="3")
    assert row == lines(journal)[0]
    assert {name: value for name, value in row.items() if name != "id"} == {
        "text": "My ring is gone, call [phone number]", "answer": LOST, "was": JOKE, "version": "3",
        "at": "2026-11-22T12:00:00.000+00:00",
    }  # fmt: skip


def test_nothing_personal_ever_reaches_the_disk(journal, tmp_path):
    journal.add("I am ravi@example.org, card 4111 1111 1111 1111, फोन ९८७६५४३२१०", LOST, was={"intent": "9876543210"})
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode("utf-8")
    assert "[card number]" in stored
    assert [word for word in ("ravi", "4111", "९८७६", "9876") if word in stored] == []


def test_only_the_owner_may_read_it(journal):
    journal.add("gone", LOST)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_an_answer_of_the_model_that_was_none_is_none(journal):
    assert journal.add("gone", LOST, was=None)["was"] is None
    assert journal.add("gone", LOST, was={"intent": "nonsense"})["was"] is None


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("gone", {"intent": "ring_lost", "urgency": "high"}, "intent is 'ring_lost'"),
        ("gone", {"intent": "card_lost"}, "has no urgency"),
        ("gone", None, "expected an object"),
        (" ", LOST, "the message has 0 characters"),
        ("x" * 2001, LOST, "the message has 2,001 characters"),
    ],
)
def test_what_is_no_correction_is_refused_before_anything_is_written(journal, text, answer, reason):
    with pytest.raises(FeedbackError, match=f"cannot be stored \\(.*{reason}.*choose from its values"):
        journal.add(text, answer)
    assert not journal.path.exists()


def test_a_torn_row_does_not_spoil_the_next_one(journal, tiny_task):
    journal.add("gone", LOST)
    with open(journal.path, "ab") as file:
        file.write(b'{"id": "half a r')
    journal.add("a joke please", JOKE)
    good, bad = read_rows(journal.path, fields=tiny_task.fields)
    assert [example.text for example in good] == ["gone", "a joke please"]
    assert [rejected.where for rejected in bad] == ["corrections.jsonl line 2"]


def test_a_message_with_half_a_character_is_stored_without_it(journal, tiny_task):
    journal.add("gone \ud83d", LOST)
    assert read_rows(journal.path, fields=tiny_task.fields)[0][0].text == "gone ?"


WRITER = """
import sys
from pathlib import Path
from slmops_course.operations.feedback import FeedbackJournal
from slmops_course.tasks import load_task
journal = FeedbackJournal(Path(sys.argv[1]), load_task(Path(sys.argv[2])))
for number in range(40):
    journal.add(f"{sys.argv[3]} {number} " + "long " * 300, {"intent": "card_lost", "urgency": "high"})
"""


def test_two_processes_write_at_once_and_no_row_is_lost_or_mixed(journal, tiny_task):
    journal.path.parent.mkdir()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(journal.path), str(tiny_task.folder), name]) for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    good, bad = read_rows(journal.path, fields=tiny_task.fields)
    assert bad == []
    assert {example.text.split(" long")[0] for example in good} == {f"{name} {n}" for name in "ab" for n in range(40)}


def test_who_writes_waits_for_who_is_writing(journal):
    journal.path.parent.mkdir()
    writer = threading.Thread(target=journal.add, args=("gone", LOST))
    with FileLock(f"{journal.path}.lock"):
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        assert not journal.path.exists()
    writer.join(20)
    assert len(lines(journal)) == 1


def test_a_full_disk_is_named_and_earlier_corrections_are_intact(small_disk, tiny_task):
    journal = FeedbackJournal(small_disk / "corrections.jsonl", tiny_task)
    journal.add("gone", LOST)
    (small_disk / "filler").write_bytes(b"x" * 240 * 1024)

    def fill():
        for number in range(40):
            journal.add(f"{number} " + "long " * 300, LOST)

    with pytest.raises(FeedbackError, match=r"No space left on device.*earlier ones are intact; free some space"):
        fill()
    stored = journal.path.read_bytes()
    assert stored.endswith(b"\n")
    assert json.loads(stored.splitlines()[0])["text"] == "gone"
    (small_disk / "filler").unlink()
    journal.add("back again", LOST)
    assert read_rows(journal.path, fields=tiny_task.fields)[1] == []


# --- Using ---


def test_corrections_become_training_rows_in_the_order_they_came(journal, tiny_task):
    texts = ["My ring slid off in the sea", "The ring fell into the kitchen drain"]
    ids = [journal.add(text, LOST)["id"] for text in texts]
    found = collect_corrections(journal.path, tiny_task)
    assert found.kept == tuple(Example(id, text, LOST) for id, text in zip(ids, texts, strict=True))
    assert found.rejected == ()


def test_without_a_journal_there_are_none(tmp_path, tiny_task):
    assert collect_corrections(tmp_path / "nowhere.jsonl", tiny_task) == collect_corrections(tmp_path / "no.jsonl", tiny_task)
    assert collect_corrections(tmp_path / "nowhere.jsonl", tiny_task).kept == ()


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("Stolen card, act quickly!", LOST, "it nearly repeats test-1, on which the model is judged"),
        ("Stolen card, act quickly!", JOKE, "it nearly repeats test-1, on which the model is judged"),
        ("how tall is EVEREST", JOKE, "it nearly repeats dev-2, on which the model is judged"),
        ("I lost my card on the bus.", LOST, "it nearly repeats train-0"),
        ("Tell me a joke!", LOST, "it says otherwise than train-9, which it nearly repeats"),
    ],
)
def test_what_the_task_has_already_is_kept_aside(journal, tiny_task, text, answer, reason):
    row = journal.add(text, answer)
    found = collect_corrections(journal.path, tiny_task)
    assert found.kept == ()
    assert [(r.where, r.reason, r.content) for r in found.rejected] == [(row["id"], reason, text)]


def test_of_corrections_that_repeat_the_first_is_kept_and_of_those_that_contradict_none(journal, tiny_task):
    first = journal.add("My ring slid off in the sea", LOST)["id"]
    again = journal.add("my ring slid off in the sea!!", LOST)["id"]
    yes = journal.add("Does the ring work under water?", LOST)["id"]
    no = journal.add("Does the ring work under water", JOKE)["id"]
    found = collect_corrections(journal.path, tiny_task)
    assert [example.id for example in found.kept] == [first]
    assert {r.where: r.reason for r in found.rejected} == {
        again: f"it nearly repeats {first}",
        yes: f"{no}, which nearly repeats it, says otherwise",
        no: f"it says otherwise than {yes}, which it nearly repeats",
    }


def test_rows_that_are_no_rows_of_the_task_are_named(journal, tiny_task):
    journal.add("My ring slid off in the sea", LOST)
    with open(journal.path, "a", encoding="utf-8") as file:
        file.write('nonsense\n{"id": "x", "text": "old desk", "answer": {"intent": "card_eaten", "urgency": "low"}}\n')
    found = collect_corrections(journal.path, tiny_task)
    assert len(found.kept) == 1
    assert [rejected.where for rejected in found.rejected] == ["corrections.jsonl line 2", "corrections.jsonl line 3"]
    assert "'card_eaten', which is not one of its 3 allowed values" in found.rejected[1].reason


def test_the_next_round_has_the_corrections_to_learn_from_and_the_same_messages_to_be_judged_on(journal, tiny_task, tmp_path):
    journal.add("My ring slid off in the sea", LOST)
    kept = collect_corrections(journal.path, tiny_task).kept
    asked = Example("ring-test", "Where did my ring go?", LOST)
    task = extend_task(tiny_task, {"train": kept, "test": [asked]}, tmp_path / "round-2")
    assert task.splits["train"] == (*tiny_task.splits["train"], *kept)
    assert task.splits["test"] == (*tiny_task.splits["test"], asked)
    assert {split: task.splits[split] for split in ("dev", "unlabelled")} == {
        split: tiny_task.splits[split] for split in ("dev", "unlabelled")
    }
    assert (task.prompt, dict(task.schema), task.rejected) == (tiny_task.prompt, dict(tiny_task.schema), ())


def test_a_round_without_corrections_is_the_task_itself(tiny_task, tmp_path):
    assert extend_task(tiny_task, {}, tmp_path / "same").splits == tiny_task.splits


def test_rows_that_are_there_already_unknown_splits_and_full_folders_are_refused(tiny_task, tmp_path):
    row = tiny_task.splits["train"][0]
    with pytest.raises(FeedbackError, match="The task has train-0 already"):
        extend_task(tiny_task, {"test": [row]}, tmp_path / "a")
    with pytest.raises(FeedbackError, match="There is no split 'tests'"):
        extend_task(tiny_task, {"tests": []}, tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(FeedbackError, match=f"{tmp_path} is not empty"):
        extend_task(tiny_task, {}, tmp_path)
    assert not (tmp_path / "a").exists()
