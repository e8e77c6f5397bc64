"""What people at the desk correct becomes data for the next round, without what tells who wrote it.

    journal = FeedbackJournal(Path("build/corrections.jsonl"), task)
    journal.add("Mail me at ravi@example.org, my ring is lost", {"intent": "card_lost", …})   # stores "[e-mail]"
    corrections = collect_corrections(journal.path, task)                                     # kept, and kept aside
    extend_task(task, {"train": corrections.kept}, Path("build/round-2"))                     # a task folder to train on
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.operations.masking import mask_personal_data
from slmops_course.tasks import MAX_MESSAGE_CHARS, SPLITS, Example, Rejected, Task, answer_problem, load_task, read_rows
from slmops_course.teachers import Labelled
from slmops_course.validation import NEAR, similar_pairs


class FeedbackError(CourseError):
    """A correction that cannot be stored or used."""


class FeedbackJournal:
    """Corrections in a file of JSON lines that only grows. Many processes may write; nobody else may read, where files
    have owners.

    `clock` gives the seconds since 1970. A row is one of a task's splits, with when it came (UTC), what the model had
    answered (None for no valid answer), and its version.
    """

    def __init__(self, path: Path, task: Task, *, clock: Callable[[], float] = time.time):
        self.path, self.task, self.clock = path, task, clock

    def add(self, text: str, answer: Mapping[str, str], *, was: Mapping[str, str] | None = None, version: str = "") -> dict:
        """Mask a message and store it with the answer that a person says is right; returns the row as it was stored.

        Raises FeedbackError for an answer outside the task's schema, a message that is empty or too long, and a full disk.
        """
        problem = answer_problem(answer, self.task.fields)
        if problem or not text.strip() or len(text) > MAX_MESSAGE_CHARS:
            problem = problem or f"the message has {len(text.strip()):,} characters, 1 to {MAX_MESSAGE_CHARS:,} are allowed"
            raise FeedbackError(f"The correction cannot be stored ({problem}): expected an answer of the desk's schema to a "
                                "message; choose from its values.")  # fmt: skip
        row = {
            "id": "", "text": mask_personal_data(text).text.strip(), "answer": dict(answer),
            "was": dict(was) if answer_problem(was, self.task.fields) is None else None, "version": version,
            "at": datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds"),
        }  # fmt: skip
        row["id"] = f"correction-{sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]}"
        self._append((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        return row

    def _append(self, line: bytes) -> None:
        from filelock import FileLock

        owned = functools.partial(os.open, mode=0o600)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer would write the rest of a row that did not fit when it is closed.
            with FileLock(f"{self.path}.lock"), open(self.path, "a+b", buffering=0, opener=owned) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                torn = size and file.read() != b"\n"  # power failed in the middle of a row: it must not spoil the next one
                rest = b"\n" * bool(torn) + line
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise FeedbackError(
                f"The correction could not be written to {self.path} ({error.strerror}): earlier ones are intact; free some "
                "space or choose another place, and enter it again."
            ) from error


def collect_corrections(path: Path, task: Task) -> Labelled:
    """The corrections to train on, and those kept aside, each with its reason.

    Kept aside are rows that are no row of the task, near copies of messages that the model is judged on, which would leak,
    near copies of training messages or earlier corrections, and those that say otherwise than a near copy: of two people
    one is wrong, and a person has to look.
    """
    examples, aside = read_rows(path, fields=task.fields)
    judged = [*task.splits["dev"], *task.splits["test"]]
    known = [*judged, *task.splits["train"]]
    everything = [*known, *examples]
    reasons: dict[int, str] = {}
    for i, j, _ in similar_pairs([example.text for example in everything], threshold=NEAR):
        first, second = everything[i], everything[j]
        if j < len(known):
            continue
        if i < len(judged):
            reasons[j] = f"it nearly repeats {first.id}, on which the model is judged"
        elif first.answer != second.answer:
            reasons.setdefault(j, f"it says otherwise than {first.id}, which it nearly repeats")
            if i >= len(known):
                reasons[i] = f"{second.id}, which nearly repeats it, says otherwise"
        elif i not in reasons:
            reasons.setdefault(j, f"it nearly repeats {first.id}")
    kept = tuple(example for number, example in enumerate(examples, start=len(known)) if number not in reasons)
    aside += [Rejected(everything[j].id, reason, everything[j].text) for j, reason in sorted(reasons.items())]
    return Labelled(kept, tuple(aside))


def extend_task(task: Task, more: Mapping[str, Sequence[Example]], folder: Path) -> Task:
    """Write the task with more messages in its splits into an empty folder, and read it back.

    Example: `extend_task(task, {"train": corrections.kept}, folder)`
    Raises FeedbackError for an unknown split, an id that is there already, and a folder that is not empty.
    """
    taken = sorted({e.id for split in more for e in more[split]} & {e.id for split in SPLITS for e in task.splits[split]})
    unknown = sorted(set(more) - set(SPLITS))
    if taken or unknown or (folder.exists() and any(folder.iterdir())):
        what = f"The task has {taken[0]} already" if taken else f"There is no split {unknown[0]!r}" if unknown else ""
        what = what or f"{folder} is not empty"
        raise FeedbackError(f"{what}: expected new messages for {', '.join(SPLITS)}, and an empty folder; choose others.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("schema.json", "prompt.txt"):
        (folder / name).write_bytes((task.folder / name).read_bytes())
    for split in SPLITS:
        rows = [*task.splits[split], *more.get(split, ())]
        lines = [{"id": e.id, "text": e.text} | ({"answer": dict(e.answer)} if e.answer else {}) for e in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines), "utf-8")
    return load_task(folder)
