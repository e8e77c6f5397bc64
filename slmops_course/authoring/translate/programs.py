"""The messages of programs: what the package says through `_()`, and what the chapters' cells and tables show.

They are one catalogue, messages.po, and come to the reader as slmops.mo, which gettext reads.
"""

import ast
import html
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import nbformat
import polib
import regex
from babel.messages.extract import extract_from_dir

from slmops_course.authoring.translate.documents import Message
from slmops_course.cells import WORD, shown_texts
from slmops_course.language import DOMAIN
from slmops_course.tasks import load_task

CATALOG = "messages"
SHOWN = ("title", "xlabel", "ylabel")  # defaults of plots.py's functions that it looks up before it shows them
HEADING = regex.compile(r"<th[^>]*>([^<]+)</th>")
# A word of a table that is a name: one with a digit, an underscore, a point or a capital inside; and the stages' own names.
NAME = regex.compile(r"\S*[\d_.]\S*|\S*\p{L}\p{Lu}\S*|(?:base|teacher|student|lora|olive|foundry)(?: [\w-]+)*")


def program_messages(root: Path) -> list[Message]:
    """Every message of the package and of the chapters once, in the order of the files. They have no context."""
    texts = [text for _, _, text, _, _ in extract_from_dir(root / "slmops_course", keywords={"_": None, "marked": None})]
    plots = root / "slmops_course" / "plots.py"
    if plots.is_file():
        code = plots.read_text("utf-8")
        texts += [*shown_texts(code), *default_texts(code)]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        texts += chapter_texts(notebook)
    words = (text for text in dict.fromkeys(texts) if isinstance(text, str) and text.strip())
    return [Message("", text) for text in words if not NAME.fullmatch(text)]


def chapter_texts(notebook) -> Iterator[str]:
    """What a chapter's cells show: texts of `print` and of figures, and the names in its tables as they were executed."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = ("" if line.startswith(("%", "!")) else line for line in cell.source.splitlines())
            yield from shown_texts("\n".join(lines))
            for output in cell.outputs:
                yield from table_names(output.get("data", {}).get("text/html", ""))


def table_names(table: str) -> Iterator[str]:
    """The names of a table's columns, rows and axes that are words: not those of labels, models, files and formats.

    Example: "<th>size MB</th><th>card_lost</th><th>student fp32</th>" -> "size MB"
    """
    for name in map(html.unescape, HEADING.findall(table)):
        words = [word.strip(",:") for word in name.split()]
        if not NAME.fullmatch(name) and name not in _labels() and any(
            WORD.search(word) and not NAME.fullmatch(word) for word in words
        ):
            yield name


@lru_cache(maxsize=1)
def _labels() -> frozenset[str]:
    """The fields and values of the bundled desk, which are data in every language."""
    fields = load_task().fields
    return frozenset(fields) | {value for values in fields.values() for value in values}


def default_texts(code: str) -> Iterator[str]:
    """The texts that functions of figures have as defaults, such as plot_scores(…, xlabel="exact match (%)")."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if argument.arg in SHOWN and isinstance(default, ast.Constant) and isinstance(default.value, str):
                    yield default.value


def compiled_path(root: Path, language: str) -> Path:
    """Where gettext finds a language's messages."""
    return root / "slmops_course" / "locale" / language / "LC_MESSAGES" / f"{DOMAIN}.mo"


def compile_catalog(catalog: polib.POFile) -> bytes:
    """The catalogue as gettext reads it: its translated messages, and no fuzzy one. The same entries give the same bytes."""
    return catalog.to_binary()
