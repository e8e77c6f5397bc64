"""Installations beside the course's own environment: made once, whole or not at all, and seen by their processes only."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slmops_course.artifacts import content_digest
from slmops_course.runtimes.worker import RuntimesError


def install_once(folder: Path, sources: Path, install: Callable[[Path], None]) -> Path:
    """Run `install(folder)` unless `folder` was installed from these very sources already; returns `folder`.

    A second process that asks meanwhile waits. What failed half-way is installed again the next time.
    """
    from filelock import FileLock

    done, digest = folder / "installed", content_digest(sources)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (done.is_file() and done.read_text("utf-8") == digest):
            done.unlink(missing_ok=True)
            install(folder)
            done.write_text(digest, "utf-8")
    return folder


def install_packages(folder: Path, requirements: Path) -> Path:
    """Install the exact versions that a file lists into `folder`, once, on top of the course's environment.

    Raises RuntimesError when the package index does not send them.
    """

    def install(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        pip = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True)
        if pip.returncode:
            words = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [f"code {pip.returncode}"]
            raise RuntimesError(
                f"The packages of {requirements.parent.name} could not be installed ({words[-1][:200]}): expected the package "
                "index to send them; connect and run the same command again."
            )

    return install_once(folder, requirements, install)


def surroundings(folder: Path) -> dict[str, str]:
    """The environment variables of a process that sees what is installed in `folder`, before all else.

    Raises RuntimesError where nothing, or not all of it, was installed.
    """
    if not (folder / "installed").is_file():
        raise RuntimesError(
            f"{folder.name} holds no finished installation: expected one; install_executorch or install_litert makes it."
        )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))}
