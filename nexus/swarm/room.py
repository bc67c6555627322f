"""Any chain that fits: which nodes, in which order, so that every stage keeps within memory and a bound on its time.

Finding it among unlike nodes is NP-hard. The search extends sets of nodes stage by stage and keeps the BEAM sets that got furthest;
up to KINDS_EXACT kinds of nodes it keeps them all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from nexus.core.plan import STAGES_MAX
from nexus.swarm.costs import PICO_PER_MICRO, Candidate, StageCosts, load_of, speed_of

KINDS_EXACT = 8
BEAM = 128
# Longer than any stage takes, in picoseconds.
FOREVER = 1 << 100


def room_for(costs: StageCosts, nodes: Sequence[Candidate], stages: int | None, bound_ps: int) -> list[int] | None:
    """Numbers of nodes in the order of a chain whose stages take at most so many picoseconds each: as few as can be, or `stages`.
    None where the search finds none."""
    return _Search(costs, nodes, stages).order(bound_ps)


class _Search:
    """Orders of nodes whose chain keeps a bound on the slowest stage.

    Nodes of one kind (speed, load and memory) are interchangeable here. A state is how many of each kind are used; its value is the
    set of layers at which a chain of exactly those may end, as the bits of an int.
    """

    def __init__(self, costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> None:
        self._costs = costs
        self._stages = stages
        self._depth = stages or min(len(serving), costs.layers, STAGES_MAX)
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for number, node in enumerate(serving):
            kinds.setdefault((speed_of(node), load_of(node), node.memory_bytes), []).append(number)
        self._kinds = list(kinds.items())
        self._beam = (
            None if len(self._kinds) <= KINDS_EXACT and len(serving) <= 16 else max(4, BEAM * KINDS_EXACT // len(self._kinds))
        )

    def order(self, bound: int) -> list[int] | None:
        """Nodes in the order of a chain whose stages take at most `bound` picoseconds each; as few as can be, or as asked."""
        reaches = [self._reaches(*kind, bound) for kind, _ in self._kinds]
        alive = [sum(1 << start for start, reach in enumerate(kind) if reach > start) for kind in reaches]
        levels: list[dict[tuple[int, ...], int]] = [{(0,) * len(self._kinds): 1}]
        goal = 1 << self._costs.layers
        for depth in range(1, self._depth + 1):
            levels.append(self._extend(levels[-1], reaches, alive))
            if self._stages in (None, depth):
                for state, ends in sorted(levels[-1].items(), reverse=True):
                    if ends & goal:
                        return self._trace(levels, state, reaches)
        return None

    def _reaches(self, speed: int, load: int, memory: int, bound: int) -> list[int]:
        """For every first layer of a stage, the furthest end within memory and bound; the layer itself if there is none."""
        costs = self._costs
        work_most = bound * speed // (PICO_PER_MICRO * (1 + load))
        found = []
        for start in range(costs.layers):
            memory_most = memory - (costs.first_memory if start == 0 else 0)
            end = min(
                bisect_right(costs.memory_to, costs.memory_to[start] + memory_most) - 1,
                bisect_right(costs.work_to, costs.work_to[start] + work_most) - 1,
            )
            if end == costs.layers and (costs.memory(start, end) > memory or costs.work(start, end) > work_most):
                end -= 1
            found.append(max(start, end))
        return found

    def _extend(
        self, level: dict[tuple[int, ...], int], reaches: Sequence[Sequence[int]], alive: Sequence[int]
    ) -> dict[tuple[int, ...], int]:
        """Every state with one node more, or the best of them."""
        extended: dict[tuple[int, ...], int] = {}
        for state, ends in level.items():
            for kind, (_, members) in enumerate(self._kinds):
                if state[kind] < len(members) and (further := _further(ends & alive[kind], reaches[kind])):
                    after = (*state[:kind], state[kind] + 1, *state[kind + 1 :])
                    extended[after] = extended.get(after, 0) | further
        if self._beam is None or len(extended) <= self._beam:
            return extended
        best = sorted(extended.items(), key=lambda entry: (entry[1].bit_length(), entry[0]), reverse=True)
        return dict(best[: self._beam])

    def _trace(
        self, levels: Sequence[dict[tuple[int, ...], int]], state: tuple[int, ...], reaches: Sequence[Sequence[int]]
    ) -> list[int]:
        """Back from the last layer to the first: a node order that leads there. Preferred kinds come to stand first."""
        end = self._costs.layers
        kinds: list[int] = []
        for level in reversed(levels[:-1]):
            state, end, kind = self._step_back(level, state, end, reaches)
            kinds.append(kind)
        unused = [iter(members) for _, members in self._kinds]
        return [next(unused[kind]) for kind in reversed(kinds)]

    def _step_back(
        self, level: dict[tuple[int, ...], int], state: tuple[int, ...], end: int, reaches: Sequence[Sequence[int]]
    ) -> tuple[tuple[int, ...], int, int]:
        for kind in reversed(range(len(self._kinds))):
            before = (*state[:kind], state[kind] - 1, *state[kind + 1 :])
            ends = level.get(before, 0)
            for start in range(end):
                if ends >> start & 1 and reaches[kind][start] >= end:
                    return before, start, kind
        raise AssertionError("a chain that was found cannot be traced back")


def _further(starts: int, reach: Sequence[int]) -> int:
    """Where one more stage may end. `starts`: bits of the layers where it may begin, each with at least one layer in reach."""
    ends = 0
    while starts:
        low = (starts & -starts).bit_length() - 1
        run = starts >> low
        length = (~run & (run + 1)).bit_length() - 1
        high = low + length - 1
        # From a run of starts everything up to the last one's reach can be an end, as reaches only grow.
        ends |= (1 << reach[high] + 1) - (1 << low + 1)
        starts &= ~((1 << length) - 1 << low)
    return ends
