"""Fastest chains of stages through a model's layers. Pure, in integers, and the same for the same nodes in the same order.

A chain is a run of stages on nodes of their own. A token goes round its ring: through every stage, and from the last back to the
first. With `latency` the sum of all stages' compute and of half the round trip of every link, and `slowest` the compute of the
slowest stage, the predicted step time for so many streams under way is

    T = max(latency, streams * slowest),

the asymptotic bound of a closed queueing network (Denning and Buzen, The operational analysis of queueing network models, 1978).

The least latency f(bound) of chains whose stages take at most `bound` each falls as the bound rises, so the least T lies where it
crosses streams * bound and is found by bisection. Inside it two searches give f:

- over sets of nodes (`nexus.swarm.subsets`), which gives the optimum, for up to about ten unlike nodes or kinds of nodes;
- over layers (`nexus.swarm.layer_search`), which may miss it, for any number. Its chains are then improved by moves of one node.
  Where it finds none, a third (`nexus.swarm.room`) looks for any chain that fits: memory may leave few.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nexus.core.plan import STAGES_MAX
from nexus.swarm.costs import (
    PICO_PER_MICRO,
    Candidate,
    RttUs,
    StageCosts,
    hop_picoseconds,
    load_of,
    speed_of,
    stage_picoseconds,
    work_picoseconds,
)
from nexus.swarm.layer_search import over_layers
from nexus.swarm.room import FOREVER, room_for
from nexus.swarm.subsets import KINDS_MAX, Subsets
from nexus.swarm.tables import INF, Ints, Prices, Table, window_least

# Layers at which a stage may begin or end: all, and of a model with more an even choice.
CUTS_MAX = 256
# The step time is found to one part in so many.
PRECISION = 512
# Exactly so many stages are searched for layer by layer; more by the search that only looks for room.
DEPTH_MAX = 8
# Moves of one node that are tried on a chain, times its stages.
MOVES_MAX = 2400
# Times are counted in a unit in which the whole model on the slowest node takes at most so many.
_TIME_BITS = 50


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [start, end) on a node."""

    node: Candidate
    start: int
    end: int


Chain = tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Predicted, in picoseconds per token. `hops_ps`: the links' part of the latency. `slowest`: which stage takes longest to
    compute, `slowest_ps` how long."""

    latency_ps: int
    hops_ps: int
    slowest_ps: int
    slowest: int

    def step_ps(self, streams: int) -> int:
        return max(self.latency_ps, streams * self.slowest_ps)


def timing(costs: StageCosts, chain: Chain, rtt_us: RttUs) -> Timing:
    """What a chain is predicted to take."""
    compute = [stage_picoseconds(costs, stage.node, stage.start, stage.end) for stage in chain]
    ring = [stage.node.node for stage in chain] + [chain[0].node.node]
    hops = sum(hop_picoseconds(rtt_us, *sorted(pair)) for pair in pairwise(ring))
    slowest = max(range(len(chain)), key=lambda number: (compute[number], -number))
    return Timing(sum(compute) + hops, hops, compute[slowest], slowest)


class Ring:
    """The nodes to choose from, in order of preference, and what the model's stages cost on them.

    `stages`: exactly so many, None: as many as are best. `held_only`: a node computes only what it holds.
    """

    def __init__(
        self,
        costs: StageCosts,
        nodes: Sequence[Candidate],
        *,
        rtt_us: RttUs,
        streams: int,
        stages: int | None,
        held_only: bool = False,
    ) -> None:
        self.costs = costs
        self.nodes = list(nodes)
        self.streams = streams
        self.stages = stages
        self._rtt_us = rtt_us
        self._held_only = held_only
        steps = -(-costs.layers // CUTS_MAX)
        self.cuts = [*range(0, costs.layers, steps), costs.layers]
        self.last = len(self.cuts) - 1
        self.depth = stages or min(len(nodes), self.last, STAGES_MAX)
        self._work = np.array([costs.work(0, cut) if cut else 0 for cut in self.cuts], dtype=np.int64)
        slowest = max((work_picoseconds(node, costs.work(0, costs.layers)) for node in nodes), default=1)
        self._shift = max(0, slowest.bit_length() - _TIME_BITS)
        self._time = self._times()
        self.link = self._all_links()
        self._room = self._rooms()
        self._held_prices = self._fetch_prices()
        self.subsets = Subsets.of(self._kinds(), self.link, self.depth, self.last, named=False)
        # Prices differ between nodes that are otherwise alike.
        few = self._held_prices is not None and len(nodes) <= KINDS_MAX
        each = [[number] for number in range(len(nodes))]
        self._priced_subsets = Subsets.of(each, self.link, self.depth, self.last, named=True) if few else None
        self._tight = False  # whether only the search for room finds chains

    # --- what is known of the nodes -----------------------------------------------------------------------------------------

    def _times(self) -> Ints:
        """By node and cut: how long everything before the cut takes."""
        by_pace: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            pace = speed_of(node), load_of(node)
            if pace not in by_pace:
                by_pace[pace] = [work_picoseconds(node, int(work)) >> self._shift for work in self._work]
        return np.array([by_pace[speed_of(node), load_of(node)] for node in self.nodes], dtype=np.int64).reshape(-1, self.last + 1)

    def _all_links(self) -> Ints:
        count = len(self.nodes)
        link = np.zeros((count, count), dtype=np.int64)
        for one in range(count):
            for other in range(one):
                pair = sorted((self.nodes[one].node, self.nodes[other].node))
                link[one, other] = link[other, one] = hop_picoseconds(self._rtt_us, *pair) >> self._shift
        return link

    def _rooms(self) -> Ints:
        """By node and first cut: the furthest cut that a stage can end at within memory, and within what is held if that counts."""
        costs, last = self.costs, self.last
        to = [costs.memory_to[cut] for cut in self.cuts]
        to[last] += costs.last_memory
        rooms = np.zeros((len(self.nodes), last), dtype=np.int64)
        found: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
        for number, node in enumerate(self.nodes):
            held = node.held if self._held_only else ()
            key = (node.memory_bytes, held)
            if key not in found:
                found[key] = [self._room_from(start, node.memory_bytes, to, held) for start in range(last)]
            rooms[number] = found[key]
        return rooms

    def _room_from(self, start: int, memory: int, to: Sequence[int], held: Sequence[tuple[int, int]]) -> int:
        most = memory - (self.costs.first_memory if start == 0 else 0)
        end = bisect_right(to, to[start] + most) - 1 if most >= 0 else start
        if start == 0 and self.costs.memory(0, self.costs.layers) <= memory:
            end = self.last  # of tied weights a node that has all has one copy
        if self._held_only:
            layer = self.cuts[start]
            high = next((high for low, high in held if low <= layer < high), layer)
            end = min(end, bisect_right(self.cuts, high) - 1)
        return max(start, end)

    def _kinds(self) -> list[list[int]]:
        """Nodes that can stand for each other, in the order of the first of each; empty where there are too many kinds."""
        kinds: list[list[int]] = []
        for number, node in enumerate(self.nodes):
            for kind in kinds:
                first = self.nodes[kind[0]]
                alike = (speed_of(node), load_of(node), node.memory_bytes) == (speed_of(first), load_of(first), first.memory_bytes)
                if alike and (not self._held_only or node.held == first.held) and self._equally_far(number, kind[0]):
                    kind.append(number)
                    break
            else:
                kinds.append([number])
                if len(kinds) > KINDS_MAX:
                    return []
        return kinds

    def _equally_far(self, one: int, other: int) -> bool:
        rest = np.ones(len(self.nodes), dtype=bool)
        rest[[one, other]] = False
        return bool((self.link[one, rest] == self.link[other, rest]).all())

    def _fetch_prices(self) -> Prices | None:
        """What a stage has to fetch, the whole model being 2^20; None where nobody holds anything."""
        if not any(node.held for node in self.nodes):
            return None
        costs = self.costs
        whole = max(1, costs.stored(0, costs.layers))
        along = np.zeros((len(self.nodes), self.last + 1), dtype=np.int64)
        begin, finish = np.zeros(len(self.nodes), dtype=np.int64), np.zeros(len(self.nodes), dtype=np.int64)
        found: dict[tuple[tuple[int, int], ...], tuple[list[int], int, int]] = {}
        for number, node in enumerate(self.nodes):
            if node.held not in found:
                missing = costs.missing_to(node.held)
                first, last = costs.missing_ends(node.held)
                found[node.held] = (
                    [(missing[cut] << 20) // whole for cut in self.cuts],
                    (first << 20) // whole,
                    (last << 20) // whole,
                )
            along[number], begin[number], finish[number] = found[node.held]
        return Prices(along, begin, finish)

    # --- chains -------------------------------------------------------------------------------------------------------------

    def timing(self, chain: Chain) -> Timing:
        return timing(self.costs, chain, self._rtt_us)

    def step_ps(self, chain: Chain) -> int:
        return self.timing(chain).step_ps(self.streams)

    def fastest(self) -> Chain | None:
        """The chain of the least predicted step time that the searches find; None where they find none that fits."""
        best = self._find(FOREVER, None)
        if best is None and self.subsets is None and not self._held_only:
            self._tight = True
            best = self._find(FOREVER, None)
        if best is None:
            return None
        found = self.timing(best)
        high = found.step_ps(self.streams)
        total = sum(speed_of(node) * 1000 // (1 + load_of(node)) for node in self.nodes)
        low = self.streams * (self.costs.work(0, self.costs.layers) * PICO_PER_MICRO * 1000 // max(1, total)) - 1
        if self.subsets is not None:
            low = max(low, found.latency_ps - 1)  # no chain has less latency
        while high - low > max(1, high // PRECISION):
            middle = (low + high) // 2
            chain = self._find(middle // self.streams, None)
            if chain is None:
                low = middle
                continue
            found = self.timing(chain)
            if found.step_ps(self.streams) < high:
                best, high = chain, found.step_ps(self.streams)
            if found.latency_ps > middle:
                low = middle  # a looser bound has less latency, and a slower stage than is allowed
            else:
                high = min(high, middle)
        if self.subsets is None:
            best = self._improved(best)
        return self._settled(best)

    def frugal(self, step_ps: int) -> list[Chain]:
        """Chains that take at most so long and have little to fetch."""
        if self._held_prices is None:
            return []
        chains = []
        for weight in (1 << 12, 1 << 5, 1 << 2, 1):
            # To fetch the whole model costs so many times the step time.
            scale = max(1, (min(step_ps >> self._shift, 1 << 34)) * weight >> 20)
            held = self._held_prices
            priced = Prices(held.along * scale, held.begin * scale, held.finish * scale)
            chain = self._find(step_ps // self.streams, priced)
            if chain is not None and self.step_ps(chain) <= step_ps:
                chains.append(chain)
                break  # a smaller weight fetches no less
        holders = [number for number, node in enumerate(self.nodes) if node.held][: self.depth]
        for order in (holders, sorted(holders, key=lambda number: self.nodes[number].held)):
            if order and self.stages in (None, len(order)):
                ends = self._split(order, step_ps // self.streams, priced)
                if ends and self.step_ps(split := self._chain(order, ends)) <= step_ps:
                    chains.append(split)
        return chains

    def _find(self, bound_ps: int, prices: Prices | None) -> Chain | None:
        """The chain of the least latency and price of which no stage takes longer than the bound."""
        if not self.nodes:
            return None
        cost, begin, finish = self._costs_of(prices)
        table = Table(cost, begin, finish, self.link, self._reach(bound_ps), self.stages)
        subsets = self.subsets if prices is None else self._priced_subsets
        if subsets is not None:
            found = subsets.find(table)
        elif not self._tight and (self.stages or 0) <= DEPTH_MAX:
            found = over_layers(table)
        elif self._held_only:
            found = None
        else:
            order = room_for(self.costs, self.nodes, self.stages, bound_ps)
            ends = self._split(order, bound_ps, prices) if order else None
            found = (order, ends) if order and ends else None
        return None if found is None else self._chain(*found)

    def _chain(self, order: Sequence[int], ends: Sequence[int]) -> Chain:
        bounds = [self.cuts[cut] for cut in (0, *ends)]
        return tuple(Stage(self.nodes[number], *span) for number, span in zip(order, pairwise(bounds), strict=True))

    def _reach(self, bound_ps: int) -> Ints:
        """By node and first cut: the furthest cut within memory and bound; the cut itself where there is none."""
        reach = self._room.copy()
        if bound_ps >= FOREVER:
            return reach
        by_pace: dict[tuple[int, int], Ints] = {}
        for number, node in enumerate(self.nodes):
            pace = speed_of(node), load_of(node)
            if pace not in by_pace:
                most = min(bound_ps * pace[0] // (PICO_PER_MICRO * (1 + pace[1])), INF)
                ends = np.searchsorted(self._work, self._work[:-1] + most, side="right") - 1
                by_pace[pace] = ends.astype(np.int64)
            np.minimum(reach[number], by_pace[pace], out=reach[number])
        return np.maximum(reach, np.arange(self.last))

    def _costs_of(self, prices: Prices | None) -> tuple[Ints, Ints, Ints]:
        if prices is None:
            nothing = np.zeros(len(self.nodes), dtype=np.int64)
            return self._time, nothing, nothing
        return self._time + prices.along, prices.begin, prices.finish

    # --- one order of nodes -------------------------------------------------------------------------------------------------

    def _split(self, order: Sequence[int], bound_ps: int, prices: Prices | None) -> list[int] | None:
        """Where the stages of these nodes in this order end, each with at least one layer and within the bound, at the least
        latency and price; None where they cannot."""
        if len(order) > self.last:
            return None
        reach = self._reach_of(order, bound_ps)
        cost, begin, _ = self._costs_of(prices)
        levels = [np.full(self.last + 1, INF, dtype=np.int64)]
        levels[0][0] = begin[order[0]]
        for number, row in zip(order, reach, strict=True):
            entry = (levels[-1] - cost[number])[None, :]
            ends = window_least(np.where(levels[-1] >= INF, INF, entry), row)[0]
            levels.append(np.where(ends >= INF, INF, ends + cost[number]))
        if levels[-1][self.last] >= INF:
            return None
        cut, cuts = self.last, [self.last]
        for level in range(len(order) - 1, 0, -1):
            number, row = order[level], reach[level]
            starts = np.flatnonzero((row[:cut] >= cut) & (levels[level][:cut] < INF))
            values = levels[level][starts] - cost[number][starts]
            cut = int(starts[values.argmin()])
            cuts.append(cut)
        return cuts[::-1]

    def _reach_of(self, order: Sequence[int], bound_ps: int) -> list[Ints]:
        rows = []
        for number in order:
            row = self._room[number]
            if bound_ps < FOREVER:
                node = self.nodes[number]
                most = min(bound_ps * speed_of(node) // (PICO_PER_MICRO * (1 + load_of(node))), INF)
                ends = np.searchsorted(self._work, self._work[:-1] + most, side="right") - 1
                row = np.maximum(np.minimum(row, ends), np.arange(self.last))
            rows.append(row)
        return rows

    def _order_within(self, order: Sequence[int], step_ps: int) -> Chain | None:
        """A chain of these nodes in this order that takes at most so long."""
        ends = self._split(order, step_ps // self.streams, None)
        if ends is None:
            return None
        chain = self._chain(order, ends)
        return chain if self.step_ps(chain) <= step_ps else None

    def _settled(self, chain: Chain) -> Chain:
        """The same nodes, the preferred ones first where that costs nothing, and within the same step time the slowest stage as
        fast as can be."""
        number_of = {node.node: number for number, node in enumerate(self.nodes)}
        order = [number_of[stage.node.node] for stage in chain]
        step = self.step_ps(chain)
        if sorted(order) != order and (preferred := self._order_within(sorted(order), step)):
            chain, order = preferred, sorted(order)
        high = self.timing(chain).slowest_ps
        low = high * 3 // 4 if self.streams * high * 4 > step * 3 else 0
        for _ in range(10):
            if high - low <= max(1, high // 256):
                break
            middle = (low + high) // 2
            ends = self._split(order, middle, None)
            if ends is not None and self.step_ps(evener := self._chain(order, ends)) <= step:
                chain, high = evener, self.timing(evener).slowest_ps
            else:
                low = middle
        return chain

    def _improved(self, chain: Chain) -> Chain:
        """Moves of one node, as long as they help and there are tries left."""
        number_of = {node.node: number for number, node in enumerate(self.nodes)}
        order = [number_of[stage.node.node] for stage in chain]
        tries = MOVES_MAX // len(order)
        while tries > 0:
            step = self.step_ps(chain)
            goal = step - max(1, step // PRECISION)
            for moved in self._moves(order):
                tries -= 1
                better = self._order_within(moved, goal)
                if better is not None:
                    chain, order = better, moved
                    break
                if tries <= 0:
                    break
            else:
                break
        return chain

    def _moves(self, order: Sequence[int]) -> Iterator[list[int]]:
        used = set(order)
        quick = sorted((n for n in range(len(self.nodes)) if n not in used), key=lambda n: (int(self._time[n, -1]), n))
        near = sorted((n for n in quick), key=lambda n: (int(self.link[n, order].sum()), n))
        others = list(dict.fromkeys([*quick[:6], *near[:6]]))
        if self.stages is None and len(order) > 1:
            for at in range(len(order)):
                yield [*order[:at], *order[at + 1 :]]
        for at in range(len(order)):
            for to in range(len(order) - 1):
                if to != at:
                    rest = [*order[:at], *order[at + 1 :]]
                    yield [*rest[:to], order[at], *rest[to:]]
        for other in others:
            for at in range(len(order)):
                yield [*order[:at], other, *order[at + 1 :]]
        if self.stages is None:
            for other in others:
                for at in range(len(order) + 1):
                    yield [*order[:at], other, *order[at:]]
