"""Bundles: the folder of files that is released, and what may not be in one that comes from outside.

A pickle runs code when it is loaded, a symbolic link or a path with `..` reaches outside the folder, and a small archive
can unpack to a full disk. All are refused. The course's own loaders never unpickle; this is a second fence.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickletools
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from slmops_course.artifacts import MANIFEST, file_sha256
from slmops_course.errors import CourseError

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill")
MAX_BYTES = 8_000_000_000  # of an unpacked bundle; the course's own are below 1 GB
MAX_FILES = 1000
# What an archive may take beside its files' bytes: a header with long names, the padding between files.
HEADER_BYTES = 1_000_000
CHUNK_BYTES = 1 << 20
# Windows gives these names to devices, with any suffix: https://learn.microsoft.com/windows/win32/fileio/naming-a-file
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


# Opcodes that name a function or class, and those that call it: https://docs.python.org/3/library/pickletools.html
NAMES = {"GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
CALLS = {"REDUCE", "OBJ", "BUILD", "NEWOBJ", "NEWOBJ_EX"}


class BundleError(CourseError):
    """A bundle that may not be used, with the reason."""


def bundle_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a bundle, by its path. An artifact's manifest tells of the files and is none of them.

    Example: {"genai_config.json": "5f1d…", "model.onnx": "09ab…"}
    """
    return {name: file_sha256(folder / name) for name in _names(folder) if name != MANIFEST}


def bundle_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for the files of a bundle, as `bundle_files` gives them."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def compare_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Say which files below a folder are missing, added or changed; an empty list means that all are as they were."""
    found = set(_names(folder))
    problems = [f"{name} is missing" for name in sorted(files.keys() - found)]
    problems += [f"{name} was added" for name in sorted(found - files.keys())]
    for name in sorted(found & files.keys()):
        path = folder / name
        if path.is_symlink() or not path.is_file() or file_sha256(path) != files[name]:
            problems.append(f"{name} was changed")
    return problems


def copy_bundle(source: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Copy the named files to a folder, which is there whole or not at all; what was there before goes away.

    Raises BundleError when a file is not as its hash says, and when it cannot be written: then nothing has changed.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)
        problems = compare_files(partial, files)
        if problems:
            raise BundleError(f"{problems[0]} while it was copied: expected a bundle at rest; try again.")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise BundleError(
            f"The files could not be copied to {folder.parent} ({error.strerror}): expected room for them and leave to write; "
            "nothing was changed."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_bundle(folder: Path) -> None:
    """Raise BundleError, with the reason, unless the folder holds plain files only, and no pickle.

    Refused are links, pipes and devices, names that mean another place on some system, and pickles, which are known by
    their name or by how they begin. Opening a pickle is running it: https://docs.python.org/3/library/pickle.html
    """
    if folder.is_symlink() or not folder.is_dir():
        raise BundleError(f"There is no bundle {folder}: expected a folder of model files; check the path.")
    names = list(_names(folder))
    if not set(names) - {MANIFEST}:
        raise BundleError(f"The bundle {folder.name} is empty: expected model files in it; build the model first.")
    check_names(names)
    for name in names:
        path = folder / name
        if not stat.S_ISREG(path.lstat().st_mode):
            kind = "a symbolic link" if path.is_symlink() else "no plain file"
            raise BundleError(f"{name!r} is {kind}: expected plain files in the bundle; put a copy of the file there.")
        if is_pickle(path):
            raise BundleError(
                f"{name!r} is a pickle, which runs code when it is loaded: expected safetensors, ONNX or GGUF; save the "
                "weights in one of these."
            )


def check_names(names: Iterable[str]) -> None:
    """Raise BundleError for a path that is absolute, leaves the folder, or is another file's on some system.

    Example: "tokenizer.json" and "adapter/model.safetensors" pass; "../x", "/x", "a/../../x", "C:x", "a\\x" and "nul" do not
    """
    seen = {}
    for name in names:
        parts = name.split("/")
        if (
            any(not part or part != part.rstrip(". ") or RESERVED.fullmatch(part) for part in parts)
            or not name.isprintable()
            or any(c in name for c in '\\:*?"<>|')
        ):
            raise BundleError(f"The name {name!r} may mean a place outside the bundle: expected a plain path below it.")
        first = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name:
            raise BundleError(
                f"{first!r} and {name!r} are one file on some systems: expected names that differ in more than their case; "
                "rename one."
            )


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or by its bytes, or an archive with one inside, as torch.save writes."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with open(path, "rb") as file:
        head = file.read(64 * 1024)
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if any(name.lower().endswith(PICKLE_SUFFIXES) for name in archive.namelist()):
                return True
    opcodes = []
    with contextlib.suppress(Exception):  # anything may be wrong with bytes that are no pickle
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            opcodes.append(opcode.name)  # loading would run what comes before the bytes that are wrong
    # The length that begins a safetensors file may look like a pickle's first opcode, but no second follows.
    if opcodes[:1] == ["PROTO"] and len(opcodes) > 2:
        return True
    # Protocols 0 and 1 begin with no mark: such a pickle does harm only where it names a function and calls it.
    return bool(CALLS & set(opcodes) and NAMES & set(opcodes)) or {"MARK", "INST"} <= set(opcodes)


def unpack_bundle(archive: Path, folder: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """Unpack a .zip, .tar or .tar.gz into a new folder and check it; nothing is left behind when it is refused.

    Name, kind and declared size are checked before a file is written, and no more than the declared size is.
    Source: https://docs.python.org/3/library/zipfile.html#decompression-pitfalls, and https://peps.python.org/pep-0706/
    Raises BundleError, also for a damaged archive and for a folder that is there already.
    """
    if folder.exists():
        raise BundleError(f"{folder} is there already: expected a new folder to unpack into; choose another name.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with contextlib.ExitStack() as opened:
            partial.mkdir(parents=True)
            read = _zip_members if zipfile.is_zipfile(archive) else _tar_members
            _write_members(read(archive, opened), partial, max_bytes, max_files)
        check_bundle(partial)
        os.replace(partial, folder)
    # A damaged archive shows in many ways: RuntimeError is an encrypted one, NotImplementedError an unknown compression.
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise BundleError(
            f"{archive.name} cannot be unpacked ({error}): expected a whole .zip, .tar or .tar.gz, a new file for each of "
            "its names, and room for them; fetch it again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_members(members: Iterator[tuple[str, int, IO]], folder: Path, max_bytes: int, max_files: int) -> None:
    total = 0
    for count, (name, size_bytes, stream) in enumerate(members, start=1):
        check_names([name])
        total += size_bytes
        if count > max_files or total > max_bytes:
            raise BundleError(
                f"The archive holds more than {max_files:,} files or {max_bytes:,} bytes: expected a model; do not use it, or "
                "raise the limit if you know where it comes from."
            )
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)  # both kinds of stream end at the declared size


def _zip_members(archive: Path, opened: contextlib.ExitStack) -> Iterator[tuple[str, int, IO]]:
    file = opened.enter_context(zipfile.ZipFile(archive))
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
        _refuse_special(info.orig_filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if not info.is_dir():
            with file.open(info) as stream:
                yield info.orig_filename, info.file_size, stream


def _tar_members(archive: Path, opened: contextlib.ExitStack) -> Iterator[tuple[str, int, IO]]:
    raw = opened.enter_context(archive.open("rb"))
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    metered = _Metered(opened.enter_context(gzip.GzipFile(fileobj=raw)) if compressed else raw)
    file = opened.enter_context(tarfile.TarFile.open(fileobj=metered, mode="r|"))
    while member := file.next():
        _refuse_special(member.name, (member.isfile() and not member.issparse()) or member.isdir())
        if member.isfile():
            metered.left = member.size + HEADER_BYTES
            yield member.name, member.size, file.extractfile(member)
        metered.left = HEADER_BYTES


def _refuse_special(name: str, plain: bool) -> None:
    if not plain:
        raise BundleError(f"{name!r} is a link or no plain file: expected plain files in the archive; do not use it.")


class _Metered:
    """A stream that gives so many bytes and no more: a header of a tar may unpack to any length, into memory."""

    def __init__(self, stream: IO):
        self._stream, self.left = stream, HEADER_BYTES

    def read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        self.left -= len(data)
        if self.left < 0:
            raise BundleError("The archive's headers unpack to more than they should: expected a model; do not use it.")
        return data


def _names(folder: Path) -> Iterator[str]:
    """The paths below a folder of all that is no folder, links to folders included, which are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted((*files, *links)):
            yield (Path(parent) / name).relative_to(folder).as_posix()
