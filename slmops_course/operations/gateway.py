"""A gateway on loopback in front of Foundry Local's service: it refuses early, keeps order, and counts.

    with serve_gateway(foundry.start_service(), task, metrics) as gateway:
        print(gateway.url)                      # http://127.0.0.1:…/v1, for any OpenAI client
        print(gateway.metrics_url)              # http://127.0.0.1:…/metrics, for Prometheus

The service itself has no metrics, and no limit on a body's size, on how deep its JSON is nested or on how many requests are
under way; `tests/test_service_load.py` shows what that leads to.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from slmops_course.errors import CourseError
from slmops_course.evaluation import INVALID
from slmops_course.network import is_loopback
from slmops_course.operations.monitoring import Metrics, Watch
from slmops_course.operations.requests import (
    Refusal,
    has_text,
    message_text,
    read_reply,
    read_request,
    request_schemas,
    upstream_refusal,
)
from slmops_course.operations.streams import Reply, event_data, is_last, split_events, unless_gone
from slmops_course.operations.upstream import Upstream, UpstreamError
from slmops_course.serving import check_port_free
from slmops_course.tasks import Task, TaskError

log = logging.getLogger("slmops_course")

HOSTS = ("127.0.0.1", "localhost")
REFUSED_STATUSES = ("400", "404", "405", "408", "413", "415", "429")
READY_WITHIN_S = 2.0  # the service lists its models in milliseconds
KEEP_ALIVE_S = 30  # that a client's connection may be idle
CLOSE_WITHIN_S = 2  # for requests that are under way when the gateway closes


class GatewayError(CourseError):
    """A gateway that cannot start as asked."""


@dataclass(frozen=True)
class Limits:
    """What a gateway lets through."""

    body_bytes: int = 65_536
    new_tokens: int = 256  # the most a request may ask for, and what one gets that asks for no number
    at_once: int = 2  # requests that the model works on together
    waiting: int = 32  # requests that may wait for their turn
    timeout_s: float = 60.0  # for a whole request, its waiting included

    def __post_init__(self):
        if min(self.body_bytes, self.new_tokens, self.at_once) < 1 or self.waiting < 0 or not self.timeout_s > 0:
            raise GatewayError(f"The limits are {self}: expected numbers above 0, and 0 or more that may wait.")


LIMITS = Limits()


class Gateway:
    """The ASGI application. `upstream` is the service's base address, such as FoundryLocal.start_service returns.

    `watch` is told of every reply, see monitoring.MonitoredChatModel; where it fails, that is counted.
    """

    def __init__(self, upstream: str, task: Task, metrics: Metrics, *, limits: Limits, watch: Watch | None = None):
        from jsonschema import Draft202012Validator
        from prometheus_client import Counter

        self.upstream, self.task, self.metrics, self.limits, self.watch = Upstream(upstream), task, metrics, limits, watch
        own = metrics.registry
        refused = Counter(
            "slmops_refused_requests", "Requests that were refused, by HTTP status.", ["status"], registry=own
        )
        self.refused = {status: refused.labels(status) for status in REFUSED_STATUSES}
        self.dropped = Counter("slmops_dropped_clients", "Clients that left before the end of their reply.", registry=own)
        schemas = request_schemas(task, max_new_tokens=limits.new_tokens)
        self.validators = {path: Draft202012Validator(schema) for path, schema in schemas.items()}
        self.asks = {path: _Ask(self, path) for path in schemas}
        self._turns, self._waiting = asyncio.Semaphore(limits.at_once), 0
        self._app = self._make_app()

    def _make_app(self):
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        async def no_such_page(request, error):
            return self.refuse(Refusal(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}."))

        return Starlette(
            routes=[
                *(Route(path, ask, methods=["POST"]) for path, ask in self.asks.items()),
                Route("/v1/models", self._show_models),
                Route("/metrics", self._show_metrics),
                Route("/health/live", self._show_live),
                Route("/health/ready", self._show_ready),
            ],
            exception_handlers={HTTPException: no_such_page},
            lifespan=self._run,
        )

    async def __call__(self, scope, receive, send):
        """Answer one request. One that names another host is refused: a page from elsewhere may have a browser send it."""
        from starlette.datastructures import Headers

        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if host.partition(":")[0].lower() not in HOSTS:
                refusal = Refusal(400, f"The Host header names {host[:80]!r}: expected one of {', '.join(HOSTS)}.")
                return await self.refuse(refusal)(scope, receive, send)
            if scope["method"] == "POST" and scope["path"] in self.asks:  # not through the router: its way is longer
                return await self.asks[scope["path"]](scope, receive, send)
        await self._app(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _run(self, app):
        yield
        await self.upstream.close()

    def refuse(self, refusal: Refusal):
        """Count a refusal, or a failure of the model, and make its response."""
        from starlette.responses import JSONResponse

        if refusal.status < 500:
            self.refused.get(str(refusal.status), self.refused["400"]).inc()
        else:
            self.metrics.requests.inc()
            self.metrics.errors.inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    # --- Requests to the model ---

    async def read(self, request, path: str) -> dict:
        """A request's JSON, checked. Raises Refusal."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The Content-Type is not application/json: expected a JSON body, and that it says so.")
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self.limits.body_bytes:
                body += chunk  # the rest of a longer one is read and dropped: who still sends does not see an answer
        if size > self.limits.body_bytes:
            raise Refusal(413, f"The body has {size:,} bytes: expected at most {self.limits.body_bytes:,}; send a shorter one.")
        return read_request(bytes(body), self.validators[path], max_new_tokens=self.limits.new_tokens)

    @contextlib.asynccontextmanager
    async def turn(self):
        """A turn at the model, in the order of arrival. Raises Refusal with status 429 where too many wait already."""
        if self._turns.locked() and self._waiting >= self.limits.waiting:
            words = f"{self._waiting} requests wait already: expected fewer clients at once; ask again a little later."
            raise Refusal(429, words, headers={"Retry-After": "1"})
        with self.metrics.in_progress.track_inprogress():
            with self.metrics.waiting.track_inprogress():
                self._waiting += 1
                try:
                    await self._turns.acquire()
                finally:
                    self._waiting -= 1
            try:
                yield
            finally:
                self._turns.release()

    async def pass_on(self, path: str, data: dict, reply: Reply, start: float) -> None:
        """Put a request to the service and its answer to the client, and count it. Raises Refusal."""
        streamed = data.get("stream", False)
        hide_usage = streamed and "messages" in data and not data.get("stream_options", {}).get("include_usage")
        if hide_usage:  # it is counted all the same
            data = data | {"stream_options": {"include_usage": True}}
        body = json.dumps(data).encode()
        try:
            async with self.turn(), self.upstream.ask("POST", path.removeprefix("/v1"), body) as answer:
                if streamed and answer.status == 200:
                    await self._pass_events(answer, data, reply, start, hide_usage)
                else:
                    whole = await _whole(answer)
                    self._count(data, [whole], None, time.perf_counter() - start)
                    await reply.whole(whole)
        except UpstreamError as error:
            raise Refusal(502, f"The model's service does not answer ({error}): expected it to run.") from None

    async def _pass_events(self, answer, data: Mapping, reply: Reply, start: float, hide_usage: bool) -> None:
        events, first_s = [], None
        async for arrived in split_events(answer.chunks):
            for event in arrived if first_s is None else ():
                said = event_data(event)
                refusal = upstream_refusal(200, said)
                if refusal and not events:
                    raise refusal
                if has_text(said):
                    first_s = time.perf_counter() - start
                    break
            events += arrived
            if not reply.ended and any(map(is_last, arrived)):
                # Before it is passed on: who has the whole reply finds it counted, and may leave then.
                self._count(data, [event_data(event) for event in events], first_s, time.perf_counter() - start)
                reply.ended = True
            await reply.events(b"".join(event for event in arrived if not (hide_usage and b'"choices":[]' in event)))
        if not events:
            raise Refusal(502, "The model's service gave a stream without an event: ask again.")
        if not reply.ended:
            self._count(data, [event_data(event) for event in events], first_s, time.perf_counter() - start)
        await reply.end()

    def _count(self, data: Mapping, bodies: list[dict], first_s: float | None, duration_s: float) -> None:
        failed = next(filter(None, (upstream_refusal(200, body) for body in bodies)), None)
        if failed:  # in the middle of a stream, where the client was told
            self.refuse(failed)
            return
        metrics, (text, prompt_tokens, output_tokens) = self.metrics, read_reply(bodies)
        try:
            label = self.task.parse(text)[self.task.label_field]
        except TaskError:
            label = INVALID
            metrics.invalid.inc()
        metrics.requests.inc()
        metrics.predictions[label].inc()
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.output_tokens.inc(output_tokens)
        metrics.duration.observe(duration_s)
        if first_s is not None:
            metrics.first_token.observe(first_s)
        if self.watch:
            try:
                self.watch(message_text(data), label, None)
            except Exception as error:  # whatever it is: a person waits for the reply
                metrics.unwatched.inc()
                log.warning("Monitoring failed on a reply (%s); the reply was given.", type(error).__name__)

    # --- Pages ---

    async def _models(self) -> dict:
        try:
            async with asyncio.timeout(READY_WITHIN_S), self.upstream.ask("GET", "/models") as answer:
                return await _whole(answer)
        except (UpstreamError, TimeoutError) as error:
            raise Refusal(503, f"The model's service does not answer ({error}): expected it to run.") from None

    async def _show_models(self, request):
        from starlette.responses import JSONResponse

        try:
            return JSONResponse(await self._models())
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status)

    async def _show_ready(self, request):
        from starlette.responses import JSONResponse

        try:
            return JSONResponse({"status": "ready", "models": [model["id"] for model in (await self._models())["data"]]})
        except Refusal as refusal:
            return JSONResponse(refusal.body, 503)

    async def _show_live(self, request):
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "live"})

    def _show_metrics(self, request):  # not async: starlette has it done in a thread, because the drift figures take a while
        from prometheus_client import CONTENT_TYPE_LATEST
        from starlette.responses import Response

        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Ask:
    """The endpoint of one path. It is plain ASGI, so that a request's turn ends with it even where nobody reads the reply."""

    def __init__(self, gateway: Gateway, path: str):
        self.gateway, self.path = gateway, path

    async def __call__(self, scope, receive, send):
        from starlette.requests import ClientDisconnect, Request

        gateway, reply, start, data = self.gateway, Reply(send), time.perf_counter(), None
        try:
            async with asyncio.timeout(gateway.limits.timeout_s):
                data = await gateway.read(Request(scope, receive), self.path)
                await unless_gone(receive, gateway.pass_on(self.path, data, reply, start))
            return
        except ClientDisconnect:
            if not reply.ended:
                gateway.dropped.inc()
            return
        except TimeoutError:
            limit = f"within {gateway.limits.timeout_s:g} s"
            refusal = Refusal(408, f"The body did not come {limit}: expected all of it.")
            if data is not None:
                refusal = Refusal(504, f"The reply was not done {limit}: expected a shorter one, or fewer clients; ask again.")
        except Refusal as error:
            refusal = error
        response = gateway.refuse(refusal)
        if reply.started:  # a status has been sent: the error is the last event
            await reply.events(b"data: " + response.body + b"\n\n")
            await reply.end()
        else:
            await response(scope, receive, send)


async def _whole(answer) -> dict:
    """The service's answer, which is JSON. Raises Refusal for an error, in whatever form it came."""
    try:
        data = json.loads(await answer.whole())
    except ValueError:
        data = None
    refusal = upstream_refusal(answer.status, data)
    if refusal:
        raise refusal
    return data


class GatewayServer:
    """A gateway that listens on loopback until `close`, or to the end of its block."""

    def __init__(self, server, thread: threading.Thread, port: int):
        self._server, self._thread = server, thread
        self.url, self.metrics_url = f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{port}/metrics"

    def close(self) -> None:
        """Stop listening, give requests that are under way a moment to end, and free the port. Safe to call twice."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def serve_gateway(
    upstream: str, task: Task, metrics: Metrics, *, port: int = 0, limits: Limits = LIMITS, watch: Watch | None = None
) -> GatewayServer:
    """Start a gateway on a loopback port, 0 for any free one. There is no authentication, so no other address is offered.

    Raises ServingError when the port is taken, and GatewayError for a service that is not on this machine.
    """
    import uvicorn

    if not is_loopback(urlsplit(upstream).hostname or "nowhere"):
        raise GatewayError(f"The service is at {upstream}: expected one on this machine, such as http://127.0.0.1:8000/v1.")
    check_port_free(port)
    gateway = Gateway(upstream, task, metrics, limits=limits, watch=watch)
    # With the protocol named, asyncio switches Nagle's algorithm off; without, an event waits up to 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        gateway, log_config=None, log_level="error", access_log=False, ws="none", server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=CLOSE_WITHIN_S,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    if not server.started:
        raise GatewayError("The gateway ended before it listened: expected it to start; the log has uvicorn's reason.")
    return GatewayServer(server, thread, listener.getsockname()[1])
