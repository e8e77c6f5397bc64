"""Replies on their way: the events of a stream, passed on as they come, for as long as somebody listens."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Mapping


async def split_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The events of a stream, as soon as each is whole, with the empty line that ends it: all that a chunk completes.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        if whole:
            yield [event + b"\n\n" for event in whole]
    if rest.strip():
        yield [rest]


def event_data(event: bytes) -> dict:
    """The JSON object in an event. Example: b'data: {"a": 1}\\n\\n' -> {"a": 1}; b"data: [DONE]\\n\\n" -> {}"""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    with contextlib.suppress(ValueError):
        data = json.loads(b"\n".join(lines))
        return data if isinstance(data, dict) else {}
    return {}


def is_last(event: bytes) -> bool:
    """Whether an event says that the reply is whole. Chat streams end with [DONE], those of the Responses API with a type."""
    if b"response.completed" in event:  # else the JSON of every token would be read here
        return event_data(event).get("type") == "response.completed"
    return event.strip() == b"data: [DONE]"


async def unless_gone(receive, work: Awaitable) -> None:
    """Do the work, and cancel it when the client leaves. Raises starlette's ClientDisconnect then, else as the work does."""
    from starlette.requests import ClientDisconnect

    async def until_gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Reply:
    """A reply to the client under ASGI: a whole JSON body, or events.

    `started` says whether its status has been sent, and `ended` whether all of it is there.
    """

    def __init__(self, send):
        self._send, self.started, self.ended = send, False, False

    async def whole(self, body: Mapping) -> None:
        """Send a JSON body."""
        self.ended = True
        await self._start("application/json")
        await self._send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def events(self, events: bytes) -> None:
        """Send events of a stream."""
        if not self.started:
            await self._start("text/event-stream")
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        await asyncio.sleep(0)  # where much is there already, others have their turn, and a client that left is noticed

    async def end(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, kind: str) -> None:
        self.started = True
        headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
