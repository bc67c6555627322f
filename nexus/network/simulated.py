"""A network in memory, seeded: the same port, with delay, loss, partitions and crashes, under trio's MockClock in no time.

Streams are what TCP makes of a lossy path: in order and reliable, or broken. A lost frame costs retransmission time-outs; a path
that stays cut breaks its streams. Gossip may be lost, doubled and out of order. A partition, whole or of one direction, stalls what
crosses it, and breaks it after `break_after_s`. Every link has conditions of its own and draws from a generator of its own, so what
one pair of nodes does never shifts what befalls another.
"""

from __future__ import annotations

import contextvars
import hashlib
import math
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from nexus.core.errors import UnreachableError, UsageError
from nexus.core.keys import Identity, parse_peer_id
from nexus.network.addresses import AddressBook, Endpoint, no_address, parse_endpoint, parse_peer_address
from nexus.network.gossip import Subscribers, check_message
from nexus.network.pipe import Link, PipeStream, pipe
from nexus.network.reachability import LOCAL_ONLY, MAPPING_NONE, PRIVATE, UNKNOWN, AddressCheck, Netcheck, advise
from nexus.network.serving import Serving, background_nursery, not_served
from nexus.network.transport import Connection, Handler, Message, PeerAddress, ProtocolSpec, Stream, Subscription, check_key

RETRANSMISSION_S = 0.2
RETRANSMISSIONS_MAX = 6
CONNECT_TIMEOUT_S = 10.0
LOOKUP_HOPS = 3
REORDERING_S = 2.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of one direction between two nodes. `delay_s`: one-way delay of a frame, drawn evenly from this range, so its width is the
    jitter. `loss`: of a frame, in [0, 1). `bytes_per_s`: of each stream, None: no limit."""

    delay_s: tuple[float, float]
    loss: float = 0.0
    bytes_per_s: float | None = None


class _Link(Link):
    """One direction of a stream between two nodes."""

    def __init__(self, network: SimulatedNetwork, source: str, target: str) -> None:
        self._network = network
        self._ends = (source, target)
        self._rng = network.rng_of("link", source, target, network.count(source, target))
        self._last_s = -math.inf
        self._free_s = -math.inf

    def arrival_s(self, size: int) -> float:
        network = self._network
        if not network.alive(*self._ends):
            return math.inf
        conditions = network.conditions(*self._ends)
        delay_s = self._rng.uniform(*conditions.delay_s)
        if conditions.bytes_per_s is not None:
            # Frames leave one after the other.
            self._free_s = max(self._free_s, trio.current_time()) + size / conditions.bytes_per_s
            delay_s += self._free_s - trio.current_time()
        for attempt in range(RETRANSMISSIONS_MAX + 1):
            if self._rng.random() >= conditions.loss:
                break
            delay_s += RETRANSMISSION_S * 2**attempt
        else:
            return math.inf
        self._last_s = max(self._last_s, network.due_s(delay_s))
        network.record("frame", *self._ends, size, self._last_s)
        return self._last_s

    async def passable(self) -> None:
        await self._network.wait_passable(*self._ends)


@dataclass(slots=True, eq=False)
class _Connection:
    """Between two live nodes; `source` dialled."""

    source: str
    target: str
    opened_s: float
    streams: dict[PipeStream, None] = field(default_factory=dict)

    def broken(self, reason: str) -> None:
        for stream in self.streams:
            stream.wreck(reason)
        self.streams.clear()

    def tidy(self) -> None:
        for stream in [stream for stream in self.streams if stream.finished]:
            del self.streams[stream]


class SimulatedNetwork:
    """The world that simulated nodes live in. One per trio run."""

    def __init__(
        self,
        seed: int | random.Random = 0,
        *,
        delay_s: tuple[float, float] = (0.001, 0.005),
        loss: float = 0.0,
        bytes_per_s: float | None = None,
        break_after_s: float = 30.0,
        provider_lifetime_s: float = 3600.0,
        tick_s: float = 0.0,
    ) -> None:
        """`seed`: a number, or a generator that one is drawn from. `delay_s`, `loss`, `bytes_per_s`: see `Conditions`, of every
        link that `set_link` gives no others. `break_after_s`: a cut path breaks its connections after so long.
        `provider_lifetime_s`: of a record on the DHT. `tick_s`: what arrives does so at a multiple of this, so that more happens at
        once and a run is faster; 0: whenever it does."""
        self._seed = seed.getrandbits(64) if isinstance(seed, random.Random) else seed
        self.delay_range_s = delay_s
        self.loss = loss
        self.bytes_per_s = bytes_per_s
        self.break_after_s = break_after_s
        self.provider_lifetime_s = provider_lifetime_s
        self.tick_s = tick_s
        # Shares of the gossip that arrive twice, and that arrive late, after what was sent later.
        self.duplication = 0.0
        self.reordering = 0.0
        self._nodes: dict[str, SimulatedTransport] = {}
        self._endpoints: dict[str, str] = {}
        self._connections: dict[tuple[str, str], _Connection] = {}
        self._connections_of: dict[str, dict[_Connection, None]] = {}
        self._conditions: dict[tuple[str, str], Conditions] = {}
        self._blocked: frozenset[tuple[str, str]] = frozenset()
        self._stopped: set[str] = set()
        self._groups: dict[str, int] = {}
        self._healed = trio.lowlevel.ParkingLot()
        self._epoch = 0
        self._providers: dict[bytes, dict[str, tuple[float, tuple[str, ...]]]] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._hosts = 0
        self._homes: dict[str, str] = {}  # a machine that comes back has the address that it had
        self._trace = hashlib.blake2b(digest_size=16)
        self.events = 0

    @property
    def trace(self) -> str:
        """A hash over all that happened so far, in order. The same seed and scheduling give the same trace."""
        return self._trace.hexdigest()

    def record(self, *event: object) -> None:
        self.events += 1
        self._trace.update(repr((round(trio.current_time(), 9), *event)).encode())

    def rng_of(self, *names: object) -> random.Random:
        return random.Random(repr((self._seed, *names)))  # noqa: S311 - a simulation wants a seeded generator

    def count(self, *names: str) -> int:
        self._counts[names] = self._counts.get(names, 0) + 1
        return self._counts[names]

    @asynccontextmanager
    async def open(self, identity: Identity) -> AsyncIterator[SimulatedTransport]:
        """A node on this network while the context is open. Leaving it in order says goodbye; `crash` does not."""
        peer_id = identity.peer_id
        if peer_id in self._nodes:
            raise UsageError(f"peer {peer_id} is on the network already")
        if peer_id not in self._homes:
            self._hosts += 1
            host = f"10.{self._hosts >> 16 & 255}.{self._hosts >> 8 & 255}.{self._hosts & 255}"
            self._homes[peer_id] = str(Endpoint("ip4", host, 4001))
        endpoint = self._homes[peer_id]
        async with background_nursery() as nursery:
            node = SimulatedTransport(self, peer_id, endpoint, nursery)
            self._nodes[peer_id] = node
            self._endpoints[endpoint] = peer_id
            self.record("open", peer_id)
            try:
                yield node
            finally:
                if self._nodes.get(peer_id) is node:
                    self._remove(node, "the peer left")

    def crash(self, peer_id: str) -> None:
        """Power off: every connection breaks, nothing is answered any more. The node's own calls raise UnreachableError."""
        self._remove(self._node(peer_id), "the peer crashed")
        self.record("crash", peer_id)

    def partition(self, groups: Iterable[Iterable[str]]) -> None:
        """Only peers of one group reach one another; peers in none form one more group."""
        self._groups = {peer_id: number for number, group in enumerate(groups, 1) for peer_id in group}
        self.record("partition", sorted(self._groups.items()))
        self._cut()

    def block(self, ways: Iterable[tuple[str, str]]) -> None:
        """From now on nothing gets from the first of these to the second; the other way is as it was. Replaces what was blocked."""
        self._blocked = frozenset(ways)
        self.record("block", sorted(self._blocked))
        self._cut()

    def heal(self) -> None:
        """Everyone reaches everyone."""
        self._blocked = frozenset()
        self.partition(())

    def set_link(self, source: str, target: str, conditions: Conditions | None) -> None:
        """Conditions of one direction, from the next frame on; None: those of the network."""
        if conditions is None:
            self._conditions.pop((source, target), None)
        else:
            self._conditions[source, target] = conditions

    def stop(self, peer_id: str) -> None:
        """A stopped process (SIGSTOP): its connections stay, and what is sent to it waits; nothing new is answered. Whoever calls
        this holds the node's own tasks, see `nexus.simulation.determinism`."""
        self._stopped.add(peer_id)
        self.record("stop", peer_id)

    def resume(self, peer_id: str) -> None:
        self._stopped.discard(peer_id)
        self.record("resume", peer_id)
        self._healed.unpark_all()

    def _cut(self) -> None:
        self._epoch += 1
        cut = [connection for key, connection in self._connections.items() if not self._joined(*key)]
        if cut:
            trio.lowlevel.spawn_system_task(self._break_later, cut, self._epoch)
        self._healed.unpark_all()

    async def _break_later(self, cut: Sequence[_Connection], epoch: int) -> None:
        await trio.sleep(self.break_after_s)
        for connection in cut:
            # A later change of the partition watches over what it cut itself.
            if epoch == self._epoch and not self._joined(connection.source, connection.target):
                self._disconnect(connection, "the path has been cut for too long")

    def endpoint_of(self, peer_id: str) -> str:
        return self._node(peer_id).endpoint

    def reaches(self, source: str, target: str) -> bool:
        return self._groups.get(source, 0) == self._groups.get(target, 0) and (source, target) not in self._blocked

    def _joined(self, one: str, other: str) -> bool:
        return self.reaches(one, other) and self.reaches(other, one)

    def alive(self, *peer_ids: str) -> bool:
        return all(peer_id in self._nodes for peer_id in peer_ids)

    async def wait_passable(self, source: str, target: str) -> None:
        """Until a frame gets through."""
        while not self.reaches(source, target) and self.alive(source, target):
            await self._healed.park()

    def answers(self, one: str, other: str) -> bool:
        """Whether a question gets an answer: both ways are open and the process asked runs."""
        return self._joined(one, other) and other not in self._stopped

    async def wait_answers(self, one: str, other: str) -> None:
        while not self.answers(one, other) and self.alive(one, other):
            await self._healed.park()

    # What the transports call.

    def conditions(self, source: str, target: str) -> Conditions:
        return self._conditions.get((source, target)) or Conditions(self.delay_range_s, self.loss, self.bytes_per_s)

    def delay_s(self, rng: random.Random, source: str, target: str) -> float:
        return rng.uniform(*self.conditions(source, target).delay_s)

    def due_s(self, delay_s: float) -> float:
        """When what takes `delay_s` from now on is there."""
        due_s = trio.current_time() + delay_s
        return math.ceil(due_s / self.tick_s) * self.tick_s if self.tick_s else due_s

    def round_trip_s(self, rng: random.Random, one: str, other: str) -> float:
        return self.delay_s(rng, one, other) + self.delay_s(rng, other, one)

    def connection(self, one: str, other: str) -> _Connection | None:
        return self._connections.get((one, other)) or self._connections.get((other, one))

    def connections_of(self, peer_id: str) -> list[_Connection]:
        return list(self._connections_of.get(peer_id, ()))

    async def dial(self, source: SimulatedTransport, endpoint: str, expected: str) -> _Connection:
        found = self.connection(source.peer_id, expected)
        if found is not None:
            return found
        target = self._endpoints.get(endpoint)
        if target is not None and not self.answers(source.peer_id, target):
            with trio.move_on_after(CONNECT_TIMEOUT_S):
                await self.wait_answers(source.peer_id, target)
            if not self.answers(source.peer_id, target):
                raise UnreachableError(f"cannot reach {endpoint}: no answer in {CONNECT_TIMEOUT_S:g} s", peer=expected)
        await trio.sleep_until(self.due_s(self.round_trip_s(source.rng, source.peer_id, expected)))
        target = self._endpoints.get(endpoint)
        if target is None:
            raise UnreachableError(f"cannot reach {endpoint}: connection refused", peer=expected)
        if target != expected:
            raise UnreachableError(f"cannot reach {expected} at {endpoint}: {target} answers there", peer=expected)
        if not self.alive(source.peer_id):
            raise UnreachableError("this node is not on the network")
        found = self.connection(source.peer_id, target)
        if found is None:
            found = self._connections[source.peer_id, target] = _Connection(source.peer_id, target, trio.current_time())
            for peer_id in (source.peer_id, target):
                self._connections_of.setdefault(peer_id, {})[found] = None
                self._nodes[peer_id].connected = None
            self.record("connect", source.peer_id, target)
        return found

    def stream(self, connection: _Connection, near: SimulatedTransport, protocol: ProtocolSpec) -> PipeStream:
        far = self._node(connection.target if near.peer_id == connection.source else connection.source)
        found = far.serving.find(protocol.id)
        if found is None:
            raise not_served(far.peer_id, protocol)
        served, handler = found
        here, there = pipe(
            (near.peer_id, protocol, near.serving.limits, _Link(self, near.peer_id, far.peer_id)),
            (far.peer_id, served, far.serving.limits, _Link(self, far.peer_id, near.peer_id)),
        )
        connection.tidy()
        connection.streams[here] = None
        connection.streams[there] = None
        self.record("stream", near.peer_id, far.peer_id, protocol.id)
        # As a task of the far node, not of whoever opened the stream.
        far.context.copy().run(far.serving.start, there, served, handler)
        return here

    def drop(self, one: str, other: str) -> None:
        connection = self.connection(one, other)
        if connection is not None:
            self._disconnect(connection, "the peer disconnected")

    def provide(self, peer: PeerAddress, key: bytes) -> None:
        expires_s = trio.current_time() + self.provider_lifetime_s
        self._providers.setdefault(key, {})[peer.peer_id] = (expires_s, peer.addresses)
        self.record("provide", peer.peer_id, key)

    def providers(self, asker: str, key: bytes) -> list[PeerAddress]:
        """Of a record's holders only those on the asker's side answer; we take its provider's side for theirs."""
        now_s = trio.current_time()
        records = self._providers.get(key, {})
        for peer_id in [peer_id for peer_id, (expires_s, _) in records.items() if expires_s <= now_s]:
            del records[peer_id]
        return [
            PeerAddress(peer_id, addresses)
            for peer_id, (_, addresses) in sorted(records.items())
            if peer_id != asker and self.reaches(asker, peer_id)
        ]

    def gossip(self, publisher: SimulatedTransport, topic: str, data: bytes) -> None:
        """Reach every node that a chain of live connections leads to, each after a delay and with a chance of its own."""
        hops = {publisher.peer_id: 0}
        frontier = [publisher.peer_id]
        while frontier:
            one = frontier.pop(0)
            for connection in self.connections_of(one):
                other = connection.target if one == connection.source else connection.source
                if other not in hops and self.reaches(one, other):
                    hops[other] = hops[one] + 1
                    frontier.append(other)
        due: list[tuple[float, str]] = []
        for peer_id in sorted(hops):
            if not hops[peer_id] or publisher.rng.random() < self.loss:
                continue
            for _ in range(1 + (publisher.rng.random() < self.duplication)):
                delay_s = sum(publisher.rng.uniform(*self.delay_range_s) for _ in range(hops[peer_id]))
                if publisher.rng.random() < self.reordering:
                    delay_s += publisher.rng.uniform(0, REORDERING_S)
                due.append((self.due_s(delay_s), peer_id))
        if due:
            trio.lowlevel.spawn_system_task(self._deliver, sorted(due), topic, Message(publisher.peer_id, data))

    async def _deliver(self, due: Sequence[tuple[float, str]], topic: str, message: Message) -> None:
        for due_s, peer_id in due:
            await trio.sleep_until(due_s)
            node = self._nodes.get(peer_id)
            if node is not None:
                self.record("gossip", message.peer_id, peer_id, topic, len(message.data))
                node.subscribers.deliver(topic, message)

    def _node(self, peer_id: str) -> SimulatedTransport:
        try:
            return self._nodes[peer_id]
        except KeyError:
            raise UnreachableError(f"peer {peer_id} is not on the network", peer=peer_id) from None

    def _remove(self, node: SimulatedTransport, reason: str) -> None:
        del self._nodes[node.peer_id]
        del self._endpoints[node.endpoint]
        for connection in self.connections_of(node.peer_id):
            self._disconnect(connection, reason)
        self._healed.unpark_all()

    def _disconnect(self, connection: _Connection, reason: str) -> None:
        if self._connections.pop((connection.source, connection.target), None) is not None:
            for peer_id in (connection.source, connection.target):
                self._connections_of[peer_id].pop(connection, None)
                if peer_id in self._nodes:
                    self._nodes[peer_id].connected = None
            connection.broken(reason)
            self.record("disconnect", connection.source, connection.target, reason)


class SimulatedTransport:
    """One node's view of a simulated network; a `nexus.network.transport.Transport`."""

    def __init__(self, network: SimulatedNetwork, peer_id: str, endpoint: str, nursery: trio.Nursery) -> None:
        self._network = network
        self._peer_id = peer_id
        self.endpoint = endpoint
        self.rng = network.rng_of("node", peer_id, network.count(peer_id))
        self.serving = Serving(peer_id, nursery, self._drop)
        self.subscribers = Subscribers()
        # What a task of this node knows of where it runs, for the tasks that its handlers run in.
        self.context = contextvars.copy_context()
        self.connected: list[Connection] | None = None
        self._book = AddressBook()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"{self.endpoint}/p2p/{self._peer_id}",)

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        self.serving.serve(protocol, handler)

    async def connect(self, address: str) -> str:
        peer_id, endpoint = parse_peer_address(address)
        if peer_id == self._peer_id:
            raise UsageError(f"{address} is this node itself")
        await self._dial(peer_id, str(endpoint))
        return peer_id

    def learn(self, peer: PeerAddress) -> None:
        if peer.peer_id != self._peer_id:
            self._book.learn(peer)

    async def open_stream(self, peer_id: str, protocol: ProtocolSpec) -> Stream:
        if peer_id == self._peer_id:
            await trio.lowlevel.checkpoint()
            return self.serving.open_to_self(protocol)
        connection = await self._connection(parse_peer_id(peer_id))
        await self._round_trip(peer_id)
        if self._network.connection(self._peer_id, peer_id) is not connection:
            raise UnreachableError(f"the connection to peer {peer_id} broke off", peer=peer_id)
        return self._network.stream(connection, self, protocol)

    def connections(self) -> list[Connection]:
        if self.connected is None:
            self.connected = self._connected()
        return list(self.connected)

    def _connected(self) -> list[Connection]:
        found = []
        for connection in self._network.connections_of(self._peer_id):
            outbound = connection.source == self._peer_id
            other = connection.target if outbound else connection.source
            address = self._network.endpoint_of(other)
            found.append(Connection(other, address, "out" if outbound else "in", connection.opened_s))
        return sorted(found, key=lambda entry: entry.peer_id)

    async def disconnect(self, peer_id: str) -> None:
        self._drop(peer_id)
        await trio.lowlevel.checkpoint()

    async def ping(self, peer_id: str) -> float:
        if peer_id == self._peer_id:
            await trio.lowlevel.checkpoint()
            return 0.0
        await self._connection(parse_peer_id(peer_id))
        begin_s = trio.current_time()
        await self._round_trip(peer_id)
        return trio.current_time() - begin_s

    async def netcheck(self) -> Netcheck:
        """There are no NATs here: whoever is on the same side of a partition reaches this node."""
        await self._lookup()
        peers = len(self.connections())
        verdict = LOCAL_ONLY if peers else UNKNOWN
        scope = PRIVATE if peers else ""
        own = AddressCheck(self.endpoint, "listen", PRIVATE, ())
        advice = advise(
            verdict, scope, MAPPING_NONE, peers=peers, listen=[parse_endpoint(self.endpoint)], relays=0, relay_candidates=0
        )
        return Netcheck(verdict, scope, "none", MAPPING_NONE, peers, peers, (own,), (), (), False, 0, advice)

    async def provide(self, key: bytes) -> None:
        check_key(key)
        await self._lookup()
        self._network.provide(PeerAddress(self._peer_id, (self.endpoint,)), key)

    def withdraw(self, key: bytes) -> None:
        """The record stays until the simulation ends: what others keep is not this node's to take back."""

    async def find_providers(self, key: bytes, limit: int = 20) -> list[PeerAddress]:
        check_key(key)
        await self._lookup()
        found = self._network.providers(self._peer_id, key)[:limit]
        for peer in found:
            self.learn(peer)
        return found

    async def publish(self, topic: str, data: bytes) -> None:
        check_message(data)
        await trio.lowlevel.checkpoint()
        self._check_alive()
        self._network.gossip(self, topic, data)

    def subscribe(self, topic: str) -> Subscription:
        return self.subscribers.subscribe(topic)

    async def _connection(self, peer_id: str) -> _Connection:
        found = self._network.connection(self._peer_id, peer_id)
        if found is not None:
            return found
        addresses = self._book.addresses(peer_id)
        if not addresses:
            raise no_address(peer_id)
        reasons = []
        for address in addresses:
            try:
                return await self._dial(peer_id, address)
            except UnreachableError as error:
                self._book.failed(peer_id, address)
                reasons.append(error.cause)
        raise UnreachableError("; ".join(reasons), peer=peer_id)

    async def _dial(self, peer_id: str, endpoint: str) -> _Connection:
        self._check_alive()
        connection = await self._network.dial(self, endpoint, peer_id)
        self._book.succeeded(peer_id, endpoint)
        return connection

    async def _round_trip(self, peer_id: str) -> None:
        await self._network.wait_answers(self._peer_id, peer_id)
        await trio.sleep_until(self._network.due_s(self._network.round_trip_s(self.rng, self._peer_id, peer_id)))
        if not self._network.alive(self._peer_id, peer_id):
            raise UnreachableError(f"peer {peer_id} is not on the network", peer=peer_id)

    async def _lookup(self) -> None:
        self._check_alive()
        await trio.sleep(sum(2 * self.rng.uniform(*self._network.delay_range_s) for _ in range(LOOKUP_HOPS)))

    def _check_alive(self) -> None:
        if not self._network.alive(self._peer_id):
            raise UnreachableError("this node is not on the network")

    def _drop(self, peer_id: str) -> None:
        self._network.drop(self._peer_id, peer_id)
