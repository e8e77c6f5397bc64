"""What a model still knows after its weights were changed, on the tiny model."""

import pytest
import torch

from slmops_course import training
from slmops_course.chat import TorchChatModel, load_torch
from slmops_course.evaluation import EvaluationError, ask_and_judge
from slmops_course.sensitivity import CHANGES, KINDS, SCANNED, grade, scan, to_grid, to_ternary, without_smallest


def test_ternary_weights_have_three_values_scaled_by_the_mean():
    assert torch.equal(to_ternary(torch.tensor([[0.1, -2.0, 0.9]])), torch.tensor([[0.0, -1.0, 1.0]]))
    assert torch.equal(to_ternary(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_grid_is_that_of_training_and_leaves_its_input_alone():
    weights = torch.randn(4, 64)
    wanted, before = weights.clone(), weights.clone()
    training.round_weights([wanted], [weights], bits=2)
    assert torch.equal(to_grid(2)(weights), wanted)
    assert torch.equal(weights, before)
    assert not torch.equal(wanted, weights)


def test_the_smallest_weights_become_zero_and_no_others():
    weights = torch.tensor([[0.1, -2.0, 0.9, -0.3]])
    assert torch.equal(without_smallest(0.5)(weights), torch.tensor([[0.0, -2.0, 0.9, 0.0]]))
    assert torch.equal(without_smallest(0.0)(weights), weights)


def test_an_answer_is_right_exactly_where_generation_writes_it(course, tiny_task):
    """The trained tiny model gets some of its messages right and some wrong."""
    folder = course.teacher().path
    examples = [example for split in ("train", "dev", "test") for example in tiny_task.splits[split]]
    with TorchChatModel(folder) as chat:
        outcomes = ask_and_judge(chat, tiny_task, examples)
    model, tokenizer = load_torch(folder)
    graded = grade(model, training.encode_rows(tokenizer, tiny_task, examples), batch_size=5)
    assert graded["right"] == sum(o.reply == tiny_task.target(o.expected) for o in outcomes)
    assert 0 < graded["right"] < len(examples)
    assert graded["perplexity"] > 1


def test_without_messages_there_is_nothing_to_grade(loaded):
    with pytest.raises(EvaluationError):
        grade(loaded[0], [])


def test_a_scan_tries_every_change_and_each_kind_of_matrix_from_the_same_exact_weights(course, tiny_task):
    folder, examples = course.teacher().path, tiny_task.splits["train"]
    rows = scan(folder, tiny_task, examples)
    assert [row["change"] for row in rows if row["where"] == "all"] == ["none", *CHANGES]
    assert [(row["change"], row["where"]) for row in rows if row["where"] != "all"] == [(c, k) for c in SCANNED for k in KINDS]
    model, tokenizer = load_torch(folder)
    encoded = training.encode_rows(tokenizer, tiny_task, examples)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "down_proj" in name:
                weights.copy_(to_grid(2)(weights))
    last = grade(training.to_fast_dtype(model), encoded)
    assert rows[-1] | {"messages": 0} == {"change": "2 bits", "where": "down_proj", **last, "messages": 0}
    assert rows[-1]["perplexity"] != rows[0]["perplexity"]


def test_the_courses_scans_are_of_both_students(course):
    scans = course.weight_scans().json("scans.json")
    assert list(scans) == ["trained for 4 bits", "never rounded"]
    assert scans["trained for 4 bits"] != scans["never rounded"]
