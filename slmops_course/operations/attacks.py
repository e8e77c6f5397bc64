"""Attacks on updates, by somebody who holds the server but none of the keys. A device refuses them all.

`served` is the publisher's folder, or better a copy of it, and `earlier` a copy that was made before the newest
publication. One more attack, to hold newer metadata back, changes no file: it shows when the device's clock passes the
timestamp's lifetime.
Source: https://theupdateframework.io/docs/security/
"""

import shutil
from pathlib import Path


def replay(served: Path, earlier: Path) -> None:
    """Rollback: serve again what was served earlier, all of it well signed. It brings back versions with known faults."""
    shutil.rmtree(served)
    shutil.copytree(earlier, served)


def mix_and_match(served: Path, earlier: Path) -> None:
    """Combine the new snapshot with an earlier list of targets, which was well signed too."""
    old, new = (max((each / "metadata").glob("*.targets.json"), key=_number) for each in (earlier, served))
    shutil.copyfile(old, new)


def change_files(served: Path, earlier: Path) -> None:
    """Flip one bit in each file of each version."""
    for path in (served / "targets" / "files").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def send_without_end(served: Path, earlier: Path) -> None:
    """Append a megabyte to each file: what is longer than was signed could as well fill the device's disk."""
    for path in (served / "targets" / "files").iterdir():
        with open(path, "ab") as file:
            file.write(bytes(1_000_000))


def bloat_timestamp(served: Path, earlier: Path) -> None:
    """Answer with a timestamp of a megabyte: nothing signed says how long it is, so the device has a limit of its own."""
    (served / "metadata" / "timestamp.json").write_bytes(b" " * 1_000_000)


def sign_with_another_key(served: Path, earlier: Path) -> None:
    """Sign a newer timestamp with the attacker's own key."""
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Metadata

    path = served / "metadata" / "timestamp.json"
    timestamp = Metadata.from_bytes(path.read_bytes())
    timestamp.signed.version += 1
    timestamp.sign(CryptoSigner.generate_ed25519())
    path.write_bytes(timestamp.to_bytes())


ATTACKS = (replay, mix_and_match, change_files, send_without_end, bloat_timestamp, sign_with_another_key)


def _number(metadata: Path) -> int:
    return int(metadata.name.split(".")[0])
