"""What is translated: the README block by block, and the chapters cell by cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

from slmops_course.authoring.translate.markup import has_words, split_blocks


@dataclass(frozen=True)
class Message:
    """A piece of English to translate."""

    context: str  # a notebook cell's id, or a Markdown block's
    text: str


def find_documents(root: Path) -> list[Path]:
    """The documents of the course, relative to its folder: the README and the chapters."""
    found = [root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))]
    return [path.relative_to(root) for path in found if path.is_file()]


def read_messages(path: Path) -> list[Message]:
    """The messages of a document, in its order. Code is not among them, nor what has no words."""
    if path.suffix == ".ipynb":
        return notebook_messages(nbformat.read(path, as_version=4))
    return markdown_messages(path.read_text("utf-8"))


def notebook_messages(notebook) -> list[Message]:
    """One message for each Markdown cell with words."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown" and has_words(cell.source)]
    return [Message(cell.id, cell.source) for cell in cells]


def markdown_messages(text: str) -> list[Message]:
    """One message for each block with words: a heading, a paragraph, a list, a row of a table."""
    return [Message(block.id, block.text) for block in split_blocks(text) if block.is_message]


def count_words(messages: Sequence[Message]) -> int:
    """How many words of English the messages have."""
    return sum(len(message.text.split()) for message in messages)
