"""The control API: what the CLI asks a running daemon, as HTTP over a Unix socket that only its owner can open.

Answers are JSON, errors problem details (RFC 9457). Long work streams one JSON object per line (NDJSON); when it fails half way
the last line is {"event": "error", "problem": {...}}. A client that goes away cancels its work.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nexus.core.errors import CapacityError, UsageError
from nexus.core.keys import public_key_of
from nexus.gateway import fragments, memory, planning, requests
from nexus.gateway.exchange import EventStream, JsonResponse, guarded, http_error, read_body
from nexus.gateway.fields import parse_object
from nexus.gateway.wire import to_json
from nexus.node.api import NodeApi
from nexus.node.swarm_view import NODES_MAX, NODES_SHOWN

API_VERSION = "v0"


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

    def check_accepting(self) -> None:
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
        address = requests.parse_address(await read_body(request))
        return JsonResponse(to_json(await self.node.add_peer(address)), status_code=201)

    async def ping(self, request: Request) -> Response:
        peer = requests.parse_ping(await read_body(request))
        return JsonResponse({"peer": peer, "rtt_s": await self.node.ping(peer)})

    async def swarm(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.swarm(_whole_number(request, "limit", NODES_MAX) or NODES_SHOWN)))

    async def netcheck(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.netcheck()))

    async def models(self, request: Request) -> Response:
        return JsonResponse({"models": to_json(await self.node.models())})

    async def add_model(self, request: Request) -> Response:
        wanted = requests.parse_add_model(await read_body(request))
        self.check_accepting()
        return EventStream(self.node.add_model(wanted.source, wanted.name, wanted.profile))

    async def model(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.model(request.path_params["name"])))

    async def fidelity(self, request: Request) -> Response:
        wanted = requests.parse_fidelity(request.path_params["name"], await read_body(request))
        self.check_accepting()
        return EventStream(self.node.fidelity(wanted))

    async def plan(self, request: Request) -> Response:
        stages = _whole_number(request, "stages", requests.STAGES_MAX)
        return JsonResponse(to_json(await self.node.plan(request.path_params["name"], stages)))

    async def judge(self, request: Request) -> Response:
        nodes = _whole_number(request, "nodes", requests.NODES_MAX)
        return JsonResponse(to_json(await self.node.judge(request.path_params["name"], nodes)))

    async def run(self, request: Request) -> Response:
        wanted = requests.parse_generate(await read_body(request))
        self.check_accepting()
        return EventStream(self.node.generate(wanted))

    async def resume(self, request: Request) -> Response:
        wanted = requests.parse_resume(await read_body(request))
        self.check_accepting()
        return EventStream(self.node.resume(wanted))

    async def embed(self, request: Request) -> Response:
        wanted = requests.parse_embed(await read_body(request))
        self.check_accepting()
        return EventStream(self.node.embed(wanted))

    async def sessions(self, request: Request) -> Response:
        return JsonResponse({"sessions": to_json(await self.node.sessions())})

    async def session(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.session(request.path_params["session"])))

    async def audit(self, request: Request) -> Response:
        mode = requests.parse_audit(await read_body(request))
        self.check_accepting()
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
        parse_object(await read_body(request))
        return JsonResponse({"burned": await self.node.resume_burning()})

    async def ledger(self, request: Request) -> Response:
        return JsonResponse(to_json(await self.node.ledger(requests.parse_peer(request.query_params.get("peer")))))

    async def stop(self, request: Request) -> Response:
        self.request_stop()
        return JsonResponse({"stopping": True}, status_code=202)

    async def livez(self, request: Request) -> Response:
        return JsonResponse({"live": True})

    async def readyz(self, request: Request) -> Response:
        self.check_accepting()
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
    ("GET", "/v0/swarm", Control.swarm),
    ("POST", "/v0/netcheck", Control.netcheck),
    ("GET", "/v0/models", Control.models),
    ("POST", "/v0/models", Control.add_model),
    ("GET", "/v0/models/{name}", Control.model),
    ("GET", "/v0/models/{name}/plan", Control.plan),
    ("GET", "/v0/models/{name}/judgement", Control.judge),
    ("POST", "/v0/models/{name}/fidelity", Control.fidelity),
    ("POST", "/v0/run", Control.run),
    ("POST", "/v0/run/resume", Control.resume),
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
    *fragments.ROUTES,
    *planning.ROUTES,
    *memory.ROUTES,
    ("POST", "/v0/stop", Control.stop),
    ("GET", "/livez", Control.livez),
    ("GET", "/readyz", Control.readyz),
    ("GET", "/version", Control.version),
)


def control_app(control: Control) -> Starlette:
    """The ASGI application of the control API."""
    app = Starlette(
        routes=[Route(path, guarded(partial(method, control)), methods=[verb]) for verb, path, method in ROUTES],
        exception_handlers={HTTPException: http_error},
    )
    app.router.redirect_slashes = False  # a redirect is no answer to a program: a path is right or there is none
    return app
