import doctest
import errno
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmops_course.artifacts import MANIFEST, ArtifactError, Store, check_artifact, code_digest, content_digest

WEIGHTS = bytes(range(256)) * 4


class CountingWrite:
    """A stage that writes two files and counts how often it was asked to."""

    def __init__(self):
        self.calls = 0

    def __call__(self, folder: Path):
        self.calls += 1
        (folder / "greeting.txt").write_text("hello", "utf-8")
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(WEIGHTS)
        return {"rows": 3}


def function_from(path: Path, source: str, name: str = "step"):
    """A function out of a source file, as the stages' functions are."""
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(f"written_by_a_test_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # inspect looks for a class's module there
    spec.loader.exec_module(module)
    return getattr(module, name)


def visible(root: Path) -> set[str]:
    """Every file and folder of a store, but not its locks."""
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if ".locks" not in p.parts}


# --- Same recipe, same artifact; another recipe, another one ---


def test_the_same_settings_and_inputs_are_built_once(tmp_path):
    write = CountingWrite()
    (tmp_path / "rows.txt").write_text("a", "utf-8")
    recipe = {"settings": {"rate": 0.1, "layers": 2}, "inputs": {"rows": tmp_path / "rows.txt"}, "write": write}

    store = Store(tmp_path / "store")
    first, second = store.build("train", **recipe), store.build("train", **recipe)
    in_a_later_process = Store(tmp_path / "store").build("train", **recipe)

    assert write.calls == 1
    assert first == second == in_a_later_process
    assert (first.path / "greeting.txt").read_text("utf-8") == "hello"


def test_the_order_of_settings_does_not_matter(tmp_path):
    write, store = CountingWrite(), Store(tmp_path)
    store.build("train", settings={"a": 1, "b": 2}, write=write)
    store.build("train", settings={"b": 2, "a": 1}, write=write)
    assert write.calls == 1


@pytest.mark.parametrize(
    ("stage", "settings", "rows"),
    [("score", {"rate": 0.1}, "a"), ("train", {"rate": 0.2}, "a"), ("train", {"rate": 0.1}, "b")],
    ids=["stage", "setting", "input"],
)
def test_another_stage_setting_or_input_is_another_artifact(tmp_path, stage, settings, rows):
    write, store = CountingWrite(), Store(tmp_path / "store")
    source = tmp_path / "rows.txt"
    source.write_text("a", "utf-8")
    before = store.build("train", settings={"rate": 0.1}, inputs={"rows": source}, write=write)

    source.write_text(rows, "utf-8")
    after = store.build(stage, settings=settings, inputs={"rows": source}, write=write)

    assert write.calls == 2
    assert after.path != before.path
    assert check_artifact(before.path) == []


def test_another_file_in_an_input_folder_is_another_artifact(tmp_path):
    write, store, folder = CountingWrite(), Store(tmp_path / "store"), tmp_path / "task"
    folder.mkdir()
    (folder / "a.txt").write_text("a", "utf-8")
    store.build("train", settings={}, inputs={"task": folder}, write=write)
    (folder / "b.txt").write_text("", "utf-8")
    store.build("train", settings={}, inputs={"task": folder}, write=write)
    assert write.calls == 2


def test_an_input_artifact_counts_by_its_contents_and_not_by_its_key(tmp_path):
    def teacher(size, text):
        return store.build("teacher", settings={"size": size}, write=lambda f: (f / "w").write_text(text) and None)

    write, store = CountingWrite(), Store(tmp_path)
    for source in (teacher(1, "same"), teacher(2, "same"), teacher(3, "other")):
        store.build("student", settings={}, inputs={"teacher": source}, write=write)

    assert write.calls == 2


def test_changed_code_is_another_artifact_and_a_changed_comment_is_not(tmp_path):
    write, store = CountingWrite(), Store(tmp_path / "store")
    step = function_from(tmp_path / "one.py", "def step(x):\n    return 2 * x\n")
    commented = function_from(tmp_path / "two.py", 'def step(x):\n    """Twice."""\n    return 2 * x  # fast\n')
    changed = function_from(tmp_path / "three.py", "def step(x):\n    return 3 * x\n")

    store.build("train", settings={}, code=(step,), write=write)
    store.build("train", settings={}, code=(commented,), write=write)
    assert write.calls == 1
    store.build("train", settings={}, code=(changed,), write=write)
    assert write.calls == 2


@pytest.mark.parametrize(
    ("source", "documented"),
    [
        ("def step(x):\n    return 2 * x\n", 'def step(x):\n    """Twice."""\n    # Why.\n    return (2\n      * x)\n'),
        ("def step(x):\n    pass\n", 'def step(x):\n    """Nothing yet."""\n'),
        ("async def step(x):\n    return x\n", 'async def step(x):\n    """It."""\n    return x\n'),
        (
            "class step:\n    def run(self):\n        return 1\n",
            'class step:\n    """A step."""\n\n    def run(self):\n        """One."""\n        return 1\n',
        ),
    ],
    ids=["function", "empty function", "async function", "class and method"],
)
def test_comments_docstrings_and_layout_are_not_code(tmp_path, source, documented):
    plain = function_from(tmp_path / "plain.py", source)
    assert code_digest(plain) == code_digest(function_from(tmp_path / "documented.py", documented))


@pytest.mark.parametrize(
    "changed", ["return 3 * x", "return x * 2", "x += 1\n    return 2 * x", "return '2' * x", "'no docstring' + x"]
)
def test_a_changed_statement_is_code(tmp_path, changed):
    step = function_from(tmp_path / "step.py", "def step(x):\n    return 2 * x\n")
    other = function_from(tmp_path / "other.py", f"def step(x):\n    {changed}\n")
    assert code_digest(step) != code_digest(other)


def test_a_missing_input_is_refused(tmp_path):
    write = CountingWrite()
    with pytest.raises(ArtifactError, match=r"no-such-file\.txt"):
        Store(tmp_path / "store").build(
            "train", settings={}, inputs={"rows": tmp_path / "no-such-file.txt"}, write=write
        )
    assert write.calls == 0


def test_settings_that_are_not_plain_json_are_refused(tmp_path):
    write = CountingWrite()
    with pytest.raises(TypeError):
        Store(tmp_path).build("train", settings={"folder": tmp_path}, write=write)
    assert write.calls == 0


# --- What is in an artifact ---


def test_the_manifest_records_what_the_artifact_was_made_of(tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("a", "utf-8")
    step = function_from(tmp_path / "step.py", "def step(x):\n    return 2 * x\n")
    artifact = Store(tmp_path / "store").build(
        "train", settings={"rate": 0.1}, inputs={"rows": rows}, code=(step,), write=CountingWrite()
    )

    manifest = artifact.json(MANIFEST)
    assert manifest == artifact.manifest
    assert manifest["settings"] == {"rate": 0.1}
    assert manifest["inputs"] == {"rows": content_digest(rows)}
    assert manifest["code"] == {"step": code_digest(step)}
    assert manifest["libraries"]["torch"][0].isdigit()
    assert set(manifest["files"]) == {"greeting.txt", "deep/weights.bin"}
    assert artifact.measured["rows"] == 3
    assert artifact.measured["duration_s"] >= 0
    assert artifact.size_bytes == len("hello") + len(WEIGHTS)


def test_equal_contents_have_equal_digests_whatever_was_measured(tmp_path):
    def write(text, rows):
        def stage(folder):
            (folder / "a.txt").write_text(text, "utf-8")
            return {"rows": rows}

        return stage

    store = Store(tmp_path)
    one, two, three = (
        store.build(name, settings={}, write=write(text, rows))
        for name, text, rows in (("one", "same", 1), ("two", "same", 2), ("three", "other", 1))
    )
    assert one.digest == two.digest != three.digest


def test_the_documented_example_runs(tmp_path):
    names = {"Store": Store, "Path": lambda text: tmp_path / text}
    example = doctest.DocTestParser().get_doctest(Store.__doc__, names, "Store", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 3)


# --- Damage ---


def flip_a_bit(folder: Path):
    path = folder / "deep" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def truncate(folder: Path):
    (folder / "deep" / "weights.bin").write_bytes(WEIGHTS[:-1])


def empty_the_manifest_entry(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["files"]["greeting.txt"] = {}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


DAMAGE = {
    "a flipped bit": (flip_a_bit, "deep/weights.bin does not match its hash"),
    "a truncated file": (truncate, "deep/weights.bin has the wrong size"),
    "a missing file": (lambda folder: (folder / "greeting.txt").unlink(), "greeting.txt is missing"),
    "a missing folder": (lambda folder: shutil.rmtree(folder / "deep"), "deep/weights.bin is missing"),
    "an extra file": (lambda folder: (folder / "x.tmp").touch(), "x.tmp is not in its manifest"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no readable manifest.json"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"files"'), "no readable manifest.json"),
    "a manifest of zeros": (lambda folder: (folder / MANIFEST).write_bytes(bytes(99)), "no readable manifest.json"),
    "a manifest that is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "no readable manifest.json"),
    "a manifest without hashes": (empty_the_manifest_entry, "no readable manifest.json"),
    "a manifest with a list of files": (
        lambda folder: (folder / MANIFEST).write_text('{"files": []}'),
        "no readable manifest.json",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_artifact_built_again(tmp_path, caplog, damage, sentence):
    write = CountingWrite()
    whole = Store(tmp_path).build("train", settings={}, write=write)
    damage(whole.path)

    problems = check_artifact(whole.path)
    assert len(problems) == 1
    assert problems[0].startswith(whole.path.name)
    assert sentence in problems[0]

    caplog.set_level("WARNING", logger="slmops_course")
    again = Store(tmp_path).build("train", settings={}, write=write)
    assert [record.message for record in caplog.records] == [f"{problems[0]}; it is built again"]
    assert write.calls == 2
    assert check_artifact(again.path) == []
    assert again.digest == whole.digest


def test_every_problem_is_named(tmp_path):
    whole = Store(tmp_path).build("train", settings={}, write=CountingWrite())
    flip_a_bit(whole.path)
    (whole.path / "greeting.txt").unlink()
    (whole.path / "x.tmp").touch()
    assert len(check_artifact(whole.path)) == 3


def test_a_whole_artifact_has_no_problem_and_logs_none(tmp_path, caplog):
    caplog.set_level("WARNING", logger="slmops_course")
    for _ in range(2):
        artifact = Store(tmp_path).build("train", settings={}, write=CountingWrite())
    assert check_artifact(artifact.path) == []
    assert not caplog.records


def test_a_folder_that_is_not_there_has_no_manifest(tmp_path):
    assert "no readable manifest.json" in check_artifact(tmp_path / "nothing")[0]


def test_any_damaged_byte_of_a_manifest_gives_a_list_and_no_exception(tmp_path):
    folder = Store(tmp_path).build("train", settings={}, write=CountingWrite()).path
    text = (folder / MANIFEST).read_bytes()
    start = text.index(b'"files"')
    files = json.loads(text)["files"]
    for position in range(start, text.index(b'"inputs"')):
        damaged = bytearray(text)
        damaged[position] ^= 1
        (folder / MANIFEST).write_bytes(damaged)
        try:
            harmless = json.loads(damaged)["files"] == files  # a space became another one
        except (ValueError, KeyError):
            harmless = False
        assert bool(check_artifact(folder)) != harmless


def test_a_manifest_lost_while_the_store_is_open_is_noticed(tmp_path):
    write, store = CountingWrite(), Store(tmp_path)
    artifact = store.build("train", settings={}, write=write)
    (artifact.path / MANIFEST).unlink()
    store.build("train", settings={}, write=write)
    assert write.calls == 2


# --- A stage that fails ---


@pytest.mark.parametrize("error", [ValueError("no such layer"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
def test_an_error_passes_as_it_is_and_leaves_nothing_behind(tmp_path, error):
    def fail(folder):
        (folder / "half.bin").write_bytes(WEIGHTS)
        raise error

    store = Store(tmp_path)
    earlier = store.build("teacher", settings={}, write=CountingWrite())
    before = visible(tmp_path)

    with pytest.raises(type(error)) as caught:
        store.build("student", settings={}, write=fail)

    assert caught.value is error
    assert visible(tmp_path) == before
    assert check_artifact(earlier.path) == []


def test_a_stage_that_failed_can_be_asked_for_again(tmp_path):
    def fail(folder):
        raise ValueError

    write, store = CountingWrite(), Store(tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        store.build("train", settings={}, write=fail)
    assert check_artifact(store.build("train", settings={}, write=write).path) == []
    assert write.calls == 1


def report_a_full_disk(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def report_an_exceeded_quota(folder):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def report_a_full_disk_as_text(folder):
    raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")


def write_to_a_full_device(folder):
    Path("/dev/full").write_text("hello", "utf-8")


@pytest.mark.parametrize(
    "write",
    [
        report_a_full_disk,
        report_an_exceeded_quota,
        report_a_full_disk_as_text,
        pytest.param(
            write_to_a_full_device,
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="This system has no /dev/full."),
        ),
    ],
)
def test_a_full_disk_is_one_sentence_that_names_the_stage_and_the_next_step(tmp_path, write):
    store = Store(tmp_path)
    earlier = store.build("teacher", settings={}, write=CountingWrite())
    before = visible(tmp_path)

    with pytest.raises(ArtifactError) as caught:
        store.build("student", settings={}, write=write)

    sentence = str(caught.value)
    assert str(tmp_path) in sentence
    assert "student could not be written" in sentence
    assert "run the same command again" in sentence
    assert sentence.count(". ") == 0
    assert visible(tmp_path) == before
    assert check_artifact(earlier.path) == []


def test_a_disk_that_really_fills_up_keeps_what_it_had(small_disk):
    store = Store(small_disk)
    earlier = store.build("teacher", settings={}, write=CountingWrite())
    before = visible(small_disk)

    with pytest.raises(ArtifactError, match="is full"):
        store.build("student", settings={}, write=lambda folder: (folder / "w").write_bytes(bytes(1 << 20)) and None)

    assert visible(small_disk) == before
    assert check_artifact(earlier.path) == []
    smaller = store.build("student", settings={}, write=CountingWrite())
    assert check_artifact(smaller.path) == []


# --- Several processes ---


def slow_build(root: Path, barrier, results):
    """Build one artifact slowly in a process of its own; note every start of `write` in a file beside the store."""

    def write(folder):
        with open(root / "starts.txt", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "first.bin").write_bytes(WEIGHTS)
        time.sleep(0.5)
        (folder / "second.bin").write_bytes(WEIGHTS)

    barrier.wait(60)
    artifact = Store(root / "store").build("train", settings={}, write=write)
    results.put((artifact.digest, check_artifact(artifact.path), sorted(p.name for p in artifact.path.iterdir())))


def test_two_processes_that_ask_at_once_get_one_whole_artifact(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=slow_build, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    one, two = (results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)

    assert len((tmp_path / "starts.txt").read_text("utf-8").splitlines()) == 1
    assert one == two
    assert one[1:] == ([], ["first.bin", MANIFEST, "second.bin"])
    assert [process.exitcode for process in processes] == [0, 0]


BUILD_FOREVER = """
import sys, time
from pathlib import Path
from slmops_course.artifacts import Store

def write(folder):
    (folder / "half.bin").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(600)

Store(Path(sys.argv[1])).build("train", settings={}, write=write)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL.")
def test_what_a_killed_process_left_does_not_disturb_the_next_build(tmp_path):
    with subprocess.Popen([sys.executable, "-c", BUILD_FOREVER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"writing"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    leftover = [path.name for path in tmp_path.glob("*.partial")]
    assert len(leftover) == 1

    artifact = Store(tmp_path).build("train", settings={}, write=CountingWrite())

    assert leftover[0].startswith(artifact.path.name)
    assert check_artifact(artifact.path) == []
    assert not list(tmp_path.glob("*.partial"))
