"""Who computes what for a request: the route where it is nearly as fast as anything, else the placement; what records say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings

from nexus.core.errors import CapacityError, UsageError
from nexus.core.manifest import Manifest
from nexus.node import placing
from nexus.node.placing import ROUTE_SLACK, choose, domain_of, draws
from nexus.swarm.costs import RttUs
from nexus.swarm.placement import Candidate, Placement, least_step_us, place
from tests.swarm.test_placement import ME, at_once, links, model, models, node, shape, swarms

MODEL = model([400_000] * 8)


def chosen(manifest: Manifest, nodes: Sequence[Candidate], stages: int | None = None, rtt_us: RttUs = at_once) -> Placement:
    return choose(
        manifest, nodes, coordinator=ME, stages=stages, dtype="float32", context=0, streams=4, rtt_us=rtt_us, seed=bytes(16)
    )


def test_what_is_held_is_used_although_moving_layers_would_be_faster() -> None:
    nodes = [node(1, speed=1000, held=((0, 8),)), node(2, speed=800)]
    found = chosen(MODEL, nodes)
    assert shape(found) == [(1, 0, 8)]
    assert "nothing to fetch" in found.reason


def test_much_faster_machines_are_worth_fetching_for() -> None:
    nodes = [node(1, speed=1000, held=((0, 8),)), node(2, speed=50_000)]
    found = chosen(MODEL, nodes)
    assert [number for number, _, _ in shape(found)] == [2]
    assert sum(found.fetch_bytes) > 0


def test_where_nobody_holds_a_layer_it_is_placed() -> None:
    found = chosen(MODEL, [node(1, held=((0, 3),)), node(2, held=((4, 8),))])
    assert sum(found.fetch_bytes) > 0


def test_the_number_of_stages_is_respected() -> None:
    nodes = [node(number, held=((0, 8),)) for number in (1, 2, 3)]
    for stages in (1, 2, 3):
        assert len(chosen(MODEL, nodes, stages).plan.stages) == stages
    with pytest.raises(UsageError, match="4 stages"):
        chosen(MODEL, nodes, 4)


def test_a_route_near_the_least_there_can_be_is_taken_without_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Placement:
        raise AssertionError("a placement was searched for")

    monkeypatch.setattr(placing, "place", never)
    assert shape(chosen(MODEL, [node(1, speed=1000, held=((0, 8),)), node(2, speed=10)])) == [(1, 0, 8)]
    with pytest.raises(AssertionError, match="searched"):
        chosen(MODEL, [node(1, speed=1000, held=((0, 8),)), node(2, speed=50_000)])


@settings(deadline=None, max_examples=100)
@given(manifest=models(), nodes=swarms(held=True), rtt_us=links())
def test_no_plan_is_below_the_least_and_none_much_above_the_best(manifest: Manifest, nodes: list[Candidate], rtt_us: RttUs) -> None:
    layers = manifest.layers
    nodes = [replace(one, held=tuple((low, min(high, layers)) for low, high in one.held if low < layers)) for one in nodes]
    try:
        best = place(manifest, nodes, coordinator=ME, stages=None, dtype="float32", context=0, streams=4, rtt_us=rtt_us)
    except CapacityError:
        return
    least = least_step_us(manifest, nodes, dtype="float32", context=0, streams=4)
    assert least <= best.step_us * (1 + 1e-9) + 1e-5
    assert chosen(manifest, nodes, rtt_us=rtt_us).step_us <= ROUTE_SLACK * best.step_us * (1 + 1e-9)


@pytest.mark.parametrize(
    ("addresses", "domain"),
    [
        (("/ip4/8.8.4.4/tcp/1",), "8.8.4.0/24"),
        (("/ip4/192.168.1.7/tcp/1", "/ip4/8.8.4.9/tcp/1"), "8.8.4.0/24"),
        (("/ip6/2606:4700:1:2::5/tcp/1",), "2606:4700:1::/48"),
        (("/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1"), ""),
        (("/dns4/example.org/tcp/1", "/ip4", "/ip4/999.1.1.1/tcp/1", "nonsense", ""), ""),
        ((), ""),
    ],
)
def test_a_domain_is_what_public_addresses_have_in_common(addresses: tuple[str, ...], domain: str) -> None:
    assert domain_of(addresses) == domain


def test_draws_are_even_and_the_same_for_the_same_seed() -> None:
    one, again, other = draws(b"a" * 16), draws(b"a" * 16), draws(b"b" * 16)
    numbers = [one(5) for _ in range(1000)]
    assert numbers == [again(5) for _ in range(1000)]
    assert numbers != [other(5) for _ in range(1000)]
    counts = Counter(numbers)
    assert set(counts) == set(range(5))
    assert min(counts.values()) > 150
