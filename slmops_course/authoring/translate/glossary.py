"""The terms that are agreed for every language: `translations/glossary.csv`."""

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex

from slmops_course.authoring.translate.languages import TranslationError

COLUMNS = ("term", "keep")


@dataclass(frozen=True)
class Term:
    """A term of the course and how it is said in a language."""

    english: str
    keep: bool  # stays in English letters
    forms: tuple[str, ...]  # what it is in the language: any of them; with `keep`, what may stand for it too


def read_glossary(root: Path, language: str) -> list[Term]:
    """The terms with what is agreed for a language; of a term without an agreement, `forms` is empty.

    Raises TranslationError for a file that is not there, or has no column for the language or a term twice.
    """
    path = root / "translations" / "glossary.csv"
    if not path.is_file():
        raise TranslationError("There is no glossary.csv: expected term, keep and the languages in it.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    for column in (*COLUMNS, language):
        if column not in columns:
            raise TranslationError(f"glossary.csv has the columns {', '.join(columns)}: expected {column!r} among them.")
    terms = [row["term"].strip() for row in rows]
    twice = sorted({term for term in terms if terms.count(term) > 1})
    if twice:
        raise TranslationError(f"glossary.csv has {twice[0]!r} twice: expected each term once; take one line out.")
    return [Term(row["term"].strip(), row["keep"].strip() == "yes", _split(row[language])) for row in rows]


def _split(cell: str | None) -> tuple[str, ...]:
    return tuple(form.strip() for form in (cell or "").split("|") if form.strip())


def add_language(root: Path, language: str) -> bool:
    """Give the glossary an empty column for a language; returns whether it was missing."""
    path = root / "translations" / "glossary.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    if language in names:
        return False
    names.insert(names.index("note") if "note" in names else len(names), language)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return True


def find_terms(text: str, terms: Iterable[Term]) -> list[Term]:
    """The terms in an English text, the longest first: "student model" hides the "model" in it.

    Example: "Two student models learn." with terms "student model", "model" -> the first
    """
    found = []
    for term in sorted(terms, key=lambda term: -len(term.english)):
        pattern = regex.compile(rf"(?<![\w-]){regex.escape(term.english)}(?:s|es)?(?![\w-])", regex.IGNORECASE)
        text, count = pattern.subn(" \x00 ", text)
        if count:
            found.append(term)
    return found


def has_form(text: str, term: Term) -> bool:
    """Whether a text of the language has a term in one of its agreed forms, inflected or not.

    Endings change in these languages: the last vowel sign, virama or anusvara of a word need not be the agreed one, and more
    may follow. Example: "पैमाना" is found in "पैमाने पर", "മോഡൽ" in "മോഡലുകൾ".
    """
    text = _normalize(text)
    forms = [_loosen(_normalize(form)) for form in term.forms] + ([regex.escape(term.english)] if term.keep else [])
    return any(regex.search(rf"(?<![\p{{L}}\p{{M}}]){form}", text, regex.IGNORECASE) for form in forms)


def _normalize(text: str) -> str:
    """One way to write each letter: ज़ has two in Unicode, and joiners that only change the look are taken out."""
    return unicodedata.normalize("NFC", text).replace("\u200c", "").replace("\u200d", "")


def _loosen(form: str) -> str:
    """A pattern for a form whose words may be inflected."""
    return r"[\p{L}\p{M}]*[\s-]+".join(_stem(word) for word in regex.split(r"[\s-]+", form))


# Malayalam's chillu letters turn back into full ones when an ending follows: മോഡൽ, മോഡലുകൾ; ലെയർ, ലെയറുകൾ.
_CHILLU = {"ൻ": "ന", "ൽ": "ല", "ർ": "[രറ]", "ൾ": "ള", "ൺ": "ണ"}


def _stem(word: str) -> str:
    if word[-1] in _CHILLU and len(word) > 2:
        return regex.escape(word[:-1]) + f"(?:{word[-1]}|{_CHILLU[word[-1]]})"
    stem = regex.sub(r"\p{M}$", "", word) if len(word) > 3 else word
    return regex.escape(stem)


def english_words(terms: Sequence[Term]) -> Mapping[str, bool]:
    """Every word of the glossary's English, lower case, and whether it stays in English."""
    words: dict[str, bool] = {}
    for term in terms:
        for word in regex.findall(r"[A-Za-z]+", term.english.lower()):
            words[word] = words.get(word, False) or term.keep
    return words
