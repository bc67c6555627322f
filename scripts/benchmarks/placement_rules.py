"""How others place layers, as pure functions of our own, and the machines that they published figures for.

- Petals (Borzunov et al., Petals: Collaborative Inference and Fine-tuning of Large Models, 2022, arXiv 2209.01188; its repository's
  block_selection.py and sequence_manager.py): every server takes as many blocks as fit, where the throughput is lowest, compared
  block by block in ascending order; it moves if the swarm's slowest block would gain enough. A client takes the shortest path over
  servers, each to the end of its blocks.
- prima.cpp (Li et al., 2025, arXiv 2504.08791, Halda): in the order of the devices' ranks, the numbers of layers that minimise one
  token's latency within memory, leaving devices out where that is faster. Here everything is in memory: no disk is read.

Both are judged by the same predicted step time as ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# (number of the machine, first layer, layer after the last)
Split = tuple[tuple[int, int, int], ...]

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """`memory`: bytes for weights. `speed`: bytes of weights that it works through per microsecond; in decoding every weight is
    read once per token, so that is its memory's bandwidth. `place`: where it is, by a name that links are given between."""

    name: str
    memory: int
    speed: int
    place: str = ""


@dataclass(frozen=True)
class Setting:
    """`layers`: bytes of each. `links`: round trips in microseconds between places, sorted; `default_us` where none is given."""

    name: str
    source: str
    machines: tuple[Machine, ...]
    layers: tuple[int, ...]
    default_us: int
    links: Mapping[tuple[str, str], int]

    def rtt_us(self, one: int, other: int) -> int:
        if one == other:
            return 0
        first, second = sorted((self.machines[one].place, self.machines[other].place))
        return self.links.get((first, second), self.default_us)


def step_us(setting: Setting, split: Split, streams: int) -> float:
    """max(latency, streams * slowest stage), by the definition."""
    compute = [sum(setting.layers[start:end]) / setting.machines[number].speed for number, start, end in split]
    ring = [number for number, _, _ in split]
    hops = sum(setting.rtt_us(a, b) / 2 for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))
    return max(sum(compute) + hops, streams * max(compute))


# --- Petals -----------------------------------------------------------------------------------------------------------------

_BALANCE_QUALITY = 0.75
_OVERHEAD_US = 18_000  # serialisation, as its router assumes; it enters the route, not the judgement


def petals(setting: Setting) -> Split | None:
    """None where no chain covers the model."""
    spans = _balanced(setting, _spans(setting))
    return _shortest(setting, spans)


def _spans(setting: Setting) -> list[tuple[int, int]]:
    """Servers come one after the other and take the blocks with the lowest throughput."""
    throughput = [0.0] * len(setting.layers)
    spans: list[tuple[int, int]] = []
    for machine in setting.machines:
        blocks = min(len(setting.layers), machine.memory // max(setting.layers))
        start = _lowest(throughput, blocks) if blocks else 0
        spans.append((start, start + blocks))
        for block in range(start, start + blocks):
            throughput[block] += machine.speed
    return spans


def _lowest(throughput: Sequence[float], blocks: int) -> int:
    starts = range(len(throughput) - blocks + 1)
    return min(starts, key=lambda start: (sorted(throughput[start : start + blocks]), start))


def _balanced(setting: Setting, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Servers move while somebody's move promises to raise the slowest block's throughput by enough."""
    for _ in range(len(spans)):
        for number in range(len(spans)):
            moved = _moved(setting, spans, number)
            if moved is not None:
                spans = moved
                break
        else:
            break
    return spans


def _throughput(setting: Setting, spans: Sequence[tuple[int, int]]) -> list[float]:
    found = [0.0] * len(setting.layers)
    for machine, (start, end) in zip(setting.machines, spans, strict=True):
        for block in range(start, end):
            found[block] += machine.speed
    return found


def _moved(setting: Setting, spans: list[tuple[int, int]], number: int) -> list[tuple[int, int]] | None:
    before = min(_throughput(setting, spans))
    tried = list(spans)
    others = [span if other != number else (0, 0) for other, span in enumerate(tried)]
    if before > 0 and min(_throughput(setting, others)) <= 0:
        return None
    length = spans[number][1] - spans[number][0]
    start = _lowest(_throughput(setting, others), length)
    if start == spans[number][0]:
        return None
    tried[number] = (start, start + length)
    after = min(_throughput(setting, tried))
    return tried if after > 0 and before / after < _BALANCE_QUALITY else None


def _shortest(setting: Setting, spans: Sequence[tuple[int, int]]) -> Split | None:
    """Dijkstra's path from block to block; a server that is entered is left at the end of its blocks."""
    last = len(setting.layers)
    best: dict[tuple[int, int], tuple[float, Split]] = {}
    for at in range(last):
        for number, (start, end) in enumerate(spans):
            if not start <= at < end:
                continue
            compute = sum(setting.layers[at:end]) / setting.machines[number].speed + _OVERHEAD_US
            ways = [(compute, ((number, at, end),))] if at == 0 else []
            for (previous, upto), (cost, split) in best.items():
                if upto == at and previous != number:
                    ways.append((cost + setting.rtt_us(previous, number) / 2 + compute, (*split, (number, at, end))))
            if ways:
                cost, split = min(ways)
                if (number, end) not in best or cost < best[number, end][0]:
                    best[number, end] = cost, split
    done = [found for (_, upto), found in best.items() if upto == last]
    return min(done)[1] if done else None


# --- prima.cpp --------------------------------------------------------------------------------------------------------------


def halda(setting: Setting) -> Split | None:
    """None where the layers do not fit."""
    last = len(setting.layers)
    # By (last machine, layers so far): latency, first machine, split; machines in the order of their ranks.
    best: dict[tuple[int, int], list[tuple[float, int, Split]]] = {}
    for number, machine in enumerate(setting.machines):
        sources = [(0, 0.0, number, ())] + [
            (upto, cost + setting.rtt_us(previous, number) / 2, first, split)
            for (previous, upto), found in best.items()
            for cost, first, split in found
            if upto < last
        ]
        reached: dict[tuple[int, int], tuple[float, int, Split]] = {}
        for start, cost, first, split in sources:
            held = 0
            for end in range(start + 1, last + 1):
                held += setting.layers[end - 1]
                if held > machine.memory:
                    break
                way = (cost + held / machine.speed, first, (*split, (number, start, end)))
                if (end, first) not in reached or way < reached[end, first]:
                    reached[end, first] = way
        for (end, _), way in reached.items():
            best.setdefault((number, end), []).append(way)
    done = [
        (cost + setting.rtt_us(number, first) / 2, split)
        for (number, upto), found in best.items()
        if upto == last
        for cost, first, split in found
    ]
    return min(done)[1] if done else None


# --- what they published ----------------------------------------------------------------------------------------------------

_PETALS = "Petals, arXiv 2209.01188, table of BLOOM-176B in 8 bits: 70 blocks"
_PRIMA = "prima.cpp, arXiv 2504.08791, table 1: the home cluster, by memory that is available; Q4K weights"
# Bandwidths by the makers' data sheets, in GB/s = 1000 bytes per microsecond.
_A100, _R3060, _R2080TI, _R3090, _A4000, _A5000 = 1935, 360, 616, 936, 448, 768
_M1, _R3070, _KIRIN = 68, 448, 44


def settings() -> list[Setting]:
    """Memory and machines as published; bandwidths of the data sheets. Round trips between home machines are not published: 3 ms
    for Wi-Fi, and between the volunteers 20 ms on a continent and 100 ms across the ocean."""
    bloom = (2_500_000_000,) * 70
    found = []
    for name, rtt_us in (("1 Gbit/s, < 5 ms", 5_000), ("100 Mbit/s, 100 ms", 100_000)):
        three = tuple(Machine(f"A100 {number}", 80 * GIB, _A100 * 1000, f"s{number}") for number in range(3))
        found.append(Setting(f"Petals, 3 servers, {name}", _PETALS, three, bloom, rtt_us, {}))
        # The same three machines, as four servers each.
        twelve = tuple(Machine(f"virtual {number}", 20 * GIB, _A100 * 250, f"s{number}") for number in range(12))
        found.append(Setting(f"Petals, 12 virtual servers, {name}", _PETALS, twelve, bloom, rtt_us, {}))
    kinds = ((2, 12, _R3060), (4, 11, _R2080TI), (2, 24, _R3090), (2, 16, _A4000), (4, 24, _A5000))
    cards = [(memory, speed) for count, memory, speed in kinds for _ in range(count)]
    real = tuple(
        Machine(f"volunteer {number}", memory * GIB, speed * 1000, "Europe" if number % 2 else "America")
        for number, (memory, speed) in enumerate(cards)
    )
    continents = {("America", "Europe"): 100_000, ("America", "America"): 20_000, ("Europe", "Europe"): 20_000}
    found.append(Setting("Petals, 14 real servers", _PETALS, real, bloom, 100_000, continents))
    home = (
        Machine("D1 Mac M1", int(2.4 * GIB), _M1 * 1000),
        Machine("D2 laptop, RTX 3070", 8 * GIB, _R3070 * 1000),
        Machine("D3 desktop, RTX 2080 Ti", 11 * GIB, _R2080TI * 1000),
        Machine("D4 Mate40Pro", int(1.9 * GIB), _KIRIN * 1000),
    )
    for model, layers, size in (("Llama 3-8B", 32, 4.9), ("Llama 3-14B", 48, 8.6), ("Llama 1-30B", 60, 18.5)):
        layer = int(size * 1e9) // layers
        found.append(Setting(f"prima.cpp, {model}", _PRIMA, home, (layer,) * layers, 3_000, {}))
    return found
