"""Layout: every layer on as many nodes as asked for where there is room, within memory and disk, and little moves when nodes come
and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

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
