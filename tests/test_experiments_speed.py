"""Training speed, measured side by side on the tiny model; its dev messages are here the ones it is trained on."""

import shutil
import sys
from dataclasses import asdict, replace

import pytest

from slmops_course.adapters import LoraSettings
from slmops_course.artifacts import Store
from slmops_course.benchmark import BenchmarkError, run_apart
from slmops_course.chat import load_torch
from slmops_course.experiments.speed import (
    CONTENDERS,
    FULL,
    OLIVE,
    OURS,
    TRL,
    SpeedError,
    growth,
    reported_seconds,
    speed,
    summarize,
)
from slmops_course.pipeline import Course
from slmops_course.tasks import load_task
from slmops_course.training import TrainingSettings, encode_rows, train

EPOCHS = 40


@pytest.fixture(scope="module")
def course(tiny_task_folder, tiny_model_folder, tmp_path_factory):
    """A course whose base model answers in JSON, and always wrongly: every message got the answer of another label."""
    folder = tmp_path_factory.mktemp("speed")
    shutil.copytree(tiny_task_folder, folder / "desk")
    shutil.copy(folder / "desk" / "train.jsonl", folder / "desk" / "dev.jsonl")
    task = load_task(folder / "desk")
    examples = task.splits["train"]
    wrong = [replace(e, answer=other.answer) for e, other in zip(examples, examples[4:] + examples[:4], strict=True)]
    model, tokenizer = load_torch(tiny_model_folder)
    train(model, encode_rows(tokenizer, task, wrong), TrainingSettings(epochs=40, learning_rate=1e-2, batch_size=4))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    made = Course(Store(folder / "artifacts"), task, model=str(folder / "model"))
    made.profile = replace(
        made.profile,
        teacher=TrainingSettings(learning_rate=3e-3, batch_size=4, trained_layers=1),
        lora=LoraSettings(rank=16, alpha=32, trained_layers=1),
        lora_training=TrainingSettings(learning_rate=1e-2, batch_size=4),
    )
    return made


@pytest.fixture(scope="module")
def tokens(course):
    """The real tokens of all the rows in all epochs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(course.base().path)
    return EPOCHS * sum(len(row.ids) for row in encode_rows(tokenizer, course.task, course.task.splits["train"]))


def check_row(row, name, tokens):
    assert row["name"] == name
    assert row["note"] == CONTENDERS[name][1]
    assert (row["rows"], row["tokens"]) == (12, tokens)
    assert 0.05 < row["seconds"] < 600
    assert row["tokens_per_s"] == pytest.approx(tokens / row["seconds"])
    assert 100e6 < row["peak_bytes"] < 4e9
    assert row["exact_match"] > 0.25, "the base answers all of these wrongly, and then it was trained on them"
    assert [run["seconds"] for run in row["runs"]] == [row["seconds"]]


def check_memory(row):
    assert row["growth_bytes"] == row["end_bytes"] - row["quarter_bytes"]
    assert 100e6 < row["quarter_bytes"] <= row["peak_bytes"]
    assert row["growth_bytes"] < 5e6


@pytest.mark.slow
def test_our_contenders_learn_and_their_memory_does_not_grow(course, tokens):
    rows = speed(course, contenders=[FULL, OURS], epochs=EPOCHS, runs=1)
    for row, name in zip(rows, (FULL, OURS), strict=True):
        check_row(row, name, tokens)
        check_memory(row)


@pytest.mark.slow
def test_trl_learns_the_same_rows(course, tokens):
    pytest.importorskip("trl")
    (row,) = speed(course, contenders=[TRL], epochs=EPOCHS, runs=1)
    check_row(row, TRL, tokens)
    assert row["growth_bytes"] == row["end_bytes"] - row["quarter_bytes"]


@pytest.mark.slow
def test_olives_pass_learns_the_same_rows_and_nobody_sees_its_steps(course, tokens):
    (row,) = speed(course, contenders=[OLIVE], epochs=EPOCHS, runs=1)
    check_row(row, OLIVE, tokens)
    assert (row["quarter_bytes"], row["end_bytes"], row["growth_bytes"]) == (None, None, None)


def test_a_missing_trl_is_told_before_anything_is_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # whether it is installed or not
    with pytest.raises(SpeedError, match=r"TRL is not installed: expected .*; pip install 'slmops-course\[experiments\]'\."):
        speed(None)  # without a course nothing could run


def test_a_run_that_fails_gives_one_sentence_with_its_last_words(course):
    settings = asdict(TrainingSettings(epochs=0))
    spec = {"contender": FULL, "base": str(course.base().path), "task": str(course.task.folder), "rows": 4}
    spec |= {"settings": settings, "lora": asdict(LoraSettings())}
    with pytest.raises(BenchmarkError, match=r"Training failed \(.*TrainingError: epochs is 0: .*\): expected a figure"):
        run_apart("slmops_course.experiments.speed", spec, what="Training")


def test_medians_are_taken_figure_by_figure_and_all_values_are_kept():
    runs = [{"seconds": 3.0, "peak": 7}, {"seconds": 9.0, "peak": 5}, {"seconds": 4.0, "peak": 6}]
    assert summarize(runs) == {"seconds": 4.0, "peak": 6, "runs": runs}


def test_a_figure_that_nobody_measured_stays_null():
    assert summarize([{"growth": None}, {"growth": None}])["growth"] is None


def test_growth_is_told_from_a_quarter_of_the_steps_on():
    assert growth([1, 5, 6, 6, 6, 6, 6, 9]) == {"quarter_bytes": 6, "end_bytes": 9, "growth_bytes": 3}
    assert growth([100, 200, 200, 200])["growth_bytes"] == 0, "what the first steps take is no growth"
    assert growth([7])["growth_bytes"] == 0
    assert set(growth([]).values()) == {None}


@pytest.mark.parametrize("log", ["{'train_runtime': '3.142', 'epoch': '2'}", "1 {'train_runtime': 3.142}"])
def test_a_trainers_own_time_is_read_from_its_log(log):
    assert reported_seconds(log) == 3.142


def test_a_log_without_a_time_is_an_error():
    with pytest.raises(SpeedError, match="no train_runtime"):
        reported_seconds("all is well")
