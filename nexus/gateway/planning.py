"""The route of plans to look at, also of imagined machines: a set of them is a user's file, checked entry by entry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from nexus.core.errors import UsageError
from nexus.core.manifest import LAYERS_MAX
from nexus.core.plan import STAGES_MAX
from nexus.gateway.exchange import JsonResponse, read_body
from nexus.gateway.fields import parse_object, read_integer, read_number, read_optional_integer, shown
from nexus.gateway.wire import Json, to_json
from nexus.node.planning import DISK_UNKNOWN, LINKS_MAX, MACHINES_MAX, Link, Machine, PlanRequest
from nexus.swarm.costs import LOAD_MAX, RTT_DEFAULT_US, RTT_MAX_US, SPEED_MAX
from nexus.swarm.layout import REPLICAS_MAX
from nexus.swarm.placement import STREAMS, STREAMS_MAX

if TYPE_CHECKING:
    from nexus.gateway.control import Control

BYTES_MAX = 1 << 56
HELD_MAX = 64
NAME_MAX = 64
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_NODE_KEYS = ("name", "memory", "disk", "speed", "rtt_ms", "domain", "load", "held")


def parse_plan(model: str, body: bytes) -> PlanRequest:
    """Raises UsageError that names the entry that is wrong."""
    value = parse_object(body, "stages", "streams", "replicas", "machines")
    given = {key: entry for key, entry in value.items() if entry is not None}
    machines, links = _machines(given["machines"]) if "machines" in given else (None, ())
    return PlanRequest(
        model=model,
        stages=read_optional_integer(given, "stages", 1, STAGES_MAX),
        streams=read_integer(given, "streams", 1, STREAMS_MAX, STREAMS),
        replicas=read_optional_integer(given, "replicas", 1, REPLICAS_MAX),
        machines=machines,
        links=links,
    )


def _machines(value: Json) -> tuple[tuple[Machine, ...], tuple[Link, ...]]:
    table = _table(value, "the set of machines", ("nodes", "links", "rtt_ms"))
    default = read_number(table, "rtt_ms", 0.0, RTT_MAX_US / 1000, RTT_DEFAULT_US / 1000)
    nodes = _list(table, "nodes", MACHINES_MAX)
    links = _list(table, "links", LINKS_MAX)
    return (
        tuple(_machine(entry, number, default / 2) for number, entry in enumerate(nodes, 1)),
        tuple(_link(entry, number) for number, entry in enumerate(links, 1)),
    )


def _machine(value: Json, number: int, default_ms: float) -> Machine:
    entry = _table(value, f"node {number}", _NODE_KEYS)
    name = _name(entry, "name", f"node {number}")
    where = f"node {name!r}"
    with_where = {f"{where}: {key}": one for key, one in entry.items()}
    domain = _name(entry, "domain", where) if "domain" in entry else ""
    return Machine(
        name=name,
        memory_bytes=_size(entry, "memory", where),
        disk_bytes=_size(entry, "disk", where) if "disk" in entry else DISK_UNKNOWN,
        speed=_required(with_where, f"{where}: speed", 1, SPEED_MAX),
        rtt_us=round(1000 * read_number(with_where, f"{where}: rtt_ms", 0.0, RTT_MAX_US / 1000, default_ms)),
        domain=domain,
        load=read_integer(with_where, f"{where}: load", 0, LOAD_MAX, 0),
        held=tuple(_range(one, where) for one in _list(entry, "held", HELD_MAX, where)),
    )


def _link(value: Json, number: int) -> Link:
    where = f"link {number}"
    entry = _table(value, where, ("between", "rtt_ms"))
    ends = entry.get("between")
    if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2 or not all(isinstance(end, str) for end in ends):
        raise UsageError(f"{where}: between is {shown(ends)}", 'Give the names of two machines: ["one", "other"]')
    if "rtt_ms" not in entry:
        raise UsageError(f"{where}: rtt_ms is missing", "Give the round trip in milliseconds")
    rtt = read_number({f"{where}: rtt_ms": entry["rtt_ms"]}, f"{where}: rtt_ms", 0.0, RTT_MAX_US / 1000, 0.0)
    return Link(str(ends[0]), str(ends[1]), round(1000 * rtt))


def _table(value: Json, where: str, known: Sequence[str]) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is {shown(value)}", f"Give a table with {', '.join(known)}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise UsageError(f"{where} has an unknown entry {shown(unknown[0])}", f"Known are {', '.join(known)}")
    return value


def _list(table: Mapping[str, Json], key: str, most: int, where: str = "") -> Sequence[Json]:
    value = table.get(key, ())
    name = f"{where}: {key}" if where else key
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}", "Give a list")
    if len(value) > most:
        raise UsageError(f"{name} has {len(value)} entries", f"Give at most {most}")
    return value


def _name(entry: Mapping[str, Json], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= NAME_MAX or not value.isprintable():
        raise UsageError(f"{where}: {key} is {shown(value)}", f"Give a text of 1 to {NAME_MAX} characters")
    return value


def _required(entry: Mapping[str, Json], key: str, least: int, most: int) -> int:
    if key not in entry:
        raise UsageError(f"{key} is missing", f"Give a whole number from {least} to {most}")
    return read_integer(entry, key, least, most, least)


def _size(entry: Mapping[str, Json], key: str, where: str) -> int:
    """Bytes, or a text with a unit."""
    value = entry.get(key)
    size: float | None = None
    if isinstance(value, str):
        text = value.strip().lower().replace(" ", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        try:
            size = float(digits) * _UNITS[text[len(digits) :]] if len(digits) <= 20 else None
        except (ValueError, KeyError):
            size = None
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size is None or not 0 <= size <= BYTES_MAX:
        raise UsageError(f"{where}: {key} is {shown(value)}", 'Give bytes, or a size such as "24 GiB"')
    return int(size)


def _range(value: Json, where: str) -> tuple[int, int]:
    """ "A-B" with the last layer included, or one layer."""
    first, dash, last = value.partition("-") if isinstance(value, str) else (str(value), "", "")
    last = last if dash else first
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and len(first) <= 5 and len(last) <= 5):
        raise UsageError(f"{where}: held has {shown(value)}", 'Give layers such as "0-15", the last one included')
    start, end = int(first), int(last) + 1
    if not start < end <= LAYERS_MAX:
        raise UsageError(f"{where}: held has {shown(value)}", f"Give layers from 0 to {LAYERS_MAX - 1}, the lower one first")
    return start, end


async def _plan(control: Control, request: Request) -> Response:
    wanted = parse_plan(request.path_params["name"], await read_body(request))
    return JsonResponse(to_json(await control.node.plan_report(wanted)))


ROUTES: tuple[tuple[str, str, Callable[[Control, Request], Awaitable[Response]]], ...] = (
    ("POST", "/v0/models/{name}/plan", _plan),
)
