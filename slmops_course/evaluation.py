"""How good a model is on a task: metrics with intervals, and the scoreboard that compares every stage.

The metrics are functions of the rows' outcomes, so they know nothing of the model that gave them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slmops_course.chat import ChatModel, Reply
from slmops_course.errors import CourseError
from slmops_course.tasks import Example, Task, TaskError

RESAMPLES = 1000
INVALID = "(invalid)"  # stands for the label of a reply that is no answer


class EvaluationError(CourseError):
    """Something that cannot be scored."""


@dataclass(frozen=True)
class Outcome:
    """One message, what was expected, and what a model made of it. `answer` is None where the reply was unusable."""

    id: str
    text: str
    expected: dict
    reply: str
    answer: dict | None
    problem: str | None


@dataclass(frozen=True)
class Score:
    """A share between 0 and 1 with its 95 % interval, over `count` rows."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self):
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def ask_all(model: ChatModel, task: Task, examples: Sequence[Example], **options) -> list[Reply]:
    """Put the task's question about every message to the model; replies in the messages' order."""
    return model.generate([task.messages(example.text) for example in examples], **options)


def judge(task: Task, examples: Sequence[Example], replies: Sequence[str]) -> list[Outcome]:
    """Pair every labelled message with the answer in its reply, or with the reason why there is none."""
    outcomes = []
    for example, reply in zip(examples, replies, strict=True):
        answer, problem = None, None
        try:
            answer = task.parse(reply)
        except TaskError as error:
            problem = str(error)
        outcomes.append(Outcome(example.id, example.text, dict(example.answer), reply, answer, problem))
    return outcomes


def ask_and_judge(model: ChatModel, task: Task, examples: Sequence[Example]) -> list[Outcome]:
    """What a model makes of labelled messages, see `judge`."""
    return judge(task, examples, [reply.text for reply in ask_all(model, task, examples)])


def score_outcomes(task: Task, outcomes: Sequence[Outcome], *, seed: int = 0) -> dict[str, Score]:
    """All metrics of a task: exact match, each field, JSON validity, macro-F1 of the label, and out-of-scope accuracy.

    Every score carries a 95 % percentile bootstrap interval over the rows.
    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    Raises EvaluationError when there is nothing to score.
    """
    if not outcomes:
        raise EvaluationError("There are no outcomes to score: expected at least one message; check the test split.")
    label = task.label_field
    hits = {"exact_match": [o.answer == o.expected for o in outcomes]}
    for name in task.fields:
        hits[name] = [o.answer is not None and o.answer[name] == o.expected[name] for o in outcomes]
    hits["json_valid"] = [o.answer is not None for o in outcomes]
    scores = {name: mean_score(values, seed=seed) for name, values in hits.items()}
    expected = [o.expected[label] for o in outcomes]
    found = [o.answer[label] if o.answer else INVALID for o in outcomes]
    scores[f"{label}_macro_f1"] = bootstrap(
        lambda rows: macro_f1([expected[i] for i in rows], [found[i] for i in rows]), len(outcomes), seed=seed
    )
    if task.out_of_scope_label:
        outside = [f == task.out_of_scope_label for e, f in zip(expected, found, strict=True) if e == task.out_of_scope_label]
        if outside:
            scores["out_of_scope"] = mean_score(outside, seed=seed)
    return scores


def macro_f1(expected: Sequence[str], found: Sequence[str]) -> float:
    """The mean over the expected labels of each label's F1; a label never found counts 0.

    Example: expected=["a", "a", "b"], found=["a", "b", "b"] -> (2/3 + 2/3) / 2 = 0.667
    It is scikit-learn's f1_score with average="macro", some fifteen times as fast, because a bootstrap asks often; a test
    compares them.
    """
    labels, codes = np.unique([*expected, *found], return_inverse=True)
    wanted, given = np.split(codes, 2)
    right, wanted, given = (np.bincount(some, minlength=len(labels)) for some in (wanted[wanted == given], wanted, given))
    return float(np.mean((2 * right / np.maximum(wanted + given, 1))[wanted > 0]))


def mean_score(hits: Sequence[bool], *, seed: int = 0) -> Score:
    """The share of hits, with its bootstrap interval.

    The mean of n rows drawn with replacement is a binomial count over n, so it is drawn directly.
    """
    count, share = len(hits), float(np.mean(hits))
    draws = np.random.default_rng(seed).binomial(count, share, RESAMPLES) / count
    return Score(share, *_percentiles(draws), count)


def bootstrap(metric: Callable[[Sequence[int]], float], count: int, *, seed: int = 0) -> Score:
    """A metric over rows 0 … count-1 with its 95 % percentile bootstrap interval; `metric` takes row numbers."""
    rng = np.random.default_rng(seed)
    draws = [metric(rng.integers(0, count, count)) for _ in range(RESAMPLES // 4)]
    return Score(metric(range(count)), *_percentiles(draws), count)


def slice_scores(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Exact match within each label, worst first."""
    groups: dict[str, list[bool]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.expected[task.label_field], []).append(outcome.answer == outcome.expected)
    scores = {label: mean_score(hits) for label, hits in groups.items()}
    return dict(sorted(scores.items(), key=lambda item: (item[1].value, item[0])))


def paired_difference(first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int = 0) -> Score:
    """Exact match of `second` minus that of `first` on the same messages, with its bootstrap interval.

    Two models scored on the same messages are compared message by message: the interval is much narrower than the
    difference of two intervals.
    """
    if [o.id for o in first] != [o.id for o in second]:
        raise EvaluationError("The two models were scored on different messages: expected the same ones; score both again.")
    difference = np.array([(b.answer == b.expected) - (a.answer == a.expected) for a, b in zip(first, second, strict=True)])
    return bootstrap(lambda rows: float(difference[list(rows)].mean()), len(difference), seed=seed)


def outcomes_to_json(outcomes: Sequence[Outcome]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(vars(o), ensure_ascii=False) + "\n" for o in outcomes)


def outcomes_from_json(text: str) -> list[Outcome]:
    """The reverse of `outcomes_to_json`."""
    return [Outcome(**json.loads(line)) for line in text.split("\n") if line]


def _percentiles(draws) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
