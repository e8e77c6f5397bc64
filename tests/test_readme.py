"""What the README promises is there."""

import re
from pathlib import Path

from slmops_course.cli import make_parser
from slmops_course.pipeline import open_course

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def commands(text: str) -> list[str]:
    """The indented command lines of the README."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_the_two_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text("utf-8")))
    found = {line.split()[1] for line in commands(README) if line.startswith("make ")}
    assert {"course", "test"} <= found <= targets


def test_every_slmops_command_is_explained_and_none_is_invented():
    (subparsers,) = [action for action in make_parser()._actions if action.dest == "command"]
    explained = {line.split()[1] for line in commands(README) if line.startswith("slmops ")}
    assert explained == set(subparsers.choices)


def test_the_commands_for_other_messages_parse():
    lines = [line.split("slmops_course.cli ")[1] for line in commands(README) if " run --task" in line]
    options = [make_parser().parse_args(line.split()) for line in lines]
    assert [option.task for option in options] == ["banking77", "my_folder"]


def test_both_scoreboards_have_a_row_for_every_stage(tmp_path):
    rows = re.findall(r"(?m)^\| ([a-z][^|]*?) \| [\d.]+% \[", README)
    stages = [*open_course(tmp_path).contenders()]
    assert rows == [*stages, *stages]


def test_files_and_modules_that_are_named_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README.split("## What is where")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert (ROOT / "slmops_course" / name).exists(), name


def test_ci_calls_the_readmes_test_command_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    calls = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert calls == ["make test"]
