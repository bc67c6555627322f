"""Whatever the network did, in a fault-free tail all honest nodes come to hold the same blocks; the one that lies is dropped."""

from __future__ import annotations

import pytest

from nexus.memory.sync_conduct import Standing
from nexus.memory.sync_messages import FRAME_MAX
from tests.memory.sync_swarm import Swarm

FAULTS_S, TAIL_S = 60.0, 60.0


def _finished(seed: int, honest: int = 6, liars: int = 1) -> Swarm:
    swarm = Swarm(seed, honest, liars, FAULTS_S)
    swarm.run(FAULTS_S + TAIL_S)
    return swarm


@pytest.mark.parametrize("seed", range(3))
def test_honest_nodes_converge(seed: int) -> None:
    swarm = _finished(seed)
    sets = {frozenset(node.blocks) for node in swarm.honest}
    assert len(sets) == 1
    held = next(iter(sets))
    assert len(held) > 30
    assert all({item.id for item in node.items} == held for node in swarm.honest)
    # Nothing that only the liar named or made is among them: what has a block is signed.
    assert all(block.endswith(b"signed") for node in swarm.honest for block in node.blocks.values())
    # Nobody fetched a block that it had.
    assert all(node.fetched <= len(held) for node in swarm.honest)
    assert swarm.largest_frame <= FRAME_MAX
    assert swarm.sessions < 200 * len(swarm.nodes)


def test_in_quiet_times_nodes_know_that_they_are_in_sync() -> None:
    swarm = _finished(4, honest=3, liars=0)
    for node in swarm.honest:
        states = node.schedule.status(swarm.now_s)
        assert len(states) == 2
        assert all(status.in_sync and status.missing == 0 and status.failures == 0 for status in states)
    quiet = swarm.sessions
    swarm.run(swarm.now_s + 3600.0)
    # An hour of nothing: each of the six pairs compares every few minutes.
    assert 6 * 3600 / 300 <= swarm.sessions - quiet <= 6 * 3600 / 100


def test_the_liar_is_dropped_by_everyone() -> None:
    swarm = Swarm(5, 5, 1, 0.0)
    swarm.write(swarm.honest[0])
    dropped: set[str] = set()
    until_s = 0.0
    while until_s < 1200.0 and len(dropped) < 5:
        until_s += 5.0
        swarm.run(until_s)
        dropped |= {node.name for node in swarm.honest if node.schedule.standing("node5", until_s) is Standing.DROPPED}
        if until_s % 60 == 0:
            swarm.write(swarm.honest[int(until_s / 60) % 5])
    assert len(dropped) == 5
    assert len({frozenset(node.blocks) for node in swarm.honest}) == 1
    honest = {node.name for node in swarm.honest}
    assert all(node.schedule.standing(name, until_s) is Standing.GOOD for node in swarm.honest for name in honest)


def test_partitioned_nodes_that_both_write_agree_when_healed() -> None:
    swarm = Swarm(6, 4, 0, 60.0)
    swarm.islands = {"node0": 1, "node1": 1}
    for at in range(10):
        swarm.run(2.0 * at)
        for node in swarm.honest:
            swarm.write(node)
    swarm.run(60.0 + TAIL_S)
    assert len({frozenset(node.blocks) for node in swarm.honest}) == 1


def test_same_seed_same_trace() -> None:
    one, again, other = (_finished(seed, honest=3).trace.digest() for seed in (7, 7, 8))
    assert one == again != other
