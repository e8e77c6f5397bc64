"""What a task is: messages in, small JSON objects out.

A task is a folder:

    schema.json       JSON Schema of the answer: an object whose properties each have an `enum`; the first is the label
    prompt.txt        the system message
    train.jsonl       rows {"id": …, "text": …, "answer": {…}}; dev.jsonl and test.jsonl likewise
    unlabelled.jsonl  rows {"id": …, "text": …}

The bundled task is the support desk; two small desks lie beside it. A folder with `train.csv` and `test.csv` (columns
text, category), such as Banking77, is turned into a task folder first.
"""

import csv
import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slmops_course.artifacts import Store
from slmops_course.chat import Message
from slmops_course.errors import CourseError

BUNDLED_TASK = "support_desk"
SMALL_DESKS = ("clinic", "repair_shop")  # bundled too: a few hundred messages each, for several adapters on one base
SPLITS = ("train", "dev", "test", "unlabelled")
MAX_MESSAGE_CHARS = 2000
DATA_FOLDER = Path(__file__).parent / "data"


class TaskError(CourseError):
    """A task folder or a message that cannot be used."""


@dataclass(frozen=True)
class Example:
    """One message. `answer` is None where nobody has labelled it."""

    id: str
    text: str
    answer: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Rejected:
    """Something that could not be used, kept with where it was and why."""

    where: str  # "train.jsonl line 7", or a message's id
    reason: str
    content: str


@dataclass(frozen=True)
class Task:
    """A task folder, read. `fields` maps each answer field to its allowed values, in the schema's order."""

    folder: Path
    name: str
    prompt: str
    schema: Mapping
    splits: Mapping[str, tuple[Example, ...]]
    rejected: tuple[Rejected, ...]

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(part["enum"]) for name, part in self.schema["properties"].items()}

    @property
    def label_field(self) -> str:
        """The first field: what the message is about. Macro-F1 and slices are taken over it."""
        return next(iter(self.fields))

    @property
    def out_of_scope_label(self) -> str | None:
        """The label of messages that are not for this desk, where the task has one."""
        return "out_of_scope" if "out_of_scope" in self.fields[self.label_field] else None

    def messages(self, text: str) -> list[Message]:
        """The conversation that asks a tuned model about one message."""
        return [{"role": "system", "content": self.prompt}, {"role": "user", "content": text}]

    def instructed_messages(self, text: str, shots: Iterable[Example] = ()) -> list[Message]:
        """The conversation that asks a model which was never tuned: all allowed values, then examples, if any."""
        allowed = "\n".join(f"{name}: {', '.join(values)}" for name, values in self.fields.items())
        turns = [{"role": "system", "content": f"{self.prompt}\nAllowed values:\n{allowed}"}]
        for shot in shots:
            turns += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": self.target(shot.answer)}]
        return [*turns, {"role": "user", "content": text}]

    def target(self, answer: Mapping[str, str]) -> str:
        """The exact text a model should reply with: compact JSON, fields in the schema's order."""
        return json.dumps({name: answer[name] for name in self.fields}, separators=(",", ":"), ensure_ascii=False)

    def parse(self, reply: str) -> dict[str, str]:
        """The answer in a reply. Raises TaskError, with the reason, unless it is one JSON object of the schema."""
        try:
            answer = json.loads(reply)
        except (ValueError, RecursionError):
            raise TaskError(f"the reply is not JSON: {reply[:80]!r}") from None
        reason = answer_problem(answer, self.fields)
        if reason:
            raise TaskError(reason)
        return answer

    @cached_property
    def scripts(self) -> frozenset[str]:
        """The writing systems of the training messages, such as {"LATIN"}."""
        counts = defaultdict(int)
        for example in self.splits["train"]:
            for script in _scripts(example.text):
                counts[script] += 1
        return frozenset(script for script, count in counts.items() if count >= 0.01 * len(self.splits["train"]))

    def check_message(self, text: str) -> str:
        """Return the message, stripped, or raise TaskError with one sentence that says what is wrong with it."""
        stripped = text.strip()
        control = [c for c in stripped if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t"]
        if all(unicodedata.category(c)[0] in "CZ" for c in stripped):  # nothing, or nothing that can be seen
            raise TaskError("The message is empty: expected some words; write what you want to ask.")
        if len(stripped) > MAX_MESSAGE_CHARS:
            raise TaskError(
                f"The message has {len(stripped):,} characters: expected at most {MAX_MESSAGE_CHARS:,}; shorten it or "
                "send it in parts."
            )
        if control:
            raise TaskError(
                f"The message holds {len(control)} control characters, the first U+{ord(control[0]):04X}: expected "
                "plain text; copy the words again without formatting."
            )
        letters = [c for c in stripped if c.isalpha()]
        foreign = [s for c in letters for s in _scripts(c) if s not in self.scripts]
        if self.scripts and len(foreign) > len(letters) / 2:
            raise TaskError(
                f"The message is written in {foreign[0].title()} script: this task was trained on "
                f"{', '.join(sorted(s.title() for s in self.scripts))}; translate it, or train on messages like it."
            )
        return stripped


def answer_problem(answer, fields: Mapping[str, tuple[str, ...]]) -> str | None:
    """Say why a parsed answer does not fit the schema's fields, or None if it does."""
    if not isinstance(answer, dict):
        return f"the answer is a JSON {type(answer).__name__}, expected an object"
    missing = [name for name in fields if name not in answer]
    extra = [name for name in answer if name not in fields]
    if missing or extra:
        return f"the answer has {'no ' + missing[0] if missing else 'an unknown field ' + repr(extra[0])}"
    for name, allowed in fields.items():
        if answer[name] not in allowed:
            return f"{name} is {str(answer[name])[:60]!r}, which is not one of its {len(allowed)} allowed values"
    return None


def load_task(source: str | Path = BUNDLED_TASK, *, store: Store | None = None) -> Task:
    """Read a bundled task by its name, a task folder, a folder of CSV files, or `hub:OWNER/NAME`.

    Rows that cannot be used are kept in `rejected`, each with its file and line; the good ones are used.
    Raises TaskError when the folder is no task or a split has no usable row.
    """
    folder = DATA_FOLDER / source if str(source) in (BUNDLED_TASK, *SMALL_DESKS) else Path(source)
    rejected: list[Rejected] = []
    if str(source).startswith("hub:"):
        folder = _store(store, source).build(
            "task", settings={"source": str(source)}, write=lambda out: _write_from_hub(str(source)[4:], out),
            code=(write_csv_task,),
        ).path  # fmt: skip
    elif (folder / "train.csv").is_file() and (folder / "test.csv").is_file():
        train, test = (_read_csv(folder / name, rejected) for name in ("train.csv", "test.csv"))
        folder = _store(store, source).build(
            "task", settings={"name": folder.name}, inputs={"train": folder / "train.csv", "test": folder / "test.csv"},
            write=lambda out: write_csv_task(train, test, out), code=(write_csv_task, _read_csv),
        ).path  # fmt: skip
    name = Path(str(source).removeprefix("hub:")).name or folder.name
    schema = _read_schema(folder)
    fields = {key: tuple(part["enum"]) for key, part in schema["properties"].items()}
    prompt = folder / "prompt.txt"
    if not prompt.is_file():
        raise TaskError(f"The task folder {folder} has no prompt.txt: expected the system message in it; write one line.")
    try:
        prompt_text = prompt.read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise TaskError(f"{prompt} is not UTF-8 ({error}): expected plain text; save it as UTF-8.") from None
    splits = {}
    for split in SPLITS:
        splits[split], bad = read_rows(folder / f"{split}.jsonl", fields=fields if split != "unlabelled" else None)
        rejected += bad
        if not splits[split] and split != "unlabelled":
            because = f" (first problem: {bad[0].where}, {bad[0].reason})" if bad else ""
            raise TaskError(f"{folder / split}.jsonl has no usable row{because}: expected one JSON object a line; add some.")
    return Task(folder, name, prompt_text, schema, splits, tuple(rejected))


def read_rows(path: Path, *, fields: Mapping | None) -> tuple[tuple[Example, ...], list[Rejected]]:
    """Read a JSON-lines split; returns the good rows and the rejected ones. A missing file is an empty split."""
    rows, rejected, seen = [], [], set()
    if not path.is_file():
        return (), []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        where, line = f"{path.name} line {number}", raw.decode("utf-8", "replace").rstrip("\r")
        try:
            row = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            rejected.append(Rejected(where, f"it is not JSON in UTF-8 ({error})", line))
            continue
        reason = _row_problem(row, fields)
        if not reason and str(row.get("id", number)) in seen:
            reason = f"the id {row.get('id', number)!r} is there twice"
        if reason:
            rejected.append(Rejected(where, reason, line))
            continue
        seen.add(str(row.get("id", number)))
        rows.append(Example(str(row.get("id", number)), row["text"].strip(), row["answer"] if fields else None))
    return tuple(rows), rejected


def _row_problem(row, fields: Mapping | None) -> str | None:
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}, expected an object with text"
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        return "it has no text"
    if len(row["text"]) > MAX_MESSAGE_CHARS:
        return f"its text has {len(row['text']):,} characters, at most {MAX_MESSAGE_CHARS:,} are allowed"
    if any(unicodedata.category(c) == "Cs" for c in row["text"]):
        return "its text holds half a character (a lone surrogate)"
    return answer_problem(row.get("answer"), fields) if fields else None


def _read_schema(folder: Path) -> dict:
    path = folder / "schema.json"
    if not path.is_file():
        raise TaskError(
            f"{folder} is no task folder: expected schema.json, prompt.txt and train, dev and test.jsonl in it; "
            f"copy {DATA_FOLDER / BUNDLED_TASK} and put your own rows there."
        )
    try:
        schema = json.loads(path.read_text("utf-8"))
        enums = [part["enum"] for part in schema["properties"].values()]
        usable = bool(enums) and all(isinstance(e, list) and e and all(isinstance(v, str) for v in e) for e in enums)
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise TaskError(
            f"{path} does not describe an answer: expected a JSON Schema object whose properties each have an enum of "
            "texts; see the bundled task's schema.json."
        )
    schema.setdefault("type", "object")
    schema["required"] = list(schema["properties"])
    schema["additionalProperties"] = False
    return schema


def write_csv_task(train: list, test: list, folder: Path, *, shots: int = 20, dev: int = 5, seed: int = 0) -> None:
    """Write a task folder from `(text, category)` pairs with one field, `intent`.

    Of each category in `train`, `shots` rows are labelled and `dev` rows held out; the rest is the unlabelled split.
    """
    shuffled = random.Random(seed).sample(train, len(train))
    by_label = defaultdict(list)
    for text, label in shuffled:
        by_label[label].append(text)
    splits = {split: [] for split in SPLITS}
    for label, texts in sorted(by_label.items()):
        splits["train"] += [(text, label) for text in texts[:shots]]
        splits["dev"] += [(text, label) for text in texts[shots : shots + dev]]
        splits["unlabelled"] += [(text, None) for text in texts[shots + dev :]]
    splits["test"] = test
    for split, pairs in splits.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, (text, label) in enumerate(random.Random(seed).sample(pairs, len(pairs))):
                row = {"id": f"{split}-{number:05}", "text": text.strip()} | ({"answer": {"intent": label}} if label else {})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    schema = {"type": "object", "properties": {"intent": {"enum": sorted(by_label)}}}
    (folder / "schema.json").write_text(json.dumps(schema, indent=1), "utf-8")
    (folder / "prompt.txt").write_text("Answer with JSON.\n", "utf-8")


def _read_csv(path: Path, rejected: list[Rejected]) -> list[tuple[str, str]]:
    """The `(text, category)` pairs of a file; rows without one of the two are added to `rejected`."""
    pairs = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"text", "category"} <= set(reader.fieldnames or ()):
                raise TaskError(f"{path} has the columns {reader.fieldnames}: expected text and category; rename them.")
            for row in reader:
                missing = [name for name in ("text", "category") if not (row[name] or "").strip()]
                if missing:
                    where = f"{path.name} line {reader.line_num}"
                    rejected.append(Rejected(where, f"it has no {missing[0]}", str(row)))
                else:
                    pairs.append((row["text"], row["category"]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} is not CSV in UTF-8 ({error}): expected plain text; save it as CSV UTF-8.") from None
    return pairs


def _write_from_hub(dataset_id: str, folder: Path) -> None:
    from datasets import load_dataset

    try:
        data = load_dataset(dataset_id)
    except Exception as error:  # datasets raises a dozen kinds for "not reachable" and "no such data set"
        raise TaskError(
            f"The data set {dataset_id!r} could not be fetched from the hub ({type(error).__name__}): expected a "
            "reachable hub and an existing id; connect, or give --task a folder."
        ) from error
    features = data["train"].features
    column = next((c for c in ("category", "label", "intent") if c in features), None)
    if column is None or "text" not in features or "test" not in data:
        raise TaskError(
            f"The data set {dataset_id!r} has the columns {sorted(features)}: expected text, a category or label, and a "
            "test split; turn it into a task folder first."
        )
    names = getattr(features[column], "names", None)
    pairs = {
        split: [(row["text"], names[row[column]] if names else str(row[column])) for row in data[split]]
        for split in ("train", "test")
    }
    write_csv_task(pairs["train"], pairs["test"], folder)


def _store(store: Store | None, source) -> Store:
    if store is None:
        raise TaskError(f"The task {source} must be converted first: expected a store to keep it in; pass store=.")
    return store


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha()}


def task_inputs(task: Task) -> dict[str, Path]:
    """The task's files as inputs of an artifact."""
    names = ("schema.json", "prompt.txt", *(f"{split}.jsonl" for split in SPLITS))
    return {name: task.folder / name for name in names if (task.folder / name).is_file()}
