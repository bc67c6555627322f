"""Placement: which node computes which layers. Pure, and the same for the same nodes in whatever order they are given.

A plan is a chain of stages, each a run of consecutive layers on a node of its own. What counts, in this order:

1. Nothing is put where it does not fit. A stage needs memory for its weights, at the dtype of computation, and for the KV cache of
   the planned context; the first stage also holds the embedding, the last the head, and the embedding where the two are tied.
2. The slowest stage is as fast as it can be. A stage takes its multiply-adds per token divided by its node's measured speed. The
   slowest bounds what the chain yields with several sessions under way; shares in proportion to speed, within memory, follow from
   it. Nodes are used as long as they make the slowest stage faster: one too slow or too small for a single layer is left out, and
   of plans equal so far the one with the fewest stages wins, for fewer hops per token.
3. Within SLACK of that, the plan with the fewest bytes to fetch: measured speeds waver by as much, and moving layers takes minutes.
4. Then nodes come in this order: the coordinator, so that the prompt may stay at home, the nearer ones, the smaller keys.

Finding the best order of unlike nodes is NP-hard. The search extends sets of nodes stage by stage and keeps the BEAM sets that got
furthest; up to 8 kinds of nodes (by speed and memory) it keeps them all, and the slowest stage is then within 0.1 % of the best.
Nothing but integers decides. Of very many nodes only SHORTLIST are searched: a stranger can make up as many as it likes, and the
search must end all the same. docs/adr/0006-placement-by-slowest-stage.md says what else was considered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from nexus.core.errors import CapacityError, MalformedError, UsageError
from nexus.core.manifest import EMBEDDING, EXACT, HEAD, Manifest, layer_name
from nexus.core.plan import STAGES_MAX, Plan, PlanStage

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# One part in so many may be given up of the slowest stage's speed for bytes that need not be fetched.
SLACK = 8
# Speeds are cut to this many significant bits (steps of 1/8 to 1/16), so that measuring again seldom changes a plan.
SPEED_BITS = 4
# For a node that has not measured itself: a slow single core.
UNMEASURED_SPEED = 1000
KINDS_EXACT = 8
SHORTLIST = 128
BEAM = 128
# Work / speed in millions per second, times this, is in picoseconds.
_PICO_PER_MICRO = 10**6
_FOREVER = 1 << 100


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may take a stage. `memory_bytes`: free for weights and KV caches. `speed`: millions of multiply-adds per second,
    0 where it is not known. `rtt_ms`: round trip from the coordinator, None where it is not known. `held`: ranges [start, end) of
    layers whose pieces it has, as `nexus.storage.catalog.held_layers` gives them. `serves`: whether it takes stages at all."""

    node: bytes
    name: str
    memory_bytes: int
    speed: int
    rtt_ms: float | None
    held: tuple[tuple[int, int], ...]
    serves: bool


@dataclass(frozen=True, slots=True)
class Placement:
    """`memory_bytes` and `reasons` have one entry per stage; `reason` is about the whole. Both in plain English."""

    plan: Plan
    memory_bytes: tuple[int, ...]
    reasons: tuple[str, ...]
    reason: str


class StageCosts:
    """What the stages of a model cost, from its manifest alone. Memory and stored bytes, and multiply-adds per token ("work")."""

    def __init__(self, manifest: Manifest, dtype: str, context: int) -> None:
        """`dtype`: of the computation. `context`: tokens whose KV cache counts. Raises MalformedError for an unknown dtype."""
        # In the exact profile weights and KV cache are in memory as they are stored, and `dtype` says nothing more.
        width_of = manifest.dtype if manifest.profile == EXACT else dtype
        if width_of not in DTYPE_BYTES or manifest.dtype not in DTYPE_BYTES:
            raise MalformedError(f"no known size of {manifest.dtype!r} or {dtype!r}")
        self.layers = manifest.layers
        self._tied = bool(manifest.tied)
        self._stored = {piece.name: piece.size for piece in manifest.pieces}
        self._stored_width, self._width = DTYPE_BYTES[manifest.dtype], DTYPE_BYTES[width_of]
        kv = manifest.kv_bytes * min(context, manifest.context)
        if manifest.profile != EXACT:
            kv = kv * self._width // DTYPE_BYTES["float32"]
        names = [layer_name(layer) for layer in range(self.layers)]
        # Over layers [0, n), by n, and without embedding and head.
        self.memory_to = [0, *accumulate(self._loaded(name) + kv for name in names)]
        self.work_to = [0, *accumulate(self._elements(name) for name in names)]
        self.stored_to = [0, *accumulate(self._stored[name] for name in names)]
        self.first_memory = self._loaded(EMBEDDING)
        self.head_work = self._elements(HEAD) + (self._elements(EMBEDDING) if self._tied else 0)

    def _elements(self, name: str) -> int:
        return self._stored[name] // self._stored_width

    def _loaded(self, name: str) -> int:
        return -(-self._stored[name] * self._width // self._stored_width)

    def _ends(self, start: int, end: int) -> list[str]:
        """Which of embedding and head a stage needs."""
        last = end == self.layers
        return ([EMBEDDING] if start == 0 or (last and self._tied) else []) + ([HEAD] if last else [])

    def memory(self, start: int, end: int) -> int:
        return self.memory_to[end] - self.memory_to[start] + sum(self._loaded(name) for name in self._ends(start, end))

    def stored(self, start: int, end: int) -> int:
        return self.stored_to[end] - self.stored_to[start] + sum(self._stored[name] for name in self._ends(start, end))

    def work(self, start: int, end: int) -> int:
        """One multiply-add per weight. The embedding is looked up for nothing, unless it is also the head."""
        return self.work_to[end] - self.work_to[start] + (self.head_work if end == self.layers else 0)

    def to_fetch(self, start: int, end: int, held: Sequence[tuple[int, int]]) -> int:
        """Stored bytes that a node lacks for a stage. A range that is held includes what a stage of just that range needs."""
        last_held = any(high == self.layers for _, high in held)
        here = {EMBEDDING: any(low == 0 for low, _ in held) or (self._tied and last_held), HEAD: last_held}
        missing = self.stored_to[end] - self.stored_to[start]
        for low, high in held:
            low, high = max(low, start), min(high, end)
            if low < high:
                missing -= self.stored_to[high] - self.stored_to[low]
        return missing + sum(self._stored[name] for name in self._ends(start, end) if not here[name])


def place(
    manifest: Manifest, nodes: Sequence[Candidate], *, coordinator: bytes, stages: int | None, dtype: str, context: int
) -> Placement:
    """A plan for the model over the serving nodes, by the rule above. `stages`: exactly so many, None: the rule decides.

    Raises UsageError for more stages than nodes or layers, CapacityError where the model fits nowhere.
    """
    costs = StageCosts(manifest, dtype, context)
    serving = _serving(nodes, coordinator, manifest.layers)
    _check_count(stages, serving, manifest.layers)
    chains = _best_chains(costs, _shortlist(costs, serving, stages), stages)
    if chains is None:
        raise _no_room(costs, serving, stages)
    chain = min(chains, key=lambda chain: _merit(costs, chain, serving))
    plan = Plan(1, manifest.root, manifest.profile, dtype, tuple(PlanStage(one.node.node, one.start, one.end) for one in chain))
    return Placement(
        plan=plan.check(manifest),
        memory_bytes=tuple(costs.memory(one.start, one.end) for one in chain),
        reasons=tuple(_stage_reason(costs, one, chain) for one in chain),
        reason=_whole_reason(costs, chain, serving, nodes, stages),
    )


def stage_picoseconds(costs: StageCosts, node: Candidate, start: int, end: int) -> int:
    """How long the stage takes per token on that node."""
    return -(-costs.work(start, end) * _PICO_PER_MICRO // _speed(node))


@dataclass(frozen=True, slots=True)
class _Stage:
    node: Candidate
    start: int
    end: int


_Chain = tuple[_Stage, ...]


def _speed(node: Candidate) -> int:
    """The speed that counts: known, and cut to SPEED_BITS."""
    speed = node.speed or UNMEASURED_SPEED
    shift = max(0, speed.bit_length() - SPEED_BITS)
    return speed >> shift << shift


def _serving(nodes: Sequence[Candidate], coordinator: bytes, layers: int) -> list[Candidate]:
    """The nodes to choose from, the preferred ones first; what they say they hold put in order."""
    if len({node.node for node in nodes}) != len(nodes):
        raise UsageError("a node is named twice among those to place on")

    def preference(node: Candidate) -> tuple[bool, int, float, bytes]:
        held = sum(end - start for start, end in node.held)
        return node.node != coordinator, -held, float("inf") if node.rtt_ms is None else node.rtt_ms, node.node

    return sorted((replace(node, held=_merged(node.held, layers)) for node in nodes if node.serves), key=preference)


def _shortlist(costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> list[Candidate]:
    """Those to search among, in the same order: half of them the first in preference, which hold most, the others the fastest; and
    if all these together have too little memory, also those with the most."""
    count = max(SHORTLIST, stages or 0)
    if len(serving) <= count:
        return list(serving)
    chosen = {node.node for node in serving[: count // 2]}
    rest = sorted(serving[count // 2 :], key=lambda node: (-_speed(node), -node.memory_bytes, node.node))
    chosen |= {node.node for node in rest[: count - len(chosen)]}
    free = sum(node.memory_bytes for node in serving if node.node in chosen)
    for node in sorted(serving, key=lambda node: (-node.memory_bytes, node.node)):
        if free >= 2 * costs.memory(0, costs.layers) or len(chosen) >= STAGES_MAX:
            break
        if node.node not in chosen:
            chosen.add(node.node)
            free += node.memory_bytes
    return [node for node in serving if node.node in chosen]


def _merged(held: Sequence[tuple[int, int]], layers: int) -> tuple[tuple[int, int], ...]:
    """The same layers as disjoint ranges in order. Peers may claim a layer twice, or one that is not."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted((max(low, 0), min(high, layers)) for low, high in held):
        if low >= high:
            continue
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _check_count(stages: int | None, serving: Sequence[Candidate], layers: int) -> None:
    if stages is None:
        return
    if not 1 <= stages <= STAGES_MAX:
        raise UsageError(f"{stages} stages are asked for", f"Ask for 1 to {min(len(serving), layers, STAGES_MAX)}")
    if stages > layers:
        raise UsageError(f"{stages} stages are asked for and the model has {layers} layers", f"Ask for at most {layers}")
    if stages > len(serving):
        raise UsageError(
            f"{stages} stages are asked for and {len(serving)} {'node serves' if len(serving) == 1 else 'nodes serve'}",
            "Ask for fewer, or start more nodes; `nexus peers` lists those in reach",
        )


# --- the search -------------------------------------------------------------------------------------------------------------


def _best_chains(costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> list[_Chain] | None:
    """Chains worth comparing: as fast as it gets, and if layers are held already, also those within SLACK of that."""
    search = _Search(costs, serving, stages)
    order = search.order(_FOREVER)
    if order is None:
        return None
    # The least bound on the slowest stage that some chain keeps lies in (low, high].
    low = costs.work(0, costs.layers) * _PICO_PER_MICRO // sum(_speed(node) for node in serving) - 1
    high = _slowest(costs, _split(costs, order, _FOREVER))
    while high - low > max(1, high // search.precision):
        middle = (low + high) // 2
        found = search.order(middle)
        if found is None:
            low = middle
        else:
            order, high = found, min(middle, _slowest(costs, _split(costs, found, middle)))
    orders_and_bounds = [(order, high)]
    if any(node.held for node in serving):
        bound = high + high // SLACK
        relaxed = search.order(bound) or order
        holders = [node for node in serving if node.held][: min(costs.layers, STAGES_MAX)]
        for chosen in (order, relaxed, holders):
            if stages in (None, len(chosen)):
                orders_and_bounds += [(chosen, bound), (sorted(chosen, key=_first_held), bound)]
    chains = [_split(costs, one, bound) for one, bound in orders_and_bounds]
    return [chain for chain in chains if chain]


def _first_held(node: Candidate) -> tuple[int, int]:
    return min(node.held, default=(1 << 32, 0))


class _Search:
    """Orders of nodes whose chain keeps a bound on the slowest stage.

    Nodes of one kind (speed and memory) are interchangeable here. A state is how many of each kind are used; its value is the set
    of layers at which a chain of exactly those may end, as the bits of an int.
    """

    def __init__(self, costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> None:
        self._costs = costs
        self._stages = stages
        self._depth = stages or min(len(serving), costs.layers, STAGES_MAX)
        kinds: dict[tuple[int, int], list[Candidate]] = {}
        for node in serving:
            kinds.setdefault((_speed(node), node.memory_bytes), []).append(node)
        self._kinds = list(kinds.items())
        exact = len(self._kinds) <= KINDS_EXACT
        self.precision = 1000 if exact else 64
        self._beam = None if exact else max(4, BEAM * KINDS_EXACT // len(self._kinds))

    def order(self, bound: int) -> list[Candidate] | None:
        """Nodes in the order of a chain whose stages take at most `bound` picoseconds each; as few as can be, or as asked."""
        reaches = [self._reaches(speed, memory, bound) for (speed, memory), _ in self._kinds]
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

    def _reaches(self, speed: int, memory: int, bound: int) -> list[int]:
        """For every first layer of a stage, the furthest end within memory and bound; the layer itself if there is none."""
        costs = self._costs
        work_most = bound * speed // _PICO_PER_MICRO
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
    ) -> list[Candidate]:
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


def _split(costs: StageCosts, order: Sequence[Candidate], bound: int) -> _Chain:
    """Every layer on the nodes of `order`, at least one each, no stage slower than `bound`: with the fewest bytes to fetch, then
    as evenly as can be (least sum of squared times). Empty if there is no such chain."""
    # By where the stages so far end: (bytes to fetch, sum of squares), and where each of them ends.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for number, node in enumerate(order):
        left = len(order) - number - 1
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (fetch, squares, ends) in best.items():
            for end in range(start + 1, costs.layers - left + 1) if left else (costs.layers,):
                picoseconds = stage_picoseconds(costs, node, start, end)
                if picoseconds > bound or costs.memory(start, end) > node.memory_bytes:
                    break
                sofar = (fetch + costs.to_fetch(start, end, node.held), squares + picoseconds**2, (*ends, end))
                if end not in longer or sofar < longer[end]:
                    longer[end] = sofar
        best = longer
    if costs.layers not in best:
        return ()
    return tuple(_Stage(node, start, end) for node, (start, end) in zip(order, pairwise(best[costs.layers][2]), strict=True))


def _slowest(costs: StageCosts, chain: _Chain) -> int:
    return max(stage_picoseconds(costs, one.node, one.start, one.end) for one in chain)


def _fetched(costs: StageCosts, chain: _Chain) -> int:
    return sum(costs.to_fetch(one.start, one.end, one.node.held) for one in chain)


def _merit(costs: StageCosts, chain: _Chain, serving: Sequence[Candidate]) -> tuple[int, int, int, list[int]]:
    """What is compared between chains that are all fast enough; the least is the best."""
    rank = {node.node: number for number, node in enumerate(serving)}
    return _fetched(costs, chain), _slowest(costs, chain), len(chain), [rank[one.node.node] for one in chain]


# --- the reasons ------------------------------------------------------------------------------------------------------------


def _no_room(costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> CapacityError:
    if not serving:
        return CapacityError(
            "no node serves stages", "Start a node with serve.enabled = true, or connect to one with `nexus peers add MULTIADDR`"
        )
    offered = sum(node.memory_bytes for node in serving)
    needed = costs.memory(0, costs.layers)
    listed = ", ".join(f"{_name(node)} offers {_bytes(node.memory_bytes)}" for node in serving[:8])
    more = f" and {len(serving) - 8} more" if len(serving) > 8 else ""
    least = min(costs.memory(layer, layer + 1) for layer in range(costs.layers))
    if offered < needed:
        what = f"it needs {_bytes(needed)} and {_bytes(needed - offered)} are missing"
    else:
        ends = f"the first stage needs at least {_bytes(costs.memory(0, 1))}"
        ends += f", the last {_bytes(costs.memory(costs.layers - 1, costs.layers))}"
        count = f"into {stages} stages " if stages else ""
        what = f"it needs {_bytes(needed)} and no split {count}fits: the smallest stage has {_bytes(least)}, {ends}"
    return CapacityError(
        f"the model has no room: {what} ({listed}{more})",
        "Raise serve.memory_max_bytes, add a node" + (", or ask for another number of stages" if stages else ""),
    )


def _stage_reason(costs: StageCosts, one: _Stage, chain: _Chain) -> str:
    work = costs.work(one.start, one.end) / max(1, costs.work(0, costs.layers))
    speed = _speed(one.node) / sum(_speed(other.node) for other in chain)
    memory = costs.memory(one.start, one.end)
    fetch = costs.to_fetch(one.start, one.end, one.node.held)
    ends = [name for name, has in (("embedding", one.start == 0), ("head", one.end == costs.layers)) if has]
    parts = [
        f"{one.end - one.start} of {costs.layers} layers{''.join(f' and the {name}' for name in ends)}",
        f"{work:.0%} of the work for {speed:.0%} of the speed{'' if one.node.speed else ' (assumed, not measured)'}",
        f"{_bytes(memory)} of {_bytes(one.node.memory_bytes)} memory",
        "holds it already" if not fetch else f"fetches {_bytes(fetch)}",
    ]
    return "; ".join(parts)


def _whole_reason(
    costs: StageCosts, chain: _Chain, serving: Sequence[Candidate], nodes: Sequence[Candidate], stages: int | None
) -> str:
    slowest = max(chain, key=lambda one: stage_picoseconds(costs, one.node, one.start, one.end))
    took = stage_picoseconds(costs, slowest.node, slowest.start, slowest.end)
    fetch = _fetched(costs, chain)
    used = {one.node.node for one in chain}
    asked = ", as asked" if stages else ""
    parts = [
        f"{len(chain)} {'stage' if len(chain) == 1 else 'stages'} on {len(serving)} serving {_nodes(len(serving))}{asked}, "
        f"so that the slowest ({_name(slowest.node)}) computes {_time(took)} per token by its measured speed",
        f"{_bytes(costs.memory(0, costs.layers))} of weights and KV cache",
        "nothing to fetch" if not fetch else f"{_bytes(fetch)} to fetch",
    ]
    least = min(costs.memory(layer, layer + 1) for layer in range(costs.layers))
    idle = [node for node in serving if node.node not in used]
    small = [node for node in idle if node.memory_bytes < least]
    parts += _left_out(small, f"too small, a layer needs {_bytes(least)}")
    parts += _left_out(
        [node for node in idle if node not in small],
        "another stage would not make the slowest one faster" if not stages else "not needed for so many stages",
    )
    parts += _left_out(sorted((node for node in nodes if not node.serves), key=lambda node: node.node), "not serving")
    return "; ".join(parts)


def _left_out(nodes: Sequence[Candidate], why: str) -> list[str]:
    if not nodes:
        return []
    names = ", ".join(_name(node) for node in nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
    return [f"left out: {names} ({why})"]


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"


def _name(node: Candidate) -> str:
    return node.name or node.node.hex()[:8]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _time(picoseconds: int) -> str:
    for unit, size in (("s", 10**12), ("ms", 10**9)):
        if picoseconds >= size:
            return f"{picoseconds / size:.1f} {unit}"
    return f"{picoseconds / 10**6:.1f} µs"
