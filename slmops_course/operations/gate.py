"""The release gate: a candidate is released only if every line of its report passes.

The gate runs no model. It judges plain values that were measured before: what the candidate and the current version made
of the same messages, and the candidate's latency, memory and size on the device that the limits speak of.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.evaluation import Outcome, mean_score, paired_difference
from slmops_course.tasks import Example, Task, read_rows

MUST_PASS = "must_pass.jsonl"  # in the task's folder
NAMED_MESSAGES = 3  # of those that failed; the others are counted


class GateError(CourseError):
    """Something that the gate cannot judge."""


@dataclass(frozen=True)
class Limits:
    """What a release has to keep. None asks nothing of that measurement.

    Two equally good models that differ on one message in ten, judged on 25 intents of 20 messages each, lose more than 3
    of 20 somewhere in 17 % of cases, more than 4 of 20 in 3 %: a narrower `max_slice_drop` refuses good releases.
    """

    max_score_drop: float = 0.05  # exact match; the margin of non-inferiority, see `check_release`
    max_slice_drop: float = 0.2  # exact match within one label, as a share of that label's messages
    min_score: float = 0.0  # exact match, whatever the current version scores
    min_json_valid: float = 0.98  # share of replies that are an answer of the schema
    min_messages: int = 100  # fewer prove nothing: an error never seen in n messages may be as frequent as 3 / n
    min_must_pass: int = 1  # messages that must be judged, all of which must be answered exactly
    max_latency_s: float | None = None  # one message, from call to last token
    latency_percentile: int = 50  # 50 is the median, as benchmark.Speed gives it; 95 needs a hundred messages or so
    max_memory_bytes: int | None = None  # the model's own peak
    max_size_bytes: int | None = None  # of its files
    device: str = "any device"  # where latency and memory were measured, or what stood in for it

    def __post_init__(self):
        shares = ("max_score_drop", "max_slice_drop", "min_score", "min_json_valid")
        wrong = [name for name in shares if not 0 <= getattr(self, name) <= 1]
        if wrong:
            raise GateError(f"{wrong[0]} is {getattr(self, wrong[0])}: expected a share between 0 and 1, such as 0.05.")


# The memory limit is half of the device's, as in sizing.fits: the rest is for everything else on it.
DEVICES = {
    "laptop": Limits(max_latency_s=1.0, max_memory_bytes=4_000_000_000, max_size_bytes=2_000_000_000, device="laptop, 8 GB"),
    "phone": Limits(max_latency_s=2.0, max_memory_bytes=2_000_000_000, max_size_bytes=500_000_000, device="phone, 4 GB"),
    "board": Limits(max_latency_s=4.0, max_memory_bytes=500_000_000, max_size_bytes=250_000_000, device="board, 1 GB"),
}


@dataclass(frozen=True)
class Evidence:
    """What was measured of one version."""

    name: str  # for the report, such as "support-desk 3"
    outcomes: Sequence[Outcome]  # of the test messages
    must_pass: Sequence[Outcome] = ()  # of the must-pass messages
    latency_s: float | None = None  # one message, from call to last token, at `latency_percentile`
    latency_percentile: int = 50
    memory_bytes: int | None = None
    size_bytes: int | None = None
    model_digest: str | None = None  # bundles.bundle_digest of the files that answered: ties the report to them


@dataclass(frozen=True)
class Check:
    """One line of a report."""

    name: str
    found: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class GateReport:
    """What the gate found, line by line. `str(report)` is a Markdown table."""

    candidate: str
    current: str | None  # None: a first release, judged on the absolute lines only
    task: str
    device: str
    messages: int
    model_digest: str | None
    current_digest: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every line passed. A report without lines has not."""
        return bool(self.checks) and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The lines that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self):
        names = ", ".join(check.name for check in self.failures) or "there is no line"
        against = f"compared with {self.current}" if self.current else (
            "a first release: there is no current version to compare with, so only absolute lines are judged"
        )  # fmt: skip
        lines = [
            f"{'PASSED' if self.passed else 'REFUSED (' + names + ')'}: {self.candidate} on {self.task}, {against}; "
            f"{self.messages} messages; {self.device}.",
            "",
            "| check | found | expected | |",
            "|---|---|---|---|",
        ]
        for check in self.checks:
            cells = (_cell(text) for text in (check.name, check.found, check.expected, "ok" if check.passed else "FAILED"))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "GateReport":
        """The reverse of `to_json`. Raises GateError for a text that is no report."""
        try:
            values = json.loads(text)
            checks = tuple(Check(**check) for check in values.pop("checks"))
            if any(not isinstance(check.passed, bool) for check in checks):
                raise TypeError("passed is neither true nor false")
            return cls(**values, checks=checks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GateError(f"This is no gate report ({error}): expected one that check_release wrote; judge again.") from None


def check_release(
    task: Task, candidate: Evidence, *, current: Evidence | None = None, limits: Limits | None = None, seed: int = 0
) -> GateReport:
    """Judge a candidate, against the current version where there is one.

    The score is a test of non-inferiority: the candidate passes when the low end of the 95 % interval of its paired
    difference to the current version lies above -max_score_drop. So a candidate that was scored on few messages is
    refused because too little is known, not let through because nothing bad is proven.
    Source: Piaggio et al., CONSORT 2010 extension for noninferiority trials, https://doi.org/10.1001/jama.2012.87802
    An interval cannot show an error that no message provoked, hence `min_messages`.
    Source: Hanley, Lippman-Hand, "If nothing goes wrong, is everything all right?", https://doi.org/10.1001/jama.1983.03330370053031
    A label has some 20 messages, so a slice is judged by the plain difference and a wide margin.

    Example: `check_release(task, Evidence("desk 2", new), current=Evidence("desk 1", old), limits=DEVICES["phone"]).passed`

    Raises GateError when there is nothing to judge, when the two were scored on different messages, and when a
    measurement is missing that the limits ask for.
    """
    limits = limits or Limits()
    _refuse_missing(candidate, limits)
    outcomes = candidate.outcomes
    checks = [
        Check("messages", str(len(outcomes)), f"at least {limits.min_messages}", len(outcomes) >= limits.min_messages),
        _check_share("exact match", [o.answer == o.expected for o in outcomes], limits.min_score, seed),
        _check_share("JSON validity", [o.answer is not None for o in outcomes], limits.min_json_valid, seed),
    ]
    if current is not None:
        checks += [_check_score(candidate, current, limits, seed), _check_slices(task, candidate, current, limits)]
    if candidate.must_pass:
        checks.append(_check_must_pass(candidate.must_pass))
    percentile = "median" if limits.latency_percentile == 50 else f"{limits.latency_percentile}th percentile"
    for name, found, limit, form in (
        (f"latency, {percentile}", candidate.latency_s, limits.max_latency_s, "{:.3f} s"),
        ("memory", candidate.memory_bytes, limits.max_memory_bytes, "{:,} bytes"),
        ("size of files", candidate.size_bytes, limits.max_size_bytes, "{:,} bytes"),
    ):
        if limit is not None:
            checks.append(Check(name, form.format(found), f"at most {form.format(limit)}", bool(found <= limit)))
    return GateReport(
        candidate.name, current and current.name, task.name, limits.device, len(outcomes), candidate.model_digest,
        current and current.model_digest, tuple(checks),
    )  # fmt: skip


def must_pass_messages(task: Task) -> tuple[Example, ...]:
    """A task's must-pass messages: those of `must_pass.jsonl` in its folder. A task without that file lends the first dev
    message of each of its first five labels.

    Raises GateError for a file that is empty or has a line that cannot be used.
    """
    path = task.folder / MUST_PASS
    if path.is_file():
        return load_must_pass(path, task)
    first = {}
    for example in task.splits["dev"]:
        first.setdefault(example.answer[task.label_field], example)
    return tuple(first.values())[:5]


def load_must_pass(path: Path, task: Task) -> tuple[Example, ...]:
    """The must-pass messages of a JSON-lines file, in the form of a task's splits: an id, a text and its answer.

    Raises GateError when there is none, or when a line cannot be used: a message that is left out cannot fail.
    """
    rows, rejected = read_rows(path, fields=task.fields)
    if rejected:
        raise GateError(f"{rejected[0].where} cannot be used ({rejected[0].reason}): expected text and answer; mend the line.")
    if not rows:
        raise GateError(f"There is no must-pass message in {path}: expected one JSON object a line; write some.")
    return rows


def _refuse_missing(candidate: Evidence, limits: Limits) -> None:
    if not candidate.outcomes:
        raise GateError(f"{candidate.name} has no outcomes to judge: expected its answers to the test messages; score it.")
    if len(candidate.must_pass) < limits.min_must_pass:
        raise GateError(
            f"{candidate.name} was asked {len(candidate.must_pass)} must-pass messages: expected at least "
            f"{limits.min_must_pass}; ask it those of must_pass_messages."
        )
    for name in ("latency_s", "memory_bytes", "size_bytes"):
        limit, found = getattr(limits, f"max_{name}"), getattr(candidate, name)
        if limit is not None and found is None:
            raise GateError(
                f"{candidate.name} has no {name}: expected a measurement, because the limits for {limits.device} ask for at "
                f"most {limit:,}; measure it with benchmark.measure_speed, or judge with limits that do not ask."
            )
    if limits.max_latency_s is not None and candidate.latency_percentile < limits.latency_percentile:
        raise GateError(
            f"{candidate.name}'s latency is the {candidate.latency_percentile}th percentile: expected at least the "
            f"{limits.latency_percentile}th, which the limits speak of; take it from the single latencies."
        )


def _check_share(name: str, hits: Sequence[bool], least: float, seed: int) -> Check:
    score = mean_score(hits, seed=seed)
    return Check(name, str(score), f"at least {least:.1%}", score.value >= least)


def _check_score(candidate: Evidence, current: Evidence, limits: Limits, seed: int) -> Check:
    if [(o.id, o.expected) for o in current.outcomes] != [(o.id, o.expected) for o in candidate.outcomes]:
        raise GateError(
            f"{candidate.name} and {current.name} were scored on {len(candidate.outcomes)} and {len(current.outcomes)} "
            "messages that are not the same or do not expect the same answers: expected one test set; score both again."
        )
    difference = paired_difference(current.outcomes, candidate.outcomes, seed=seed)
    return Check(
        f"exact match against {current.name}",
        f"{_points(difference.value)} [{_points(difference.low)}, {_points(difference.high)}]",
        f"low end of the interval above {_points(-limits.max_score_drop)}",
        difference.low > -limits.max_score_drop,
    )


def _check_slices(task: Task, candidate: Evidence, current: Evidence, limits: Limits) -> Check:
    changes: dict[str, list[int]] = {}
    for old, new in zip(current.outcomes, candidate.outcomes, strict=True):
        change = (new.answer == new.expected) - (old.answer == old.expected)
        changes.setdefault(new.expected[task.label_field], []).append(change)
    drops = sorted((sum(each) / len(each), label, len(each)) for label, each in changes.items())
    fallen = [drop for drop in drops if drop[0] < -limits.max_slice_drop]
    return Check(
        f"each {task.label_field} against {current.name}",
        "; ".join(f"{label} {_points(drop)} of {count} messages" for drop, label, count in fallen or drops[:1]),
        f"none of {len(drops)} drops by more than {_points(limits.max_slice_drop)[1:]}",
        not fallen,
    )


def _check_must_pass(outcomes: Sequence[Outcome]) -> Check:
    wrong = [o for o in outcomes if o.answer != o.expected]
    named = "; ".join(f"{o.text[:60]!r} -> {o.reply[:80]!r}" for o in wrong[:NAMED_MESSAGES])
    more = f" and {len(wrong) - NAMED_MESSAGES} more" if len(wrong) > NAMED_MESSAGES else ""
    found = f"{len(wrong)} of {len(outcomes)} wrong" + (f": {named}{more}" if wrong else "")
    return Check("must-pass messages", found, "every one answered exactly", not wrong)


def _points(share: float) -> str:
    """Percentage points: 0.05 -> "+5.0 points"."""
    return f"{share * 100:+.1f} points"


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table: a model's replies may hold anything."""
    return " ".join(text.split()).replace("|", "&#124;")
