"""One training loop for supervised, distillation and adapter training.

What makes it quick on a CPU: rows of like length share a batch padded to a multiple of 8 (oneDNN builds a kernel for
every shape it meets); the vocabulary projection runs only where an answer token is predicted; layers below the first
trained one run without gradients; attention is computed by plain matrix products, whose backward pass is the quicker
one here; matrix products run in bfloat16 where the CPU has units for it, while the optimizer works on fp32 masters. A
step that would fill the memory is computed in parts.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slmops_course.chat import prompt_ids
from slmops_course.errors import CourseError
from slmops_course.tasks import Example, Task

PAD_TO = 8  # rows of a batch are padded to a multiple of so many tokens
GROUP_SIZE = 32  # weights that share one scale when they are rounded; `optimize` quantizes by the same groups
WEIGHTS_AT_ONCE = 16  # weights that one optimizer moves
PROJECT_BY = 64  # answer tokens are projected onto the vocabulary in multiples of so many
MICRO_BATCH_TOKENS = 1100  # about so many tokens go through the model at once: activations dominate the memory


def numbers() -> dict[str, int]:
    """This module's constants that decide a result, for an artifact's key."""
    return {name: globals()[name] for name in ("PAD_TO", "GROUP_SIZE", "WEIGHTS_AT_ONCE", "PROJECT_BY", "MICRO_BATCH_TOKENS")}


class TrainingError(CourseError):
    """Settings or rows with which training cannot work."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train."""

    epochs: float = 3  # passes over the rows
    learning_rate: float = 3e-4  # the peak, after warm-up; falls linearly to zero
    batch_size: int = 16  # rows a step
    warmup_share: float = 0.1  # of all steps
    weight_decay: float = 0.01  # each step takes this share, times the learning rate, off every weight
    max_grad_norm: float = 1.0  # gradients are scaled down to this length
    trained_layers: int | None = None  # only so many layers, counted from the top, learn; None: all
    rounded_bits: int | None = None  # in the last third of the steps weights are rounded to so many bits; None: never
    seed: int = 0  # of the order of the rows


@dataclass(frozen=True)
class Row:
    """One training row: prompt and answer as token ids, and where the answer begins.

    Example: ids=[1, 9690, …, 29562, …, 2], answer_start=31.
    """

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length. Shapes: ids (rows, length); positions and targets (answer tokens,).

    `positions` index the flattened ids where the next token is an answer token, and `targets` are those tokens.
    `indexes` say which rows of the training set these are.
    """

    ids: "torch.Tensor"  # noqa: F821
    positions: "torch.Tensor"  # noqa: F821
    targets: "torch.Tensor"  # noqa: F821
    indexes: list[int]


def encode_rows(tokenizer, task: Task, examples: Sequence[Example]) -> list[Row]:
    """Turn labelled messages into training rows: the prompt, the answer as compact JSON, the end token.

    Raises TrainingError for a message that nobody has labelled.
    """
    rows = []
    for example in examples:
        if example.answer is None:
            raise TrainingError(f"The message {example.id} has no answer: expected labelled messages; label or drop it.")
        prompt = prompt_ids(tokenizer, task.messages(example.text))
        answer = tokenizer(task.target(example.answer), add_special_tokens=False)["input_ids"]
        rows.append(Row([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return rows


def make_batch(rows: Sequence[Row], indexes: Sequence[int], *, pad: int = 0) -> Batch:
    """Pad the rows on the right to a multiple of 8. Causal attention never looks at padding that comes after."""
    import torch

    chosen = [rows[i] for i in indexes]
    width = -(-max(len(row.ids) for row in chosen) // PAD_TO) * PAD_TO
    ids = torch.full((len(chosen), width), pad)
    positions, targets = [], []
    for number, row in enumerate(chosen):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        positions += range(number * width + row.answer_start - 1, number * width + len(row.ids) - 1)
        targets += row.ids[row.answer_start :]
    return Batch(ids, torch.tensor(positions), torch.tensor(targets), list(indexes))


def batch_indexes(rows: Sequence[Row], *, batch_size: int, rng: random.Random) -> list[list[int]]:
    """Split the rows into batches of like length, in random order; each row is in one batch."""
    order = sorted(range(len(rows)), key=lambda i: (-(-len(rows[i].ids) // PAD_TO), rng.random()))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def answer_states(model, batch: Batch):
    """The final hidden states, normed, where answer tokens are predicted; shape (answer tokens, hidden size).

    `model` is a Llama-type causal language model. Layers whose weights are all frozen, below the first trained one,
    run without gradients.
    """
    import torch

    body = model.model
    frozen = first_trained_layer(model)
    with torch.set_grad_enabled(torch.is_grad_enabled() and body.embed_tokens.weight.requires_grad):
        hidden = body.embed_tokens(batch.ids)
    with torch.no_grad():
        width = batch.ids.shape[1]
        rotary = body.rotary_emb(hidden, torch.arange(width)[None])
        # Adding -inf above the diagonal keeps a token from seeing later ones, whichever attention the model uses.
        mask = torch.full((1, 1, width, width), -math.inf, dtype=hidden.dtype).triu(1)
        for layer in body.layers[:frozen]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    for layer in body.layers[frozen:]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return body.norm(hidden.flatten(0, 1)[batch.positions])


def first_trained_layer(model) -> int:
    """The index of the lowest layer with a weight that learns; the number of layers if none does."""
    layers = model.model.layers
    if model.model.embed_tokens.weight.requires_grad:
        return 0
    learns = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return learns.index(True) if True in learns else len(layers)


def answer_logits(model, batch: Batch):
    """The model's logits where answer tokens are predicted, in fp32; shape (answer tokens, vocabulary)."""
    return project(answer_states(model, batch), model.lm_head)


def project(states, head: Callable):
    """The logits, in fp32, that a head makes of final hidden states; shapes (tokens, hidden size), (tokens, vocabulary).

    They are computed for a multiple of PROJECT_BY tokens: oneDNN keeps a kernel, and memory, for every number it meets.
    """
    import torch

    padded = torch.nn.functional.pad(states, (0, 0, 0, -len(states) % PROJECT_BY))
    return head(padded)[: len(states)].float()


def next_token_loss(model, batch: Batch):
    """Cross-entropy of the answer tokens, averaged; the loss of supervised training and of sequence-level distillation."""
    import torch

    return torch.nn.functional.cross_entropy(answer_logits(model, batch), batch.targets)


def train(model, rows: Sequence[Row], settings: TrainingSettings, *, loss: Callable = next_token_loss) -> list[dict]:
    """Train in place and return one entry a step: {"step", "epoch", "loss", "tokens"}.

    The same model, rows and settings give the same weights on the same machine. Raises TrainingError for settings
    that cannot work, before any work starts, and when the loss stops being a number. With `rounded_bits`, the last third
    of the steps computes with rounded weights. The model that is left is in fp32, with the weights as the optimizer had
    them, not rounded.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    check_settings(model, rows, settings)
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    due = list(model.parameters()) if settings.rounded_bits else []  # to be rounded
    apart = {p: p.detach().float().clone() for p in {*weights, *due} if p.dtype != torch.float32 or due}
    masters = [apart.get(p, p) for p in weights]
    # One optimizer for every few weights: they step in turn, so that few gradients are held in fp32 at once.
    optimizers = [
        torch.optim.AdamW(
            masters[start : start + WEIGHTS_AT_ONCE], lr=settings.learning_rate, weight_decay=settings.weight_decay,
            betas=(0.9, 0.98), fused=True,
        )
        for start in range(0, len(masters), WEIGHTS_AT_ONCE)
    ]  # fmt: skip
    steps_an_epoch = -(-len(rows) // settings.batch_size)
    total = max(1, round(settings.epochs * steps_an_epoch))
    schedules = [get_linear_schedule_with_warmup(one, int(settings.warmup_share * total), total) for one in optimizers]
    history: list[dict] = []
    model.train()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # quicker on a CPU than the fused kernel, whose backward pass is slow there
    while len(history) < total:
        for indexes in batch_indexes(rows, batch_size=settings.batch_size, rng=rng)[: total - len(history)]:
            value, tokens = accumulate_gradients(model, rows, indexes, loss)
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss became {value} at step {len(history)}: expected a number; lower the learning rate "
                    f"(it is {settings.learning_rate})."
                )
            update_weights(optimizers, weights, masters, settings.max_grad_norm)
            for schedule in schedules:
                schedule.step()
            if settings.rounded_bits and 3 * (len(history) + 1) >= 2 * total:
                round_weights(due, [apart[p] for p in due], bits=settings.rounded_bits)
                due = weights  # those that do not learn stay rounded
            step = len(history)
            history.append({"step": step, "epoch": step / steps_an_epoch, "loss": value, "tokens": tokens})
    model.float()
    copy_weights(apart.values(), apart.keys())
    model.set_attn_implementation(attention)
    model.eval()
    return history


def accumulate_gradients(model, rows: Sequence[Row], indexes: list[int], loss: Callable) -> tuple[float, int]:
    """Add up the gradients of one step in parts of about MICRO_BATCH_TOKENS tokens.

    Returns the step's loss (nats an answer token) and its padded tokens.
    """
    longest = max(len(rows[i].ids) for i in indexes)
    parts = -(-len(indexes) * longest // MICRO_BATCH_TOKENS)
    size = -(-len(indexes) // parts)  # parts of like size: each new shape costs time and memory
    answers = sum(len(rows[i].ids) - rows[i].answer_start for i in indexes)
    total, tokens = 0.0, 0
    for start in range(0, len(indexes), size):
        batch = make_batch(rows, indexes[start : start + size])
        value = loss(model, batch) * (len(batch.targets) / answers)
        value.backward()
        total += value.item()
        tokens += batch.ids.numel()
    return total, tokens


def update_weights(optimizers: Sequence, weights: Sequence, masters: Sequence, max_grad_norm: float) -> None:
    """One step of each optimizer, in turn, on the fp32 masters of weights that are kept in a shorter format.

    Weights and masters are parallel, and each optimizer owns the next few of the masters. Gradients are cleared.
    A bfloat16 number has 8 significant bits: most updates are smaller than its last one and would be rounded away.
    Source: Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740
    """
    import torch

    torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
    pairs = zip(weights, masters, strict=True)
    for optimizer in optimizers:
        part = list(itertools.islice(pairs, len(optimizer.param_groups[0]["params"])))
        for weight, master in part:
            if master is not weight and weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        copy_weights([master for _, master in part], [weight for weight, _ in part])
        optimizer.zero_grad(set_to_none=True)


def copy_weights(masters: Iterable, weights: Iterable) -> None:
    """Put the masters' values into the weights that the model computes with."""
    import torch

    with torch.no_grad():
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                weight.copy_(master)


def round_weights(weights: Sequence, masters: Sequence, *, bits: int) -> None:
    """Let matrices take only the values that `bits` bits can hold, as Olive's round-to-nearest pass will choose them.

    Matrices, shape (rows, columns), are rounded in place, each group of 32 numbers along a row with its own scale and
    zero point; weights of a shape that has no whole groups stay as they are. The next gradients are those at the rounded
    weights, and change the masters: quantization-aware training with the straight-through estimator.
    Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, https://arxiv.org/abs/1712.05877; Bengio, Léonard, Courville, "Estimating or Propagating Gradients
    Through Stochastic Neurons", 2013, https://arxiv.org/abs/1308.3432
    """
    import torch
    from olive.common.quant.utils import WeightQuantizer

    quantizer = WeightQuantizer(bits=bits, symmetric=False, group_size=GROUP_SIZE)
    with torch.no_grad():
        for weight, master in zip(weights, masters, strict=True):
            if master.ndim == 2 and master.shape[1] % GROUP_SIZE == 0:
                scales, zeros = quantizer.find_qparams(master)
                weight.copy_(quantizer.dequantize(quantizer.quantize(master, scales, zeros), scales, zeros))


def check_settings(model, rows: Sequence[Row], settings: TrainingSettings) -> None:
    """Raise TrainingError for settings that cannot work with this model and these rows."""
    layers = len(model.model.layers) if hasattr(model, "model") and hasattr(model.model, "layers") else None
    if not rows:
        raise TrainingError("There are no rows to train on: expected at least one; check the task's train split.")
    for name in ("epochs", "learning_rate", "batch_size", "max_grad_norm"):
        if not 0 < getattr(settings, name) < math.inf:
            raise TrainingError(f"{name} is {getattr(settings, name)}: expected above 0; see TrainingSettings.")
    if settings.batch_size != int(settings.batch_size):
        raise TrainingError(f"batch_size is {settings.batch_size}: expected a whole number of rows.")
    if not 0 <= settings.warmup_share < 1:
        raise TrainingError(f"warmup_share is {settings.warmup_share}: expected 0 to below 1; 0.1 is usual.")
    if not 0 <= settings.weight_decay < math.inf:
        raise TrainingError(f"weight_decay is {settings.weight_decay}: expected 0 or above; 0.01 is usual.")
    if settings.rounded_bits not in (None, 2, 4, 8):
        raise TrainingError(f"rounded_bits is {settings.rounded_bits}: expected 2, 4 or 8, or None for no rounding.")
    if settings.trained_layers is not None and layers and not 0 < settings.trained_layers <= layers:
        raise TrainingError(
            f"trained_layers is {settings.trained_layers}: expected 1 to {layers}, the model's number of layers."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("No weight of the model learns: expected some; see freeze_below and adapters.add_lora.")
    for number, row in enumerate(rows):
        if not 0 < row.answer_start < len(row.ids):
            raise TrainingError(
                f"Row {number} has {len(row.ids)} tokens and its answer begins at {row.answer_start}: expected a prompt and "
                "an answer; see encode_rows."
            )
    longest = max(len(row.ids) for row in rows)
    room = getattr(model.config, "max_position_embeddings", longest)
    if longest > room:
        raise TrainingError(f"The longest row has {longest} tokens: expected at most {room}; shorten or drop it.")


def freeze_below(model, trained_layers: int | None) -> None:
    """Let only the top `trained_layers` layers learn; embeddings, and the head tied to them, stay as they are.

    The weights are kept in bfloat16 where that is fast; `train` keeps fp32 masters of those that learn.
    """
    layers = model.model.layers
    to_fast_dtype(model).requires_grad_(False)
    for layer in layers[len(layers) - (trained_layers or len(layers)) :]:
        layer.requires_grad_(True)
    model.model.norm.requires_grad_(True)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def to_fast_dtype(model):
    """The model, in place, in the number format that is fast here; a model that was trained is left in fp32."""
    import torch

    return model.to(getattr(torch, fast_dtype()))


def fast_dtype() -> str:
    """The number format in which this CPU trains and scores fastest: "bfloat16" or "float32"."""
    return "bfloat16" if has_fast_bfloat16() else "float32"
