"""Questions about the shared memory, `/nexus/memory/ask/1`: collections, blocks, searches and receipts. Both ends are here.

A peer gets what it may read and no more, within a budget: what it is sent costs this node's uplink, and what it searches for this
node's processor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotFoundError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import public_key_of
from nexus.core.record import Record
from nexus.memory import collection as rules
from nexus.memory.batch import SignedBatch
from nexus.memory.sync_conduct import Standing
from nexus.network.transport import Stream, Transport
from nexus.node.memory.budgets import Budget
from nexus.node.memory.charters import Charters
from nexus.node.memory.messages import (
    ANSWER_BYTES_MAX,
    ASK,
    COLLECTIONS_MAX,
    GRANTS_MAX,
    MESSAGES,
    REASON_BYTES_MAX,
    RECEIPTS_MAX,
    BlockReceipt,
    Blocks,
    BlocksAsk,
    Collections,
    CollectionsAsk,
    Declined,
    Receipts,
    ReceiptsAsk,
    SearchAsk,
)
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.ask")

A = TypeVar("A", bound=Record)

ANSWER_TIMEOUT_S = 30.0
# The hashes of proofs come on top of what the store counts: of blocks of as many of the largest batches some 100 KB.
BLOCKS_BYTES_MAX = ANSWER_BYTES_MAX - 128 * 1024
SERVED_BYTES_PER_S = 4 * 1024 * 1024
SERVED_BYTES_BURST = 32 * 1024 * 1024
# A search takes some milliseconds of one processor.
SEARCHES_PER_S = 10.0
SEARCHES_BURST = 50.0
TOLD_PER_S, TOLD_BURST = 0.5, 20.0


class Search(Protocol):
    """Runs a peer's search here; the ids of what was found, the best first."""

    def __call__(self, ask: SearchAsk, /) -> Awaitable[Sequence[bytes]]: ...


class Attested(Protocol):
    """Receipts for blocks: this node's own and those that it knows of."""

    def __call__(self, ids: Sequence[bytes], /) -> Awaitable[Sequence[BlockReceipt]]: ...


class Peers(Protocol):
    """What is known of peers from exchanging with them. `told` takes what is newer of charters and keys that a peer tells of, among
    collections that are known here."""

    def standing(self, peer_id: str, /) -> Standing: ...

    def told(self, charters: Sequence[bytes], grants: Sequence[bytes], /) -> Awaitable[None]: ...


class Answering:
    """The serving end."""

    def __init__(
        self, transport: Transport, store: MemoryStore, charters: Charters, search: Search, attested: Attested, peers: Peers
    ) -> None:
        self._transport = transport
        self._store = store
        self._charters = charters
        self._search = search
        self._attested = attested
        self._peers = peers
        self._sent = Budget(SERVED_BYTES_PER_S, SERVED_BYTES_BURST)
        self._searches = Budget(SEARCHES_PER_S, SEARCHES_BURST)
        self._tellings = Budget(TOLD_PER_S, TOLD_BURST)

    def start(self) -> None:
        self._transport.serve(ASK, self._handle)

    def may_read(self, collection: bytes, peer: bytes) -> bool:
        """Whether a node, by its key, may have blocks of a collection. What is not known here is nobody's to read from here."""
        charter = self._charters.find(collection)
        return charter is not None and rules.may_read(charter, peer)

    async def _handle(self, stream: Stream) -> None:
        if self._peers.standing(stream.peer_id) is Standing.DROPPED:
            raise PeerError(f"peer {stream.peer_id} sent bad blocks lately and is not served", peer="")
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            try:
                ask = MESSAGES.unpack(await stream.receive())
            except MalformedError as error:
                error.peer = stream.peer_id
                raise
            try:
                answer = await self._answer(ask, stream.peer_id)
            except MalformedError as error:
                error.peer = stream.peer_id
                raise
            except LocalError as error:
                # What is wrong with this node's disk is no peer's business.
                log.error("not_answered", peer_id=stream.peer_id, reason=error.cause, fix=error.fix)
                answer = Declined("this node cannot answer now")
            except NexusError as error:
                answer = Declined(error.cause.encode()[:REASON_BYTES_MAX].decode(errors="ignore"))
            frame = MESSAGES.pack(answer)
            await self._sent.spend(stream.peer_id, len(frame))
            await stream.send(frame)
            return
        raise TimedOutError(f"peer {stream.peer_id} did not take its answer within {ANSWER_TIMEOUT_S:.0f} s")

    async def _answer(self, ask: Record, peer_id: str) -> Record:
        peer = public_key_of(peer_id)
        match ask:
            case CollectionsAsk():
                return await trio.to_thread.run_sync(self._collections, ask, peer)
            case Collections(charters, grants):
                # Told without having asked: what is known here and newer is taken, like any other answer.
                if self._tellings.take(peer_id, 1) > 0:
                    raise CapacityError("too many charters at once", "Tell of the last one only")
                await self._peers.told(charters, grants)
                return Collections((), ())
            case BlocksAsk(ids):
                return await self._blocks(ids, peer)
            case ReceiptsAsk(ids):
                readable = await trio.to_thread.run_sync(self._readable, ids, peer)
                return Receipts(tuple(await self._attested(readable))[:RECEIPTS_MAX])
            case SearchAsk():
                if not self.may_read(ask.collection, peer):
                    raise NotFoundError("no such collection is followed here")
                if self._searches.take(peer_id, 1) > 0:
                    raise CapacityError("too many searches at once", "Ask again in a while")
                return await self._blocks(await self._search(ask), peer)
            case _:
                raise MalformedError("an answer where a question is due", peer=peer_id)

    def _collections(self, ask: CollectionsAsk, peer: bytes) -> Collections:
        named = [charter.id for charter in self._charters.all() if charter.name == ask.name]
        charters: list[bytes] = []
        grants: list[bytes] = []
        room = ANSWER_BYTES_MAX
        for collection in (named if ask.name else ask.ids)[:COLLECTIONS_MAX]:
            signed = self._charters.signed(collection)
            if signed is None or not rules.may_read(signed.charter, peer):
                continue
            keys = self._charters.grants_for(collection, peer)
            data = signed.to_bytes()
            room -= len(data) + sum(map(len, keys))
            if room < 0 or len(grants) + len(keys) > GRANTS_MAX:
                break
            charters.append(data)
            grants += keys
        return Collections(tuple(charters), tuple(grants))

    async def _blocks(self, ids: Sequence[bytes], peer: bytes) -> Blocks:
        readable = await trio.to_thread.run_sync(self._readable, ids, peer)
        batches = await trio.to_thread.run_sync(self._store.batches, readable, BLOCKS_BYTES_MAX)
        return Blocks(tuple(batch.to_bytes() for batch in batches))

    def _readable(self, ids: Sequence[bytes], peer: bytes) -> list[bytes]:
        """Those of these blocks that are here and that the peer may have, in the order asked."""
        rows = self._store.get_many(ids)
        return [each for each in ids if each in rows and self.may_read(rows[each].collection, peer)]


class Asking:
    """The asking end. Every method raises PeerError, also where the peer declines, and TimedOutError."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def collections(self, peer_id: str, name: str = "", ids: Sequence[bytes] = ()) -> Collections:
        return await self._ask(peer_id, CollectionsAsk(name, tuple(ids)), Collections)

    async def tell(self, peer_id: str, charters: Sequence[bytes], grants: Sequence[bytes]) -> None:
        """Hand a peer charters that were changed, and keys that are sealed to it."""
        await self._ask(peer_id, Collections(tuple(charters), tuple(grants)), Collections)

    async def blocks(self, peer_id: str, ids: Sequence[bytes]) -> list[SignedBatch]:
        return _batches(await self._ask(peer_id, BlocksAsk(tuple(ids)), Blocks), peer_id)

    async def search(self, peer_id: str, ask: SearchAsk) -> list[SignedBatch]:
        return _batches(await self._ask(peer_id, ask, Blocks), peer_id)

    async def receipts(self, peer_id: str, ids: Sequence[bytes]) -> tuple[BlockReceipt, ...]:
        return (await self._ask(peer_id, ReceiptsAsk(tuple(ids)), Receipts)).receipts

    async def _ask(self, peer_id: str, ask: Record, kind: type[A]) -> A:
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            stream = await self._transport.open_stream(peer_id, ASK)
            try:
                await stream.send(MESSAGES.pack(ask))
                answer = MESSAGES.unpack(await stream.receive())
                await stream.close()
            except trio.EndOfChannel:
                await stream.reset()
                raise UnreachableError(f"peer {peer_id} closed the stream before it answered", peer=peer_id) from None
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    await stream.reset()
                if isinstance(error, PeerError):
                    error.peer = error.peer or peer_id
                raise
            if isinstance(answer, Declined):
                raise RefusedError(f"peer {peer_id} declines: {answer.reason}", peer=peer_id)
            if not isinstance(answer, kind):
                raise MalformedError(f"peer {peer_id} answered another question than it was asked", peer=peer_id)
            return answer
        raise TimedOutError(f"peer {peer_id} did not answer within {ANSWER_TIMEOUT_S:.0f} s", "It may be busy, or gone")


async def ask_all(
    peers: Sequence[str],
    ask: Callable[[str], Awaitable[None]],
    at_once: int,
) -> None:
    """`ask` each of these peers, some at a time. What a peer does wrong, or that it is not there, is not the others' affair."""
    limiter = trio.CapacityLimiter(at_once)

    async def one(peer_id: str) -> None:
        async with limiter:
            try:
                await ask(peer_id)
            except (PeerError, TimedOutError, CapacityError) as error:
                log.info("peer_not_heard", peer_id=peer_id, reason=error.cause)

    async with trio.open_nursery() as nursery:
        for peer_id in peers:
            nursery.start_soon(one, peer_id)


def _batches(answer: Blocks, peer_id: str) -> list[SignedBatch]:
    try:
        return [SignedBatch.from_bytes(data) for data in answer.batches]
    except (MalformedError, VerificationError) as error:
        error.peer = peer_id
        raise
