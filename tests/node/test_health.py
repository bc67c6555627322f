"""A stopped process is noticed within seconds and stalls nobody; a slow answer costs nobody anything."""

from __future__ import annotations

from collections.abc import Iterable

import trio
import trio.testing

from nexus.core.errors import TimedOutError, UnreachableError
from nexus.core.keys import Identity, public_key_of
from nexus.network.transport import Transport
from nexus.node.health import HEARTBEATS_AT_ONCE, Health
from nexus.swarm.health import ALIVE, GONE, SLOW, STUCK, UNKNOWN
from nexus.swarm.links import Coordinate, Links

Clock = trio.testing.MockClock
OWN = Identity(bytes(32)).public_key


def key_of(number: int) -> bytes:
    return Identity(number.to_bytes(32, "big")).public_key


class Peers:
    """Pings by peer: the seconds that an answer takes, infinite for none, or the error that it ends in."""

    def __init__(self) -> None:
        self.answers: dict[bytes, float | Exception] = {}
        self.once: dict[bytes, float] = {}  # what the next ping takes instead
        self.asked: dict[bytes, list[float]] = {}
        self.at_once = self.most_at_once = 0

    async def ping(self, peer_id: str) -> float:
        node = public_key_of(peer_id)
        self.asked.setdefault(node, []).append(trio.current_time())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answer = self.once.pop(node, self.answers[node])
            if isinstance(answer, Exception):
                raise answer
            await trio.sleep(answer)
            return answer
        finally:
            self.at_once -= 1


class Watch:
    def __init__(self, nursery: trio.Nursery, nodes: Iterable[bytes], needed: Iterable[bytes] = ()) -> None:
        self.peers = Peers()
        self.nodes, self.needed = list(nodes), set(needed)
        self.peers.answers = dict.fromkeys(self.nodes, 0.01)
        self.links = Links(OWN)
        transport: Transport = self.peers  # type: ignore[assignment]
        self.health = Health(transport, self.links, lambda: self.nodes, lambda: self.needed, lambda _: Coordinate(0, 0, 0, 10, 1))
        self.unwell: list[bytes] = []
        self.health.on_unwell.append(self.unwell.append)
        nursery.start_soon(self.health.run)

    async def seconds_until(self, node: bytes, state: str, within_s: float) -> float:
        began_s = trio.current_time()
        with trio.fail_after(within_s):
            while self.health.state(node) != state:  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.05)
        return trio.current_time() - began_s


async def test_a_stopped_process_is_noticed_within_six_seconds_whenever_it_stops(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    nodes = [key_of(number) for number in range(1, 6)]
    watch = Watch(nursery, nodes)
    for number in range(10):
        stopped = nodes[number % 5]
        await trio.sleep(20 + 0.37 * number)
        assert all(watch.health.state(node) == ALIVE for node in nodes)
        watch.peers.answers[stopped] = float("inf")
        await watch.seconds_until(stopped, STUCK, 6)
        assert watch.unwell.pop() == stopped
        assert all(watch.health.state(node) == ALIVE for node in nodes if node != stopped)
        watch.peers.answers[stopped] = 0.01
        await watch.seconds_until(stopped, ALIVE, 12)
    assert watch.unwell == []


async def test_those_at_work_are_watched_closely_in_a_crowd(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    nodes = [key_of(number) for number in range(1, 201)]
    watch = Watch(nursery, nodes, needed=nodes[:3])
    await trio.sleep(120)
    assert all(watch.health.state(node) == ALIVE for node in nodes)
    assert watch.peers.most_at_once <= HEARTBEATS_AT_ONCE
    counts = {node: sum(at_s > 60 for at_s in watch.peers.asked[node]) for node in nodes}
    assert min(counts[node] for node in nodes[:3]) >= 20
    assert sum(counts[node] for node in nodes[3:]) <= 60 * 8
    watch.peers.answers[nodes[1]] = float("inf")
    await watch.seconds_until(nodes[1], STUCK, 6)


async def test_very_many_that_are_stuck_hold_up_nobody_at_work(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    nodes = [key_of(number) for number in range(1, 129)]
    watch = Watch(nursery, nodes, needed=nodes[:2])
    await trio.sleep(60)
    for node in nodes[2:]:
        watch.peers.answers[node] = float("inf")
    await trio.sleep(60)
    assert watch.health.state(nodes[0]) == ALIVE
    watch.peers.answers[nodes[0]] = float("inf")
    await watch.seconds_until(nodes[0], STUCK, 12)


async def test_slow_answers_under_load_are_no_reason_to_do_without_a_node(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    one = key_of(1)
    watch = Watch(nursery, [one])
    await watch.seconds_until(one, ALIVE, 5)
    for answer in (1.2, 5.0, 1.4, 900.0):
        watch.peers.once[one] = answer
        await trio.sleep(8)
        assert not watch.peers.once
        assert watch.health.state(one) == ALIVE
    assert watch.unwell == []


async def test_a_node_that_is_not_there_is_gone_and_back_when_it_is_heard(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    one = key_of(1)
    watch = Watch(nursery, [one])
    await watch.seconds_until(one, ALIVE, 5)
    watch.peers.answers[one] = UnreachableError("connection refused")
    await watch.seconds_until(one, GONE, 4)
    assert not watch.health.is_usable(one)
    watch.nodes.clear()
    watch.health.heard(one)
    assert watch.health.state(one) == SLOW


async def test_an_error_is_a_missing_answer(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    one = key_of(1)
    watch = Watch(nursery, [one])
    watch.peers.answers[one] = TimedOutError("no answer to a ping")
    await watch.seconds_until(one, STUCK, 10)


async def test_before_a_plan_those_not_heard_lately_are_asked_and_the_answer_is_in_time(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    quick, stopped, far = (key_of(number) for number in (1, 2, 3))
    watch = Watch(nursery, [])
    watch.peers.answers = {quick: 0.05, stopped: float("inf"), far: UnreachableError("nobody")}
    began_s = trio.current_time()
    assert await watch.health.check([quick, stopped, far]) == {stopped, far}
    assert trio.current_time() - began_s <= 3.1
    began_s = trio.current_time()
    assert await watch.health.check([quick, stopped, far]) == {stopped, far}
    assert trio.current_time() == began_s
    assert watch.health.state(key_of(4)) == UNKNOWN


async def test_round_trips_go_to_the_links(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    one = key_of(1)
    watch = Watch(nursery, [one])
    watch.peers.answers[one] = 0.08
    await trio.sleep(120)
    assert watch.links.rtt_us(OWN, one) == 80_000
    assert watch.links.coordinate.error < 300_000


async def test_an_idle_node_wakes_seldom(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    watch = Watch(nursery, [])
    looks: list[float] = []
    watch.health._watched = lambda: looks.append(trio.current_time()) or []  # type: ignore[func-returns-value]
    await trio.sleep(600)
    assert len(looks) <= 121
