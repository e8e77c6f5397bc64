"""What a registered version is, which of them may be promoted, and how a person reads them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.operations.bundles import bundle_digest, compare_files
from slmops_course.operations.gate import GateReport
from slmops_course.operations.lineage import format_lineage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
RESERVED_NAME = re.compile(r"latest|v?\d+", re.IGNORECASE)
PRODUCTION = "production"


class RegistryError(CourseError):
    """A version that is not there or may not be promoted, or a registry that cannot be read."""


@dataclass(frozen=True)
class Version:
    """One registered version of a model."""

    name: str
    number: int  # 1, 2, 3, …
    folder: Path  # of its files
    files: dict  # path below the folder -> SHA-256
    lineage: dict  # what it was made of and how, see `lineage_of`
    report: GateReport | None
    aliases: tuple[str, ...]
    digest: str  # SHA-256 over files and lineage
    registered_at: str  # such as "2026-08-01T12:00:00+00:00"


@dataclass(frozen=True)
class Move:
    """An alias set to a version, or moved from one to another."""

    at: str
    action: str  # "promote" or "rollback"
    before: int | None
    after: int


def check_name(name: str, *, what: str = "a model") -> None:
    """Raise RegistryError for a name that is none: names become folders, tags and parts of addresses.

    Example: "support-desk" and "desk_2" pass; "", "../desk", "a b", "latest" and "v2" do not (MLflow keeps the last two)
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or RESERVED_NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot be the name of {what}: expected letters, digits, hyphens and underscores, at most 60, and not "
            "latest or a number like v2; choose another."
        )


def version_digest(files: Mapping[str, str], lineage: Mapping) -> str:
    """One SHA-256 for what a version is and where it comes from. Raises RegistryError for a lineage that is no plain JSON."""
    return hashlib.sha256((to_json(files) + to_json(lineage)).encode()).hexdigest()


def refuse_unjudged(version: Version, current: Version | None) -> None:
    """Raise RegistryError unless a version's gate report passed, and compared it with the version that it is to follow."""
    name, report = f"{version.name} {version.number}", version.report
    if report is None:
        raise RegistryError(f"{name} has no gate report: expected one that passed; judge it, then register it again with it.")
    if not report.passed:
        lines = "; ".join(f"{check.name}: {check.found}, expected {check.expected}" for check in report.failures)
        raise RegistryError(f"{name} did not pass the gate ({lines or 'no line was judged'}): expected every line to pass.")
    if current is None:
        return
    if report.current is None or report.current_digest not in (None, bundle_digest(current.files)):
        raise RegistryError(
            f"{name} was judged {f'against {report.current}' if report.current else 'as a first release'}, but it is to follow "
            f"{current.name} {current.number}: expected a comparison with that; judge it again."
        )


def standing(moves: Sequence[Move], current: int) -> list[int]:
    """The versions that an alias went through and can go back to, oldest first, the current one last.

    Example: promoted 1, 2, 3 and rolled back to 2 -> [1, 2]
    """
    stack: list[int] = []
    for move in moves:
        if move.before is not None and stack[-1:] != [move.before]:
            stack.append(move.before)  # moved by something else than this course
        if move.action == "rollback":
            while stack and stack[-1] != move.after:
                stack.pop()
        if stack[-1:] != [move.after]:
            stack.append(move.after)
    return stack if stack[-1:] == [current] else [*stack, current]


def describe(version: Version) -> str:
    """A version for a person: what it is, where it stands, its files, its lineage and its gate report, as Markdown."""
    sizes = {name: _size(version.folder / name) for name in version.files}
    aliases = ", ".join(version.aliases) or "none"
    lines = [f"# {version.name} {version.number}", "", f"Registered {version.registered_at}; aliases: {aliases}.", ""]
    lines += ["| file | bytes | sha256 |", "|---|---:|---|"]
    lines += [f"| {name} | {sizes[name]} | {sha256[:12]}… |" for name, sha256 in version.files.items()]
    problems = compare_files(version.folder, version.files)
    lines += ["", f"DAMAGED: {'; '.join(problems)}." if problems else "All files are as they were registered.", ""]
    lines += ["## Lineage", "", format_lineage(version.lineage), "", "## Gate", ""]
    return "\n".join([*lines, str(version.report or "There is no gate report.")])


def table(versions: Iterable[Version]) -> str:
    """Versions as a Markdown table; empty when there is none."""
    lines = []
    for v in versions:
        gate = "none" if v.report is None else "passed" if v.report.passed else "refused"
        aliases, made_by = ", ".join(v.aliases), v.lineage.get("artifact", "")
        lines.append(f"| {v.name} | {v.number} | {aliases} | {gate} | {v.registered_at} | {made_by} |")
    head = ["| model | version | aliases | gate | registered | made by |", "|---|---:|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def to_json(value) -> str:
    """JSON that is the same for the same value. Raises RegistryError for what JSON does not know."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"The lineage is no plain JSON ({error}): expected texts, numbers, lists and objects.") from None


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,}" if path.is_file() else "missing"
