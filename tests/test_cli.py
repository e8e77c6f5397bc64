"""The command line, as a user meets it: in a process of its own."""

import subprocess
import sys

import pytest


def slmops(*arguments, folder=None):
    command = [sys.executable, "-m", "slmops_course.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.parametrize("command", ["doctor", "run", "chapters", "report", "serve"])
def test_every_command_explains_itself(command):
    done = slmops(command, "--help")
    assert done.returncode == 0
    assert "usage: slmops" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt-17"], "There is no model 'gpt-17'"),
        (["--task", "no/such/folder"], "is no task folder"),
        (["--profile", "huge"], "There is no profile 'huge'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments, sentence, tmp_path):
    done = slmops("run", *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_malformed_rows_of_a_learners_file_are_named_and_the_good_ones_used(tiny_task_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_task_folder, tmp_path / "mine")
    with open(folder / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "no answer here"}\n')
    done = slmops("run", "--task", folder, "--model", "none", folder=tmp_path)
    assert "not used: train.jsonl line 13: " in done.stderr
    assert "There is no model 'none'" in done.stderr


def test_an_unknown_chapter_or_parameter_is_refused_before_anything_runs(tmp_path):
    from pathlib import Path

    root = Path(__file__).parent.parent
    assert "There is no chapter 'nine'" in slmops("--build", tmp_path, "chapters", "nine", folder=root).stderr
    done = slmops("--build", tmp_path, "chapters", "01_introduction", "-p", "PROFIL", "fast", folder=root)
    assert done.returncode == 1
    assert "has no parameter 'PROFIL'" in done.stderr
    assert not (tmp_path / "chapters").exists()


def test_serve_refuses_a_port_in_use_before_it_builds_anything(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = slmops("serve", "--port", taken.getsockname()[1], folder=tmp_path)
    assert done.returncode == 1
    assert "is in use" in done.stderr
    assert not (tmp_path / "build").exists()


def test_doctor_prints_its_findings():
    done = slmops("doctor")
    assert done.returncode in (0, 1)
    assert "Python" in done.stdout
    assert "Traceback" not in done.stderr
