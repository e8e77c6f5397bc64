"""Rendering takes code from the English, words from the catalogue, and never shows a stale translation as a sound one."""

import json

import nbformat
import pytest

from slmops_course.authoring.translate.catalogs import merge, new_catalog
from slmops_course.authoring.translate.documents import markdown_messages, notebook_messages
from slmops_course.authoring.translate.languages import Language
from slmops_course.authoring.translate.render import (
    NOTE,
    STAMP,
    map_anchors,
    move_links,
    output_has_words,
    render_markdown,
    render_notebook,
)

HINDI = Language(
    "hi", "हिन्दी", "Hindi", ("Devanagari",), "latin", (0.5, 2.0), not_translated="अनूदित नहीं:", outdated="पुराना अनुवाद:",
    review_machine="मशीन से।", review_native="{reviewer} ने जाँचा।", original="मूल",
)  # fmt: skip
README = """# The course

Read [chapter 1](notebooks/01.ipynb), [the pins](constraints.txt#top) and [the start](#start).

    make course

| what | why |
|---|---|
| teacher | it knows more |
| student | 82.4 % |

## Start

Now.
"""
WORDS = {
    "# The course": "# पाठ्यक्रम",
    "Read [chapter 1](notebooks/01.ipynb), [the pins](constraints.txt#top) and [the start](#start).":
        "[अध्याय 1](notebooks/01.ipynb), [संस्करण](constraints.txt#top) और [आरंभ](#start) पढ़िए।",
    "| what | why |": "| क्या | क्यों |",
    "| teacher | it knows more |": "| शिक्षक | वह अधिक जानता है |",
    "## Start": "## आरंभ",
    "Now.": "अब।",
}  # fmt: skip
WHERE = {"path": "README.md", "rendered": {"README.md", "notebooks/01.ipynb"}}


def translated(messages, words):
    catalog = merge(new_catalog("hi"), messages)
    for entry in catalog:
        entry.msgstr = words.get(entry.msgid, "")
    return catalog


def test_a_whole_translation_has_the_english_code_and_links_that_lead_on():
    text = render_markdown(README, translated(markdown_messages(README), WORDS), HINDI, **WHERE)
    assert text == """# पाठ्यक्रम

*मशीन से।* [मूल](../../README.md)

[अध्याय 1](notebooks/01.ipynb), [संस्करण](../../constraints.txt#top) और [आरंभ](#आरंभ) पढ़िए।

    make course

| क्या | क्यों |
|---|---|
| शिक्षक | वह अधिक जानता है |
| student | 82.4 % |

## आरंभ

अब।
"""


def test_what_has_no_translation_is_english_with_a_mark_and_so_is_what_changed():
    catalog = translated(markdown_messages(README), {**WORDS, "Now.": "", "| what | why |": ""})
    text = render_markdown(README, catalog, HINDI, **WHERE)
    assert "> ⚠ अनूदित नहीं:\n\nNow.\n" in text
    assert "| ⚠ what | why |\n|---|---|\n| शिक्षक" in text, "a mark in a table leaves it a table"
    new = README.replace("Now.", "Now or never.").replace("it knows more", "it knows less")
    text = render_markdown(new, merge(catalog, markdown_messages(new)), HINDI, **WHERE)
    assert "| ⚠ teacher | it knows less |" in text
    assert "अधिक" not in text, "a stale translation"


def test_changed_english_is_marked_even_before_the_catalogue_is_brought_up_to_date():
    new = README.replace("Now.", "Now or never.")
    text = render_markdown(new, translated(markdown_messages(README), WORDS), HINDI, **WHERE)
    assert "> ⚠ अनूदित नहीं:\n\nNow or never.\n" in text
    assert "अब।" not in text


def test_a_fuzzy_message_says_that_its_english_changed():
    new = README.replace("Now.", "Now!")
    text = render_markdown(new, merge(translated(markdown_messages(README), WORDS), markdown_messages(new)), HINDI, **WHERE)
    assert "> ⚠ पुराना अनुवाद:\n\nNow!\n" in text


def test_the_reader_sees_who_has_read_the_translation():
    catalog = translated(markdown_messages(README), WORDS)
    catalog.metadata["X-Reviewed-By"] = "A. Reader"
    assert "*A. Reader ने जाँचा।* [मूल](../../README.md)" in render_markdown(README, catalog, HINDI, **WHERE)


def test_nothing_in_a_document_is_nothing_but_the_note():
    assert render_markdown("", new_catalog("hi"), HINDI, **WHERE) == "*मशीन से।* [मूल](../../README.md)\n\n"


@pytest.mark.parametrize(
    ("path", "link", "expected"),
    [
        ("README.md", "environment.yml", "../../environment.yml"), ("README.md", "binder/", "../../binder/"),
        ("README.md", "notebooks/01.ipynb", "notebooks/01.ipynb"), ("README.md", "https://a.org/b.md", "https://a.org/b.md"),
        ("notebooks/01.ipynb", "02.ipynb", "02.ipynb"), ("notebooks/01.ipynb", "../Makefile", "../../../Makefile"),
        ("notebooks/01.ipynb", "../README.md#start", "../README.md#start"), ("README.md", "#start", "#आरंभ"),
        ("README.md", "#elsewhere", "#elsewhere"), ("README.md", "mailto:a@b.org", "mailto:a@b.org"),
    ],
)  # fmt: skip
def test_links_lead_from_where_the_translation_lies(path, link, expected):
    rendered = {"README.md", "notebooks/01.ipynb", "notebooks/02.ipynb"}
    options = {"path": path, "language": "hi", "rendered": rendered, "anchors": {"start": "आरंभ"}}
    assert move_links(f"a [b]({link}) `[b]({link})`x", **options).startswith(f"a [b]({expected}) ")
    assert move_links(f'a ![b]({link} "title")', **options) == f'a ![b]({expected} "title")'


def test_anchors_are_paired_by_the_order_of_headings():
    assert map_anchors(["# A", "text", "## B c"], ["# क", "पाठ", "## ख ग"]) == {"a": "क", "b-c": "ख-ग"}
    assert map_anchors([], []) == {}


def stream(text):
    return nbformat.v4.new_output("stream", text=text)


def figure(kind="image/png"):
    return nbformat.v4.new_output("display_data", {kind: "…", "text/plain": "<Figure>"})


def make_notebook():
    code = [
        ("plain", "print(3)", [stream("3.5 MB\n")]), ("wordy", "print('right')", [stream("right: 3\n")]),
        ("drawn", "show()", [figure()]), ("silent", "x = 1", []),
    ]  # fmt: skip
    cells = [nbformat.v4.new_markdown_cell("# Title", id="title")]
    for number, (name, source, outputs) in enumerate(code, 1):
        cells.append(nbformat.v4.new_code_cell(source, id=name, outputs=outputs, execution_count=number))
    cells.append(nbformat.v4.new_markdown_cell("See [the end](../README.md).", id="end"))
    cells.append(nbformat.v4.new_markdown_cell("$$x$$", id="formula"))
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


NOTEBOOK_WORDS = {"# Title": "# शीर्षक", "See [the end](../README.md).": "[अंत](../README.md) देखिए।"}
IN_NOTEBOOKS = {"path": "notebooks/01.ipynb", "rendered": {"README.md", "notebooks/01.ipynb"}}


def rendered_notebook(english, words=NOTEBOOK_WORDS, **options):
    return render_notebook(english, translated(notebook_messages(english), words), HINDI, **IN_NOTEBOOKS, **options)


def by_id(notebook):
    return {cell.id: cell for cell in notebook.cells}


def test_code_cells_are_the_english_ones_and_prose_is_the_translators():
    english = make_notebook()
    before = nbformat.writes(english)
    notebook = rendered_notebook(english)
    nbformat.validate(notebook)
    assert nbformat.writes(english) == before
    assert [cell.id for cell in notebook.cells] == ["title", NOTE, *[cell.id for cell in english.cells][1:]]
    code = [[cell.source for cell in one.cells if cell.cell_type == "code"] for one in (english, notebook)]
    assert code[0] == code[1]
    cells = by_id(notebook)
    assert (cells["title"].source, cells["end"].source) == ("# शीर्षक", "[अंत](../README.md) देखिए।")
    assert cells[NOTE].source == "*मशीन से।* [मूल](../../../notebooks/01.ipynb)"
    assert cells["formula"].source == "$$x$$"


def test_outputs_without_words_stay_and_others_are_left_to_a_run_in_the_language():
    cells = by_id(rendered_notebook(make_notebook()))
    assert (cells["plain"].outputs, cells["plain"].execution_count) == ([stream("3.5 MB\n")], 1)
    assert [(cells[name].outputs, cells[name].execution_count) for name in ("wordy", "drawn")] == [([], None)] * 2
    assert cells["silent"].execution_count == 4


def test_outputs_with_words_come_from_the_run_in_the_language_and_stay_while_the_english_is_the_same():
    english = make_notebook()
    executed = rendered_notebook(english)
    by_id(executed)["wordy"].outputs = [stream("सही: 3\n")]
    by_id(executed)["wordy"].execution_count = 2
    first = rendered_notebook(english, executed=executed)
    assert by_id(first)["wordy"].outputs == [stream("सही: 3\n")]
    again = rendered_notebook(english, previous=first)
    assert nbformat.writes(again) == nbformat.writes(first), "rendering again gives the same bytes"
    by_id(english)["wordy"].outputs = [stream("right: 4\n")]
    stale = by_id(rendered_notebook(english, previous=first))
    assert (stale["wordy"].outputs, STAMP in stale["wordy"].metadata) == ([], False)


def test_a_run_of_other_code_gives_no_outputs():
    executed = rendered_notebook(make_notebook())
    by_id(executed)["wordy"].source = "print('other')"
    by_id(executed)["wordy"].outputs = [stream("सही: 3\n")]
    assert by_id(rendered_notebook(make_notebook(), executed=executed))["wordy"].outputs == []


def test_an_untranslated_cell_is_marked_and_its_neighbors_are_not():
    cells = by_id(rendered_notebook(make_notebook(), {"# Title": "# शीर्षक"}))
    assert cells["end"].source == "> ⚠ अनूदित नहीं:\n\nSee [the end](../README.md)."
    assert cells["title"].source == "# शीर्षक"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (stream("student 82.6 %"), True), (stream("[3, 4.5 MB]"), False), (stream("['CPUExecutionProvider']"), False),
        (stream("True\nfloat32\n"), False), (stream(""), False), (stream("{'kept': 3}"), True),
        (figure(), True), (figure("text/html"), True),
        (nbformat.v4.new_output("execute_result", {"text/plain": "0.25"}), False),
        (nbformat.v4.new_output("execute_result", {"text/plain": "'a word'"}), True),
        (nbformat.v4.new_output("execute_result", {}), False),
    ],
)  # fmt: skip
def test_outputs_have_words_or_not(output, expected):
    assert output_has_words(nbformat.from_dict(json.loads(json.dumps(output)))) is expected
