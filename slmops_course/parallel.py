"""The training loop shared out over processes, for those with several GPUs or machines: the same script, the same result.

    accelerate launch --multi_gpu --num_processes 2 -m slmops_course.parallel --task FOLDER --source FOLDER --out FOLDER
    torchrun --standalone --nproc_per_node 2 -m slmops_course.parallel --task FOLDER --source FOLDER --out FOLDER

The first line is for GPUs. With --cpu, accelerate 1.15 starts one process whatever number it is told, so processors take
the second; accelerate connects the processes either way.
Each process takes every n-th row of a step, computes its gradients, and adds them up with those of the others; then all
make the same step. The sum is over the same rows as on one process, so only the order of additions differs.
Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020,
https://arxiv.org/abs/2006.15704
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.training import (
    Row,
    TrainingError,
    TrainingSettings,
    accumulate_gradients,
    batch_indexes,
    check_settings,
    copy_weights,
    next_token_loss,
    update_weights,
)


def train_together(model, rows: Sequence[Row], settings: TrainingSettings, accelerator, *, loss=next_token_loss) -> list[dict]:
    """`training.train`, its steps shared out over the processes of an accelerate.Accelerator; the history is that of all.

    Every process must call it with the same model, rows and settings, and ends with the same weights, in fp32.
    Raises TrainingError for settings that cannot work, and for rounded_bits, which one process alone can do.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    check_settings(model, rows, settings)
    if settings.rounded_bits:
        raise TrainingError("rounded_bits is set: expected None here; weights are rounded on one process, by training.train.")
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )
    steps_an_epoch = -(-len(rows) // settings.batch_size)
    total = max(1, round(settings.epochs * steps_an_epoch))
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup_share * total), total)
    history: list[dict] = []
    model.train()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    while len(history) < total:
        for indexes in batch_indexes(rows, batch_size=settings.batch_size, rng=rng)[: total - len(history)]:
            value, tokens = share_step(model, weights, rows, indexes, accelerator, loss)
            if not math.isfinite(value):
                raise TrainingError(f"The loss became {value} at step {len(history)}: expected a number; lower learning_rate.")
            update_weights([optimizer], weights, masters, settings.max_grad_norm)
            schedule.step()
            step = len(history)
            history.append({"step": step, "epoch": step / steps_an_epoch, "loss": value, "tokens": tokens})
    model.float()
    copy_weights(masters, weights)
    model.set_attn_implementation(attention)
    model.eval()
    return history


def share_step(model, weights, rows, indexes: list[int], accelerator, loss) -> tuple[float, int]:
    """The gradients of one step, summed over the processes, in every process; returns the step's loss and padded tokens.

    Each process's loss is a mean over its own answer tokens, so it counts by its share of all of them.
    """
    import torch

    mine = indexes[accelerator.process_index :: accelerator.num_processes]
    answers = [sum(len(rows[i].ids) - rows[i].answer_start for i in part) for part in (mine, indexes)]
    share = answers[0] / answers[1]
    value, tokens = accumulate_gradients(model, rows, mine, loss) if mine else (0.0, 0)
    for weight in weights:
        # In fp32: sums of shorter numbers would lose what is to be compared.
        own = torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float() * share
        weight.grad = accelerator.reduce(own, reduction="sum").to(weight.dtype)
    totals = accelerator.reduce(torch.tensor([value * share, float(tokens)], dtype=torch.float64), reduction="sum").tolist()
    return totals[0], round(totals[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a model folder on a task's labelled messages and save it, from as many processes as there are."""
    import torch
    from accelerate import Accelerator

    from slmops_course.chat import load_torch
    from slmops_course.students import save_model
    from slmops_course.tasks import load_task
    from slmops_course.training import encode_rows

    parser = argparse.ArgumentParser()
    for name in ("--task", "--source", "--out"):
        parser.add_argument(name, type=Path, required=True)
    defaults = TrainingSettings()
    parser.add_argument("--epochs", type=float, default=defaults.epochs)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    options = parser.parse_args(arguments)
    settings = replace(
        defaults, epochs=options.epochs, learning_rate=options.learning_rate, batch_size=options.batch_size
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, tokenizer = load_torch(options.source)
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    task = load_task(options.task)
    try:
        history = train_together(model, encode_rows(tokenizer, task, task.splits["train"]), settings, accelerator)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, options.out)
        told = {"processes": accelerator.num_processes, "history": history}
        (options.out / "history.json").write_text(json.dumps(told), "utf-8")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
