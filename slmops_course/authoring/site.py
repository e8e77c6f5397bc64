"""The course as pages to read, in every language it is rendered in, with a switch between them: `slmops site`.

    build/site/index.html                              the README
    build/site/hi/notebooks/01_introduction.html       a chapter in Hindi
"""

import html
import os
import re
from pathlib import Path, PurePosixPath

import nbformat

from slmops_course.authoring.translate.documents import find_documents
from slmops_course.authoring.translate.languages import find_languages, read_language
from slmops_course.errors import CourseError
from slmops_course.language import ENGLISH

LINK = re.compile(r'(href|src)="([^"#:]+)(#[^"]*)?"')
BAR = (
    '<nav style="font: 15px/1.6 system-ui, sans-serif; padding: .6rem 1rem; border-bottom: 1px solid #ccc; '
    'display: flex; flex-wrap: wrap; justify-content: space-between; gap: .3rem 2rem" lang="{code}">'
    "<span>{chapters}</span><span>{switch}</span></nav>"
)


def write_site(root: Path, out: Path) -> list[Path]:
    """Write the README and the chapters of a course's folder as HTML; returns the pages, English first.

    Every page leads to the other pages of its language, and to itself in the other languages. Raises CourseError where there
    is no README.
    """
    documents = find_documents(root)
    if Path("README.md") not in documents:
        raise CourseError("There is no README.md here: expected the course's folder; go there first.")
    names = {ENGLISH: "English"} | {code: read_language(root, code).name for code in find_languages(root)}
    titles = {code: {one: _first_heading(_read(_source(root, code, one))) for one in documents} for code in names}
    pages = {_source(root, code, one).resolve(): out / page_of(code, one) for code in names for one in documents}
    for code in names:
        for document in documents:
            page = out / page_of(code, document)
            page.parent.mkdir(parents=True, exist_ok=True)
            bar = _bar(code, document, titles[code], names)
            page.write_text(_render(_source(root, code, document), page, pages, code=code, bar=bar), "utf-8")
    return list(pages.values())


def page_of(code: str, document: Path) -> PurePosixPath:
    """Where a document's page is. Example: page_of("hi", Path("README.md")) -> "hi/index.html" """
    place = PurePosixPath("index.html" if document.name == "README.md" else document.with_suffix(".html").as_posix())
    return place if code == ENGLISH else code / place


def _source(root: Path, code: str, document: Path) -> Path:
    return (root if code == ENGLISH else root / "translations" / code) / document


def _read(path: Path):
    """A document as a notebook; a Markdown file is one cell."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, as_version=4)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(path.read_text("utf-8"))])


def _first_heading(notebook) -> str:
    lines = notebook.cells[0].source.splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


def _bar(code: str, document: Path, titles: dict[Path, str], names: dict[str, str]) -> str:
    """The links of a page: the documents of its language, then its languages."""

    def link(to: str, other: Path, text: str) -> str:
        if (to, other) == (code, document):
            return f"<strong>{html.escape(text)}</strong>"
        target = os.path.relpath(page_of(to, other), page_of(code, document).parent).replace(os.sep, "/")
        return f'<a href="{target}" lang="{to}" hreflang="{to}">{html.escape(text)}</a>'

    chapters = [link(code, other, title) for other, title in titles.items()]
    switch = [link(to, document, name) for to, name in names.items()]
    return BAR.format(code=code, chapters=" · ".join(chapters), switch=" · ".join(switch))


def _render(source: Path, page: Path, pages: dict[Path, Path], *, code: str, bar: str) -> str:
    """A document as HTML. Links to documents lead to their pages, others to the files of the course."""
    from nbconvert import HTMLExporter

    def move(match: re.Match) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.exists():
            return match[0]
        place = os.path.relpath(pages.get(target, target).absolute(), page.parent.absolute()).replace(os.sep, "/")
        return f'{match[1]}="{html.escape(place)}{match[3] or ""}"'

    notebook = _read(source)
    text, _ = HTMLExporter().from_notebook_node(notebook)
    text = re.sub(r"<html[^>]*>", f'<html lang="{code}">', LINK.sub(move, text), count=1)
    text = re.sub(r"<title>.*?</title>", f"<title>{html.escape(_first_heading(notebook))}</title>", text, count=1)
    return re.sub(r"<body[^>]*>", lambda match: match[0] + bar, text, count=1)
