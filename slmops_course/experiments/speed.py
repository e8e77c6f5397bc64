"""How fast the same rows train in our loop, in TRL's trainer with PEFT's defaults, and in Olive's own pass.

    python -m slmops_course.experiments.speed SPEC.json

Every run has a process of its own. Contenders take turns, so that a slow minute of the machine meets them all alike.
"""

import importlib.util
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slmops_course import adapters, benchmark, evaluation, olive, tasks, training
from slmops_course.chat import TorchChatModel, load_torch
from slmops_course.errors import CourseError

ROWS = 192  # the first so many rows of the train split
EPOCHS = 2
RUNS = 3  # of each contender


class SpeedError(CourseError):
    """A contender that could not be run."""


@dataclass(frozen=True)
class Job:
    """What every contender is given."""

    base: Path
    task: tasks.Task
    examples: Sequence[tasks.Example]
    rows: Sequence[training.Row]  # the examples, encoded
    tokenizer: object
    settings: training.TrainingSettings
    lora: adapters.LoraSettings


def speed(
    course, *, contenders: Sequence[str] | None = None, rows: int = ROWS, epochs: float = EPOCHS, runs: int = RUNS
) -> list[dict]:
    """One row a contender: medians over the runs, and each run's own figures in "runs".

    "seconds" is training alone: ours around `training.train`, TRL's and Olive's the `train_runtime` their trainer reports.
    "tokens_per_s" counts the rows' real tokens, for all alike, so that padding counts against whoever computes it.
    "peak_bytes" is the whole process while it trains (with Olive, its process from start to end). "growth_bytes" is what a
    process holds between two steps at the end minus at a quarter of the steps; null with Olive, whose steps nobody sees.
    "exact_match" is the score on the dev split, taken after the clock and the watch have stopped, and in the first run alone:
    the others have the same seed.

    Raises SpeedError when TRL is not installed or a run fails.
    """
    names = list(contenders or CONTENDERS)
    if TRL in names and importlib.util.find_spec("trl") is None:
        raise SpeedError(
            "TRL is not installed: expected it for the comparison with its trainer; pip install 'slmops-course[experiments]'."
        )
    lora = asdict(replace(course.profile.lora, trained_layers=None))
    spec = {"base": str(course.base().path), "task": str(course.task.folder), "rows": rows, "lora": lora}
    found: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(runs):
        for name in names:
            settings = course.profile.teacher if name == FULL else course.profile.lora_training
            settings = replace(settings, epochs=epochs, trained_layers=None)
            run = {"contender": name, "settings": asdict(settings), "with_score": turn == 0, **spec}
            found[name].append(benchmark.run_apart("slmops_course.experiments.speed", run, what=f"Training {name!r}"))
            print(f"{name}, run {turn + 1} of {runs}: {found[name][-1]['seconds']:.0f} s", flush=True)
    return [{"name": name, "note": CONTENDERS[name][1], "epochs": epochs, **summarize(found[name])} for name in names]


def summarize(runs: Sequence[dict]) -> dict:
    """The medians of what was measured in the runs; a figure that no run has stays null.

    Example: [{"seconds": 3}, {"seconds": 9}, {"seconds": 4}] -> {"seconds": 4, "runs": […]}
    """
    values = {key: [run[key] for run in runs if run[key] is not None] for key in runs[0]}
    medians = {key: statistics.median(found) if found else None for key, found in values.items()}
    return {**medians, "runs": list(runs)}


def train_full(job: Job) -> tuple:
    """Every layer's weights, in our loop; returns the trained model and what was measured."""
    model, _ = load_torch(job.base, dtype=training.fast_dtype())
    training.freeze_below(model, None)
    return model, watch_ours(job, model)


def train_lora(job: Job) -> tuple:
    """Adapters in our loop; they are merged after the measurement."""
    import torch

    model, _ = load_torch(job.base, dtype=training.fast_dtype())
    torch.manual_seed(job.settings.seed)
    tuned = adapters.add_lora(model, job.lora)
    measured = watch_ours(job, model)
    return tuned.merge_and_unload(), measured


def watch_ours(job: Job, model) -> dict:
    """Train in our loop, and look at the memory at the beginning of each step, when no gradient is held."""
    learns = next(p for p in model.parameters() if p.requires_grad)
    held: list[int] = []

    def loss(model, batch):
        if learns.grad is None:
            held.append(resident_bytes())
        return training.next_token_loss(model, batch)

    with benchmark.MemoryWatch() as watch:
        start = time.perf_counter()
        training.train(model, job.rows, job.settings, loss=loss)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": watch.peak_bytes, **growth(held)}


def peer_arguments(job: Job) -> dict:
    """What both peers' trainers are told: the settings, optimizer and schedule of `training.train`."""
    settings = job.settings
    steps = max(1, round(settings.epochs * -(-len(job.rows) // settings.batch_size)))
    return adapters.olive_lora_passes(job.lora, settings)["tune"]["training_args"] | {
        "warmup_steps": int(settings.warmup_share * steps),
        "weight_decay": settings.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
    }


def train_trl(job: Job) -> tuple:
    """The same adapters in TRL's trainer, put in as PEFT does by default; the loss is on the answer alone.

    https://huggingface.co/docs/trl/sft_trainer
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    held: list[int] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            held.append(resident_bytes())

    masks = [[int(place >= row.answer_start) for place in range(len(row.ids))] for row in job.rows]
    data = Dataset.from_dict({"input_ids": [row.ids for row in job.rows], "completion_mask": masks})
    lora = LoraConfig(
        r=job.lora.rank, lora_alpha=job.lora.alpha, target_modules=list(job.lora.target_modules), task_type="CAUSAL_LM"
    )
    model, _ = load_torch(job.base, dtype=training.fast_dtype())
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, bf16=training.has_fast_bfloat16(), completion_only_loss=True, max_length=None,
            **peer_arguments(job),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=job.tokenizer, peft_config=lora,
            callbacks=[Look()],
        )  # fmt: skip
        with benchmark.MemoryWatch() as watch:
            seconds = trainer.train().metrics["train_runtime"]
    measured = {"seconds": seconds, "peak_bytes": watch.peak_bytes, **growth(held)}
    return trainer.model.float().merge_and_unload(), measured


def train_olive(job: Job) -> tuple:
    """The same adapters in Olive's own pass, merged by its next one."""
    with tempfile.TemporaryDirectory() as scratch:
        work, out = Path(scratch).resolve() / "work", Path(scratch) / "model"
        work.mkdir()
        out.mkdir()
        passes = adapters.olive_lora_passes(job.lora, job.settings)
        passes["tune"]["training_args"] = peer_arguments(job)
        rows = olive.write_conversations(work / "rows.jsonl", job.task, job.examples, job.tokenizer)
        longest = max(len(row.ids) for row in job.rows) + 1  # the template ends a conversation with a line break
        config = olive.olive_config(
            model=job.base.resolve(), output=work / "out", passes=passes, rows=rows, max_tokens=longest
        )
        with benchmark.MemoryWatch(children=True) as watch:
            olive.run_olive(config, work)
        seconds = reported_seconds((work / "olive.log").read_text("utf-8"))
        olive.collect(work, out, marker="config.json", config=config, model=job.base)
        model, _ = load_torch(out, dtype=training.fast_dtype())
    return model, {"seconds": seconds, "peak_bytes": watch.peak_children_bytes, **growth([])}


def reported_seconds(log: str) -> float:
    """How long training took, as a transformers trainer says at its end. Raises SpeedError when it says nothing.

    Example: "…{'train_runtime': '3.142', 'epoch': '2'}" -> 3.142
    """
    found = re.findall(r"'train_runtime': '?([\d.e+]+)", log)
    if not found:
        raise SpeedError("Olive's log has no train_runtime: expected its trainer's last words; see `slmops doctor`.")
    return float(found[-1])


def resident_bytes() -> int:
    """The resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def growth(held: Sequence[int]) -> dict:
    """Memory at a quarter of the steps, at the last one, and the difference; all null without samples.

    Example: [1, 5, 6, 6, 6, 6, 6, 9] -> {"quarter_bytes": 6, "end_bytes": 9, "growth_bytes": 3}
    """
    quarter, end = (held[len(held) // 4], held[-1]) if held else (None, None)
    return {"quarter_bytes": quarter, "end_bytes": end, "growth_bytes": end - quarter if held else None}


def exact_match(model, job: Job) -> float:
    """The share of the dev split's messages that a trained model answers exactly."""
    with TorchChatModel.from_loaded(training.to_fast_dtype(model), job.tokenizer, "trained") as chat:
        outcomes = evaluation.ask_and_judge(chat, job.task, job.task.splits["dev"])
    return evaluation.mean_score([o.answer == o.expected for o in outcomes]).value


FULL, OURS, TRL, OLIVE = "full, ours", "LoRA, ours", "LoRA, PEFT's defaults in TRL", "LoRA, Olive's pass"
# How each contender trains, and what a reader of its figures must know.
CONTENDERS = {
    FULL: (train_full, "all weights of all layers; learns the answer's tokens; rows of like length together"),
    OURS: (train_lora, "adapters as the base, fp32 masters; learns the answer's tokens; rows of like length together"),
    TRL: (train_trl, "adapters in fp32, under autocast; learns the answer's tokens; rows in random order"),
    OLIVE: (train_olive, "adapters in fp32, without autocast; learns every token of a row; rows in random order"),
}


def main(spec_path: str) -> None:
    """Run one contender in this process and print a line of JSON."""
    from transformers import AutoTokenizer

    spec = json.loads(Path(spec_path).read_text("utf-8"))
    base, task = Path(spec["base"]), tasks.load_task(spec["task"])
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    examples = task.splits["train"][: spec["rows"]]
    rows = training.encode_rows(tokenizer, task, examples)
    settings, lora = training.TrainingSettings(**spec["settings"]), adapters.LoraSettings(**spec["lora"])
    job = Job(base, task, examples, rows, tokenizer, settings, lora)
    model, measured = CONTENDERS[spec["contender"]][0](job)
    tokens = round(sum(len(row.ids) for row in rows) * settings.epochs)
    rate = {"rows": len(rows), "tokens": tokens, "tokens_per_s": tokens / measured["seconds"]}
    print(json.dumps({**measured, **rate, "exact_match": exact_match(model, job) if spec["with_score"] else None}))


if __name__ == "__main__":
    main(*sys.argv[1:])
