"""A student learns from corrections, on the tiny model, and does not begin anew."""

import pytest
import torch

from slmops_course.chat import load_torch
from slmops_course.operations.retraining import RetrainingError, retrain
from slmops_course.tasks import Example
from slmops_course.training import TrainingSettings, encode_rows, make_batch, next_token_loss

NEW = [
    Example("c-1", "My ring to pay with fell into the sea", {"intent": "card_lost", "urgency": "high"}),
    Example("c-2", "Where is the ring that I ordered back?", {"intent": "refund_missing", "urgency": "low"}),
]
QUICK = TrainingSettings(epochs=8, learning_rate=2e-3, batch_size=4)


def loss_on(folder, course, examples):
    model, tokenizer = load_torch(folder)
    rows = encode_rows(tokenizer, course.task, examples)
    with torch.inference_mode():
        return next_token_loss(model, make_batch(rows, range(len(rows)))).item()


def test_what_was_corrected_is_learned_and_what_was_known_is_kept(course):
    before, known = course.student().path, course.task.splits["train"]
    after = retrain(course, NEW, settings=QUICK).path
    assert loss_on(after, course, NEW) < loss_on(before, course, NEW)
    alone = retrain(course, NEW, settings=QUICK, replayed=1, times=20).path
    assert loss_on(after, course, known) < loss_on(alone, course, known)


def test_the_same_corrections_are_learned_once(course):
    assert retrain(course, NEW, settings=QUICK).path == retrain(course, NEW, settings=QUICK).path
    assert retrain(course, NEW[:1], settings=QUICK).path != retrain(course, NEW, settings=QUICK).path


@pytest.mark.parametrize("corrections", [[], [Example("c-3", "no answer to this one")]])
def test_without_right_answers_nothing_is_trained(course, corrections):
    with pytest.raises(RetrainingError, match=r"There is no correction|c-3 has no answer"):
        retrain(course, corrections)
