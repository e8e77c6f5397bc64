"""What stands on a channel: it is read as it was written, and nothing that could leave its folder is a release."""

import os
import stat

import pytest

from slmops_course.operations.offers import Release, UpdateError, read_offer, read_release, write_durably, write_offer

SHA = "09ab" * 16


def test_an_offer_is_read_as_it_was_written():
    release = Release("desk", 2, {"model.onnx": SHA})
    assert read_offer(write_offer(release, [3, 1])) == (release, (1, 3))
    assert release.digest != Release("desk", 3, {"model.onnx": SHA}).digest


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "desk 2 has no files: expected files with hashes"),
        ({"model.onnx": SHA[:-1]}, "has 'model.onnx' without a SHA-256"),
        ({"model.onnx": SHA.upper()}, "without a SHA-256"),
        ({"../model.onnx": SHA}, "'../model.onnx' may mean a place outside the bundle"),
        ({"/model.onnx": SHA}, "may mean a place outside"),
    ],
)
def test_what_is_no_release_is_refused(files, sentence):
    with pytest.raises(UpdateError, match=sentence):
        read_release({"name": "desk", "number": 2, "files": files})


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "folder" / "pointer"
    for text in (b"old", b"", b"new"):
        write_durably(path, text)
        assert path.read_bytes() == text
    assert os.listdir(path.parent) == ["pointer"]


def test_a_secret_is_for_its_owner_only(tmp_path):
    write_durably(tmp_path / "key", b"secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
