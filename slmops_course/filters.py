"""Which of a teacher's labels to keep. Each filter sets rows aside with its reason; none is lost and none is changed."""

from collections.abc import Callable, Mapping, Sequence

from slmops_course.evaluation import EvaluationError
from slmops_course.tasks import Example, Rejected, Task, TaskError
from slmops_course.teachers import Labelled
from slmops_course.validation import NEAR, similar_pairs


def drop_unsure(labelled: Labelled, confidence: Mapping[str, float], *, least: float) -> Labelled:
    """Set aside labels that the teacher itself held less probable than `least`, 0 to 1.

    `confidence` holds the probability of the whole answer by message id, see `textmetrics.log_probabilities`. A message
    without one is kept.
    """
    return _keep(labelled, lambda e: confidence.get(e.id, 1.0) >= least, f"the teacher is less than {least:.0%} sure of it")


def drop_disagreed(labelled: Labelled, samples: Mapping[str, Sequence[str]], task: Task, *, least: float = 0.5) -> Labelled:
    """Set aside labels with which fewer than a share of `least` of the sampled replies agree: self-consistency.

    `samples` holds replies by message id, see `teachers.sample_answers`. A message that was not sampled is kept.
    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", 2022,
    https://arxiv.org/abs/2203.11171
    """

    def agreed(example: Example) -> bool:
        replies = samples.get(example.id, ())
        same = sum(_answer(task, reply) == dict(example.answer) for reply in replies)
        return not replies or same >= least * len(replies)

    return _keep(labelled, agreed, "its sampled answers disagree with it")


def drop_copies(labelled: Labelled, others: Sequence[str] = (), *, threshold: float = NEAR) -> Labelled:
    """Set aside messages that nearly repeat one of `others`, such as the test messages, or an earlier kept one.

    Two messages are near copies when they share at least `threshold` of their shingles, see `teachers.shingles`.
    """
    first = len(others)
    copies = {j - first for _, j, _ in similar_pairs([*others, *(e.text for e in labelled.kept)], threshold=threshold)}
    numbers = {example.id: number for number, example in enumerate(labelled.kept)}
    return _keep(labelled, lambda e: numbers[e.id] not in copies, "it nearly repeats another message")


def drop_contested(labelled: Labelled, other: Labelled) -> Labelled:
    """Set aside labels that a second teacher does not share; what the second could not label is kept."""
    theirs = {example.id: dict(example.answer) for example in other.kept}
    return _keep(labelled, lambda e: theirs.get(e.id, dict(e.answer)) == dict(e.answer), "another teacher says otherwise")


def filter_value(before: Labelled, after: Labelled, key: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """What a filter did, by a key of right answers: shares of labels, 0 to 1.

    Example: -> {"kept": 0.9, "right": 0.93, "wrong caught": 0.52, "right lost": 0.04}: nine tenths of the labels are left,
    of these 93 % are right; half of the wrong ones were set aside, and one in 25 of the right ones.
    Raises EvaluationError where no label before has a key, or none is left.
    """
    known = [example for example in before.kept if example.id in key]
    left = {example.id for example in after.kept} & {example.id for example in known}
    if not left:
        raise EvaluationError(
            f"Of {len(known)} labels with a key the filter left none: expected some; give it a lower limit, or more of a key."
        )
    right = {example.id for example in known if dict(example.answer) == dict(key[example.id])}
    wrong = {example.id for example in known} - right
    return {
        "kept": len(left) / len(known),
        "right": len(left & right) / len(left),
        "wrong caught": len(wrong - left) / max(1, len(wrong)),
        "right lost": len(right - left) / max(1, len(right)),
    }


def _keep(labelled: Labelled, is_good: Callable[[Example], bool], reason: str) -> Labelled:
    good = {example.id: is_good(example) for example in labelled.kept}
    aside = [Rejected(e.id, reason, str(dict(e.answer))) for e in labelled.kept if not good[e.id]]
    return Labelled(tuple(e for e in labelled.kept if good[e.id]), (*labelled.rejected, *aside))


def _answer(task: Task, reply: str) -> dict | None:
    try:
        return dict(task.parse(reply))
    except TaskError:
        return None
