"""Chapter 4's side experiments: mixed precision file by file, and students that are trained with very few bits a weight."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from slmops_course import evaluation, optimize, serving, training
from slmops_course.benchmark import give_back_memory
from slmops_course.experiments.students import Bench
from slmops_course.sensitivity import to_grid, to_ternary

COMPARED = ("fp32", "int8", "int4-rtn", *optimize.VARIANTS)


def compare_mixed(course, *, recipes: Sequence[str] = COMPARED) -> list[dict]:
    """Two students of one shape, one trained for 4 bits and one never rounded, in files that keep 8 bits for some matrices.

    Exact match on the dev split; "difference" is from the same student in fp32, message by message.
    """
    dev, rows = course.task.splits["dev"], []
    for who, student in (("trained for 4 bits", course.student()), ("never rounded", course.compared_student("logit"))):
        reference = None
        for recipe in recipes:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / recipe
                folder.mkdir()
                optimize.optimize(recipe, model=student.path, task=course.task, folder=folder)
                with serving.GenAIChatModel(folder) as chat:
                    outcomes = evaluation.ask_and_judge(chat, course.task, dev)
                reference = reference or outcomes
                rows.append(
                    {
                        "name": f"{who}, {recipe}",
                        "size_bytes": optimize.model_bytes(folder),
                        "exact_match": asdict(evaluation.mean_score([o.answer == o.expected for o in outcomes])),
                        "difference": asdict(evaluation.paired_difference(reference, outcomes)),
                    }
                )
    return rows


def compare_rounding(course) -> list[dict]:
    """Students that compute with rounded weights from their first step on, and are scored with them: 4 bits, 2, three values.

    Only the matrices of the layers are rounded, as in BitNet; the embedding stays. They get as many steps as chapter 2's
    compared students, one of which, never rounded, is the first row. "size_bytes" is what the weights would take.
    """
    bench = Bench(course)
    states, head, _ = bench.soft(bench.tokens)
    rows = []
    for name, (rounding, bits) in ROUNDINGS.items():
        student = bench.cut()
        count, inner = sum(p.numel() for p in student.parameters()), round_while_learning(student, rounding)
        row = bench.measure(name, student, loss=bench.distil(states, head))
        rows.append(row | {"size_bytes": math.ceil((inner * bits + (count - inner) * 16) / 8)})
        give_back_memory()
    return rows


def round_while_learning(model, rounding: Callable | None) -> int:
    """Let a model compute with its layers' matrices as `rounding` gives them, while exact values learn; returns their number.

    The gradient passes through the rounding as if it were not there.
    Source: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013,
    https://arxiv.org/abs/1308.3432
    """
    import torch
    from torch.nn.utils import parametrize

    class Rounded(torch.nn.Module):
        def forward(self, weights):
            return rounding(weights.detach()) + (weights - weights.detach())  # in this order: the brackets are exactly 0

    count = 0
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            count += module.weight.numel()
            if rounding:
                parametrize.register_parametrization(module, "weight", Rounded())
    return count


ROUNDINGS = {  # how, and the bits a weight takes in a file, scales included
    "never rounded": (None, 16),
    "4 bits": (to_grid(4), 4 + (16 + 4) / training.GROUP_SIZE),
    "2 bits": (to_grid(2), 2 + (16 + 2) / training.GROUP_SIZE),
    "ternary": (to_ternary, 8 / 5),
}
