"""One set of pins feeds pip, conda and Binder, and the README's commands make the environment from it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from slmops_course import doctor

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
PIN_LINES = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in PIN_LINES)}
CONDA_FILES = ("environment.yml", "binder/environment.yml")
UNPINNED = re.compile(r"opentelemetry-|pip$|slmops-course$")

needs_make = pytest.mark.skipif(
    os.name == "nt" or shutil.which("make") is None, reason="make is not here; Windows readers use environment.yml"
)


def read_conda(name):
    """The conda dependencies and the pip lines of an environment file."""
    dependencies = yaml.safe_load((ROOT / name).read_text("utf-8"))["dependencies"]
    pip_lines = [line for entry in dependencies if isinstance(entry, dict) for line in entry["pip"]]
    return [entry for entry in dependencies if isinstance(entry, str)], pip_lines


def project_requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]


def requirement_closure(requirements):
    """Canonical names of everything the requirements bring in here, themselves included."""
    names, waiting = set(), [(requirement, "") for requirement in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key not in seen:
                seen.add(key)
                names.add(key[0])
                waiting += [(Requirement(line), wanted) for line in metadata.requires(requirement.name) or []]
    return names


def test_every_pin_is_an_exact_version_and_named_once():
    for line in PIN_LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), f"{line!r} is not of the form name==version"
    assert len(PINS) == len(PIN_LINES), "a library is pinned twice"


def test_nothing_is_pinned_that_must_stay_free():
    assert [name for name in PINS if UNPINNED.match(name)] == []


def test_everything_the_project_asks_for_is_pinned():
    asked = {canonicalize_name(requirement.name) for requirement in project_requirements()}
    assert asked - PINS.keys() == set()


def test_everything_those_libraries_bring_in_is_pinned_too():
    unpinned = requirement_closure(project_requirements()) - PINS.keys()
    assert {name for name in unpinned if not UNPINNED.match(name)} == set(), "add these to constraints.txt"


def test_installed_versions_agree_with_the_pins():
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions() if found.name}
    for requirement in project_requirements():
        assert canonicalize_name(requirement.name) in installed, f"{requirement.name} is not installed"
    differing = {
        name: (installed[name], version)
        for name, version in PINS.items()
        if name in installed and Version(installed[name]).public != Version(version).public
    }
    assert differing == {}, "installed and pinned versions differ: run `make test`, or see `slmops doctor`"


def test_the_doctor_reads_the_same_pins():
    assert doctor.read_pins(CONSTRAINTS) == PINS


@pytest.mark.parametrize("name", CONDA_FILES)
def test_conda_files_take_the_pins_and_the_project_from_this_repository(name):
    folder = (ROOT / name).parent  # conda and mamba run pip in the file's own folder
    _, pip_lines = read_conda(name)
    constraints, project = (line.split(maxsplit=1) for line in pip_lines)
    assert constraints[0] == "-c"
    assert (folder / constraints[1]).resolve() == ROOT / "constraints.txt"
    assert project[0] == "-e"
    path, extras = re.fullmatch(r"([./]+)\[(\w+)\]", project[1]).groups()
    assert (folder / path).resolve() == ROOT
    assert extras in PROJECT["optional-dependencies"]


@pytest.mark.parametrize("name", CONDA_FILES)
def test_what_conda_itself_installs_agrees_with_the_pins(name):
    conda, _ = read_conda(name)
    versions = dict(re.fullmatch(r"([\w-]+)(?:=([\d.]+))?", entry).groups() for entry in conda)
    assert SpecifierSet(PROJECT["requires-python"]).contains(versions.pop("python"))
    assert "pip" in versions, "conda warns when pip is used and not listed"
    versions.pop("pip")
    for library, version in versions.items():
        assert version == PINS[{"pytorch-cpu": "torch"}.get(library, library)], library


def test_comments_that_name_a_torch_version_name_the_pinned_one():
    named = re.findall(r"pytorch-cpu=([\d.]+)", (ROOT / "environment.yml").read_text("utf-8"))
    assert named == [PINS["torch"]]


def test_binder_takes_pytorch_from_conda_because_pip_brings_gigabytes_of_cuda():
    assert f"pytorch-cpu={PINS['torch']}" in read_conda("binder/environment.yml")[0]


def test_the_supported_pythons_are_the_same_everywhere():
    expected = SpecifierSet(PROJECT["requires-python"])
    supported = {f"3.{minor}" for minor in range(20) if expected.contains(f"3.{minor}")}
    assert {f"{major}.{minor}" for major, minor in doctor.SUPPORTED_PYTHONS} == supported
    least, most = re.search(r"not \((3, \d+)\) <= .* <= \((3, \d+)\)", (ROOT / "Makefile").read_text("utf-8")).groups()
    assert {least.replace(", ", "."), most.replace(", ", ".")} == supported


@pytest.mark.parametrize("name", ["constraints.txt", "Makefile", "pyproject.toml", "binder/postBuild", *CONDA_FILES])
def test_no_file_of_the_environment_names_an_index_or_a_path_of_a_machine(name):
    text = (ROOT / name).read_text("utf-8")
    assert re.findall(r"\w+://\S+|--(?:extra-)?index-url|--find-links|(?<![\w.}!>])/\w+", text) == []


def test_the_makefile_installs_under_the_constraints():
    installs = [line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "pip install" in line]
    (apart,) = [line for line in installs if ".venv/co-op" in line]  # it cannot keep the course's pins
    assert re.search(r"pip install co-op-translator==[\d.]+$", apart)
    assert len(installs) == 3
    assert all(line.endswith("-c constraints.txt") for line in installs if line != apart)


@needs_make
def test_make_runs_the_commands_the_readme_promises(project_copy):
    """In a folder with a space, an environment that is there already is used at once."""
    python = project_copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran $*"\n')
    python.chmod(0o755)
    for mark in (".installed", ".tools", ".co-op"):
        (project_copy / ".venv" / mark).touch()
    assert ran(make(project_copy, "course")) == ["-m slmops_course.cli chapters", "-m slmops_course.cli report"]
    assert ran(make(project_copy, "test")) == ["-m ruff check .", "-m pytest"]
    assert ran(make(project_copy, "check")) == ["-m ruff check .", "-m pytest"]


@needs_make
def test_a_changed_pin_installs_again_and_torch_goes_first(project_copy):
    python = project_copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran $*"\n')
    python.chmod(0o755)
    commands = ran(make(project_copy, "course"))
    assert commands[:2] == [
        f"-m pip install torch=={PINS['torch']} -c constraints.txt",
        "-m pip install -e .[test] -c constraints.txt",
    ]
    assert "pip install" not in make(project_copy, "course").stdout
    later = (project_copy / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(project_copy / "constraints.txt", (later, later))
    assert "pip install" in make(project_copy, "course").stdout


@needs_make
@pytest.mark.parametrize("answer", ['echo "Python 3.9.2"; [ "$1" = --version ]', None], ids=["wrong", "missing"])
def test_a_wrong_or_missing_python_gets_one_sentence_and_leaves_nothing_behind(project_copy, answer):
    python = project_copy / "another python"
    if answer:
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
    done = make(project_copy, "course", f"PYTHON={python}")
    assert done.returncode != 0
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert ("3.9.2" if answer else "another python: ") in done.stderr, "it says what was found"
    assert "-m venv" not in done.stdout
    assert not (project_copy / ".venv").exists()


@needs_make
def test_this_python_is_one_that_make_accepts(project_copy):
    done = make(project_copy, "--dry-run", "course", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    lines = script.read_text("utf-8").splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1] == "make test"
    assert os.access(script, os.X_OK)
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)


@pytest.fixture
def project_copy(tmp_path):
    """What make reads, in a folder whose path has a space."""
    folder = tmp_path / "my course"
    folder.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder, *arguments):
    # Whatever an outer make tells its children is not meant for this one.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def ran(done):
    """The arguments that the stand-in for Python was called with."""
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")]
