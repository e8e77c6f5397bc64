"""The update client of one device: it fetches what The Update Framework (TUF) signs, installs it, and goes back.

A device trusts nothing but the root metadata that it was built with; python-tuf, the reference implementation, verifies
all the rest from there, see `publisher`. A device fetches only the files that it does not hold: where a new version
changed nothing but its adapter, the adapter is all that travels.

Not covered: a transfer that breaks off begins the file again, so what resumes is whole files and not bytes; a change
inside a large file travels as the whole file; a clock that somebody else sets back hides that metadata has expired. Who
holds the device itself holds all.
Source: https://theupdateframework.github.io/specification/latest/#detailed-client-workflow
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from slmops_course.operations.bundles import compare_files
from slmops_course.operations.offers import (
    Release,
    UpdateError,
    read_offer,
    read_release,
    replace_durably,
    utc_now,
    write_durably,
)

PIECE_BYTES = 65_536

Tap = Callable[[str, bytes], bytes]  # is given each piece that arrives, with its URL: counts it, changes it, cuts it off

# What a device says to an error of python-tuf's, by the name of its class or of the nearest one that it inherits from.
REASONS = {
    "ExpiredMetadataError": "metadata within its lifetime; if this clock is right, newer metadata is held back or the "
    "publisher stopped signing: run the publisher's refresh",
    "BadVersionNumberError": "the newest version that this device has seen or that other metadata names; old metadata is "
    "served again or mixed with new: serve the publisher's folder as it is",
    "UnsignedMetadataError": "the signature of a key that the root names; another key signed this: publish with the right one",
    "DeserializationError": "signed metadata in JSON; what is served was damaged: serve the publisher's folder as it is",
    "LengthOrHashMismatchError": "the bytes that were signed; the file was changed after that: serve the publisher's copy",
    "DownloadLengthMismatchError": "a file no longer than was signed; more is sent, perhaps without end: serve the "
    "publisher's copy",
    "DownloadHTTPError": "every file that the metadata names; the server's copy is not whole: serve the publisher's folder",
    "DownloadError": "an answer from the server; check the connection and update again later",
    "RepositoryError": "metadata as the publisher signed it; serve the publisher's folder as it is",
    "HTTPError": "a transfer that comes to its end; check the connection and update again",
    "OSError": "room on the disk, and files that can be read and written; mend that and update again",
}


@dataclass(frozen=True)
class Offer:
    """What a channel offers a device."""

    release: Release
    withdrawn: tuple[int, ...]  # versions that turned out bad: never to return to
    new: bool  # it is not what runs here, and it did not fail here before
    missing_bytes: int  # of its files, those that the device does not hold
    total_bytes: int


@dataclass(frozen=True)
class Installed:
    """A device's pointer: one small file, whose replacement is the whole installation."""

    running: Release | None = None
    confirmed: bool = False  # the running version was seen to work
    last_good: Release | None = None  # where `rollback` goes to; its files are kept
    refused: tuple[int, ...] = ()  # versions that failed on this device


@dataclass(frozen=True)
class Running:
    """A version that may be started: every file of its folder was checked."""

    release: Release
    folder: Path
    confirmed: bool


@dataclass(frozen=True)
class Update:
    """What `Device.update` did, and the bytes that came for it."""

    number: int  # the version that runs now
    installed: bool
    metadata_bytes: int
    file_bytes: int
    total_bytes: int  # what the files would have taken had the device held none of them


class Device:
    """The update client of one device: a folder that holds what it trusts, the files, and what runs.

    Example:
        device = Device(Path("device-1"), source="http://127.0.0.1:8000", root=root, channel="canary")
        device.update()                   # Update(number=3, installed=True, …, file_bytes=1_204_224, …)
        model = device.running().folder   # every file's hash is checked first
        device.confirm()                  # it works; or device.rollback(): it is not installed here again

    `source` is the address of a server, or the publisher's folder where there is none; `root` the trusted root metadata.
    `on_step` is told the name of each step before it is done, and `tap` is given each piece that arrives: progress for a
    person, and for a test the place to cut the power. Whatever is cut, the pointer names a whole version: files are
    fetched to one side, checked, and kept for the next attempt; the pointer is replaced last.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: str | Path,
        root: bytes,
        channel: str,
        clock: Callable[[], datetime] = utc_now,
        on_step: Callable[[str], None] = lambda step: None,
        tap: Tap = lambda url, piece: piece,
    ):
        self.folder, self.source, self.root, self.channel = folder, source, root, channel
        self.clock, self.on_step, self.tap = clock, on_step, tap
        self.received = {"metadata": 0, "files": 0}  # bytes, since this object was made

    def check(self) -> Offer:
        """What the channel offers; nothing but metadata is fetched. Raises UpdateError, see `REASONS`.

        From then on this device does not return to a version that the offer says is withdrawn.
        """
        with self._locked():
            return self._offer(self._updater())[0]

    def fetch(self) -> Offer:
        """Fetch the files of the offered version that are not held yet. What runs stays as it is."""
        with self._locked():
            updater = self._updater()
            offer, missing = self._offer(updater)
            for target in missing:
                self.on_step(target.path)
                self._obtain(updater, target, self._held(target.path))
            return offer

    def install(self) -> bool:
        """Make the offered version the one that runs; False where it runs already, or failed here before.

        The offer is checked again, so a version that was halted while it was being fetched is not installed. Raises
        UpdateError where files are missing.
        """
        with self._locked():
            offer, missing = self._offer(self._updater())
            now, release = self.installed, offer.release
            if not offer.new and (release != now.running or not compare_files(self._bundle(release), release.files)):
                return False
            if missing:
                raise UpdateError(
                    f"{len(missing)} files of {release.name} {release.number} are not here: expected all; the offer changed "
                    "since they were fetched, or the disk lost them: fetch again."
                )
            self.on_step("bundle")
            self._build(release)
            if offer.new:
                self.on_step("pointer")
                self._point(Installed(release, False, _return_to(now, offer), now.refused))
            self.on_step("tidy")
            self._tidy()
            return True

    def update(self) -> Update:
        """Fetch and install what the channel offers. Raises UpdateError where it is refused; what ran runs on."""
        before = dict(self.received)
        offer, installed = self.fetch(), self.install()
        came = {kind: self.received[kind] - before[kind] for kind in before}
        return Update(self.installed.running.number, installed, came["metadata"], came["files"], offer.total_bytes)

    def confirm(self) -> None:
        """Say that the running version works: from now on it is one to return to."""
        self.running()
        with self._locked():
            self._point(replace(self.installed, confirmed=True))

    def rollback(self) -> Release:
        """Return to the last version that was confirmed here; the one that ran is not installed here again.

        Needs no connection. Raises UpdateError where there is no such version, or where its files are damaged.
        """
        with self._locked():
            now = self.installed
            if now.last_good is None:
                raise UpdateError(
                    "This device holds no earlier version to return to: expected one that was confirmed here and is not "
                    "withdrawn; update to what the channel offers."
                )
            self._refuse_damage(now.last_good)
            self.on_step("pointer")
            self._point(Installed(now.last_good, True, None, (*now.refused, now.running.number)))
            return now.last_good

    def running(self) -> Running:
        """What runs, every file of it checked against its hash. Raises UpdateError where one is not as it should be."""
        now = self.installed
        if now.running is None:
            raise UpdateError("No version is installed on this device: expected one; update it.")
        self._refuse_damage(now.running)
        return Running(now.running, self._bundle(now.running), now.confirmed)

    @property
    def installed(self) -> Installed:
        """What the pointer says. Raises UpdateError where it is damaged."""
        path = self.folder / "installed.json"
        if not path.exists():
            return Installed()
        try:
            values = json.loads(path.read_bytes())
            running, good = (values[name] and read_release(values[name]) for name in ("running", "last_good"))
            return Installed(running, values["confirmed"], good, tuple(values["refused"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UpdateError(f"{path.name} is damaged ({error}): expected a device's pointer; delete it and update.") from None

    def _updater(self):
        from tuf.ngclient import Updater

        self.on_step("metadata")
        base = self.source if isinstance(self.source, str) else "folder:"
        updater = Updater(
            str(self.folder / "metadata"), f"{base}/metadata", None, f"{base}/targets",
            _open_fetcher(self.source, self._receive), bootstrap=self.root,
        )  # fmt: skip
        # python-tuf takes the machine's time when the updater is made, and has no other way to be given one.
        updater._trusted_set.reference_time = self.clock()
        updater.refresh()
        return updater

    def _receive(self, url: str, piece: bytes) -> bytes:
        piece = self.tap(url, piece)
        self.received["files" if "/targets/files/" in url else "metadata"] += len(piece)
        return piece

    def _offer(self, updater) -> tuple[Offer, list]:
        """The offer, and the signed targets of the files that are not held."""
        target = updater.get_targetinfo(f"channels/{self.channel}.json")
        if target is None:
            raise UpdateError(f"The server has no channel {self.channel!r}: expected an offer on it; publish one.")
        kept = self.folder / "offers" / f"{self.channel}.json"
        self._obtain(updater, target, kept)
        release, withdrawn = read_offer(kept.read_bytes())
        targets = [updater.get_targetinfo(f"files/{sha256}") for sha256 in sorted(set(release.files.values()))]
        if any(each is None or each.path != f"files/{each.hashes['sha256']}" for each in targets):
            raise UpdateError(f"{release.name} {release.number} has files that are not signed: expected all; publish again.")
        missing = [each for each in targets if updater.find_cached_target(each, str(self._held(each.path))) is None]
        now, sizes = self.installed, [sum(each.length for each in some) for some in (missing, targets)]
        if now.last_good and now.last_good.number in withdrawn:
            self._point(replace(now, last_good=None))
        new = release != now.running and release.number not in now.refused
        return Offer(release, withdrawn, new, *sizes), missing

    def _obtain(self, updater, target, path: Path) -> None:
        """Have a signed target in a place of its own; length and hash are checked before a byte is written."""
        if updater.find_cached_target(target, str(path)) is None:
            updater.download_target(target, str(path.with_name("partial")))
            replace_durably(path.with_name("partial"), path)

    def _held(self, target: str) -> Path:
        return self.folder / target  # files/<hash>, as on the server

    def _bundle(self, release: Release) -> Path:
        return self.folder / "bundles" / release.digest[:16]

    def _build(self, release: Release) -> None:
        """Make the folder with the release's files under their own names. They share their bytes with the store."""
        bundle = self._bundle(release)
        if not compare_files(bundle, release.files):
            return
        partial = bundle.with_name("partial")
        for leftover in (partial, bundle):  # what was damaged runs no more, so it may go
            shutil.rmtree(leftover, ignore_errors=True)
        for path, sha256 in release.files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._held(f"files/{sha256}"), partial / path)
            except OSError:  # not every file system has hard links
                shutil.copyfile(self._held(f"files/{sha256}"), partial / path)
        os.replace(partial, bundle)

    def _refuse_damage(self, release: Release) -> None:
        problems = compare_files(self._bundle(release), release.files)
        if problems:
            raise UpdateError(f"{release.name} {release.number} is damaged ({problems[0]}): expected its signed files; update.")

    def _point(self, installed: Installed) -> None:
        write_durably(self.folder / "installed.json", json.dumps(asdict(installed), sort_keys=True).encode())

    def _tidy(self) -> None:
        kept = [each for each in (self.installed.running, self.installed.last_good) if each]
        bundles, files = ({self._bundle(each).name for each in kept}, {sha for each in kept for sha in each.files.values()})
        leftovers = (self.folder / "metadata").glob("tmp*")  # of python-tuf's own writing, where the power was cut
        for path in [*(self.folder / "bundles").iterdir(), *(self.folder / "files").iterdir(), *leftovers]:
            if path.name not in bundles | files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One operation at a time on a device, and its errors in words."""
        from filelock import FileLock
        from tuf.api.exceptions import DownloadError, RepositoryError
        from urllib3.exceptions import HTTPError

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "device.lock"):
                yield
        except (RepositoryError, DownloadError, HTTPError, OSError) as error:
            expected = next(REASONS[each.__name__] for each in type(error).__mro__ if each.__name__ in REASONS)
            raise UpdateError(f"The update is refused ({str(error) or type(error).__name__}): expected {expected}.") from error


def _open_fetcher(source: str | Path, tap: Tap):
    """What brings files to python-tuf: its own HTTP client, or for a demonstration without a server, a folder."""
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface, Urllib3Fetcher

    server = Urllib3Fetcher() if isinstance(source, str) else None

    class Fetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            if server:
                pieces = server.fetch(url)
            elif (path := source / url.removeprefix("folder:/")).is_file():
                pieces = _pieces(path)
            else:
                raise DownloadHTTPError(f"there is no {path.name}", 404)
            return (tap(url, piece) for piece in pieces)

    return Fetcher()


def _return_to(now: Installed, offer: Offer) -> Release | None:
    """The version to keep for a rollback once the offered one is installed."""
    if now.confirmed and now.running.number not in offer.withdrawn:
        return now.running
    return now.last_good if now.last_good != offer.release else None


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
