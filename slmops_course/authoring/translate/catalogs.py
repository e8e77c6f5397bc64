"""gettext catalogues: one a document and language. English that changed makes its own message fuzzy, and no other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

import polib

from slmops_course.authoring.translate.documents import Message
from slmops_course.authoring.translate.languages import TranslationError

State = Literal["translated", "fuzzy", "missing"]
WIDTH = 128
ALIKE = 0.6  # how alike two texts are that count as one text changed, from 0 to 1


@dataclass(frozen=True)
class Status:
    """How far a catalogue is."""

    translated: int
    fuzzy: int  # their English changed
    missing: int
    vanished: int  # their English is gone

    @property
    def total(self) -> int:
        return self.translated + self.fuzzy + self.missing

    @property
    def share(self) -> float:
        """Of the messages, the translated ones: 0 to 1. Of no message, all are."""
        return self.translated / self.total if self.total else 1.0


def catalog_path(root: Path, language: str, name: str) -> Path:
    """Where a catalogue is. Example: "hi", "01_introduction" -> translations/hi/po/01_introduction.po"""
    return root / "translations" / language / "po" / f"{name}.po"


def new_catalog(language: str) -> polib.POFile:
    """An empty catalogue. Who has read it through is said in its header; see `review_note` in render.py."""
    catalog = polib.POFile(wrapwidth=WIDTH, check_for_duplicates=True)
    catalog.metadata = {
        "Project-Id-Version": "slmops-course", "Language": language, "MIME-Version": "1.0",
        "Content-Type": "text/plain; charset=UTF-8", "Content-Transfer-Encoding": "8bit", "X-Reviewed-By": "",
    }  # fmt: skip
    return catalog


def read_catalog(path: Path) -> polib.POFile:
    """Read a catalogue. Raises TranslationError for one that is not there, is no catalogue, or has a message twice."""
    if not path.is_file():
        raise TranslationError(f"There is no catalogue {path.name}: expected it in {path.parent}; `slmops translate extract`.")
    try:
        return polib.pofile(str(path), wrapwidth=WIDTH, check_for_duplicates=True)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise TranslationError(f"{path.name} cannot be read as a catalogue ({error}): expected gettext's PO format.") from error


def merge(catalog: polib.POFile, messages: Sequence[Message]) -> polib.POFile:
    """A catalogue of exactly these messages, with what the old one has for them.

    A message whose English is unchanged keeps its entry, also when it moved. One whose English changed keeps its
    translation as a fuzzy one, with the previous English beside it. What has no English any more is kept as obsolete.
    """
    merged = new_catalog("")
    merged.metadata, merged.header = dict(catalog.metadata), catalog.header
    old = list(catalog)
    pairs = _pair(old, messages)
    for message in messages:
        entry = pairs.get((message.context, message.text))
        merged.append(_renew(entry, message) if entry else polib.POEntry(msgctxt=message.context or None, msgid=message.text))
    used = {id(entry) for entry in pairs.values()}
    for entry in old:
        if id(entry) not in used and entry.msgstr:
            merged.append(_obsolete(entry))
    return merged


def _pair(old: list[polib.POEntry], messages: Sequence[Message]) -> dict[tuple[str, str], polib.POEntry]:
    """Each message's old entry, by (context, text): the surest likenesses first, and no entry twice."""
    pairs: dict[tuple[str, str], polib.POEntry] = {}
    used: set[int] = set()
    likenesses = (
        lambda entry, message: entry.msgid == message.text and (entry.msgctxt or "") == message.context,
        lambda entry, message: entry.msgid == message.text,
        lambda entry, message: message.context and entry.msgctxt == message.context,
        lambda entry, message: _are_alike(entry.msgid, message.text),
    )
    for is_like in likenesses:
        for message in messages:
            if (message.context, message.text) in pairs:
                continue
            found = next((e for e in old if id(e) not in used and is_like(e, message)), None)
            if found is not None:
                pairs[message.context, message.text] = found
                used.add(id(found))
    return pairs


def _are_alike(first: str, second: str) -> bool:
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE


def _renew(entry: polib.POEntry, message: Message) -> polib.POEntry:
    """The entry for a message now. It is fuzzy where its English changed under a translation."""
    renewed = polib.POEntry(
        msgctxt=message.context or None, msgid=message.text, msgstr=entry.msgstr, tcomment=entry.tcomment,
        flags=[flag for flag in entry.flags if flag != "fuzzy"],
    )  # fmt: skip
    if not entry.msgstr:
        return renewed
    if entry.fuzzy:
        # Whoever sets a message back to its former English has its former translation back.
        if entry.previous_msgid != message.text:
            renewed.flags.append("fuzzy")
            renewed.previous_msgid = entry.previous_msgid or entry.msgid
    elif entry.msgid != message.text:
        renewed.flags.append("fuzzy")
        renewed.previous_msgid = entry.msgid
    return renewed


def _obsolete(entry: polib.POEntry) -> polib.POEntry:
    return polib.POEntry(
        msgctxt=entry.msgctxt, msgid=entry.msgid, msgstr=entry.msgstr, tcomment=entry.tcomment, flags=entry.flags, obsolete=True
    )


def write_catalog(catalog: polib.POFile, path: Path) -> bool:
    """Write a catalogue where it differs from the file; returns whether it did."""
    text = str(catalog)
    if path.is_file() and path.read_text("utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return True


def state_of(entry: polib.POEntry | None) -> State:
    """Whether an entry may be shown to a reader."""
    if entry is None or not entry.msgstr.strip():
        return "missing"
    return "fuzzy" if entry.fuzzy else "translated"


def lookup(catalog: polib.POFile) -> dict[tuple[str, str], polib.POEntry]:
    """All entries by context and English."""
    return {(entry.msgctxt or "", entry.msgid): entry for entry in catalog if not entry.obsolete}


def reckon_status(catalog: polib.POFile, messages: Iterable[Message]) -> Status:
    """How far a catalogue is, against the English as it is now."""
    entries, messages = lookup(catalog), list(messages)
    states = [state_of(entries.get((message.context, message.text))) for message in messages]
    counts = [states.count(state) for state in ("translated", "fuzzy", "missing")]
    return Status(*counts, vanished=len(list(find_vanished(catalog, messages))))


def find_vanished(catalog: polib.POFile, messages: Iterable[Message]) -> Iterator[polib.POEntry]:
    """Entries with a translation whose English is not in the document any more."""
    present = {(message.context, message.text) for message in messages}
    for entry in catalog:
        if entry.msgstr and (entry.obsolete or (entry.msgctxt or "", entry.msgid) not in present):
            yield entry
