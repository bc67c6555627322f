"""The node's own membership over the simulated network, in virtual time: how soon a swarm knows what happened to it.

Real: `nexus.node.membership` and the tables below it, every record, signature and frame. Of a node nothing else runs, and what the
libp2p adapter does for it, keeping a connection to its bootstrap peers, is done here with the same pauses. The network delivers
gossip once to each; what gossipsub sends beside, for its mesh, is counted after it (`mesh_bytes`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import trio
import trio.testing

from nexus.core.errors import PeerError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import PeerAddress
from nexus.node.membership import Membership
from nexus.simulation.determinism import deterministic_scheduling
from nexus.swarm.links import NOWHERE
from nexus.swarm.membership import Holding, LayerRange, NodeRecord

EPOCH_MS = 1_780_000_000_000
BOOTSTRAPS = 3
RETRY_S = (1.0, 60.0)  # as the adapter's BOOTSTRAP_RETRY_S
START_WITHIN_S = 10.0
QUIET_S = 60.0
# Connected nodes ask each other this often, and each tells of itself as often: a shorter look would miss it.
TRAFFIC_S = 150.0
CUT_S = 60.0
LIMIT_S = 600.0
LOOK_EVERY_S = 0.5
CRASHED, JOINED = 0.2, 0.2
# A node that knows so many others, or all there are, can plan; introductions go on to ACQUAINTANCES_WANTED.
ENOUGH = 16
# Frames carry a head, an encryption tag and TCP/IP below; measured on the libp2p adapter for small frames.
FRAME_OVERHEAD_BYTES = 80
# Gossipsub as nexus.network.libp2p sets it: each message goes over the mesh, to `degree` peers, signed and with ids.
MESH_DEGREE = 6
GOSSIP_ENVELOPE_BYTES = 200
# Each heartbeat of 1 s names the messages of the last 3 to up to 6 peers outside the mesh.
IHAVE_BYTES, IHAVE_ID_BYTES = 60, 60


@dataclass(frozen=True, slots=True)
class MembershipFigures:
    """Virtual seconds, None where it took longer than LIMIT_S. `ghosts_gone_s`: from the crash of a fifth of the nodes until none
    of the others counts with any of them. `joined_s`: until each newcomer knows enough others and is known by as many. `healed_s`:
    from the end of a partition into halves, of CUT_S, until gossip of any node reaches every other. Bytes per node and second,
    sent, while nothing happens: `exchange_bytes` of records and their like as they were sent, `gossip_bytes` with the mesh."""

    settled_s: float | None
    ghosts_gone_s: float | None
    joined_s: float | None
    healed_s: float | None
    exchange_bytes: float
    gossip_bytes: float
    known_mean: float
    trace: str


def _now_ms() -> int:
    return EPOCH_MS + round(trio.current_time() * 1000)


class _Counting(SimulatedNetwork):
    """Counts what is sent."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, delay_s=(0.005, 0.04))
        self.frames = self.frame_bytes = self.published = self.published_bytes = 0

    def record(self, *event: object) -> None:
        super().record(*event)
        if event[0] == "frame":
            self.frames += 1
            self.frame_bytes += event[3]  # type: ignore[operator]

    def gossip(self, publisher: SimulatedTransport, topic: str, data: bytes) -> None:
        self.published += 1
        self.published_bytes += len(data)
        super().gossip(publisher, topic, data)


class _Node:
    def __init__(self, network: _Counting, number: int, seed: int) -> None:
        self.network = network
        self.number = number
        self.identity = Identity(tagged_hash("scale node", f"{seed} {number}".encode()))
        self.rng = random.Random(f"membership {seed} {number}")
        self.bootstraps: list[PeerAddress] = []
        self.membership: Membership | None = None
        self.transport: SimulatedTransport | None = None
        self.scope = trio.CancelScope()

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def knows(self) -> set[str]:
        return {record.peer_id for record in self.membership.records()} if self.membership is not None else set()

    def connected(self) -> set[str]:
        return {connection.peer_id for connection in self.transport.connections()} if self.transport is not None else set()

    def address(self) -> PeerAddress:
        assert self.transport is not None
        return PeerAddress(self.peer_id, (self.transport.endpoint,))

    async def run(self, after_s: float, bootstraps: Callable[[], list[PeerAddress]]) -> None:
        await trio.sleep(after_s)
        with self.scope:
            async with self.network.open(self.identity) as transport, trio.open_nursery() as nursery:
                self.transport = transport
                self.bootstraps = bootstraps()
                self.membership = Membership(transport, self.identity, self._describe, _now_ms)
                nursery.start_soon(self.membership.run)
                for peer in self.bootstraps:
                    nursery.start_soon(self._stay_connected, peer)
        self.membership = None

    def crash(self) -> None:
        """Power off: nobody is told."""
        if self.membership is not None:
            self.network.crash(self.peer_id)
        self.scope.cancel()

    def _describe(self) -> NodeRecord:
        assert self.transport is not None
        held = (LayerRange(0, 8),)
        return NodeRecord(
            spec=1,
            node=self.identity.public_key,
            issued_ms=0,
            agent="nexus/scale",
            name=f"node-{self.number}",
            addresses=(self.transport.endpoint,),
            memory_bytes=1 << 31,
            memory_free_bytes=1 << 30,
            exact_speed=25_000,
            float_speed=8_000,
            upload=12_500_000,
            load=0,
            coordinate=NOWHERE,
            serves=1,
            leaving=0,
            models=(Holding("model", b"m" * 32, held, held, 1),),
            price=0,
        )

    async def _stay_connected(self, peer: PeerAddress) -> None:
        assert self.transport is not None
        pause_s = RETRY_S[0]
        while True:
            self.transport.learn(peer)
            try:
                if not any(connection.peer_id == peer.peer_id for connection in self.transport.connections()):
                    await self.transport.ping(peer.peer_id)
                pause_s = RETRY_S[0]
            except PeerError:
                pause_s = min(RETRY_S[1], 2 * pause_s)
            await trio.sleep(pause_s * (0.75 + 0.5 * self.rng.random()))


async def _until(condition: Callable[[], bool]) -> float | None:
    """Virtual seconds until it holds."""
    began_s = trio.current_time()
    while trio.current_time() - began_s < LIMIT_S:
        if condition():
            return round(trio.current_time() - began_s, 1)
        await trio.sleep(LOOK_EVERY_S)
    return None


class _Swarm:
    def __init__(self, seed: int, count: int, nursery: trio.Nursery) -> None:
        self.seed = seed
        self.rng = random.Random(f"membership {seed}")
        self.network = _Counting(seed)
        self.nursery = nursery
        self.nodes: list[_Node] = []
        self.add(count)

    def add(self, count: int) -> list[_Node]:
        """More nodes, which start within START_WITHIN_S. Each is told of some that run when it starts."""

        def bootstraps(own: _Node) -> list[PeerAddress]:
            running = [node for node in self.nodes if node.membership is not None and node is not own]
            return [node.address() for node in self.rng.sample(running, min(BOOTSTRAPS, len(running)))]

        fresh = [_Node(self.network, len(self.nodes) + at, self.seed) for at in range(count)]
        for at, node in enumerate(fresh):
            self.nodes.append(node)
            self.nursery.start_soon(node.run, START_WITHIN_S * at / max(1, count), lambda node=node: bootstraps(node))
        return fresh

    def alive(self) -> list[_Node]:
        return [node for node in self.nodes if node.membership is not None]

    def is_one(self) -> bool:
        """Whether connections lead from every node to every other."""
        alive = {node.peer_id: node for node in self.alive()}
        reached = {next(iter(alive))}
        frontier = list(reached)
        while frontier:
            fresh = alive[frontier.pop()].connected() & alive.keys() - reached
            reached |= fresh
            frontier += sorted(fresh)
        return len(reached) == len(alive)

    def all_know_enough(self) -> bool:
        alive = self.alive()
        return all(len(node.knows()) >= min(ENOUGH, len(alive) - 1) for node in alive)


async def _measure(seed: int, count: int) -> MembershipFigures:
    async with trio.open_nursery() as nursery:
        swarm = _Swarm(seed, count, nursery)
        network = swarm.network
        await trio.sleep(START_WITHIN_S)
        settled_s = await _until(lambda: len(swarm.alive()) == count and swarm.all_know_enough())

        # Introductions go on for a while; the quiet after them is what is measured.
        await trio.sleep(QUIET_S)
        network.frames = network.frame_bytes = network.published = network.published_bytes = 0
        await trio.sleep(TRAFFIC_S)
        exchange = (network.frame_bytes + network.frames * FRAME_OVERHEAD_BYTES) / TRAFFIC_S / count
        gossip = mesh_bytes(network.published, network.published_bytes, TRAFFIC_S, count)
        known = sum(len(node.knows()) for node in swarm.alive()) / count

        crashed = swarm.rng.sample(swarm.nodes, math.ceil(count * CRASHED))
        gone = {node.peer_id for node in crashed}
        for node in crashed:
            node.crash()
        fresh = swarm.add(math.ceil(count * JOINED))
        began_s = trio.current_time()
        ghosts_gone_s = await _until(lambda: not any(gone & node.knows() for node in swarm.alive()))
        already_s = trio.current_time() - began_s

        def joined() -> bool:
            alive = swarm.alive()
            enough = min(ENOUGH, len(alive) - 1)
            known_by = dict.fromkeys((node.peer_id for node in fresh), 0)
            for node in alive:
                for peer_id in node.knows() & known_by.keys():
                    known_by[peer_id] += 1
            return (
                all(node.membership is not None and len(node.knows()) >= enough for node in fresh)
                and min(known_by.values()) >= enough
            )

        more_s = await _until(joined)
        joined_s = None if more_s is None else round(already_s + more_s, 1)

        alive = swarm.alive()
        halves = [{node.peer_id for node in alive[at::2]} for at in range(2)]
        network.partition(halves)
        await trio.sleep(CUT_S)
        network.heal()
        healed_s = await _until(swarm.is_one)
        nursery.cancel_scope.cancel()
        return MembershipFigures(
            settled_s, ghosts_gone_s, joined_s, healed_s, round(exchange, 1), round(gossip, 1), round(known, 1), network.trace
        )
    raise AssertionError("unreachable")


def mesh_bytes(messages: int, payload_bytes: int, seconds: float, nodes: int) -> float:
    """What gossipsub makes of published messages, per node and second: each node forwards each message to its mesh but for whom it
    has it from, and names it to as many peers in each of three heartbeats."""
    per_s = messages / seconds
    mean_bytes = payload_bytes / messages + GOSSIP_ENVELOPE_BYTES + FRAME_OVERHEAD_BYTES if messages else 0.0
    degree = min(MESH_DEGREE, nodes - 1)
    forwarded = per_s * (degree - 1) * mean_bytes * (nodes - 1) / nodes
    heads = degree * (IHAVE_BYTES + FRAME_OVERHEAD_BYTES) if messages else 0.0
    return forwarded + heads + per_s * 3 * degree * IHAVE_ID_BYTES


def membership_figures(seed: int, nodes: int) -> MembershipFigures:
    with deterministic_scheduling(seed):
        return trio.run(_measure, seed, nodes, clock=trio.testing.MockClock(autojump_threshold=0))
