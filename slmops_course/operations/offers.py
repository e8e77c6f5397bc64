"""What a publisher says and a device reads: a version by the hashes of its files, offered on a channel."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.operations.bundles import BundleError, check_names


class UpdateError(CourseError):
    """An update that cannot be published, or that a device refuses. The device keeps the version that it runs."""


@dataclass(frozen=True)
class Release:
    """A version as devices know it: its number and its files by their hashes."""

    name: str
    number: int
    files: Mapping[str, str]  # path -> SHA-256

    @property
    def digest(self) -> str:
        """SHA-256 of the release's name, number, paths and hashes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_release(values: Mapping) -> Release:
    """A release out of plain JSON. Raises UpdateError for paths that leave their folder, and for files without a hash.

    Example: {"name": "desk", "number": 2, "files": {"model.onnx": "09ab…"}} -> Release("desk", 2, {"model.onnx": "09ab…"})
    """
    release = Release(str(values["name"]), int(values["number"]), dict(values["files"]))
    try:
        check_names(release.files)
    except BundleError as error:
        raise UpdateError(str(error)) from None
    wrong = [path for path, sha256 in release.files.items() if not re.fullmatch("[0-9a-f]{64}", sha256)]
    if wrong or not release.files:
        found = f"{wrong[0]!r} without a SHA-256" if wrong else "no files"
        raise UpdateError(f"{release.name} {release.number} has {found}: expected files with hashes; register it again.")
    return release


def write_offer(release: Release, withdrawn: Iterable[int]) -> bytes:
    """What stands on a channel: a release, and the versions that turned out bad."""
    return json.dumps({"release": asdict(release), "withdrawn": sorted(withdrawn)}, sort_keys=True).encode()


def read_offer(text: bytes) -> tuple[Release, tuple[int, ...]]:
    """The reverse of `write_offer`. Raises UpdateError as `read_release` does."""
    values = json.loads(text)
    return read_release(values["release"]), tuple(values["withdrawn"])


def utc_now() -> datetime:
    """The time by this machine's clock. A device must be able to trust it, to notice that metadata has expired."""
    return datetime.now(UTC)


def write_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file whole, as `replace_durably` puts it in its place; `mode` is its permissions from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
    replace_durably(partial, path)


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a file over another, its bytes on the disk first: a power cut leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
