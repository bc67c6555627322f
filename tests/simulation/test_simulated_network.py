"""What only the simulated network can do: the same run twice, partitions, crashes, loss, all in virtual time."""

from __future__ import annotations

import hashlib
import math
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from nexus.core.errors import UnreachableError, UsageError
from nexus.core.keys import Identity
from nexus.network.simulated import SimulatedNetwork
from nexus.network.transport import ProtocolSpec, Stream

ECHO = ProtocolSpec("/test/echo/1", frame_max=1 << 20, read_timeout_s=None)
Simulate = Callable[[int, Callable[[], Awaitable[Any]]], Any]


def identity(number: int) -> Identity:
    return Identity(hashlib.sha256(b"%d" % number).digest())


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def busy_world(seed: int, nodes: int = 6) -> str:
    """Nodes that dial, talk, gossip, announce, split, crash; the trace of it all."""
    network = SimulatedNetwork(seed, delay_s=(0.01, 0.1), loss=0.1, break_after_s=2.0)
    rng = random.Random(seed)

    async with AsyncExitStack() as stack:
        transports = []
        for number in range(nodes):
            transport = await stack.enter_async_context(network.open(identity(number)))
            transport.serve(ECHO, echo)
            transports.append(transport)

        async def talk(number: int) -> None:
            me = transports[number]
            for turn in range(5):
                other = transports[(number + turn + 1) % nodes]
                try:
                    await me.connect(other.addresses[0])
                    stream = await me.open_stream(other.peer_id, ECHO)
                    for size in (10, 1000):
                        await stream.send(bytes(size))
                        with trio.move_on_after(5):
                            await stream.receive()
                    await me.publish("t", b"%d" % turn)
                    await me.provide(bytes([number]) * 32)
                    await stream.close()
                except UnreachableError:
                    await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            for transport in transports[:3]:
                await stack.enter_async_context(transport.subscribe("t"))
            for number in range(nodes):
                nursery.start_soon(talk, number)
            await trio.sleep(rng.random())
            network.partition([[t.peer_id for t in transports[:2]]])
            await trio.sleep(3)
            network.heal()
            network.crash(transports[-1].peer_id)
    assert network.events > 100
    return network.trace


def test_the_same_seed_gives_the_same_trace(simulate: Simulate) -> None:
    first = simulate(1, lambda: busy_world(1))
    assert simulate(1, lambda: busy_world(1)) == first
    assert simulate(2, lambda: busy_world(2)) != first


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_same_seed_gives_the_same_trace_in_another_process(simulate: Simulate, hash_seed: str) -> None:
    here = Path(__file__).parent
    program = (
        f"import sys; sys.path.insert(0, {str(here)!r})\n"
        "from conftest import simulate\nfrom test_simulated_network import busy_world\n"
        "print(simulate(1, lambda: busy_world(1)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={"PYTHONHASHSEED": hash_seed}, check=True
    )
    assert printed.stdout.strip() == simulate(1, lambda: busy_world(1))


async def test_delay_is_virtual_and_within_its_range(autojump_clock: object) -> None:
    network = SimulatedNetwork(3, delay_s=(10.0, 20.0))
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer_id, ECHO)
        for _ in range(10):
            begin_s = trio.current_time()
            await stream.send(b"x")
            await stream.receive()
            assert 20 <= trio.current_time() - begin_s <= 40
        assert 20 <= await a.ping(b.peer_id) <= 40


async def test_lossy_streams_stay_reliable_and_in_order(autojump_clock: object) -> None:
    network = SimulatedNetwork(4, loss=0.3)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer_id, ECHO)
        begin_s = trio.current_time()
        for number in range(200):
            await stream.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number
        assert trio.current_time() - begin_s > 10  # 400 frames, 30 % of them sent again after at least 0.2 s


async def test_hopeless_loss_breaks_a_stream_and_never_drops_a_frame_silently(autojump_clock: object) -> None:
    network = SimulatedNetwork(5, loss=0.99)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer_id, ECHO)

        async def talk() -> None:
            for _ in range(20):
                await stream.send(b"x")
                assert await stream.receive() == b"x"

        with pytest.raises(UnreachableError):
            await talk()


async def test_a_partition_stalls_and_healing_in_time_loses_nothing(autojump_clock: object) -> None:
    network = SimulatedNetwork(6, break_after_s=10.0)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer_id, ECHO)
        network.partition([[a.peer_id], [b.peer_id]])
        await stream.send(b"kept")
        with trio.move_on_after(5) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        network.heal()
        assert await stream.receive() == b"kept"
        await trio.sleep(20)
        await stream.send(b"the connection survived")
        assert await stream.receive() == b"the connection survived"


async def test_a_lasting_partition_breaks_streams_and_hides_peers(autojump_clock: object) -> None:
    network = SimulatedNetwork(7, break_after_s=10.0)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b, network.open(identity(3)) as c:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        await b.provide(bytes(32))
        stream = await a.open_stream(b.peer_id, ECHO)
        network.partition([[a.peer_id, c.peer_id]])
        with pytest.raises(UnreachableError):
            await stream.receive()
        assert a.connections() == []
        assert await c.find_providers(bytes(32)) == []
        begin_s = trio.current_time()
        with pytest.raises(UnreachableError, match="no answer"):
            await a.connect(b.addresses[0])
        assert trio.current_time() - begin_s == pytest.approx(10)
        await a.connect(c.addresses[0])
        network.heal()
        await a.connect(b.addresses[0])
        assert [peer.peer_id for peer in await c.find_providers(bytes(32))] == [b.peer_id]


async def test_a_crash_breaks_everything_and_the_node_may_come_back(autojump_clock: object) -> None:
    network = SimulatedNetwork(8)
    async with network.open(identity(1)) as a:
        async with network.open(identity(2)) as b:
            b.serve(ECHO, echo)
            await a.connect(b.addresses[0])
            stream = await a.open_stream(b.peer_id, ECHO)
            with pytest.raises(UsageError):
                async with network.open(identity(2)):
                    pass
            network.crash(b.peer_id)
            with pytest.raises(UnreachableError):
                await stream.receive()
            with pytest.raises(UnreachableError):
                await b.connect(a.addresses[0])
            with pytest.raises(UnreachableError, match="refused"):
                await a.connect(b.addresses[0])
            with pytest.raises(UnreachableError):
                await b.publish("t", b"from the grave")
        async with network.open(identity(2)) as again:
            again.serve(ECHO, echo)
            await a.connect(again.addresses[0])
            stream = await a.open_stream(again.peer_id, ECHO)
            await stream.send(b"back")
            assert await stream.receive() == b"back"


async def test_provider_records_expire(autojump_clock: object) -> None:
    network = SimulatedNetwork(9, provider_lifetime_s=100)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        await a.provide(bytes(32))
        assert await b.find_providers(bytes(32))
        await trio.sleep(60)
        await a.provide(bytes(32))
        await trio.sleep(60)
        assert await b.find_providers(bytes(32))
        await trio.sleep(60)
        assert await b.find_providers(bytes(32)) == []


async def test_bandwidth_is_finite_when_asked_for(autojump_clock: object) -> None:
    network = SimulatedNetwork(10, delay_s=(0, 0), bytes_per_s=1_000_000)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        b.serve(ECHO, echo)
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer_id, ECHO)
        begin_s = trio.current_time()
        for _ in range(2):
            await stream.send(bytes(500_000))
        for _ in range(2):
            await stream.receive()
        # Both frames share the pipe of either direction: a second each way, the way back overlapping by one frame.
        assert math.isclose(trio.current_time() - begin_s, 1.5, rel_tol=0.01)


async def test_a_slow_reader_of_gossip_loses_the_oldest(autojump_clock: object) -> None:
    network = SimulatedNetwork(11)
    async with network.open(identity(1)) as a, network.open(identity(2)) as b:
        await a.connect(b.addresses[0])
        async with b.subscribe("t") as channel:
            for number in range(300):
                await a.publish("t", b"%d" % number)
                await trio.sleep(0.1)
            first = await channel.receive()
            assert first.data == b"44"
