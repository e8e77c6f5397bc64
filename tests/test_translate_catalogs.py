"""Catalogues follow the English: what changed is fuzzy, what moved is kept, what vanished is said."""

import polib
import pytest

from slmops_course.authoring.translate.catalogs import (
    Status,
    find_vanished,
    lookup,
    merge,
    new_catalog,
    read_catalog,
    reckon_status,
    state_of,
    write_catalog,
)
from slmops_course.authoring.translate.documents import Message
from slmops_course.authoring.translate.languages import TranslationError

ENGLISH = [Message("c1-title", "# Title"), Message("c1-why", "Why it matters to us."), Message("c1-how", "How it is done.")]


@pytest.fixture
def hindi():
    """A catalogue whose three messages are translated."""
    catalog = merge(new_catalog("hi"), ENGLISH)
    for entry, words in zip(catalog, ("# शीर्षक", "यह क्यों मायने रखता है।", "यह कैसे होता है।"), strict=True):
        entry.msgstr = words
    return catalog


def changed(number: int, text: str) -> list[Message]:
    return [Message(m.context, text) if n == number else m for n, m in enumerate(ENGLISH)]


def test_new_messages_are_missing_and_translated_ones_are_translated(hindi):
    assert reckon_status(merge(new_catalog("hi"), ENGLISH), ENGLISH) == Status(0, 0, 3, 0)
    assert reckon_status(hindi, ENGLISH) == Status(3, 0, 0, 0)
    assert (Status(1, 1, 2, 0).share, Status(0, 0, 0, 0).share) == (0.25, 1.0)


def test_english_that_changed_makes_its_own_message_fuzzy_and_no_other(hindi):
    now = changed(1, "Why it matters to you.")
    merged = merge(hindi, now)
    assert [state_of(entry) for entry in merged] == ["translated", "fuzzy", "translated"]
    assert merged[1].previous_msgid == "Why it matters to us."
    assert merged[1].msgstr == "यह क्यों मायने रखता है।", "its translation is kept for the translator"
    assert reckon_status(hindi, now) == Status(2, 0, 1, 1), "before it is merged, nobody takes the old one for the new"


def test_english_that_is_set_back_has_its_translation_back(hindi):
    merged = merge(merge(hindi, changed(1, "Why?")), ENGLISH)
    assert reckon_status(merged, ENGLISH) == Status(3, 0, 0, 0)
    assert merged[1].previous_msgid is None


def test_a_fuzzy_message_stays_fuzzy_and_remembers_the_english_it_was_made_from(hindi):
    merged = merge(merge(hindi, changed(1, "Why it matters to you.")), changed(1, "Why it matters to them."))
    assert state_of(merged[1]) == "fuzzy"
    assert merged[1].previous_msgid == "Why it matters to us."


def test_what_moved_keeps_its_translation(hindi):
    moved = [Message("start/paragraph-1", "A new paragraph of quite other words."), Message("c1-how-2", "How it is done.")]
    merged = merge(hindi, moved)
    assert (merged[0].msgstr, merged[1].msgstr, merged[1].fuzzy) == ("", "यह कैसे होता है।", False)


def test_a_block_that_moved_and_changed_a_little_is_fuzzy(hindi):
    (entry, *_) = merge(hindi, [Message("other/paragraph-7", "How it is done now.")])
    assert (entry.msgstr, entry.fuzzy) == ("यह कैसे होता है।", True)


def test_what_vanished_is_kept_as_obsolete_and_revived_when_it_comes_back(hindi):
    without = merge(hindi, ENGLISH[:2])
    assert [entry.msgctxt for entry in without if entry.obsolete] == ["c1-how"]
    assert [entry.msgid for entry in find_vanished(without, ENGLISH[:2])] == ["How it is done."]
    assert reckon_status(merge(without, ENGLISH), ENGLISH) == Status(3, 0, 0, 0)
    untranslated = merge(merge(new_catalog("hi"), ENGLISH), ENGLISH[:2])
    assert len(untranslated) == 2, "nothing is kept of what had no translation"


def test_programs_messages_have_no_context_and_a_changed_one_is_found_by_its_likeness():
    catalog = merge(new_catalog("hi"), [Message("", "epoch"), Message("", "exact match in percent")])
    catalog[0].msgstr, catalog[1].msgstr = "एपॉक", "सही उत्तर"
    merged = merge(catalog, [Message("", "step"), Message("", "exact match in per cent"), Message("", "epoch")])
    assert [(entry.msgstr, entry.fuzzy) for entry in merged] == [("", False), ("सही उत्तर", True), ("एपॉक", False)]
    assert "msgctxt" not in str(merged)


def test_a_catalogue_is_written_once_and_comes_back_the_same(hindi, tmp_path):
    hindi.metadata["X-Reviewed-By"] = "A. Reader"
    hindi[0].tcomment = "a translator's remark"
    path = tmp_path / "po" / "a.po"
    assert write_catalog(hindi, path) is True
    assert write_catalog(merge(read_catalog(path), ENGLISH), path) is False
    again = read_catalog(path)
    assert again.metadata["X-Reviewed-By"] == "A. Reader"
    assert again[0].tcomment == "a translator's remark"
    assert lookup(again)["c1-title", "# Title"].msgstr == "# शीर्षक"


@pytest.mark.parametrize("content", [None, b"no catalogue", b'msgid "a"\nmsgstr "b"\n\nmsgid "a"\nmsgstr "c"\n', b"\xff\xfe"])
def test_a_missing_or_damaged_catalogue_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.po"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TranslationError, match=r"a\.po.*expected"):
        read_catalog(path)


def test_an_entry_with_blanks_only_is_missing():
    assert state_of(polib.POEntry(msgid="a", msgstr=" \n")) == "missing"
    assert state_of(None) == "missing"
