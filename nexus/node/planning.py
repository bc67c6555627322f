"""Plans to look at: who would compute what, how fast that is predicted to be, how many nodes hold each layer, what is missing.

Over the nodes in reach, or over a set of machines that somebody imagines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from nexus.core.errors import UsageError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import peer_id_of
from nexus.core.manifest import Manifest, stage_pieces
from nexus.core.plan import DTYPES
from nexus.node.api import PlanView, StageView
from nexus.node.placing import candidates_of
from nexus.swarm.costs import RttUs
from nexus.swarm.layout import Layout, Member, layout
from nexus.swarm.membership import NodeRecord
from nexus.swarm.placement import STREAMS, Candidate, Placement, place

# A member of which nothing says how much disk it gives.
DISK_UNKNOWN = 1 << 56
MACHINES_MAX = 1000
LINKS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Machine:
    """One that is imagined. `memory_bytes`: for weights and KV caches. `disk_bytes`: for weights. `speed`: millions of
    multiply-adds per second in the model's profile. `rtt_us`: from it to the middle of the network. `held`: layers [start, end).
    `load`: sessions that it runs."""

    name: str
    memory_bytes: int
    disk_bytes: int
    speed: int
    rtt_us: int
    domain: str
    load: int
    held: tuple[tuple[int, int], ...]

    @property
    def node(self) -> bytes:
        return tagged_hash("imagined machine", self.name.encode())


@dataclass(frozen=True, slots=True)
class Link:
    """The round trip between two machines, by name."""

    one: str
    other: str
    rtt_us: int


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """`stages`: exactly so many. `streams`: sessions that are to run at once. `replicas`: of every layer, None: two, and three
    where nodes are idle. `machines` None: the nodes in reach; else these, of which the first is the one that asks, with `links`
    where the round trip is not the sum of what both say."""

    model: str
    stages: int | None = None
    streams: int = STREAMS
    replicas: int | None = None
    machines: tuple[Machine, ...] | None = None
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class LayersView:
    """Layers [start, end): on how many nodes they are now, would be, and are to be."""

    start: int
    end: int
    held: int
    planned: int
    wanted: int


@dataclass(frozen=True, slots=True)
class FragmentView:
    """Layers [start, end) that a node is to hold, in the layout of the whole swarm."""

    peer_id: str
    name: str
    start: int
    end: int
    fetch_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class PlanReport:
    """`latency_us`: once round the ring with nobody else there; `slowest_us`: what stage number `slowest` computes; `step_us`: what
    each of `streams` sessions waits for a token. Rates in tokens per second: of one session alone, and of all of them.
    `memory_bytes`: what the plan takes of `memory_offered_bytes` on all nodes. `layers`, `fragments`, `short`: redundancy, where
    the model would go, and what is missing for it, in words."""

    plan: PlanView
    streams: int
    latency_us: float
    slowest_us: float
    slowest: int
    step_us: float
    tokens_per_s: float
    streams_tokens_per_s: float
    memory_bytes: int
    memory_offered_bytes: int
    fetch_bytes: int
    layers: tuple[LayersView, ...]
    fragments: tuple[FragmentView, ...]
    short: tuple[str, ...]


def plan_view(name: str, manifest: Manifest, placement: Placement, names: Mapping[bytes, str]) -> PlanView:
    return PlanView(
        model=name,
        model_root=manifest.root,
        plan_root=placement.plan.root,
        stages=tuple(
            StageView(
                stage=number,
                peer_id=peer_id_of(stage.node),
                name=names.get(stage.node, ""),
                start=stage.start,
                end=stage.end,
                weight_bytes=sum(piece.size for piece in stage_pieces(manifest, stage.start, stage.end)),
                memory_bytes=memory,
                reason=reason,
            )
            for number, (stage, memory, reason) in enumerate(
                zip(placement.plan.stages, placement.memory_bytes, placement.reasons, strict=True)
            )
        ),
        reason=placement.reason,
    )


def imagined(request: PlanRequest, manifest: Manifest, name: str, context: int) -> PlanReport:
    """The report on a set of machines. Raises UsageError for a set that contradicts itself, CapacityError where nothing fits."""
    machines = request.machines or ()
    if not machines:
        raise UsageError("there is no machine to plan with", "Describe at least one under nodes")
    by_name: dict[str, Machine] = {}
    for machine in machines:
        if machine.name in by_name:
            raise UsageError(f"two machines are called {machine.name!r}", "Give each a name of its own")
        by_name[machine.name] = machine
    links: dict[tuple[bytes, bytes], int] = {}
    for link in request.links:
        for end in (link.one, link.other):
            if end not in by_name:
                raise UsageError(
                    f"a link leads to {end!r}, which is no machine of the set", "Describe it under nodes, or correct it"
                )
        one, other = by_name[link.one].node, by_name[link.other].node
        links[one, other] = links[other, one] = link.rtt_us
    own_us = {machine.node: machine.rtt_us for machine in machines}

    def rtt_us(one: bytes, other: bytes) -> int:
        return links.get((one, other), own_us[one] + own_us[other])

    candidates = [
        Candidate(one.node, one.name, one.memory_bytes, one.speed, None, one.held, True, one.load, one.domain) for one in machines
    ]
    members = [Member(candidate, machine.disk_bytes, machine.held) for candidate, machine in zip(candidates, machines, strict=True)]
    placement = place(
        manifest,
        candidates,
        coordinator=machines[0].node,
        stages=request.stages,
        dtype=DTYPES[manifest.profile][0],
        context=context,
        streams=request.streams,
        rtt_us=rtt_us,
    )
    return report(request, manifest, name, placement, members, context, rtt_us)


def members_of(records: Sequence[NodeRecord], manifest: Manifest) -> list[Member]:
    """What nodes in reach say, for a layout to look at: what they hold counts as served where they undertook nothing."""
    serving = {
        record.node: tuple(
            (one.start, one.end) for holding in record.models if holding.model_root == manifest.root for one in holding.serving
        )
        for record in records
    }
    return [
        Member(candidate, DISK_UNKNOWN, serving[candidate.node] or candidate.held, None, candidate.load / STREAMS)
        for candidate in candidates_of(records, manifest)
    ]


def report(
    request: PlanRequest,
    manifest: Manifest,
    name: str,
    placement: Placement,
    members: Sequence[Member],
    context: int,
    rtt_us: RttUs,
) -> PlanReport:
    found = layout(
        manifest,
        members,
        replicas=request.replicas,
        dtype=DTYPES[manifest.profile][0],
        context=context,
        streams=request.streams,
        rtt_us=rtt_us,
    )
    serving = [member.candidate for member in members if member.candidate.serves]
    names = {candidate.node: candidate.name for candidate in serving}
    return PlanReport(
        plan=plan_view(name, manifest, placement, names),
        streams=placement.streams,
        latency_us=placement.latency_us,
        slowest_us=placement.slowest_us,
        slowest=placement.slowest,
        step_us=placement.step_us,
        tokens_per_s=placement.tokens_per_s,
        streams_tokens_per_s=placement.streams_tokens_per_s,
        memory_bytes=sum(placement.memory_bytes),
        memory_offered_bytes=sum(candidate.memory_bytes for candidate in serving),
        fetch_bytes=sum(placement.fetch_bytes),
        layers=_layers(manifest.layers, serving, found),
        fragments=tuple(
            FragmentView(peer_id_of(one.node), names[one.node], one.start, one.end, one.fetch_bytes, one.reason)
            for one in found.fragments
        ),
        short=tuple(str(shortage) for shortage in found.short),
    )


def _layers(count: int, serving: Sequence[Candidate], found: Layout) -> tuple[LayersView, ...]:
    """Runs of layers of which the same is true."""
    held = [sum(any(low <= layer < high for low, high in one.held) for one in serving) for layer in range(count)]
    rows = zip(held, found.coverage, found.wanted, strict=True)
    views = []
    start = 0
    for (have, planned, wanted), run in groupby(rows):
        end = start + len(list(run))
        views.append(LayersView(start, end, have, planned, wanted))
        start = end
    return tuple(views)
