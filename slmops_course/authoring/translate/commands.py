"""`slmops translate extract | status | render | check | new`: what each does, on the folder of a course."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from slmops_course.authoring.translate.catalogs import (
    Status,
    catalog_path,
    merge,
    new_catalog,
    read_catalog,
    reckon_status,
    write_catalog,
)
from slmops_course.authoring.translate.glossary import add_language
from slmops_course.authoring.translate.languages import TranslationError, find_languages, read_language, write_language
from slmops_course.authoring.translate.pages import Problem, catalogs, check_catalogs, check_rendered, render_language

COLUMNS = ("language", "catalogue", "translated", "fuzzy", "missing", "vanished", "share")


def choose_languages(root: Path, codes: Sequence[str]) -> list[str]:
    """The languages that were named, or all there are. Raises TranslationError for one that is not there."""
    return [read_language(root, code).code for code in codes] if codes else find_languages(root)


def extract(root: Path, codes: Sequence[str] = ()) -> list[Path]:
    """Bring the catalogues up to the English of now; returns the files that changed. Doing it again changes nothing."""
    changed, current = [], catalogs(root)
    for code in choose_languages(root, codes):
        for name, messages in current.items():
            path = catalog_path(root, code, name)
            old = read_catalog(path) if path.is_file() else new_catalog(code)
            if write_catalog(merge(old, messages), path):
                changed.append(path)
    return changed


def status(root: Path, codes: Sequence[str] = ()) -> Iterator[tuple[str, str, Status]]:
    """How far every catalogue is, as (language, catalogue, status)."""
    current = catalogs(root)
    for code in choose_languages(root, codes):
        for name, messages in current.items():
            path = catalog_path(root, code, name)
            yield code, name, reckon_status(read_catalog(path) if path.is_file() else new_catalog(code), messages)


def format_status(rows: Sequence[tuple[str, str, Status]]) -> str:
    """The status as a table, with a line for the whole of each language.

    A share is rounded down: 100 % means that nothing is missing.
    """
    lines = [COLUMNS]
    for code in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == code]
        sums = [sum(getattr(row[2], name) for row in mine) for name in ("translated", "fuzzy", "missing", "vanished")]
        for language, name, one in (*mine, (code, "all", Status(*sums))):
            counts = (one.translated, one.fuzzy, one.missing, one.vanished)
            lines.append((language, name, *map(str, counts), f"{int(100 * one.share)} %"))
    return "\n".join(f"{c[0]:10}{c[1]:20}" + "".join(f"{cell:>12}" for cell in c[2:]) for c in lines)


def render(root: Path, codes: Sequence[str] = (), *, executed: Path | None = None) -> list[Path]:
    """Write what the catalogues give; returns the files that changed.

    `executed` has a folder for each language, such as hi/, with the notebooks as they ran in it: outputs with words come
    from there.
    """
    changed = []
    for code in choose_languages(root, codes):
        for path, content in render_language(root, code, executed=executed / code if executed else None).items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                changed.append(path)
    return changed


def check(root: Path, codes: Sequence[str] = ()) -> list[Problem]:
    """Everything that is wrong with the translations. Nothing is written, so that looking cannot make a stale file fresh."""
    found = []
    for code in choose_languages(root, codes):
        found += check_catalogs(root, code)
        found += check_rendered(root, code)
    return found


def new(root: Path, code: str) -> list[Path]:
    """Begin a language: its settings, its column in the glossary, its empty catalogues. Returns the files made."""
    if not (root / "translations" / "glossary.csv").is_file():
        raise TranslationError("There is no translations/glossary.csv here: expected the course's folder; go there first.")
    made = [write_language(root, code)]
    add_language(root, code)
    return made + extract(root, [code])
