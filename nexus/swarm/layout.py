"""Layout: which layers each node is to hold, so that every layer is on so many nodes, with little to move when nodes come and go.

Pure, and the same for the same members in whatever order they are given. What is served now is where it starts from:

1. A member keeps the range that it serves, as far as it fits; what its owner pinned stays as it is.
2. Replica after replica, beginning with layers that nobody holds: where none of a whole copy is there, free nodes take it as the
   chain that `nexus.swarm.chains` finds fastest; what is left of it is filled range by range, by whoever has to fetch least for it:
   a node that serves nothing, one that serves the layers beside it and has room for more, or one whose own layers have more
   replicas than this and that can leave them for it.
3. Layers whose replicas are busy get more: as many as bring each below BUSY. Where they are idle, they get fewer again, down to the
   number that is asked for, and not below what would make the others busier than CALM: between the two nothing changes.

Replicas of a layer are on distinct nodes, and in distinct domains (what fails together: a /24, an operator) as far as there are
enough that have room. Where no number is asked for, two replicas are a must, and a third is taken by nodes that serve nothing else:
it moves nobody.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from nexus.core.errors import UsageError
from nexus.core.manifest import Manifest
from nexus.swarm.chains import Ring
from nexus.swarm.costs import (
    PICO_PER_MICRO,
    Candidate,
    RttUs,
    StageCosts,
    merged_ranges,
    rtt_default,
    speed_of,
    work_picoseconds,
)
from nexus.swarm.placement import SHORTLIST, STREAMS, check_streams, shown_bytes

# Replicas that must be, and that idle nodes bring it to, where no number is asked for.
REPLICAS, REPLICAS_SPARE = 2, 3
REPLICAS_MAX = 64
# No node's word for how busy it is counts for more: it would have all the others hold its layers.
DEMAND_MAX = 4.0
# A replica that is busier than this share of its time wants another beside it; one is given up if the others stay below CALM.
BUSY, CALM = 0.7, 0.35
# While others can take them, no range takes longer than so many times what it would if the fastest nodes shared the model.
PACE = 2
# Who fetches more than so many times what is lacking, for the sake of layers between, is the last resort.
DEAR = 2
# One move may make room for another; after so many rounds it is left at that.
PASSES_MAX = 6
# Free nodes that are compared for a range, beside those that hold some of it.
FREE_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class Member:
    """A node that may hold some of the model. `disk_bytes`: what it can store of it. `serving`: the ranges that it has undertaken
    to serve now. `pinned`: ranges that its owner wants it to serve, and no others; None: what the swarm needs. `demand`: the share
    of its time that it is busy with this model, 1.0 all of it, more where sessions wait."""

    candidate: Candidate
    disk_bytes: int
    serving: tuple[tuple[int, int], ...] = ()
    pinned: tuple[tuple[int, int], ...] | None = None
    demand: float = 0.0


@dataclass(frozen=True, slots=True)
class Fragment:
    """Layers [start, end) for a node. `fetch_bytes`: what it has to fetch for that."""

    node: bytes
    start: int
    end: int
    fetch_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shortage:
    """Layers [start, end) have `replicas` where `wanted` were asked for. `missing_bytes`: of stored weights, over all replicas."""

    start: int
    end: int
    replicas: int
    wanted: int
    missing_bytes: int

    def __str__(self) -> str:
        layers = f"layer {self.start} has" if self.end - self.start == 1 else f"layers {self.start}-{self.end - 1} have"
        return f"{layers} {self.replicas} of {self.wanted} replicas: {shown_bytes(self.missing_bytes)} missing"


@dataclass(frozen=True, slots=True)
class Layout:
    """`fragments`: by node and start; a node that is not in it is to hold nothing of the model. `coverage`: replicas per layer,
    `domains`: in how many distinct domains. `wanted`: how many replicas each layer is to have. `fetch_bytes`: what has to move."""

    fragments: tuple[Fragment, ...]
    coverage: tuple[int, ...]
    domains: tuple[int, ...]
    wanted: tuple[int, ...]
    short: tuple[Shortage, ...]
    fetch_bytes: int

    def of(self, node: bytes) -> tuple[tuple[int, int], ...]:
        """What a node is to hold."""
        return tuple((fragment.start, fragment.end) for fragment in self.fragments if fragment.node == node)


def layout(
    manifest: Manifest,
    members: Sequence[Member],
    *,
    replicas: int | None,
    dtype: str,
    context: int,
    streams: int = STREAMS,
    rtt_us: RttUs = rtt_default,
) -> Layout:
    """Ranges for the members, by the rule above. `replicas`: of every layer, None: two, and three where nodes are idle.

    Raises UsageError for a number of replicas that cannot be meant and for a node that is named twice.
    """
    check_streams(streams)
    if replicas is not None and not 1 <= replicas <= REPLICAS_MAX:
        raise UsageError(f"{replicas} replicas are asked for", f"Ask for 1 to {REPLICAS_MAX}")
    if len({member.candidate.node for member in members}) != len(members):
        raise UsageError("a node is named twice among the members of a layout")
    costs = StageCosts(manifest, dtype, context)
    planner = _Planner(costs, members, replicas or REPLICAS, streams, rtt_us)
    planner.keep()
    planner.fill()
    if replicas is None:
        planner.fill_idle(REPLICAS_SPARE)
    planner.give_up(max(replicas or 0, REPLICAS_SPARE if replicas is None else 0))
    return planner.result()


class _Seat:
    """A member, what it is given, and what it has room for."""

    def __init__(self, number: int, member: Member, costs: StageCosts) -> None:
        self.number = number
        self.member = member
        self.node = member.candidate.node
        self.pinned = merged_ranges(member.pinned, costs.layers) if member.pinned is not None else None
        served = merged_ranges(member.serving, costs.layers)
        self.here = merged_ranges((*member.candidate.held, *served), costs.layers)
        self.served = max(served, key=lambda span: (span[1] - span[0], -span[0]), default=None)
        self.span: tuple[int, int] | None = None
        self.reason = ""

    @property
    def movable(self) -> bool:
        return self.pinned is None

    def spans(self) -> tuple[tuple[int, int], ...]:
        if self.pinned is not None:
            return self.pinned
        return (self.span,) if self.span else ()


class _Planner:
    def __init__(self, costs: StageCosts, members: Sequence[Member], replicas: int, streams: int, rtt_us: RttUs) -> None:
        self._costs = costs
        self._layers = costs.layers
        self._streams = streams
        self._rtt_us = rtt_us
        able = sorted((member for member in members if member.candidate.serves), key=lambda member: member.candidate.node)
        self._seats = [_Seat(number, member, costs) for number, member in enumerate(able)]
        self._holders: list[dict[bytes, str]] = [{} for _ in range(costs.layers)]  # of each layer, and in which domain
        domains = len({self._domain(seat) for seat in self._seats})
        self._pace_ps = self._fair_pace()
        self._replicas = replicas
        self.wanted = self._wanted()
        # Up to so many replicas only distinct domains count; when looking for room, 0 where those in one domain must do.
        self._spread = self._apart = min(domains, max(self.wanted))
        self._dear = False  # whether any price is paid
        self._ends = costs.stored(0, costs.layers) - costs.stored_to[costs.layers]
        self._moves = 0

    @staticmethod
    def _domain(seat: _Seat) -> str:
        """Nodes of which no domain is known are each in one of their own."""
        return f"domain {seat.member.candidate.domain}" if seat.member.candidate.domain else f"node {seat.node.hex()}"

    def _fair_pace(self) -> int:
        """How long a range may take per token: PACE times what it would where the fastest nodes share the model by their speed."""
        # A chain of about as many stages as there are streams is as good as any: longer ones only add links.
        fast = sorted((speed_of(seat.member.candidate) for seat in self._seats), reverse=True)[: self._streams]
        return PACE * self._costs.work(0, self._layers) * PICO_PER_MICRO // max(1, sum(fast))

    def _wanted(self) -> list[int]:
        """By layer: as many replicas as were asked for, and as many as keep them from being busy."""
        busy = [0.0] * self._layers
        for seat in self._seats:
            demand = min(max(seat.member.demand, 0.0), DEMAND_MAX) if math.isfinite(seat.member.demand) else 0.0
            for low, high in merged_ranges(seat.member.serving, self._layers):
                for layer in range(low, high):
                    busy[layer] += demand
        self._busy = busy
        most = max(1, len(self._seats))
        return [min(max(self._replicas, math.ceil(share / BUSY - 1e-9)), max(self._replicas, most)) for share in busy]

    # --- what fits ----------------------------------------------------------------------------------------------------------

    def _fits(self, seat: _Seat, start: int, end: int, *, paced: bool) -> bool:
        costs, member = self._costs, seat.member
        if costs.memory(start, end) > member.candidate.memory_bytes or costs.stored(start, end) > member.disk_bytes:
            return False
        idle = replace(member.candidate, load=0)
        return not paced or end - start == 1 or work_picoseconds(idle, costs.work(start, end)) <= self._pace_ps

    def _longest(self, seat: _Seat, start: int, most: int, *, paced: bool) -> int:
        """The furthest end of a range from `start` that fits, at most `most`; `start` where none does."""
        return start + bisect_left(range(start + 1, most + 1), True, key=lambda end: not self._fits(seat, start, end, paced=paced))

    def _lowest(self, seat: _Seat, end: int, least: int, *, paced: bool) -> int:
        """The first start of a range up to `end` that fits, at least `least`; `end` where none does."""
        lengths = range(1, end - least + 1)
        return end - bisect_left(lengths, True, key=lambda length: not self._fits(seat, end - length, end, paced=paced))

    # --- who holds what -----------------------------------------------------------------------------------------------------

    def _give(self, seat: _Seat, span: tuple[int, int] | None, reason: str) -> None:
        for low, high in seat.spans():
            for layer in range(low, high):
                self._holders[layer].pop(seat.node, None)
        seat.span, seat.reason = span, reason
        for low, high in seat.spans():
            for layer in range(low, high):
                self._holders[layer][seat.node] = self._domain(seat)

    def _count(self, layer: int) -> int:
        """Replicas that count: those in one domain as one, as long as there are more domains than replicas."""
        return _counted(self._holders[layer].values(), self._spread)

    def _count_without(self, layer: int, seat: _Seat) -> int:
        return _counted([domain for node, domain in self._holders[layer].items() if node != seat.node], self._apart)

    def _count_with(self, layer: int, seat: _Seat) -> int:
        return _counted([*self._holders[layer].values(), self._domain(seat)], self._spread)

    def keep(self) -> None:
        """What is served now, as far as it fits; the pinned first."""
        for seat in self._seats:
            if seat.pinned is not None:
                self._give(seat, None, "pinned by its owner")
        for seat in self._seats:
            if seat.movable and seat.served is not None:
                start, end = seat.served
                fits = self._longest(seat, start, end, paced=False)
                if fits > start:
                    self._give(seat, (start, fits), "serves it already" if fits == end else "serves it already, as far as it fits")

    def fill(self) -> None:
        """Replica after replica, and again as long as one move makes room for another."""
        for _ in range(PASSES_MAX):
            before = self._moves
            for level in range(1, max(self.wanted) + 1):
                self._fill_level(level)
            if self._moves == before:
                return

    def _fill_level(self, level: int) -> None:
        """Every layer that wants so many replicas gets them, if they can be had: in domains of their own, else on nodes of their
        own; by nodes fast enough for so much, else by any; with little to fetch beside what is lacking, else at any price."""
        everywhere = all(self._count(layer) < level <= self.wanted[layer] for layer in range(self._layers))
        if everywhere:
            self._take_chain(level)
        for spread, dear in ((self._apart, False), (0, False), (0, True)):
            self._spread, self._dear = spread, dear
            for paced in (True, False):
                self._fill_ranges(level, paced=paced)
        self._spread, self._dear = self._apart, False

    def fill_idle(self, level: int) -> None:
        """Nodes that serve nothing take what has the fewest replicas."""
        goal = [max(level, wanted) for wanted in self.wanted]
        for low in range(1, level + 1):
            self._fill_ranges(low, paced=True, goal=goal, idle_only=True)

    def _take_chain(self, level: int) -> None:
        """A whole replica on nodes that serve nothing: the fastest chain that they can make."""
        free = [seat for seat in self._seats if seat.movable and seat.span is None]
        used = {domain for holders in self._holders for domain in holders.values()}
        apart = [seat for seat in free if self._domain(seat) not in used]
        for seats in (apart, free) if len(apart) < len(free) else (free,):
            chosen = self._chain_of(seats)
            if chosen:
                for seat, start, end in chosen:
                    self._give(seat, (start, end), f"replica {level}: part of the fastest chain of free nodes")
                return

    def _chain_of(self, seats: Sequence[_Seat]) -> list[tuple[_Seat, int, int]]:
        """By speed and by room half and half, where there are very many."""
        if len(seats) > SHORTLIST:
            quick = sorted(seats, key=lambda seat: (-speed_of(seat.member.candidate), seat.node))[: SHORTLIST // 2]
            roomy = sorted(seats, key=lambda seat: (-min(seat.member.candidate.memory_bytes, seat.member.disk_bytes), seat.node))
            seats = list({seat.number: seat for seat in (*quick, *roomy[: SHORTLIST // 2])}.values())
        by_node = {seat.node: seat for seat in seats}
        # Where disk is shorter than memory it bounds what a node can hold.
        nodes = [
            replace(
                seat.member.candidate,
                memory_bytes=self._memory_for_disk(seat),
                held=seat.here,
                load=0,
            )
            for seat in sorted(seats, key=lambda seat: seat.node)
        ]
        ring = Ring(self._costs, nodes, rtt_us=self._rtt_us, streams=self._streams, stages=None)
        fastest = ring.fastest()
        if fastest is None:
            return []
        step = ring.step_ps(fastest)
        chains = [fastest, *ring.frugal(step + step // 8)]
        chain = min(chains, key=lambda one: sum(self._costs.to_fetch(s.start, s.end, s.node.held) for s in one))
        return [(by_node[stage.node.node], stage.start, stage.end) for stage in chain]

    def _memory_for_disk(self, seat: _Seat) -> int:
        memory, disk = seat.member.candidate.memory_bytes, seat.member.disk_bytes
        stored, loaded = self._costs.stored(0, self._layers), self._costs.memory(0, self._layers)
        return min(memory, disk * loaded // max(1, stored)) if disk < stored else memory

    def _fill_ranges(self, level: int, *, paced: bool, goal: Sequence[int] | None = None, idle_only: bool = False) -> None:
        goal = goal or self.wanted
        stuck: set[int] = set()
        while True:
            start = next(
                (n for n in range(self._layers) if n not in stuck and self._count(n) < level <= goal[n]),
                None,
            )
            if start is None:
                return
            end = start + 1
            while end < self._layers and end not in stuck and self._count(end) < level <= goal[end]:
                end += 1
            if not self._fill_range(level, start, end, paced=paced, idle_only=idle_only):
                # One at a time: a shorter range may still fit where the whole does not.
                stuck |= {start}

    def _fill_range(self, level: int, start: int, end: int, *, paced: bool, idle_only: bool) -> bool:
        best: tuple[tuple[int, int, int, bytes], _Seat, tuple[int, int]] | None = None
        for seat in self._candidates_for(start, end, idle_only=idle_only):
            for span in self._ways(seat, level, start, end, paced=paced):
                gained = self._gain(seat, level, span, start, end)
                if not gained:
                    continue
                fetch = self._costs.to_fetch(*span, merged_ranges((*seat.here, *seat.spans()), self._layers))
                if fetch > DEAR * gained + self._ends and not self._dear:
                    continue
                dropped = 0 if seat.span is None else self._costs.stored_to[seat.span[1]] - self._costs.stored_to[seat.span[0]]
                kept = 0 if seat.span is None else self._common(seat.span, span)
                merit = (
                    -(2 * gained - fetch - (dropped - kept) // 4),
                    work_picoseconds(replace(seat.member.candidate, load=0), 1 << 20),
                    span[0],
                    seat.node,
                )
                if best is None or merit < best[0]:
                    best = merit, seat, span
        if best is None:
            return False
        _, seat, span = best
        self._give(seat, span, self._why(seat, level, span))
        self._moves += 1
        return True

    def _common(self, one: tuple[int, int], other: tuple[int, int]) -> int:
        low, high = max(one[0], other[0]), min(one[1], other[1])
        return self._costs.stored_to[high] - self._costs.stored_to[low] if low < high else 0

    def _candidates_for(self, start: int, end: int, *, idle_only: bool) -> Iterator[_Seat]:
        """Free nodes that hold some of it or are among the roomiest and fastest, and nodes that serve something else."""
        free = [seat for seat in self._seats if seat.movable and seat.span is None]
        if len(free) > 2 * FREE_LOOKED_AT:
            holding = [seat for seat in free if any(low < end and start < high for low, high in seat.here)]
            roomy = sorted(free, key=lambda seat: (-min(seat.member.candidate.memory_bytes, seat.member.disk_bytes), seat.node))
            quick = sorted(free, key=lambda seat: (-speed_of(seat.member.candidate), seat.node))
            known = set(self._holders[start].values())
            elsewhere = [seat for seat in quick if self._domain(seat) not in known]
            parts = (holding[:FREE_LOOKED_AT], roomy[:FREE_LOOKED_AT], quick[:FREE_LOOKED_AT], elsewhere[:FREE_LOOKED_AT])
            free = sorted({seat.number: seat for part in parts for seat in part}.values(), key=lambda seat: seat.number)
        yield from free
        if not idle_only:
            yield from (seat for seat in self._seats if seat.movable and seat.span is not None)

    def _ways(self, seat: _Seat, level: int, start: int, end: int, *, paced: bool) -> Iterator[tuple[int, int]]:
        """Ranges that this member could take to fill some of [start, end)."""
        span = seat.span
        fits = self._longest(seat, start, end, paced=paced)
        lowest = self._lowest(seat, end, start, paced=paced)
        if span is None or self._spare(seat, level, *span):
            if fits > start:
                yield start, fits
            if lowest < end and (lowest, end) != (start, fits):
                yield lowest, end
            return
        low, high = span
        if low <= start and high < end:
            # Longer to the right, over layers between where it must, leaving what others hold as well on the left.
            for upto in dict.fromkeys((end, max(high, start) + 1)):
                first = self._lowest(seat, upto, low, paced=paced)
                if first < upto and self._spare(seat, level, low, min(first, high)):
                    yield first, upto
                    break
            upto = self._longest(seat, low, end, paced=paced)
            if upto > max(high, start):
                yield low, upto
        if start < low and end <= high:
            for downto in dict.fromkeys((start, min(low, end) - 1)):
                last = self._longest(seat, downto, high, paced=paced)
                if last > downto and self._spare(seat, level, max(last, low), high):
                    yield downto, last
                    break
            downto = self._lowest(seat, high, start, paced=paced)
            if downto < min(low, end):
                yield downto, high

    def _spare(self, seat: _Seat, level: int, start: int, end: int) -> bool:
        """Whether these layers of the seat's have so many replicas without it, or as many as they want."""
        return all(self._count_without(layer, seat) >= min(level, self.wanted[layer]) for layer in range(start, end))

    def _gain(self, seat: _Seat, level: int, span: tuple[int, int], start: int, end: int) -> int:
        """Stored bytes of layers that are short of this replica and would have it."""
        gained = 0
        for layer in range(max(span[0], start), min(span[1], end)):
            if seat.node in self._holders[layer]:
                continue
            if self._count(layer) < self._count_with(layer, seat):
                gained += max(1, self._costs.stored_to[layer + 1] - self._costs.stored_to[layer])
        return gained

    def _why(self, seat: _Seat, level: int, span: tuple[int, int]) -> str:
        before = seat.span
        name = {1: "nobody else served them", 2: "they had one replica"}.get(level, f"they had {level - 1} replicas")
        if before is None:
            return f"served nothing; {name}" if self._costs.to_fetch(*span, seat.here) else f"holds them already; {name}"
        if before[0] < span[1] and span[0] < before[1]:
            return f"serves layers {before[0]}-{before[1] - 1} and takes those beside them; {name}"
        return f"layers {before[0]}-{before[1] - 1} have enough replicas without it; {name}"

    # --- what is too much ---------------------------------------------------------------------------------------------------

    def give_up(self, least: int) -> None:
        """Replicas beyond those wanted go, the slowest nodes' first, while those that stay are calm."""
        keep = [max(least, wanted) for wanted in self.wanted]
        slow_first = sorted(
            (seat for seat in self._seats if seat.movable and seat.span is not None),
            key=lambda seat: (-work_picoseconds(replace(seat.member.candidate, load=0), 1 << 20), seat.node),
        )
        for seat in slow_first:
            if seat.span is None:
                continue
            low, high = seat.span
            if all(self._may_lose(seat, layer, keep[layer]) for layer in range(low, high)):
                self._give(seat, None, "")

    def _may_lose(self, seat: _Seat, layer: int, keep: int) -> bool:
        left = self._count_without(layer, seat)
        return left >= keep and (self._busy[layer] <= CALM * left)

    # --- the result ---------------------------------------------------------------------------------------------------------

    def result(self) -> Layout:
        fragments = [
            Fragment(seat.node, low, high, self._costs.to_fetch(low, high, seat.here), seat.reason)
            for seat in self._seats
            for low, high in seat.spans()
        ]
        coverage = tuple(len(holders) for holders in self._holders)
        return Layout(
            fragments=tuple(sorted(fragments, key=lambda one: (one.node, one.start))),
            coverage=coverage,
            domains=tuple(len(set(holders.values())) for holders in self._holders),
            wanted=tuple(self.wanted),
            short=tuple(self._shortages(coverage)),
            fetch_bytes=sum(fragment.fetch_bytes for fragment in fragments),
        )

    def _shortages(self, coverage: Sequence[int]) -> Iterator[Shortage]:
        layers = [(n, coverage[n], self.wanted[n]) for n in range(self._layers) if coverage[n] < self.wanted[n]]
        runs = groupby(enumerate(layers), key=lambda entry: (entry[1][0] - entry[0], entry[1][1], entry[1][2]))
        for (_, have, wanted), run in runs:
            numbers = [entry[1][0] for entry in run]
            start, end = numbers[0], numbers[-1] + 1
            yield Shortage(start, end, have, wanted, (wanted - have) * self._costs.stored(start, end))


def _counted(domains: Collection[str], apart: int) -> int:
    distinct = len(set(domains))
    return distinct if distinct < apart else max(distinct, len(domains))
