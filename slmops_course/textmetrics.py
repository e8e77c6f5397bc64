"""Metrics where exact match says too little: perplexity, likeness of free text, and whether confidence can be trusted."""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slmops_course.evaluation import EvaluationError, Score, bootstrap
from slmops_course.tasks import Example, Task
from slmops_course.training import Row, answer_logits, encode_rows, make_batch

CHRF_ORDER = 6  # the longest run of characters that chrF counts
CHRF_BETA = 2.0  # recall counts twice as much as precision


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers of like confidence: how sure the model was of them, and how often they were right."""

    confidence: float  # mean, 0 to 1
    accuracy: float  # share right, 0 to 1
    count: int


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, 0 (as often right as sure) to 1, and the bins it was summed over, least sure first."""

    error: float
    bins: tuple[ReliabilityBin, ...]


def perplexity(log_probabilities: Sequence[float], token_counts: Sequence[int]) -> float:
    """How many tokens the model hesitates between, on average: exp(-sum of ln p over all answers / number of tokens).

    `log_probabilities` holds, for each answer, the sum of ln p (nats) of its tokens, and `token_counts` how many these are.
    Longer answers weigh more. 1 is certain and right; a token that the model holds impossible gives infinity.
    Example: log_probabilities=[2 * ln 0.5, ln 0.125], token_counts=[2, 1] -> exp(5 * ln 2 / 3) = 3.17
    Raises EvaluationError for no answers, a positive or missing log-probability, or an answer without tokens.
    Source: Jelinek et al., "Perplexity, a measure of the difficulty of speech recognition tasks", 1977; for language models
    of this kind https://huggingface.co/docs/transformers/perplexity
    """
    pairs = _pairs(log_probabilities, token_counts, "log-probabilities", "token counts")
    wrong = [pair for pair in pairs if not pair[0] <= 0 or pair[1] < 1]
    if wrong:
        raise EvaluationError(
            f"An answer of {wrong[0][1]} tokens has the log-probability {wrong[0][0]}: expected one token or more, and 0 or "
            "less; sum ln p over the answer's tokens."
        )
    nats = -sum(log for log, _ in pairs) / sum(count for _, count in pairs)
    return math.exp(nats) if nats < 700 else math.inf  # exp(710) is more than a float holds


def log_probabilities(model, rows: Sequence[Row], *, batch_size: int = 32) -> list[float]:
    """For each row the sum of ln p (nats) of its answer's tokens, each given those before it, the end token included.

    `model` is a Llama-type causal language model. exp of a sum is the probability that the model gives to the whole
    answer: how sure it is of it.
    """
    import torch

    sums = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            indexes = order[start : start + batch_size]
            batch = make_batch(rows, indexes)
            logs = torch.log_softmax(answer_logits(model, batch), dim=-1).gather(1, batch.targets[:, None])[:, 0]
            parts = logs.split([len(rows[i].ids) - rows[i].answer_start for i in indexes])
            for index, part in zip(indexes, parts, strict=True):
                sums[index] = part.sum().item()
    return sums


def answer_probabilities(model, tokenizer, task: Task, examples: Sequence[Example]) -> dict[str, float]:
    """By message id the probability, 0 to 1, that a model gives to the whole answer of a labelled message."""
    logs = log_probabilities(model, encode_rows(tokenizer, task, examples))
    return {example.id: math.exp(log) for example, log in zip(examples, logs, strict=True)}


def rouge_l(found: str, expected: str) -> float:
    """ROUGE-L, the F1 of the longest run of words, gaps allowed, that two texts have in common in order; 0 to 1.

    Words are letters, marks and digits of any script, in lower case; torchmetrics by itself would keep a to z and score
    all Hindi 0. Without words on a side, 0.
    Example: "the cat is on the mat", "there is a cat on the mat" -> 4 words in common of 6 and 7: F1 = 0.615
    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, https://aclanthology.org/W04-1013/
    """
    from torchmetrics.functional.text import rouge_score

    return float(rouge_score(found, expected, rouge_keys="rougeL", normalizer=_words)["rougeL_fmeasure"])


def chrf(found: str, expected: str) -> float:
    """chrF, 0 to 1: the F2 of runs of one to six characters without white space.

    It needs no words, so it suits languages that inflect. Without characters on a side it is 0. It agrees with sacreBLEU's
    score of a sentence to 0.001: runs longer than the shorter text do not count. With them, as torchmetrics does it by
    itself, "card" for "card" would score 0.667.
    Example: "the cat is on the mat", "there is a cat on the mat" -> 0.479
    Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015, https://aclanthology.org/W15-3049/
    """
    from torchmetrics.functional.text import chrf_score

    found, expected = ("".join(text.split()) for text in (found, expected))
    order = min(CHRF_ORDER, len(found), len(expected))
    return float(chrf_score([found], [[expected]], n_char_order=order, n_word_order=0, beta=CHRF_BETA)) if order else 0.0


def text_score(
    metric: Callable[[str, str], float], found: Sequence[str], expected: Sequence[str], *, seed: int = 0
) -> Score:
    """The mean of `rouge_l` or `chrf` over the messages, with its 95 % bootstrap interval.

    It is the mean of the messages' scores, not the score of all texts as one, which torchmetrics computes without the
    messages that have nothing in common.
    Raises EvaluationError for no texts, or lists of unlike length.
    """
    scores = [metric(*pair) for pair in _pairs(found, expected, "texts found", "texts expected")]
    return bootstrap(lambda rows: sum(scores[row] for row in rows) / len(scores), len(scores), seed=seed)


def calibration(confidences: Sequence[float], correct: Sequence[bool], *, bins: int = 10) -> Calibration:
    """Is a model that is 80 % sure right 80 % of the time? Answers are put into bins of like confidence.

    The error is the mean over bins of |accuracy - mean confidence|, weighted by their answers. Bins are of one width,
    ((m-1)/M, m/M], the first with 0; empty ones are left out. `confidences` are probabilities, 0 to 1, one an answer.
    Example: confidences=[0.9, 0.9, 0.6, 0.6], correct=[1, 1, 1, 0] -> 0.5 * |1 - 0.9| + 0.5 * |0.5 - 0.6| = 0.1
    Raises EvaluationError for no answers, lists of unlike length, or a confidence outside 0 to 1.
    Source: Guo et al., "On calibration of modern neural networks", 2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    import numpy as np
    from sklearn.calibration import calibration_curve

    pairs = _pairs(confidences, correct, "confidences", "outcomes")
    outside = [confidence for confidence, _ in pairs if not 0 <= confidence <= 1]
    if outside or bins < 1:
        what = f"A confidence is {outside[0]}: expected 0 to 1" if outside else f"There are {bins} bins: expected 1 or more"
        raise EvaluationError(f"{what}; give probabilities, such as exp of an answer's log-probability, and about 10 bins.")
    sure, right = np.array(confidences, float), np.array([bool(hit) for _, hit in pairs])
    accuracies, means = calibration_curve(right, sure, n_bins=bins, pos_label=True)
    edges = np.linspace(0, 1, bins + 1)  # counted as calibration_curve does, which keeps the counts to itself
    counts = np.bincount(np.searchsorted(edges[1:-1], sure), minlength=bins)
    rows = zip(means.tolist(), accuracies.tolist(), counts[counts > 0].tolist(), strict=True)
    filled = tuple(ReliabilityBin(*row) for row in rows)
    return Calibration(sum(abs(b.accuracy - b.confidence) * b.count for b in filled) / len(pairs), filled)


def _pairs(first: Sequence, second: Sequence, first_name: str, second_name: str) -> list[tuple]:
    if len(first) != len(second) or not len(first):
        raise EvaluationError(
            f"There are {len(first)} {first_name} and {len(second)} {second_name}: expected as many of each, at least one; "
            "score the same answers."
        )
    return list(zip(first, second, strict=True))


def _words(text: str) -> str:
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
