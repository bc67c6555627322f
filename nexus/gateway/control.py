"""The control API: what the CLI asks a running daemon, as HTTP over a Unix socket that only its owner can open.

Answers are JSON, errors problem details (RFC 9457). Long work streams one JSON object per line (NDJSON); when it fails half way
the last line is {"event": "error", "problem": {...}}. A client that goes away cancels its work.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from typing import cast

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nexus.core.errors import CapacityError, NexusError, UsageError
from nexus.core.keys import public_key_of
from nexus.gateway import problems, requests
from nexus.gateway.wire import ERROR_EVENT, Json, event_to_json, to_json
from nexus.node.api import NodeApi, StreamItem

API_VERSION = "v0"
BODY_TIMEOUT_S = 30.0
FLUSH_S = 0.02
LINES_MAX = 256

log = structlog.get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Json) -> bytes:
        return _dump(content)


class ProblemResponse(JsonResponse):
    media_type = problems.CONTENT_TYPE

    def __init__(self, problem: Mapping[str, Json]) -> None:
        status = problem["status"]
        super().__init__(problem, status_code=status if isinstance(status, int) else 500)


class EventStream(Response):
    """Events as NDJSON, as they come. What fails before the first event is an HTTP error, what fails later the last line."""

    media_type = "application/x-ndjson"

    def __init__(self, events: AsyncIterator[StreamItem]) -> None:
        super().__init__()
        # NodeApi promises that its iterators can be closed, which is what makes them generators.
        self._events = cast("AsyncGenerator[StreamItem, None]", events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            problem = await self._send_events(scope, receive, send)
            if problem is not None:
                await ProblemResponse(problem)(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> dict[str, Json] | None:
        """Send everything; the problem if there was one before anything was sent."""
        put, get = trio.open_memory_channel[bytes](LINES_MAX)
        problem: dict[str, Json] | None = None
        sent = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, get, send)
            async with put:
                try:
                    async with aclosing(self._events) as events:
                        async for event in events:
                            await put.send(_line(event_to_json(event)))
                            sent = True
                except NexusError as error:
                    problem = problems.problem_of(error)
                except Exception:  # the one boundary of a stream: the daemon outlives any one request
                    log.exception("request failed", path=scope["path"])
                    problem = problems.internal_problem()
                if problem is not None and not sent:
                    nursery.cancel_scope.cancel()
                elif problem is not None:
                    await put.send(_line({"event": ERROR_EVENT, "problem": problem}))
        return None if sent else problem

    async def _write(self, lines: trio.MemoryReceiveChannel[bytes], send: Send) -> None:
        """Lines as they come, those that come within FLUSH_S of a write together: a write costs more than a small model's token,
        and nobody reads faster than the screen changes."""
        started = False
        async for line in lines:
            batch = [line]
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    batch.append(lines.receive_nowait())
            if not started:
                await self._send_start(send)
                started = True
            await send({"type": "http.response.body", "body": b"".join(batch), "more_body": True})
            await trio.sleep(FLUSH_S)
        if not started:
            await self._send_start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_start(self, send: Send) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _line(value: Json) -> bytes:
    return _dump(value) + b"\n"


def _dump(value: Json) -> bytes:
    # allow_nan: a NaN or infinity would not be JSON, and a client could not read it.
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The boundary of a request: whatever goes wrong becomes a problem response, and the daemon stays up."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except NexusError as error:
            log.debug("request refused", path=request.url.path, code=error.code, cause=error.cause)
            return ProblemResponse(problems.problem_of(error))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:  # the one boundary of a request: the daemon outlives any one of them
            log.exception("request failed", path=request.url.path)
            return ProblemResponse(problems.internal_problem())

    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    cause = {404: "there is no such path", 405: "this path does not take this method"}.get(status, "the request is not valid")
    return ProblemResponse(
        problems.http_problem(status, f"{request.method} {request.url.path}: {cause}", "docs/cli.md lists the paths")
    )


async def _body(request: Request) -> bytes:
    """The whole body, bounded in size and time."""
    body = bytearray()
    with trio.move_on_after(BODY_TIMEOUT_S) as waiting:
        async for chunk in request.stream():
            body += chunk
            if len(body) > requests.BODY_BYTES_MAX:
                raise UsageError(f"the request body is larger than {requests.BODY_BYTES_MAX} bytes", "Send less at a time")
    if waiting.cancelled_caught:
        raise UsageError(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s", "Send it at once")
    return bytes(body)


def _whole_number(request: Request, name: str, most: int) -> int | None:
    given = request.query_params.get(name)
    if given is None:
        return None
    if re.fullmatch("[0-9]{1,4}", given) is None or not 1 <= int(given) <= most:
        raise UsageError(f"{name} is {given[:40]!r}", f"Give a whole number from 1 to {most}")
    return int(given)


class Control:
    """One method per route. `stopping` refuses new work while what runs may finish."""

    def __init__(self, node: NodeApi, request_stop: Callable[[], None]) -> None:
        self.node = node
        self.request_stop = request_stop
        self.stopping = False

    def _check_accepting(self) -> None:
        if self.stopping:
            raise CapacityError("the daemon is stopping and takes no new work", "Start it again, then repeat the command")

    async def status(self, request: Request) -> Response:
        return JsonResponse(to_json(self.node.status()))

    async def id(self, request: Request) -> Response:
        status = self.node.status()
        return JsonResponse(
            {
                "peer_id": status.peer_id,
                "public_key": public_key_of(status.peer_id).hex(),
                "name": status.name,
                "addresses": list(status.addresses),
            }
        )

    async def peers(self, request: Request) -> Response:
        return JsonResponse({"peers": to_json(await self.node.peers())})

    async def add_peer(self, request: Request) -> Response:
        address = requests.parse_address(await _body(request))
        return JsonResponse(to_json(await self.node.add_peer(address)), status_code=201)

    async def ping(self, request: Request) -> Response:
        peer = requests.parse_ping(await _body(request))
        return JsonResponse({"peer": peer, "rtt_s": await self.node.ping(peer)})

    async def models(self, request: Request) -> Response:
        return JsonResponse({"models": to_json(await self.node.models())})

    async def add_model(self, request: Request) -> Response:
        wanted = requests.parse_add_model(await _body(request))
        self._check_accepting()
        return EventStream(self.node.add_model(wanted.source, wanted.name, wanted.profile))

    async def model(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.model(request.path_params["name"])))

    async def fidelity(self, request: Request) -> Response:
        wanted = requests.parse_fidelity(request.path_params["name"], await _body(request))
        self._check_accepting()
        return EventStream(self.node.fidelity(wanted))

    async def plan(self, request: Request) -> Response:
        stages = _whole_number(request, "stages", requests.STAGES_MAX)
        return JsonResponse(to_json(await self.node.plan(request.path_params["name"], stages)))

    async def judge(self, request: Request) -> Response:
        nodes = _whole_number(request, "nodes", requests.NODES_MAX)
        return JsonResponse(to_json(await self.node.judge(request.path_params["name"], nodes)))

    async def run(self, request: Request) -> Response:
        wanted = requests.parse_generate(await _body(request))
        self._check_accepting()
        return EventStream(self.node.generate(wanted))

    async def embed(self, request: Request) -> Response:
        wanted = requests.parse_embed(await _body(request))
        self._check_accepting()
        return EventStream(self.node.embed(wanted))

    async def sessions(self, request: Request) -> Response:
        return JsonResponse({"sessions": to_json(await self.node.sessions())})

    async def session(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.session(request.path_params["session"])))

    async def audit(self, request: Request) -> Response:
        mode = requests.parse_audit(await _body(request))
        self._check_accepting()
        return EventStream(self.node.audit(request.path_params["session"], mode))

    async def evidence(self, request: Request) -> Response:
        return JsonResponse({"evidence": to_json(await self.node.evidence())})

    async def evidence_of(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.evidence_of(request.path_params["evidence"])))

    async def evidence_file(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.evidence_file(request.path_params["evidence"])))

    async def slashed(self, request: Request) -> Response:
        return JsonResponse({"slashed": to_json(await self.node.slashed())})

    async def resume_burning(self, request: Request) -> Response:
        requests.parse_object(await _body(request))
        return JsonResponse({"burned": await self.node.resume_burning()})

    async def ledger(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.ledger(requests.parse_peer(request.query_params.get("peer")))))

    async def stop(self, request: Request) -> Response:
        self.request_stop()
        return JsonResponse({"stopping": True}, status_code=202)

    async def livez(self, request: Request) -> Response:
        return JsonResponse({"live": True})

    async def readyz(self, request: Request) -> Response:
        self._check_accepting()
        status = self.node.status()
        if not status.ready:
            raise CapacityError(f"not ready: {status.not_ready_because}", "See: nexus doctor")
        return JsonResponse({"ready": True})

    async def version(self, request: Request) -> Response:
        return JsonResponse({"name": "nexus", "version": self.node.status().version, "api": API_VERSION})


ROUTES: tuple[tuple[str, str, Callable[[Control, Request], Awaitable[Response]]], ...] = (
    ("GET", "/v0/status", Control.status),
    ("GET", "/v0/id", Control.id),
    ("GET", "/v0/peers", Control.peers),
    ("POST", "/v0/peers", Control.add_peer),
    ("POST", "/v0/ping", Control.ping),
    ("GET", "/v0/models", Control.models),
    ("POST", "/v0/models", Control.add_model),
    ("GET", "/v0/models/{name}", Control.model),
    ("GET", "/v0/models/{name}/plan", Control.plan),
    ("GET", "/v0/models/{name}/judgement", Control.judge),
    ("POST", "/v0/models/{name}/fidelity", Control.fidelity),
    ("POST", "/v0/run", Control.run),
    ("POST", "/v0/embed", Control.embed),
    ("GET", "/v0/audits", Control.sessions),
    ("GET", "/v0/audits/{session}", Control.session),
    ("POST", "/v0/audits/{session}", Control.audit),
    ("GET", "/v0/evidence", Control.evidence),
    ("GET", "/v0/evidence/{evidence}", Control.evidence_of),
    ("GET", "/v0/evidence/{evidence}/file", Control.evidence_file),
    ("GET", "/v0/slashed", Control.slashed),
    ("POST", "/v0/slashed/resume", Control.resume_burning),
    ("GET", "/v0/ledger", Control.ledger),
    ("POST", "/v0/stop", Control.stop),
    ("GET", "/livez", Control.livez),
    ("GET", "/readyz", Control.readyz),
    ("GET", "/version", Control.version),
)


def control_app(control: Control) -> Starlette:
    """The ASGI application of the control API."""
    app = Starlette(
        routes=[Route(path, _guarded(partial(method, control)), methods=[verb]) for verb, path, method in ROUTES],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect is no answer to a program: a path is right or there is none
    return app
