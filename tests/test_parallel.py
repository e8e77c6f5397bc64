"""The training loop on two processes gives what it gives on one, within what the order of additions allows."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from slmops_course.chat import load_torch
from slmops_course.parallel import share_step, train_together
from slmops_course.training import TrainingError, TrainingSettings, next_token_loss, train

SETTINGS = TrainingSettings(epochs=3, learning_rate=3e-3, batch_size=5)


class Rank:
    """What one of two processes sees of accelerate; reductions are noted, and given back as they are."""

    num_processes = 2

    def __init__(self, index):
        self.process_index = index

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor


def largest_difference(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_process_trains_as_the_plain_loop_does(model, rows):
    plain, together = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(plain, rows, SETTINGS)
    found = train_together(together, rows, SETTINGS, Accelerator(cpu=True))
    assert [step["tokens"] for step in found] == [step["tokens"] for step in expected]
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], rel=1e-5)
    assert largest_difference(plain, together) < 1e-5 < largest_difference(model, together)


def test_the_parts_of_two_processes_add_up_to_the_gradients_of_one(model, rows):
    learns = [p for p in model.parameters() if p.requires_grad]
    whole, parts = list(range(5)), []
    for index in (0, 1):
        share_step(model, learns, rows, whole, Rank(index), next_token_loss)
        parts.append([p.grad.clone() for p in learns])
        model.zero_grad(set_to_none=True)
    single = Rank(0)
    single.num_processes = 1
    value, _ = share_step(model, learns, rows, whole, single, next_token_loss)
    for first, second, p in zip(*parts, learns, strict=True):
        torch.testing.assert_close(first + second, p.grad, rtol=1e-4, atol=1e-6)
    assert value > 0


def test_a_process_without_rows_adds_nothing(model, rows):
    learns = [p for p in model.parameters() if p.requires_grad]
    assert share_step(model, learns, rows, [3], Rank(1), next_token_loss) == (0.0, 0)
    assert all(not p.grad.any() for p in learns)


def test_settings_that_cannot_work_are_refused(model, rows):
    for settings, given, says in (
        (TrainingSettings(rounded_bits=4), rows, "rounded_bits is set"),
        (TrainingSettings(epochs=0), rows, "epochs is 0"),
        (TrainingSettings(), [], "no rows to train on"),
    ):
        with pytest.raises(TrainingError, match=says):
            train_together(model, given, settings, Accelerator(cpu=True))


def launch(processes, task, source, out):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc_per_node", str(processes), "-m", "slmops_course.parallel", "--task", str(task), "--source", str(source),
        "--out", str(out), "--epochs", "3", "--learning-rate", "3e-3", "--batch-size", "5",
    ]  # fmt: skip
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **loopback}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "history.json").read_text("utf-8")), load_torch(out)[0]


def test_two_processes_give_the_result_of_one(model, rows, tiny_task_folder, tiny_model_folder, tmp_path):
    """The script as the docstring starts it, on two CPU processes that meet on loopback."""
    told, together = launch(2, tiny_task_folder, tiny_model_folder, tmp_path / "two")
    alone = train_together(model, rows, SETTINGS, Accelerator(cpu=True))
    assert told["processes"] == 2
    assert [step["loss"] for step in told["history"]] == pytest.approx([step["loss"] for step in alone], rel=1e-3)
    assert largest_difference(together, model) < 1e-3
