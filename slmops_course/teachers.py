"""Stage 1 of distillation: prompts go to a teacher, labelled pairs come back, the kept and the rejected."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slmops_course.chat import (
    BATCH_SIZE,
    MAX_NEW_TOKENS,
    ChatModel,
    Conversation,
    RecordedChatModel,
    batches_by_length,
    decode_reply,
    pad_left,
    prompt_ids,
)
from slmops_course.errors import CourseError
from slmops_course.evaluation import ask_all
from slmops_course.tasks import Example, Rejected, Task, TaskError

SHINGLE_CHARS = 5


class TeacherError(CourseError):
    """Something that a teacher cannot be asked."""


@dataclass(frozen=True)
class Labelled:
    """What a teacher made of unlabelled messages: examples with its answers, and what could not be used."""

    kept: tuple[Example, ...]
    rejected: tuple[Rejected, ...]


def label_messages(messages: Sequence[Example], teacher: ChatModel, task: Task) -> Labelled:
    """Ask the teacher about every message. An answer outside the schema is kept aside with the reason, never guessed at.

    Works with any ChatModel: a local model, a recorded teacher, an endpoint.
    """
    kept, rejected = [], []
    for message, reply in zip(messages, ask_all(teacher, task, messages), strict=True):
        try:
            kept.append(replace(message, answer=task.parse(reply.text)))
        except TaskError as error:
            rejected.append(Rejected(message.id, str(error), reply.text))
    return Labelled(tuple(kept), tuple(rejected))


def save_labelled(labelled: Labelled, folder: Path) -> None:
    """Write `kept.jsonl` and `rejected.jsonl`, and `data_card.json`, which says what is in them."""
    rows = [{"id": e.id, "text": e.text, "answer": dict(e.answer)} for e in labelled.kept]
    _write_lines(folder / "kept.jsonl", rows)
    _write_lines(folder / "rejected.jsonl", [vars(r) for r in labelled.rejected])
    (folder / "data_card.json").write_text(json.dumps(data_card(labelled), indent=1), "utf-8")


def load_labelled(folder: Path) -> Labelled:
    """The reverse of `save_labelled`."""
    kept = tuple(Example(**row) for row in _read_lines(folder / "kept.jsonl"))
    return Labelled(kept, tuple(Rejected(**row) for row in _read_lines(folder / "rejected.jsonl")))


def data_card(labelled: Labelled) -> dict:
    """Counts that describe a generated data set: how many rows, of which label, and why the others were rejected.

    Reasons are counted without the replies they quote, so that like ones come together.
    """
    label = next(iter(labelled.kept[0].answer)) if labelled.kept else None
    reasons = [re.sub(r"""(['"]).*\1""", "…", rejected.reason) for rejected in labelled.rejected]
    return {
        "kept": len(labelled.kept),
        "rejected": len(labelled.rejected),
        "reasons": dict(Counter(reasons).most_common()),
        "labels": dict(Counter(e.answer[label] for e in labelled.kept).most_common()),
    }


def load_key(path: Path) -> dict[str, dict]:
    """The right answers of unlabelled messages, by id. They are for checking a teacher only: nothing is trained on them.

    Rows are `{"id": …, "answer": {…}}`, without text. A task without such a file has an empty key.
    Raises TaskError, with the line, for a row of another form: a check that skips rows would check less than it says.
    """
    key: dict[str, dict] = {}
    lines = path.read_text("utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            identifier, answer = row["id"], dict(row["answer"])
        except (ValueError, KeyError, TypeError):
            raise TaskError(
                f'{path.name} line {number} is {line[:60]!r}: expected {{"id": …, "answer": {{…}}}}; mend or delete the line.'
            ) from None
        if identifier in key:
            raise TaskError(
                f"{path.name} line {number} has the id {identifier!r} again: expected one answer an id; delete one."
            )
        key[identifier] = answer
    return key


def recorded_teacher(task: Task) -> RecordedChatModel:
    """A teacher that is not here: the answers in the task's `unlabelled_key.jsonl`, by the unlabelled messages' texts.

    For the bundled desk these come from the large language model that wrote the messages.
    Raises TeacherError for a task without a key.
    """
    key = load_key(task.folder / "unlabelled_key.jsonl")
    if not key:
        raise TeacherError(
            f"The task {task.name} has no unlabelled_key.jsonl: expected a teacher's recorded answers in it; ask a model "
            "instead, such as course.teacher()."
        )
    return RecordedChatModel({e.text: task.target(key[e.id]) for e in task.splits["unlabelled"] if e.id in key})


def label_accuracy(labelled: Labelled, key: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """The share of kept rows whose answer, and each field of it, is what the key says; rows without a key do not count.

    Example: -> {"exact_match": 0.78, "intent": 0.82, "urgency": 0.9, "product": 0.93}; without any key -> {}
    """
    pairs = [(e.answer, key[e.id]) for e in labelled.kept if e.id in key]
    if not pairs:
        return {}
    shares = {"exact_match": sum(dict(a) == dict(b) for a, b in pairs) / len(pairs)}
    return shares | {name: sum(a[name] == b[name] for a, b in pairs) / len(pairs) for name in pairs[0][1]}


def shingles(text: str) -> set[str]:
    """All runs of five characters of a text, without case and punctuation: what two texts share, they share by these.

    Example: "Card lost!" -> {"card ", "ard l", "rd lo", "d los", " lost"}
    Source: Broder, "On the resemblance and containment of documents", 1997.
    """
    # Marks are part of a letter: in Indian scripts they are its vowel.
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
    plain = " ".join("".join(kept).split())
    return {plain[i : i + SHINGLE_CHARS] for i in range(max(1, len(plain) - SHINGLE_CHARS + 1))}


def near_duplicates(
    texts: Sequence[str], others: Sequence[str] | None = None, *, threshold: float = 0.6
) -> list[tuple[float, str, str]]:
    """Pairs of texts that share at least `threshold` of their shingles, most alike first: (share, text, other).

    The share is that of the shingles of both among those of either (Jaccard). Without `others`, pairs are among `texts`.
    """
    first = [shingles(text) for text in texts]
    second = first if others is None else [shingles(text) for text in others]
    named = texts if others is None else others
    pairs = []
    for i, mine in enumerate(first):
        for j in range(i + 1 if others is None else 0, len(second)):
            small, large = sorted((len(mine), len(second[j])))
            if small < threshold * large:  # cannot reach it: the shared ones are at most the smaller set
                continue
            both = len(mine & second[j])
            share = both / (small + large - both)
            if share >= threshold:
                pairs.append((share, texts[i], named[j]))
    return sorted(pairs, reverse=True)


def sample_answers(
    model, tokenizer, conversations: Sequence[Conversation], *, temperature: float, count: int = 3, seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[str]]:  # fmt: skip
    """Draw several answers to each conversation at a sampling temperature; 0 always takes the likeliest token.

    `model` is a Hugging Face model. Same conversations and seed, same answers.
    """
    import torch

    if temperature < 0:
        raise TeacherError(f"The sampling temperature is {temperature}: expected 0 or more; 0 to 1.5 is usual.")
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    each = count if temperature else 1
    answers: dict[int, list[str]] = {}
    torch.manual_seed(seed)
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    for indexes, batch in batches_by_length(prompts, max(1, BATCH_SIZE // each)):
        ids, mask = pad_left(batch, pad=tokenizer.pad_token_id)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, num_return_sequences=each,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **how,
            )  # fmt: skip
        replies = [decode_reply(tokenizer, row)[0] for row in out[:, ids.shape[1] :].tolist()]
        for number, index in enumerate(indexes):
            answers[index] = replies[number * each : (number + 1) * each] * (count // each)
    return [answers[i] for i in range(len(prompts))]


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
