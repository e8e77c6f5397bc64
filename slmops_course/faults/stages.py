"""The pipeline killed at any moment and resumed, and several times at once."""

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from slmops_course.artifacts import MANIFEST, check_artifact
from slmops_course.errors import CourseError
from slmops_course.faults import Trial
from slmops_course.faults.course import build

PATIENCE_S = 900.0  # for one stage, on a machine with other things to do
# Files of these stages differ from run to run: a time that was measured; Olive's first weights, which it does not seed.
NOT_EQUAL = ("speed-", "olive-lora-", "olive-manners-")
PARTIAL = ".partial"


class FaultError(CourseError):
    """A fault that cannot be tried on this machine."""


def digests(store: Path) -> dict[str, str]:
    """What each finished artifact holds: folder name -> its files' hashes, as one text."""
    found = {}
    for manifest in sorted(store.glob(f"*/{MANIFEST}")):
        files = json.loads(manifest.read_text("utf-8"))["files"]
        found[manifest.parent.name] = json.dumps({name: entry["sha256"] for name, entry in files.items()}, sort_keys=True)
    return found


def stage_times(log: Path) -> dict[str, float]:
    """How long each stage took in a run, in seconds, in order, from the log of `course.build`."""
    begun, times = {}, {}
    for line in log.read_text("utf-8").splitlines():
        when, stage, what = line.split(" ", 2)
        if what == "building":
            begun[stage] = float(when)
        elif what.startswith("built in") and stage in begun:
            times[stage.rstrip(":")] = float(when) - begun[stage]
    return times


def start_build(material: Path, store: Path, steps: Sequence[str], log: Path) -> multiprocessing.process.BaseProcess:
    """Build steps in a process of its own, forked from one that has imported the libraries already.

    Raises FaultError where the system has no such processes (Windows, which has no SIGKILL either).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise FaultError("This system cannot fork: expected Linux or macOS; run the soak there.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "slmops_course.pipeline"])
    process = context.Process(target=build, args=(material, store, list(steps), log))
    process.start()
    return process


def undisturbed(material: Path, folder: Path, steps: Sequence[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Build all steps once: what their artifacts hold, and how long each stage took. Raises FaultError when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    process = start_build(material, folder / "store", steps, folder / "log.txt")
    process.join()
    if process.exitcode:
        raise FaultError(f"The undisturbed run ended with code {process.exitcode}: expected 0; run `slmops doctor`.")
    return digests(folder / "store"), stage_times(folder / "log.txt")


def kill_and_resume(material: Path, folder: Path, steps: Sequence[str], *, kills: int, seed: int = 0) -> Trial:
    """Build the steps again and again, ending the process with SIGKILL within each stage in turn, and resume every time.

    The moment is drawn from the stage's whole time in an undisturbed run. After each kill every finished artifact must be
    whole, and at the end of each lap all must be equal to those of the undisturbed run.
    """
    trial, rng = Trial("kill -9, then resume"), random.Random(seed)
    wanted, times = undisturbed(material, folder / "reference", steps)
    done = lap = 0
    while done < kills:
        place = folder / f"lap-{lap}"
        place.mkdir()
        for stage in list(times)[: kills - done]:
            begun = _kill_within(material, place, steps, stage, times[stage] * rng.random(), trial)
            done += begun
            trial.lost += [f"accepted after a kill in {stage}: {problem}" for problem in damaged(place / "store")]
        _finish(material, place, steps, wanted, trial)
        shutil.rmtree(place)
        lap += 1
    trial.notes.append(f"{lap} laps over {len(times)} stages; an undisturbed run takes {sum(times.values()):.0f} s")
    return trial


def _kill_within(material: Path, place: Path, steps: Sequence[str], stage: str, after_s: float, trial: Trial) -> bool:
    """Run until a stage has begun, wait, and kill. False where the stage was done already."""
    log = place / f"{stage}.txt"
    process = start_build(material, place / "store", steps, log)
    end = time.monotonic() + PATIENCE_S
    while process.is_alive() and time.monotonic() < end:
        if log.exists() and f" {stage}: building" in log.read_text("utf-8"):
            time.sleep(after_s)
            break
        time.sleep(0.005)
    killed = process.is_alive()
    process.kill()
    process.join()
    if killed:
        trial.count(stage)
    elif process.exitcode:
        trial.lost.append(f"{stage} ended by itself with code {process.exitcode}")
    return killed


def _finish(material: Path, place: Path, steps: Sequence[str], wanted: dict[str, str], trial: Trial) -> None:
    process = start_build(material, place / "store", steps, place / "end.txt")
    process.join()
    if process.exitcode:
        trial.lost.append(f"resuming ended with code {process.exitcode}")
    trial.lost += [f"after resuming: {problem}" for problem in damaged(place / "store")]
    trial.notes += [f"a helper of a killed run left {path.name}" for path in (place / "store").glob(f"*{PARTIAL}")]
    trial.lost += differences(wanted, digests(place / "store"))


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """Which artifacts are not those of the undisturbed run. Of those that are never equal only their absence counts."""
    lost = []
    for name in sorted(wanted.keys() | found.keys()):
        same = name in wanted and name in found if name.startswith(NOT_EQUAL) else found.get(name) == wanted.get(name)
        lost += [] if same else [f"{name} differs from the undisturbed run's"]
    return lost


def damaged(store: Path) -> list[str]:
    """What is wrong with the artifacts of a store that count as finished. What is still partial is none."""
    folders = [path for path in store.glob("*-*") if path.is_dir() and not path.name.endswith(PARTIAL)]
    return [problem for folder in sorted(folders) for problem in check_artifact(folder)]


def race(material: Path, folder: Path, steps: Sequence[str], *, runs: int) -> Trial:
    """Several runs at once over one store: each stage is built by one of them, and all end well."""
    trial = Trial(f"{runs} runs at once")
    folder.mkdir(parents=True)
    processes = [start_build(material, folder / "store", steps, folder / f"run-{number}.txt") for number in range(runs)]
    for process in processes:
        process.join()
        trial.count("run")
        if process.exitcode:
            trial.lost.append(f"a run ended with code {process.exitcode}")
    trial.lost += damaged(folder / "store")
    built = [stage for number in range(runs) for stage in stage_times(folder / f"run-{number}.txt")]
    trial.lost += [f"{stage} was built {built.count(stage)} times" for stage in sorted(set(built)) if built.count(stage) > 1]
    trial.notes.append(f"{len(built)} stages were built")
    return trial
