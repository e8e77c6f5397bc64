"""What is particular to a language: one small file of settings, `translations/LANGUAGE/language.toml`."""

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import regex
from babel import Locale, UnknownLocaleError

from slmops_course.errors import CourseError

SETTINGS = "language.toml"


class TranslationError(CourseError):
    """A language that is not there, a settings file that cannot be used, or a catalogue that cannot be read."""


@dataclass(frozen=True)
class Language:
    """The settings of a language, as its language.toml has them."""

    code: str  # ISO 639-1, such as "hi"
    name: str  # as its readers call it
    english_name: str
    scripts: tuple[str, ...]  # Unicode scripts of its prose, such as ("Devanagari",)
    digits: str  # "latin" for 0-9, "native" for the script's own
    length_ratio: tuple[float, float]  # characters of a translation to one of English: the least and the most that is plausible
    not_translated: str  # stands above a passage that has no translation yet
    outdated: str  # stands above a passage whose English has changed since it was translated
    review_machine: str  # what a reader is told of a file that no native reader has gone through
    review_native: str  # and of one that somebody has; {reviewer} is who
    original: str  # the text of the link to the English original


def find_languages(root: Path) -> list[str]:
    """Codes of the languages under `translations/`, sorted. Example: ["hi", "ml", "mr", "ne"]"""
    return sorted(path.parent.name for path in (root / "translations").glob(f"*/{SETTINGS}"))


def read_language(root: Path, code: str) -> Language:
    """The settings of a language. Raises TranslationError for one that is not there, or whose settings are not usable."""
    path = root / "translations" / code / SETTINGS
    if not path.is_file():
        known = ", ".join(find_languages(root)) or "none yet"
        raise TranslationError(
            f"There is no language {code!r}: expected one of {known}; `slmops translate new {code}` begins one."
        )
    try:
        values = tomllib.loads(path.read_text("utf-8"))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        language = Language(**values)
    except (tomllib.TOMLDecodeError, TypeError) as error:
        expected = ", ".join(field.name for field in fields(Language))
        raise TranslationError(f"{path.name} of {code!r} cannot be read ({error}): expected {expected}.") from error
    _validate(language, code)
    return language


def _validate(language: Language, folder: str) -> None:
    where = f"language.toml of {folder!r}"
    if language.code != folder:
        raise TranslationError(f"The {where} has the code {language.code!r}: expected the name of its folder.")
    if language.digits not in ("latin", "native"):
        raise TranslationError(f"The {where} has digits {language.digits!r}: expected 'latin' or 'native'.")
    for script in language.scripts:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            raise TranslationError(
                f"The {where} has the script {script!r}: expected a Unicode script's name, such as Devanagari."
            ) from None
    low, high = language.length_ratio
    if not 0 < low < 1 < high:
        raise TranslationError(f"The {where} has length_ratio {low}, {high}: expected two numbers around 1.")


def write_language(root: Path, code: str) -> Path:
    """Begin a language: write settings that a volunteer completes, from what Unicode's tables know. Returns the file.

    Example: write_language(root, "ta") -> translations/ta/language.toml, with name "தமிழ்" and script "Tamil"

    Raises TranslationError for a code that Unicode's tables do not have, and for a language that is there already.
    """
    path = root / "translations" / code / SETTINGS
    if path.exists():
        raise TranslationError(f"The language {code!r} is there already: expected a new one; edit {SETTINGS} instead.")
    try:
        locale = Locale.parse(code)
    except (ValueError, UnknownLocaleError):
        raise TranslationError(f"There is no language {code!r}: expected an ISO 639-1 code, such as 'ta'.") from None
    name = locale.get_display_name(code)
    scripts = sorted({found for letter in name if (found := _script(letter)) not in ("Common", "Inherited")})
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"code": code, "name": name, "english_name": locale.get_display_name("en"), "scripts": json.dumps(scripts)}
    path.write_text(_TEMPLATE.format(**values), "utf-8")
    return path


def _script(letter: str) -> str:
    """The Unicode script of a letter, of those that Unicode's tables name a language in. Example: "க" -> "Tamil" """
    for script in ("Common", "Inherited", *_SCRIPTS):
        if regex.match(rf"\p{{Script={script}}}", letter):
            return script
    return "Common"


_SCRIPTS = (
    "Latin", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala",
    "Arabic", "Hebrew", "Cyrillic", "Greek", "Armenian", "Georgian", "Ethiopic", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan",
    "Han", "Hiragana", "Katakana", "Hangul", "Ol_Chiki", "Meetei_Mayek",
)  # fmt: skip

_TEMPLATE = """code = "{code}"
name = "{name}"
english_name = "{english_name}"
# Unicode scripts that prose is written in. Latin is always allowed, for names and for terms kept in English.
scripts = {scripts}
# "latin" for 0-9, "native" for the script's own digits. Outputs of programs have 0-9, so text about them is easier with these.
digits = "latin"
# A translation's characters for each one of English: the least and the most that is plausible.
length_ratio = [0.5, 2.0]

# What a reader sees. Write these in the language.
not_translated = "Not translated yet:"
outdated = "The English has changed since this was translated; in English:"
review_machine = "Translated with the help of a machine. No native reader has gone through it yet."
review_native = "Translated with the help of a machine, and read through by {{reviewer}}."
original = "English original"
"""
