import contextlib
import ctypes
import os
import socket
import struct
import sys
import threading
import time

import pytest

from slmops_course.network import ConnectionLog, address_text, is_loopback

TEST_NET = "192.0.2.1"  # reserved for documentation (RFC 5737): no machine has it


@pytest.fixture
def loopback_port():
    """The port of a server on loopback that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def attempt(address: tuple, kind: int = socket.SOCK_STREAM) -> None:
    """Start a connection without waiting for it; that it fails, or never ends, is what is meant."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.setblocking(False)
        probe.connect_ex(address)


# --- Known right: what stays on this machine is seen, and is not remote ---


def test_a_connection_to_loopback_is_seen_and_is_not_remote(loopback_port):
    with ConnectionLog() as log, socket.create_connection(("127.0.0.1", loopback_port)):
        pass

    assert f"127.0.0.1:{loopback_port}" in log.all
    assert log.remote == []


def test_a_unix_socket_is_not_a_network_connection(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Unix socket's path may have 107 characters at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("here")
        server.listen()
        with ConnectionLog() as log, socket.socket(socket.AF_UNIX) as client:
            client.connect("here")

    assert log.all == []


# --- Known wrong: an attempt to leave is remote ---


def test_an_attempt_to_reach_another_machine_is_remote_though_it_fails():
    with ConnectionLog() as log:
        attempt((TEST_NET, 9))

    assert log.remote == [f"{TEST_NET}:9"]


def test_an_attempt_in_another_thread_is_remote():
    with ConnectionLog() as log:
        thread = threading.Thread(target=attempt, args=((TEST_NET, 9),))
        thread.start()
        thread.join()

    assert log.remote == [f"{TEST_NET}:9"]


def test_a_datagram_is_remote():
    with ConnectionLog() as log, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        with contextlib.suppress(OSError):  # no network here: the attempt is what counts
            probe.sendto(b"", (TEST_NET, 9))

    assert log.remote == [f"{TEST_NET}:9"]


def test_a_name_that_would_be_looked_up_is_remote():
    with ConnectionLog() as log:
        # The event that socket.getaddrinfo raises, without the look-up, which can take long where there is no network.
        sys.audit("socket.getaddrinfo", "example.invalid", 443, 0, 0, 0)
        sys.audit("socket.getaddrinfo", b"example.invalid", "https", 0, 0, 0)
        sys.audit("socket.gethostbyname", "other.invalid")

    assert log.remote == ["example.invalid:443", "example.invalid", "other.invalid"]


@pytest.mark.skipif(sys.platform != "linux", reason="calls the C library as it is on Linux")
def test_a_connection_by_native_code_is_seen_though_no_audit_event_tells_of_it(loopback_port):
    libc = ctypes.CDLL(None)
    address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", loopback_port, socket.inet_aton("127.0.0.1"))
    with ConnectionLog(interval_s=0.005) as log:
        handle = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        try:
            assert libc.connect(handle, address, len(address)) == 0
            time.sleep(0.1)
        finally:
            os.close(handle)

    assert log.all == [f"127.0.0.1:{loopback_port}"]


# --- Empty: no connection, no record ---


def test_code_that_opens_nothing_leaves_an_empty_log():
    with ConnectionLog() as log:
        sum(range(1000))

    assert (log.all, log.remote) == ([], [])


def test_what_happens_before_and_after_the_block_is_not_recorded(loopback_port):
    with socket.create_connection(("127.0.0.1", loopback_port)), ConnectionLog() as log:
        pass
    attempt((TEST_NET, 9))

    assert log.open_before.count(f"127.0.0.1:{loopback_port}") == 1
    assert log.all == []


def test_a_log_ends_when_its_block_fails():
    log = ConnectionLog()
    with pytest.raises(ZeroDivisionError), log:
        1 / 0  # noqa: B018
    attempt((TEST_NET, 9))

    assert log.all == []


def test_two_logs_at_once_both_see_an_attempt():
    with ConnectionLog() as outer, ConnectionLog() as inner:
        attempt((TEST_NET, 9))

    assert outer.remote == inner.remote == [f"{TEST_NET}:9"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "localhost", ""])
def test_this_machine_is_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", [TEST_NET, "10.0.0.1", "::ffff:192.0.2.1", "2001:db8::1", "fe80::1%eth0", "localhost.example", "<broadcast>"]
)
def test_every_other_machine_is_not_loopback(host):
    assert not is_loopback(host)


def test_an_address_is_written_as_in_a_url():
    assert address_text("::1", 80) == "[::1]:80"
    assert address_text("192.0.2.1", 9) == "192.0.2.1:9"
    assert address_text("example.org", None) == "example.org"
