"""A real publisher: what it signs, which keys it takes, and what it does not publish."""

import stat
from datetime import timedelta

import pytest

from slmops_course.operations.offers import UpdateError
from slmops_course.operations.publisher import Publisher


def test_only_what_grows_old_is_signed_anew_and_devices_follow_a_new_root(publisher, device, clock):
    assert publisher.refresh() == []
    expected = {"root": 365, "targets": 90, "snapshot": 21, "timestamp": 7}
    assert publisher.expiries() == {role: clock.now + timedelta(days=days) for role, days in expected.items()}
    for days, expected in ((4, ["timestamp"]), (7, ["snapshot", "timestamp"]), (35, ["targets", "snapshot", "timestamp"])):
        clock.now += timedelta(days=days)
        assert publisher.refresh() == expected
    clock.now += timedelta(days=140)
    assert publisher.refresh() == ["root", "targets", "snapshot", "timestamp"]
    device.update()
    assert sorted(p.name for p in (device.folder / "metadata" / "root_history").iterdir()) == ["1.root.json", "2.root.json"]


def test_keys_are_for_their_owner_only_and_never_served(tmp_path, publisher):
    keys = sorted(publisher.keys_folder.glob("*.pem"))
    assert [path.stem for path in keys] == ["root", "snapshot", "targets", "timestamp"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    secrets = [path.read_bytes().split(b"\n")[1] for path in keys]
    served = b"".join(path.read_bytes() for path in publisher.folder.rglob("*") if path.is_file())
    assert b"PRIVATE" not in served
    assert not any(secret in served for secret in secrets)
    with pytest.raises(UpdateError, match="in what is served: expected another place"):
        Publisher(tmp_path / "new", keys_folder=tmp_path / "new" / "keys")


def test_a_repository_is_opened_again_with_its_own_keys_only(tmp_path, publisher, versions):
    again = Publisher(publisher.folder, keys_folder=publisher.keys_folder, clock=publisher.clock)
    again.publish(versions[1], channels=["canary"])
    assert (again.root, publisher.offered()) == (publisher.root, {"all": 1, "canary": 2})
    with pytest.raises(UpdateError, match=r"no key root.pem in .*: expected the repository's keys; bring them back"):
        Publisher(publisher.folder, keys_folder=tmp_path / "empty")
    Publisher(tmp_path / "other", keys_folder=tmp_path / "other-keys")
    with pytest.raises(UpdateError, match=r"names another key than root.pem: expected the repository's"):
        Publisher(publisher.folder, keys_folder=tmp_path / "other-keys")


def test_a_version_that_is_not_as_registered_is_not_published(publisher, versions):
    (versions[1].folder / "adapter").write_bytes(b"changed")
    with pytest.raises(UpdateError, match="adapter is not what its hash says: expected the version as registered"):
        publisher.publish(versions[1], channels=["canary"])
    assert publisher.offered() == {"all": 1, "canary": 1}


@pytest.mark.parametrize(
    ("files", "channel", "sentence"),
    [
        ({"../x": "0" * 64}, "all", "'../x' may mean a place outside"),
        ({"/etc/x": "0" * 64}, "all", "may mean a place outside"),
        ({"x": "not a hash"}, "all", "has 'x' without a SHA-256: expected files with hashes"),
        ({}, "all", "desk 5 has no files: expected files with hashes"),
        (None, "../all", r"named '\.\./all': expected a to z, digits and hyphens"),
        (None, "", "named ''"),
    ],
)
def test_what_cannot_be_a_release_is_not_published(publisher, versions, files, channel, sentence):
    version = versions[1] if files is None else versions[1]._replace(number=5, files=files)
    with pytest.raises(UpdateError, match=sentence):
        publisher.publish(version, channels=[channel])
    assert publisher.offered() == {"all": 1, "canary": 1}


def test_publishers_at_the_same_time_lose_nothing(publisher, versions, clock, while_inside):
    options = {"folder": publisher.folder, "keys_folder": publisher.keys_folder}
    second = Publisher(**options, clock=publisher.clock)
    first = Publisher(**options)
    wait, thread = while_inside(lambda: second.publish(versions[1], channels=["second"]))
    first.clock = lambda: wait() or clock.now
    first.publish(versions[1], channels=["first"])
    thread.join()
    assert publisher.offered() == {"all": 1, "canary": 1, "first": 2, "second": 2}
