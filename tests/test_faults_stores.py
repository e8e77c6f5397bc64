import shutil

import pytest

from slmops_course.artifacts import Store
from slmops_course.faults.stages import FaultError
from slmops_course.faults.stores import PAGE_BYTES, fill_disk, flip_bits, flipped, jump_clock, write_files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    for number in range(2):
        Store(root).build("stage", settings={"number": number}, write=write_files)
    return root


@pytest.fixture
def store(built, tmp_path):
    """A store of two artifacts that a test may damage."""
    return shutil.copytree(built, tmp_path / "store")


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_flipped_in_any_file_is_noticed(store, seed):
    trial = flip_bits(store, seed=seed, manifest_flips=50)
    assert trial.lost == []
    assert trial.tried == {"in a file": 8, "in a manifest": 100}


def test_a_check_that_sees_nothing_or_names_another_file_loses_every_file(store):
    for blind in (lambda folder: [], lambda folder: ["another file"]):
        lost = flip_bits(store, manifest_flips=0, check=blind).lost
        assert len(lost) == 8


def test_a_flipped_bit_is_flipped_back(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00\x00")
    with flipped(tmp_path / "a", 9):
        assert (tmp_path / "a").read_bytes() == b"\x00\x02"
    assert (tmp_path / "a").read_bytes() == b"\x00\x00"


def test_no_store_no_flips(tmp_path):
    assert (flip_bits(tmp_path).tried, flip_bits(tmp_path).lost) == ({}, [])


def test_finished_artifacts_stay_valid_whatever_the_clock_says(store):
    def never(folder):
        raise AssertionError("it was built again")

    assert jump_clock(store).lost == []
    assert jump_clock(store).tried == {"to 1970": 1, "to 2100": 1}
    Store(store).build("stage", settings={"number": 0}, write=never)


def test_damage_is_seen_through_a_jump_of_the_clock(store):
    next(store.glob("*/rows.jsonl")).write_text("[]", "utf-8")
    assert len(jump_clock(store).lost) == 2


@pytest.fixture
def disk(tmp_path):
    """A folder for small disks, where they may be mounted."""
    from slmops_course.faults.stores import small_disk

    try:
        with small_disk(tmp_path / "probe", PAGE_BYTES):
            pass
    except FaultError as error:
        pytest.skip(str(error))
    return tmp_path / "disks"


def test_a_disk_that_fills_up_at_any_write_is_one_sentence_and_harms_nothing(disk):
    trial = fill_disk(disk, step_bytes=4 * PAGE_BYTES)
    assert trial.lost == []
    assert trial.tried["fitted"] == 1
    assert trial.tried["refused in a sentence"] > 2


def test_an_error_of_another_kind_is_a_loss_and_so_is_a_disk_that_is_never_large_enough(disk):
    calls = []

    def write(folder):
        calls.append(folder)
        if folder.name.startswith("later"):
            raise ZeroDivisionError("no sentence")
        (folder / "a").write_bytes(bytes(10 * PAGE_BYTES))

    lost = fill_disk(disk, step_bytes=8 * PAGE_BYTES, write=write).lost
    assert "ZeroDivisionError in place of a sentence: no sentence" in lost
    assert "with 0 bytes free, then more: the next request failed" in lost
    assert lost[-1] == "it was never large enough"


def write_as_onnx_writers_do(folder):
    import numpy as np

    np.zeros((40, 64), dtype=np.float32).tofile(folder / "model.onnx.data")


def test_a_disk_that_fills_up_under_numpy_is_the_same_sentence(disk):
    assert fill_disk(disk, step_bytes=512 + PAGE_BYTES, write=write_as_onnx_writers_do).lost == []
