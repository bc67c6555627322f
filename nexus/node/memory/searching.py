"""Searches: in the store of this node, for its users and for peers, and over the network.

What peers find comes as blocks with their authors' proofs. They are checked like any other, then searched here, in one list with
what this node has: a peer can leave something out, and cannot push anything up.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    PeerError,
    RefusedError,
    TimedOutError,
    UsageError,
    VerificationError,
)
from nexus.core.keys import public_key_of
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import LANG_BYTES_MAX, TAG_BYTES_MAX, TAGS_MAX
from nexus.memory.collection import Charter
from nexus.memory.item_set import Item
from nexus.memory.quantise import quantise, read_codes, restore
from nexus.memory.validate import CheckSky, Fault
from nexus.node.memory.accepting import Accepting
from nexus.node.memory.asking import Asking
from nexus.node.memory.charters import Charters
from nexus.node.memory.messages import AUTHORS_MAX, HITS_MAX, QUERY_BYTES_MAX, SearchAsk
from nexus.storage.memory.records import Filters, Near, Query, SearchResult, State
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.search")

PEERS_MAX = 16
ANSWERED = "answered"
_SHOWN = (State.LIVE, State.PRUNED)
_SCRATCH_BYTES = 256 * 1024 * 1024


@dataclass(slots=True)
class Heard:
    """What came of asking a peer. `outcome`: ANSWERED, or why not. `blocks`: how many it sent that hold."""

    peer_id: str
    outcome: str = "no answer in time"
    blocks: int = 0
    refused: int = 0
    took_s: float = 0.0


@dataclass(slots=True)
class Answer:
    """`sources`: of blocks that came from a peer for this search, which."""

    result: SearchResult
    heard: list[Heard] = field(default_factory=list)
    sources: dict[bytes, str] = field(default_factory=dict)


class Searching:
    """`offend`: told of a peer whose answer broke the rules."""

    def __init__(
        self,
        store: MemoryStore,
        charters: Charters,
        accepting: Accepting,
        asking: Asking,
        check_sky: CheckSky,
        now_ms: Callable[[], int],
        offend: Callable[[str], None],
    ) -> None:
        self._store = store
        self._charters = charters
        self._accepting = accepting
        self._asking = asking
        self._check_sky = check_sky
        self._now_ms = now_ms
        self._offend = offend

    async def here(self, query: Query) -> Answer:
        """Raises UsageError, LocalError."""
        return Answer(await trio.to_thread.run_sync(self._store.search, query, self._now_ms()))

    async def for_peer(self, ask: SearchAsk) -> list[bytes]:
        """Ids of what a peer searches for, best first. Raises MalformedError for a vector that is none, UsageError."""
        query = query_of(ask)
        answer = await self.here(query)
        return [hit.id for hit in answer.result.hits]

    async def everywhere(self, query: Query, asked: Sequence[tuple[Charter, str]], deadline_s: float) -> Answer:
        """Here and at these peers, each for the collection beside it, until the deadline. Raises UsageError, LocalError."""
        heard = [Heard(peer_id) for _, peer_id in asked]
        sources: dict[bytes, str] = {}
        # What cannot be asked is the caller's fault, and no peer's.
        asks = [ask_of(query, charter.id) for charter, _ in asked]
        async with self._scratch() as (scratch, into_scratch):

            async def one(at: int, charter: Charter, peer_id: str) -> None:
                began_s = trio.current_time()
                try:
                    batches = await self._asking.search(peer_id, asks[at])
                    await self._take(batches, charter, peer_id, heard[at], sources, into_scratch)
                    heard[at].outcome = ANSWERED
                except RefusedError as error:
                    heard[at].outcome = f"declined: {error.cause.partition(': ')[2]}"
                except (PeerError, TimedOutError, CapacityError, LocalError) as error:
                    if isinstance(error, MalformedError | VerificationError):
                        self._offend(peer_id)
                    log.info("search_not_answered", peer_id=peer_id, reason=error.cause)
                    heard[at].outcome = error.code
                finally:
                    heard[at].took_s = trio.current_time() - began_s

            with trio.move_on_after(deadline_s):
                async with trio.open_nursery() as nursery:
                    for at, (charter, peer_id) in enumerate(asked):
                        nursery.start_soon(one, at, charter, peer_id)
            here = await self.here(query)
            if not any(one.blocks for one in heard):
                return Answer(here.result, heard, sources)
            # One list by one rule: what is best here joins what came, and all of it is searched together.
            best = [hit.id for hit in here.result.hits]
            local = await trio.to_thread.run_sync(self._store.batches, best, _SCRATCH_BYTES)
            await into_scratch.take(local, b"")
            result = await trio.to_thread.run_sync(scratch.search, query, self._now_ms())
            return Answer(result, heard, sources)

    async def _take(
        self,
        batches: Sequence[SignedBatch],
        charter: Charter,
        peer_id: str,
        heard: Heard,
        sources: dict[bytes, str],
        into_scratch: Accepting,
    ) -> None:
        """Check what a peer found: kept where this node follows the collection, else for this search alone."""
        sender = public_key_of(peer_id)
        opened = await trio.to_thread.run_sync(lambda: [one for batch in batches for one in open_batch(batch)])
        if any(one.block.collection != charter.id for one in opened) or len(opened) > HITS_MAX:
            raise VerificationError(f"peer {peer_id} answered with other blocks than were asked for", peer=peer_id)
        ids = [one.id for one in opened]
        known = await trio.to_thread.run_sync(self._store.get_many, ids)
        # What was taken away or replaced here is not shown because somebody still has it.
        gone = {identifier for identifier, stored in known.items() if stored.state not in _SHOWN}
        taken = await into_scratch.take(batches, sender, without=gone)
        refused = {identifier for identifier, _ in taken.refused}
        if any(refusal.fault is Fault.SENDER for _, refusal in taken.refused):
            self._offend(peer_id)
        good = [identifier for identifier in ids if identifier not in refused]
        heard.refused, heard.blocks = len(refused), len(good)
        for identifier in good:
            if identifier not in known:
                sources.setdefault(identifier, peer_id)
        if self._charters.follows(charter.id):
            try:
                await self._accepting.take(batches, sender)
            except LocalError as error:
                # What was found can be shown all the same.
                log.error("found_and_not_kept", reason=error.cause, fix=error.fix)

    @asynccontextmanager
    async def _scratch(self) -> AsyncIterator[tuple[MemoryStore, Accepting]]:
        """A store for the time of a search."""
        with tempfile.TemporaryDirectory(prefix="nexus-search-") as directory:
            store = await trio.to_thread.run_sync(
                lambda: MemoryStore(Path(directory), bytes_max=_SCRATCH_BYTES, author_bytes_max=_SCRATCH_BYTES)
            )
            try:
                yield store, Accepting(store, self._charters, self._check_sky, self._now_ms, _told_to_nobody)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(store.close)


def _told_to_nobody(collection: bytes, items: Sequence[Item], /, *, tombstones: bool, own: bool) -> None:
    """What is stored for the time of a search is no news."""


def ask_of(query: Query, collection: bytes) -> SearchAsk:
    """What a peer is asked. Raises UsageError for more than there is room for."""
    filters = query.filters
    if len(query.text.encode("utf-8")) > QUERY_BYTES_MAX:
        raise UsageError(f"the question is longer than {QUERY_BYTES_MAX} bytes", "Ask in fewer words, or search here only: --local")
    tags = [tag for tag in filters.tags if 0 < len(tag.encode("utf-8")) <= TAG_BYTES_MAX]
    if len(tags) != len(filters.tags) or len(tags) > TAGS_MAX or len(filters.authors) > AUTHORS_MAX or len(filters.langs) > 1:
        raise UsageError("these filters are more than a peer can be asked for", "Give fewer tags or authors")
    scale, codes = 0, b""
    if query.vector is not None:
        rows, scales = quantise(query.vector[None])
        scale, codes = int(scales[0]), rows[0].tobytes()
    near = filters.near
    lang = filters.langs[0] if filters.langs else ""
    return SearchAsk(
        collection=collection,
        k=min(query.k, HITS_MAX),
        fingerprint=query.fingerprint if codes else b"",
        scale=scale,
        codes=codes,
        query=query.text if query.hybrid or not codes else "",
        tags=tuple(tags),
        authors=filters.authors,
        lang=lang if len(lang.encode("utf-8")) <= LANG_BYTES_MAX else "",
        since_ms=filters.since_ms,
        until_ms=filters.until_ms,
        latitude=round((near.latitude + 90) * 100) if near else 0,
        longitude=round((near.longitude + 180) * 100) if near else 0,
        radius_km=max(1, round(near.radius_km)) if near else 0,
    )


def query_of(ask: SearchAsk) -> Query:
    """What a peer asks, as this node searches. Raises MalformedError."""
    vector = None
    if ask.codes:
        codes, scale = read_codes(ask.codes, ask.scale)
        vector = restore(codes[None], np.array([scale], np.int64))[0]
    near = Near(ask.latitude / 100 - 90, ask.longitude / 100 - 180, float(ask.radius_km)) if ask.radius_km else None
    filters = Filters(
        collections=(ask.collection,),
        tags=ask.tags,
        authors=ask.authors,
        langs=(ask.lang,) if ask.lang else (),
        since_ms=ask.since_ms,
        until_ms=ask.until_ms,
        near=near,
    )
    return Query(
        k=ask.k, vector=vector, fingerprint=ask.fingerprint, text=ask.query, hybrid=bool(ask.query), filters=filters, blocks=False
    )
