"""What a model is pulled towards in training, beside plain cross-entropy: a teacher's distribution, its inner states, and
likeness among messages of one label. Each function here makes a loss for `training.train`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from slmops_course.training import Batch, TrainingError, answer_logits, answer_states, next_token_loss, project


def forward_divergence(given, wanted):
    """KL(teacher || student), averaged over tokens; both are log-probabilities of the shape (tokens, vocabulary).

    It is large where the teacher holds something possible and the student does not: the student covers all of it.
    """
    import torch

    return torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")


def reverse_divergence(given, wanted):
    """KL(student || teacher), averaged over tokens: large where the student holds something possible that its teacher does not.

    So the student seeks one likely answer rather than all of them.
    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2023, https://arxiv.org/abs/2306.08543
    """
    return forward_divergence(wanted, given)


def distillation_loss(
    teacher_states: Sequence, teacher_head, *, temperature: float, label_share: float,
    divergence: Callable = forward_divergence,
) -> Callable:  # fmt: skip
    """A loss that pulls the student's distribution over the next token towards the teacher's.

    `teacher_states[i]` holds the teacher's final hidden states for row i, shape (answer tokens, teacher's hidden size);
    with `teacher_head`, shape (vocabulary, teacher's hidden size), they give back its logits exactly, in a fraction of
    the memory. The loss is `(1 - label_share) * T^2 * divergence at temperature T + label_share * CE`.
    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
    """
    import torch
    from torch.nn import functional

    if not 0 < temperature < math.inf:
        raise TrainingError(f"The distillation temperature is {temperature}: expected above 0; 1 to 4 is usual.")
    if not 0 <= label_share <= 1:
        raise TrainingError(f"The label_share is {label_share}: expected 0 to 1; 0.3 is usual.")

    def loss(model, batch: Batch):
        with torch.no_grad():
            states = torch.cat([teacher_states[i] for i in batch.indexes])
            wanted = functional.log_softmax(project(states, lambda rows: rows @ teacher_head.T) / temperature, dim=-1)
        logits = answer_logits(model, batch)
        given = functional.log_softmax(logits / temperature, dim=-1)
        hard = functional.cross_entropy(logits, batch.targets) if label_share else 0.0
        return (1 - label_share) * temperature**2 * divergence(given, wanted) + label_share * hard

    return loss


def matching_loss(wanted: Mapping[int, Sequence], *, weight: float, loss: Callable = next_token_loss) -> Callable:
    """Another loss, plus `weight` times how far the student's inner states point away from the teacher's.

    `wanted[layer][i]` holds the states that the student's layer should have for row i where answer tokens are predicted,
    shape (answer tokens, hidden size): those of the teacher's layer from which it was cut. The distance is 1 - cosine,
    averaged over tokens and layers.
    Source: Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108 (cosine of the last layer); Jiao et al.,
    "TinyBERT", 2019, https://arxiv.org/abs/1909.10351 (every layer).
    """
    import torch

    if not 0 < weight < math.inf:
        raise TrainingError(f"The weight of the matching loss is {weight}: expected above 0; 1 is usual.")

    def whole(model, batch: Batch):
        with inner_states(model, batch, wanted) as found:
            value = loss(model, batch)
        apart = [
            1 - torch.cosine_similarity(found[layer].float(), torch.cat([states[i] for i in batch.indexes]).float()).mean()
            for layer, states in wanted.items()
        ]
        return value + weight * sum(apart) / len(apart)

    return whole


@contextlib.contextmanager
def inner_states(model, batch: Batch, layers) -> Iterator[dict]:
    """While its block runs, notes what comes out of layers where answer tokens are predicted: layer -> (tokens, hidden)."""
    found: dict = {}

    def note(layer: int):
        def hook(module, arguments, output):
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden.flatten(0, 1)[batch.positions]

        return hook

    hooks = [model.model.layers[layer].register_forward_hook(note(layer)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def contrastive_loss(
    labels: Sequence[str], *, place: int, share: float = 0.5, temperature: float = 0.1, memory: int = 256
) -> Callable:
    """Cross-entropy, plus a pull among messages of one label: `(1 - share) * CE + share * contrastive`.

    `labels[i]` is row i's label. A message is stood for by the model's final state where it predicts answer token number
    `place`, from 0: the first token in which answers differ. Each is drawn to those of its label and away from the
    others, in its batch and among the last `memory` messages before it, whose states are remembered as they were. A
    message that is alone with its label takes no part.
    Sources: Khosla et al., "Supervised Contrastive Learning", 2020, https://arxiv.org/abs/2004.11362 (equation 2); Gunel et
    al., "Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning", 2020,
    https://arxiv.org/abs/2011.01403; Wang et al., "Cross-Batch Memory for Embedding Learning", 2019,
    https://arxiv.org/abs/1912.06798 (the memory, without which small batches hold few pairs).
    Raises TrainingError for settings that cannot work.
    """
    import torch
    from torch.nn import functional

    if not 0 <= share <= 1 or not 0 < temperature < math.inf:
        raise TrainingError(
            f"share is {share} and temperature {temperature}: expected 0 to 1, and above 0; 0.5 and 0.1 are usual."
        )
    remembered, their_names = [], []

    def loss(model, batch: Batch):
        states = answer_states(model, batch)
        hard = functional.cross_entropy(project(states, model.lm_head), batch.targets)
        rows = batch.positions // batch.ids.shape[1]
        starts = torch.searchsorted(rows, torch.arange(len(batch.indexes)))
        points = functional.normalize(states[starts + place].float(), dim=1)
        names = [labels[i] for i in batch.indexes]
        others, other_names = torch.cat([points, *remembered]), names + their_names
        alike = points @ others.T / temperature
        itself = torch.eye(len(points), len(others), dtype=torch.bool)
        alike = alike.masked_fill(itself, -math.inf)
        same = torch.tensor([[a == b for b in other_names] for a in names]) & ~itself
        log_share = (alike - alike.logsumexp(dim=1, keepdim=True)).masked_fill(~same, 0.0)
        counts = same.sum(1)
        pulled = -log_share.sum(1)[counts > 0] / counts[counts > 0]
        if torch.is_grad_enabled() and memory:
            remembered[:] = [torch.cat([*remembered, points.detach()])[-memory:]]
            their_names[:] = (their_names + names)[-memory:]
        return (1 - share) * hard + share * (pulled.mean() if len(pulled) else 0.0)

    return loss


def first_difference(rows: Sequence) -> int:
    """The first place, from 0, in which the answers of training rows differ. Example: answers [5, 7, 1], [5, 7, 2] -> 2"""
    answers = [row.ids[row.answer_start :] for row in rows]
    shortest = min(map(len, answers))
    return next((k for k in range(shortest) if len({answer[k] for answer in answers}) > 1), shortest - 1)
