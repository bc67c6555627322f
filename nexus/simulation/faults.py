"""What befalls a swarm: drawn from the seed beforehand, then done at its time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from nexus.network.simulated import Conditions
from nexus.simulation.cluster import Cluster, Member
from nexus.simulation.model import LAYERS

CRASH, RESTART, STOP, PARTITION, ONE_WAY, SLOW, LINK, LOSS, DISK_FULL, CLOCK = (
    *("crash", "restart", "stop", "partition", "one-way", "slow", "link"),
    *("loss", "disk-full", "clock"),
)
FAULTS = (CRASH, RESTART, STOP, PARTITION, ONE_WAY, SLOW, LINK, LOSS, DISK_FULL, CLOCK)
# Of the whole run, no single event: cheating nodes, nodes that leave for good, clocks years off, gossip doubled and out of order.
BYZANTINE, LEAVE, SKEW, GOSSIP = "byzantine", "leave", "skew", "gossip"
STANDING = (BYZANTINE, LEAVE, SKEW, GOSSIP)
# Where there is nothing but these, a request gets over it: the answer goes on over other nodes.
SURVIVED = frozenset({CRASH, RESTART, GOSSIP})
YEAR_MS = 365 * 86_400_000


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    kind: str
    lasts_s: float
    draw: int  # seeds what is left to decide when it comes


def draw_faults(rng: random.Random, kinds: tuple[str, ...], begin_s: float, end_s: float, count: int) -> list[Fault]:
    events = [kind for kind in FAULTS if kind in kinds]
    if not events:
        return []
    return sorted(
        (
            Fault(rng.uniform(begin_s, end_s), rng.choice(events), rng.choice((0.2, 1.0, 3.0, 8.0, 15.0)), rng.getrandbits(64))
            for _ in range(count)
        ),
        key=lambda fault: fault.at_s,
    )


class Injector:
    """Does the faults. `spared`: members that stay on, because somebody must ask. A member is in one fault at a time, and
    so many are in any `at_once`."""

    def __init__(self, cluster: Cluster, spared: frozenset[int], crashed: Callable[[Member], None], at_once: int) -> None:
        self._cluster = cluster
        self._spared = spared
        self._crashed = crashed
        self._at_once = at_once
        self._busy: set[int] = set()
        self._left: set[int] = set()
        self._scopes: set[trio.CancelScope] = set()
        # Members that something happened to which may make an honest node look silent.
        self.troubled: set[int] = set()

    async def run(self, faults: list[Fault]) -> None:
        async with trio.open_nursery() as nursery:
            for fault in faults:
                await trio.sleep_until(fault.at_s)
                rng = random.Random(fault.draw)  # noqa: S311
                await nursery.start(self._one, fault, rng)

    async def _one(self, fault: Fault, rng: random.Random, *, task_status: Any) -> None:
        self._cluster.network.record("fault", fault.kind)
        does: dict[str, Callable[[Fault, random.Random], Awaitable[None]]] = {
            CRASH: self._crash,
            RESTART: self._restart,
            STOP: self._stop,
            PARTITION: self._partition,
            ONE_WAY: self._one_way,
            SLOW: self._slow,
            LINK: self._link,
            LOSS: self._loss,
            DISK_FULL: self._disk_full,
            CLOCK: self._clock,
        }
        task_status.started()
        await does[fault.kind](fault, rng)

    def _take(self, rng: random.Random) -> Member | None:
        free = [one for one in self._cluster.on() if one.number not in self._busy and one.number not in self._spared]
        if not free or len(self._busy) >= self._at_once:
            return None
        member = rng.choice(free)
        self._busy.add(member.number)
        self.troubled.add(member.number)
        return member

    def leave(self, rng: random.Random, holders: int) -> Member | None:
        """A member that is to go and never come back; it is in a fault for ever. Every layer stays with so many others that are
        sound."""
        member = self._take(rng)
        if member is None:
            return None
        others = [one for one in self._cluster.members if one is not member and one.sound and one.number not in self._left]
        counts = [sum(start <= layer < end for one in others for start, end in one.layers) for layer in range(LAYERS)]
        if min(counts) < holders:
            self._busy.discard(member.number)
            return None
        self._left.add(member.number)
        return member

    async def crash(self, member: Member) -> None:
        await self._cluster.crash(member)
        self._crashed(member)

    async def _crash(self, fault: Fault, rng: random.Random) -> None:
        member = self._take(rng)
        if member is not None:
            await self.crash(member)
            await trio.sleep(fault.lasts_s)
            await self._again(member, rng)

    async def _restart(self, fault: Fault, rng: random.Random) -> None:
        member = self._take(rng)
        if member is not None:
            await self._cluster.shut_down(member)
            await trio.sleep(fault.lasts_s)
            await self._again(member, rng)

    async def _again(self, member: Member, rng: random.Random) -> None:
        others = self._cluster.on()
        await self._cluster.start(member, rng.sample(others, min(2, len(others))))
        self._busy.discard(member.number)

    async def _stop(self, fault: Fault, rng: random.Random) -> None:
        member = self._take(rng)
        if member is not None:
            self._cluster.stop(member)
            await trio.sleep(fault.lasts_s)
            self._cluster.resume(member)
            self._busy.discard(member.number)

    async def _partition(self, fault: Fault, rng: random.Random) -> None:
        members = self._cluster.members
        share = rng.choice((0.1, 0.3, 0.5))
        group = [one for one in members if rng.random() < share]
        # Whichever side is smaller looks silent to the other, and the other to it.
        self.troubled |= {one.number for one in members}
        self._cluster.network.partition([[one.peer_id for one in group]])
        await trio.sleep(fault.lasts_s)
        self._cluster.network.partition(())

    async def _one_way(self, fault: Fault, rng: random.Random) -> None:
        members = self._cluster.members
        one, *others = rng.sample(members, max(2, len(members) // 4))
        self.troubled |= {one.number, *(other.number for other in others)}
        inward = rng.random() < 0.5
        self._cluster.network.block((other.peer_id, one.peer_id) if inward else (one.peer_id, other.peer_id) for other in others)
        await trio.sleep(fault.lasts_s)
        self._cluster.network.block(())

    async def _slow(self, fault: Fault, rng: random.Random) -> None:
        member = self._take(rng)
        if member is not None:
            self._cluster.slowness.set(member.host, rng.choice((10.0, 100.0, 1000.0)))
            await trio.sleep(fault.lasts_s)
            self._cluster.slowness.set(member.host, 1.0)
            self._busy.discard(member.number)

    async def _link(self, fault: Fault, rng: random.Random) -> None:
        """A path of some seconds, a few kilobytes per second, or a good deal of loss, in one direction or both."""
        network = self._cluster.network
        one, other = rng.sample(self._cluster.members, 2)
        self.troubled |= {one.number, other.number}
        bad = rng.choice((Conditions((0.2, 2.0)), Conditions((0.01, 0.1), 0.0, 4096.0), Conditions((0.01, 0.1), 0.4)))
        ways = [(one.peer_id, other.peer_id), (other.peer_id, one.peer_id)][: rng.choice((1, 2))]
        for way in ways:
            network.set_link(*way, bad)
        await trio.sleep(fault.lasts_s)
        for way in ways:
            network.set_link(*way, None)

    async def _loss(self, fault: Fault, rng: random.Random) -> None:
        network = self._cluster.network
        self.troubled |= {one.number for one in self._cluster.members}
        before, network.loss = network.loss, rng.choice((0.05, 0.2, 0.4))
        await trio.sleep(fault.lasts_s)
        network.loss = before

    async def _disk_full(self, fault: Fault, rng: random.Random) -> None:
        member = self._take(rng)
        if member is not None:
            member.disk.full = True
            await trio.sleep(fault.lasts_s)
            member.disk.full = False
            self._busy.discard(member.number)

    async def _clock(self, fault: Fault, rng: random.Random) -> None:
        """A clock that leaps, and is set right again."""
        member = self._take(rng)
        if member is not None:
            leap_ms = rng.choice((-1, 1)) * rng.choice((5_000, 3_600_000, 3 * YEAR_MS))
            member.skew_ms += leap_ms
            await trio.sleep(fault.lasts_s)
            member.skew_ms -= leap_ms
            self._busy.discard(member.number)
