"""The service under storms: many clients at once, each doing what `clients.KINDS` names, and memory watched meanwhile."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from slmops_course.faults import Trial
from slmops_course.faults.clients import KINDS, Question, check_answer
from slmops_course.operations.served import ServedApart

SETTLE_S = 10.0  # that connections of clients that are gone may take to be noticed
KEPT_OPEN = 6  # connections from the gateway to the service that wait for the next request; both ends are in one process


def storm(
    served: ServedApart, questions: Sequence[Question], *, clients: int = 16, seconds: float = 5.0, seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> Trial:  # fmt: skip
    """Let clients do what `KINDS` names, drawn at random, for so many seconds at least; then ask every question once more.

    Every second request is a known question, so that there is something to mix up.
    """
    trial, lock, end = Trial(f"a storm of {clients} clients"), threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        rng, done = random.Random(f"{seed}-{number}"), 0
        while done < 2 or time.monotonic() < end:
            kind = "a known question" if done % 2 == 0 else rng.choice(sorted(kinds or KINDS))
            try:
                problem = KINDS[kind](served, rng, questions)
            except Exception as error:  # whatever it is: a client that gets no proper answer is a loss
                problem = f"{type(error).__name__}: {error}"
            with lock:
                trial.count(kind)
                if problem:
                    trial.lost.append(f"{kind}: {problem}")
            done += 1
            if served.exit_code is not None:
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if served.exit_code is not None:
        trial.lost.append(f"the service ended with code {served.exit_code}")
    else:
        trial.lost += [f"afterwards: {problem}" for q in questions if (problem := check_answer(served, q))]
    return trial


def watch_memory(
    served: ServedApart, round_: Callable[[int], Trial], *, rounds: int, margin_bytes: int, settle_s: float = SETTLE_S
) -> Trial:
    """Carry out rounds of a storm. The first warms up; over the others memory must stay within a margin and no file stay open.

    The growth is the slope of a straight line through the memory after each round, times the rounds.
    """
    trial = round_(0)
    before, memory = served.descriptors(), []
    for number in range(1, rounds + 1):
        later = round_(number)
        for kind, count in later.tried.items():
            trial.tried[kind] = trial.tried.get(kind, 0) + count
        trial.lost += later.lost
        if served.exit_code is not None:
            return trial
        memory.append(served.resident_bytes())
    slope = statistics.linear_regression(range(rounds), memory).slope if rounds > 1 else 0.0
    growth, left = slope * rounds, _open_after(served, before, settle_s)
    ends = f"{memory[0] / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB"
    trial.notes.append(f"resident memory {ends} over {rounds} rounds, {growth / 1e6:+.1f} MB by a straight line")
    trial.notes.append(f"open files {before} after the first round, {left} at the end")
    if growth > margin_bytes:
        trial.lost.append(f"memory grew by {growth / 1e6:.1f} MB, expected at most {margin_bytes / 1e6:.0f}")
    if left > before + KEPT_OPEN:
        trial.lost.append(f"{left - before} files stayed open, expected at most {KEPT_OPEN}")
    return trial


def _open_after(served: ServedApart, before: int, settle_s: float) -> int:
    end = time.monotonic() + settle_s
    while served.descriptors() > before + KEPT_OPEN and time.monotonic() < end:
        time.sleep(0.1)
    return served.descriptors()
