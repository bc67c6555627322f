"""The memory's part of the control API: one function per route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from nexus.core.errors import UsageError
from nexus.gateway import memory_requests as requests
from nexus.gateway.exchange import EventStream, JsonResponse, read_body
from nexus.gateway.wire import to_json
from nexus.node.api import NodeApi


class Server(Protocol):
    """What a route needs of the server that it belongs to."""

    node: NodeApi

    def check_accepting(self) -> None:
        """Raises CapacityError while the daemon is stopping."""
        ...


async def add(server: Server, request: Request) -> Response:
    wanted = requests.parse_add(await read_body(request))
    server.check_accepting()
    return EventStream(server.node.memory.add(wanted))


async def blocks(server: Server, request: Request) -> Response:
    filters, limit = requests.parse_list_query(request.query_params.multi_items())
    return JsonResponse({"blocks": to_json(await server.node.memory.listed(filters, limit))})


async def block(server: Server, request: Request) -> Response:
    name = requests.check_block(request.path_params["block"])
    network = requests.parse_network_query(request.query_params.multi_items())
    return JsonResponse(to_json(await server.node.memory.get(name, network=network)))


async def search(server: Server, request: Request) -> Response:
    wanted = requests.parse_search(await read_body(request))
    server.check_accepting()
    return JsonResponse(to_json(await server.node.memory.search(wanted)))


async def remove(server: Server, request: Request) -> Response:
    name = requests.parse_block(await read_body(request))
    server.check_accepting()
    return JsonResponse({"removed": to_json(await server.node.memory.remove(name))})


async def pin(server: Server, request: Request) -> Response:
    name, pinned = requests.parse_pin(await read_body(request))
    return JsonResponse(to_json(await server.node.memory.pin(name, pinned)))


async def prune(server: Server, request: Request) -> Response:
    wanted = requests.parse_prune(await read_body(request))
    server.check_accepting()
    return JsonResponse(to_json(await server.node.memory.prune(wanted)))


async def stats(server: Server, request: Request) -> Response:
    return JsonResponse(to_json(await server.node.memory.stats()))


async def export(server: Server, request: Request) -> Response:
    collections = requests.parse_export(await read_body(request))
    server.check_accepting()
    # A line may be some megabytes long: no more wait than the reader takes.
    return EventStream(server.node.memory.export(collections), lines_max=1)


async def import_part(server: Server, request: Request) -> Response:
    """The body is the part itself."""
    content = await read_body(request)
    if not content:
        raise UsageError("the request body is empty", "Send one part of an export")
    server.check_accepting()
    return JsonResponse(to_json(await server.node.memory.import_part(content)))


async def verify(server: Server, request: Request) -> Response:
    name = requests.parse_verify(await read_body(request))
    server.check_accepting()
    return EventStream(server.node.memory.verify(name))


async def reindex(server: Server, request: Request) -> Response:
    model, collection = requests.parse_reindex(await read_body(request))
    server.check_accepting()
    return EventStream(server.node.memory.reindex(model, collection))


async def collections(server: Server, request: Request) -> Response:
    return JsonResponse({"collections": to_json(await server.node.memory.collections())})


async def create_collection(server: Server, request: Request) -> Response:
    wanted = requests.parse_new_collection(await read_body(request))
    server.check_accepting()
    made = await server.node.memory.create_collection(wanted.name, wanted.mode, wanted.writers)
    return JsonResponse(to_json(made), status_code=201)


async def grant(server: Server, request: Request) -> Response:
    name = requests.check_collection(request.path_params["name"])
    wanted = requests.parse_grant(await read_body(request))
    server.check_accepting()
    return JsonResponse(to_json(await server.node.memory.grant(name, wanted.peer, write=wanted.write, revoke=wanted.revoke)))


async def subscribe(server: Server, request: Request) -> Response:
    name = requests.check_collection(request.path_params["name"])
    peer = requests.parse_subscribe(await read_body(request))
    server.check_accepting()
    return JsonResponse(to_json(await server.node.memory.subscribe(name, peer)))


async def unsubscribe(server: Server, request: Request) -> Response:
    name = requests.check_collection(request.path_params["name"])
    requests.parse_nothing(await read_body(request))
    return JsonResponse(to_json(await server.node.memory.unsubscribe(name)))


async def sync(server: Server, request: Request) -> Response:
    collection = requests.parse_sync(await read_body(request))
    server.check_accepting()
    return JsonResponse({"sync": to_json(await server.node.memory.sync(collection))})


async def sync_status(server: Server, request: Request) -> Response:
    return JsonResponse({"sync": to_json(await server.node.memory.sync_status())})


async def witness(server: Server, request: Request) -> Response:
    return JsonResponse(to_json(await server.node.memory.witness()))


ROUTES: tuple[tuple[str, str, Callable[[Server, Request], Awaitable[Response]]], ...] = (
    ("GET", "/v0/memory/blocks", blocks),
    ("POST", "/v0/memory/blocks", add),
    ("GET", "/v0/memory/blocks/{block}", block),
    ("POST", "/v0/memory/search", search),
    ("POST", "/v0/memory/remove", remove),
    ("POST", "/v0/memory/pin", pin),
    ("POST", "/v0/memory/prune", prune),
    ("GET", "/v0/memory/stats", stats),
    ("POST", "/v0/memory/export", export),
    ("POST", "/v0/memory/import", import_part),
    ("POST", "/v0/memory/verify", verify),
    ("POST", "/v0/memory/reindex", reindex),
    ("GET", "/v0/collections", collections),
    ("POST", "/v0/collections", create_collection),
    ("GET", "/v0/collections/sync", sync_status),
    ("POST", "/v0/collections/sync", sync),
    ("POST", "/v0/collections/{name}/grant", grant),
    ("POST", "/v0/collections/{name}/subscribe", subscribe),
    ("POST", "/v0/collections/{name}/unsubscribe", unsubscribe),
    ("GET", "/v0/witness", witness),
)
