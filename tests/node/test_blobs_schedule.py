"""Which chunk is asked of whom: properties over any course of events, and how fast a swarm gets a model from one slow node."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.node.blobs_schedule import AGAIN_MAX, OPEN_MAX, Run, Schedule

SOURCES = ["a", "b", "c"]


def flags(counts: list[int], bits: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([bool(bits >> at & 1) for at in range(sum(counts))], np.bool_)


def open_all(schedule: Schedule, source: str, counts: list[int], run_max: int = 1000) -> None:
    while (blob := schedule.to_open(source, run_max)) is not None:
        schedule.opened(blob, range(counts[blob]))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    turn=st.integers(0, 2**64),
    run_max=st.integers(1, 9),
    haves=st.lists(st.integers(0, 2**45), min_size=3, max_size=3),
    steps=st.lists(
        st.tuples(st.sampled_from(["open", "claim", "finish", "release", "lack", "drop"]), st.integers(0, 8)), max_size=60
    ),
)
def test_no_chunk_is_lost_and_none_is_asked_of_more_than_two(
    counts: list[int], turn: int, run_max: int, haves: list[int], steps: list[tuple[str, int]]
) -> None:
    schedule = Schedule(counts, turn)
    has = {source: flags(counts, bits) for source, bits in zip(SOURCES, haves, strict=True)}
    for source in SOURCES:
        schedule.set_source(source, has[source].copy())
    first = [0, *itertools.accumulate(counts)]
    held: dict[str, set[int]] = {source: set() for source in SOURCES}
    opening: dict[int, str] = {}
    left = set(range(sum(counts)))
    for kind, pick in steps:
        source = SOURCES[pick % 3]
        if kind == "open":
            blob = schedule.to_open(source, run_max)
            if blob is not None:
                assert not schedule.is_open(blob)
                assert blob not in opening
                if pick % 2:
                    schedule.opened(blob, range(counts[blob]))
                else:
                    opening[blob] = source
        elif kind == "claim":
            run = schedule.claim(source, run_max)
            if run is not None:
                assert 1 <= run.count <= run_max
                assert schedule.is_open(run.blob)
                ids = set(range(first[run.blob] + run.start, first[run.blob] + run.start + run.count))
                assert max(ids) < first[run.blob + 1]
                assert ids <= left
                assert not ids & held[source]
                assert all(has[source][at] for at in ids)
                held[source] |= ids
        elif kind == "finish" and held[source]:
            at = sorted(held[source])[pick % len(held[source])]
            blob = next(number for number in range(len(counts)) if at < first[number + 1])
            assert schedule.finish(source, blob, at - first[blob]) == (at in left)
            left.discard(at)
            held[source].discard(at)
        elif kind in ("release", "drop"):
            (schedule.release if kind == "release" else schedule.drop_source)(source)
            held[source].clear()
            opening = {blob: opener for blob, opener in opening.items() if opener != source}
            if kind == "drop":
                has[source][:] = False
        elif kind == "lack":
            blob = pick % len(counts)
            schedule.lacks(source, Run(blob, 0, counts[blob]))
            has[source][first[blob] : first[blob + 1]] = False
        assert all(sum(at in mine for mine in held.values()) <= 2 for at in left)
    # One that has everything, alone, ends it.
    for source in SOURCES:
        schedule.drop_source(source)
    schedule.set_source("whole", np.ones(sum(counts), np.bool_))
    for _ in range(2 * sum(counts) + 2 * len(counts)):
        open_all(schedule, "whole", counts)
        if (run := schedule.claim("whole", run_max)) is not None:
            for index in range(run.start, run.start + run.count):
                assert schedule.finish("whole", run.blob, index)
        for blob in schedule.undone():
            if schedule.has_all_of(blob):
                schedule.close(blob)
    assert schedule.done


def test_the_rarest_first_and_equal_ones_in_another_order_for_each_node() -> None:
    counts = [8]
    firsts = set()
    for turn in range(100):
        schedule = Schedule(counts, turn)
        schedule.set_source("seed", np.ones(8, np.bool_))
        schedule.set_source("other", flags(counts, 0b11111011))
        open_all(schedule, "seed", counts)
        assert schedule.claim("seed", 4) == Run(0, 2, 1)
        run = schedule.claim("seed", 1)
        assert run is not None
        firsts.add(run.start)
    assert len(firsts) == 7


def test_what_is_on_its_way_is_asked_of_one_other_when_nothing_else_is_left() -> None:
    schedule = Schedule([3], 0)
    for source in SOURCES:
        schedule.set_source(source, np.ones(3, np.bool_))
    open_all(schedule, "a", [3])
    assert claimed(schedule, "a") == [0, 1, 2]
    again = schedule.claim("b", 8)
    assert again is not None
    assert again.count <= AGAIN_MAX
    rest = [chunk for chunk in range(3) if not again.start <= chunk < again.start + again.count]
    assert claimed(schedule, "c") == rest
    schedule.release("a")
    assert claimed(schedule, "c") == [0, 1, 2][again.start : again.start + again.count]


def claimed(schedule: Schedule, source: str) -> list[int]:
    """All that a source is asked for until nothing is left to ask it."""
    chunks: list[int] = []
    while (run := schedule.claim(source, 8)) is not None:
        chunks += range(run.start, run.start + run.count)
    return sorted(chunks)


def test_who_loses_its_turn_is_still_waited_for_where_nobody_else_has_it() -> None:
    schedule = Schedule([4], 0)
    schedule.set_source("a", np.ones(4, np.bool_))
    schedule.set_source("b", flags([4], 0b0011))
    open_all(schedule, "a", [4])
    assert claimed(schedule, "a") == [0, 1, 2, 3]
    assert schedule.is_sole("a")
    assert not schedule.is_sole("b")
    schedule.lose_turn("a")
    assert claimed(schedule, "b") == [0, 1]
    assert claimed(schedule, "a") == [0, 1]


def test_no_more_blobs_are_open_at_once_than_there_may_be() -> None:
    counts = [1] * (3 * OPEN_MAX)
    schedule = Schedule(counts, 5)
    schedule.set_source("seed", np.ones(len(counts), np.bool_))
    opened = []
    while (blob := schedule.to_open("seed", 1000)) is not None:
        opened.append(blob)
    assert len(opened) == OPEN_MAX
    schedule.release("seed")
    assert schedule.to_open("seed", 1000) is not None


@pytest.mark.parametrize("chunks", [140_000])
def test_a_large_model_is_planned_fast_enough(chunks: int) -> None:
    import time

    counts = [chunks // 100] * 100
    schedule = Schedule(counts, 77)
    for source in SOURCES:
        schedule.set_source(source, np.ones(chunks, np.bool_))
    began = time.perf_counter()
    for number in range(100):
        source = SOURCES[number % 3]
        blob = schedule.to_open(source, 8)
        if blob is not None:
            schedule.opened(blob, range(counts[blob]))
        assert schedule.claim(source, 8) is not None
    # A run is 8 MiB: even at a gigabyte per second that is one in 8 ms.
    assert (time.perf_counter() - began) / 100 < 0.02


def rounds_to_spread(nodes: int, chunks: int, seed_per_round: int) -> int:
    """A model of time: in a round the seed sends so many chunks in all, every other node as many, and each sees what all have."""
    names = [f"node-{number}" for number in range(nodes)]
    schedules = {name: Schedule([chunks], hash_of(name)) for name in names}
    has = {name: np.zeros(chunks, np.bool_) for name in names} | {"seed": np.ones(chunks, np.bool_)}
    for name, schedule in schedules.items():
        schedule.set_source("seed", has["seed"].copy())
        open_all(schedule, "seed", [chunks])
        for other in names:
            if other != name:
                schedule.set_source(other, has[other].copy())
    rounds = 0
    while not all(has[name].all() for name in names):
        rounds += 1
        assert rounds < 2 * nodes * chunks
        arrived: list[tuple[str, str, int]] = []
        for source in ["seed", *names]:
            # In turn, one chunk each, beginning with another one every time.
            askers = [name for name in names if name != source]
            if not askers:
                continue
            shift = rounds % len(askers)
            queue = itertools.cycle(askers[shift:] + askers[:shift])
            left = seed_per_round
            for name in itertools.islice(queue, 4 * seed_per_round * len(askers)):
                if not left:
                    break
                run = schedules[name].claim(source, 1)
                if run is not None:
                    arrived.append((name, source, run.start))
                    left -= 1
        for name, source, index in arrived:
            schedules[name].finish(source, 0, index)
            has[name][index] = True
        for name in names:
            for other in names:
                if other != name:
                    schedules[name].set_source(other, has[other].copy())
    return rounds


def hash_of(name: str) -> int:
    from nexus.core.hashing import tagged_hash

    return int.from_bytes(tagged_hash("test", name.encode())[:8], "little")


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_nodes_that_fetch_from_one_slow_node_get_most_from_each_other(nodes: int) -> None:
    chunks, per_round = 64, 2
    alone = rounds_to_spread(1, chunks, per_round)
    assert alone == chunks // per_round
    # One after the other it would be `nodes` times as long.
    assert rounds_to_spread(nodes, chunks, per_round) <= 1.6 * alone
