"""Who is in the swarm and what they offer, `/nexus/node/1` and the topic `nexus/nodes/1`. Both ends are here.

On contact each side sends its own signed record, the dialler first, and then up to INTRODUCTIONS_MAX addresses of nodes that it
knows. A record counts only from the node that it is about, so nobody can speak for another; an introduction is only a hint where
to dial. Gossip is signed by whoever publishes it: a node publishes its own record there if it is small, else only that it has a
new one. Those that hear of a node for the first time publish theirs soon, each at another moment: whoever joins, or comes back
after a partition, knows everybody within seconds, and nobody has to dial everybody.

Nodes that were lost are dialled again one by one, so that the parts of a swarm find each other when a partition ends.

What this node holds is announced on the DHT under one key per model, paced and renewed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    PeerError,
    TimedOutError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of, public_key_of
from nexus.core.record import MessageSet, Record, many, nested, raw, text, uint
from nexus.network.transport import GOSSIP_BYTES_MAX, Message, PeerAddress, ProtocolSpec, Stream, Transport
from nexus.swarm.membership import (
    PROVIDE_PACE_S,
    RECORD_BYTES_MAX,
    MemberTable,
    NodeRecord,
    SignedNodeRecord,
    clock_fix,
    fit_record,
    is_live,
    next_issue_ms,
    next_to_provide,
    provider_key,
    should_renew,
)

log = structlog.get_logger("nexus.membership")

NODE = ProtocolSpec("/nexus/node/1", frame_max=RECORD_BYTES_MAX, read_timeout_s=10.0, streams_per_peer_max=4)
TOPIC = "nexus/nodes/1"
INTRODUCTIONS_MAX = 16
# A node that knows this many others needs no more introductions; a larger swarm is found through its models on the DHT.
ACQUAINTANCES_WANTED = 128
STRANGERS_MAX = 256
STRANGER_FORGOTTEN_S = 300.0
STRANGER_AGAIN_S = 20.0
CONTACTS_AT_ONCE = 8
EXCHANGE_TIMEOUT_S = 15.0
PROVIDE_TIMEOUT_S = 30.0
PUBLISH_TIMEOUT_S = 10.0
POLL_S = 1.0
GOSSIP_EVERY_S = 120.0
GOSSIP_SOONEST_S = 1.0
# Whoever hears of a new node publishes its own record within so many seconds: later where there are more, so that not all speak at
# once.
INTRODUCED_S, INTRODUCED_NODES_PER_S, INTRODUCED_MAX_S = 2.0, 50, 20.0
# Of lost nodes one is dialled every so often, the one tried longest ago.
LOST_MAX = 256
LOST_EVERY_S = 5.0
LOST_FORGOTTEN_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Introduction(Record):
    """A node that the sender has a live record of, and where it says it can be dialled."""

    node: bytes = raw(32)
    addresses: tuple[str, ...] = many(text(256), 4)


@dataclass(frozen=True, slots=True)
class Introductions(Record):
    nodes: tuple[Introduction, ...] = many(nested(Introduction), INTRODUCTIONS_MAX)


@dataclass(frozen=True, slots=True)
class News(Record):
    """Gossip: the publisher has a record of that time."""

    issued_ms: int = uint(2**53)


@dataclass(frozen=True, slots=True)
class Told(Record):
    """Gossip: the publisher's record."""

    signed: SignedNodeRecord = nested(SignedNodeRecord)


GOSSIP = MessageSet(News, Told)


@dataclass(slots=True)
class _Stranger:
    """A node that we were told of. `tried_s`: None until it was dialled."""

    addresses: tuple[str, ...]
    tried_s: float | None = None


class _WrongClockError(VerificationError):
    """A record of a time that its own node's clock, or this one's, has wrong."""


class Membership:
    """This node's view of the swarm.

    `describe`: what this node says of itself now; node key and issue time are filled in here. `now_ms`: Unix time. `is_slashed`:
    whether the node with this key is convicted: it is neither listed nor introduced to others. `also_provided`: DHT keys that other
    services of this node want announced; they share one pace. `heard`: is told of every record that a node gave, `gone`: of nodes,
    by public key, that could not be asked, or left.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        describe: Callable[[], NodeRecord],
        now_ms: Callable[[], int],
        is_slashed: Callable[[bytes], bool] = lambda public_key: False,
        also_provided: Callable[[], Iterable[bytes]] = tuple,
        heard: Callable[[NodeRecord], None] = lambda record: None,
        gone: Callable[[bytes], None] = lambda public_key: None,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._describe = describe
        self._now_ms = now_ms
        self._is_slashed = is_slashed
        self._also_provided = also_provided
        self._heard = heard
        self._gone = gone
        self._table = MemberTable()
        self._own: SignedNodeRecord | None = None
        self._strangers: OrderedDict[str, _Stranger] = OrderedDict()
        self._in_contact: set[str] = set()
        self._changed = False
        self._wake = trio.Event()
        self._publish_again_s = math.inf
        self._urgent = False
        self._lost: OrderedDict[str, tuple[float, tuple[str, ...]]] = OrderedDict()  # since when, and where they were
        self._lost_tried_s = -math.inf
        self._provided_s: dict[bytes, float] = {}
        self._tried_s: dict[bytes, float] = {}

    def records(self) -> list[NodeRecord]:
        """What the other nodes say of themselves, live ones only, sorted by key. What convicted ones say does not count."""
        return [record for record in self._table.live(self._now_ms()) if not self._is_slashed(record.node)]

    def find(self, node: bytes) -> PeerAddress | None:
        """Where a node is, by its own word."""
        record = self.of(node)
        return None if record is None else PeerAddress(record.peer_id, record.addresses)

    def of(self, node: bytes) -> NodeRecord | None:
        """What a node says of itself, by public key; also of a convicted one."""
        return self._table.get(peer_id_of(node), self._now_ms())

    def connected(self) -> list[NodeRecord]:
        """Those that this node has a connection to."""
        now_ms = self._now_ms()
        peers = sorted({connection.peer_id for connection in self._transport.connections()})
        found = (self._table.get(peer_id, now_ms) for peer_id in peers)
        return [record for record in found if record is not None and not self._is_slashed(record.node)]

    def _is_connected(self, peer_id: str) -> bool:
        return any(connection.peer_id == peer_id for connection in self._transport.connections())

    def names(self) -> dict[str, str]:
        """What the other nodes call themselves, by peer id, convicted ones too."""
        return {record.peer_id: record.name for record in self._table.live(self._now_ms())}

    def own(self) -> SignedNodeRecord:
        """This node's record as it is sent now: described and signed anew after `announce_soon`, and when it is no longer fresh."""
        now_ms = self._now_ms()
        if self._own is None or self._changed or should_renew(self._own.record.issued_ms, now_ms):
            issued_ms = next_issue_ms(self._own.record.issued_ms if self._own is not None else 0, now_ms)
            record = fit_record(replace(self._described(), node=self._identity.public_key, issued_ms=issued_ms))
            self._own = SignedNodeRecord.sign(record, self._identity)
            self._changed = False
        return self._own

    def _described(self) -> NodeRecord:
        """What this node says now, or said last if it cannot look: a disk that fails is no reason to leave the swarm."""
        try:
            return self._describe()
        except LocalError as error:
            if self._own is None:
                raise
            log.error("describe_failed", reason=error.cause, fix=error.fix)
            return self._own.record

    def announce_soon(self) -> None:
        """What this node offers has changed: tell the others."""
        self._changed = self._urgent = True
        self._wake.set()

    async def refresh(self, peer_id: str) -> NodeRecord:
        """Exchange records with a peer now. Raises PeerError, also if the record does not hold, TimedOutError, CapacityError."""
        if peer_id == self._transport.peer_id:
            return self.own().record
        now_s = trio.current_time()
        self._table.asked(peer_id, now_s)
        try:
            with _deadline(peer_id):
                record = await self._exchange(peer_id)
        except NexusError as error:
            known = self._table.get(peer_id, self._now_ms())
            lost = isinstance(error, UnreachableError) and not self._is_connected(peer_id)
            dropped = self._table.failed(peer_id)
            if dropped and known is not None:
                self._note_lost(peer_id, known.addresses)
            if dropped or lost:
                self._gone(public_key_of(peer_id))
            raise
        self._strangers.pop(peer_id, None)
        return record

    async def discover(self, model_root: bytes) -> None:
        """Find nodes that announce a model on the DHT and get their records; those that do not answer are left out."""
        with trio.move_on_after(PROVIDE_TIMEOUT_S):
            for peer in await self._transport.find_providers(provider_key(model_root)):
                self._transport.learn(peer)
                if self._table.get(peer.peer_id, self._now_ms()) is None:
                    await self._contact(peer.peer_id)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, keep records fresh and announce, until cancelled."""
        self._transport.serve(NODE, self._handle)
        async with self._transport.subscribe(TOPIC) as messages, trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_fresh)
            nursery.start_soon(self._publish)
            nursery.start_soon(self._provide)
            nursery.start_soon(self._listen, messages)
            task_status.started()

    # --- the exchange -------------------------------------------------------------------------------------------------------

    async def _exchange(self, peer_id: str) -> NodeRecord:
        stream = await self._transport.open_stream(peer_id, NODE)
        try:
            await stream.send(self.own().to_bytes())
            await stream.send(self._introductions(peer_id).to_bytes())
            record = await self._receive(stream)
            await stream.close()
        except trio.EndOfChannel:
            await stream.reset()
            raise UnreachableError(f"peer {peer_id} closed the stream before it had said who it is", peer=peer_id) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise
        return record

    async def _handle(self, stream: Stream) -> None:
        with _deadline(stream.peer_id):
            try:
                await self._receive(stream)
            except _WrongClockError as error:
                # By its clock this record is as wrong as its own is by ours: so it learns why it is alone.
                log.warning("clocks_differ", peer_id=stream.peer_id, reason=error.cause, fix=error.fix)
                await stream.send(self.own().to_bytes())
                return
            await stream.send(self.own().to_bytes())
            await stream.send(self._introductions(stream.peer_id).to_bytes())

    async def _receive(self, stream: Stream) -> NodeRecord:
        try:
            signed = SignedNodeRecord.from_bytes(await stream.receive())
            is_new = self._table.get(stream.peer_id, self._now_ms()) is None
            record = self._accept(signed, stream.peer_id)
            introductions = Introductions.from_bytes(await stream.receive())
        except PeerError as error:
            error.peer = error.peer or stream.peer_id
            raise
        self._note_member(record, is_new)
        for introduction in introductions.nodes:
            self._meet(introduction)
        return record

    def _introductions(self, to: str) -> Introductions:
        """Those that the peer most likely lacks: the newest records first."""
        newest = sorted(self.records(), key=lambda record: (-record.issued_ms, record.node))
        known = [record for record in newest if record.peer_id != to and record.addresses]
        return Introductions(tuple(Introduction(one.node, one.addresses[:4]) for one in known[:INTRODUCTIONS_MAX]))

    def _meet(self, introduction: Introduction) -> None:
        """Remember to dial a node that a peer told us of, unless we know it or enough others. Costs one dial each, and more
        only where its addresses are new, now and then."""
        peer_id = peer_id_of(introduction.node)
        if peer_id == self._transport.peer_id or not introduction.addresses:
            return
        if self._is_slashed(introduction.node):
            return
        known = self._strangers.get(peer_id)
        if known is not None:
            # One that took a relay after it could not be reached is tried again, though not as often as somebody says so.
            waited_s = trio.current_time() - known.tried_s if known.tried_s is not None else 0.0
            if known.addresses == introduction.addresses or waited_s < STRANGER_AGAIN_S:
                return
        records = self.records()
        if len(records) >= ACQUAINTANCES_WANTED or any(record.node == introduction.node for record in records):
            return
        self._transport.learn(PeerAddress(peer_id, introduction.addresses))
        self._strangers[peer_id] = _Stranger(introduction.addresses)
        while len(self._strangers) > STRANGERS_MAX:
            self._strangers.popitem(last=False)

    def _accept(self, signed: SignedNodeRecord, peer_id: str) -> NodeRecord:
        """Raises VerificationError; where clocks are the reason, it says whose it seems to be."""
        now_ms = self._now_ms()
        try:
            return self._table.accept(signed, peer_id, now_ms)
        except VerificationError as error:
            if not is_live(signed.record.issued_ms, now_ms):
                fix = clock_fix(len(self._table.live(now_ms)))
                raise _WrongClockError(error.cause, fix, peer=peer_id) from error
            raise

    def _note_member(self, record: NodeRecord, is_new: bool) -> None:
        """A node gave its record."""
        self._lost.pop(record.peer_id, None)
        self._transport.learn(PeerAddress(record.peer_id, record.addresses))
        self._heard(record)
        if is_new and self._publish_again_s == math.inf:
            # It may know as little of this node. Not all that hear of it speak at the same moment.
            spread_s = min(INTRODUCED_S + len(self._table) / INTRODUCED_NODES_PER_S, INTRODUCED_MAX_S)
            drawn = tagged_hash("introduce", self._identity.public_key, record.node)
            self._publish_again_s = trio.current_time() + spread_s * int.from_bytes(drawn[:4], "little") / 2**32
            self._wake.set()

    def _note_lost(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        self._lost[peer_id] = (trio.current_time(), addresses)
        while len(self._lost) > LOST_MAX:
            self._lost.popitem(last=False)

    # --- what goes on in the background ---------------------------------------------------------------------------------------

    async def _contact(self, peer_id: str) -> None:
        """Exchange records; a failure is noted in the table and is nobody's error."""
        if peer_id in self._in_contact:
            return
        self._in_contact.add(peer_id)
        try:
            await self.refresh(peer_id)
        except (PeerError, TimedOutError, CapacityError, UsageError) as error:
            log.info("no_record", peer_id=peer_id, reason=error.cause)
        finally:
            self._in_contact.discard(peer_id)

    async def _keep_fresh(self) -> None:
        connected: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                now_s, now_ms = trio.current_time(), self._now_ms()
                before, connected = connected, {connection.peer_id for connection in self._transport.connections()}
                for peer_id in sorted(before - connected):
                    if self._table.disconnected(peer_id):
                        self._gone(public_key_of(peer_id))
                for peer_id in [*self._table.due(connected, now_s, now_ms), *self._new_strangers(now_s), *self._next_lost(now_s)]:
                    if len(self._in_contact) >= CONTACTS_AT_ONCE:
                        break
                    nursery.start_soon(self._contact, peer_id)
                    # `asked` here and not only in the task, so that the next round does not start it again.
                    self._table.asked(peer_id, now_s)
                    if peer_id in self._strangers:
                        self._strangers[peer_id].tried_s = now_s
                    await trio.lowlevel.checkpoint()
                self._table.forget_gone(connected, now_s, now_ms)
                await trio.sleep(POLL_S)

    def _next_lost(self, now_s: float) -> list[str]:
        """The lost node to dial now, if it is time for one."""
        if not self._lost or now_s - self._lost_tried_s < LOST_EVERY_S:
            return []
        self._lost_tried_s = now_s
        peer_id, (since_s, addresses) = self._lost.popitem(last=False)
        if now_s - since_s > LOST_FORGOTTEN_S:
            return []
        self._lost[peer_id] = (since_s, addresses)
        # Again each time: the transport forgets addresses that fail.
        self._transport.learn(PeerAddress(peer_id, addresses))
        return [peer_id]

    def _new_strangers(self, now_s: float) -> list[str]:
        """Nodes that we were told of and never tried; those tried long ago are forgotten, and may be told of again."""
        for peer_id in [
            one
            for one, known in self._strangers.items()
            if known.tried_s is not None and now_s - known.tried_s >= STRANGER_FORGOTTEN_S
        ]:
            del self._strangers[peer_id]
        return [peer_id for peer_id, known in self._strangers.items() if known.tried_s is None]

    async def _publish(self) -> None:
        """Tell the swarm when this node has something new to say, or somebody new to say it to, and now and then all the same:
        gossip may be lost."""
        while True:
            self._urgent, self._publish_again_s = False, math.inf
            if self._transport.connections():
                await self._publish_own()
            latest_s = trio.current_time() + GOSSIP_EVERY_S
            await trio.sleep(GOSSIP_SOONEST_S)
            while not self._urgent and trio.current_time() < min(latest_s, self._publish_again_s):
                self._wake = trio.Event()
                with trio.move_on_at(min(latest_s, self._publish_again_s)):
                    await self._wake.wait()

    async def _publish_own(self) -> None:
        own = self.own()
        data = GOSSIP.pack(Told(own))
        if len(data) > GOSSIP_BYTES_MAX:
            data = GOSSIP.pack(News(own.record.issued_ms))
        try:
            with trio.move_on_after(PUBLISH_TIMEOUT_S):
                await self._transport.publish(TOPIC, data)
        except (PeerError, TimedOutError, CapacityError) as error:
            log.info("gossip_failed", reason=error.cause)

    async def _listen(self, messages: trio.MemoryReceiveChannel[Message]) -> None:
        async with trio.open_nursery() as nursery:
            async for message in messages:
                if self._is_news(message) and len(self._in_contact) < CONTACTS_AT_ONCE:
                    nursery.start_soon(self._contact, message.peer_id)
                    await trio.lowlevel.checkpoint()

    def _is_news(self, message: Message) -> bool:
        """Take in what a message says; whether it is a reason to ask its publisher for its record."""
        if message.peer_id == self._transport.peer_id:
            return False
        try:
            public_key_of(message.peer_id)
            said = GOSSIP.unpack(message.data)
        except MalformedError:
            return False
        known = self._table.get(message.peer_id, self._now_ms())
        issued_ms = said.signed.record.issued_ms if isinstance(said, Told) else said.issued_ms if isinstance(said, News) else 0
        if known is not None and known.issued_ms >= issued_ms:
            return False
        if isinstance(said, Told):
            self._take_told(said.signed, message.peer_id, known is None)
            return False
        # What comes too soon after the last time, or while others are asked, is not forgotten.
        self._table.told(message.peer_id)
        return self._table.may_ask(message.peer_id, trio.current_time())

    def _take_told(self, signed: SignedNodeRecord, peer_id: str, is_new: bool) -> None:
        if self._is_slashed(signed.record.node):
            return
        try:
            record = self._accept(signed, peer_id)
        except PeerError as error:
            log.info("gossip_refused", peer_id=peer_id, reason=error.cause, fix=error.fix)
            return
        self._table.asked(peer_id, trio.current_time())
        self._strangers.pop(peer_id, None)
        self._note_member(record, is_new)

    async def _provide(self) -> None:
        """Announce on the DHT every model that this node holds some of, and what else is wanted, one key at a time, as soon as
        there is anyone to tell."""
        while True:
            wanted = {provider_key(holding.model_root) for holding in self.own().record.models if holding.held}
            wanted.update(self._also_provided())
            for gone in self._provided_s.keys() - wanted:
                del self._provided_s[gone]
                self._transport.withdraw(gone)
            self._tried_s = {key: at_s for key, at_s in self._tried_s.items() if key in wanted}
            key = next_to_provide(wanted, self._tried_s, self._provided_s, trio.current_time())
            if key is not None and self._transport.connections():
                await self._provide_one(key)
            await trio.sleep(PROVIDE_PACE_S)

    async def _provide_one(self, key: bytes) -> None:
        self._tried_s[key] = trio.current_time()
        try:
            with trio.move_on_after(PROVIDE_TIMEOUT_S) as scope:
                await self._transport.provide(key)
        except (PeerError, TimedOutError, CapacityError) as error:
            log.info("provide_failed", key=key.hex()[:12], reason=error.cause)
            return
        if not scope.cancelled_caught:
            self._provided_s[key] = trio.current_time()


@contextmanager
def _deadline(peer_id: str) -> Iterator[None]:
    with trio.move_on_after(EXCHANGE_TIMEOUT_S) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOutError(f"peer {peer_id} did not exchange records within {EXCHANGE_TIMEOUT_S:g} s")
