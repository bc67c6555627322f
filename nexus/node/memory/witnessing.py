"""This node as a witness of others' blocks, and what other witnesses say of the blocks that it has.

Every interval it signs one root over the blocks of other authors that it verified since its last. Receipts for its blocks it asks
of the peers that follow the same collections, a few times and ever later, until as many witnesses attest a block as are wanted.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import structlog
import trio

from nexus.core.errors import CapacityError, MalformedError, NexusError, PeerError, TimedOutError, VerificationError
from nexus.core.keys import Identity
from nexus.memory.block import Block
from nexus.memory.bracket import (
    ATTESTED_MAX,
    Anchor,
    Attestation,
    Bracket,
    Receipt,
    SignedAttestation,
    bracket,
    named_ids,
    receipts,
)
from nexus.memory.item_set import Item
from nexus.node.memory.asking import Asking
from nexus.node.memory.messages import IDS_MAX, RECEIPTS_MAX, BlockReceipt
from nexus.storage.memory.records import StoredBlock
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.witness")

_OWN, _SEEN = "own-attestation", "attestation"
_LAST = b"last"
_ISSUED = b"issued"
# Attestations of others that are kept so that blocks which name them are bounded from below.
SEEN_MAX = 8192
WAITING_MAX = 16_384
FIRST_ASK_S = 2.0
ASKS_MAX = 5
PEERS_PER_ASK = 4
POLL_S = 1.0


class Witnessing:
    """`every_s`: 0, and this node attests nothing. `wanted`: how many witnesses bound a block's time; `trusted`: keys, or None for
    any. `peers_of`: who follows a collection."""

    def __init__(
        self,
        identity: Identity,
        store: MemoryStore,
        asking: Asking,
        peers_of: Callable[[bytes], Sequence[str]],
        now_ms: Callable[[], int],
        *,
        every_s: float,
        wanted: int,
        trusted: Collection[bytes] | None,
    ) -> None:
        self._identity = identity
        self._store = store
        self._asking = asking
        self._peers_of = peers_of
        self._now_ms = now_ms
        self.every_s = every_s
        self.wanted = wanted
        self._trusted = trusted
        self.last: Attestation | None = None
        self.issued = 0
        self._fresh: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: list[tuple[float, int, bytes, bytes]] = []
        self._seen: OrderedDict[bytes, Anchor] = OrderedDict()

    def load(self) -> None:
        """What is damaged is left out: the chain of this node's attestations then begins anew. Raises LocalError."""
        own = self._store.sound_documents(_OWN)
        self.issued = int.from_bytes(own.get(_ISSUED, b""), "big")
        with suppress(MalformedError):
            self.last = SignedAttestation.from_bytes(own[_LAST]).attestation if _LAST in own else None
        seen = []
        for identifier, data in self._store.sound_documents(_SEEN).items():
            with suppress(MalformedError):
                attestation = Attestation.from_bytes(data)
                seen.append((attestation.at_ms, identifier, attestation.witness))
        self._seen = OrderedDict((identifier, Anchor(witness, at_ms)) for at_ms, identifier, witness in sorted(seen))

    def added(self, collection: bytes, items: Sequence[Item], *, own: bool) -> None:
        """Blocks were verified and stored: to be attested, if others wrote them, and in want of receipts."""
        now_s = trio.current_time()
        for item in items:
            if not own and len(self._fresh) < ATTESTED_MAX:
                self._fresh[item.id] = None
            if len(self._waiting) < WAITING_MAX:
                heapq.heappush(self._waiting, (now_s + FIRST_ASK_S, 0, item.id, collection))

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            if self.every_s:
                nursery.start_soon(self._keep_attesting)
            nursery.start_soon(self._keep_asking)
            task_status.started()

    # --- as a witness ------------------------------------------------------------------------------------------------------------

    async def _keep_attesting(self) -> None:
        while True:
            await trio.sleep(self.every_s)
            try:
                await self.attest()
            except NexusError as error:
                log.error("attestation_failed", reason=error.cause, fix=error.fix)

    async def attest(self) -> None:
        """Sign for what was verified since the last time. Raises LocalError."""
        ids = list(self._fresh)
        if not ids:
            return

        def keep() -> Attestation:
            signed = SignedAttestation.sign(self._identity, ids, self._now_ms(), self.last)
            # The attestation first: whatever receipts get out, no other is ever signed in its place.
            self._store.put_document(_OWN, _LAST, signed.to_bytes())
            self._store.put_document(_OWN, _ISSUED, (self.issued + 1).to_bytes(8, "big"))
            self._store.put_receipts(
                [
                    (identifier, self._identity.public_key, receipt.to_bytes())
                    for identifier, receipt in zip(ids, receipts(signed, ids), strict=True)
                ]
            )
            return signed.attestation

        self.last = await trio.to_thread.run_sync(keep)
        self.issued += 1
        for identifier in ids:
            self._fresh.pop(identifier, None)

    async def attested(self, ids: Sequence[bytes]) -> list[BlockReceipt]:
        """Receipts for blocks that are here; those without one of this node's are attested next time."""

        def read() -> list[BlockReceipt]:
            found = []
            for identifier in ids:
                known = self._store.receipts(identifier)
                if self._identity.public_key not in known and self.every_s and len(self._fresh) < ATTESTED_MAX:
                    missing.append(identifier)
                found += [BlockReceipt(identifier, data) for data in known.values()]
            return found[:RECEIPTS_MAX]

        missing: list[bytes] = []
        found = await trio.to_thread.run_sync(read)
        for identifier in missing:
            self._fresh[identifier] = None
        return found

    # --- of others ---------------------------------------------------------------------------------------------------------------

    async def _keep_asking(self) -> None:
        """Ask for receipts of the blocks whose time has come, those of one collection together."""
        while True:
            await trio.sleep(POLL_S)
            due: dict[bytes, dict[bytes, int]] = {}
            while self._waiting and self._waiting[0][0] <= trio.current_time():
                _, count, identifier, collection = heapq.heappop(self._waiting)
                due.setdefault(collection, {})[identifier] = count
            for collection, asks in due.items():
                try:
                    await self._ask(collection, asks)
                except NexusError as error:
                    log.error("receipts_failed", reason=error.cause, fix=error.fix)

    async def _ask(self, collection: bytes, asks: dict[bytes, int]) -> None:
        lacking = list(asks)
        for peer_id in self._peers_of(collection)[:PEERS_PER_ASK]:
            lacking = await trio.to_thread.run_sync(self._lacking, lacking)
            for at in range(0, len(lacking), IDS_MAX):
                try:
                    await self.ask_peer(peer_id, lacking[at : at + IDS_MAX])
                except (PeerError, TimedOutError, CapacityError) as error:
                    log.info("no_receipts", peer_id=peer_id, reason=error.cause)
                    break
        wait_s = max(self.every_s, FIRST_ASK_S)
        for identifier in await trio.to_thread.run_sync(self._lacking, lacking):
            count = asks[identifier] + 1
            if count < ASKS_MAX and len(self._waiting) < WAITING_MAX:
                heapq.heappush(self._waiting, (trio.current_time() + wait_s * 2 ** (count - 1), count, identifier, collection))

    async def ask_peer(self, peer_id: str, ids: Sequence[bytes]) -> None:
        """Take what a peer has of receipts. Raises PeerError, also for those that do not hold, TimedOutError, LocalError."""
        answer = await self._asking.receipts(peer_id, ids)
        asked = set(ids)

        def check() -> list[tuple[bytes, Attestation, bytes]]:
            checked = []
            for each in answer:
                if each.block not in asked:
                    raise VerificationError("a receipt came that was not asked for", peer=peer_id)
                try:
                    attestation = Receipt.from_bytes(each.receipt).verify(each.block, self._now_ms())
                except (MalformedError, VerificationError) as error:
                    error.peer = peer_id
                    raise
                # Room for receipts is short: strangers' do not take it from those that count here.
                counts = self._trusted is None or attestation.witness in self._trusted
                if counts and attestation.witness != self._identity.public_key:
                    checked.append((each.block, attestation, each.receipt))
            self._store.put_receipts([(block, attestation.witness, data) for block, attestation, data in checked])
            for attestation in {attestation.id: attestation for _, attestation, _ in checked}.values():
                if attestation.id not in self._seen:
                    self._store.put_document(_SEEN, attestation.id, attestation.to_bytes())
            return checked

        for _, attestation, _ in await trio.to_thread.run_sync(check):
            self._seen[attestation.id] = Anchor(attestation.witness, attestation.at_ms)
        for _ in range(len(self._seen) - SEEN_MAX):
            oldest, _ = self._seen.popitem(last=False)
            await trio.to_thread.run_sync(self._store.remove_document, _SEEN, oldest)

    def _lacking(self, ids: Iterable[bytes]) -> list[bytes]:
        """Those with fewer witnesses than are wanted, this node not counted."""
        found = []
        for identifier in ids:
            known = self._store.receipts(identifier).keys() - {self._identity.public_key}
            counting = known if self._trusted is None else known & set(self._trusted)
            if len(counting) < self.wanted:
                found.append(identifier)
        return found

    # --- brackets ----------------------------------------------------------------------------------------------------------------

    def newest_attestations(self, most: int) -> list[bytes]:
        """Ids of the latest attestations of others: what a new block says it comes after."""
        latest = heapq.nlargest(most, self._seen.items(), key=lambda entry: (entry[1].at_ms, entry[0]))
        return [identifier for identifier, _ in latest]

    def brackets(self, blocks: Sequence[StoredBlock]) -> dict[bytes, Bracket]:
        """What is known of the time of stored blocks, by id. Runs in a worker thread. Raises LocalError."""
        wanted = {identifier for stored in blocks if stored.block for identifier in named_ids(stored.block)}
        anchors = self._anchors(wanted)
        return {stored.id: self._bracket(stored, anchors) for stored in blocks}

    def _anchors(self, ids: Collection[bytes]) -> dict[bytes, Anchor]:
        anchors = {identifier: seen for identifier in ids if (seen := self._seen.get(identifier)) is not None}
        for identifier, stored in self._store.get_many([each for each in ids if each not in anchors]).items():
            anchors[identifier] = Anchor(stored.author, stored.created_ms)
        return anchors

    def _bracket(self, stored: StoredBlock, anchors: dict[bytes, Anchor]) -> Bracket:
        block = stored.block or Block(stored.kind, stored.collection, stored.author, stored.created_ms)
        attestations = [Receipt.from_bytes(data).signed.attestation for data in self._store.receipts(stored.id).values()]
        return bracket(block, attestations, anchors.get, sky_agrees=bool(block.sky), wanted=self.wanted, trusted=self._trusted)
