"""What the placement benchmark compares with: an optimum and rules of others that were wrong would be worse than none."""

from __future__ import annotations

import random
from itertools import combinations, permutations

from scripts.benchmarks.placement import Case, optimum_us, ours_us, planned, random_case
from scripts.benchmarks.placement_rules import GIB, Machine, Setting, halda, petals, settings, step_us

LAYER = 1_000_000


def by_enumeration(case: Case) -> float | None:
    """With no branch cut off, in another order, for tiny cases."""
    best: float | None = None
    last = len(case.layers)
    for count in range(1, min(last, len(case.nodes)) + 1):
        for order in permutations(case.nodes, count):
            for cuts in combinations(range(1, last), count - 1):
                spans = list(zip((0, *cuts), (*cuts, last), strict=True))
                if any(case.memory(*span) > node.memory_bytes for node, span in zip(order, spans, strict=True)):
                    continue
                compute = [case.work(*span) * (1 + node.load) / node.speed for node, span in zip(order, spans, strict=True)]
                hops = sum(case.rtt_us(order[i - 1].node, order[i].node) / 2 for i in range(count)) if count > 1 else 0.0
                step = max(sum(compute) + hops, case.streams * max(compute))
                best = step if best is None else min(best, step)
    return best


def test_the_optimum_is_that_of_an_enumeration_and_no_plan_beats_it() -> None:
    rng = random.Random(11)
    found = 0
    for _ in range(60):
        case = random_case(rng, nodes_max=4, layers_max=5)
        best = optimum_us(case)
        expected = by_enumeration(case)
        assert (best is None) == (expected is None)
        if best is not None and expected is not None:
            found += 1
            assert abs(best - expected) <= 1e-9 * expected
            placement = planned(case)
            assert placement is not None
            assert best <= ours_us(case, placement) * (1 + 1e-9)
    assert found > 20


def setting(*machines: tuple[int, int], layers: int = 6, rtt_us: int = 0) -> Setting:
    """Machines by how many layers fit, and speed."""
    made = tuple(Machine(f"m{n}", fits * LAYER, speed, f"p{n}") for n, (fits, speed) in enumerate(machines))
    return Setting("test", "none", made, (LAYER,) * layers, rtt_us, {})


def test_petals_servers_take_as_much_as_fits_where_the_throughput_is_lowest() -> None:
    # The first takes the beginning, the second what nobody has, the third again the beginning: all equal.
    assert petals(setting((4, 10), (2, 10))) == ((0, 0, 4), (1, 4, 6))
    assert petals(setting((4, 10), (2, 10), (6, 100))) == ((2, 0, 6),)
    assert petals(setting((2, 10), (2, 10))) is None


def test_halda_minimises_latency_in_the_order_of_ranks_and_leaves_out_who_slows() -> None:
    assert halda(setting((6, 10), (6, 100))) == ((1, 0, 6),)
    assert halda(setting((4, 100), (6, 10), rtt_us=0)) == ((0, 0, 4), (1, 4, 6))
    assert halda(setting((4, 100), (6, 10), rtt_us=10**7)) == ((1, 0, 6),)
    assert halda(setting((2, 10), (2, 10))) is None


def test_step_time_is_the_longer_of_ring_and_slowest_stage() -> None:
    two = setting((6, 10), (6, 20), rtt_us=1000)
    compute = [3 * LAYER / 10, 3 * LAYER / 20]
    split = ((0, 0, 3), (1, 3, 6))
    assert step_us(two, split, 1) == sum(compute) + 1000
    assert step_us(two, split, 4) == 4 * compute[0]
    assert step_us(two, ((1, 0, 6),), 1) == 6 * LAYER / 20


def test_the_settings_are_those_that_were_published() -> None:
    found = {one.name: one for one in settings()}
    assert len(found) == 8
    real = found["Petals, 14 real servers"]
    assert len(real.machines) == 14
    assert sum(machine.memory for machine in real.machines) == 244 * GIB
    assert real.rtt_us(0, 1) == 100_000
    assert real.rtt_us(0, 2) == 20_000
    assert len(found["prima.cpp, Llama 3-8B"].machines) == 4
