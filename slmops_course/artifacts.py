"""Artifact folders: each stage writes one, once.

An artifact folder holds a stage's files and a `manifest.json` that is written last, so that its presence means done.
Its name carries a key made of the stage's settings, the digests of its inputs and the code that writes it: the same
key is the same result, so a second request returns at once.
"""

import ast
import errno
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import secrets
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from slmops_course.errors import CourseError

log = logging.getLogger("slmops_course")

MANIFEST = "manifest.json"
RECORDED_LIBRARIES = (
    "torch", "transformers", "peft", "olive-ai", "onnx", "onnxruntime", "onnxruntime-genai", "foundry-local-sdk",
)  # fmt: skip


class ArtifactError(CourseError):
    """An artifact that is damaged, or that could not be written."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact folder."""

    path: Path
    manifest: dict

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of the artifact's files: equal digests mean equal contents."""
        return _digest(self.manifest["files"])

    @property
    def size_bytes(self) -> int:
        """Total size of the artifact's files."""
        return sum(entry["size_bytes"] for entry in self.manifest["files"].values())

    @property
    def measured(self) -> dict:
        """What the stage measured while it ran (times in seconds, memory in bytes). Not part of the digest."""
        return self.manifest["measured"]

    def json(self, name: str):
        """The parsed contents of one of the artifact's JSON files."""
        return json.loads((self.path / name).read_text("utf-8"))


class Store:
    """The folder that holds all artifacts.

    Example:
        >>> store = Store(Path("build/artifacts"))
        >>> write = lambda folder: {"characters": (folder / "a.txt").write_text("hi")}
        >>> store.build("hello", settings={"to": "you"}, write=write).measured["characters"]
        2
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._verified: set[str] = set()

    def build(
        self,
        stage: str,
        *,
        settings: Mapping,
        write: Callable[[Path], Mapping | None],
        inputs: Mapping[str, Artifact | Path] | None = None,
        code: tuple[Callable, ...] = (),
    ) -> Artifact:
        """Return the stage's artifact, running `write(folder)` only where it is not there already and whole.

        `write` fills an empty folder and may return measurements for the manifest. `settings` must be plain JSON
        values. `inputs` are artifacts, files or folders whose contents decide the result, and `code` the functions
        that do; when one of them changes, so does the key. A second process that asks meanwhile waits.

        Raises ArtifactError when the disk is full; whatever was there before stays as it was.
        """
        from filelock import FileLock

        recipe = {
            "stage": stage,
            "settings": json.loads(json.dumps(dict(settings), sort_keys=True)),
            "inputs": {name: content_digest(source) for name, source in sorted((inputs or {}).items())},
            "code": {function.__qualname__: code_digest(function) for function in code},
        }
        folder = self.root / f"{stage}-{_digest(recipe)[:12]}"
        if folder.name in self._verified and (folder / MANIFEST).exists():
            return _read(folder)
        with _refuse_full_disk(stage, self.root):
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".locks" / f"{folder.name}.lock"):
                if not self._is_whole(folder):
                    self._write(folder, recipe, write)
        self._verified.add(folder.name)
        return _read(folder)

    def _is_whole(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        problems = check_artifact(folder)
        for problem in problems:
            log.warning("%s; it is built again", problem)
        return not problems

    def _write(self, folder: Path, recipe: dict, write: Callable[[Path], Mapping | None]) -> None:
        for leftover in (*self.root.glob(f"{folder.name}*.partial"), folder):
            shutil.rmtree(leftover, ignore_errors=True)
        # A name of its own: a helper process of a run that was killed may still write into the one before.
        partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
        log.info("%s: building", recipe["stage"])
        start = time.perf_counter()
        try:
            measured = dict(write(partial) or {})
            measured.setdefault("duration_s", round(time.perf_counter() - start, 3))
            manifest = {
                **recipe,
                "libraries": _library_versions(),
                "measured": measured,
                "files": {
                    path.relative_to(partial).as_posix(): {
                        "sha256": file_sha256(path),
                        "size_bytes": path.stat().st_size,
                    }
                    for path in _files(partial)
                },
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        log.info("%s: built in %.0f s", recipe["stage"], measured["duration_s"])


def check_artifact(folder: Path) -> list[str]:
    """Say what is wrong with an artifact folder; an empty list means that every file is there and hashes right."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder.name} has no readable {MANIFEST} ({type(error).__name__})"]
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    found.pop(MANIFEST, None)
    problems = [f"{folder.name}/{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{folder.name}/{name} is not in its manifest" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        size_bytes, sha256 = expected[name]
        if found[name].stat().st_size != size_bytes:
            problems.append(f"{folder.name}/{name} has the wrong size")
        elif file_sha256(found[name]) != sha256:
            problems.append(f"{folder.name}/{name} does not match its hash")
    return problems


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(source: Artifact | Path) -> str:
    """One hash for an artifact, a file, or all the files below a folder. Raises ArtifactError if it is not there."""
    if isinstance(source, Artifact):
        return source.digest
    if source.is_file():
        return file_sha256(source)
    if not source.is_dir():
        raise ArtifactError(f"There is no {source}: expected a file or a folder to read; check the path.")
    return _digest({path.relative_to(source).as_posix(): file_sha256(path) for path in _files(source)})


@functools.cache  # a file that is edited while it runs must not change the keys of this process
def code_digest(function: Callable) -> str:
    """A hash of what a function or class does: comments, docstrings and layout do not count."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _read(folder: Path) -> Artifact:
    return Artifact(folder, json.loads((folder / MANIFEST).read_text("utf-8")))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class _refuse_full_disk:
    """Turns the operating system's error for a full disk into one sentence."""

    def __init__(self, stage: str, root: Path):
        self.stage, self.root = stage, root

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and sentencepiece report a full disk as text inside an error of their own; NumPy, which writes ONNX
        # weights, only says how much of it went in.
        if full or (error is not None and re.search(r"No space left on device|\d requested and \d+ written", str(error))):
            raise ArtifactError(
                f"The disk that holds {self.root} is full, so {self.stage} could not be written; earlier artifacts are "
                "intact: free some space and run the same command again."
            ) from error
