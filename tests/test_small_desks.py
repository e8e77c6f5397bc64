"""The two small desks, for several adapters on one base: right in form, and unlike the payments desk and each other."""

from collections import Counter

import pytest

from slmops_course.tasks import BUNDLED_TASK, SMALL_DESKS, load_task
from slmops_course.validation import similar_pairs, validate_task

ROWS = {"train": 24, "dev": 6, "test": 12}  # of each intent


@pytest.fixture(scope="module")
def desks():
    return {name: load_task(name) for name in SMALL_DESKS}


@pytest.mark.parametrize("name", SMALL_DESKS)
def test_every_intent_has_its_rows_in_every_split(desks, name):
    task = desks[name]
    for split, count in ROWS.items():
        found = Counter(example.answer["intent"] for example in task.splits[split])
        assert found == dict.fromkeys(task.fields["intent"], count), split
    assert task.rejected == ()


@pytest.mark.parametrize("name", SMALL_DESKS)
def test_the_validator_has_nothing_to_stop_for(desks, name):
    assert validate_task(desks[name]).of("stop") == ()


@pytest.mark.parametrize("name", SMALL_DESKS)
def test_no_urgency_is_rare(desks, name):
    counts = Counter(example.answer["urgency"] for example in desks[name].splits["train"])
    assert min(counts[value] for value in desks[name].fields["urgency"]) >= 40


@pytest.mark.parametrize("name", SMALL_DESKS)
def test_messages_of_an_intent_do_not_begin_alike(desks, name):
    rows = [example for split in ROWS for example in desks[name].splits[split]]
    openings = Counter((e.answer["intent"], *e.text.lower().split()[:4]) for e in rows if len(e.text.split()) > 3)
    assert [opening for opening, count in openings.items() if count > 1] == []


@pytest.mark.parametrize("name", SMALL_DESKS)
def test_the_datasheet_counts_what_is_there(desks, name):
    sheet = (desks[name].folder / "DATASHEET.md").read_text("utf-8")
    for split, count in ROWS.items():
        assert f"| {split} | {count * 8} |" in sheet.replace("`", "")
    assert "CC BY 4.0" in sheet


def test_desks_share_no_intent_and_no_message(desks):
    every = [load_task(BUNDLED_TASK), *desks.values()]
    intents = Counter(intent for task in every for intent in task.fields["intent"])
    assert [intent for intent, count in intents.items() if count > 1] == []
    assert similar_pairs([e.text for task in desks.values() for split in ROWS for e in task.splits[split]], threshold=0.4) == []
