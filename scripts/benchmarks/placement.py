"""Placement beside the optimum, beside the rules of Petals and of prima.cpp, and its time with a thousand nodes.

The headline is the worst case: the least of the optimum's predicted step time over ours, over random cases of up to eight nodes,
each solved by trying every ordered choice of nodes and every split. Speeds, memory, links, loads and layers are all unlike.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from nexus.core.errors import CapacityError
from nexus.core.manifest import EMBEDDING, HEAD, Blob, Manifest, layer_name
from nexus.swarm import chains, subsets
from nexus.swarm.layout import Member, layout
from nexus.swarm.placement import Candidate, Placement, place
from nexus.swarm.routing import route
from scripts.benchmarks.placement_rules import Setting, Split, halda, petals, settings, step_us
from scripts.benchmarks.result import Result

GOAL = 0.95
STREAMS = (1, 4)
SECONDS_GOAL = 1.0
_COORDINATOR = bytes(32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=400, help="random cases that are brute-forced [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the random cases [default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    cases = 40 if options.quick else options.cases
    ratios, sizes = _against_optimum(random.Random(options.seed), cases)
    many = _many(100 if options.quick else 1000, random.Random(options.seed))
    peers = _against_peers()
    parts: dict[str, object] = {
        "cases": {
            "brute_forced": len(ratios),
            "median": round(median(ratios), 4),
            "nodes_max": max(sizes),
            "optimal": _share(ratios, 0.999),
        },
        "search_over_layers": _layers_over_sets(random.Random(options.seed), 8 if options.quick else 40),
        "peers": peers,
        "peers_never_better": all(entry["met"] for entry in peers.values()),
        "many": many,
    }
    return Result("placement", min(ratios), GOAL, "higher", parts)


def _share(ratios: Sequence[float], least: float) -> float:
    """Of so many the ratio is at least that."""
    return round(sum(ratio >= least for ratio in ratios) / len(ratios), 4)


# --- the optimum ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`layers`: bytes of each. A weight is a byte and a multiply-add. `tied`: the embedding is the head."""

    layers: tuple[int, ...]
    embedding: int
    head: int
    tied: int
    nodes: tuple[Candidate, ...]
    rtt: dict[tuple[bytes, bytes], int]
    streams: int

    def rtt_us(self, one: bytes, other: bytes) -> int:
        return self.rtt[one, other]

    def memory(self, start: int, end: int) -> int:
        last = end == len(self.layers)
        total = sum(self.layers[start:end]) + (self.head if last else 0)
        return total + (self.embedding if start == 0 or (last and self.tied) else 0)

    def work(self, start: int, end: int) -> int:
        last = end == len(self.layers)
        return sum(self.layers[start:end]) + ((self.head + (self.embedding if self.tied else 0)) if last else 0)


def random_case(rng: random.Random, nodes_max: int = 8, layers_max: int = 9) -> Case:
    """Small ones with many nodes and larger ones with few, so that every split can be tried."""
    count = rng.randint(2, nodes_max)
    layers = tuple(rng.randint(20, 300) * 10**6 for _ in range(rng.randint(2, layers_max if count > 5 else layers_max + 4)))
    whole = sum(layers)
    tight = rng.choice([0.25, 0.5, 1.0, 4.0])
    alike = rng.random() < 0.2
    nodes = tuple(
        Candidate(
            rng.randbytes(32),
            f"node {number}",
            int(whole * tight * rng.uniform(0.5, 2.0)) + rng.choice([0, 10**8]),
            40_000 if alike else int(10 ** rng.uniform(3, 6)),
            None,
            (),
            True,
            rng.choice([0, 0, 0, 1, 5]),
        )
        for number in range(count)
    )
    scale = rng.choice([0, 300, 20_000, 150_000])
    where = {node.node: (rng.random(), rng.random(), rng.random() * 0.3) for node in nodes}
    rtt = {(a.node, b.node): int(scale * (_apart(where[a.node], where[b.node]))) for a in nodes for b in nodes}
    embedding, head = (rng.choice([0, rng.randint(1, 600) * 10**6]) for _ in range(2))
    return Case(layers, embedding, head, rng.randint(0, 1), nodes, rtt, rng.choice([1, 2, 4, 16]))


def _apart(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """In a plane, and each behind a line of its own."""
    if one == other:
        return 0.0
    return float(((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5) + one[2] + other[2]


def optimum_us(case: Case) -> float | None:
    """Every ordered choice of nodes, every split; a branch ends where it is no better than the best already. None: nothing fits."""
    best = float("inf")
    last = len(case.layers)

    def extend(order: list[Candidate], start: int, latency: float, slowest: float) -> None:
        nonlocal best
        for node in case.nodes:
            if node in order:
                continue
            hop = case.rtt_us(order[-1].node, node.node) / 2 if order else 0.0
            for end in range(start + 1, last + 1):
                if end < last and case.memory(start, end) > node.memory_bytes:
                    break
                if case.memory(start, end) > node.memory_bytes:
                    continue
                takes = case.work(start, end) * (1 + node.load) / node.speed
                after, worst = latency + hop + takes, max(slowest, takes)
                if max(after, case.streams * worst) >= best:
                    break
                if end == last:
                    after += case.rtt_us(node.node, order[0].node) / 2 if order else 0.0
                    best = min(best, max(after, case.streams * worst))
                else:
                    extend([*order, node], end, after, worst)

    extend([], 0, 0.0, 0.0)
    return None if best == float("inf") else best


def ours_us(case: Case, placement: Placement) -> float:
    """The step time of our plan by the definition, from what the nodes say as they say it."""
    by_key = {node.node: node for node in case.nodes}
    stages = placement.plan.stages
    compute = [case.work(one.start, one.end) * (1 + by_key[one.node].load) / by_key[one.node].speed for one in stages]
    ring = [one.node for one in stages]
    hops = sum(case.rtt_us(a, b) / 2 for a, b in zip(ring, [*ring[1:], ring[0]], strict=True) if a != b)
    return max(sum(compute) + hops, case.streams * max(compute))


def planned(case: Case) -> Placement | None:
    manifest = _manifest(case.layers, case.embedding, case.head, case.tied)
    try:
        return place(
            manifest,
            case.nodes,
            coordinator=_COORDINATOR,
            stages=None,
            dtype="exact",
            context=0,
            streams=case.streams,
            rtt_us=case.rtt_us,
        )
    except CapacityError:
        return None


def _manifest(layers: Sequence[int], embedding: int, head: int, tied: int = 0) -> Manifest:
    sizes = {EMBEDDING: embedding, **{layer_name(index): size for index, size in enumerate(layers)}, HEAD: head}
    pieces = tuple(Blob(name, size, name.encode().ljust(32, b".")) for name, size in sizes.items())
    files = (Blob("config.json", 1, bytes(32)),)
    return Manifest(1, "causal", "LlamaForCausalLM", "exact", "int8", len(layers), 8, 16, 4096, 0, tied, pieces, files, ())


def _against_optimum(rng: random.Random, count: int) -> tuple[list[float], list[int]]:
    ratios: list[float] = []
    sizes: list[int] = []
    while len(ratios) < count:
        case = random_case(rng)
        best, placement = optimum_us(case), planned(case)
        if (best is None) != (placement is None):
            raise AssertionError(f"a case that {'nothing' if best is None else 'something'} fits was planned otherwise")
        if best is not None and placement is not None:
            ratios.append(best / ours_us(case, placement) if best else 1.0)
            sizes.append(len(case.nodes))
    return ratios, sizes


def _layers_over_sets(rng: random.Random, count: int) -> dict[str, object]:
    """The search that is used where there are many nodes, on cases that the exact one can still solve: the fewer the nodes and the
    tighter their memory, the more it misses."""
    ratios = []
    cells = subsets.SUBSET_CELLS
    while len(ratios) < count:
        case = random_case(rng, nodes_max=10, layers_max=24)
        if len(case.nodes) < 8:
            continue
        try:
            subsets.SUBSET_CELLS = 10**9
            exact = planned(case)
            subsets.SUBSET_CELLS = 0
            quick = planned(case)
        finally:
            subsets.SUBSET_CELLS = cells
        if exact is not None and quick is not None:
            ratios.append(ours_us(case, exact) / ours_us(case, quick))
    return {"cases": count, "median": round(median(ratios), 4), "within_5_percent": _share(ratios, 0.95)}


# --- the peers --------------------------------------------------------------------------------------------------------------


def ours(setting: Setting, streams: int) -> Split | None:
    keys = [number.to_bytes(32, "big") for number in range(len(setting.machines))]
    nodes = [
        Candidate(key, machine.name, machine.memory, machine.speed, None, (), True)
        for key, machine in zip(keys, setting.machines, strict=True)
    ]
    try:
        placement = place(
            _manifest(setting.layers, 0, 0),
            nodes,
            coordinator=_COORDINATOR,
            stages=None,
            dtype="exact",
            context=0,
            streams=streams,
            rtt_us=lambda one, other: setting.rtt_us(keys.index(one), keys.index(other)),
        )
    except CapacityError:
        return None
    return tuple((keys.index(stage.node), stage.start, stage.end) for stage in placement.plan.stages)


def _against_peers() -> dict[str, dict[str, object]]:
    """Their step time over ours, at least 1 where ours is as good."""
    found: dict[str, dict[str, object]] = {}
    for setting in settings():
        for streams in STREAMS:
            own = ours(setting, streams)
            if own is None:
                raise AssertionError(f"{setting.name}: no room")
            time_us = step_us(setting, own, streams)
            entry: dict[str, object] = {"ours_ms": round(time_us / 1000, 1), "stages": len(own), "met": True}
            for name, rule in (("petals", petals), ("prima.cpp", halda)):
                split = rule(setting)
                ratio = step_us(setting, split, streams) / time_us if split else None
                entry[name] = "finds none" if ratio is None else round(ratio, 3)
                entry["met"] = bool(entry["met"]) and (ratio is None or ratio >= 1 - 1 / chains.PRECISION)
            found[f"{setting.name}; {streams} {'stream' if streams == 1 else 'streams'}"] = entry
    return found


# --- many nodes -------------------------------------------------------------------------------------------------------------


def _many(count: int, rng: random.Random) -> dict[str, object]:
    """Of a 70B-like model of 80 layers in 8 bits, over unlike nodes of which some hold parts of it."""
    manifest = _manifest((850_000_000,) * 80, 1_000_000_000, 1_000_000_000)
    nodes = []
    for number in range(count):
        low = rng.randrange(80)
        held = ((low, min(80, low + rng.randint(1, 20))),) if rng.random() < 0.5 else ()
        memory, speed = int(10 ** rng.uniform(9.3, 11)), int(10 ** rng.uniform(3, 6))
        nodes.append(Candidate(rng.randbytes(32), f"node {number}", memory, speed, None, held, True, rng.choice([0, 0, 1, 3])))
    where = {node.node: (rng.random(), rng.random(), rng.random() * 0.3) for node in nodes}

    def rtt_us(one: bytes, other: bytes) -> int:
        return int(80_000 * _apart(where[one], where[other]))

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return round(time.perf_counter() - began, 3)

    given = {"coordinator": nodes[0].node, "stages": None, "dtype": "exact", "context": 2048, "rtt_us": rtt_us}
    members = [Member(node, 1 << 40, node.held) for node in nodes]
    place_s = timed(lambda: place(manifest, nodes, **given))  # type: ignore[arg-type]
    return {
        "nodes": count,
        "place_s": place_s,
        "goal_s": SECONDS_GOAL,
        "met": place_s < SECONDS_GOAL,
        "route_s": timed(lambda: route(manifest, nodes, **given, below=rng.randrange)),  # type: ignore[arg-type]
        "layout_s": timed(lambda: layout(manifest, members, replicas=None, dtype="exact", context=2048, rtt_us=rtt_us)),
    }
