"""The labelling step as Azure's parallel job calls it: `init()` once a process, `run(files)` for each mini-batch.

Azure starts several processes on several machines and hands each the next files until none is left. Each file of the
input folder is one item; `run` returns one line for each item that went well.
Source: https://learn.microsoft.com/azure/machine-learning/how-to-use-parallel-job-in-pipeline
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_state: dict = {}  # between init() and run(): the protocol leaves no other place


def init() -> None:
    """Read the step's arguments and load the teacher. Azure adds arguments of its own, which are not for us."""
    from slmops_course import training
    from slmops_course.chat import TorchChatModel
    from slmops_course.tasks import load_task

    parser = argparse.ArgumentParser()
    for name in ("--task", "--teacher", "--out"):
        parser.add_argument(name, type=Path, required=True)
    options, _ = parser.parse_known_args(sys.argv[1:])
    _state.update(task=load_task(options.task), out=options.out)
    _state["teacher"] = TorchChatModel(options.teacher, dtype=training.fast_dtype())


def run(mini_batch: Sequence[str]) -> list[str]:
    """Label the messages of each file into a folder of its name. A file that is done again takes its own place."""
    return [label_file(Path(file), _state["out"], task=_state["task"], teacher=_state["teacher"]) for file in mini_batch]


def label_file(file: Path, out: Path, *, task, teacher) -> str:
    """Example: shards/shard-001.jsonl -> out/shard-001/kept.jsonl and its neighbors, and "shard-001: 290 kept, 3 rejected"

    Raises TaskError for a file with a row that is no message: what is left out here would be missing without a word.
    """
    import shutil

    from slmops_course.tasks import TaskError, read_rows
    from slmops_course.teachers import label_messages, save_labelled

    messages, rejected = read_rows(file, fields=None)
    if rejected or not messages:
        reason = f"{rejected[0].where}: {rejected[0].reason}" if rejected else "it holds no message"
        raise TaskError(f"{file.name} is no shard ({reason}): expected one message a line; make the shards again.")
    labelled = label_messages(messages, teacher, task)
    partial, folder = out / f"{file.stem}.partial", out / file.stem
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    save_labelled(labelled, partial)
    os.replace(partial, folder)
    return f"{file.stem}: {len(labelled.kept)} kept, {len(labelled.rejected)} rejected"
