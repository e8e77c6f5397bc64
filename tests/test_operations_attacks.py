"""Every attack on a real publisher's folder is tried on a real device: refused, and what ran runs on."""

import shutil
from datetime import timedelta

import pytest

from slmops_course.operations import attacks
from slmops_course.operations.attacks import ATTACKS
from slmops_course.operations.offers import UpdateError
from slmops_course.operations.publisher import Publisher

REFUSALS = {
    "replay": "timestamp version 3 must be >= 4.*old metadata is served again",
    "mix_and_match": "Expected targets v4, got v3.*mixed with new",
    "change_files": "Observed hash .* does not match.*the file was changed after that",
    "send_without_end": "exceeding the maximum allowed length.*more is sent, perhaps without end",
    "bloat_timestamp": "exceeding the maximum allowed length of 16384.*no longer than was signed",
    "sign_with_another_key": "timestamp was signed by 0/1 keys.*another key signed this",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_refused_and_what_ran_runs_on(tmp_path, publisher, device, make_device, versions, attack):
    publisher.publish(versions[0], channels=["all"])
    device.check()
    earlier, whole = tmp_path / "earlier", tmp_path / "whole"
    shutil.copytree(publisher.folder, earlier)
    publisher.publish(versions[1], channels=["canary"])
    if attack is attacks.replay:
        device.check()  # only who has seen the newer metadata can know that this is older
    shutil.copytree(publisher.folder, whole)
    attack(publisher.folder, earlier)
    with pytest.raises(UpdateError, match=REFUSALS[attack.__name__]) as caught:
        device.update()
    assert str(caught.value).startswith("The update is refused (")
    assert (device.running().release.number, device.installed.confirmed) == (1, True)
    attacks.replay(publisher.folder, whole)
    assert device.update().number == 2  # the same update, unharmed


def test_metadata_that_is_held_back_expires(publisher, device, clock):
    clock.now += timedelta(days=7, seconds=-1)
    assert device.update().number == 1
    clock.now += timedelta(seconds=1)
    with pytest.raises(UpdateError, match=r"timestamp\.json is expired.*held back or the publisher stopped.*refresh"):
        device.update()
    assert device.running().release.number == 1
    assert publisher.refresh() == ["timestamp"]
    assert device.update().number == 1


def test_another_root_is_not_trusted(tmp_path, make_device, clock):
    other = Publisher(tmp_path / "other", keys_folder=tmp_path / "other-keys", clock=clock)
    with pytest.raises(UpdateError, match="signed by 0/1 keys"):
        make_device("stranger", root=other.root).update()


def test_a_listed_file_that_is_not_there_is_refused(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    shutil.rmtree(publisher.folder / "targets" / "files")
    with pytest.raises(UpdateError, match=r"there is no .*the server's copy is not whole"):
        device.update()
    assert device.running().release.number == 1


def test_garbage_for_metadata_is_refused(publisher, device):
    for garbage in (b"", b"[" * 10_000, b"{}", b"\xff\xfe"):
        (publisher.folder / "metadata" / "timestamp.json").write_bytes(garbage)
        with pytest.raises(UpdateError, match="expected signed metadata in JSON"):
            device.update()
