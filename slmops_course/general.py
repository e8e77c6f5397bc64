"""Questions about the world, to see what a model still knows beside its task: forgetting, measured."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from slmops_course.chat import ChatModel
from slmops_course.tasks import DATA_FOLDER

QUESTIONS = DATA_FOLDER / "general" / "questions.jsonl"
MAX_NEW_TOKENS = 24  # an answer names the thing early, or goes astray


@dataclass(frozen=True)
class Question:
    """A question, and the words of which one must be in its answer."""

    id: str
    question: str
    accept: tuple[str, ...]


@dataclass(frozen=True)
class Knowledge:
    """A model's reply to a question, and whether it counts as right."""

    question: str
    reply: str
    right: bool


def load_questions() -> tuple[Question, ...]:
    """The bundled questions, in English: facts that a child knows, written for the course."""
    rows = [json.loads(line) for line in QUESTIONS.read_text("utf-8").split("\n") if line]
    return tuple(Question(row["id"], row["question"], tuple(row["accept"])) for row in rows)


def ask_questions(model: ChatModel, questions: Sequence[Question]) -> list[Knowledge]:
    """Ask each question alone, without a system prompt, and see whether an accepted word is in the reply.

    That is lenient: a reply that goes on to talk nonsense counts as right. It is the same for every model.
    """
    asks = [[{"role": "user", "content": question.question}] for question in questions]
    replies = model.generate(asks, max_new_tokens=MAX_NEW_TOKENS)
    return [Knowledge(q.question, r.text, says(r.text, q.accept)) for q, r in zip(questions, replies, strict=True)]


def says(reply: str, accept: Sequence[str]) -> bool:
    """Whether one of the words is in a reply, as a whole word, in capitals or not.

    Example: "It is PARIS.", ["paris"] -> True; "Parisian", ["paris"] -> False
    """
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE) for word in accept)
