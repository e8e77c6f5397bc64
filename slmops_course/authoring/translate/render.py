"""From the English document and a catalogue to the translated document. What is not translated is English, with a mark."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import nbformat
import polib
import regex

from slmops_course.authoring.translate.catalogs import lookup, state_of
from slmops_course.authoring.translate.documents import Message
from slmops_course.authoring.translate.languages import Language
from slmops_course.authoring.translate.markup import has_words, read_markup, slug, split_blocks

NOTE = "translation-note"
MARK = "⚠"
STAMP = "slmops_outputs_of"


def render_markdown(english: str, catalog: polib.POFile, language: Language, *, path: str, rendered: set[str]) -> str:
    """A Markdown document in a language: blocks with their translations, links that lead on from where it will lie.

    `path` is the English document's, and `rendered` are those of all documents that are rendered, relative to the course.
    """
    entries, parts = lookup(catalog), []
    for block in split_blocks(english):
        text = block.text
        if block.is_message:
            text = _translate(Message(block.id, block.text), entries, language, in_row=block.kind == "row")
        parts.append(text + block.after)
    anchors = map_anchors([english], ["".join(parts)])
    parts = [move_links(part, path=path, language=language.code, rendered=rendered, anchors=anchors) for part in parts]
    first = next((n for n, block in enumerate(split_blocks(english), 1) if block.kind == "heading"), 0)
    return "".join([*parts[:first], review_note(catalog, language, path), "\n\n", *parts[first:]])


def render_notebook(
    english, catalog: polib.POFile, language: Language, *, path: str, rendered: set[str], executed=None, previous=None
):
    """A notebook in a language. Code cells are the English ones; their outputs stay where they have no words.

    Outputs with words come from `executed`, this notebook as it ran in the language; else from `previous`, the notebook as
    it was rendered before, while the cell's code and English outputs are the same; else there are none.
    """
    entries = lookup(catalog)
    notebook = copy.deepcopy(english)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _localize_outputs(cell, executed=find_cell(executed, cell.id), previous=find_cell(previous, cell.id))
        elif cell.cell_type == "markdown" and has_words(cell.source):
            cell.source = _translate(Message(cell.id, cell.source), entries, language)
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    anchors = map_anchors(
        [cell.source for cell in english.cells if cell.cell_type == "markdown"], [cell.source for cell in prose]
    )
    for cell in prose:
        cell.source = move_links(cell.source, path=path, language=language.code, rendered=rendered, anchors=anchors)
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(review_note(catalog, language, path), id=NOTE))
    return notebook


def _translate(message: Message, entries: Mapping, language: Language, *, in_row: bool = False) -> str:
    """A message's translation, or its English below a sentence that says so."""
    entry = entries.get((message.context, message.text))
    state = state_of(entry)
    if state == "translated":
        # The block's own line breaks at its end are the document's, not the translator's.
        return entry.msgstr.strip("\n")
    if in_row:
        cell, bar, rest = message.text.lstrip().removeprefix("|").partition("|")
        return f"| {MARK} {cell.strip()} {bar}{rest}"
    return f"> {MARK} {language.outdated if state == 'fuzzy' else language.not_translated}\n\n{message.text}"


def review_note(catalog: polib.POFile, language: Language, path: str) -> str:
    """What a reader is told about the translation: who has read it, and where the English is.

    The name in the catalogue's header field X-Reviewed-By is that of a native reader, or empty.
    """
    reviewer = catalog.metadata.get("X-Reviewed-By", "").strip()
    sentence = language.review_native.format(reviewer=reviewer) if reviewer else language.review_machine
    return f"*{sentence}* [{language.original}]({_relative('/'.join(('translations', language.code, path)), path)})"


def find_cell(notebook, cell_id: str):
    """The cell of a notebook with an id; None where there is none, or no notebook."""
    return next((cell for cell in notebook.cells if cell.id == cell_id), None) if notebook else None


def _localize_outputs(cell, *, executed, previous) -> None:
    """Keep, replace or drop the English outputs of a code cell."""
    if not any(output_has_words(output) for output in cell.outputs):
        return
    stamp = hashlib.md5(json.dumps([cell.source, cell.outputs], sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    if executed is not None and executed.source == cell.source:
        source = executed
    elif previous is not None and previous.metadata.get(STAMP) == stamp:
        source = previous
    else:
        cell.outputs, cell.execution_count = [], None
        return
    cell.outputs, cell.execution_count = source.outputs, source.execution_count
    cell.metadata[STAMP] = stamp


# What programs print in every language: numbers with their units, names with an underscore, a digit or two capitals.
_NO_WORD = regex.compile(r"\b(?:\w*(?:_|\d|\p{Lu}\w*\p{Lu})\w*|ms|s|True|False|None|nan|inf|dtype|float|int)\b")
_WORD = regex.compile(r"\p{L}{2,}")


def output_has_words(output) -> bool:
    """Whether a reader would want an output of a cell in the reader's language. Figures always have words.

    Example: "student 82.6 %" -> True; "[3, 4.5 MB]" -> False
    """
    if output.output_type == "stream":
        return bool(_WORD.search(_NO_WORD.sub(" ", output.text)))
    data = output.get("data", {})
    if any(kind != "text/plain" for kind in data):
        return True
    return bool(_WORD.search(_NO_WORD.sub(" ", data.get("text/plain", ""))))


def map_anchors(english: list[str], translated: list[str]) -> dict[str, str]:
    """Anchors of English headings, and those of the same headings in the translation."""
    titles = [[slug(title) for text in texts for title in read_markup(text).titles] for texts in (english, translated)]
    return dict(zip(*titles, strict=False))


def move_links(text: str, *, path: str, language: str, rendered: set[str], anchors: Mapping[str, str]) -> str:
    """Links as they have to be where the translation lies: to other translations, or out to the course's files.

    Example: in README.md, "environment.yml" -> "../../environment.yml"; "notebooks/01_introduction.ipynb" stays.
    """
    place = "/".join(("translations", language, path))
    markup = read_markup(text)
    for target in [*markup.links, *markup.images]:
        file, hash_sign, anchor = target.partition("#")
        if regex.match(r"[a-z]+:|/", file):
            continue
        resolved = os.path.normpath(PurePosixPath(path).parent / file).replace(os.sep, "/")
        stays = not file or resolved in rendered
        moved = file if stays else _relative(place, resolved) + "/" * file.endswith("/")
        new = moved + hash_sign + (anchor if file else anchors.get(anchor, anchor))
        if new != target:
            text = regex.sub(rf"(?<=\]\(|^\[[^\]]+\]: ){regex.escape(target)}(?=[\s)\"]|$)", new, text, flags=regex.MULTILINE)
    return text


def _relative(place: str, target: str) -> str:
    return os.path.relpath(target, PurePosixPath(place).parent).replace(os.sep, "/")


def write_text(path: Path, text: str) -> bool:
    """Write a file where it differs; returns whether it did."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return True
