"""Who computes what for a request: what records say, as candidates for `nexus.swarm.routing` and `nexus.swarm.placement`.

A route needs no fetching and is asked for first. It is taken unless a placement, which may move layers, would be much faster.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from itertools import count

from nexus.core.hashing import tagged_hash
from nexus.core.manifest import Manifest
from nexus.swarm.costs import RttUs
from nexus.swarm.membership import NodeRecord
from nexus.swarm.placement import STREAMS, Candidate, Placement, least_step_us, place
from nexus.swarm.routing import route

# A route is taken if its step is predicted to take at most so many times what a placement's does: whoever asks waits for what has
# to be fetched, minutes for a gigabyte, and what nodes hold is for the layout to improve.
ROUTE_SLACK = 2


def candidates_of(records: Sequence[NodeRecord], manifest: Manifest, *, leaving: bool = False) -> list[Candidate]:
    """What nodes say of themselves, for this model. Those that drain take nothing new, unless `leaving` says so."""
    return [
        Candidate(
            node=record.node,
            name=record.name,
            memory_bytes=record.memory_bytes,
            speed=record.speed(manifest.profile),
            rtt_ms=None,
            held=held_ranges(record, manifest.root),
            serves=bool(record.serves) and (leaving or not record.leaving),
            load=record.load,
            domain=domain_of(record.addresses),
        )
        for record in records
    ]


def held_ranges(record: NodeRecord, model_root: bytes) -> tuple[tuple[int, int], ...]:
    return tuple((held.start, held.end) for holding in record.models if holding.model_root == model_root for held in holding.held)


def domain_of(addresses: Sequence[str]) -> str:
    """What fails together with a node, as far as its addresses tell: the /24, or the /48, of the first that the world can reach.
    "" where there is none: private addresses are the same in many homes."""
    for address in addresses:
        parts = address.split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
            continue
        try:
            ip = ipaddress.ip_address(parts[2])
        except ValueError:
            continue
        if ip.is_global:
            return str(ipaddress.ip_network(f"{ip}/{24 if ip.version == 4 else 48}", strict=False))
    return ""


def choose(
    manifest: Manifest,
    candidates: Sequence[Candidate],
    *,
    coordinator: bytes,
    stages: int | None,
    dtype: str,
    context: int,
    streams: int = STREAMS,
    rtt_us: RttUs,
    seed: bytes,
) -> Placement:
    """The route, or the placement where there is no route or a much slower one. `seed`: random bytes that the route's draws come
    from. Raises what `place` raises."""
    routed = route(
        manifest,
        candidates,
        coordinator=coordinator,
        stages=stages,
        dtype=dtype,
        context=context,
        streams=streams,
        rtt_us=rtt_us,
        below=draws(seed),
    )
    if routed is not None:
        least_us = least_step_us(manifest, candidates, dtype=dtype, context=context, streams=streams)
        if routed.step_us <= least_us * ROUTE_SLACK:
            return routed  # whatever a placement finds: to search for it takes longer than the route did
    placement = place(
        manifest,
        candidates,
        coordinator=coordinator,
        stages=stages,
        dtype=dtype,
        context=context,
        streams=streams,
        rtt_us=rtt_us,
    )
    if routed is not None and routed.step_us <= placement.step_us * ROUTE_SLACK:
        return routed
    return placement


def draws(seed: bytes) -> Callable[[int], int]:
    """Random numbers below what is asked, all from one seed: whoever calls may be on another thread than the node's randomness."""
    numbers = count()
    return lambda most: int.from_bytes(tagged_hash("draw", seed, next(numbers).to_bytes(8, "little"))[:16], "little") % most
