"""Artifacts under faults: a flipped bit in any file, a disk that fills up at any write, and clocks that jump."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops_course.artifacts import MANIFEST, ArtifactError, Store, check_artifact
from slmops_course.faults import Trial
from slmops_course.faults.stages import FaultError, damaged

DAY_S = 86_400
JUMPS = {"1970": 0, "2100": 47_482 * DAY_S}  # what a device shows whose clock was never set, or set wrongly
PAGE_BYTES = 4096  # a tmpfs grows by these


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file is turned over, to the end of the block."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        yield
    finally:
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)


def flip_bits(store: Path, *, seed: int = 0, manifest_flips: int = 20, check=check_artifact) -> Trial:
    """Turn over one random bit in every file of every artifact, one at a time; it must be noticed, and the file named.

    No hash covers a manifest, so of its flips those must be noticed that change which files it lists or with what hash.
    """
    trial, rng, unhashed = Trial("a flipped bit"), random.Random(seed), 0
    for manifest in sorted(store.glob(f"*/{MANIFEST}")):
        folder, listed = manifest.parent, _listed(manifest)
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
            for _ in range(manifest_flips if path == manifest else 1):
                with flipped(path, rng.randrange(path.stat().st_size * 8)):
                    problems, same = check(folder), path == manifest and _listed(manifest) == listed
                trial.count("in a manifest" if path == manifest else "in a file")
                unhashed += same
                named = path.relative_to(folder).as_posix()
                noticed = same if not problems else (path == manifest or named in problems[0])
                if not noticed:
                    trial.lost.append(f"{folder.name}/{named} was changed and {problems or 'nothing was noticed'}")
    trial.notes.append(f"{unhashed} of the flips in manifests touched only what is recorded there, which no hash covers")
    trial.lost += [f"after all flips were undone: {problem}" for problem in damaged(store)]
    return trial


def _listed(manifest: Path) -> dict | None:
    """What a manifest lists, or None where it cannot be read."""
    try:
        files = json.loads(manifest.read_text("utf-8"))["files"]
        return {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def jump_clock(store: Path) -> Trial:
    """Give every file the time of a clock that jumped, and have each artifact checked: no file's time decides anything."""
    trial = Trial("a clock that jumps")
    for year, seconds in JUMPS.items():
        for path in [*store.rglob("*"), store]:
            os.utime(path, (seconds, seconds))
        trial.count(f"to {year}")
        trial.lost += [f"{year}: {problem}" for problem in damaged(store)]
    return trial


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes in a folder, to the end of the block; what is yielded gives it another size.

    Raises FaultError where it may not be mounted: that takes root on Linux.
    """
    mount = shutil.which("mount")
    folder.mkdir(parents=True, exist_ok=True)

    def run(options: str, *more: str) -> bool:
        return not subprocess.run([mount, "-t", "tmpfs", "-o", options, *more, str(folder)], capture_output=True).returncode

    if mount is None or not run(f"size={size_bytes}", "tmpfs"):
        raise FaultError("No small disk can be mounted here: expected to be root on Linux; run the soak as such, or without.")
    try:
        yield lambda size: run(f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def write_files(folder: Path) -> dict:
    """A stage that writes in the ways that the course's own code does: text, JSON lines, safetensors, a file moved in."""
    import torch
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps({"layers": list(range(2000))}), "utf-8")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": number, "text": "where is my card"}) + "\n" for number in range(500))
    save_file({"weight": torch.zeros(50, 64)}, folder / "model.safetensors")
    (folder / "work").mkdir()
    (folder / "work" / "out.bin").write_bytes(bytes(3 * PAGE_BYTES))
    shutil.move(folder / "work" / "out.bin", folder / "out.bin")
    (folder / "work").rmdir()
    return {"rows": 500}


def fill_disk(folder: Path, *, step_bytes: int = PAGE_BYTES, write: Callable[[Path], dict] = write_files) -> Trial:
    """Build an artifact on disks of every size from full to large enough: each failure is one clear sentence, the artifact
    that was there before stays whole, and with room the same request succeeds. Raises FaultError, see `small_disk`.
    """
    trial, size, fitted = Trial("a disk that fills up"), 0, False
    earlier = Store(folder).build("measure", settings={}, write=write).size_bytes
    while not fitted and size < 4 * earlier:
        disk = folder / f"disk-{size}"
        with small_disk(disk, 64 * earlier) as resize:
            first = Store(disk).build("earlier", settings={}, write=write)
            used = shutil.disk_usage(disk).used
            resize(used + size)
            fitted = _try(disk, write, trial)
            trial.lost += [f"with {size} bytes free: {problem}" for problem in check_artifact(first.path)]
            left = [path.name for path in disk.glob("*.partial")]
            trial.lost += [f"with {size} bytes free: {name} was left behind" for name in left]
            resize(64 * earlier)
            if not _try(disk, write, None):
                trial.lost.append(f"with {size} bytes free, then more: the next request failed")
        size += step_bytes
    trial.notes.append(f"from 0 to {size - step_bytes:,} bytes free, in steps of {step_bytes:,}")
    trial.lost += [] if fitted else ["it was never large enough"]
    return trial


def _try(disk: Path, write: Callable[[Path], dict], trial: Trial | None) -> bool:
    """Whether a second artifact could be built on the disk. What is raised must be the one sentence about a full disk."""
    try:
        done = Store(disk).build("later", settings={}, write=write)
    except ArtifactError as error:
        if trial:
            trial.count("refused in a sentence")
            if "is full" not in str(error) or "free some space" not in str(error):
                trial.lost.append(f"an unclear sentence: {error}")
        return False
    except Exception as error:  # whatever it is, it is none of ours and so is a loss
        if trial:
            trial.count("refused otherwise")
            trial.lost.append(f"{type(error).__name__} in place of a sentence: {error}")
        return False
    if trial:
        trial.count("fitted")
        trial.lost += check_artifact(done.path)
    return True
