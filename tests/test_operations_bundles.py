"""Bundles from outside: what could run code, reach another place or fill a disk is refused, and leaves nothing behind."""

import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

import pytest

from slmops_course.operations import bundles
from slmops_course.operations.bundles import (
    BundleError,
    bundle_digest,
    bundle_files,
    check_bundle,
    check_names,
    compare_files,
    copy_bundle,
    is_pickle,
    unpack_bundle,
)

FILES = {"config.json": b"{}", "model.safetensors": b"\x02" * 3000, "adapter/adapter.safetensors": b"\x03" * 10}


class Harm:
    """A pickle of it makes a file when it is loaded; no test loads one."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def refused(tmp_path):
    """Unpacks an archive and expects a refusal that leaves nothing behind, neither in the new folder nor beside it."""

    def unpack(archive, complaint, **limits):
        outside = {path for path in tmp_path.parent.iterdir() if path != tmp_path}
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BundleError, match=complaint):
            unpack_bundle(archive, tmp_path / "out" / "model", **limits)
        (tmp_path / "out").rmdir()
        assert sorted(tmp_path.rglob("*")) == before
        assert {path for path in tmp_path.parent.iterdir() if path != tmp_path} == outside

    return unpack


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name  # the constructor would clean the name
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def make_tar(path, files, *, kind=tarfile.REGTYPE, link="", mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- Hashes and copies ---


def test_a_bundle_is_known_by_the_hashes_of_its_files(bundle):
    files = bundle_files(bundle)
    assert list(files) == ["config.json", "model.safetensors", "adapter/adapter.safetensors"]
    assert files["config.json"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    digest = bundle_digest(files)
    assert bundle_digest(dict(reversed(files.items()))) == digest
    (bundle / "config.json").write_bytes(b"[]")
    assert bundle_digest(bundle_files(bundle)) != digest


def test_an_artifacts_manifest_is_no_part_of_its_bundle(bundle):
    files = bundle_files(bundle)
    (bundle / "manifest.json").write_bytes(b"{}")
    assert bundle_files(bundle) == files
    assert bundle_files(bundle / "nowhere") == {}


def test_changed_missing_and_added_files_are_named(bundle):
    files = bundle_files(bundle)
    assert compare_files(bundle, files) == []
    (bundle / "model.safetensors").write_bytes(b"\x02" * 2999 + b"\x03")
    (bundle / "config.json").unlink()
    (bundle / "adapter" / "new.json").write_bytes(b"{}")
    assert compare_files(bundle, files) == [
        "config.json is missing", "adapter/new.json was added", "model.safetensors was changed",
    ]  # fmt: skip


def test_a_link_to_the_same_bytes_is_a_change(bundle, tmp_path):
    files = bundle_files(bundle)
    (bundle / "config.json").rename(tmp_path / "elsewhere.json")
    (bundle / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert compare_files(bundle, files) == ["config.json was changed"]


def test_a_copy_is_there_whole_or_not_at_all(bundle, tmp_path):
    files, place = bundle_files(bundle), tmp_path / "kept" / "one"
    copy_bundle(bundle, place, files)
    assert compare_files(place, files) == []
    (bundle / "config.json").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"config\.json was changed while it was copied"):
        copy_bundle(bundle, place, files)
    (bundle / "config.json").unlink()
    with pytest.raises(BundleError, match="could not be copied"):
        copy_bundle(bundle, place, files)
    assert compare_files(place, files) == []
    assert [path.name for path in place.parent.iterdir()] == ["one"]


def test_a_full_disk_leaves_no_half_bundle(bundle, small_disk):
    (bundle / "model.safetensors").write_bytes(bytes(400_000))
    with pytest.raises(BundleError, match=r"could not be copied to .* \(No space left on device\): expected room"):
        copy_bundle(bundle, small_disk / "one", bundle_files(bundle))
    assert list(small_disk.iterdir()) == []


# --- What may be in a folder ---


def test_plain_files_are_a_bundle(bundle):
    check_bundle(bundle)


def test_an_empty_folder_a_file_and_nothing_are_none(bundle, tmp_path):
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(BundleError, match="is empty"):
        check_bundle(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="is empty"):
        check_bundle(tmp_path / "empty")
    (tmp_path / "link").symlink_to(bundle)
    for path in (bundle / "config.json", tmp_path / "nowhere", tmp_path / "link"):
        with pytest.raises(BundleError, match="There is no bundle"):
            check_bundle(path)


def test_links_and_pipes_are_refused_wherever_they_point(bundle, tmp_path):
    for name, target in (("a.json", "/etc/passwd"), ("b.json", "config.json"), ("c", tmp_path), ("d", "nowhere")):
        (bundle / "adapter" / name).symlink_to(target)
        with pytest.raises(BundleError, match=f"'adapter/{name}' is a symbolic link"):
            check_bundle(bundle)
        (bundle / "adapter" / name).unlink()
    os.mkfifo(bundle / "pipe.json")
    with pytest.raises(BundleError, match=r"'pipe\.json' is no plain file"):
        check_bundle(bundle)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Harm(), {"weights": [Harm()]}], ids=["alone", "inside"])
def test_a_pickle_is_known_by_its_bytes(bundle, protocol, value):
    (bundle / "config.json").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(BundleError, match=r"'config\.json' is a pickle, which runs code"):
        check_bundle(bundle)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_does_its_harm_before_it_breaks_off(bundle, protocol):
    (bundle / "config.json").write_bytes(pickle.dumps(Harm(), protocol)[:-1] + b"\x00\xff")
    assert is_pickle(bundle / "config.json")


def test_a_pickle_without_a_mark_that_makes_an_object_is_known(bundle):
    (bundle / "config.json").write_bytes(b"(S'harm'\nios\nmkdir\n.")
    assert is_pickle(bundle / "config.json")


def test_an_archive_with_a_pickle_inside_is_one_whatever_its_name(bundle):
    make_zip(bundle / "model.bin", {"archive/data.PKL": b"", "archive/data/0": bytes(12)})
    assert is_pickle(bundle / "model.bin")
    make_zip(bundle / "model.bin", {"archive/data.json": b"{}"})
    assert not is_pickle(bundle / "model.bin")


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pt", "a.PTH", "a.ckpt", "a.joblib"])
def test_a_pickle_is_known_by_its_name(bundle, name):
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"'{name}' is a pickle"):
        check_bundle(bundle)


def test_what_torch_saves_is_a_pickle_and_what_safetensors_saves_is_none(bundle, tmp_path):
    import torch
    from safetensors.torch import save_file

    torch.save({"w": torch.zeros(3)}, bundle / "pytorch_model.bin")
    assert is_pickle(bundle / "pytorch_model.bin")
    torch.save({"w": torch.zeros(3)}, bundle / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert is_pickle(bundle / "pytorch_model.bin")
    (bundle / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()) + make_zip(tmp_path / "a.zip", FILES).read_bytes())
    assert is_pickle(bundle / "pytorch_model.bin")
    save_file({"w": torch.zeros(3)}, bundle / "pytorch_model.bin")
    assert not is_pickle(bundle / "pytorch_model.bin")


def test_files_that_only_look_a_little_like_pickles_pass(bundle):
    for length in (0x280, 0x380, 0x480, 0x580, 0x10280):  # the first bytes of a safetensors file are its header's length
        header = b'{"__metadata__":{}}'.ljust(length)
        (bundle / "model.safetensors").write_bytes(struct.pack("<Q", length) + header)
        check_bundle(bundle)
    for text in (b"", b"N.", b"copy\nthat\nplease", b"it is\nso\n", b"PK\x05\x06", b"PK\x05\x06" + bytes(18), b"card\nlost\n."):
        (bundle / "notes.txt").write_bytes(text)
        check_bundle(bundle)
    # The end of a zip file that names one entry, where there is none.
    (bundle / "notes.txt").write_bytes(bytes(46) + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 46, 0, 0))
    check_bundle(bundle)
    rng = random.Random(0)
    for _ in range(300):
        (bundle / "model.safetensors").write_bytes(rng.randbytes(2000))
        check_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "/x", "a/../../x", "a/..", "./x", "a//x", "a/", "\\x", "..\\x", "a\\x", "C:x", "C:/x",
        "x\x00", "x\n", "x.", "x ", "a /x", "nul", "NUL.json", "com1.txt", "a/aux", "x*", "x?", "a|b", '"x"', "<x>",
        "x\u202egpj.json", "\ud800",
    ],
)  # fmt: skip
def test_names_that_mean_another_place_somewhere_are_refused(name):
    with pytest.raises(BundleError, match="may mean a place outside the bundle"):
        check_names(["fine.json", name])


def test_names_that_differ_only_in_case_are_refused():
    with pytest.raises(BundleError, match=r"'a/Model\.json' and 'a/model\.json' are one file on some systems"):
        check_names(["a/Model.json", "a/model.json"])
    with pytest.raises(BundleError, match="are one file on some systems"):
        check_names(["caf\u00e9.json", "cafe\u0301.json"])


def test_plain_names_pass():
    check_names([])
    check_names(["config.json", "a/b/c.safetensors", ".gitattributes", "..x", "मॉडल.json", "a b.json", "console.json", "com10"])


# --- Archives ---


@pytest.mark.parametrize(
    ("name", "mode"), [("model.zip", None), ("model.tar", "w"), ("model.tar.gz", "w:gz"), ("model.tar", "w:gz")]
)
def test_an_archive_of_plain_files_is_unpacked(bundle, tmp_path, name, mode):
    archive = tmp_path / name
    if mode is None:
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(bundle.rglob("*")):  # with its folders
                file.write(path, path.relative_to(bundle))
    else:
        with tarfile.open(archive, mode) as file:
            for path in sorted(bundle.iterdir()):
                file.add(path, path.name)
    folder = unpack_bundle(archive, tmp_path / "out")
    assert {path: (folder / path).read_bytes() for path in bundle_files(folder)} == FILES
    with pytest.raises(BundleError, match="is there already"):
        unpack_bundle(archive, folder)


def test_large_files_and_many_are_unpacked(tmp_path):
    files = {f"{n}.safetensors": bytes([n]) * 3_000_000 for n in range(3)} | {f"{n}.json": b"{}" for n in range(500)}
    for archive in (make_zip(tmp_path / "a.zip", files), make_tar(tmp_path / "a.tar.gz", files, mode="w:gz")):
        folder = unpack_bundle(archive, tmp_path / archive.suffix[1:])
        assert {path: (folder / path).read_bytes() for path in bundle_files(folder)} == files


@pytest.mark.parametrize("name", ["../escaped.json", "/escaped.json", "a/../../escaped.json", "a\\..\\..\\escaped", "C:/x"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, refused, name):
    refused(make_zip(tmp_path / "a.zip", {"config.json": b"{}", name: b"{}"}), "may mean a place outside")
    refused(make_tar(tmp_path / "a.tar", {"config.json": b"{}", name: b"{}"}), "may mean a place outside")


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE", "BLKTYPE"])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, refused, kind):
    archive = make_tar(tmp_path / "a.tar", {"x.json": b""}, kind=getattr(tarfile, kind), link="/etc/passwd")
    refused(archive, r"'x\.json' is a link or no plain file")


def test_a_sparse_file_in_a_tar_is_refused(tmp_path, refused):
    """It would unpack to holes of any size; its header names a map of them."""
    info = tarfile.TarInfo("x.json")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000010000\x00"  # the real size, in octal
    header[148:156] = b"%06o\x00 " % sum(header[:148], start=8 * 32 + sum(header[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    refused(tmp_path / "a.tar", r"'x\.json' is a link or no plain file")


def test_a_link_in_a_zip_is_refused(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("x.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path / "a.zip", r"'x\.json' is a link")


def test_an_archive_that_says_it_is_too_large_is_refused(tmp_path, refused):
    files = {"a.json": bytes(600), "b.json": bytes(600)}
    for archive in (make_zip(tmp_path / "a.zip", files), make_tar(tmp_path / "a.tar", files)):
        refused(archive, r"more than 1,000 files or 1,000 bytes", max_bytes=1000)
        refused(archive, r"more than 1 files", max_files=1)
        unpack_bundle(archive, tmp_path / archive.suffix[1:], max_bytes=1200, max_files=2)


def test_a_zip_that_lies_about_its_size_is_refused(tmp_path, refused):
    """The declared size in the directory is made 100 bytes; the stream unpacks to ten million."""
    archive = make_zip(tmp_path / "a.zip", {"a.json": bytes(10_000_000)})
    content = archive.read_bytes()
    archive.write_bytes(content.replace(struct.pack("<L", 10_000_000), struct.pack("<L", 100)))
    refused(archive, "cannot be unpacked")


def test_a_tar_whose_header_unpacks_without_end_is_refused(tmp_path, refused):
    """A few kilobytes hold a header that says that a name of 200 MB follows."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 200_000_000
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(b"a" * 1_000_000)
    assert (tmp_path / "a.tar.gz").stat().st_size < 1_000_000
    refused(tmp_path / "a.tar.gz", "headers unpack to more than they should")


def test_a_pickle_inside_an_archive_is_refused(tmp_path, refused):
    for archive in (
        make_zip(tmp_path / "a.zip", {"a.json": pickle.dumps(Harm())}), make_tar(tmp_path / "a.tar", {"a.pt": b""}),
    ):  # fmt: skip
        refused(archive, "is a pickle")


def test_a_name_that_comes_twice_is_refused(tmp_path, refused):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.json"), io.BytesIO(b""))
    refused(tmp_path / "a.tar", "File exists")
    refused(make_tar(tmp_path / "b.tar", {"a": b"", "a/b": b""}), "cannot be unpacked")


def test_an_archive_without_files_is_refused(tmp_path, refused):
    refused(make_zip(tmp_path / "a.zip", {}), "is empty")
    refused(make_tar(tmp_path / "a.tar", {}), "is empty")


def test_what_is_no_archive_is_refused(tmp_path, refused):
    for content in (b"", b"nonsense" * 1000, b"\x1f\x8bnonsense", b"PK\x03\x04nonsense"):
        (tmp_path / "a.zip").write_bytes(content)
        refused(tmp_path / "a.zip", r"a\.zip cannot be unpacked")
    (tmp_path / "a.zip").unlink()
    refused(tmp_path / "a.zip", "cannot be unpacked")


def test_an_archive_with_any_byte_changed_or_cut_off_is_unpacked_or_refused_and_nothing_else(tmp_path):
    files = {"config.json": b"{}" * 300, "model.safetensors": bytes(range(256)) * 8}
    archives = [make_zip(tmp_path / "a.zip", files), make_tar(tmp_path / "a.tar.gz", files, mode="w:gz")]
    rng, spoilt = random.Random(0), tmp_path / "spoilt"
    for number in range(300):
        content = bytearray(archives[number % 2].read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        spoilt.write_bytes(content[: rng.randrange(len(content))] if number % 3 == 0 else content)
        try:
            folder = unpack_bundle(spoilt, tmp_path / "out" / str(number))
        except BundleError:
            assert not (tmp_path / "out" / str(number)).exists()
        else:
            check_bundle(folder)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_encrypted_zip_is_refused(tmp_path, refused):
    archive = make_zip(tmp_path / "a.zip", {"a.json": b"{}" * 20})
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(archive, "encrypted")


def test_the_limits_are_far_above_the_courses_own_bundles():
    assert bundles.MAX_BYTES > 4e9
    assert bundles.MAX_FILES >= 1000
