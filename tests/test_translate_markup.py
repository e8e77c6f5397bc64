"""Markdown is cut into blocks without loss, and read for what a translation keeps."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops_course.authoring.translate.markup import PLACE, has_words, read_markup, slug, split_blocks

README = """<!-- a note -->
# The course

First paragraph,
in two lines.

    make course

| name | what it is |
|---|---|
| teacher | the large model |
| int4 | 82.4 % |

```python
print("not prose")
```

## The course

- one
- two

> quoted

<details><summary>Answer</summary>

Because.

</details>

[label]: https://example.org
"""


def test_a_document_is_cut_into_blocks_with_ids_that_say_where_they_are():
    assert [block.id for block in split_blocks(README) if block.is_message] == [
        "the-course/heading-1", "the-course/paragraph-1", "the-course/row-1", "the-course/row-2", "the-course/heading-2",
        "the-course/list-1", "the-course/quote-1", "the-course/html-1", "the-course/paragraph-2",
    ]  # fmt: skip


def test_code_figures_and_tags_without_words_are_no_messages():
    kinds = [(block.kind, block.text.split("\n")[0]) for block in split_blocks(README) if not block.is_message]
    assert ("row", "| int4 | 82.4 % |") in kinds
    assert ("html", "</details>") in kinds
    assert [kind for kind, _ in kinds].count("code") == 2


COURSE = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize("text", [README, COURSE, "", "\n", "no newline", "# Only a heading", "    code\n"])
def test_nothing_is_lost(text):
    assert "".join(block.text + block.after for block in split_blocks(text)) == text


LINES = ["# a\n", "b\n", "\n", "- c\n", "  d\n", "| e | f |\n", "|---|---|\n", "```\n", "> g\n", "    h\n", "<b>\n"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES)))
def test_nothing_is_lost_of_any_document(lines):
    text = "".join(lines)
    blocks = split_blocks(text)
    assert "".join(block.text + block.after for block in blocks) == text
    assert len({block.id for block in blocks}) == len(blocks)


def test_markup_is_read_for_what_a_translation_keeps():
    markup = read_markup(
        "## A `b` [c](d.md#e)\n\n![f](g.png) costs $x_1$ of **8** <br>\n\n```sh\nls\n```\n\n$$y = \\sum_i x_i$$\n"
    )
    assert markup.headings == [2]
    assert markup.inline_code == Counter(["`b`"])
    assert markup.links == Counter(["d.md#e"])
    assert markup.images == Counter(["g.png"])
    assert markup.formulas == Counter(["$x_1$", "$$y = \\sum_i x_i$$"])
    assert markup.tags == Counter(["<br>"])
    assert markup.code == Counter(["ls\n"])
    assert markup.prose[0] == f"A {PLACE} c"
    assert markup.blocks == ["heading", "paragraph", "fencesh", "paragraph"]
    assert read_markup("").prose == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `x`", True), ("<summary>Answer</summary>", True),
        ("`x` = 3", False), ("$a b$", False), ("", False), ("<details>", False),
    ],
)  # fmt: skip
def test_words_are_what_stands_beside_code(text, expected):
    assert has_words(text) is expected


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("What a run prints", "what-a-run-prints"), ("1. `int4`, again!", "1-int4-again"), ("", ""),
        ("मॉडल की परख", "मॉडल-की-परख"), ("മോഡൽ, വീണ്ടും", "മോഡൽ-വീണ്ടും"),
    ],
)  # fmt: skip
def test_anchors_are_those_of_github(heading, expected):
    assert slug(heading) == expected
