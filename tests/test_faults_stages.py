"""The pipeline is killed with SIGKILL in a process of its own, resumed, and run twice at once, on a course of tiny stages."""

import subprocess
import sys
import time

import pytest

from slmops_course.artifacts import MANIFEST, Store, check_artifact
from slmops_course.faults import Trial
from slmops_course.faults.course import STEPS, open_small, write_material
from slmops_course.faults.stages import damaged, differences, digests, kill_and_resume, race, stage_times

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork.")
STAGES = ["teacher", "labels", "student-sequence"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("faults") / "material")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_hashes(material, tmp_path):
    trial = kill_and_resume(material, tmp_path, STAGES, kills=4, seed=0)
    assert trial.lost == []
    assert trial.tried == {"base-model": 1, "teacher": 1, "labels": 1, "student-sequence": 1}


@pytest.mark.slow
def test_two_runs_at_once_build_each_stage_once(material, tmp_path):
    trial = race(material, tmp_path / "race", ["teacher", "labels"], runs=2)
    assert (trial.lost, trial.tried) == ([], {"run": 2})
    assert trial.notes == ["3 stages were built"]


def test_a_run_that_fails_is_a_loss(material, tmp_path):
    trial = race(material, tmp_path / "race", ["no such step"], runs=1)
    assert trial.lost == ["a run ended with code 1"]


def test_every_step_of_the_small_course_is_one_of_the_courses(material, tmp_path):
    course = open_small(material, tmp_path)
    assert len(course.task.splits["train"]) == 12
    assert set(STEPS) >= set(STAGES)
    assert STEPS["base"](course).path.name.startswith("base-model-")


# A stage whose work a process of its own does, as Olive's is. It survives its parent, and goes on writing.
PARENT = """
import subprocess, sys
from pathlib import Path
from slmops_course.artifacts import Store

def write(folder):
    helper = "import sys, time, pathlib; print('writing', flush=True); time.sleep(1.5)"
    helper += "; pathlib.Path(sys.argv[1], 'half.tmp').write_text('from before')"
    subprocess.run([sys.executable, "-c", helper, str(folder)])

Store(Path(sys.argv[1])).build("onnx", settings={}, write=write)
"""


@pytest.mark.slow
def test_what_a_killed_runs_helper_still_writes_is_not_in_the_next_artifact(tmp_path):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"writing"
        process.kill()

    def write(folder):
        (folder / "model.bin").write_text("whole", "utf-8")
        time.sleep(3)

    artifact = Store(tmp_path).build("onnx", settings={}, write=write)
    assert list(artifact.manifest["files"]) == ["model.bin"]


# --- What counts as lost ---


def test_artifacts_that_differ_are_missing_or_are_new_are_lost():
    wanted = {"teacher-1": "a", "labels-2": "b", "speed-3": "c", "olive-lora-4": "d"}
    assert differences(wanted, wanted) == differences({}, {}) == []
    assert differences(wanted, wanted | {"speed-3": "other", "olive-lora-4": "other"}) == []  # never equal, see NOT_EQUAL
    for found in (wanted | {"labels-2": "other"}, {k: v for k, v in wanted.items() if k != "labels-2"}):
        assert differences(wanted, found) == ["labels-2 differs from the undisturbed run's"]
    assert differences({}, {"new-1": "a"}) == ["new-1 differs from the undisturbed run's"]
    assert differences({"speed-3": "c"}, {}) == ["speed-3 differs from the undisturbed run's"]


def test_a_finished_artifact_is_damaged_or_not_and_a_partial_one_is_neither(tmp_path):
    artifact = Store(tmp_path).build("one", settings={}, write=lambda folder: (folder / "a").write_text("a") and None)
    (tmp_path / "two-1.partial").mkdir()
    assert damaged(tmp_path) == []
    assert list(digests(tmp_path)) == [artifact.path.name]
    (artifact.path / "a").write_text("b")
    (tmp_path / "three-1").mkdir()
    assert damaged(tmp_path) == [*check_artifact(artifact.path), f"three-1 has no readable {MANIFEST} (FileNotFoundError)"]


def test_stage_times_are_read_from_the_log(tmp_path):
    lines = ["10.5 base: building", "11.0 base: built in 1 s", "11.0 teacher: building", "12.0 something else happens"]
    (tmp_path / "log.txt").write_text("\n".join(lines), "utf-8")
    assert stage_times(tmp_path / "log.txt") == {"base": 0.5}
    (tmp_path / "log.txt").write_text("", "utf-8")
    assert stage_times(tmp_path / "log.txt") == {}


def test_a_trial_says_what_was_tried_and_what_was_lost():
    trial = Trial("a flipped bit")
    assert str(trial) == "a flipped bit: nothing was tried\n  nothing was lost"
    trial.count("in a file")
    trial.count("in a file")
    trial.notes.append("quickly")
    trial.lost.append("a name")
    assert str(trial) == "a flipped bit: 2 × in a file\n  quickly\n  LOST: a name"
