"""The signed side of updates: a repository of The Update Framework (TUF) that offers versions on channels.

The root metadata names the keys of three more roles: targets (which files there are, with their hashes), snapshot (which
targets metadata is current) and timestamp (which snapshot is current, signed anew every few days). python-tuf, the
reference implementation, signs them all. A channel, such as a ring of a rollout, is one small target that names a version
and its files by their hashes. Files are targets named by their hash, so what two versions share is stored once.
Source: https://theupdateframework.github.io/specification/latest/
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from slmops_course.artifacts import file_sha256
from slmops_course.operations.offers import (
    Release,
    UpdateError,
    read_offer,
    read_release,
    replace_durably,
    utc_now,
    write_durably,
    write_offer,
)

# A device that is kept from newer metadata notices when the timestamp runs out, so that lifetime is the shortest.
LIFETIMES_DAYS = {"root": 365, "targets": 90, "snapshot": 21, "timestamp": 7}


class Publisher:
    """A TUF repository as a folder of files, which any static web server can serve.

    Example:
        publisher = Publisher(Path("build/updates"), keys_folder=Path("build/keys"))
        publisher.publish(version, channels=["canary"])           # a registry's version: name, number, folder, files
        Path("root.json").write_bytes(publisher.root)             # goes into each device when it is built

    The private keys (ed25519, made when there is no repository yet) lie in `keys_folder`, readable for their owner only, and
    never in what is served. A real deployment keeps the root key offline, in hardware and with several people of whom a
    threshold must sign, the targets key with whoever releases, and only the keys of snapshot and timestamp within reach
    of the publishing machine, in a key management service that signs for it: securesystemslib has signers for these.

    Not covered: each role has one key and needs one signature, so whoever steals the last three publishes what they like;
    thresholds of several keys, delegated targets, and replacing a key, which is a new root signed by the old and the new
    one. Devices would follow such a root, as python-tuf's client does. Nothing is ever deleted from what is served.
    Source: https://theupdateframework.github.io/specification/latest/#key-management-and-migration

    Raises UpdateError for keys that lie in what is served, or that are not those of the repository.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keys_folder: Path,
        clock: Callable[[], datetime] = utc_now,
        lifetimes_days: Mapping[str, float] = LIFETIMES_DAYS,
    ):
        if keys_folder.resolve().is_relative_to(folder.resolve()):
            raise UpdateError(f"The keys would lie in {keys_folder}, in what is served: expected another place; choose one.")
        self.folder, self.keys_folder = folder, keys_folder
        self.clock, self.lifetimes_days = clock, dict(lifetimes_days)
        with self._lock():
            fresh = not (folder / "metadata" / "timestamp.json").exists()
            self._signers = {role: _load_signer(keys_folder / f"{role}.pem", make=fresh) for role in LIFETIMES_DAYS}
            if fresh:
                self._create()
            roles = self._load("root").signed.roles
            for role, signer in self._signers.items():
                if signer.public_key.keyid not in roles[role].keyids:
                    raise UpdateError(f"The root names another key than {role}.pem: expected the repository's; bring it back.")

    @property
    def root(self) -> bytes:
        """The first root metadata: the one thing that a device must get in a way that it can trust."""
        return (self.folder / "metadata" / "1.root.json").read_bytes()

    def publish(self, version, *, channels: Sequence[str], withdrawn: Sequence[int] = ()) -> list[str]:
        """Offer a version on some channels from now on. Going back to an older one is a publication like any other.

        `version` has a name, a number, a folder and the hashes of its files, as a registry's version has. `withdrawn` are
        versions that no device shall return to. Returns the roles that were signed anew; the timestamp is written last, so
        a device sees all of it or nothing. Raises UpdateError for a file that is not what its hash says, and for a channel
        whose name is not made of letters, digits and hyphens.
        """
        release = read_release({"name": version.name, "number": version.number, "files": dict(version.files)})
        text = write_offer(release, withdrawn)
        sha256 = hashlib.sha256(text).hexdigest()
        with self._lock():
            for path, wanted in release.files.items():
                self._store(version.folder / path, wanted)
            targets = self._channels()
            for channel in channels:
                if not re.fullmatch(r"[a-z0-9-]{1,40}", channel):
                    raise UpdateError(f"The channel is named {channel!r}: expected a to z, digits and hyphens; rename it.")
                name = f"channels/{channel}.json"
                write_durably(self._served(name, sha256), text)
                targets[name] = self._target(name, sha256)
            for offered in self._offers(targets).values():
                for wanted in offered.files.values():
                    targets[f"files/{wanted}"] = self._target(f"files/{wanted}", wanted)
            return self._commit(targets=targets)

    def refresh(self) -> list[str]:
        """Sign anew each role that has less than half of its lifetime left; call it daily. Returns the roles."""
        with self._lock():
            return self._commit()

    def offered(self) -> dict[str, int]:
        """The version's number on each channel, such as {"all": 2, "canary": 3}."""
        return {name[9:-5]: offered.number for name, offered in sorted(self._offers(self._channels()).items())}

    def expiries(self) -> dict[str, datetime]:
        """When the metadata of each role runs out: what somebody should be warned of in time."""
        return {each.signed.type: each.signed.expires for each in (self._load("root"), *self._metadata())}

    def _channels(self) -> dict:
        listed = self._metadata()[2].signed.targets
        return {name: target for name, target in listed.items() if name.startswith("channels/")}

    def _offers(self, channels: Mapping) -> dict[str, Release]:
        found = {name: self._served(name, target.hashes["sha256"]) for name, target in channels.items()}
        return {name: read_offer(path.read_bytes())[0] for name, path in found.items()}

    def _served(self, target: str, sha256: str) -> Path:
        """A target's file. Its name begins with its hash, so what was offered before stays beside what is offered now."""
        folder, _, name = target.rpartition("/")
        return self.folder / "targets" / folder / f"{sha256}.{name}"

    def _store(self, source: Path, sha256: str) -> None:
        served = self._served(f"files/{sha256}", sha256)
        if served.is_file() and file_sha256(served) == sha256:
            return
        served.parent.mkdir(parents=True, exist_ok=True)
        partial = served.with_name("partial")
        shutil.copyfile(source, partial)
        if file_sha256(partial) != sha256:
            raise UpdateError(f"{source.name} is not what its hash says: expected the version as registered; verify it.")
        replace_durably(partial, served)

    def _target(self, name: str, sha256: str):
        from tuf.api.metadata import TargetFile

        return TargetFile(self._served(name, sha256).stat().st_size, {"sha256": sha256}, name)

    def _create(self) -> None:
        from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

        root = Root()
        for role, signer in self._signers.items():
            root.add_key(signer.public_key, role)
        for signed in (root, Targets(), Snapshot(), Timestamp()):
            self._sign(Metadata(signed))

    def _load(self, role: str, version: int | None = None):
        from tuf.api.metadata import Metadata

        folder = self.folder / "metadata"
        if role == "root":
            version = max(int(path.name.split(".")[0]) for path in folder.glob("*.root.json"))
        return Metadata.from_bytes((folder / (f"{version}.{role}.json" if version else f"{role}.json")).read_bytes())

    def _metadata(self):
        """Timestamp, snapshot and targets as they are served now."""
        timestamp = self._load("timestamp")
        snapshot = self._load("snapshot", timestamp.signed.snapshot_meta.version)
        return timestamp, snapshot, self._load("targets", snapshot.signed.meta["targets.json"].version)

    def _commit(self, *, targets: Mapping | None = None) -> list[str]:
        """Sign the new targets, if there are any, what must follow them, and what grows old; the timestamp last."""
        timestamp, snapshot, listing = self._metadata()
        signed = ["root"] if self._renew(self._load("root"), due=False) else []
        if targets is not None:
            listing.signed.targets = dict(targets)
        if self._renew(listing, due=targets is not None):
            snapshot.signed.meta["targets.json"].version = listing.signed.version
            signed.append("targets")
        if self._renew(snapshot, due="targets" in signed):
            timestamp.signed.snapshot_meta.version = snapshot.signed.version
            signed.append("snapshot")
        return [*signed, "timestamp"] if self._renew(timestamp, due="snapshot" in signed) else signed

    def _renew(self, metadata, *, due: bool) -> bool:
        half = timedelta(days=self.lifetimes_days[metadata.signed.type] / 2)
        if not due and metadata.signed.expires - self.clock() >= half:
            return False
        metadata.signed.version += 1
        self._sign(metadata)
        return True

    def _sign(self, metadata) -> None:
        signed = metadata.signed
        signed.expires = self.clock().replace(microsecond=0) + timedelta(days=self.lifetimes_days[signed.type])
        metadata.sign(self._signers[signed.type])
        name = "timestamp.json" if signed.type == "timestamp" else f"{signed.version}.{signed.type}.json"
        write_durably(self.folder / "metadata" / name, metadata.to_bytes())

    def _lock(self):
        from filelock import FileLock

        self.keys_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self.keys_folder / "publisher.lock")


def _load_signer(path: Path, *, make: bool):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    if make and not path.exists():
        write_durably(path, CryptoSigner.generate_ed25519().private_bytes, mode=0o600)
    if not path.exists():
        raise UpdateError(f"There is no key {path.name} in {path.parent}: expected the repository's keys; bring them back.")
    return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
