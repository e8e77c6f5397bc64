"""Is this data fit to train and to judge a model? A report that names the rows to look at, and splits that do not leak."""

import math
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from slmops_course.errors import CourseError
from slmops_course.language import _, marked
from slmops_course.tasks import MAX_MESSAGE_CHARS, Example, Task
from slmops_course.teachers import shingles

PLACES = ("train", "unlabelled", "dev", "test")  # splits that are learned from, then those that are judged on
JUDGED = ("dev", "test")
SEVERITIES = (marked("stop"), marked("look"), marked("fine"))
NEAR = 0.6  # the share of shingles from which two messages count as near duplicates
# Above this share of a split's rows a finding is not "look" but "stop"; 0: one row is too many.
STOP_ABOVE = {"rejected": 0.05, "empty": 0.0, "length": 0.05, "script": 0.1, "duplicates": 0.1, "leakage": 0.05}
LONG_TIMES = 4  # a message this many times as long as the 95th percentile of the training split is worth a look
FEWEST_ROWS = 5  # of a value in a split
RAREST_SHARE = 0.1  # of a value's rows among those of the commonest
FEWEST_MESSAGES = {"train": 1, "unlabelled": 0, "dev": 97, "test": 97}  # 97: 1.96 standard errors of a half are 10 points
MOST_FOLDS = 20
_FILES = {"all files": PLACES, "train.csv": ("train", "unlabelled", "dev")}  # that hold more than one split


class SplitError(CourseError):
    """Examples that cannot be split as asked."""


@dataclass(frozen=True)
class Twin:
    """A message that nearly repeats another: `other` is in the split learned from, or earlier in the same split."""

    id: str
    other: str
    share: float  # of the shingles of both among those of either
    exact: bool  # the same but for case and white space
    contradicts: bool  # both are labelled, and not alike


@dataclass(frozen=True)
class Finding:
    """What one check found in one place. The sentence says what was found, what was expected, and what to do."""

    check: str  # rejected, size, empty, length, script, duplicates, leakage, contradictions, missing or rare
    where: str  # "train", "train -> test", "intent in train" or a file
    severity: str  # one of SEVERITIES
    sentence: str
    ids: tuple[str, ...] = ()  # the rows or values meant; of rejected rows, where and why
    twins: tuple[Twin, ...] = ()


@dataclass(frozen=True)
class SplitFacts:
    """What is in a split. Lengths are the 50th, 95th and 100th percentile."""

    split: str
    messages: int
    chars: tuple[int, int, int]
    tokens: tuple[int, int, int] | None  # None without a tokenizer
    scripts: Mapping[str, float]  # the share of letters of each writing system, commonest first
    labels: Mapping[str, Mapping[str, int]]  # rows of each value of each field, commonest first, 0 for what never occurs


@dataclass(frozen=True)
class Report:
    """All that `validate_task` found, worst first: `text()` for readers, the rest for programs."""

    task: str
    splits: tuple[SplitFacts, ...]
    findings: tuple[Finding, ...]

    def of(self, severity: str) -> tuple[Finding, ...]:
        """The findings of one severity: "stop", "look" or "fine"."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def text(self) -> str:
        """The report as aligned plain text, the same every time. Of what is fine, only the check and the place."""
        head = f"{self.task}: " + ", ".join(f"{len(self.of(severity))} {_(severity)}" for severity in SEVERITIES)
        lines = [head, "", *_aligned(_split_cells(self.splits)), "", *_aligned(_label_cells(self.splits)), ""]
        worse = (*self.of("stop"), *self.of("look"))
        told = [f"{_(one.severity)}  {one.check}, {one.where}: {one.sentence}{_first_rows(one)}" for one in worse]
        fine = defaultdict(list)
        for finding in self.of("fine"):
            fine[finding.check].append(finding.where)
        told += [f"{_('fine')}  {check}: {', '.join(places)}" for check, places in fine.items()]
        return "\n".join(lines + [textwrap.fill(one, 120, subsequent_indent=" " * 6, break_on_hyphens=False) for one in told])


def validate_task(task: Task, tokenizer=None) -> Report:
    """Check a task's splits: rejected rows, sizes, lengths, scripts, duplicates, leakage, contradictions and labels.

    With a Hugging Face tokenizer, lengths are counted in tokens too, those of the message alone. Nothing is changed and
    nothing raised: findings say what to do. Scripts tell writing systems apart, not languages: Hindi from English, but
    neither Hindi from Marathi, nor Hindi in Latin letters from English.

    Example: validate_task(load_task()).of("stop") -> ()
    """
    facts = {split: _facts(task, split, tokenizer) for split in PLACES}
    findings = [*_rejected(task), *map(_size, facts.values()), *_messages(task, usual_chars=facts["train"].chars[1])]
    findings += [*_twin_findings(task), *(finding for fact in facts.values() for finding in _labels(fact))]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(task.name, tuple(facts.values()), tuple(findings))


def similar_pairs(texts: Sequence[str], *, threshold: float = NEAR) -> list[tuple[int, int, float]]:
    """Positions `(i, j, share)`, i < j, of texts that share at least `threshold` of their shingles.

    The pairs of `teachers.near_duplicates`, by products of sparse matrices: 13,000 messages take two seconds. Texts
    without letters and digits, such as "🙂", are alike where they are equal.
    """
    import numpy as np
    from sklearn.preprocessing import MultiLabelBinarizer

    if len(texts) < 2:
        return []
    sets = [(shingles(text) - {""}) or {_plain(text)} for text in texts]
    grams = MultiLabelBinarizer(sparse_output=True).fit_transform(sets).astype("int32").tocsr()
    sizes, pairs = np.array([len(one) for one in sets]), []
    for start in range(0, len(texts), 256):  # rows at a time, so that memory stays small
        shared = (grams[start : start + 256] @ grams[start:].T).tocoo()
        i, j = shared.row + start, shared.col + start
        share = shared.data / (sizes[i] + sizes[j] - shared.data)
        kept = (i < j) & (share >= threshold)
        pairs += zip(i[kept].tolist(), j[kept].tolist(), share[kept].tolist(), strict=True)
    return sorted(pairs)


def split_examples(
    examples: Sequence[Example], *, shares: Mapping[str, float], label_field: str, seed: int
) -> dict[str, tuple[Example, ...]]:
    """Split labelled examples by shares that add up to 1: labels as common in each, near duplicates never apart.

    Example: shares={"train": 0.8, "dev": 0.1, "test": 0.1} makes ten folds, of which dev gets one. Folds are made of whole
    groups of near duplicates, so sizes are near the shares. Same seed, same splits; rows keep their order.
    Raises SplitError for shares that up to 20 folds cannot make, and for a label with fewer groups than folds.
    Source: https://scikit-learn.org/stable/modules/cross_validation.html#stratifiedgroupkfold
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = _folds_each(shares)
    groups = _groups([example.text for example in examples])
    labels = _labels_of(examples, label_field, groups, fewest=sum(folds.values()))
    splitter = StratifiedGroupKFold(sum(folds.values()), shuffle=True, random_state=seed)
    parts = iter([held_out.tolist() for _, held_out in splitter.split(labels, labels, groups)])
    rows = {name: sorted(row for _ in range(count) for row in next(parts)) for name, count in folds.items()}
    return {name: tuple(examples[row] for row in chosen) for name, chosen in rows.items()}


def _folds_each(shares: Mapping[str, float]) -> dict[str, int]:
    parts = {name: Fraction(share).limit_denominator(MOST_FOLDS) for name, share in shares.items() if math.isfinite(share)}
    total = math.lcm(*(part.denominator for part in parts.values()))
    exact = all(part > 0 and abs(part - shares[name]) < 0.001 for name, part in parts.items())
    if len(shares) < 2 or len(parts) < len(shares) or sum(parts.values()) != 1 or total > MOST_FOLDS or not exact:
        raise SplitError(
            f"The shares are {dict(shares)}: expected two or more that add up to 1 and are made of at most {MOST_FOLDS} like "
            "folds; try train 0.8, dev 0.1 and test 0.1."
        )
    return {name: int(part * total) for name, part in parts.items()}


def _labels_of(examples: Sequence[Example], field: str, groups: Sequence[int], *, fewest: int) -> list[str]:
    bare = [example.id for example in examples if field not in (example.answer or {})]
    if bare or not examples:
        what = f"The example {bare[0]!r} has no {field}" if bare else "There are no examples"
        raise SplitError(f"{what}: expected labelled messages; label them first, or choose another label_field.")
    labels = [example.answer[field] for example in examples]
    counts = Counter(label for label, _ in {*zip(labels, groups, strict=True)})
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < fewest:
        raise SplitError(
            f"The label {label!r} has {count} messages that are not near duplicates: expected at least {fewest}, one a fold; "
            "write more, merge it with another label, or ask for larger shares."
        )
    return labels


def _groups(texts: Sequence[str]) -> list[int]:
    """The number of each text's group; near duplicates of near duplicates are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = similar_pairs(texts)
    ends = ([i for i, _, _ in pairs], [j for _, j, _ in pairs])
    return connected_components(coo_array(([1] * len(pairs), ends), shape=(len(texts),) * 2))[1].tolist() if texts else []


def evenness(counts: Iterable[int]) -> float:
    """The entropy of values over that of values which are all as common: 1 where they are, 0 where only one occurs.

    Example: [50, 50] -> 1.0; [90, 10] -> 0.469; [100, 0] -> 0.0. A single value, or no rows, give 1.0.
    Source: Pielou, "The measurement of diversity in different types of biological collections", 1966.
    """
    from scipy.stats import entropy

    counts = list(counts)
    return float(entropy(counts)) / math.log(len(counts)) if len(counts) > 1 and any(counts) else 1.0


@cache
def script_of(letter: str) -> str:
    """The writing system of a letter, by the first word of its Unicode name. Example: "क" -> "DEVANAGARI"."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def _facts(task: Task, split: str, tokenizer) -> SplitFacts:
    examples = task.splits[split]
    texts = [example.text for example in examples]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if tokenizer and texts else []
    letters = Counter(script_of(c) for text in texts for c in text if c.isalpha())
    scripts = {script: count / letters.total() for script, count in _ranked(letters.items())}
    labels = {}
    for field, values in task.fields.items() if split != "unlabelled" else ():
        found = Counter(example.answer[field] for example in examples if example.answer)
        labels[field] = dict(_ranked((value, found[value]) for value in values))
    return SplitFacts(split, len(texts), _percentiles(texts), _percentiles(ids) if tokenizer else None, scripts, labels)


def _percentiles(items: Sequence) -> tuple[int, int, int]:
    import numpy as np

    return tuple(np.percentile([len(one) for one in items] or [0], [50, 95, 100], method="higher").tolist())


def _ranked(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda item: (-item[1], item[0]))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _finding(check, where, found, total, what, expected, advice, *, stop_above=None, ids=(), twins=()) -> Finding:
    """A finding of `found` things among `total`: fine where there are none, else worth a look, or too many."""
    limit = STOP_ABOVE[check] if stop_above is None else stop_above
    severity = "fine" if not found else "stop" if found > limit * total else "look"
    do = advice if found else "nothing to do"
    return Finding(check, where, severity, f"{found:,} of {total:,} {what}: expected {expected}; {do}.", tuple(ids), twins)


def _rejected(task: Task) -> Iterable[Finding]:
    files = defaultdict(list)
    for row in task.rejected:
        files[row.where.split(" line ")[0]].append(f"{row.where}: {row.reason}")
    for file, rows in sorted(files.items()) or [("all files", [])]:
        splits = _FILES.get(file, (file.split(".")[0],))
        total = len(rows) + sum(len(task.splits.get(split, ())) for split in splits)
        yield _finding("rejected", file, len(rows), total, "rows were rejected", "none", "mend or delete them", ids=rows)


def _size(fact: SplitFacts) -> Finding:
    fewest = FEWEST_MESSAGES[fact.split]
    severity = "fine" if fact.messages >= fewest else "look" if fact.messages else "stop"
    why = ", which tell a score of 50 % to ±10 points" if fact.split in JUDGED else ""
    do = "nothing to do" if severity == "fine" else "add messages"
    return Finding("size", fact.split, severity, f"{fact.messages:,} messages: expected {fewest} or more{why}; {do}.")


def _messages(task: Task, *, usual_chars: int) -> Iterable[Finding]:
    longest = min(MAX_MESSAGE_CHARS, LONG_TIMES * usual_chars or MAX_MESSAGE_CHARS)
    known = " or ".join(sorted(script.title() for script in task.scripts))
    checks = {
        "empty": (_is_empty, "messages show nothing", "words in each", "take them out"),
        "length": (
            lambda text: len(text) > longest, f"messages have over {longest:,} characters", "shorter ones",
            "read them; shorten, split or drop them",
        ),
        "script": (
            lambda text: bool(task.scripts) and _main_script(text) not in {None, *task.scripts},
            "messages are mostly in a script that is rare in train", known, "translate them, or train on more like them",
        ),
    }  # fmt: skip
    for check, (is_wrong, *words) in checks.items():
        for split in PLACES:
            examples = task.splits[split]
            ids = [example.id for example in examples if is_wrong(example.text)]
            yield _finding(check, split, len(ids), len(examples), *words, ids=ids)


def _is_empty(text: str) -> bool:
    return all(unicodedata.category(c)[0] in "CZ" for c in text)


def _main_script(text: str) -> str | None:
    """The script of more than half of a text's letters; None where there is none."""
    letters = Counter(script_of(c) for c in text if c.isalpha())
    return next((script for script, count in letters.items() if 2 * count > letters.total()), None)


def _twin_findings(task: Task) -> Iterable[Finding]:
    places = _twins(task)
    for number, later in enumerate(PLACES):
        for earlier in PLACES[: number + 1]:
            place, total = (earlier, later), len(task.splits[later])
            yield _copies(*place, _likest(places[place]), total)
            if "unlabelled" not in place:
                yield _contradictions(*place, _likest(twin for twin in places[place] if twin.contradicts), total)


def _twins(task: Task) -> dict[tuple[str, str], list[Twin]]:
    rows = [(split, example) for split in PLACES for example in task.splits[split]]
    places = defaultdict(list)
    for i, j, share in similar_pairs([example.text for place, example in rows]):
        (earlier, first), (later, second) = rows[i], rows[j]
        contradicts = bool(first.answer and second.answer) and dict(first.answer) != dict(second.answer)
        twin = Twin(second.id, first.id, share, _plain(first.text) == _plain(second.text), contradicts)
        places[earlier, later].append(twin)
    return places


def _likest(twins: Iterable[Twin]) -> tuple[Twin, ...]:
    """Each message with the one it is most like, the first of several; the most alike first."""
    best = {}
    for twin in sorted(twins, key=lambda twin: (-twin.share, not twin.exact)):
        best.setdefault(twin.id, twin)
    return tuple(best.values())


def _copies(earlier: str, later: str, twins: tuple[Twin, ...], total: int) -> Finding:
    """Duplicates where both places are one split, else leakage; what the teacher labels for nothing is no reason to stop."""
    exact = sum(twin.exact for twin in twins)
    words = f"messages nearly repeat {'an earlier one' if earlier == later else 'one of ' + earlier}, {exact} of them exactly"
    if earlier == later:
        harm, advice = "none, since a repeated message counts twice", "keep one of each"
        return _finding("duplicates", later, len(twins), total, words, harm, advice, twins=twins)
    if later in JUDGED:
        harm, advice = "none, since what was seen before tests memory", f"take their likes out of {earlier}"
    else:
        harm, advice = "none, since they are labelled already", f"take them out of {later}"
    stop_above = 1 if later not in JUDGED else 0 if exact else None
    place = f"{earlier} -> {later}"
    return _finding("leakage", place, len(twins), total, words, harm, advice, stop_above=stop_above, twins=twins)


def _contradictions(earlier: str, later: str, twins: tuple[Twin, ...], total: int) -> Finding:
    exact = sum(twin.exact for twin in twins)
    words = f"messages are answered unlike one that they nearly repeat, {exact} of them exactly"
    return _finding(
        "contradictions", later if earlier == later else f"{earlier} -> {later}", len(twins), total, words,
        "one answer to one message", "read both and mend the wrong one", stop_above=0 if exact else 1, twins=twins,
    )  # fmt: skip


def _labels(fact: SplitFacts) -> Iterable[Finding]:
    for field, counts in fact.labels.items():
        missing = [value for value, count in counts.items() if not count]
        fewest = max(FEWEST_ROWS, math.ceil(RAREST_SHARE * max(counts.values())))
        rare = [value for value, count in counts.items() if 0 < count < fewest]
        where, known = f"{field} in {fact.split}", "learned" if fact.split == "train" else "measured"
        yield _finding(
            "missing", where, len(missing), len(counts), "values never occur", "all of the schema's",
            f"add messages: what is not there is not {known}", stop_above=0 if fact.split == "train" else 1, ids=missing,
        )  # fmt: skip
        yield _finding(
            "rare", where, len(rare), len(counts), f"values have fewer than {fewest} rows", f"{fewest} or more",
            "add messages, or do not trust their scores", stop_above=1, ids=rare,
        )  # fmt: skip


def _first_rows(finding: Finding, most: int = 3) -> str:
    named = [*finding.ids, *(f"{twin.id} ~ {twin.other} ({twin.share:.2f})" for twin in finding.twins)]
    return f" Such as {', '.join(named[:most])}." if named else ""


def _split_cells(splits: Sequence[SplitFacts]) -> Iterable[list[str]]:
    yield [_("split"), _("messages"), _("characters 50/95/100 %"), _("tokens 50/95/100 %"), _("scripts (share of letters)")]
    for fact in splits:
        lengths = ["/".join(map(str, three)) if three else "-" for three in (fact.chars, fact.tokens)]
        scripts = ", ".join(f"{script.title()} {share:.1%}" for script, share in fact.scripts.items())
        yield [fact.split, f"{fact.messages:,}", *lengths, scripts or "-"]


def _label_cells(splits: Sequence[SplitFacts]) -> Iterable[list[str]]:
    yield [_("field"), _("split"), _("values"), _("commonest"), _("rarest"), _("evenness")]
    for fact in splits:
        for field, counts in fact.labels.items():
            seen = [f"{value} {count:,}" for value, count in counts.items() if count]
            ends = [seen[0], seen[-1]] if seen else ["-", "-"]
            yield [field, fact.split, f"{len(seen)}/{len(counts)}", *ends, f"{evenness(counts.values()):.2f}"]


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
