"""The routes of serving fragments, versions of models, and leaving."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from nexus.core.errors import UsageError
from nexus.core.manifest import DEFAULT_PROFILE, PROFILES_ASKED
from nexus.gateway.exchange import EventStream, JsonResponse, read_body
from nexus.gateway.fields import parse_object, read_boolean, read_integer, read_name, read_number, read_optional_integer, shown
from nexus.gateway.wire import to_json
from nexus.models import BUILTIN_NAMES
from nexus.node.fragments_api import DEADLINE_MAX_S, DrainView, ServeRequest
from nexus.swarm.fragments import BYTES_MAX, VERSION_MAX

if TYPE_CHECKING:
    from nexus.gateway.control import Control

DEADLINE_S = 300.0


def parse_serve(name: str, body: bytes) -> ServeRequest:
    """Raises UsageError."""
    known = ("fragment", "memory_max_bytes", "disk_max_bytes", "upload_max_bytes", "publisher", "preload")
    value = parse_object(body, *known)
    given = {key: entry for key, entry in value.items() if entry is not None}
    default = ServeRequest(name)
    return ServeRequest(
        name=name,
        fragment=read_name(given, "fragment") if "fragment" in given else default.fragment,
        memory_max_bytes=read_integer(given, "memory_max_bytes", 0, BYTES_MAX, 0),
        disk_max_bytes=read_integer(given, "disk_max_bytes", 0, BYTES_MAX, 0),
        upload_max_bytes=read_integer(given, "upload_max_bytes", 0, BYTES_MAX, 0),
        publisher=read_name(given, "publisher") if "publisher" in given else None,
        preload=read_boolean(given, "preload", default.preload),
    )


def parse_update(body: bytes) -> tuple[Path | str, str]:
    """The source and its profile. Raises UsageError."""
    value = parse_object(body, "source", "profile")
    source = value.get("source")
    if not isinstance(source, str) or not source or "\0" in source:
        raise UsageError("source is missing", f"Give a model directory, or one of: {', '.join(BUILTIN_NAMES)}")
    profile = value.get("profile")
    profile = DEFAULT_PROFILE if profile is None else profile
    if profile not in PROFILES_ASKED:
        raise UsageError(f"profile is {shown(profile)}", f"Give one of {', '.join(PROFILES_ASKED)}")
    if source in BUILTIN_NAMES:
        return source, str(profile)
    if not Path(source).is_absolute():
        raise UsageError(f"{source!r} is neither a built-in model nor an absolute path", "The daemon has a directory of its own")
    return Path(source), str(profile)


async def serving(control: Control, request: Request) -> Response:
    return JsonResponse({"serving": to_json(await control.node.fragments.serving())})


async def serve(control: Control, request: Request) -> Response:
    wanted = parse_serve(request.path_params["name"], await read_body(request))
    control.check_accepting()
    return EventStream(control.node.fragments.serve(wanted))


async def unserve(control: Control, request: Request) -> Response:
    parse_object(await read_body(request))
    return JsonResponse({"ended": True, "notices": await control.node.fragments.unserve(request.path_params["name"])})


async def update(control: Control, request: Request) -> Response:
    source, profile = parse_update(await read_body(request))
    control.check_accepting()
    return EventStream(control.node.fragments.update(request.path_params["name"], source, profile))


async def rollback(control: Control, request: Request) -> Response:
    value = parse_object(await read_body(request), "to")
    to = read_optional_integer(value, "to", 1, VERSION_MAX) if value.get("to") is not None else None
    control.check_accepting()
    return EventStream(control.node.fragments.rollback(request.path_params["name"], to))


async def drain(control: Control, request: Request) -> Response:
    value = parse_object(await read_body(request), "deadline_s")
    deadline_s = read_number(value, "deadline_s", 0.0, DEADLINE_MAX_S, DEADLINE_S)
    control.check_accepting()
    return EventStream(_then_stop(control, deadline_s))


async def _then_stop(control: Control, deadline_s: float) -> AsyncGenerator[DrainView, None]:
    """The daemon ends when the drain is done; a client that goes away before calls it off."""
    async with aclosing(control.node.fragments.drain(deadline_s)) as views:  # type: ignore[type-var]
        async for view in views:
            if view.done:
                control.request_stop()
            yield view


ROUTES: tuple[tuple[str, str, Callable[[Control, Request], Awaitable[Response]]], ...] = (
    ("GET", "/v0/serving", serving),
    ("POST", "/v0/models/{name}/serve", serve),
    ("POST", "/v0/models/{name}/unserve", unserve),
    ("POST", "/v0/models/{name}/update", update),
    ("POST", "/v0/models/{name}/rollback", rollback),
    ("POST", "/v0/drain", drain),
)
