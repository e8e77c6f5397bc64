"""The reader's language: which one it is, and what the package says in it.

A message is English in the code and is looked up when it is shown: `_("epoch")`. Values go in afterwards, so that a
translator sees their names: `_("{count} messages").format(count=3)`. What has no translation stays English.
"""

import gettext
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from slmops_course.errors import CourseError

ENGLISH = "en"
DOMAIN = "slmops"
CATALOGS = Path(__file__).parent / "locale"  # LANGUAGE/LC_MESSAGES/slmops.mo, made by `slmops translate render`
VARIABLE = "SLMOPS_LANG"
JUPYTERLAB_SETTING = Path("@jupyterlab/translation-extension/plugin.jupyterlab-settings")

SCRIPT_FONTS = {
    "Devanagari": {
        "Noto Sans Devanagari", "Noto Serif Devanagari", "Lohit Devanagari", "Mangal", "Nirmala UI", "Kohinoor Devanagari",
        "Devanagari MT",
    },
    "Malayalam": {
        "Noto Sans Malayalam", "Noto Serif Malayalam", "Lohit Malayalam", "Kartika", "Nirmala UI", "Malayalam MN",
        "Malayalam Sangam MN",
    },
}  # fmt: skip

_in_use: list[tuple[str, Path]] = []  # one pair, language and folder of catalogues, once it was chosen


class LanguageError(CourseError):
    """A language that was asked for and is not there."""


def _(message: str) -> str:
    """A message in the reader's language. Example: _("epoch") -> "एपॉक" for a reader of Hindi, if that is translated"""
    if not message or current() == ENGLISH:
        return message
    return _load(*_in_use[0]).gettext(message)


def marked(message: str) -> str:
    """The message itself, marked for translators. For constants, which are looked up with `_` only when they are shown."""
    return message


def available(folder: Path = CATALOGS) -> list[str]:
    """The languages that the package speaks. Example: ["en", "hi"]"""
    return [ENGLISH, *sorted(path.parent.parent.name for path in folder.glob(f"*/LC_MESSAGES/{DOMAIN}.mo"))]


def current() -> str:
    """The language in use. The first call chooses it, see `choose`, where nothing was said by `use` before."""
    if not _in_use:
        use(choose(os.environ, jupyterlab_settings(os.environ), place=Path.cwd()))
    return _in_use[0][0]


def use(language: str, *, folder: Path = CATALOGS) -> None:
    """Speak a language from now on, such as "hi". Raises LanguageError for one that is not there."""
    known = available(folder)
    if language not in known:
        raise LanguageError(f"There is no translation into {language!r}: expected one of {', '.join(known)}.")
    _in_use[:] = [(language, folder)]


def choose(
    environment: Mapping[str, str], settings: Path | None, *, place: Path | None = None, folder: Path = CATALOGS
) -> str:
    """The reader's language: what SLMOPS_LANG says, else that of the translated notebook that runs in `place`, else
    JupyterLab's, else English. `slmops --lang` sets the variable.

    What the variable says must be there, and `use` checks that. JupyterLab's language was chosen for its menus, so one that
    the course lacks is English here.

    Example: choose({"SLMOPS_LANG": "ne_NP.UTF-8"}, None) -> "ne"
    """
    if environment.get(VARIABLE):
        return _language_of(environment[VARIABLE])
    parts = place.parts[-3:] if place else ()
    if len(parts) == 3 and (parts[0], parts[2]) == ("translations", "notebooks") and parts[1] in available(folder):
        return parts[1]
    chosen = _language_of(read_jupyterlab_locale(settings)) if settings else ENGLISH
    return chosen if chosen in available(folder) else ENGLISH


def jupyterlab_settings(environment: Mapping[str, str]) -> Path | None:
    """The folder of JupyterLab's user settings; None outside of a kernel that JupyterLab, or another server, started."""
    if "JPY_SESSION_NAME" not in environment and "JPY_PARENT_PID" not in environment:
        return None
    from jupyter_core.paths import jupyter_config_dir

    return Path(environment.get("JUPYTERLAB_SETTINGS_DIR") or Path(jupyter_config_dir()) / "lab" / "user-settings")


def read_jupyterlab_locale(settings: Path) -> str:
    """The locale that the reader set in JupyterLab, such as "hi_IN"; "" where none is set or the file is unreadable."""
    import json5

    try:
        locale = json5.loads((settings / JUPYTERLAB_SETTING).read_text("utf-8")).get("locale", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return locale if isinstance(locale, str) and locale != "default" else ""


def _language_of(locale: str) -> str:
    """Example: "hi_IN.UTF-8" -> "hi"; "" -> "en" """
    return locale.replace("-", "_").split("_")[0].split(".")[0].lower() or ENGLISH


@lru_cache(maxsize=8)
def _load(language: str, folder: Path) -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, folder, languages=[language])
