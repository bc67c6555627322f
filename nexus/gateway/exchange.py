"""One request of the control API and its answer: a bounded body in; JSON, a stream of events or a problem out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import cast

import structlog
import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nexus.core.errors import NexusError, UsageError
from nexus.gateway import problems
from nexus.gateway.fields import BODY_BYTES_MAX
from nexus.gateway.wire import ERROR_EVENT, Json, event_to_json
from nexus.node.api import StreamItem

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

    def __init__(self, events: AsyncIterator[StreamItem], lines_max: int = LINES_MAX) -> None:
        """`lines_max`: how many lines may wait for a slow reader; less than usual where they are long."""
        super().__init__()
        self._lines_max = lines_max
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
        put, get = trio.open_memory_channel[bytes](self._lines_max)
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


def guarded(endpoint: Endpoint) -> Endpoint:
    """The boundary of a request: whatever goes wrong becomes a problem response, and the daemon stays up."""

    async def answered(request: Request) -> Response:
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

    return answered


async def http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    cause = {404: "there is no such path", 405: "this path does not take this method"}.get(status, "the request is not valid")
    return ProblemResponse(
        problems.http_problem(status, f"{request.method} {request.url.path}: {cause}", "docs/cli.md lists the paths")
    )


async def read_body(request: Request) -> bytes:
    """The whole body, bounded in size and time."""
    body = bytearray()
    with trio.move_on_after(BODY_TIMEOUT_S) as waiting:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES_MAX:
                raise UsageError(f"the request body is larger than {BODY_BYTES_MAX} bytes", "Send less at a time")
    if waiting.cancelled_caught:
        raise UsageError(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s", "Send it at once")
    return bytes(body)
