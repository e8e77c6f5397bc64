"""The gateway's connections to the model's service: HTTP/1.1 by h11 over asyncio's streams, kept for the next request.

It is this thin because every token of a stream passes here, on a machine whose cores the model needs: with httpx the gateway
takes half as much time again. And where a request is canceled its connection is dropped at once; httpx, canceled by asyncio
while it closes one, loses it (AsyncShieldCancellation in httpcore/_synchronization.py protects from anyio's kind only).
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

READ_BYTES = 65_536
QUICK = getattr(socket, "TCP_QUICKACK", None)  # Linux only


class UpstreamError(Exception):
    """The service cannot be reached, or does not speak HTTP to its end."""


@dataclass(frozen=True)
class Answer:
    """What the service answers. `chunks` gives its body as it comes, all that is there at a time."""

    status: int
    chunks: AsyncIterator[bytes]

    async def whole(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks])


class Upstream:
    """A service at a base address, such as http://127.0.0.1:8000/v1."""

    def __init__(self, url: str):
        address = urlsplit(url)
        self._host, self._port, self._path = address.hostname, address.port or 80, address.path.rstrip("/")
        self._idle: list[tuple] = []

    @contextlib.asynccontextmanager
    async def ask(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
        """Send a request with a JSON body, and yield the answer, whose body is read within the block.

        Raises UpstreamError where the service is not there or breaks off.
        """
        import h11

        connection, reader, writer = await self._connect()
        kept = False
        try:
            with _plain_errors():
                headers = [("Host", self._host), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
                request = h11.Request(method=method, target=self._path + path, headers=headers)
                writer.write(b"".join(map(connection.send, (request, h11.Data(body), h11.EndOfMessage()))))
                await writer.drain()
                head = await _next_event(connection, reader, writer)
                if not isinstance(head, h11.Response):
                    raise UpstreamError(type(head).__name__)
                yield Answer(head.status_code, _chunks(connection, reader, writer))
            if connection.our_state is connection.their_state is h11.DONE:
                connection.start_next_cycle()
                self._idle.append((connection, reader, writer))
                kept = True
        finally:
            if not kept:
                writer.transport.abort()

    async def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            writer = self._idle.pop()[2]
            writer.close()
            with contextlib.suppress(OSError):  # the service may have closed it first
                await writer.wait_closed()

    async def _connect(self) -> tuple:
        import h11

        while self._idle:
            connection, reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():  # the service may have closed it meanwhile
                return connection, reader, writer
            writer.transport.abort()
        with _plain_errors():
            return h11.Connection(h11.CLIENT), *await asyncio.open_connection(self._host, self._port)


async def _read(reader, writer) -> bytes:
    """The next bytes, what came before acknowledged at once.

    Foundry Local's service leaves Nagle's algorithm on, so it holds every event back until the one before is acknowledged,
    which a receiver that has nothing to send puts off by 40 ms.
    Source: https://man7.org/linux/man-pages/man7/tcp.7.html, TCP_QUICKACK
    """
    if QUICK is not None:  # the system forgets it with the next packets
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, QUICK, 1)
    return await reader.read(READ_BYTES)


async def _next_event(connection, reader, writer):
    import h11

    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await _read(reader, writer))
    return event


async def _chunks(connection, reader, writer) -> AsyncIterator[bytes]:
    import h11

    pieces = []
    with _plain_errors():
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
                continue
            if pieces:
                yield b"".join(pieces)
                pieces = []
            if event is not h11.NEED_DATA:
                return
            connection.receive_data(await _read(reader, writer))


@contextlib.contextmanager
def _plain_errors():
    import h11

    try:
        yield
    except (OSError, h11.ProtocolError) as error:
        raise UpstreamError(type(error).__name__) from error
