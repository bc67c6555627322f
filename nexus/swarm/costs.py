"""What a stage costs on a node: memory, bytes to fetch, time. From the manifest and from what nodes say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nexus.core.errors import MalformedError
from nexus.core.manifest import EMBEDDING, EXACT, HEAD, Manifest, layer_name

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# Speeds are rounded to this many significant bits, less than 1 % away: nodes as good as equal are then treated as equal.
SPEED_BITS = 6
# For a node that has not measured itself: a slow single core.
UNMEASURED_SPEED = 1000
# A decoded token reads every weight once, and no machine's memory gives more than about 67 TB/s: who claims more has not measured.
SPEED_MAX = 1 << 26
# More sessions than that are not told apart.
LOAD_MAX = 1000
# Round trips are believed up to so many microseconds; between nodes of which nothing is known the default is assumed.
RTT_MAX_US = 10_000_000
RTT_DEFAULT_US = 20_000
# Work / speed in millions per second, times this, is in picoseconds.
PICO_PER_MICRO = 10**6

# Predicted round trip in microseconds between two nodes, by their public keys.
RttUs = Callable[[bytes, bytes], int]


def rtt_default(one: bytes, other: bytes) -> int:
    """For nodes between which nothing was measured."""
    return RTT_DEFAULT_US


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may take a stage. `memory_bytes`: free for weights and KV caches. `speed`: millions of multiply-adds per second,
    0 where it is not known. `rtt_ms`: round trip from the coordinator, None where it is not known; it breaks ties. `held`: ranges
    [start, end) of layers whose pieces it has, as `nexus.storage.catalog.held_layers` gives them. `serves`: whether it takes stages
    at all. `load`: sessions that it runs now; its speed is shared with them. `domain`: what fails together with it, such as the
    /24 of its address or its operator; "" where that is not known."""

    node: bytes
    name: str
    memory_bytes: int
    speed: int
    rtt_ms: float | None
    held: tuple[tuple[int, int], ...]
    serves: bool
    load: int = 0
    domain: str = ""


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
        self.last_memory = sum(self._loaded(name) for name in ([EMBEDDING] if self._tied else []) + [HEAD])
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

    def missing_to(self, held: Sequence[tuple[int, int]]) -> list[int]:
        """By n: stored bytes of layers [0, n) that a node lacks, without embedding and head. `held`: disjoint, in order."""
        here = [False] * self.layers
        for low, high in held:
            here[low:high] = [True] * (high - low)
        sizes = (self.stored_to[layer + 1] - self.stored_to[layer] for layer in range(self.layers))
        return [0, *accumulate(0 if has else size for has, size in zip(here, sizes, strict=True))]

    def missing_ends(self, held: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Stored bytes beside layers that a node lacks for being the first stage, and for being the last."""
        last_held = any(high == self.layers for _, high in held)
        embedding = 0 if any(low == 0 for low, _ in held) or (self._tied and last_held) else self._stored[EMBEDDING]
        return embedding, 0 if last_held else self._stored[HEAD] + (embedding if self._tied else 0)

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


def speed_of(node: Candidate) -> int:
    """The speed that counts, with nothing else running: known, possible, and rounded to SPEED_BITS."""
    speed = node.speed if 0 < node.speed <= SPEED_MAX else UNMEASURED_SPEED
    shift = max(0, speed.bit_length() - SPEED_BITS)
    return (speed + (1 << shift >> 1)) >> shift << shift


def load_of(node: Candidate) -> int:
    """Sessions under way that count."""
    return min(max(node.load, 0), LOAD_MAX)


def work_picoseconds(node: Candidate, work: int) -> int:
    """How long so many multiply-adds take on a node, whose speed is shared with what it runs already."""
    return -(-work * (1 + load_of(node)) * PICO_PER_MICRO // speed_of(node))


def stage_picoseconds(costs: StageCosts, node: Candidate, start: int, end: int) -> int:
    """How long the stage takes per token on that node."""
    return work_picoseconds(node, costs.work(start, end))


def hop_picoseconds(rtt_us: RttUs, one: bytes, other: bytes) -> int:
    """One way between two nodes: half the round trip. Within bounds, whatever was claimed; none from a node to itself."""
    if one == other:
        return 0
    return min(max(rtt_us(one, other), 0), RTT_MAX_US) * PICO_PER_MICRO // 2


def merged_ranges(held: Sequence[tuple[int, int]], layers: int) -> tuple[tuple[int, int], ...]:
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
