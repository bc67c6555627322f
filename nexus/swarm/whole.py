"""Chains of whole fragments: every node computes just the range that it holds. Pure.

A node has that range loaded, and sessions that share it share its steps as one batch. Another cut through it is loaded beside it
and batches with nobody: a chain of whole fragments costs the swarm less than its own step time says.

Each node is in one place of the layers, so no chain meets it twice, and the least latency among stages of at most a given time is a
shortest path over fragments in the order of their layers. The least step time max(latency, streams * slowest) lies where that
latency crosses `streams` times the bound; it is found by bisection over the stages' times. The link back from the last stage to the
first is added at the end: of the paths to one fragment only the shortest is followed, so that this link can be longer than it must.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexus.swarm.chains import Chain, Stage, timing
from nexus.swarm.costs import Candidate, RttUs, StageCosts, hop_picoseconds, stage_picoseconds


def fastest_of_whole(
    costs: StageCosts, holders: Sequence[Candidate], *, rtt_us: RttUs, streams: int, stages: int | None
) -> Chain | None:
    """The chain of whole fragments with the least predicted step time; None where they do not meet end to end. `holders`: with
    disjoint ranges in order, the preferred ones first; a node with several takes part with the longest. `stages`: exactly so
    many."""
    fragments = [_fragment(costs, node) for node in holders]
    search = _Search(costs, [one for one in fragments if one is not None], rtt_us, stages)
    bounds = sorted(set(search.times))
    low, high = 0, len(bounds) - 1
    found: list[Chain] = []
    while low <= high:
        middle = (low + high) // 2
        chain = search.shortest(bounds[middle])
        if chain is None:
            low = middle + 1
            continue
        found.append(chain)
        times = timing(costs, chain, rtt_us)
        if times.latency_ps > streams * times.slowest_ps:
            low = middle + 1
        else:
            high = middle - 1
    return min(found, key=lambda chain: (timing(costs, chain, rtt_us).step_ps(streams), len(chain)), default=None)


def _fragment(costs: StageCosts, node: Candidate) -> Stage | None:
    low, high = max(node.held, key=lambda span: span[1] - span[0], default=(0, 0))
    return Stage(node, low, high) if low < high and costs.memory(low, high) <= node.memory_bytes else None


class _Search:
    def __init__(self, costs: StageCosts, fragments: Sequence[Stage], rtt_us: RttUs, stages: int | None) -> None:
        self._layers = costs.layers
        self._depth = stages
        # In the order of the layers, so that whatever leads to a fragment comes before it.
        self._stages = sorted(fragments, key=lambda stage: stage.start)
        self.times = [stage_picoseconds(costs, stage.node, stage.start, stage.end) for stage in self._stages]
        self._rtt_us = rtt_us
        self._hops: dict[tuple[int, int], int] = {}
        self._ending: dict[int, list[int]] = {}
        for number, stage in enumerate(self._stages):
            self._ending.setdefault(stage.end, []).append(number)

    def _hop(self, one: int, other: int) -> int:
        pair = min(one, other), max(one, other)
        if pair not in self._hops:
            nodes = sorted((self._stages[one].node.node, self._stages[other].node.node))
            self._hops[pair] = hop_picoseconds(self._rtt_us, nodes[0], nodes[1])
        return self._hops[pair]

    def shortest(self, bound_ps: int) -> Chain | None:
        """With stages of at most that time; by how many stages it has, where that is asked for."""
        # By fragment and number of stages up to it (0 where that does not matter): latency, and the fragment before.
        best: list[dict[int, tuple[int, int]]] = [{} for _ in self._stages]
        for number, stage in enumerate(self._stages):
            if self.times[number] > bound_ps:
                continue
            if stage.start == 0:
                best[number][1 if self._depth else 0] = (self.times[number], -1)
                continue
            for before in self._ending.get(stage.start, ()):
                for depth, (latency, _) in best[before].items():
                    reached = latency + self._hop(before, number) + self.times[number]
                    deeper = depth + 1 if self._depth else 0
                    if deeper <= (self._depth or 0) and reached < best[number].get(deeper, (reached + 1, 0))[0]:
                        best[number][deeper] = (reached, before)
        ends = [number for number in self._ending.get(self._layers, ()) if (self._depth or 0) in best[number]]
        chains = [self._back(best, number) for number in ends]
        if not chains:
            return None
        numbers = min(chains, key=lambda chain: (best[chain[-1]][self._depth or 0][0] + self._hop(chain[-1], chain[0]), chain))
        return tuple(self._stages[number] for number in numbers)

    def _back(self, best: Sequence[dict[int, tuple[int, int]]], last: int) -> list[int]:
        chain, depth = [last], self._depth or 0
        while (before := best[chain[-1]][depth][1]) >= 0:
            chain.append(before)
            depth = depth - 1 if self._depth else 0
        return chain[::-1]
