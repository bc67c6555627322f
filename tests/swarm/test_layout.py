"""Layout: every layer on as many nodes as asked for where there is room, within memory and disk, and little moves when nodes come
and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.core.manifest import Manifest
from nexus.swarm.layout import Layout, Member, layout
from nexus.swarm.placement import StageCosts
from tests.swarm.test_placement import at_once, model, named

MANY = 1 << 60


def laid(manifest: Manifest, members: Sequence[Member], replicas: int | None = 2) -> Layout:
    return layout(manifest, members, replicas=replicas, dtype="float32", context=0, rtt_us=at_once)


def member(
    number: int, memory: int = 10**9, speed: int = 8, serving: tuple[tuple[int, int], ...] = (), domain: str = "", **changes: object
) -> Member:
    candidate = replace(named(number, memory, speed), held=serving, domain=domain)
    return replace(Member(candidate, MANY, serving), **changes)  # type: ignore[arg-type]


def spans(found: Layout) -> dict[int, tuple[int, int]]:
    return {int.from_bytes(one.node, "big"): (one.start, one.end) for one in found.fragments}


def done(members: Sequence[Member], found: Layout) -> list[Member]:
    """The members once they have done what they were asked."""
    moved = []
    for one in members:
        serving = found.of(one.candidate.node)
        moved.append(replace(one, serving=serving, candidate=replace(one.candidate, held=serving)))
    return moved


def stored(manifest: Manifest, ranges: Sequence[tuple[int, int]]) -> int:
    costs = StageCosts(manifest, "float32", 0)
    return sum(costs.stored(low, high) for low, high in ranges)


@st.composite
def swarms(draw: st.DrawFn, layers: int = 12, least: int = 1) -> list[Member]:
    members = []
    for number in range(1, draw(st.integers(least, 10)) + 1):
        serving = ()
        if draw(st.booleans()):
            low = draw(st.integers(0, layers - 1))
            serving = ((low, draw(st.integers(low + 1, layers))),)
        members.append(
            member(
                number,
                draw(st.integers(300, 6000)),
                draw(st.integers(1, 200)),
                serving,
                draw(st.sampled_from(["", "", "a", "b"])),
                disk_bytes=draw(st.integers(300, 6000)),
                demand=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
            )
        )
    return members


MODEL = model([400] * 12, embedding=200, head=200)


class TestLaws:
    @settings(deadline=None, max_examples=200)
    @given(members=swarms(), replicas=st.sampled_from([None, 1, 2, 3]), data=st.data())
    def test_layouts_fit_count_right_and_do_not_depend_on_the_order(
        self, members: list[Member], replicas: int | None, data: st.DataObject
    ) -> None:
        found = laid(MODEL, members, replicas)
        costs, by_node = StageCosts(MODEL, "float32", 0), {one.candidate.node: one for one in members}
        coverage = [0] * 12
        for fragment in found.fragments:
            one = by_node[fragment.node]
            assert 0 <= fragment.start < fragment.end <= 12
            assert costs.memory(fragment.start, fragment.end) <= one.candidate.memory_bytes
            assert costs.stored(fragment.start, fragment.end) <= one.disk_bytes
            assert fragment.reason
            for layer in range(fragment.start, fragment.end):
                coverage[layer] += 1
        assert len({fragment.node for fragment in found.fragments}) == len(found.fragments)
        assert tuple(coverage) == found.coverage
        short = {layer for one in found.short for layer in range(one.start, one.end)}
        assert short == {layer for layer in range(12) if coverage[layer] < found.wanted[layer]}
        assert laid(MODEL, data.draw(st.permutations(members)), replicas) == found

    @settings(deadline=None, max_examples=150)
    @given(members=swarms())
    def test_a_layout_that_was_carried_out_stays(self, members: list[Member]) -> None:
        calm = [replace(one, demand=0.0) for one in members]
        moved = done(calm, laid(MODEL, calm))
        again = laid(MODEL, moved)
        assert again.fetch_bytes == 0
        assert {one.node for one in again.fragments} <= {one.candidate.node for one in moved if one.serving}

    @settings(deadline=None, max_examples=150)
    @given(members=swarms(least=3), data=st.data())
    def test_one_who_leaves_moves_little(self, members: list[Member], data: st.DataObject) -> None:
        """What it held is fetched again. Where only one who serves other layers has room, also those between: a replica at most."""
        calm = [replace(one, demand=0.0) for one in members]
        moved = done(calm, laid(MODEL, calm))
        gone = data.draw(st.sampled_from(moved))
        found = laid(MODEL, [one for one in moved if one is not gone])
        assert found.fetch_bytes <= 2 * stored(MODEL, gone.serving) + stored(MODEL, [(0, 12)])
        if not gone.serving:
            assert found.fetch_bytes == 0

    @settings(deadline=None, max_examples=150)
    @given(members=swarms(least=2), newcomer=swarms())
    def test_one_who_joins_moves_what_it_takes_and_what_that_frees(self, members: list[Member], newcomer: list[Member]) -> None:
        calm = [replace(one, demand=0.0) for one in members]
        moved = done(calm, laid(MODEL, calm))
        before = laid(MODEL, moved)
        candidate = replace(newcomer[0].candidate, node=named(99, 0, 0).node, held=())
        new = replace(newcomer[0], candidate=candidate, serving=(), demand=0.0)
        found = laid(MODEL, [*moved, new])
        own = sum(one.fetch_bytes for one in found.fragments if one.node == candidate.node)
        assert found.fetch_bytes - own <= stored(MODEL, [(0, 12)])
        if not before.short and min(before.domains) >= 2:
            assert found.fetch_bytes == 0  # nothing is missing


def test_on_the_whole_as_much_moves_as_is_lost() -> None:
    """Swarms of 4 to 12 nodes with room for about three replicas, of which one leaves, then another joins."""
    rng = random.Random(5)
    lost = moved_by_leaving = moved_by_joining = 0
    for _ in range(60):
        members = [member(number, rng.randint(1200, 6000), rng.randint(10, 100)) for number in range(1, rng.randint(5, 13))]
        settled = done(members, laid(MODEL, members))
        gone = rng.choice([one for one in settled if one.serving])
        found = laid(MODEL, [one for one in settled if one is not gone])
        lost += stored(MODEL, gone.serving)
        moved_by_leaving += found.fetch_bytes
        moved_by_joining += laid(MODEL, [*settled, member(99, 6000)]).fetch_bytes
    assert 0.5 * lost <= moved_by_leaving <= 1.2 * lost
    assert moved_by_joining <= 0.2 * lost


def test_a_new_swarm_gets_whole_chains_on_distinct_nodes() -> None:
    found = laid(MODEL, [member(number, 3200) for number in range(1, 5)])
    assert found.coverage == (2,) * 12
    assert found.short == ()
    assert len(found.fragments) == 4
    assert found.fetch_bytes == 2 * stored(MODEL, [(0, 12)])


def test_two_replicas_of_their_own_and_a_third_by_idle_nodes_only() -> None:
    members = [member(number, 6000) for number in range(1, 17)]
    found = laid(MODEL, members, None)
    assert found.wanted == (2,) * 12
    assert found.coverage == (3,) * 12
    assert laid(MODEL, members[:2], None).coverage == (2,) * 12


def test_replicas_are_in_distinct_domains_where_there_are_enough() -> None:
    members = [member(number, 6000, 100, domain="home") for number in range(1, 5)] + [member(9, 6000, 10, domain="far")]
    found = laid(MODEL, members)
    assert found.domains == (2,) * 12
    assert min(laid(MODEL, members[:4]).coverage) == 2  # one domain is better than no second replica


def test_a_fast_node_is_not_given_less_than_a_slow_one() -> None:
    found = spans(laid(MODEL, [member(1, 10**6, 10), member(2, 10**6, 10), member(3, 10**6, 1000)], 1))
    assert 3 in found
    assert found[3][1] - found[3][0] >= 10


def test_busy_layers_gain_replicas_and_idle_ones_lose_them() -> None:
    half = [member(1, 3300, serving=((0, 6),)), member(2, 3300, serving=((0, 6),))]
    half += [member(3, 3300, serving=((6, 12),)), member(4, 3300, serving=((6, 12),))]
    spare = [member(5, 3300), member(6, 3300)]
    busy = [replace(one, demand=0.95) for one in half[:2]] + half[2:]
    found = laid(MODEL, busy + spare)
    assert found.wanted == (3,) * 6 + (2,) * 6
    assert found.coverage == (3,) * 6 + (2,) * 6
    # A third replica stays while giving it up would make the others busy again, and goes when they are calm.
    third = [replace(one, demand=0.4) for one in (*half[:2], member(5, 3300, serving=((0, 6),)))] + half[2:]
    assert laid(MODEL, third).coverage == (3,) * 6 + (2,) * 6
    calm = [replace(one, demand=0.1) for one in third]
    assert laid(MODEL, calm).coverage == (2,) * 12


@pytest.mark.parametrize("demand", [float("nan"), float("inf"), -3.0, 1e300])
def test_absurd_demand_has_a_bounded_effect(demand: float) -> None:
    members = [replace(member(number, 6000, serving=((0, 12),)), demand=demand) for number in (1, 2)]
    members += [member(number, 6000) for number in range(3, 9)]
    found = laid(MODEL, members)
    assert max(found.wanted) <= len(members)
    assert min(found.coverage) >= 2


def test_pinned_ranges_are_kept_whatever_is_needed() -> None:
    pinned = replace(member(1, 10), pinned=((0, 2), (10, 40)))
    none = replace(member(2, 10**6, serving=((0, 12),)), pinned=())
    found = laid(MODEL, [pinned, none, member(3, 10**6)])
    assert found.of(pinned.candidate.node) == ((0, 2), (10, 12))
    assert found.of(none.candidate.node) == ()
    assert found.coverage == (2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2)
    assert [str(one) for one in found.short] == ["layers 2-9 have 1 of 2 replicas: 3.1 KiB missing"]


def test_what_is_short_is_said_in_words_and_bytes() -> None:
    found = laid(model([4 << 20] * 4, embedding=1 << 20, head=0), [member(1, 9 << 20), member(2, 9 << 20)])
    assert {str(one) for one in found.short} == {"layers 0-3 have 1 of 2 replicas: 17.0 MiB missing"}
    assert [str(one) for one in laid(model([400]), []).short] == ["layer 0 has 0 of 2 replicas: 960 bytes missing"]


def test_who_does_not_serve_is_given_nothing() -> None:
    gone = member(1, 10**6, serving=((0, 12),))
    gone = replace(gone, candidate=replace(gone.candidate, serves=False))
    found = laid(MODEL, [gone, member(2, 10**6)])
    assert set(spans(found)) == {2}


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match="0 replicas"):
        laid(MODEL, [member(1)], 0)
    with pytest.raises(UsageError, match="twice"):
        laid(MODEL, [member(1), member(1)])


def test_a_thousand_members_in_a_second() -> None:
    manifest = model([4_000_000] * 80, embedding=8_000_000, head=8_000_000)
    rng = random.Random(9)
    members = [member(number, rng.randint(8_000_000, 60_000_000), rng.randint(1000, 90_000)) for number in range(1, 1001)]
    began = perf_counter()
    found = laid(manifest, members, None)
    took = perf_counter() - began
    assert found.coverage == (3,) * 80
    assert took < 5  # 0.5 s alone on a core; the machine may be busy
