"""The command line, as a user meets it: in a process of its own."""

import subprocess
import sys

import pytest


def slmops(*arguments, folder=None):
    command = [sys.executable, "-m", "slmops_course.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.parametrize("command", ["doctor", "run", "chapters", "report", "registry", "serve", "cloud", "site", "translate"])
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


def test_an_empty_registry_says_what_to_do_next_and_makes_no_folder(tmp_path):
    done = slmops("registry", "list", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "No version is registered yet; `slmops registry add` makes the first." in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["show"], ["promote", "1"], ["rollback"]])
def test_what_is_not_registered_cannot_be_shown_or_moved(arguments, tmp_path):
    done = slmops("registry", *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("slmops: There is no model 'support_desk': expected one of those registered (none yet)")


def test_versions_are_listed_shown_promoted_and_rolled_back(tmp_path):
    from slmops_course.operations.bundles import bundle_digest, bundle_files
    from slmops_course.operations.gate import Check, GateReport
    from slmops_course.operations.registry import Registry

    registry = Registry(tmp_path / "build" / "registry")
    for number, passed in ((1, True), (2, True), (3, False)):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "model.onnx").write_text(f"version {number}", "utf-8")
        before = ("desk 1", bundle_digest(registry.get("support_desk", 1).files)) if number > 1 else (None, None)
        report = GateReport(
            f"desk {number}", before[0], "desk", "laptop", 100, bundle_digest(bundle_files(folder)), before[1],
            (Check("exact match", "80 %", "at least 70 %", passed),),
        )  # fmt: skip
        registry.register("support_desk", folder, lineage={"artifact": f"onnx-{number}", "steps": {}}, report=report)
    for arguments, code, words in (
        (["promote", "1"], 0, "support_desk 1 is in production."),
        (["promote", "3"], 1, "did not pass the gate"),
        (["promote", "2"], 0, "support_desk 2 is in production."),
        (["list"], 0, "| support_desk | 2 | production | passed |"),
        (["show", "3"], 0, "REFUSED (exact match)"),
        (["rollback"], 0, "support_desk 1 is in production again."),
        (["rollback"], 1, "has no whole version before it"),
    ):  # fmt: skip
        done = slmops("registry", *arguments, folder=tmp_path)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
