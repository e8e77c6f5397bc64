"""The long form of the fault and load tests: `python -m slmops_course.soak --minutes 10 --kills 50 --clients 16 --seed 0`.

It kills and resumes the pipeline, damages and crowds its artifacts, and puts storms of clients on a served model, all on a
course so small that its stages take seconds. It prints what was tried, how often, and what was lost; with a loss the exit
code is 1.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slmops_course.faults import Trial
from slmops_course.faults.clients import block_texts, check_script, learn_answers
from slmops_course.faults.course import STEPS, write_material
from slmops_course.faults.stages import FaultError, kill_and_resume, race, undisturbed
from slmops_course.faults.stores import fill_disk, flip_bits, jump_clock
from slmops_course.faults.storms import storm, watch_memory
from slmops_course.operations.served import ServedApart
from slmops_course.tasks import load_task

ROUND_S = 15.0  # of a storm, about; memory is looked at after each
MARGIN_BYTES = 32 << 20  # that memory may grow by over all rounds: what allocators keep for later
RACED = ("teacher", "labels", "student", "outcomes-teacher")


def soak_pipeline(
    folder: Path, *, kills: int, seed: int, report: Callable[[Trial], None], steps: Sequence[str] = tuple(STEPS),
    raced: Sequence[str] = RACED, runs: int = 4,
) -> Path:  # fmt: skip
    """All trials of the pipeline in a folder; returns the store of the run that was not disturbed."""
    material = write_material(folder / "material")
    report(kill_and_resume(material, folder / "kills", steps, kills=kills, seed=seed))
    report(race(material, folder / "race", raced, runs=runs))
    store = folder / "kills" / "reference" / "store"
    report(flip_bits(store, seed=seed))
    report(jump_clock(store))
    try:
        report(fill_disk(folder / "disk"))
    except FaultError as error:
        report(Trial("a disk that fills up", notes=[str(error)]))
    return store


def soak_service(
    onnx: Path, task_folder: Path, *, minutes: float, clients: int, seed: int, report: Callable[[Trial], None]
) -> None:
    """All trials of the served model: every block of Unicode once, then storms for so long."""
    task = load_task(task_folder)
    texts = [example.text for split in ("train", "test") for example in task.splits[split]][:clients]
    with ServedApart(onnx, task) as served:
        questions, scripts = learn_answers(served, texts), Trial("every block of Unicode")
        for text in block_texts():
            scripts.count("block")
            scripts.lost += [problem for problem in [check_script(served, text)] if problem]
        report(scripts)
        rounds = max(2, round(minutes * 60 / ROUND_S))

        def one_round(number: int) -> Trial:
            return storm(served, questions, clients=clients, seconds=minutes * 60 / rounds, seed=seed + number)

        report(watch_memory(served, one_round, rounds=rounds, margin_bytes=MARGIN_BYTES))


def main(arguments: list[str] | None = None) -> int:
    """Carry out all trials and print a report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slmops_course.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of storms on the service (default: 10)")
    parser.add_argument("--kills", type=int, default=50, help="of the pipeline, over every stage in turn (default: 50)")
    parser.add_argument("--clients", type=int, default=16, help="at once in a storm (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--only", choices=("pipeline", "service"), help="one half (the service's still builds its small model)")
    options = parser.parse_args(arguments)
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "CI"):  # nothing is fetched, drawn or sent
        os.environ.setdefault(name, "1")
    trials, start = [], time.monotonic()

    def report(trial: Trial) -> None:
        trials.append(trial)
        print(f"{trial}\n", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.only == "service":
            material = write_material(folder / "material")
            undisturbed(material, folder, ["onnx-int4-rtn"])
            store = folder / "store"
        else:
            store = soak_pipeline(folder, kills=options.kills, seed=options.seed, report=report)
        if options.only != "pipeline":
            onnx = next(store.glob("onnx-int4-rtn-*"))
            soak_service(
                onnx, folder / "material" / "task", minutes=options.minutes, clients=options.clients, seed=options.seed,
                report=report,
            )  # fmt: skip
    tried, lost = sum(sum(trial.tried.values()) for trial in trials), sum(len(trial.lost) for trial in trials)
    print(f"{tried:,} trials in {(time.monotonic() - start) / 60:.1f} minutes, {lost or 'nothing'} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
