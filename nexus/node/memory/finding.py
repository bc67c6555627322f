"""Who has a collection or a block: peers that are connected, and those that announce it on the DHT.

A node announces the collections that it follows, by id and name, and the newest blocks that it wrote. The DHT is told by hash: who
does not know an id or a name learns nothing from it. The id of a private collection follows from its owner and its name, which
others may guess: it is announced under a hash of its key, which members alone have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import structlog
import trio

from nexus.core.errors import CapacityError, NotFoundError, PeerError, TimedOutError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import peer_id_of, public_key_of
from nexus.memory import collection as rules
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import block_id
from nexus.memory.collection import SignedCharter
from nexus.network.transport import Transport
from nexus.node.memory.asking import Asking, ask_all
from nexus.node.memory.charters import Charters, read_charters

log = structlog.get_logger("nexus.memory.find")

ANNOUNCED_BLOCKS_MAX = 128
ANNOUNCED_COLLECTIONS_MAX = 128
EPOCHS_ANNOUNCED = 2
ASKED_AT_ONCE = 8
ASKED_MAX = 32
FIND_TIMEOUT_S = 20.0


def collection_key(collection: bytes) -> bytes:
    """The DHT key of those who follow a collection that anybody may read."""
    return tagged_hash("memory-collection", collection)


def members_key(collection: bytes, epoch_key: bytes) -> bytes:
    """The DHT key of the members of a private collection. `epoch_key`: of one of its epochs."""
    return tagged_hash("memory-collection-members", collection, epoch_key)


def name_key(name: str) -> bytes:
    """The DHT key of those who follow a public collection of this name."""
    return tagged_hash("memory-collection-name", name.encode("utf-8"))


def block_key(identifier: bytes) -> bytes:
    """The DHT key of those who announce a block."""
    return tagged_hash("memory-block", identifier)


class Finding:
    """`newest`: ids of the newest blocks that this node wrote in public collections."""

    def __init__(self, transport: Transport, charters: Charters, asking: Asking, newest: Callable[[int], Iterable[bytes]]) -> None:
        self._transport = transport
        self._charters = charters
        self._asking = asking
        self._newest = newest

    def announced(self) -> list[bytes]:
        """What this node wants announced on the DHT."""
        keys: dict[bytes, None] = {}
        for collection in self._charters.followed()[:ANNOUNCED_COLLECTIONS_MAX]:
            charter = self._charters.find(collection)
            keys |= dict.fromkeys(self._keys_of(collection))
            if charter is not None and charter.mode != rules.PRIVATE:
                keys[name_key(charter.name)] = None
        for identifier in self._newest(ANNOUNCED_BLOCKS_MAX):
            keys[block_key(identifier)] = None
        return list(keys)

    def _keys_of(self, collection: bytes) -> list[bytes]:
        """Under which DHT keys those who follow a collection are found."""
        charter = self._charters.find(collection)
        if charter is None:
            return []
        if charter.mode != rules.PRIVATE:
            return [collection_key(collection)]
        # Also the one before the newest: not every member has that yet.
        newest = sorted(self._charters.keys(collection).items(), reverse=True)[:EPOCHS_ANNOUNCED]
        return [members_key(collection, key) for _, key in newest]

    async def collection(self, reference: str, peer_id: str | None) -> tuple[SignedCharter, tuple[bytes, ...]]:
        """The charter that a user means by NAME or NAME@PEER, and keys sealed to this node, from `peer_id` or whoever has it.
        Raises NotFoundError, UsageError where several owners have one of this name, and what the peer's answer does."""
        name, owner = rules.split_reference(reference)
        found: dict[bytes, tuple[SignedCharter, set[bytes]]] = {}

        async def ask(peer: str) -> None:
            answer = await self._asking.collections(peer, name=name)
            try:
                charters = await trio.to_thread.run_sync(read_charters, answer.charters, name, ())
            except PeerError as error:
                error.peer = peer
                raise
            for signed in charters:
                if owner and not peer_id_of(signed.charter.owner).startswith(owner):
                    continue
                known, grants = found.get(signed.charter.id, (signed, set()))
                found[signed.charter.id] = rules.newest(known, signed), grants | set(answer.grants)

        if peer_id is not None:
            await ask(peer_id)
        else:
            with trio.move_on_after(FIND_TIMEOUT_S):
                await ask_all(await self._candidates([name_key(name)]), ask, ASKED_AT_ONCE)
        # Of several with one name the asked peer's own is meant.
        own = [each for each in found.values() if peer_id is not None and each[0].charter.owner == public_key_of(peer_id)]
        choice = own if len(own) == 1 else list(found.values())
        if not choice:
            where = f"at {peer_id}" if peer_id else "at the peers in reach"
            raise NotFoundError(
                f"no collection {reference!r} was found {where}",
                "Ask its owner for the name; a private one shows only to its members, once they are granted",
            )
        if len(choice) > 1:
            owners = ", ".join(f"{name}@{peer_id_of(signed.charter.owner)}" for signed, _ in choice[:4])
            raise UsageError(f"{len(choice)} owners have a collection {name!r}", f"Say whose: {owners}")
        signed, grants = choice[0]
        return signed, tuple(sorted(grants))

    async def followers(self, collection: bytes, found: Callable[[str], None]) -> None:
        """Tell of peers that follow a collection, each as it is found: others than those that are connected by the DHT; where this
        node does not follow it, and so has not met them over it, of those that are connected the ones that say so."""

        async def ask(peer: str) -> None:
            answer = await self._asking.collections(peer, ids=[collection])
            if read_charters(answer.charters, "", [collection]):
                found(peer)

        async def look() -> None:
            for peer in await self._candidates(self._keys_of(collection), connected=False):
                found(peer)

        with trio.move_on_after(FIND_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                if not self._charters.follows(collection):
                    nursery.start_soon(ask_all, self._connected(), ask, ASKED_AT_ONCE)

    async def block(self, identifier: bytes) -> tuple[str, SignedBatch]:
        """A peer that has a block, and the block in its batch, its id and its author checked and nothing else. Raises
        NotFoundError."""
        found: list[tuple[str, SignedBatch]] = []
        with trio.move_on_after(FIND_TIMEOUT_S), trio.CancelScope() as enough:

            async def ask(peer: str) -> None:
                for batch in await self._asking.blocks(peer, [identifier]):
                    if [block_id(data) for data in batch.blocks] == [identifier]:
                        # One whose proof is forged does not keep this node from the next who has the block.
                        await trio.to_thread.run_sync(open_batch, batch)
                        found.append((peer, batch))
                        enough.cancel()

            await ask_all(self._connected(), ask, ASKED_AT_ONCE)
            followed = self._charters.followed()[:ASKED_AT_ONCE]
            keys = [block_key(identifier), *(key for collection in followed for key in self._keys_of(collection))]
            await ask_all(await self._candidates(keys, connected=False), ask, ASKED_AT_ONCE)
        if not found:
            raise NotFoundError(
                "no peer in reach has this block, or may hand it to you", "Check the id; `nexus peers` shows who is in reach"
            )
        return found[0]

    def _connected(self) -> list[str]:
        return sorted({connection.peer_id for connection in self._transport.connections()})[:ASKED_MAX]

    async def _candidates(self, keys: Sequence[bytes], *, connected: bool = True) -> list[str]:
        """Peers to ask, those that announce one of the keys first."""
        near = self._connected()
        peers: dict[str, None] = {}
        for key in keys:
            try:
                found = await self._transport.find_providers(key)
            except (PeerError, TimedOutError, CapacityError) as error:
                log.info("not_found_on_the_dht", reason=error.cause)
                continue
            for peer in found:
                self._transport.learn(peer)
                if connected or peer.peer_id not in near:
                    peers[peer.peer_id] = None
        return [*peers, *(peer for peer in near if connected and peer not in peers)][:ASKED_MAX]
