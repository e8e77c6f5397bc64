"""Chapter 3's side experiments: ways to fine-tune on one data set, labels that are wrong, and a contrastive loss.

They are scored on the dev split.
"""

import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from slmops_course import adapters, evaluation, heads, losses, textmetrics, training
from slmops_course.benchmark import MemoryWatch, give_back_memory
from slmops_course.chat import ChatModel, TorchChatModel, load_torch
from slmops_course.profiles import Profile
from slmops_course.tasks import Example, Task

METHODS = ("full", "LoRA", "DoRA", "QLoRA", "head, model frozen", "head and layers")
HEAD_RATE = 1e-2  # learning rate of a head alone
WRONG = (0.0, 0.1, 0.3)  # shares of wrong labels
FEW = 10  # labelled messages a label, where there are few


def compare_methods(course) -> list[dict]:
    """Full fine-tuning, LoRA, DoRA, QLoRA and task heads: one pass over the same messages, in the same layers."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:  # each method has a fresh process
        return [pool.submit(try_method, name, course.base().path, course.task, course.profile).result() for name in METHODS]


def try_method(name: str, base: Path, task: Task, profile: Profile) -> dict:
    """Train by one of METHODS and score it: parameters that learn, time (s), memory and what must be kept (bytes).

    The memory is the growth of the process's peak over that with the libraries loaded.
    """
    import transformers  # noqa: F401  # with its libraries, so that their memory is not counted as the method's

    before = MemoryWatch().peak_bytes
    with MemoryWatch() as watch:
        model, tokenizer = load_torch(base, dtype=training.fast_dtype())
        settings, examples = replace(profile.teacher, epochs=1), task.splits["train"]
        if name.startswith("head"):
            settings, rows, loss, chat = _prepare_heads(name, model, tokenizer, task, settings)
        else:
            settings, tuned = _prepare(name, model, settings, profile)
            rows, loss = training.encode_rows(tokenizer, task, examples), training.next_token_loss
            chat = TorchChatModel.from_loaded(tuned, tokenizer, name)
        learns, total = adapters.trainable_parameters(model)
        if name == "QLoRA":
            adapters.quantize_frozen(model)
            give_back_memory()
        start = time.perf_counter()
        training.train(model, rows, settings, loss=loss)
        seconds = round(time.perf_counter() - start, 1)
    kept = _bytes_to_keep(chat.model)
    training.to_fast_dtype(model)
    row = {"name": name, "exact_match": asdict(score(chat, task)), "training_s": seconds, "trained_parameters": learns}
    print(f"{name}: {row['exact_match']['value']:.1%} in {seconds:.0f} s", flush=True)
    return row | {"parameters": total, "memory_bytes": watch.peak_bytes - before, "kept_bytes": kept}


def _prepare(name: str, model, settings, profile: Profile):
    """The settings, and the model that answers after training, for methods in which the model writes its answer."""
    if name == "full":
        training.freeze_below(model, settings.trained_layers)
        return settings, model
    lora = replace(profile.lora, trained_layers=settings.trained_layers, use_dora=name == "DoRA")
    tuned = adapters.add_lora(model, lora)
    return replace(profile.lora_training, epochs=1), tuned


def _prepare_heads(name: str, model, tokenizer, task: Task, settings):
    """The same for task heads: settings, rows, loss, and the ChatModel."""
    training.freeze_below(model, settings.trained_layers)
    if name == "head, model frozen":
        model.requires_grad_(False)
        settings = replace(settings, learning_rate=HEAD_RATE)
    heads.add_heads(model, task)
    examples = task.splits["train"]
    rows, loss = heads.head_rows(tokenizer, task, examples), heads.head_loss(task, examples)
    return settings, rows, loss, heads.HeadChatModel(model, tokenizer, task)


def _bytes_to_keep(model) -> int:
    """What has to be stored beside the base model: an adapter, the heads alone, or all weights, in fp32."""
    if hasattr(model, "peft_config"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    learns = {name for name, part in model.named_parameters() if part.requires_grad}
    whole = not all(name.startswith("task_heads") for name in learns)
    return 4 * sum(part.numel() for name, part in model.named_parameters() if whole or name in learns)


def score(chat: ChatModel, task: Task) -> evaluation.Score:
    """Exact match on the dev split."""
    outcomes = evaluation.ask_and_judge(chat, task, task.splits["dev"])
    return evaluation.score_outcomes(task, outcomes)["exact_match"]


def compare_noise(course) -> list[dict]:
    """The damage of wrong labels, and a cure: leave out the rows of which a model trained on them is least sure."""
    task, wrong, found = course.task, set(), []
    for share in WRONG:
        examples, wrong = mislabel(task.splits["train"], share, task)
        model, tokenizer, row = _train_whole(course, f"{share:.0%} wrong", examples)
        found.append(row | {"wrong": len(wrong)})
    logs = textmetrics.log_probabilities(model, training.encode_rows(tokenizer, task, examples))
    least_sure = sorted(range(len(examples)), key=lambda i: logs[i])[: len(wrong)]
    dropped = {examples[i].id for i in least_sure}
    cleaned = [example for example in examples if example.id not in dropped]
    *_, row = _train_whole(course, f"{share:.0%} wrong, as many doubtful ones left out", cleaned, like=len(examples))
    return [*found, row | {"wrong": len(wrong - dropped), "dropped": len(dropped)}]


def compare_contrastive(course) -> list[dict]:
    """Plain cross-entropy against a part of contrastive loss, with few labelled messages and with all."""
    task, found = course.task, []
    for amount, examples, epochs in (("few", first_of_each(task, FEW), 4), ("all", list(task.splits["train"]), 1)):
        _, tokenizer, row = _train_whole(course, f"{amount}: cross-entropy", examples, epochs=epochs)
        rows = training.encode_rows(tokenizer, task, examples)
        labels = [example.answer[task.label_field] for example in examples]
        loss = losses.contrastive_loss(labels, place=losses.first_difference(rows))
        *_, other = _train_whole(course, f"{amount}: with contrastive", examples, loss=loss, epochs=epochs)
        found += [row, other]
    return found


def first_of_each(task: Task, count: int) -> list[Example]:
    """The first `count` training messages of each label, in their order."""
    seen: Counter = Counter()
    chosen = []
    for example in task.splits["train"]:
        seen[example.answer[task.label_field]] += 1
        if seen[example.answer[task.label_field]] <= count:
            chosen.append(example)
    return chosen


def mislabel(examples: Sequence[Example], share: float, task: Task, *, seed: int = 0) -> tuple[list[Example], set[str]]:
    """Give a share of the messages the whole answer of a message of another label; returns all, and the ids of the wrong."""
    rng, label = random.Random(seed), task.label_field
    wrong = set(rng.sample(range(len(examples)), round(share * len(examples))))

    def other(example: Example) -> Example:
        strangers = [e for e in examples if e.answer[label] != example.answer[label]]
        return replace(example, answer=rng.choice(strangers).answer)

    changed = [other(example) if number in wrong else example for number, example in enumerate(examples)]
    return changed, {examples[number].id for number in wrong}


def _train_whole(
    course, name: str, examples: Sequence[Example], *, epochs: float = 1, like: int | None = None, loss: Callable | None = None
):
    """The base model after the teacher's training, on as many rows as `like` rows would be: model, tokenizer, result."""
    model, tokenizer = load_torch(course.base().path, dtype=training.fast_dtype())
    rows = training.encode_rows(tokenizer, course.task, examples)
    settings = replace(course.profile.teacher, epochs=epochs * (like or len(rows)) / len(rows))
    training.freeze_below(model, settings.trained_layers)
    start = time.perf_counter()
    training.train(model, rows, settings, loss=loss or training.next_token_loss)
    seconds = round(time.perf_counter() - start, 1)
    training.to_fast_dtype(model)
    row = {"name": name, "exact_match": asdict(score(TorchChatModel.from_loaded(model, tokenizer, name), course.task))}
    give_back_memory()
    print(f"{name}: {row['exact_match']['value']:.1%} in {seconds:.0f} s", flush=True)
    return model, tokenizer, row | {"training_s": seconds, "rows": len(rows)}
