"""A built model is measured, judged and registered: on the tiny model, which answers nonsense."""

import json
import shutil

import pytest

from slmops_course.operations.bundles import bundle_digest, bundle_files
from slmops_course.operations.gate import Check, GateError, GateReport, must_pass_messages
from slmops_course.operations.lineage import lineage_of
from slmops_course.operations.registry import Registry
from slmops_course.operations.release import gather_evidence, release
from slmops_course.operations.versions import RegistryError
from slmops_course.pipeline import Course
from slmops_course.tasks import load_task


@pytest.fixture(scope="module")
def desk(course, tiny_task_folder, tmp_path_factory):
    """The tiny course, its task with two must-pass messages."""
    folder = shutil.copytree(tiny_task_folder, tmp_path_factory.mktemp("desk") / "tiny_desk")
    row = {"text": "My card was stolen", "answer": {"intent": "card_lost", "urgency": "high"}}
    (folder / "must_pass.jsonl").write_text("".join(json.dumps(row | {"id": f"must-{i}"}) + "\n" for i in range(2)), "utf-8")
    made = Course(course.store, load_task(folder), model=course.model_name)
    made.profile = course.profile
    return made


@pytest.fixture
def built(desk, tiny_onnx_folder):
    """Make an artifact of the tiny ONNX model; with other notes it is another bundle that answers the same."""

    def build(notes=""):
        def write(folder):
            shutil.copytree(tiny_onnx_folder, folder, dirs_exist_ok=True)
            (folder / "notes.txt").write_text(notes, "utf-8")

        return desk.store.build("onnx-tiny", settings={"notes": notes}, write=write).path

    return build


def evidence_folders(desk):
    return sorted(desk.store.root.glob("evidence-*"))


def test_evidence_holds_every_answer_and_what_it_cost_and_is_gathered_once(desk, built):
    found = gather_evidence(desk, built(), "tiny 1")
    assert [o.id for o in found.outcomes] == [e.id for e in desk.task.splits["test"]]
    assert [o.id for o in found.must_pass] == ["must-0", "must-1"]
    assert found.latency_s > 0
    assert found.memory_bytes > 0
    assert found.model_digest == bundle_digest(bundle_files(built()))
    before = evidence_folders(desk)
    assert gather_evidence(desk, built(), "tiny 1") == found
    assert evidence_folders(desk) == before


@pytest.mark.slow
def test_what_the_scoreboard_measured_is_not_measured_again(desk):
    folder = desk.onnx("int4-rtn").path
    found, speed = gather_evidence(desk, folder, "tiny 1"), desk.speed("student int4-rtn")
    assert (found.latency_s, found.memory_bytes) == (speed.latency_s, speed.memory_bytes)
    assert found.outcomes == desk.outcomes("student int4-rtn")
    assert [o.id for o in found.must_pass] == ["must-0", "must-1"]


def test_a_model_that_answers_nonsense_is_registered_and_refused(desk, built, tmp_path):
    registry = Registry(tmp_path / "registry")
    version = release(desk, registry, built())
    assert {check.name for check in version.report.failures} >= {"messages", "JSON validity", "must-pass messages"}
    assert version.lineage["artifact"] == built().name
    with pytest.raises(RegistryError, match="did not pass the gate"):
        registry.promote(version.name, version.number)


def test_a_candidate_is_compared_with_the_version_in_production_which_is_not_judged_again(desk, built, tmp_path):
    registry, folder = Registry(tmp_path / "registry"), built()
    digest = bundle_digest(bundle_files(folder))
    passed = GateReport("tiny_desk 1", None, "tiny_desk", "any", 6, digest, None, (Check("messages", "6", "6", True),))
    first = registry.register("tiny_desk", folder, lineage=lineage_of(folder), report=passed)
    registry.promote("tiny_desk", first.number)
    second = release(desk, registry, built("other notes"))
    assert second.number == 2
    assert second.report.current == "tiny_desk 1"
    assert second.report.current_digest == digest
    again = release(desk, registry, folder)
    assert (again.number, again.report) == (1, passed)


def test_an_unknown_device_is_refused_before_anything_is_measured(desk, built, tmp_path):
    with pytest.raises(GateError, match="There is no device 'toaster': expected one of laptop, phone, board"):
        release(desk, Registry(tmp_path / "registry"), built("toaster"), device="toaster")
    assert not (tmp_path / "registry").exists()


def test_a_task_without_must_pass_messages_is_judged_by_those_that_it_lends(course, built, tmp_path):
    assert not (course.task.folder / "must_pass.jsonl").exists()
    report = release(course, Registry(tmp_path / "registry"), built()).report
    (line,) = [check for check in report.checks if check.name == "must-pass messages"]
    assert f"of {len(must_pass_messages(course.task))} wrong" in line.found
