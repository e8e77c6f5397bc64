"""Few bits a weight: rounding in training, and files of mixed precision, on the tiny model."""

import pytest
import torch

from slmops_course.chat import load_torch
from slmops_course.experiments.formats import ROUNDINGS, compare_mixed, compare_rounding, round_while_learning
from slmops_course.sensitivity import to_ternary


def test_a_rounded_model_computes_with_rounded_weights_and_its_exact_ones_learn(tiny_model_folder):
    model, _ = load_torch(tiny_model_folder)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = round_while_learning(model, to_ternary)
    inside = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert count == sum(m.weight.numel() for m in inside)
    first = inside[0]
    assert len(first.weight.unique()) == 3
    original = first.parametrizations.weight.original
    assert any(torch.equal(original, values) for values in exact.values() if values.shape == original.shape)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert original.grad.abs().sum() > 0


def test_without_a_rounding_the_weights_are_only_counted(tiny_model_folder):
    model, _ = load_torch(tiny_model_folder)
    assert round_while_learning(model, None) > 0
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


@pytest.mark.slow
def test_each_rounding_has_a_row_and_fewer_bits_take_fewer_bytes(course):
    rows = compare_rounding(course)
    assert [row["name"] for row in rows] == list(ROUNDINGS)
    sizes = [row["size_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert rows[0]["difference"]["value"] == 0


@pytest.mark.slow
def test_each_file_has_a_row_and_is_compared_with_its_own_fp32(course):
    rows = compare_mixed(course, recipes=("fp32", "int4-mixed-down"))
    assert [row["name"].partition(", ")[2] for row in rows] == ["fp32", "int4-mixed-down"] * 2
    assert [row["difference"]["value"] for row in rows[::2]] == [0, 0]
    assert rows[1]["size_bytes"] < rows[0]["size_bytes"]
