"""Which network addresses a piece of code turns to, so that "nothing leaves the device" can be checked.

Two observers work together. Python's audit events name every connection, datagram and name look-up that Python code
attempts, also one that fails. Reading the operating system's table of this process's connections, many times a
second, finds what native code opens, which raises no audit event.

Neither sees other processes, or a native datagram or connection that is over between two readings. Where that matters,
take the network away: `names_looked_up` does, and listens to the names that are asked for.
"""

import ipaddress
import json
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.sampling import Sampler

_logs: "weakref.WeakSet[ConnectionLog]" = weakref.WeakSet()  # the logs that are open now
_hook_added = False


class NetworkError(CourseError):
    """Code that could not be watched."""


class ConnectionLog(Sampler):
    """Records the addresses this process turns to, from entering the block to leaving it.

    Example:
        with ConnectionLog() as log:
            reply = model.reply(conversation)
        log.remote      # [] if nothing left this machine, else such as ["192.0.2.1:443", "example.org:443"]

    Connections that were open before the block, such as a notebook's to its kernel, are in `open_before` and not
    counted again.
    Source: Python's table of audit events, https://docs.python.org/3/library/audit_events.html
    """

    def __init__(self, *, interval_s: float = 0.02):
        super().__init__(interval_s=interval_s)
        self.open_before: list[str] = []
        self._found: dict[str, bool] = {}  # address -> whether it is remote, in the order of appearance

    @property
    def all(self) -> list[str]:
        """Every address, this machine's own included."""
        return list(self._found)

    @property
    def remote(self) -> list[str]:
        """The addresses that are not loopback: what leaves this machine."""
        return [address for address, remote in self._found.items() if remote]

    def __enter__(self) -> "ConnectionLog":
        import psutil

        _add_hook()
        self._process = psutil.Process()
        self.open_before = [name for name, _ in self._open_connections()]
        _logs.add(self)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        _logs.discard(self)

    def record(self, host: str, port: int | None) -> None:
        """Note an address that was turned to."""
        self._found.setdefault(address_text(host, port), not is_loopback(host))

    def sample(self) -> None:
        """Note the connections that are in the operating system's table now."""
        for name, (host, port) in self._open_connections():
            if name not in self.open_before:
                self.record(host, port)

    def _open_connections(self) -> list[tuple[str, tuple[str, int]]]:
        connections = self._process.net_connections(kind="inet")
        return [(address_text(c.raddr.ip, c.raddr.port), (c.raddr.ip, c.raddr.port)) for c in connections if c.raddr]


# What runs where there is no network: a name server on loopback that knows no name, then the code, then some waiting.
_BOXED = """
import json, socket, sys, threading, time
names, server = set(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
def listen():
    while True:
        packet, client = server.recvfrom(512)
        place, parts = 12, []
        while packet[place]:
            parts.append(packet[place + 1 : place + 1 + packet[place]].decode("ascii", "replace"))
            place += 1 + packet[place]
        names.add(".".join(parts))
        server.sendto(packet[:2] + bytes([0x81, 0x83]) + packet[4:], client)
threading.Thread(target=listen, daemon=True).start()
try:
    exec(sys.argv[1], {"__name__": "__main__"})
except OSError:
    pass  # nothing can be reached in here
time.sleep(float(sys.argv[2]))
print(json.dumps(sorted(names)))
"""


def names_looked_up(code: str, *, wait_s: float = 12, environment: Mapping[str, str] | None = None) -> list[str] | None:
    """The host names that a piece of Python code asks for, in a process without a network; native code is seen as well.

    Linux only, where users may make namespaces: elsewhere None. `environment` is added to this process's; an empty text
    takes a variable away. After the code it waits, because telemetry is sent in the background: ONNX Runtime 1.31 asks for
    its address about ten seconds after the import.
    Example: names_looked_up("import socket; socket.gethostbyname('example.org')", wait_s=0) -> ["example.org"]
    Code that turns to an address without a name is not seen; nothing can be reached in there all the same.
    Raises NetworkError when the code fails for another reason than the missing network.
    Source: https://www.rfc-editor.org/rfc/rfc1035, section 4.1 (the packets); man unshare
    """
    with tempfile.TemporaryDirectory() as scratch:
        resolver = Path(scratch) / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n", "ascii")
        script = 'ip link set lo up && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
        box = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", script, "sh", str(resolver)]
        try:
            if subprocess.run([*box, "true"], capture_output=True).returncode:
                return None
        except FileNotFoundError:
            return None
        done = subprocess.run(
            [*box, sys.executable, "-c", _BOXED, code, str(wait_s)], capture_output=True, text=True,
            env={name: value for name, value in {**os.environ, **(environment or {})}.items() if value},
        )  # fmt: skip
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NetworkError(f"The code failed ({words}): expected it to run without a network; try it outside first.")
    return json.loads(done.stdout.splitlines()[-1])


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine. A name that would have to be looked up does not.

    Example: "127.0.0.1" -> True, "::1" -> True, "localhost" -> True, "192.0.2.1" -> False, "example.org" -> False
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in ("", "localhost") or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def address_text(host: str, port: int | None) -> str:
    """Host and port as one text. Example: ("::1", 80) -> "[::1]:80"; ("example.org", None) -> "example.org"."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"


def _add_hook() -> None:
    """Add the one audit hook of this process. It cannot be taken away again, so it serves every log there will be."""
    global _hook_added
    if not _hook_added:
        sys.addaudithook(_audit)
        _hook_added = True


def _audit(event: str, args: tuple) -> None:
    if not event.startswith("socket.") or not _logs:
        return
    target = _target(event, args)
    if target is not None:
        for log in list(_logs):
            log.record(*target)


def _target(event: str, args: tuple) -> tuple[str, int | None] | None:
    """Host and port that an audit event is about, or None for one that turns to nobody."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host, port = args[0], args[1] if event == "socket.getaddrinfo" else None
        return _text(host), port if isinstance(port, int) else None
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        used, address = args
        # Sockets of other families, such as Unix domain sockets, do not leave the machine.
        if used.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
            return _text(address[0]), address[1]
    return None


def _text(host) -> str:
    """A host as text: Python's socket functions also take bytes, and None for this machine."""
    return host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host or "")
