"""nexus netcheck in a node: clocks against peers, names, news of addresses."""

from __future__ import annotations

import os

import pytest
import trio

from nexus.core.keys import Identity
from nexus.network.reachability import LOCAL_ONLY, UNKNOWN
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import Stream
from nexus.node.netcheck import CLOCK, CLOCK_OFF_MS, ClockView, NetcheckService, judge_clock


def service(transport: SimulatedTransport, ahead_ms: int = 0, names: dict[str, str] | None = None) -> NetcheckService:
    return NetcheckService(
        transport, lambda: 1_000_000 + round(trio.current_time() * 1000) + ahead_ms, lambda: names or {}, lambda: None
    )


@pytest.mark.parametrize("ahead_ms", [0, 4_000, -4_000, 3_600_000])
async def test_clocks_are_compared_without_the_way_between(autojump_clock: trio.testing.MockClock, ahead_ms: int) -> None:
    network = SimulatedNetwork(1, delay_s=(0.2, 0.4))
    async with network.open(Identity(os.urandom(32))) as here, network.open(Identity(os.urandom(32))) as there:
        service(there, ahead_ms).start()
        mine = service(here, names={there.peer_id: "there"})
        mine.start()
        await here.connect(there.addresses[0])
        view = await mine.check()
    (clock,) = view.clocks
    assert abs(clock.ahead_ms - ahead_ms) <= clock.uncertain_ms <= 400
    assert view.clock == ("off" if abs(ahead_ms) > CLOCK_OFF_MS else "ok")
    assert any("clock" in line for line in view.advice) == (view.clock == "off")
    assert view.names == ((there.peer_id, "there"),)
    assert view.network.verdict == LOCAL_ONLY


async def test_without_peers_nothing_is_known(autojump_clock: trio.testing.MockClock) -> None:
    async with SimulatedNetwork(1).open(Identity(os.urandom(32))) as here:
        view = await service(here).check()
    assert (view.clock, view.clocks, view.network.verdict) == ("unknown", (), UNKNOWN)


async def test_peers_that_say_nothing_or_nonsense_hold_nothing_up(autojump_clock: trio.testing.MockClock) -> None:
    async def silence(stream: Stream) -> None:
        await trio.sleep_forever()

    async def nonsense(stream: Stream) -> None:
        await stream.receive()
        await stream.send(b"what time?")

    network = SimulatedNetwork(1)
    async with (
        network.open(Identity(os.urandom(32))) as here,
        network.open(Identity(os.urandom(32))) as mute,
        network.open(Identity(os.urandom(32))) as mad,
        network.open(Identity(os.urandom(32))) as old,
    ):
        mute.serve(CLOCK, silence)
        mad.serve(CLOCK, nonsense)
        for peer in (mute, mad, old):
            await here.connect(peer.addresses[0])
        with trio.fail_after(60):
            view = await service(here).check()
    assert view.clocks == ()


def test_one_liar_turns_no_clock_round() -> None:
    honest = [ClockView("a", 20, 5), ClockView("b", -300, 5)]
    assert judge_clock([*honest, ClockView("c", 10**9, 5)]) == "ok"
    assert judge_clock([ClockView(str(number), 60_000 + number, 5) for number in range(3)] + honest) == "off"


async def test_new_addresses_are_told(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    told = []
    async with SimulatedNetwork(1).open(Identity(os.urandom(32))) as here:
        watching = NetcheckService(here, lambda: 0, dict, lambda: told.append(here.addresses))
        nursery.start_soon(watching.watch_addresses)
        await trio.sleep(10)
        assert told == []
        before, here.endpoint = here.endpoint, "/ip4/10.9.9.9/tcp/1"
        await trio.sleep(10)
        assert told == [(f"/ip4/10.9.9.9/tcp/1/p2p/{here.peer_id}",)]
        here.endpoint = before
        nursery.cancel_scope.cancel()
