"""The registry in MLflow's own book: what is kept, what may be promoted, and the way back."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slmops_course.artifacts import ArtifactError, Store
from slmops_course.errors import CourseError
from slmops_course.network import ConnectionLog
from slmops_course.operations.book import Book, BookError, open_file
from slmops_course.operations.bundles import BundleError, bundle_digest, bundle_files
from slmops_course.operations.gate import Check, GateReport
from slmops_course.operations.lineage import format_lineage, lineage_of
from slmops_course.operations.registry import TAG_CHARS, Registry
from slmops_course.operations.versions import Move, RegistryError, describe, standing, table

DAY = 86_400.0
STARTED = 1_785_542_400.0  # 2026-08-01


class Clock:
    """A day passes each time that it is read."""

    def __init__(self):
        self.now = STARTED

    def __call__(self):
        self.now += DAY
        return self.now


def make_bundle(tmp_path, content):
    folder = tmp_path / f"bundle-{content}"
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(str(content), "utf-8")
    (folder / "adapter" / "config.json").write_text("{}", "utf-8")
    (folder / "manifest.json").write_text('{"an artifact\'s": "own"}', "utf-8")
    return folder


def report(*, current="desk", passed=True, **values):
    checks = (Check("exact match", "80.0%", "at least 70.0%", True), Check("memory", "9 bytes", "at most 5 bytes", passed))
    return replace(GateReport("a candidate", current, "tiny_desk", "a watch", 516, None, None, checks), **values)


FIRST = report(current=None)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry", clock=Clock())


@pytest.fixture
def add(registry, tmp_path):
    """Registers and, if asked, promotes the next version of "desk"."""

    def register(content, *, promote=True, **options):
        version = registry.register(
            "desk", make_bundle(tmp_path, content), **({"lineage": {"data": "d"}, "report": report()} | options)
        )
        return registry.promote("desk", version.number) if promote else version

    return register


@pytest.fixture
def three(add):
    """Versions 1, 2 and 3, each promoted."""
    return [add(n, report=FIRST if n == 1 else report()) for n in (1, 2, 3)]


# --- Keeping versions ---


def test_a_version_outlives_the_folder_that_it_was_made_from(registry, add, tmp_path):
    version = add("a", promote=False, lineage={"data": {"train": "9f"}, "recipe": "int8"}, report=FIRST)
    shutil.rmtree(tmp_path / "bundle-a")
    again = Registry(tmp_path / "registry").get("desk", 1)
    assert again == version
    assert (again.name, again.number, again.aliases, again.report) == ("desk", 1, (), FIRST)
    assert again.lineage == {"data": {"train": "9f"}, "recipe": "int8"}
    assert sorted(again.files) == ["adapter/config.json", "model.safetensors"]
    assert bundle_files(again.folder) == again.files
    assert again.registered_at == "2026-08-02T00:00:00+00:00"
    assert registry.verify(again) == []


def test_the_same_files_and_lineage_again_are_the_same_version(registry, add):
    first = add("a", promote=False)
    assert add("a", promote=False) == first
    assert add("a", promote=False, report=None) == first
    assert add("a", promote=False, lineage={"data": "other"}).number == 2
    assert add("b", promote=False).number == 3
    assert [version.number for version in registry.versions("desk")] == [1, 2, 3]
    assert registry.names() == ["desk"]


def test_a_report_may_come_later_and_is_stored_with_the_version(registry, add):
    assert add("a", promote=False, report=None).report is None
    assert add("a", promote=False, report=FIRST).report == FIRST
    assert registry.get("desk", 1).report == FIRST


def test_a_report_on_other_files_is_refused(registry, add, tmp_path):
    files = bundle_files(make_bundle(tmp_path, "a"))
    with pytest.raises(RegistryError, match="The gate report is about other files than those in bundle-a"):
        add("a", report=report(model_digest="0" * 64))
    assert registry.versions("desk") == []
    assert add("a", report=replace(FIRST, model_digest=bundle_digest(files))).number == 1


def test_files_that_may_not_be_released_are_refused_and_nothing_is_registered(registry, tmp_path):
    folder = make_bundle(tmp_path, "a")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'optimizer\.pt' is a pickle"):
        registry.register("desk", folder, lineage={})
    (folder / "optimizer.pt").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="symbolic link"):
        registry.register("desk", folder, lineage={})
    with pytest.raises(BundleError, match="There is no bundle"):
        registry.register("desk", tmp_path / "nowhere", lineage={})
    assert registry.names() == []


@pytest.mark.parametrize(
    "lineage", [{"at": object()}, {"loss": float("nan")}, {"text": "x" * TAG_CHARS}], ids=["object", "nan", "long"]
)
def test_a_lineage_that_cannot_be_kept_is_refused(registry, add, lineage):
    with pytest.raises(RegistryError, match=r"no plain JSON|takes 100,.* characters"):
        add("a", lineage=lineage)
    assert registry.names() == []


# --- Promotion ---


def test_a_promoted_version_is_found_by_its_alias(registry, add):
    assert add("a", report=FIRST).aliases == ("production",)
    assert add("b").aliases == ("production",)
    assert registry.get("desk").number == registry.get("desk", "production").number == registry.get("desk", 2).number == 2
    assert registry.get("desk", "1").aliases == ()
    assert registry.promote("desk", 1, alias="canary").aliases == ("canary",)
    assert registry.get("desk").number == 2


def test_promoting_what_is_in_production_changes_nothing(registry, three):
    before = registry.history("desk")
    assert registry.promote("desk", 3) == registry.get("desk")
    assert registry.history("desk") == before


def test_without_a_passed_gate_report_nothing_is_promoted(registry, add):
    add("a", report=None, promote=False)
    with pytest.raises(RegistryError, match="desk 1 has no gate report: expected one that passed"):
        registry.promote("desk", 1)
    add("b", report=report(passed=False), promote=False)
    with pytest.raises(RegistryError, match=r"desk 2 did not pass the gate \(memory: 9 bytes, expected at most 5 bytes\)"):
        registry.promote("desk", 2)
    add("c", report=report(checks=()), promote=False)
    with pytest.raises(RegistryError, match=r"desk 3 did not pass the gate \(no line was judged\)"):
        registry.promote("desk", 3)
    assert [version.aliases for version in registry.versions("desk")] == [(), (), ()]


def test_a_candidate_must_have_been_compared_with_the_version_that_it_is_to_follow(registry, add):
    first = add("a", report=FIRST)
    add("b", report=FIRST, promote=False)
    with pytest.raises(RegistryError, match="desk 2 was judged as a first release, but it is to follow desk 1"):
        registry.promote("desk", 2)
    against_first = report(current_digest=bundle_digest(first.files))
    add("b", report=against_first)
    add("c", report=against_first, promote=False)
    with pytest.raises(RegistryError, match="desk 3 was judged against desk, but it is to follow desk 2"):
        registry.promote("desk", 3)
    registry.rollback("desk")
    assert registry.promote("desk", 3).aliases == ("production",)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "model.safetensors").write_text("b", "utf-8"), "model.safetensors was changed"),
        (lambda folder: (folder / "adapter" / "config.json").unlink(), "adapter/config.json is missing"),
        (lambda folder: (folder / "adapter" / "extra.json").write_text("", "utf-8"), "adapter/extra.json was added"),
        (shutil.rmtree, "model.safetensors is missing"),
    ],
)
def test_a_damaged_version_is_named_and_not_promoted_until_the_same_files_mend_it(registry, add, damage, named):
    version = add("a", report=FIRST, promote=False)
    damage(version.folder)
    assert named in registry.verify(version)
    with pytest.raises(RegistryError, match=f"desk 1 is damaged .*{named}.*register the same files again, which mends it"):
        registry.promote("desk", 1)
    assert f"DAMAGED: {'; '.join(registry.verify(version))}." in describe(version)
    add("a", report=FIRST)
    assert registry.verify(registry.get("desk")) == []


def test_a_record_that_was_changed_in_the_book_is_found(registry, add):
    version = add("a", report=FIRST, promote=False)
    registry._book.ask("set_model_version_tag", "desk", "1", "slmops.lineage", '{"data": "better"}')
    assert registry.verify(registry.get("desk", 1)) == ["what the registry knows of it was changed"]
    assert registry.verify(version) == []
    with pytest.raises(RegistryError, match="what the registry knows of it was changed"):
        registry.promote("desk", 1)


# --- The way back ---


def test_a_rollback_goes_back_one_version_and_two_go_back_two(registry, three):
    assert registry.rollback("desk").number == 2
    assert registry.rollback("desk").number == 1
    assert registry.get("desk").number == 1
    with pytest.raises(RegistryError, match="desk 1 has no whole version before it as production"):
        registry.rollback("desk")
    assert registry.get("desk").number == 1


def test_after_a_rollback_the_bad_version_is_not_gone_back_to(registry, add, three):
    registry.rollback("desk")
    add("four")
    assert registry.rollback("desk").number == 2
    assert registry.rollback("desk").number == 1


def test_a_damaged_version_is_not_gone_back_to(registry, three, caplog):
    (three[1].folder / "model.safetensors").write_text("worse", "utf-8")
    with caplog.at_level(logging.WARNING, "slmops_course"):
        assert registry.rollback("desk").number == 1
    assert caplog.messages == ["desk 2 is damaged (model.safetensors was changed); going back further"]


def test_going_back_never_ends_where_it_began(registry, add):
    add("a", report=FIRST)
    bad = add("b")
    add("a")  # released again, now with a report that compares it with the other
    (bad.folder / "model.safetensors").write_text("worse", "utf-8")
    with pytest.raises(RegistryError, match="desk 1 has no whole version before it"):
        registry.rollback("desk")
    assert len(registry.history("desk")) == 3


def test_there_is_no_way_back_from_a_first_version_or_an_alias_that_nothing_has(registry, add):
    add("a", report=FIRST)
    with pytest.raises(RegistryError, match="expected one to go back to; promote a good one"):
        registry.rollback("desk")
    with pytest.raises(RegistryError, match="desk has no version 'canary': expected one of 1, production"):
        registry.rollback("desk", alias="canary")


def test_every_alias_has_its_own_way_back(registry, three):
    registry.promote("desk", 3, alias="canary")
    registry.promote("desk", 2, alias="canary")
    assert registry.rollback("desk", alias="canary").number == 3
    assert registry.get("desk").number == 3
    assert len(registry.history("desk")) == 3


def test_the_history_tells_when_what_was_moved_where(registry, three):
    registry.rollback("desk")
    assert registry.history("desk") == [
        Move("2026-08-03T00:00:00+00:00", "promote", None, 1),
        Move("2026-08-05T00:00:00+00:00", "promote", 1, 2),
        Move("2026-08-07T00:00:00+00:00", "promote", 2, 3),
        Move("2026-08-08T00:00:00+00:00", "rollback", 3, 2),
    ]


@pytest.mark.parametrize(("action", "after"), [("promote", 2), ("rollback", 1)])
def test_a_move_that_a_power_cut_left_undone_counts_as_none(registry, add, three, action, after):
    """The move is noted first and the alias set last: here it is noted, and the power fails."""
    number = {"promote": 4, "rollback": 2}[action]
    add("four", promote=False)
    move = json.dumps({"at": "2026-09-01T00:00:00+00:00", "action": action, "before": 3, "after": number})
    registry._book.ask("set_registered_model_tag", "desk", "slmops.move.production.000004", move)
    assert len(registry.history("desk")) == 3
    assert registry.rollback("desk").number == 2
    assert [move.after for move in registry.history("desk")] == [1, 2, 3, 2]
    assert registry.promote("desk", 4).number == 4
    assert registry.rollback("desk").number == 2


def test_an_alias_that_something_else_moved_can_be_rolled_back(registry, add, three):
    add("four", promote=False)
    add("five", promote=False)
    client = Book(registry._book.uri)
    client.ask("set_registered_model_alias", "desk", "production", "4")
    assert registry.rollback("desk").number == 3
    client.ask("set_registered_model_alias", "desk", "production", "4")
    registry.promote("desk", 5)
    assert registry.rollback("desk").number == 4
    client.ask("delete_registered_model_alias", "desk", "production")
    with pytest.raises(RegistryError, match="has no version 'production'"):
        registry.rollback("desk")


def test_a_version_that_was_deleted_is_passed_over(registry, three):
    registry._book.ask("delete_model_version", "desk", "2")
    assert registry.rollback("desk").number == 1


def test_the_versions_that_stand_are_those_that_were_not_rolled_back():
    def moves(*steps):
        return [Move("", action, before, after) for action, before, after in steps]

    up = [("promote", None, 1), ("promote", 1, 2), ("promote", 2, 3)]
    assert standing([], 1) == [1]
    assert standing(moves(*up), 3) == [1, 2, 3]
    assert standing(moves(*up, ("rollback", 3, 2)), 2) == [1, 2]
    assert standing(moves(*up, ("rollback", 3, 1)), 1) == [1]
    assert standing(moves(*up, ("promote", 3, 1)), 1) == [1, 2, 3, 1]
    assert standing(moves(*up, ("promote", 7, 8)), 8) == [1, 2, 3, 7, 8]
    assert standing(moves(*up), 9) == [1, 2, 3, 9]


# --- Names, and what is not there ---


@pytest.mark.parametrize(
    "name",
    [
        "", "a b", "../desk", "/desk", "desk/2", "desk:2", "desk'--", "मेज़", "a" * 61, "latest", "LATEST", "v2", "7", "-x",
        "desk\n", None,
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_refused_everywhere(registry, tmp_path, name):
    with pytest.raises(RegistryError, match="cannot be the name of a model: expected letters, digits"):
        registry.register(name, make_bundle(tmp_path, "a"), lineage={})
    with pytest.raises(RegistryError, match="cannot be the name of a model"):
        registry.get(name)
    with pytest.raises(RegistryError, match="cannot be the name of an alias"):
        registry.promote("desk", 1, alias=name)
    with pytest.raises(RegistryError, match="cannot be the name of an alias"):
        registry.rollback("desk", alias=name)
    assert not (tmp_path / "registry").exists()


def test_what_is_not_there_is_named_with_what_is(registry, add):
    add("a", report=FIRST)
    with pytest.raises(RegistryError, match=r"There is no model 'till': expected one of those registered \(desk\)"):
        registry.get("till")
    for act in (registry.get, registry.promote):
        with pytest.raises(RegistryError, match=r"desk has no version '9': expected one of 1, production\."):
            act("desk", 9)
    with pytest.raises(RegistryError, match="desk has no version 'canary'"):
        registry.history("desk", alias="canary")


def test_looking_into_a_registry_that_is_not_there_makes_none(tmp_path):
    registry = Registry(tmp_path / "registry")
    assert (registry.names(), registry.versions("desk"), table([])) == ([], [], "")
    with pytest.raises(RegistryError, match=r"There is no model 'desk': expected one of those registered \(none yet\)"):
        registry.get("desk")
    assert list(tmp_path.iterdir()) == []


def test_versions_that_something_else_registered_are_left_alone(registry, add):
    add("a", report=FIRST)
    registry._book.ask("create_model_version", "desk", "s3://somewhere/else")
    registry._book.ask("create_model_version", "desk", "s3://evil", tags={"slmops.digest": "../../.."})
    assert [version.number for version in registry.versions("desk")] == [1]


def test_a_book_that_is_damaged_is_one_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(BookError, match=r"file is not a database\): expected a registry that answers"):
        Registry(tmp_path).names()


def test_a_folder_whose_name_mlflow_cannot_address_is_refused(tmp_path):
    for name in ("what?", "100%41"):
        with pytest.raises(BookError, match=r"has a \? or % in it"):
            Registry(tmp_path / name).register("desk", make_bundle(tmp_path, "a"), lineage={})
        assert not (tmp_path / name).exists()


def test_a_book_that_another_process_made_meanwhile_is_not_written_over(tmp_path):
    @contextlib.contextmanager
    def lock():
        Registry(tmp_path / "theirs").register("desk", make_bundle(tmp_path, "a"), lineage={})
        shutil.copy(tmp_path / "theirs" / "mlflow.db", tmp_path / "mlflow.db")
        yield

    assert [model.name for model in open_file(tmp_path / "mlflow.db", lock()).ask("search_registered_models")] == ["desk"]


def test_on_a_full_disk_nothing_is_registered(tmp_path, small_disk):
    with pytest.raises(BookError, match=r"mlflow\.db cannot be written \(No space left on device\): expected room"):
        Registry(small_disk).register("desk", make_bundle(tmp_path, "a"), lineage={})
    assert [path.name for path in small_disk.iterdir() if path.name != ".lock"] == []


def test_a_registry_where_a_file_is_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written"):
        Registry(tmp_path / "file" / "registry").register("desk", make_bundle(tmp_path, "a"), lineage={})


# --- For a person ---


def test_a_version_and_the_table_of_all_are_read_by_a_person(registry, add):
    first = add("a", report=FIRST)
    add("b", report=report(passed=False), promote=False, lineage={"artifact": "onnx-int8-5978c58fc582"})
    add("c", report=None, promote=False)
    assert table(registry.versions("desk")).splitlines() == [
        "| model | version | aliases | gate | registered | made by |",
        "|---|---:|---|---|---|---|",
        "| desk | 1 | production | passed | 2026-08-02T00:00:00+00:00 |  |",
        "| desk | 2 |  | refused | 2026-08-04T00:00:00+00:00 | onnx-int8-5978c58fc582 |",
        "| desk | 3 |  | none | 2026-08-05T00:00:00+00:00 |  |",
    ]
    text = describe(first)
    assert text.startswith("# desk 1\n\nRegistered 2026-08-02T00:00:00+00:00; aliases: production.\n\n| file | bytes |")
    assert "| adapter/config.json | 2 | 44136fa355b3… |" in text
    assert "All files are as they were registered." in text
    assert '## Lineage\n\n{\n "data": "d"\n}' in text
    assert text.endswith(str(FIRST))
    assert describe(registry.get("desk", 3)).endswith("There is no gate report.")


def test_lineage_is_read_from_the_manifests_of_artifacts(tmp_path):
    store = Store(tmp_path / "artifacts")
    train = tmp_path / "train.jsonl"
    train.write_text("{}")

    def write(folder):
        (folder / "a.txt").write_text(folder.name)

    base = store.build("base", settings={}, write=write)
    teacher = store.build("teacher", settings={"epochs": 3}, inputs={"base": base, "train": train}, write=write)
    student = store.build("student", settings={}, inputs={"source": base, "teacher": teacher}, write=write, code=(write,))
    store.build("unrelated", settings={}, inputs={"student": student}, write=write)
    lineage = lineage_of(student.path)
    assert lineage == lineage_of(student)
    assert lineage["artifact"] == student.path.name
    assert set(lineage["steps"]) == {part.path.name for part in (base, teacher, student)}
    step = lineage["steps"][teacher.path.name]
    assert step["inputs"] == {
        "base": base.path.name, "train": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }  # fmt: skip
    assert (step["settings"], step["sha256"]) == ({"epochs": 3}, teacher.digest)
    assert "torch" in step["libraries"]
    assert list(lineage["steps"][student.path.name]["code"]) == [write.__qualname__]
    assert format_lineage(json.loads(json.dumps(lineage, sort_keys=True))).splitlines() == [
        f"- {student.path.name} from source: {base.path.name}, teacher: {teacher.path.name}",
        f"- {base.path.name} from nothing else",
        f"- {teacher.path.name} from base: {base.path.name}, train: 44136fa355b3…",
    ]
    assert format_lineage({"steps": {}}) == '{\n "steps": {}\n}'


def test_a_lineage_whose_ancestor_is_gone_keeps_its_hash(tmp_path):
    store = Store(tmp_path)
    base = store.build("base", settings={}, write=lambda folder: {"n": (folder / "a").write_text("x")})
    student = store.build("student", settings={}, inputs={"base": base}, write=lambda folder: None)
    (base.path / "manifest.json").write_text("half a mani")
    assert lineage_of(student)["steps"][student.path.name]["inputs"] == {"base": base.digest}
    for text in ("{}", "[]", "half"):
        (student.path / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            lineage_of(student.path)
    with pytest.raises(ArtifactError, match=r"has no readable manifest\.json"):
        lineage_of(tmp_path / "nowhere")


# --- Processes, the screen, the network ---


@pytest.fixture(scope="module")
def processes():
    """Starts processes at once, as copies of one that has imported MLflow but opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", __name__])
    return context


def promote_by_turns(folder, first, barrier):
    registry = Registry(folder)
    registry.names()
    barrier.wait(120)
    for turn in range(8):
        registry.promote("desk", (turn + first) % 3 + 1)


def test_two_processes_that_promote_at_once_leave_one_unbroken_history(registry, add, three, processes):
    add(1, promote=False)  # with a report that compares it, so that it may follow the others
    barrier = processes.Barrier(2)
    workers = [processes.Process(target=promote_by_turns, args=(registry.folder, n, barrier)) for n in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0, 0]
    moves = registry.history("desk")
    assert all(later.before == earlier.after for earlier, later in itertools.pairwise(moves))
    assert moves[-1].after == registry.get("desk").number
    assert len(moves) > 8  # three were there, and a promotion of what is there already is none


def release_for_ever(folder, bundles, first, step_s):
    registry = Registry(folder)
    for turn in itertools.count(first):
        start = time.perf_counter()
        bundle = make_bundle(bundles, turn)
        (bundle / "model.safetensors").write_bytes(turn.to_bytes(2, "big") * 250_000)
        version = registry.register("desk", bundle, lineage={}, report=report() if turn else FIRST)
        registry.promote("desk", version.number)
        step_s.value = time.perf_counter() - start


@pytest.mark.slow
def test_killed_at_random_moments_the_registry_goes_on_with_whole_versions(registry, processes, tmp_path):
    rng, versions = random.Random(0), []
    for _ in range(12):
        step_s = processes.Value("d", 0)
        worker = processes.Process(target=release_for_ever, args=(registry.folder, tmp_path, len(versions), step_s))
        worker.start()
        while not step_s.value:
            time.sleep(0.005)
            assert worker.is_alive()
        time.sleep(rng.uniform(0, 2) * step_s.value)
        worker.kill()
        worker.join()
        before, versions = versions, registry.versions("desk")
        assert [version.digest for version in versions[: len(before)]] == [version.digest for version in before]
        assert [version.number for version in versions if registry.verify(version)] == []
        moves = registry.history("desk")
        assert moves[-1].after == registry.get("desk").number
        assert all(later.before == earlier.after for earlier, later in itertools.pairwise(moves))
    assert len(versions) >= 12
    assert registry.rollback("desk").number == moves[-1].before


def run(code, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(Path(__file__).parent.parent), *sys.path) if path)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


QUIET = """
import sys
from pathlib import Path
from slmops_course.operations.gate import GateReport
from slmops_course.operations.registry import Registry
registry = Registry(sys.argv[1])
registry.register("desk", Path(sys.argv[2]), lineage={}, report=GateReport.from_json(sys.argv[3]))
registry.promote("desk", 1)
assert registry.get("desk").number == 1
"""


def test_nothing_is_printed_and_nothing_written_beside_the_registry(tmp_path):
    (tmp_path / "cwd").mkdir()
    folder = tmp_path / "registry #1 ä&"
    assert run(QUIET, folder, make_bundle(tmp_path, "a"), FIRST.to_json(), cwd=tmp_path / "cwd") == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle-a", "cwd", "registry #1 ä&"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "files", "mlflow.db"]


def test_nothing_is_turned_to_over_the_network(registry, add):
    with ConnectionLog() as log:
        add("a", report=FIRST)
        add("b")
        registry.rollback("desk")
    assert log.all == []


WITHOUT_MLFLOW = """
import sys
from pathlib import Path
from slmops_course.errors import CourseError
from slmops_course.operations.registry import Registry
sys.modules["mlflow"] = None
try:
    Registry(sys.argv[1]).register("desk", Path(sys.argv[2]), lineage={})
except CourseError as error:
    print(error)
"""


def test_where_mlflow_is_not_installed_one_sentence_says_so(tmp_path):
    code, out, errors = run(WITHOUT_MLFLOW, tmp_path / "registry", make_bundle(tmp_path, "a"), cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert out.startswith("MLflow cannot be imported (")
    assert "pip install -c constraints.txt mlflow-skinny" in out


# --- A server ---


SERVER = """
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The handlers of MLflow's own server, on loopback; they need Flask, which the course does not."""
    pytest.importorskip("flask")
    folder = tmp_path_factory.mktemp("server")
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/server.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{folder}/server.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
            stderr=log,
        )  # fmt: skip
    port = process.stdout.readline().strip()
    assert port, (folder / "log").read_text()
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_the_same_calls_reach_an_mlflow_server(server, tmp_path, capfd):
    registry = Registry(tmp_path / "here", uri=server, clock=Clock())
    assert registry.names() == []
    for n in (1, 2, 3):
        kept = registry.register("desk", make_bundle(tmp_path, n), lineage={"n": n}, report=FIRST if n == 1 else report())
        assert registry.register("desk", make_bundle(tmp_path, n), lineage={"n": n}) == kept
        registry.promote("desk", n)
    assert [registry.rollback("desk").number for _ in range(2)] == [2, 1]
    with pytest.raises(RegistryError, match="no whole version before it"):
        registry.rollback("desk")
    elsewhere = Registry(tmp_path / "there", uri=server)  # another machine: its folder is empty
    assert elsewhere.history("desk") == registry.history("desk")
    fetched = elsewhere.get("desk")
    assert (fetched.number, elsewhere.verify(fetched), fetched.lineage) == (1, [], {"n": 1})
    assert bundle_files(fetched.folder) == kept.files | {"model.safetensors": fetched.files["model.safetensors"]}
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_what_a_server_says_of_a_versions_files_is_not_trusted(server, tmp_path):
    registry = Registry(tmp_path / "here", uri=server)
    registry.register("evil", make_bundle(tmp_path, "a"), lineage={})
    for files in ('{"../../../escaped.json": "00"}', '{"model.safetensors": "00"}'):
        registry._book.ask("set_model_version_tag", "evil", "1", "slmops.files", files)
        with pytest.raises(CourseError, match=r"place outside|was changed while it was copied"):
            Registry(tmp_path / "there", uri=server).get("evil", 1)
    assert [path for path in (tmp_path / "there").rglob("*") if path.is_file() and path.name != ".lock"] == []


@pytest.mark.slow
def test_a_pickle_that_a_server_gives_is_not_kept(server, tmp_path):
    registry = Registry(tmp_path / "here", uri=server)
    registry.register("odd", make_bundle(tmp_path, "a"), lineage={})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "optimizer.pt").write_bytes(b"")
    run_id = registry._book.ask("get_model_version", "odd", "1").run_id
    registry._book.ask("log_artifacts", run_id, str(tmp_path / "more"), "model")
    files = json.dumps({**registry.get("odd", 1).files, **bundle_files(tmp_path / "more")})
    registry._book.ask("set_model_version_tag", "odd", "1", "slmops.files", files)
    with pytest.raises(BundleError, match=r"'optimizer\.pt' is a pickle"):
        Registry(tmp_path / "there", uri=server).get("odd", 1)
    assert not list((tmp_path / "there").rglob("optimizer.pt"))


def test_a_server_that_is_not_there_is_one_sentence_and_soon(tmp_path):
    start = time.monotonic()
    with pytest.raises(BookError, match=r"MLflow's \w+ failed at http://127\.0\.0\.1:9 .*expected a registry that answers"):
        Registry(tmp_path, uri="http://127.0.0.1:9").names()
    assert time.monotonic() - start < 30


def test_threads_of_one_process_may_make_registries_at_once(tmp_path):
    found = []

    def make(n):
        version = Registry(tmp_path / f"registry-{n % 2}").register("desk", make_bundle(tmp_path, n), lineage={})
        found.append((n % 2, version.number))

    threads = [threading.Thread(target=make, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [(0, 1), (0, 2), (1, 1), (1, 2)]
