"""Three desks on one base model: their adapters switched per request, against three merged models.

    python -m slmops_course.experiments.desks SPEC.json

Memory and times are taken in a fresh process for each way of serving.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slmops_course import adapters, benchmark, evaluation, switching, training
from slmops_course.chat import ChatModel, TorchChatModel, load_torch
from slmops_course.optimize import model_bytes
from slmops_course.serving import GenAIChatModel
from slmops_course.students import save_model
from slmops_course.tasks import BUNDLED_TASK, SMALL_DESKS, Example, Task, load_task

PAYMENTS = "payments"  # the support desk's name here
EPOCHS = 10  # on some 200 rows as many steps as the profile's one epoch on some 2,000
MESSAGES = 96  # of each desk's test split
TIMED = 8  # messages of each desk
ROUNDS = 3  # of the timed messages; the medians count


def desks(course) -> list[dict]:
    """Rows of four figures, each under "figure", for a base in fp32 and in int4; adapters are fp32.

    "cross-talk": an adapter asked a desk's test messages: shares right, valid at that desk, and valid at the adapter's own.
    "equal": the share of replies that are the same as those of PyTorch's fp32 model with the adapter merged.
    "serving": one base with three adapters, or three merged models: what it takes on disk (bytes), to load (s), in memory
    (the growth of the process's peak over that with the libraries loaded, bytes), and per message (medians, s), in the
    desks' order and in turns.
    "training": rows, and how long an adapter took to learn (s).
    """
    base, tasks = course.base().path, open_desks()
    train_rows = min(len(task.splits["train"]) for task in tasks.values())
    tests = {name: even_share(task, task.splits["test"], MESSAGES) for name, task in tasks.items()}
    with tempfile.TemporaryDirectory() as scratch:
        root, rows, expected = Path(scratch).resolve(), [], {}
        for name, task in tasks.items():
            examples = even_share(task, task.splits["train"], train_rows)
            rows.append({"figure": "training", "adapter": name, "rows": len(examples)})
            rows[-1]["seconds"] = train_adapter(base, root / name, task, examples, course.profile)
            expected[name] = merge(base, root / name, root / f"{name}-merged", task, tests[name])
        for precision in switching.PRECISIONS:
            shared = root / f"switching-{precision}"
            switching.export_switching(shared, base=base, adapters={name: root / name for name in tasks}, precision=precision)
            merged = {name: root / f"{name}-{precision}" for name in tasks}
            for name, folder in merged.items():
                switching.build_onnx(folder, model=root / f"{name}-merged", precision=precision)
            found = [*cross_talk(shared, tasks, tests, expected), *serving(shared, merged, tasks)]
            rows += [{"precision": precision, **row} for row in found]
            print(*rows[-2:], sep="\n", flush=True)
        return rows


def open_desks() -> dict[str, Task]:
    """The three bundled desks by name."""
    return {PAYMENTS: load_task(BUNDLED_TASK)} | {name: load_task(name) for name in SMALL_DESKS}


def even_share(task: Task, examples: Sequence[Example], count: int) -> list[Example]:
    """So many examples, every label as often as every other where there are enough: the first of each, then the second …

    Example: labels a a a b c c, count=4 -> a b c a
    """
    seen: Counter = Counter()
    turns = []
    for example in examples:
        label = example.answer[task.label_field]
        turns.append(seen[label])
        seen[label] += 1
    order = sorted(range(len(examples)), key=lambda i: turns[i])  # stable: within a turn as in the file
    return [examples[i] for i in order[:count]]


def train_adapter(base: Path, folder: Path, task: Task, examples: Sequence[Example], profile) -> float:
    """Train an adapter on the base and save it; returns how long training took (s)."""
    import torch

    model, tokenizer = load_torch(base, dtype=training.fast_dtype())
    torch.manual_seed(0)
    tuned = adapters.add_lora(model, profile.lora)
    start = time.perf_counter()
    rows = training.encode_rows(tokenizer, task, examples)
    training.train(model, rows, replace(profile.lora_training, epochs=EPOCHS))
    seconds = time.perf_counter() - start
    tuned.save_pretrained(folder)
    adapters.forget_base_folder(folder)
    benchmark.give_back_memory()
    return round(seconds, 1)


def merge(base: Path, adapter: Path, folder: Path, task: Task, examples: Sequence[Example]) -> list[str]:
    """Save the base with an adapter merged, in fp32; returns its replies to the messages."""
    model, tokenizer = load_torch(base)
    model = adapters.open_adapter(model, adapter, name=adapter.name).merge_and_unload()
    save_model(model, tokenizer, folder)
    with TorchChatModel.from_loaded(model, tokenizer, adapter.name) as chat:
        return [reply.text for reply in evaluation.ask_all(chat, task, examples)]


def cross_talk(
    folder: Path, tasks: Mapping[str, Task], tests: Mapping[str, Sequence[Example]], expected: Mapping[str, Sequence[str]]
) -> list[dict]:
    """Ask every adapter every desk's messages; on its own desk's, compare its replies with those expected of it."""
    rows = []
    with switching.SwitchingChatModel(folder) as model:
        for adapter in tasks:
            for name, task in tasks.items():
                replies = [reply.text for reply in evaluation.ask_all(model, task, tests[name], adapter=adapter)]
                here = evaluation.judge(task, tests[name], replies)
                own = evaluation.judge(tasks[adapter], tests[name], replies)
                rows.append(
                    {
                        "figure": "cross-talk", "adapter": adapter, "desk": name,
                        "exact_match": evaluation.mean_score([o.answer == o.expected for o in here]).value,
                        "valid": evaluation.mean_score([o.answer is not None for o in here]).value,
                        "valid_own": evaluation.mean_score([o.answer is not None for o in own]).value,
                        "count": len(replies),
                    }
                )  # fmt: skip
                if name == adapter:
                    same = [reply == other for reply, other in zip(replies, expected[name], strict=True)]
                    share = evaluation.mean_score(same).value
                    rows.append({"figure": "equal", "adapter": adapter, "share": share, "count": len(same)})
    return rows


def serving(shared: Path, merged: Mapping[str, Path], tasks: Mapping[str, Task]) -> list[dict]:
    """Measure both ways of serving, each in a fresh process; see `desks`."""
    adapter_bytes = sum(path.stat().st_size for path in shared.glob(f"*{switching.SUFFIX}"))
    ways = {
        "one base, three adapters": ([shared], model_bytes(shared), adapter_bytes),
        "three merged models": (list(merged.values()), sum(map(model_bytes, merged.values())), 0),
    }
    asks = {
        name: [task.messages(example.text) for example in task.splits["dev"][:TIMED]] for name, task in tasks.items()
    }
    rows = []
    for way, (folders, models, files) in ways.items():
        sizes = {"model_bytes": models, "adapter_bytes": files}
        spec = {"folders": [*map(str, folders)], "asks": asks}
        found = benchmark.run_apart("slmops_course.experiments.desks", spec, what=f"Measuring {way}")
        rows.append({"figure": "serving", "way": way, **sizes, **found})
    return rows


def time_orders(desk: Mapping[str, ChatModel], asks: Mapping[str, Sequence]) -> dict[str, float]:
    """Medians (s) of the same messages asked desk after desk, then in turns, where each message changes the desk."""
    by_desk = [(name, ask) for name in asks for ask in asks[name]]
    in_turns = [(name, ask) for turn in zip(*asks.values(), strict=True) for name, ask in zip(asks, turn, strict=True)]
    for name, ask in in_turns[: 2 * len(asks)]:
        desk[name].reply(ask)
    replies: dict[str, list] = {"by_desk": [], "in_turns": []}
    for _ in range(ROUNDS):
        for manner, order in (("by_desk", by_desk), ("in_turns", in_turns)):
            replies[manner] += [desk[name].reply(ask) for name, ask in order]
    return {
        f"{figure}_{manner}_s": statistics.median(getattr(reply, f"{figure}_s") for reply in found)
        for manner, found in replies.items()
        for figure in ("time_to_first_token", "latency")
    }


def main(spec_path: str) -> None:
    """Load one switching model, or a merged model a desk, measure it in this process and print a line of JSON."""
    import numpy
    import onnxruntime_genai  # noqa: F401  # so that its memory is not counted as the models'

    numpy.ones(1)
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    folders, names = [Path(folder) for folder in spec["folders"]], list(spec["asks"])
    watch = benchmark.MemoryWatch()
    before = watch.peak_bytes
    with watch:
        start = time.perf_counter()
        if len(folders) == 1:
            shared = switching.SwitchingChatModel(folders[0])
            desk = {name: shared.desk(name) for name in names}
        else:
            desk = {name: GenAIChatModel(folder) for name, folder in zip(names, folders, strict=True)}
        load_s = time.perf_counter() - start
        times = time_orders(desk, spec["asks"])
    print(json.dumps({"memory_bytes": watch.peak_bytes - before, "load_s": load_s, **times}))


if __name__ == "__main__":
    main(*sys.argv[1:])
