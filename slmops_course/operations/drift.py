"""Are today's messages still like those the model was judged on? Four looks that need no right answers.

    labels      what the model answers          population stability index
    lengths     how long the messages are       population stability index over ten bins
    confidence  how sure the model is           Kolmogorov-Smirnov
    words       what the messages are about     maximum mean discrepancy of vectors

Each figure has a limit that it passes by chance, with nothing changed, in one of a thousand windows. So a small window does
not cry wolf, and a large one sees more. Drift says that something changed, not that the model is wrong: look, then correct.
"""

import functools
import json
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slmops_course.errors import CourseError
from slmops_course.evaluation import INVALID, Outcome
from slmops_course.operations.monitoring import Metrics
from slmops_course.tasks import DATA_FOLDER, Example, Task, TaskError, answer_problem

SLIGHT, LARGE = 0.1, 0.25  # the customary limits of the population stability index
LEVEL = 0.999  # the share of windows of unchanged messages in which a figure stays below its limit
LENGTH_BINS = 10
DRAWS = 5000  # simulated windows behind a limit of the population stability index
PERMUTATIONS = 1000  # behind a limit of the discrepancy of vectors
FEWEST = 20  # confidences, before they are compared
NEW_PRODUCT = DATA_FOLDER / "new_product.jsonl"


class DriftError(CourseError):
    """Messages or counts that cannot be compared."""


@dataclass(frozen=True)
class Drift:
    """One look at the latest messages."""

    kind: str  # "labels", "lengths", "confidence" or "words"
    statistic: float  # 0: like the reference
    limit: float
    messages: int  # looked at

    @property
    def ratio(self) -> float:
        """The statistic over its limit: comparable between kinds."""
        return self.statistic / self.limit

    @property
    def drifted(self) -> bool:
        return self.statistic > self.limit

    def __str__(self):
        verdict = "drift" if self.drifted else "no drift"
        return f"{self.kind}: {self.statistic:.3f} over {self.messages} messages, limit {self.limit:.3f}: {verdict}"


def population_stability(expected: Mapping[str, int], observed: Mapping[str, int]) -> float:
    """The population stability index, PSI: the sum over all categories of (q - p) ln(q / p), p the shares expected, q observed.

    0 is no change. Credit scoring customarily calls 0.1 a slight and 0.25 a large one, whatever the number of messages;
    `stability_limit` says what chance alone makes of it. Half a message is added to every category, so that none is empty.
    Example: expected={"a": 50, "b": 50}, observed={"a": 80, "b": 20} -> 0.406
    Raises DriftError where one side counts nothing.
    Source: Siddiqi, "Credit Risk Scorecards", 2006, chapter 8; it is Jeffreys' divergence between p and q.
    """
    names = sorted({*expected, *observed})
    if not sum(expected.values()) or not sum(observed.values()):
        raise DriftError(
            f"There are {sum(expected.values())} messages expected and {sum(observed.values())} observed: expected some of "
            "both; collect messages first."
        )
    return float(_stability(*([[counts.get(name, 0) for name in names]] for counts in (expected, observed)))[0])


def stability_limit(expected: Mapping[str, int], messages: int, *, level: float = LEVEL, seed: int = 0) -> float:
    """What the index of so many unchanged messages stays below in a share `level` of cases, or LARGE, where that is more.

    Found by drawing both sides anew 5,000 times from the expected shares. The approximation by chi-square, (1/n + 1/m) times
    its quantile with one degree of freedom less than there are categories, comes close only where no category is rare.
    Example: 26 even categories, 516 messages expected and 200 observed -> 0.36; 1,000 observed -> 0.25, chance says 0.15
    Source: Yurdakul, "Statistical Properties of Population Stability Index", 2018,
    https://scholarworks.wmich.edu/dissertations/3208; du Pisanie et al., 2023, https://arxiv.org/abs/2303.01227
    """
    return max(LARGE, _chance(tuple(expected[name] for name in sorted(expected)), messages, level, seed))


def messages_needed(expected_count: int, categories: int, *, limit: float = LARGE, level: float = LEVEL) -> float:
    """From how many messages on chance stays below a limit of the population stability index; infinite for never.

    By the chi-square approximation, see `stability_limit`: with few expected messages no window is large enough.
    Example: expected_count=516, categories=26 -> 356; expected_count=200 -> inf
    """
    from scipy.stats import chi2

    room = limit / float(chi2.ppf(level, categories - 1)) - 1 / expected_count
    return math.ceil(1 / room) if room > 0 else math.inf


def length_edges(lengths: Sequence[int], *, bins: int = LENGTH_BINS) -> list[float]:
    """The inner edges of bins that hold about as many of the lengths each. Example: 1 to 100, bins=4 -> [25.75, 50.5, 75.25]"""
    import numpy as np

    return np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1])).tolist()


def count_lengths(lengths: Sequence[int], edges: Sequence[float]) -> dict[str, int]:
    """How many lengths fall into each bin. Example: [10, 20, 90], [15, 50] -> {"0": 1, "1": 1, "2": 1}"""
    import numpy as np

    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges) + 1)
    return {str(number): int(count) for number, count in enumerate(counts)}


def confidence_drift(reference: Sequence[float], latest: Sequence[float], *, level: float = LEVEL) -> Drift:
    """The Kolmogorov-Smirnov distance of two samples of confidences, 0 to 1: the largest gap between their distributions.

    Example: reference=[0.9] * 50, latest=[0.9] * 25 + [0.2] * 25 -> statistic 0.5, limit 0.39
    Source of the limit: https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.kstwobign.html
    """
    from scipy.stats import ks_2samp, kstwobign

    n, m = len(reference), len(latest)
    if min(n, m) < FEWEST:
        raise DriftError(f"There are {n} and {m} confidences: expected at least {FEWEST} of each; measure more replies.")
    limit = float(kstwobign.isf(1 - level)) * math.sqrt((n + m) / (n * m))
    return Drift("confidence", float(ks_2samp(reference, latest, method="asymp").statistic), limit, m)


def embedding_drift(reference, latest, *, level: float = LEVEL, seed: int = 0) -> Drift:
    """The squared maximum mean discrepancy of two sets of vectors, shapes (messages, size): how unlike they are on the whole.

    0 on average where nothing changed. The kernel is Gaussian, its width the median distance; the limit comes from 1,000
    random exchanges of messages between the two sets, which makes it right for any vectors.
    Source: Gretton et al., "A kernel two-sample test", 2012, https://jmlr.org/papers/v13/gretton12a.html
    """
    import numpy as np
    from sklearn.metrics.pairwise import euclidean_distances

    n, m = len(reference), len(latest)
    if min(n, m) < FEWEST:
        raise DriftError(f"There are {n} and {m} vectors: expected at least {FEWEST} of each; wait for more messages.")
    squares = euclidean_distances(np.vstack([reference, latest]).astype(np.float32), squared=True)
    kernel = np.exp(-squares / (np.median(squares) or 1.0))
    np.fill_diagonal(kernel, 0)
    inside = np.zeros((PERMUTATIONS + 1, n + m), np.float32)
    inside[:, n:] = 1  # the first row is how it really is
    inside[1:] = np.random.default_rng(seed).permuted(inside[1:], axis=1)
    near = inside @ kernel
    both = (near * inside).sum(axis=1, dtype=np.float64)
    across = near.sum(axis=1, dtype=np.float64) - both
    neither = kernel.sum(dtype=np.float64) - both - 2 * across
    found = both / (m * (m - 1)) + neither / (n * (n - 1)) - 2 * across / (n * m)
    return Drift("words", float(found[0]), float(np.quantile(found[1:], level)), m)


def word_vectors(texts: Sequence[str]):
    """Unit vectors of the words in messages, shape (messages, 2048), without a model: words are hashed to places.

    Common English words say little about the subject and are left out. A model's hidden states may take their place.
    """
    return _hasher().transform(texts).toarray()


@dataclass(frozen=True)
class Reference:
    """What messages were like when the model was judged. Without confidences or vectors these are not compared.

    They must not be messages that the model learned from: it is surer of those, and any others then look like drift.
    """

    labels: Mapping[str, int]  # by predicted label, all of the task's and INVALID
    lengths: tuple[int, ...]  # in characters
    confidences: tuple[float, ...] = ()  # 0 to 1
    vectors: "numpy.ndarray | None" = None  # noqa: F821 - shape (messages, size)


def make_reference(
    task: Task, outcomes: Sequence[Outcome], *, confidences: Sequence[float] = (), embed: Callable | None = word_vectors
) -> Reference:
    """The reference from what the same model answered to messages of the time, such as the test split.

    Raises DriftError without outcomes.
    """
    if not outcomes:
        raise DriftError("There are no outcomes to compare with: expected the answers to some hundred messages; ask the model.")
    field = task.label_field
    found = Counter(dict.fromkeys((*task.fields[field], INVALID), 0))
    found.update(outcome.answer[field] if outcome.answer else INVALID for outcome in outcomes)
    vectors = embed([outcome.text for outcome in outcomes]) if embed else None
    return Reference(dict(found), tuple(len(outcome.text) for outcome in outcomes), tuple(confidences), vectors)


class DriftMonitor:
    """Compares the latest `window` messages with a reference, once there are so many.

    It keeps lengths, labels, confidences and vectors, and no message. `metrics` ask for its figures when they are read, so
    that no request waits for the arithmetic; a later monitor on the same metrics takes the place of this one.
    Example:
        monitor = DriftMonitor(make_reference(task, outcomes), window=200, metrics=metrics)
        served = MonitoredChatModel(model, task, metrics, watch=monitor.add)
    """

    def __init__(
        self, reference: Reference, *, window: int = 200, metrics: Metrics | None = None,
        embed: Callable | None = word_vectors, level: float = LEVEL, seed: int = 0,
    ):  # fmt: skip
        if window < FEWEST:
            raise DriftError(f"The window is {window} messages: expected at least {FEWEST}; see messages_needed.")
        self.reference, self.window = reference, window
        self._embed, self._level, self._seed = embed, level, seed
        self._edges = length_edges(reference.lengths)
        self._kept = {name: deque(maxlen=window) for name in ("labels", "lengths", "confidences", "vectors")}
        self._count, self._checked, self._lock = 0, (0, []), threading.Lock()
        if metrics:
            metrics.read_drift_from(self.check)

    def add(self, text: str, label: str, confidence: float | None = None) -> None:
        """Take note of a message and the label that the model gave it, INVALID for none."""
        vector = self._embed([text])[0] if self._embed and self.reference.vectors is not None else None
        with self._lock:
            self._count += 1
            self._kept["labels"].append(label)
            self._kept["lengths"].append(len(text))
            if confidence is not None:
                self._kept["confidences"].append(confidence)
            if vector is not None:
                self._kept["vectors"].append(vector)

    def check(self) -> list[Drift]:
        """What the window shows now: one look for each kind that is measured; none until the window is full."""
        with self._lock:
            count, (checked, found) = self._count, self._checked
            kept = {name: list(values) for name, values in self._kept.items()}
        if count < self.window or checked == count:
            return found
        reference = self.reference
        lengths = (count_lengths(lengths, self._edges) for lengths in (reference.lengths, kept["lengths"]))
        found = [self._stability("labels", reference.labels, Counter(kept["labels"])), self._stability("lengths", *lengths)]
        if min(len(reference.confidences), len(kept["confidences"])) >= FEWEST:
            found.append(confidence_drift(reference.confidences, kept["confidences"], level=self._level))
        if len(kept["vectors"]) >= FEWEST:
            found.append(embedding_drift(reference.vectors, kept["vectors"], level=self._level, seed=self._seed))
        with self._lock:
            self._checked = (count, found)
        return found

    def _stability(self, kind: str, expected: Mapping[str, int], observed: Mapping[str, int]) -> Drift:
        limit = stability_limit(expected, self.window, level=self._level, seed=self._seed)
        return Drift(kind, population_stability(expected, observed), limit, self.window)


def load_new_product(task: Task) -> dict[str, tuple[Example, ...]]:
    """Messages about a product that the bundled desk did not have, a ring to pay with: 30 to train on and 30 to test.

    See `data/new_product.md`. Raises TaskError for a task whose schema does not fit their answers.
    """
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for line in NEW_PRODUCT.read_text("utf-8").splitlines():
        row = json.loads(line)
        reason = answer_problem(row["answer"], task.fields)
        if reason:
            raise TaskError(f"{row['id']} does not fit the task {task.name} ({reason}): expected the bundled desk's schema.")
        splits[row["split"]].append(Example(row["id"], row["text"], row["answer"]))
    return {split: tuple(examples) for split, examples in splits.items()}


@functools.cache
def _hasher():
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=2048, alternate_sign=False, stop_words="english", dtype="float32")


@functools.lru_cache(maxsize=64)  # a sliding window asks for the same limit again and again
def _chance(counts: tuple[int, ...], messages: int, level: float, seed: int) -> float:
    import numpy as np

    rng, shares = np.random.default_rng(seed), np.array(counts) + 0.5
    sides = (rng.multinomial(count, shares / shares.sum(), DRAWS) for count in (sum(counts), messages))
    return float(np.quantile(_stability(*sides), level))


def _stability(expected, observed):
    """The index of each row of counts, shape (rows, categories)."""
    import numpy as np

    p, q = (np.asarray(counts) + 0.5 for counts in (expected, observed))
    p, q = (shares / shares.sum(axis=1, keepdims=True) for shares in (p, q))
    return ((q - p) * np.log(q / p)).sum(axis=1)
