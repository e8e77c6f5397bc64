"""What a model still knows after its weights were changed: rounded to few bits, to three values, or partly set to zero.

No file is made: the matrices of a PyTorch model are changed in place, and the model looks at labelled messages once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from slmops_course import training
from slmops_course.chat import load_torch
from slmops_course.tasks import Example, Task
from slmops_course.textmetrics import perplexity

# Kinds of matrices in a Llama-type model, by a part of their names. The embedding is the output layer as well.
KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def to_grid(bits: int) -> Callable:
    """A function that rounds a matrix as Olive's round-to-nearest pass does, see training.round_weights."""

    def change(weights):
        after = weights.clone()
        training.round_weights([after], [weights], bits=bits)
        return after

    return change


def to_ternary(weights):
    """Three values a matrix: -s, 0 and s, where s is the mean of the absolute values.

    Example: [[0.1, -2.0, 0.9]] -> s = 1.0 -> [[0.0, -1.0, 1.0]]
    Source: Ma et al., "The Era of 1-bit LLMs", 2024, https://arxiv.org/abs/2402.17764 (absmean quantization)
    """
    scale = weights.abs().mean().clamp_min(1e-12)
    return (weights / scale).round().clamp(-1, 1) * scale


def without_smallest(share: float) -> Callable:
    """A function that sets that share of a matrix's weights to zero, those nearest to it: magnitude pruning.

    Example: share=0.5 -> [[0.1, -2.0, 0.9, -0.3]] -> [[0.0, -2.0, 0.9, 0.0]]
    Source: Han et al., "Learning both Weights and Connections", 2015, https://arxiv.org/abs/1506.02626
    """

    def change(weights):
        count = int(share * weights.numel())
        return weights * (weights.abs() > weights.abs().flatten().kthvalue(count).values) if count else weights

    return change


CHANGES = {
    "8 bits": to_grid(8),
    "4 bits": to_grid(4),
    "2 bits": to_grid(2),
    "three values": to_ternary,
    "30 % zeros": without_smallest(0.3),
    "50 % zeros": without_smallest(0.5),
    "70 % zeros": without_smallest(0.7),
}
SCANNED = ("4 bits", "2 bits")  # these are also tried on one kind of matrix at a time


def scan(folder: Path, task: Task, examples: Sequence[Example]) -> list[dict]:
    """What labelled messages look like to a Hugging Face folder's model after each change, of all matrices or of one kind.

    Returns {"change", "where" ("all", or one of KINDS), "perplexity", "right", "messages"} a row, the unchanged model first;
    see `grade`.
    """
    import torch

    network, tokenizer = load_torch(folder)
    rows = training.encode_rows(tokenizer, task, examples)
    exact = {name: weights.detach().clone() for name, weights in network.named_parameters() if weights.ndim == 2}
    tries = [("none", "all"), *((name, "all") for name in CHANGES), *((name, kind) for name in SCANNED for kind in KINDS)]
    found = []
    for name, where in tries:
        change = CHANGES.get(name, torch.clone)
        with torch.no_grad():
            for place, weights in exact.items():
                network.get_parameter(place).copy_(change(weights) if where == "all" or where in place else weights)
        found.append({"change": name, "where": where, **grade(training.to_fast_dtype(network), rows), "messages": len(rows)})
        network.float()
    return found


def grade(model, rows: Sequence[training.Row], *, batch_size: int = 32) -> dict[str, float]:
    """The perplexity of the right answers, and how many of them the model would give.

    An answer is "right" when each of its tokens, the end included, is the model's first choice after those before it: then
    generation at temperature 0 writes just this answer. So one look at each message is enough, and nothing is generated.
    """
    import torch

    logs, counts, right = [], [], 0
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            part = range(start, min(start + batch_size, len(rows)))
            batch = training.make_batch(rows, part)
            logits = training.answer_logits(model, batch)
            lengths = [len(rows[i].ids) - rows[i].answer_start for i in part]
            chosen = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
            hits = logits.argmax(-1) == batch.targets
            logs += [each.sum().item() for each in chosen.split(lengths)]
            right += sum(bool(each.all()) for each in hits.split(lengths))
            counts += lengths
    return {"perplexity": perplexity(logs, counts), "right": right}
