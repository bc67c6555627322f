"""Blocks are taken in here, whoever they come from: opened, checked once against the rules of their collections, and stored.

What is refused is refused for a reason of `nexus.memory.validate`; what a quota keeps out is declined and is nobody's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from nexus.core.errors import LocalError, MalformedError, NotFoundError, PeerError, VerificationError
from nexus.core.keys import public_key_of
from nexus.memory.batch import BatchProof, OpenedBlock, SignedBatch, open_batch
from nexus.memory.block import SEALED, TOMBSTONE, Block
from nexus.memory.collection import Charter, replace_rule
from nexus.memory.item_set import Item
from nexus.memory.sealing import unseal
from nexus.memory.sync import Checked
from nexus.memory.validate import CheckSky, Fault, Refusal, validate
from nexus.memory.versions import Rule, same_author
from nexus.node.memory.charters import Charters
from nexus.storage.memory.records import WITH_BODY, Arrival, Content, QuotaError
from nexus.storage.memory.store import MemoryStore

_RECHECKED_AT_ONCE = 500


@dataclass(slots=True)
class Taken:
    """`new`: blocks that were stored, durably. `known`: how many were here already. `refused`, `declined`: see the module."""

    new: list[OpenedBlock] = field(default_factory=list)
    known: int = 0
    refused: list[tuple[bytes, Refusal]] = field(default_factory=list)
    declined: list[bytes] = field(default_factory=list)


class Added(Protocol):
    """Told of what was stored, on the trio thread. `tombstones`: there are some among it; `own`: this node wrote it."""

    def __call__(self, collection: bytes, items: Sequence[Item], /, *, tombstones: bool, own: bool) -> None: ...


class Accepting:
    """`added`: see `Added`. `check_sky`: see `validate`."""

    def __init__(
        self,
        store: MemoryStore,
        charters: Charters,
        check_sky: CheckSky,
        now_ms: Callable[[], int],
        added: Added,
    ) -> None:
        self._store = store
        self._charters = charters
        self._check_sky = check_sky
        self._now_ms = now_ms
        self._added = added

    async def from_sync(self, batches: Sequence[bytes], peer_id: str, collection: bytes, wanted: frozenset[bytes]) -> Checked:
        """What a peer sent when it was asked for the blocks `wanted`: see `nexus.memory.sync.Checked`."""

        def work() -> Taken:
            opened = [(batch.proof, open_batch(batch)) for batch in map(SignedBatch.from_bytes, batches)]
            for _, blocks in opened:
                if any(one.id not in wanted or one.block.collection != collection for one in blocks):
                    raise VerificationError("a block came that was not asked for")
            return self._take(opened, public_key_of(peer_id))

        try:
            taken = await trio.to_thread.run_sync(work)
        except PeerError as error:
            return Checked(refused=len(batches), cause=error.cause)
        self._tell(taken.new)
        offences = [refusal for _, refusal in taken.refused if refusal.fault is Fault.SENDER]
        declined = [*taken.declined, *(identifier for identifier, refusal in taken.refused if refusal.fault is not Fault.SENDER)]
        accepted = [Item(one.block.created_ms, one.id) for one in taken.new]
        if taken.known:
            # They came another way meanwhile: as good as accepted, and not worth asking for again.
            new = {item.id for item in accepted}
            declined += [identifier for identifier in wanted if identifier not in new and identifier not in declined]
        return Checked(accepted, declined, len(offences), offences[0].cause if offences else "")

    async def take(self, batches: Iterable[SignedBatch], sender: bytes, without: Collection[bytes] = ()) -> Taken:
        """Blocks from elsewhere: a user's file, or a peer's answer. `sender`: a public key, or empty. `without`: ids of some that
        are passed over. Raises MalformedError, VerificationError for a batch that does not open, LocalError."""
        listed = list(batches)
        taken = await trio.to_thread.run_sync(
            lambda: self._take([(batch.proof, open_batch(batch)) for batch in listed], sender, without)
        )
        self._tell(taken.new)
        return taken

    async def own(self, batch: SignedBatch, contents: Sequence[Content | None]) -> list[OpenedBlock]:
        """What this node wrote itself. Raises QuotaError, LocalError."""

        def work() -> list[OpenedBlock]:
            opened = tuple(open_batch(batch))
            arrival = Arrival(batch.proof, opened, tuple(contents), self._now_ms())
            self._store.put([arrival], self._rule)
            return list(opened)

        opened = await trio.to_thread.run_sync(work)
        self._tell(opened, own=True)
        return opened

    def content_of(self, block: Block) -> Content | None:
        """What of a block is searched here; None for a sealed one that this node cannot read."""
        if block.kind != SEALED:
            return Content.of(block)
        try:
            return Content.of(unseal(block, self._charters.keys(block.collection), self._check_sky))
        except (NotFoundError, MalformedError, VerificationError):
            return None

    def check_kept(self, opened: Sequence[OpenedBlock]) -> list[Refusal | None]:
        """Blocks that are stored, against the rules that hold now."""
        return validate(opened, self._charters.find, self._check_sky, self._now_ms())

    def recheck(self, collection: bytes) -> int:
        """After its charter has changed: forget the blocks that may not be in it any more, so that nodes with one charter keep the
        same; how many. Those that may be in it now come from peers. Runs in a worker thread. Raises LocalError."""
        every = [item.id for item in self._store.items(collection) if item.state in WITH_BODY]
        forgotten = 0
        for at in range(0, len(every), _RECHECKED_AT_ONCE):
            blocks = self._store.get_many(every[at : at + _RECHECKED_AT_ONCE]).values()
            opened = [OpenedBlock(stored.id, stored.data, stored.block, 0) for stored in blocks if stored.block is not None]
            refusals = self.check_kept(opened)
            gone = [one.id for one, why in zip(opened, refusals, strict=True) if why is not None and why.fault is Fault.CHARTER]
            if gone:
                self._store.forget(gone)
            forgotten += len(gone)
        return forgotten

    def _take(
        self, batches: Sequence[tuple[BatchProof, list[OpenedBlock]]], sender: bytes, without: Collection[bytes] = ()
    ) -> Taken:
        taken = Taken()
        every = [one for _, blocks in batches for one in blocks]
        refusals = validate(every, self._charters.find, self._check_sky, self._now_ms())
        why = {one.id: refusal for one, refusal in zip(every, refusals, strict=True) if refusal is not None}
        taken.refused = list(why.items())
        left_out = {*why, *without}
        arrivals = [arrival for proof, blocks in batches if (arrival := self._arrival(proof, blocks, left_out, sender))]
        new = set(self._put(arrivals, taken))
        for arrival in arrivals:
            for one in arrival.opened:
                if one.id in new:
                    taken.new.append(one)
                elif one.id not in taken.declined:
                    taken.known += 1
        return taken

    def _arrival(
        self, proof: BatchProof, blocks: Sequence[OpenedBlock], refused: Collection[bytes], sender: bytes
    ) -> Arrival | None:
        """The good part of a batch."""
        good = [one for one in blocks if one.id not in refused]
        if not good:
            return None
        if len(good) < len(blocks):
            proof = proof.narrow({one.place: one.id for one in blocks}, [one.place for one in good])
        return Arrival(proof, tuple(good), tuple(self.content_of(one.block) for one in good), self._now_ms(), sender)

    def _put(self, arrivals: Sequence[Arrival], taken: Taken) -> list[bytes]:
        """All in one commit; where somebody's quota stands in the way, each by itself."""
        if not arrivals:
            return []
        try:
            return self._store.put(arrivals, self._rule)
        except QuotaError as error:
            if len(arrivals) == 1:
                if error.whose == "total":
                    raise LocalError(error.cause, error.fix) from error
                taken.declined += [one.id for one in arrivals[0].opened]
                return []
        return [identifier for arrival in arrivals for identifier in self._put([arrival], taken)]

    def _rule(self, collection: bytes) -> Rule:
        charter: Charter | None = self._charters.find(collection)
        return replace_rule(charter) if charter is not None else same_author

    @property
    def rule(self) -> Callable[[bytes], Rule]:
        return self._rule

    def _tell(self, new: Sequence[OpenedBlock], *, own: bool = False) -> None:
        by_collection: dict[bytes, list[OpenedBlock]] = {}
        for one in new:
            by_collection.setdefault(one.block.collection, []).append(one)
        for collection, listed in by_collection.items():
            items = [Item(one.block.created_ms, one.id) for one in listed]
            # A block whose tombstone came before it is taken away as it comes.
            tombstones = any(one.block.kind == TOMBSTONE for one in listed)
            self._added(collection, items, tombstones=tombstones, own=own)


def reasons(refused: Iterable[tuple[bytes, Refusal]], most: int) -> tuple[str, ...]:
    """Why blocks were refused, in sentences, the most frequent first."""
    counted = Counter(refusal.cause for _, refusal in refused)
    return tuple(f"{count} {'block' if count == 1 else 'blocks'}: {cause}" for cause, count in counted.most_common(most))
