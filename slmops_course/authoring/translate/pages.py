"""Whole documents in a language: rendering them to files, and what they must keep as documents."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import nbformat
import regex

from slmops_course.authoring.translate import coop
from slmops_course.authoring.translate.catalogs import catalog_path, find_vanished, lookup, read_catalog, state_of
from slmops_course.authoring.translate.checks import STAGES, Pair, check_pair
from slmops_course.authoring.translate.documents import Message, find_documents, read_messages
from slmops_course.authoring.translate.glossary import read_glossary
from slmops_course.authoring.translate.languages import Language, read_language
from slmops_course.authoring.translate.markup import read_markup, slug
from slmops_course.authoring.translate.programs import CATALOG, compile_catalog, compiled_path, program_messages
from slmops_course.authoring.translate.render import render_markdown, render_notebook


@dataclass(frozen=True)
class Problem:
    """Something that a check found."""

    language: str
    document: str  # such as "notebooks/01_introduction.ipynb"
    place: str  # a message's context, or ""
    check: str
    sentence: str

    def __str__(self):
        where = f"{self.document} {self.place}".strip()
        return f"{self.language}: {where}: {self.check}: {self.sentence}."


def catalogs(root: Path) -> dict[str, list[Message]]:
    """The messages of every catalogue of a language, by the catalogue's name: one a document, and one for the programs."""
    found = {path.stem: read_messages(root / path) for path in find_documents(root)}
    return found | {CATALOG: program_messages(root)}


def render_document(root: Path, language: Language, document: Path, *, executed: Path | None = None) -> str:
    """The text of a document in a language; the one that is there gives what outputs it has, see `render_notebook`.

    `executed` is a folder with notebooks that ran in the language.
    """
    catalog = read_catalog(catalog_path(root, language.code, document.stem))
    options = {"path": document.as_posix(), "rendered": {path.as_posix() for path in find_documents(root)}}
    if document.suffix != ".ipynb":
        return render_markdown((root / document).read_text("utf-8"), catalog, language, **options)
    notebook = render_notebook(
        nbformat.read(root / document, as_version=4), catalog, language, **options,
        executed=_read_notebook(executed / document.name if executed else None),
        previous=_read_notebook(root / "translations" / language.code / document),
    )  # fmt: skip
    return nbformat.writes(notebook) + "\n"


def _read_notebook(path: Path | None):
    return nbformat.read(path, as_version=4) if path and path.is_file() else None


def render_language(root: Path, code: str, *, executed: Path | None = None) -> dict[Path, bytes]:
    """Every file that is rendered for a language, by its path: documents, Co-op Translator's metadata, gettext's messages."""
    language, documents = read_language(root, code), find_documents(root)
    folder = root / "translations" / code
    files = {folder / path: render_document(root, language, path, executed=executed).encode() for path in documents}
    revised = {
        path.as_posix(): read_catalog(catalog_path(root, code, path.stem)).metadata.get("PO-Revision-Date", "")
        for path in documents
    }
    files[folder / coop.FILE] = coop.format_metadata(root, code, revised).encode()
    files[compiled_path(root, code)] = compile_catalog(read_catalog(catalog_path(root, code, CATALOG)))
    return files


def check_catalogs(root: Path, code: str) -> Iterator[Problem]:
    """What the catalogues lack, and what is wrong with the translations they have."""
    language, terms = read_language(root, code), read_glossary(root, code)
    names = read_names(root)
    paths = {path.stem: path.as_posix() for path in find_documents(root)} | {CATALOG: f"{CATALOG}.po"}
    for name, messages in catalogs(root).items():
        catalog = read_catalog(catalog_path(root, code, name))
        entries = lookup(catalog)
        if name == CATALOG:  # what programs print holds names of rows, such as "student fp32"
            terms = [replace(term, keep=term.keep or bool(STAGES.fullmatch(term.english))) for term in terms]
        for message in messages:
            entry = entries.get((message.context, message.text))
            place, state = message.context or repr(message.text[:40]), state_of(entry)
            if state == "missing":
                yield Problem(code, paths[name], place, "missing", "has no translation: expected one in its catalogue")
            if state == "fuzzy":
                yield Problem(code, paths[name], place, "fuzzy", "has another English now: mend it, then take the mark off")
            if state == "translated":
                pair = Pair(message.text.strip(), entry.msgstr.strip(), language, terms, names)
                yield from (Problem(code, paths[name], place, check, sentence) for check, sentence in check_pair(pair))
        for entry in find_vanished(catalog, messages):
            sentence = f"{entry.msgid[:40]!r} is not in the English any more: use its words elsewhere, then delete it"
            yield Problem(code, paths[name], entry.msgctxt or "", "vanished", sentence)


def read_names(root: Path) -> frozenset[str]:
    """Words that stay in English letters in every language: `translations/names.txt`, one a line, # for comments."""
    path = root / "translations" / "names.txt"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return frozenset(name for line in lines if (name := line.partition("#")[0].strip()))


def check_rendered(root: Path, code: str) -> Iterator[Problem]:
    """Whether the rendered files are there, are what rendering gives, and hang together. It reads and never writes."""
    expected = render_language(root, code)
    for path, content in expected.items():
        name = path.relative_to(root).as_posix()
        if not path.is_file():
            yield Problem(code, name, "", "rendered", "is not there: expected what `slmops translate render` makes")
        elif path.read_bytes() != content:
            yield Problem(code, name, "", "rendered", "is not what its catalogue gives now: run `slmops translate render`")
    paths = [path.as_posix() for path in find_documents(root)]
    for path in coop.find_stale(root, code, paths):
        yield Problem(code, path, "", "stale", "was rendered from another English text: run `slmops translate render`")
    for path in paths:
        translated = root / "translations" / code / path
        if translated.is_file():
            yield from (Problem(code, path, "", *found) for found in check_document(root / path, translated))


def check_document(english: Path, translated: Path) -> Iterator[tuple[str, str]]:
    """The outline of a rendered document, and that its links and anchors lead somewhere."""
    outlines = [[level for text in read_prose(path) for level in read_markup(text).headings] for path in (english, translated)]
    if outlines[0] != outlines[1]:
        yield "headings", f"has {len(outlines[1])} headings where the English has {len(outlines[0])}: expected the same outline"
    for text in read_prose(translated):
        markup = read_markup(text)
        for target in [*markup.links, *markup.images]:
            if not regex.match(r"[a-z]+:", target) and (problem := _follow(translated, target)):
                yield "links", problem


def read_prose(path: Path) -> list[str]:
    """The Markdown of a document: one text, or one a cell."""
    if path.suffix != ".ipynb":
        return [path.read_text("utf-8")]
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def _follow(place: Path, target: str) -> str:
    """What is wrong with a link of a file; "" when it leads somewhere."""
    file, _, anchor = unquote(target).partition("#")
    found = (place.parent / file) if file else place
    if not found.exists():
        return f"has a link to {target!r}, and there is nothing: expected a file or folder"
    if anchor and found.suffix in (".md", ".ipynb"):
        anchors = {slug(title) for text in read_prose(found) for title in read_markup(text).titles}
        if anchor not in anchors:
            return f"has a link to {target!r}, and no such heading: expected one of {', '.join(sorted(anchors)[:5])}, …"
    return ""
