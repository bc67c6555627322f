"""Routing: only what is held, each node once, as fast as any such chain; among equals the less loaded of two drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.core.manifest import Manifest
from nexus.swarm.chains import PRECISION
from nexus.swarm.costs import RttUs
from nexus.swarm.placement import SLACK, Candidate, Placement, StageCosts
from nexus.swarm.routing import WHOLE_SLACK, route
from nexus.swarm.whole import fastest_of_whole
from tests.swarm.test_placement import ME, at_once, links, model, named, node, of_plan, shape, step_us


def first_of(most: int) -> int:
    return 0


def routed(
    manifest: Manifest,
    nodes: Sequence[Candidate],
    stages: int | None = None,
    streams: int = 4,
    rtt_us: RttUs = at_once,
    below: Callable[[int], int] = first_of,
) -> Placement | None:
    return route(
        manifest, nodes, coordinator=ME, stages=stages, dtype="float32", context=0, streams=streams, rtt_us=rtt_us, below=below
    )


def brute_force(manifest: Manifest, nodes: Sequence[Candidate], streams: int, rtt_us: RttUs) -> Fraction | None:
    """The least step time over every order of nodes and every split that each of them holds."""
    costs = StageCosts(manifest, "float32", 0)
    best: Fraction | None = None
    for count in range(1, min(len(nodes), manifest.layers) + 1):
        for order in permutations(range(len(nodes)), count):
            for inner in product(range(1, manifest.layers), repeat=count - 1):
                bounds = (0, *inner, manifest.layers)
                chain = [(n, bounds[i], bounds[i + 1]) for i, n in enumerate(order)]
                if all(
                    low < high
                    and any(a <= low and high <= b for a, b in nodes[n].held)
                    and costs.memory(low, high) <= nodes[n].memory_bytes
                    for n, low, high in chain
                ):
                    step = step_us(manifest, nodes, chain, streams, rtt_us)
                    best = step if best is None else min(best, step)
    return best


@st.composite
def holders(draw: st.DrawFn, layers: int = 5) -> list[Candidate]:
    nodes = []
    for number in range(draw(st.integers(1, 4))):
        low = draw(st.integers(0, layers - 1))
        held = ((low, draw(st.integers(low + 1, layers))),)
        memory, speed = draw(st.integers(400, 5000)), draw(st.integers(1, 60))
        nodes.append(replace(node(number + 1, memory, speed, held), load=draw(st.integers(0, 3))))
    return nodes


class TestLaws:
    @settings(deadline=None, max_examples=150)
    @given(nodes=holders(), streams=st.sampled_from([1, 4]), rtt_us=links(), seed=st.integers(0, 99))
    def test_a_route_is_over_held_layers_and_as_fast_as_any(
        self, nodes: list[Candidate], streams: int, rtt_us: RttUs, seed: int
    ) -> None:
        manifest = model([400, 200, 600, 400, 300])
        found = routed(manifest, nodes, streams=streams, rtt_us=rtt_us, below=random.Random(seed).randrange)
        best = brute_force(manifest, nodes, streams, rtt_us)
        if best is None:
            assert found is None
            return
        assert found is not None
        assert found.fetch_bytes == (0,) * len(found.plan.stages)
        held = {one.node: one.held for one in nodes}
        for stage in found.plan.stages:
            assert any(low <= stage.start and stage.end <= high for low, high in held[stage.node])
        # What is drawn may be as much slower as nodes count as equal, and whole fragments may be slower; without load nothing else.
        step = of_plan(manifest, nodes, found, streams, rtt_us)
        assert best <= step
        idle = [replace(one, load=0) for one in nodes]
        calm = routed(manifest, idle, streams=streams, rtt_us=rtt_us, below=random.Random(seed).randrange)
        least = brute_force(manifest, idle, streams, rtt_us)
        assert calm is not None
        assert least is not None
        limit = least * (1 + Fraction(1, PRECISION)) * (1 + Fraction(1, WHOLE_SLACK))
        limit = limit * (1 + Fraction(1, SLACK)) ** len(calm.plan.stages) + Fraction(1, 10**4)
        assert of_plan(manifest, idle, calm, streams, rtt_us) <= limit

    @settings(deadline=None, max_examples=150)
    @given(nodes=holders(), streams=st.sampled_from([1, 4]), stages=st.sampled_from([None, 1, 2, 3]))
    def test_a_chain_of_whole_fragments_is_the_fastest_of_them(
        self, nodes: list[Candidate], streams: int, stages: int | None
    ) -> None:
        manifest = model([400, 200, 600, 400, 300])
        costs = StageCosts(manifest, "float32", 0)
        found = fastest_of_whole(costs, nodes, rtt_us=at_once, streams=streams, stages=stages)
        chains = []
        for count in range(1, len(nodes) + 1) if stages is None else [min(stages, len(nodes) + 1)]:
            for order in permutations(range(len(nodes)), count):
                spans = [(number, *nodes[number].held[0]) for number in order]
                ends = [0, *(high for _, _, high in spans)]
                if ends[-1] == manifest.layers and all(low == end for (_, low, _), end in zip(spans, ends, strict=False)):
                    chains.append(spans)
        fitting = [spans for spans in chains if all(costs.memory(low, high) <= nodes[n].memory_bytes for n, low, high in spans)]
        assert (found is None) == (not fitting)
        if found is not None:
            number = {one.node: n for n, one in enumerate(nodes)}
            taken = [(number[stage.node.node], stage.start, stage.end) for stage in found]
            least = min(step_us(manifest, nodes, spans, streams, at_once) for spans in fitting)
            # Times are counted in whole picoseconds, and speeds in a few bits.
            assert step_us(manifest, nodes, taken, streams, at_once) <= least * (1 + Fraction(1, 32))


def test_nodes_compute_what_they_have_loaded_unless_another_cut_is_much_faster() -> None:
    whole = [node(1, held=((0, 3),)), node(2, held=((3, 6),)), node(3, held=((0, 4),)), node(4, held=((4, 6),))]
    rng = random.Random(2)
    for _ in range(20):
        found = routed(model([400] * 6), whole, streams=1, below=rng.randrange)
        assert found is not None
        assert {(low, high) for _, low, high in shape(found)} in ({(0, 3), (3, 6)}, {(0, 4), (4, 6)})
    slow = [node(1, speed=8, held=((0, 5),)), node(2, speed=800, held=((5, 6),)), node(3, speed=800, held=((1, 6),))]
    found = routed(model([400] * 6), slow, streams=1)
    assert found is not None
    assert shape(found) == [(1, 0, 1), (3, 1, 6)]


def test_replicas_are_drawn_among_those_that_hold_the_same_range() -> None:
    rng = random.Random(5)
    for loads, taken in (((1, 0), 3), ((0, 1), 2)):
        replicas = [replace(node(number, held=((3, 6),)), load=load) for number, load in zip((2, 3), loads, strict=True)]
        nodes = [node(1, held=((0, 3),)), *replicas, node(4, held=((2, 6),))]
        for _ in range(20):
            found = routed(model([400] * 6), nodes, streams=1, below=rng.randrange)
            assert found is not None
            assert shape(found) == [(1, 0, 3), (taken, 3, 6)]


def test_nobody_holds_a_layer() -> None:
    assert routed(model([400] * 4), [node(1, held=((0, 2),)), node(2, held=((3, 4),))]) is None
    assert routed(model([400] * 4), []) is None
    assert routed(model([400] * 4), [node(1, held=((0, 4),), serves=False)]) is None


def test_more_memory_than_there_is() -> None:
    assert routed(model([400] * 4), [node(1, memory=900, held=((0, 4),))]) is None


def test_as_many_stages_as_asked_for() -> None:
    nodes = [node(n, held=((0, 6),)) for n in (1, 2, 3)]
    for stages in (1, 2, 3):
        found = routed(model([400] * 6), nodes, stages)
        assert found is not None
        assert len(found.plan.stages) == stages
    assert routed(model([400] * 6), nodes, 4) is None


def test_streams_out_of_bounds() -> None:
    with pytest.raises(UsageError, match="0 streams"):
        routed(model([400]), [node(1, held=((0, 1),))], streams=0)


def test_a_loaded_node_is_passed_by() -> None:
    nodes = [node(1, held=((0, 2),)), replace(node(2, held=((2, 4),)), load=3), node(3, held=((2, 4),))]
    found = routed(model([400] * 4), nodes)
    assert found is not None
    assert shape(found) == [(1, 0, 2), (3, 2, 4)]


def test_a_near_node_before_a_distant_one() -> None:
    nodes = [node(1, held=((0, 2),)), node(2, held=((2, 4),)), node(3, held=((2, 4),))]

    def rtt_us(one: bytes, other: bytes) -> int:
        return 90_000 if bytes([2]) * 32 in (one, other) else 1_000

    found = routed(model([400] * 4), nodes, rtt_us=rtt_us)
    assert found is not None
    assert [number for number, _, _ in shape(found)] == [1, 3]


def test_this_node_is_not_drawn_away_from() -> None:
    nodes = [node(n, held=((0, 1),)) for n in (1, 2, 3)]
    rng = random.Random(1)
    for _ in range(20):
        found = routed(model([400]), nodes, below=rng.randrange)
        assert found is not None
        assert shape(found) == [(1, 0, 1)]


def test_two_choices_keep_the_longest_queue_short() -> None:
    """300 requests over 20 equal nodes, whose loads are read only every 20 requests. All to the least loaded one that was read
    would pile up 20 on a node; purely at random about 25 pile up."""
    count, manifest = 20, model([400])
    loads: Counter[bytes] = Counter()
    rng = random.Random(7)
    keys = [named(number, 10**6, 8).node for number in range(1, count + 1)]
    for request in range(300):
        if request % count == 0:
            known = dict(loads)
        nodes = [
            replace(named(number, 10**6, 8), held=((0, 1),), load=known.get(keys[number - 1], 0)) for number in range(1, count + 1)
        ]
        found = routed(manifest, nodes, below=rng.randrange)
        assert found is not None
        loads[found.plan.stages[0].node] += 1
    assert max(loads.values()) <= 300 / count + 5
    assert len(loads) == count


def test_many_holders_are_routed_over_and_the_long_ranges_among_them_are_seen() -> None:
    manifest = model([400] * 40)
    rng = random.Random(3)
    crowd = []
    for number in range(1, 1001):
        low = rng.randrange(39)
        crowd.append(replace(named(number, 10**6, rng.randint(1000, 90_000)), held=((low, min(40, low + rng.randint(1, 4))),)))
    crowd += [replace(named(2000, 10**6, 500), held=((0, 20),)), replace(named(2001, 10**6, 500), held=((20, 40),))]
    found = routed(manifest, crowd, rtt_us=lambda one, other: 20_000)
    assert found is not None
    assert len(found.plan.stages) == 2
