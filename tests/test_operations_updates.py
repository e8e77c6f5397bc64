"""Real devices: what they install, what they return to, and what a power cut leaves behind."""

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slmops_course.network import ConnectionLog
from slmops_course.operations.offers import UpdateError


class PowerCut(Exception):
    """No error that anything expects."""


def runs(device) -> int:
    return device.running().release.number


def test_a_device_gets_the_files_that_were_published(make_device, versions):
    device = make_device()
    update = device.update()
    assert (update.number, update.installed, update.file_bytes) == (1, True, update.total_bytes)
    running = device.running()
    assert {p.name: p.read_bytes() for p in running.folder.iterdir()} == {
        p.name: p.read_bytes() for p in versions[0].folder.iterdir()
    }
    assert device.update().installed is False


def test_nothing_runs_on_a_device_that_was_never_updated(make_device):
    device = make_device()
    for action in (device.running, device.confirm):
        with pytest.raises(UpdateError, match="No version is installed on this device: expected one; update it"):
            action()
    with pytest.raises(UpdateError, match="holds no earlier version to return to"):
        device.rollback()


def test_only_the_adapter_travels_where_only_the_adapter_changed(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    offer = device.check()
    assert (offer.new, offer.missing_bytes, offer.total_bytes) == (True, 3000, 203_002)
    update = device.update()
    assert (update.number, update.file_bytes, update.total_bytes) == (2, 3000, 203_002)
    assert update.metadata_bytes < 10_000
    assert runs(device) == 2


def test_files_with_the_same_bytes_travel_once(make_version, publisher, device):
    publisher.publish(make_version(9, base=b"base " * 40_000, a=b"same" * 10, b=b"same" * 10), channels=["canary"])
    assert device.update().file_bytes == 40
    assert sorted(path.name for path in device.running().folder.iterdir()) == ["a", "b", "base"]


def test_a_channel_sees_its_own_versions_only(publisher, device, make_device, versions):
    publisher.publish(versions[1], channels=["canary"])
    other = make_device("other", channel="all")
    assert (device.update().number, other.update().number) == (2, 1)
    assert publisher.offered() == {"all": 1, "canary": 2}
    with pytest.raises(UpdateError, match="no channel 'beta': expected an offer on it"):
        make_device("third", channel="beta").update()


def test_going_back_is_a_newer_publication_of_an_older_version(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    device.confirm()
    before = publisher._load("timestamp").signed.version
    assert publisher.publish(versions[0], channels=["canary"], withdrawn=[2]) == ["targets", "snapshot", "timestamp"]
    assert publisher._load("timestamp").signed.version == before + 1
    assert (device.update().number, runs(device)) == (1, 1)
    with pytest.raises(UpdateError, match="no earlier version"):  # 2 is withdrawn, so 1 is all there is
        device.rollback()


def test_two_programs_on_one_device_wait_for_each_other(make_device, while_inside):
    order = []

    def check():
        make_device().check()
        order.append("second")

    first = make_device()
    first.on_step, thread = while_inside(check)
    first.check()
    order.append("first")
    thread.join()
    assert order == ["first", "second"]


# --- Back again ---


def test_a_device_returns_to_its_last_good_version_without_a_connection(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    shutil.rmtree(publisher.folder)
    assert device.rollback().number == 1
    assert (runs(device), device.installed.confirmed, device.installed.refused) == (1, True, (2,))
    with pytest.raises(UpdateError, match="expected one that was confirmed here and is not withdrawn"):
        device.rollback()


def test_a_version_that_failed_here_is_not_installed_here_again(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    device.rollback()
    assert device.check().new is False
    assert (device.update().installed, runs(device)) == (False, 1)
    publisher.publish(versions[2], channels=["canary"])
    assert device.update().number == 3


@pytest.mark.parametrize(("confirmed", "withdrawn", "back"), [(True, [], 2), (False, [], 1), (True, [2], 1)])
def test_only_a_confirmed_version_that_is_not_withdrawn_is_returned_to(
    publisher, device, versions, confirmed, withdrawn, back
):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    if confirmed:
        device.confirm()
    publisher.publish(versions[2], channels=["canary"], withdrawn=withdrawn)
    device.update()
    assert runs(device) == 3
    assert device.rollback().number == back
    assert runs(device) == back


def test_a_device_forgets_an_earlier_version_that_is_withdrawn_later(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    assert device.installed.last_good.number == 1
    publisher.publish(versions[1], channels=["canary"], withdrawn=[1])
    assert device.update().installed is False
    assert (runs(device), device.installed.last_good) == (2, None)


def test_a_device_keeps_the_files_of_two_versions_and_no_more(publisher, device, versions):
    for version in versions[1:]:
        publisher.publish(version, channels=["canary"])
        device.update()
        device.confirm()
    wanted = {sha256 for version in versions[1:] for sha256 in version.files.values()}
    assert {path.name for path in (device.folder / "files").iterdir()} == wanted
    assert len(list((device.folder / "bundles").iterdir())) == 2


def test_a_version_that_was_halted_while_it_was_fetched_is_not_installed(publisher, device, versions):
    publisher.publish(versions[1], channels=["canary"])
    assert device.fetch().release.number == 2
    publisher.publish(versions[0], channels=["canary"], withdrawn=[2])
    assert (device.install(), runs(device)) == (False, 1)
    publisher.publish(versions[1], channels=["canary"])
    device.fetch()
    publisher.publish(versions[2], channels=["canary"])
    with pytest.raises(UpdateError, match="1 files of desk 3 are not here: expected all; the offer changed"):
        device.install()
    assert runs(device) == 1


# --- Damage and power cuts ---


@pytest.mark.parametrize("name", ["base", "config"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "add"])
def test_a_damaged_version_does_not_run_and_an_update_mends_it(device, damage, name):
    path = device.running().folder / name
    data = path.read_bytes()
    changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "delete": None, "add": data}[damage]
    if changed is None:
        path.unlink()
    elif damage == "add":
        path.with_name("more").write_bytes(b"")
    else:
        path.write_bytes(changed)
    with pytest.raises(UpdateError, match=r"desk 1 is damaged .*: expected its signed files; update"):
        device.running()
    update = device.update()
    assert update.file_bytes == (len(data) if damage in ("flip", "cut") else 0)
    assert (runs(device), device.installed.confirmed) == (1, True)


def test_a_damaged_earlier_version_is_not_returned_to(publisher, device, versions):
    adapter = device.running().folder / "adapter"
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    adapter.write_bytes(b"changed")
    with pytest.raises(UpdateError, match=r"desk 1 is damaged \(adapter was changed\)"):
        device.rollback()
    assert runs(device) == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"running": 1}'])
def test_a_damaged_pointer_is_named(device, text):
    (device.folder / "installed.json").write_text(text)
    with pytest.raises(UpdateError, match=r"installed.json is damaged .*: expected a device's pointer"):
        device.running()


def test_what_was_fetched_before_a_cut_is_not_fetched_again(publisher, device, make_version):
    changed = {"adapter": b"x" * 3000, "config": b"y" * 500, "vocabulary": b"z" * 7000}
    publisher.publish(make_version(7, base=b"base " * 40_000, **changed), channels=["canary"])
    device.received["files"] = 0
    steps = []

    def cut(step):
        steps.append(step)
        if len([each for each in steps if each.startswith("files/")]) == 3:
            raise PowerCut

    device.on_step = cut
    with pytest.raises(PowerCut):
        device.update()
    assert runs(device) == 1
    first = device.received["files"]
    assert 0 < first < 10_500
    device.on_step = steps.append
    assert device.update().file_bytes == 10_500 - first
    assert runs(device) == 7


def test_a_transfer_that_is_cut_in_the_middle_of_a_file_leaves_nothing_of_it(publisher, device, versions):
    publisher.publish(versions[2], channels=["canary"])

    def cut(url, piece):
        if device.received["files"] > 100_000:
            raise PowerCut
        return piece

    device.tap = cut
    with pytest.raises(PowerCut):
        device.update()
    assert [path.name for path in (device.folder / "files").iterdir() if path.name not in versions[0].files.values()] == []
    device.tap = lambda url, piece: piece
    assert device.update().file_bytes == 200_000 + 3000


KILLER = """
import json, os, shutil, signal, sys
from collections import namedtuple
from datetime import datetime
from pathlib import Path
from slmops_course.operations.publisher import Publisher
from slmops_course.operations.updates import Device

folder, what = Path(sys.argv[1]), sys.argv[2]
now = datetime.fromisoformat(sys.argv[3])
options = dict(keys_folder=folder / "keys", clock=lambda: now)
publisher = Publisher(folder / "served", **options)
name, number, new_folder, files = json.loads(sys.argv[4])
new = namedtuple("Version", "name number folder files")(name, number, Path(new_folder), files)

def device():
    return Device(folder / "device", source=folder / "served", root=publisher.root, channel="canary", clock=lambda: now)

def act():
    if what == "device":
        device().update()
    else:
        publisher.publish(new, channels=["canary"])

def kill_at(number):  # before the folder is changed for the n-th time
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changes = event in {"os.rename", "os.remove", "os.link", "os.mkdir", "os.symlink", "shutil.rmtree"}
        if (writes or changes) and str(folder) in str(arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

kills, seen = 0, set()
while True:
    for name in ("device", "served"):
        shutil.rmtree(folder / name)
        shutil.copytree(folder / f"{name}.before", folder / name, symlinks=True)
    child = os.fork()
    if child == 0:
        kill_at(kills + 1)
        act()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
    kills += 1
    seen.add(device().running().release.number)   # whole, before anything is mended
    if device().installed.last_good:              # and so is what it could return to
        shutil.copytree(folder / "device", folder / "copy", symlinks=True)
        copy = Device(folder / "copy", source="http://127.0.0.1:9", root=b"", channel="none")
        assert copy.rollback().number == copy.running().release.number
        shutil.rmtree(folder / "copy")
    if what == "publisher":
        device().update()                         # what is served is whole
        seen.add(device().running().release.number)
        Publisher(folder / "served", **options).publish(new, channels=["canary"])
    device().update()
    assert device().running().release.number == new.number, kills
print(kills, sorted(seen), status)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Processes fork on POSIX systems only.")
@pytest.mark.parametrize(
    ("what", "number", "expected"),
    # The publisher's last change is the timestamp's new name: whoever is killed before it has published nothing.
    [("device", 3, "[2, 3] 0"), ("device", 1, "[1, 2] 0"), ("publisher", 3, "[2] 0")],
)
def test_kill_minus_nine_at_any_moment_leaves_the_old_version_or_the_new(
    tmp_path, publisher, device, versions, clock, what, number, expected
):
    publisher.publish(versions[1], channels=["canary"])
    device.update()
    device.confirm()
    if what == "device":
        publisher.publish(versions[number - 1], channels=["canary"], withdrawn=[2] if number == 1 else [])
    for name in ("device", "served"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}.before", symlinks=True)
    new = json.dumps(versions[number - 1], default=str)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), what, clock.now.isoformat(), new],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stderr == ""
    kills, rest = done.stdout.split(" ", 1)
    assert int(kills) >= 20
    assert rest.strip() == expected


# --- A server ---


class Quiet(SimpleHTTPRequestHandler):
    truncated = False

    def log_message(self, *arguments):
        pass

    def send_header(self, keyword, value):
        if self.truncated and keyword == "Content-Length" and "/targets/files/" in self.path:
            value = str(int(value) + 1)  # promises a byte more than it sends
        super().send_header(keyword, value)


@pytest.fixture
def server(publisher, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Handler", (Quiet,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(publisher.folder))) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        made.handler, made.url = handler, f"http://127.0.0.1:{made.server_port}"
        yield made
        made.shutdown()
        thread.join()


def test_a_real_server_on_loopback_serves_devices(publisher, server, make_device, versions):
    device = make_device(source=server.url)
    with ConnectionLog() as log:
        assert device.update().number == 1
        device.confirm()
        publisher.publish(versions[1], channels=["canary"])
        assert device.update().file_bytes == 3000
    assert runs(device) == 2
    assert log.all
    assert log.remote == []


def test_a_server_that_stops_short_or_is_gone_is_told_of(publisher, server, make_device, versions):
    device = make_device(source=server.url)
    device.update()
    publisher.publish(versions[1], channels=["canary"])
    server.handler.truncated = True
    with pytest.raises(UpdateError, match=r"IncompleteRead.*: expected a transfer that comes to its end; check the connection"):
        device.update()
    assert runs(device) == 1
    server.handler.truncated = False
    assert device.update().number == 2
    gone = make_device("late", source="http://127.0.0.1:9")
    with pytest.raises(UpdateError, match="expected an answer from the server; check the connection"):
        gone.update()


def test_a_pointer_and_an_offer_are_small_and_readable(publisher, device):
    pointer = json.loads((device.folder / "installed.json").read_text("utf-8"))
    assert pointer["running"]["number"] == 1
    assert (device.folder / "installed.json").stat().st_size < 1000
