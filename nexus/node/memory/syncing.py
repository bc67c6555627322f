"""Collections are kept the same on all who follow them: `/nexus/memory-sync/1`.

What to ask whom, and when, is decided in `nexus.memory.sync` and `nexus.memory.sync_schedule`; here are the streams and the clock.
News goes by `nexus.node.memory.gossip`. Peers that follow the same collections are found by asking those who are connected, again
when one of the two changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import public_key_of
from nexus.core.record import Record
from nexus.memory import collection as rules
from nexus.memory.block import block_id
from nexus.memory.item_set import SALT_BYTES, Item, ItemSet, View
from nexus.memory.sealing import SignedKeyGrant
from nexus.memory.sync import Check, Checked, Heard, Load, Loaded, Outcome, SyncResponder, SyncSession
from nexus.memory.sync_conduct import Standing
from nexus.memory.sync_messages import BATCHES_BYTES_MAX, FRAME_MAX, MESSAGES, PROTOCOL_ID, Open, Told
from nexus.memory.sync_schedule import PAIRS_MAX, Start, SyncSchedule, SyncStatus
from nexus.network.transport import ProtocolSpec, Stream, Transport
from nexus.node.memory.asking import Asking, ask_all
from nexus.node.memory.budgets import Budget
from nexus.node.memory.charters import Charters, read_charters
from nexus.node.memory.gossip import Gossip
from nexus.storage.memory.records import State
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.sync")

SYNC = ProtocolSpec(
    PROTOCOL_ID, frame_max=FRAME_MAX, read_timeout_s=60.0, streams_per_peer_max=4, bytes_per_peer_s=16 * 1024 * 1024
)
_GONE = (State.REMOVED, State.EXPIRED)
# The hashes of a proof come on top of what the store counts: of so many blocks of the largest batch some 1,100.
_LOADED_BYTES_MAX = BATCHES_BYTES_MAX - 40 * 1024
POLL_S = 1.0
# What failed for this node's own reasons is tried again after so long.
AGAIN_S = 15.0
MEET_EVERY_S = 120.0
MEET_AT_ONCE = 4
TOLD_GRANTS_MAX = 16
RATE_BURST_S = 60
# Of one peer: items of sets that are gone through for its comparisons, some 0.2 us each, and bytes that it is sent.
COMPARED_PER_S, COMPARED_BURST = 200_000, 10_000_000
OPEN_COST = 10_000
SENT_BYTES_PER_S, SENT_BYTES_BURST = 8 * 1024 * 1024, 64 * 1024 * 1024


class Accept(Protocol):
    """Verify batches of a peer and keep what holds of them."""

    def __call__(
        self, batches: Sequence[bytes], peer_id: str, collection: bytes, wanted: frozenset[bytes], /
    ) -> Awaitable[Checked]: ...


@dataclass(slots=True)
class _Count:
    """What came of a pair since this process started."""

    received: int = 0
    refused: int = 0


class Syncing:
    """`accept`: see `Accept`. `charters_changed`: told of collections whose rules or keys are new. `blocks_per_peer_s`: a peer that
    sends more is read more slowly."""

    def __init__(
        self,
        transport: Transport,
        store: MemoryStore,
        charters: Charters,
        asking: Asking,
        accept: Accept,
        charters_changed: Callable[[Sequence[bytes]], Awaitable[None]],
        blocks_per_peer_s: int,
        rng: Random,
    ) -> None:
        self._transport = transport
        self._store = store
        self._charters = charters
        self._asking = asking
        self._accept = accept
        self._charters_changed = charters_changed
        self._received = Budget(blocks_per_peer_s, blocks_per_peer_s * RATE_BURST_S)
        self._comparisons = Budget(COMPARED_PER_S, COMPARED_BURST)
        self._sent = Budget(SENT_BYTES_PER_S, SENT_BYTES_BURST)
        self._rng = rng
        self._schedule = SyncSchedule(rng.randbytes(16))
        self._sets: dict[bytes, ItemSet] = {}
        # Of each set, the ids of blocks that were taken away or have expired: not in it, and not wanted again.
        self._gone: dict[bytes, frozenset[bytes]] = {}
        self._stale: set[bytes] = set()
        # Of sets that are being read, what was stored since that began.
        self._arrived: dict[bytes, list[Item]] = {}
        self._set_lock = trio.Lock()
        # Collections whose rules or keys are new, and where that has not been put into effect.
        self._unapplied: set[bytes] = set()
        self._counts: OrderedDict[tuple[str, bytes], _Count] = OrderedDict()
        self._connected: set[str] = set()
        self._gossip = Gossip(transport, charters, self._loaded_set, self._hear)
        self._wake = trio.Event()
        self._met_s: dict[str, float] = {}
        self._meeting: set[str] = set()

    # --- what others tell this service -------------------------------------------------------------------------------------------

    def added(self, collection: bytes, items: Sequence[Item]) -> None:
        """Blocks were stored, from here or from a peer: they are in the set, and worth telling."""
        known = self._sets.get(collection)
        if known is not None:
            known.add(items)
        if collection in self._arrived:
            self._arrived[collection].extend(items)
        if self._charters.follows(collection):
            self._gossip.tell(collection, items)
            self._schedule.changed(collection, trio.current_time())
            self._wake_up()

    def changed(self, collection: bytes) -> None:
        """Blocks were taken away or have expired: they leave the set, soon."""
        if collection in self._sets:
            self._stale.add(collection)

    def followed(self, collection: bytes) -> None:
        """A collection is followed from now on, or its charter changed: who else has it?"""
        self._met_s.clear()
        self._wake_up()
        self._gossip.wake_up()

    def unfollowed(self, collection: bytes) -> None:
        self._schedule.remove(collection)
        self._sets.pop(collection, None)
        self._gone.pop(collection, None)
        self._stale.discard(collection)
        self._gossip.forget(collection)

    def status(self) -> list[tuple[SyncStatus, int, int]]:
        """Of every pair, with how many blocks came from it and how many batches were refused."""
        counted = []
        for status in self._schedule.status(trio.current_time()):
            count = self._counts.get((status.peer, status.collection), _Count())
            counted.append((status, count.received, count.refused))
        return counted

    def standing(self, peer_id: str) -> Standing:
        return self._schedule.standing(peer_id, trio.current_time())

    def offend(self, peer_id: str) -> None:
        """A peer broke the rules elsewhere in the memory."""
        self._schedule.offend(peer_id, trio.current_time())

    def peers_of(self, collection: bytes) -> list[str]:
        """Peers in reach that have the collection and are in good standing."""
        return [
            status.peer
            for status in self._schedule.status(trio.current_time())
            if status.collection == collection and status.state not in ("offline", "dropped", "demoted")
        ]

    async def sync_now(self, collection: bytes | None) -> None:
        """Meet everybody and exchange with them, once. Returns when each was tried."""
        connected = sorted({connection.peer_id for connection in self._transport.connections()})
        async with trio.open_nursery() as nursery:
            for peer_id in connected:
                nursery.start_soon(self._meet, peer_id)
        wanted = [
            (status.peer, status.collection)
            for status in self._schedule.status(trio.current_time())
            if collection in (None, status.collection) and status.state not in ("offline", "dropped")
        ]
        limiter = trio.CapacityLimiter(MEET_AT_ONCE)

        async def one(peer_id: str, each: bytes) -> None:
            async with limiter:
                start = self._schedule.begin(peer_id, each, trio.current_time())
                if start is not None:
                    await self._run_session(start)

        async with trio.open_nursery() as nursery:
            for peer_id, each in wanted:
                nursery.start_soon(one, peer_id, each)

    # --- running -----------------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and exchange until cancelled."""
        self._transport.serve(SYNC, self._handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_meeting)
            nursery.start_soon(self._keep_syncing)
            nursery.start_soon(self._gossip.run)
            nursery.start_soon(self._keep_sets)
            task_status.started()

    def _wake_up(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    async def _keep_meeting(self) -> None:
        """Ask every connected peer which of this node's collections it has too: at contact, and again now and then."""
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                connected = {connection.peer_id for connection in self._transport.connections()}
                before, self._connected = self._connected, set(connected)
                for peer_id in before - connected:
                    self._schedule.lost(peer_id)
                    self._met_s.pop(peer_id, None)
                for peer_id in sorted(connected, key=lambda one: (self._met_s.get(one, 0.0), one)):
                    due = peer_id not in self._met_s or now_s - self._met_s[peer_id] >= MEET_EVERY_S
                    if due and peer_id not in self._meeting and len(self._meeting) < MEET_AT_ONCE:
                        self._met_s[peer_id] = now_s
                        nursery.start_soon(self._meet, peer_id)
                        await trio.lowlevel.checkpoint()
                wake = self._wake
                with trio.move_on_after(POLL_S):
                    await wake.wait()

    async def _meet(self, peer_id: str) -> None:
        """Take the newer charters and keys that a peer has, and note what it can be asked for."""
        followed = self._charters.followed()
        if peer_id in self._meeting or not followed:
            return
        self._meeting.add(peer_id)
        try:
            answer = await self._asking.collections(peer_id, ids=followed)
            common = await self.take_charters(answer.charters, answer.grants, "", followed)
        except (PeerError, TimedOutError, CapacityError, LocalError) as error:
            log.info("not_met", peer_id=peer_id, reason=error.cause)
            if isinstance(error, MalformedError | VerificationError):
                self.offend(peer_id)
            return
        finally:
            self._meeting.discard(peer_id)
        now_s = trio.current_time()
        for collection in followed:
            if collection in common:
                self._schedule.add(peer_id, collection, now_s)
            else:
                self._schedule.remove(collection, peer_id)
        self._wake_up()

    async def tell_charter(self, collection: bytes) -> None:
        """A charter was changed here: hand it, and the keys that go with it, to those in reach who follow it or are named in it."""
        signed = self._charters.signed(collection)
        if signed is None:
            return

        async def tell(peer_id: str) -> None:
            peer = public_key_of(peer_id)
            # Whoever was in it before is told as well that it is not any more; keys are sealed to whom they are for.
            await self._asking.tell(peer_id, [signed.to_bytes()], self._charters.grants_for(collection, peer)[-TOLD_GRANTS_MAX:])

        # A member that began to follow it only now was not met over it yet, and could not read what is sealed with a new key.
        named = set(signed.charter.readers())
        connected = sorted({connection.peer_id for connection in self._transport.connections()})
        in_it = [peer_id for peer_id in connected if public_key_of(peer_id) in named]
        await ask_all(list(dict.fromkeys([*self.peers_of(collection), *in_it])), tell, MEET_AT_ONCE)

    async def told(self, charters: Sequence[bytes], grants: Sequence[bytes], /) -> None:
        """A peer tells of charters that were changed. Raises MalformedError, LocalError. What is wrong with them is not said, or it
        would tell strangers what is known here."""
        try:
            await self.take_charters(charters, grants, "", [charter.id for charter in self._charters.all()])
        except VerificationError as error:
            log.info("told_in_vain", reason=error.cause)

    async def take_charters(
        self, charters: Sequence[bytes], grants: Sequence[bytes], name: str, ids: Iterable[bytes]
    ) -> list[bytes]:
        """Keep what is newer in a peer's answer about collections that are known here; the ids of all that are in it. Raises
        MalformedError, VerificationError, LocalError."""
        asked = set(ids)
        changed: dict[bytes, None] = {}

        def take() -> list[bytes]:
            found = read_charters(charters, name, asked)
            for signed in found:
                collection = signed.charter.id
                known = self._charters.find(collection) is not None or self._charters.follows(collection)
                if known and self._charters.take(signed):
                    changed[collection] = None
            for data in grants:
                if self._charters.take_grant(data):
                    changed[SignedKeyGrant.from_bytes(data).grant.collection] = None
            return [signed.charter.id for signed in found]

        try:
            return await trio.to_thread.run_sync(take)
        finally:
            # What was good before the rest was not has been taken, and has its effect.
            self._unapplied.update(changed)
            await self._apply_changes()

    async def _apply_changes(self) -> None:
        for collection in sorted(self._unapplied):
            try:
                await self._charters_changed([collection])
            except NexusError as error:
                log.error("charter_not_applied", collection=collection.hex()[:16], reason=error.cause, fix=error.fix)
            else:
                self._unapplied.discard(collection)

    async def _keep_syncing(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                for start in self._schedule.next(now_s):
                    nursery.start_soon(self._run_session, start)
                    await trio.lowlevel.checkpoint()
                due_s = self._schedule.next_due_s(trio.current_time())
                wake = self._wake
                with trio.move_on_at(due_s if due_s is not None else trio.current_time() + MEET_EVERY_S):
                    await wake.wait()

    async def _run_session(self, start: Start) -> None:
        session, outcome, declined = None, Outcome.not_begun("the set could not be read"), False
        try:
            view = None if start.items else await self._view(start.collection, self._rng.randbytes(SALT_BYTES))
            session = SyncSession(
                start.collection,
                partial(self._wanted, start.peer, start.collection),
                trio.current_time(),
                view,
                start.items,
                start.want_max,
            )
            await self._exchange(session, start)
        except NexusError as error:
            log.info("sync_failed", peer_id=start.peer, collection=start.collection.hex()[:16], reason=error.cause)
            declined = isinstance(error, RefusedError)
            if session is not None:
                session.fail(error)
        finally:
            # A session that is cancelled was not begun either, for all that the schedule knows.
            outcome = session.outcome() if session is not None and session.ended else outcome
            self._schedule.finished(start.peer, start.collection, outcome, trio.current_time())
            if declined:  # it follows the collection no longer, or this node may not read it any more: until it is met again
                self._schedule.remove(start.collection, start.peer)
            if outcome.accepted:
                log.info("synced", peer_id=start.peer, collection=start.collection.hex()[:16], blocks=outcome.accepted)
            self._wake_up()

    def _wanted(self, peer_id: str, collection: bytes, items: Sequence[Item]) -> Sequence[Item]:
        lacking = self._lacking(collection, items)
        return self._schedule.claim(peer_id, collection, lacking, trio.current_time())

    async def _exchange(self, session: SyncSession, start: Start) -> None:
        stream = await self._transport.open_stream(start.peer, SYNC)
        try:
            while (request := session.generate(trio.current_time())) is not None:
                await stream.send(MESSAGES.pack(request))
                with trio.move_on_at(session.deadline_s) as waiting:
                    answer = MESSAGES.unpack(await stream.receive())
                if waiting.cancelled_caught:
                    raise TimedOutError(f"peer {start.peer} takes too long to synchronise")
                check = await trio.to_thread.run_sync(session.receive, answer, trio.current_time())
                if check is not None:
                    await self._check(session, start, check)
            await stream.close()
        except trio.EndOfChannel:
            await stream.reset()
            raise UnreachableError(f"peer {start.peer} closed the stream in the middle", peer=start.peer) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise

    async def _check(self, session: SyncSession, start: Start, check: Check) -> None:
        count = self._counts.setdefault((start.peer, start.collection), _Count())
        if len(self._counts) > PAIRS_MAX:
            self._counts.popitem(last=False)
        try:
            checked = await self._accept(check.batches, start.peer, start.collection, check.wanted)
        except NexusError:
            # Some of it may have been stored: the set is read again.
            self.changed(start.collection)
            raise
        count.received += len(checked.accepted)
        count.refused += checked.refused
        session.checked(checked)
        # Blocks cost their receiver time whoever made them: who brings very many is read at its pace.
        await self._received.spend(start.peer, len(check.wanted))

    # --- answering ---------------------------------------------------------------------------------------------------------------

    async def _handle(self, stream: Stream) -> None:
        if self._schedule.standing(stream.peer_id, trio.current_time()) is Standing.DROPPED:
            raise PeerError(f"peer {stream.peer_id} sent bad blocks lately and is not served", peer="")
        peer = public_key_of(stream.peer_id)
        responder = SyncResponder(_Served(self, peer))
        try:
            while True:
                message = MESSAGES.unpack(await stream.receive())
                collection = getattr(message, "collection", None)
                # For others it takes as long whether it is here or not.
                if collection is not None and self.serves(collection, peer):
                    known = await self._loaded_set(collection)
                    if isinstance(message, Open):
                        await self._comparisons.spend(stream.peer_id, OPEN_COST + len(known))
                done = await trio.to_thread.run_sync(responder.receive, message)
                frame = MESSAGES.pack(await self._do(done, responder, stream.peer_id))
                await self._sent.spend(stream.peer_id, len(frame))
                await stream.send(frame)
        except PeerError as error:
            error.peer = error.peer or stream.peer_id
            if isinstance(error, MalformedError):
                self._schedule.offend(stream.peer_id, trio.current_time())
            raise

    async def _do(self, done: Record | Load | Heard, responder: SyncResponder, peer_id: str) -> Record:
        if isinstance(done, Load):
            return responder.loaded(await trio.to_thread.run_sync(self._load, done))
        if isinstance(done, Heard):
            self._hear(peer_id, done.collection, done.items, max(0, done.total - len(done.items)))
            return Told()
        return done

    def _load(self, load: Load) -> list[Loaded]:
        """Blocks of another collection that are asked for under this one's name are not there."""
        try:
            rows = self._store.get_many(load.ids)
        except LocalError:
            # What is damaged was forgotten: it is wanted again.
            self.changed(load.collection)
            raise
        wanted = [each for each in load.ids if each in rows and rows[each].collection == load.collection]
        return [
            Loaded(batch.to_bytes(), tuple(map(block_id, batch.blocks))) for batch in self._store.batches(wanted, _LOADED_BYTES_MAX)
        ]

    def _hear(self, peer_id: str, collection: bytes, items: Sequence[Item], more: int) -> None:
        if collection not in self._sets:
            return
        now_s = trio.current_time()
        # Anybody may publish: only who is connected becomes a peer to exchange with.
        if any(connection.peer_id == peer_id for connection in self._transport.connections()):
            self._connected.add(peer_id)
            self._schedule.add(peer_id, collection, now_s)
        if self._schedule.heard(peer_id, collection, self._lacking(collection, items), more, now_s):
            self._wake_up()

    def _lacking(self, collection: bytes, items: Sequence[Item]) -> list[Item]:
        """Those of some items that this node never had."""
        known, gone = self._sets.get(collection), self._gone.get(collection, frozenset())
        return [item for item in known.missing(items) if item.id not in gone] if known is not None else []

    # --- sets --------------------------------------------------------------------------------------------------------------------

    async def _loaded_set(self, collection: bytes) -> ItemSet:
        """The set of a followed collection, read from the store when it is first needed."""
        async with self._set_lock:
            known = self._sets.get(collection)
            return known if known is not None else await self._load_set(collection)

    async def _load_set(self, collection: bytes) -> ItemSet:
        """Read it from the store. An earlier one stands until this is done. Raises LocalError."""

        def read() -> tuple[ItemSet, frozenset[bytes]]:
            here, gone = ItemSet(), set()
            for each in self._store.items(collection):
                if each.state in _GONE:
                    gone.add(each.id)
                else:
                    here.add([Item(each.created_ms, each.id)])
            return here, frozenset(gone)

        # What is stored meanwhile may have been read or not; whatever comes twice counts once.
        arrived = self._arrived[collection] = []
        try:
            loaded, gone = await trio.to_thread.run_sync(read)
        finally:
            del self._arrived[collection]
        loaded.add(item for item in arrived if item.id not in gone)
        if self._charters.follows(collection):
            self._sets[collection], self._gone[collection] = loaded, gone
        return loaded

    async def _keep_sets(self) -> None:
        """Read again the sets that blocks have left, and put into effect what failed before."""
        again_s = 0.0
        while True:
            await trio.sleep(POLL_S)
            if trio.current_time() < again_s:
                continue
            failed = False
            for collection in sorted(self._stale & self._sets.keys()):
                self._stale.discard(collection)
                try:
                    async with self._set_lock:
                        await self._load_set(collection)
                except NexusError as error:
                    log.error("set_not_read", collection=collection.hex()[:16], reason=error.cause, fix=error.fix)
                    self._stale.add(collection)
                    failed = True
            if self._unapplied:
                await self._apply_changes()
            if failed or self._unapplied:
                again_s = trio.current_time() + AGAIN_S

    async def _view(self, collection: bytes, salt: bytes) -> View:
        known = await self._loaded_set(collection)
        return await trio.to_thread.run_sync(known.view, salt)

    def served_view(self, collection: bytes, salt: bytes, peer: bytes) -> View | None:
        known = self._sets.get(collection)
        return known.view(salt) if known is not None and self.serves(collection, peer) else None

    def serves(self, collection: bytes, peer: bytes) -> bool:
        charter = self._charters.find(collection)
        return charter is not None and self._charters.follows(collection) and rules.may_read(charter, peer)


class _Served:
    """What one peer may see: `nexus.memory.sync.Served`."""

    def __init__(self, syncing: Syncing, peer: bytes) -> None:
        self._syncing = syncing
        self._peer = peer

    def view(self, collection: bytes, salt: bytes, /) -> View | None:
        return self._syncing.served_view(collection, salt, self._peer)

    def serves(self, collection: bytes, /) -> bool:
        return self._syncing.serves(collection, self._peer)
