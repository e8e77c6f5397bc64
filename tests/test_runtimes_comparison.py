"""The comparison is made with small workers of known answers; the kept figures are held to what they claim."""

import json
import sys
import textwrap
from dataclasses import replace

import psutil
import pytest

from slmops_course.runtimes import comparison
from slmops_course.runtimes.comparison import (
    COMMAND,
    KEPT,
    REFERENCE,
    RUNTIMES,
    VALIDATED,
    Row,
    compare,
    keep,
    measure,
    table,
    total_bytes,
)
from slmops_course.runtimes.worker import RuntimesError, WorkerChatModel

# Answers each message with what it has for it, or with "?"; takes 20 ms of processor time and 30 MB.
WORKER = """
    import json, sys, time
    answers, ballast = json.loads(sys.argv[1]), bytearray(30_000_000)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        while time.process_time() - start < 0.02:
            pass
        text = answers.get(json.loads(line)["messages"][-1]["content"], "?")
        rest = {"prompt_ids": [1], "output_ids": [2], "first_s": 0.25, "latency_s": 0.5}
        print(json.dumps({"text": text, **rest}), flush=True)
"""


@pytest.fixture
def answering(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(textwrap.dedent(WORKER), "utf-8")

    def answering(answers):
        return WorkerChatModel([sys.executable, "-P", str(program), json.dumps(answers)], name="known")

    return answering


@pytest.fixture
def right(tiny_task):
    return {e.text: tiny_task.target(e.answer) for e in tiny_task.splits["dev"]}


def row(name):
    score = {"value": 1.0, "low": 1.0, "high": 1.0, "count": 3}
    return Row(name, 3, 1.0, score, 0.1, 0.2, 0.3, 4, 5)


def test_what_is_measured_is_what_the_worker_did(answering, right, tiny_task):
    examples = tiny_task.splits["dev"]
    texts = list(right.values())
    others = sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))  # left by other tests
    with answering(right) as model:
        found, replies = measure(model, tiny_task, examples, expected=None, size_bytes=7)
    assert replies == texts
    assert (found.name, found.messages, found.equal, found.exact_match["value"], found.size_bytes) == ("known", 3, 1.0, 1.0, 7)
    assert (found.time_to_first_token_s, found.latency_s) == (0.25, 0.5)
    assert 0.015 <= found.processor_s < 0.2
    assert 30_000_000 < found.process_bytes - others < 200_000_000
    one_wrong = dict(right) | {examples[0].text: texts[1]}
    with answering(one_wrong) as model:
        found, _ = measure(model, tiny_task, examples, expected=texts, size_bytes=7)
    assert found.equal == pytest.approx(2 / 3)
    assert found.exact_match["value"] == pytest.approx(2 / 3)
    # Another answer that is as wrong as PyTorch's is not an equal one.
    with answering({}) as model:
        found, _ = measure(model, tiny_task, examples, expected=["!"] * 3, size_bytes=7)
    assert (found.equal, found.exact_match["value"]) == (0, 0)


def test_no_messages_and_no_such_runtime_are_said(answering, tiny_task, tmp_path):
    with answering({}) as model, pytest.raises(RuntimesError, match="no message to compare"):
        measure(model, tiny_task, [], expected=None, size_bytes=1)
    with pytest.raises(RuntimesError, match="no runtime 'llama': expected one of PyTorch"):
        next(compare(tmp_path, tiny_task, work=tmp_path, names=["llama"]))


def test_a_model_is_converted_once_and_another_one_again(tmp_path):
    folder, calls = tmp_path / "model", []
    folder.mkdir()

    def convert(folder, out, *, bits):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(str(bits), "utf-8")
        calls.append(out)
        return out

    (folder / "weights").write_bytes(b"1")
    first = comparison._converted(convert, folder, tmp_path, "made", bits=4)
    assert comparison._converted(convert, folder, tmp_path, "made", bits=4) == first
    assert (first.read_text("utf-8"), len(calls)) == ("4", 1)
    (folder / "weights").write_bytes(b"2")
    assert comparison._converted(convert, folder, tmp_path, "made", bits=4) != first
    assert len(calls) == 2


@pytest.mark.slow
def test_pytorch_is_its_own_reference(tiny_model_folder, tiny_task, tmp_path):
    (found,) = compare(tiny_model_folder, tiny_task, work=tmp_path / "work", names=[REFERENCE], messages=2)
    assert (found.name, found.messages, found.equal) == (REFERENCE, 2, 1.0)
    assert found.size_bytes == total_bytes(tiny_model_folder) > 100_000
    assert 0 < found.time_to_first_token_s < found.latency_s


def test_sizes_are_those_of_the_files_a_device_needs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"123")
    (tmp_path / "manifest.json").write_bytes(b"12345")
    assert (total_bytes(tmp_path), total_bytes(tmp_path / "sub" / "a"), total_bytes(tmp_path / "manifest.json")) == (3, 3, 5)


def test_kept_figures_are_added_to_and_come_in_order(tmp_path, tiny_task):
    path, names = tmp_path / "kept.json", list(RUNTIMES)
    keep([row(names[2]), row(names[0])], tiny_task, path)
    keep([replace(row(names[1]), equal=0.5), replace(row(names[2]), equal=0.25)], tiny_task, path)
    rows = [r for r in table(path) if r["status"] == "run"]
    assert {r["name"] for r in table(path) if r["status"] == "not run"} == set(names[3:])
    assert [(r["name"], r["equal"]) for r in rows] == [(names[0], 1.0), (names[1], 0.5), (names[2], 0.25)]
    assert all(r["date"] and "cores" in r["machine"] and r["task"] == "tiny_desk" for r in rows)
    for broken in ("", "[1]", "{"):
        path.write_text(broken, "utf-8")
        with pytest.raises(RuntimesError, match=r"kept figures in kept\.json cannot be read"):
            table(path)


def test_the_table_says_of_each_whether_it_was_run():
    rows = {r["name"]: r for r in table()}
    assert list(rows) == [*RUNTIMES, *VALIDATED]
    assert {name for name in rows if rows[name]["status"] == "validated"} == set(VALIDATED)
    run = [r for r in rows.values() if r["status"] == "run"]
    assert {r["name"] for r in run} == set(json.loads(KEPT.read_text("utf-8")))
    assert rows[REFERENCE]["equal"] == 1.0
    assert all((r["messages"], r["task"]) == (comparison.MESSAGES, "support_desk") for r in run)
    assert all(0 < r["time_to_first_token_s"] <= r["latency_s"] for r in run)


def test_what_is_only_validated_is_there():
    for how in VALIDATED.values():
        assert (KEPT.parents[2] / how.partition(":")[0]).exists(), how


def test_every_runtime_has_figures():
    missing = [row["name"] for row in table() if row["status"] == "not run"]
    if missing:
        pytest.skip(f"No figures yet of {', '.join(missing)}: `{COMMAND} --save` measures them, on a quiet machine.")
