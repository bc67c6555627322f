"""Blocks as users look for them: searched, listed, fetched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UsageError,
    VerificationError,
)
from nexus.core.keys import public_key_of
from nexus.engine.embedding.embedder import Embedder
from nexus.memory.batch import open_batch
from nexus.memory.block import CONTENT, SEALED, id_text, parse_id
from nexus.memory.bracket import Bracket
from nexus.memory.collection import Charter
from nexus.memory.space_map import SpaceMap
from nexus.node.memory.api import (
    LIST_MAX,
    AskedView,
    BlockView,
    Filters,
    HitView,
    SearchRequest,
    SearchView,
)
from nexus.node.memory.embedders import external_model
from nexus.node.memory.mapping import best_map
from nexus.node.memory.parts import Parts
from nexus.node.memory.searching import ANSWERED, PEERS_MAX, Answer
from nexus.node.memory.views import block_view
from nexus.storage.memory import records
from nexus.storage.memory.records import Near, Query, State, StoredBlock

COLLECTIONS_ASKED_MAX = 16
# A user waits no longer for what others say of a block.
RECEIPTS_TIMEOUT_S = 2.0


class Reading:
    """See `nexus.node.memory.api` for what is promised."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def search(self, request: SearchRequest) -> SearchView:
        began_s = trio.current_time()
        embedder: Embedder
        if request.vector:
            given = external_model(request.vector_model, request.vector_fingerprint, len(request.vector))
            embedder, vector = given, given.take([list(request.vector)])[0]
        else:
            embedder = await self._parts.embedders.get(request.model)
            vector = (await trio.to_thread.run_sync(embedder.embed, [request.text]))[0]
        filters = await self._filters(request.filters, look_around=request.network)
        space_map = await trio.to_thread.run_sync(self._map, embedder, filters.collections)
        if space_map is not None:
            try:
                vector = space_map.apply(vector[None])[0]
            except UsageError:
                # Its author's affair: without it the words are left.
                space_map = None
        query = Query(
            k=request.k,
            vector=vector,
            fingerprint=space_map.target if space_map is not None else embedder.fingerprint,
            text=request.text,
            hybrid=request.hybrid,
            filters=filters,
        )
        if request.network:
            asked = await self._whom_to_ask(query.filters.collections, request.deadline_s / 2)
            answer = await self._parts.searching.everywhere(query, asked, request.deadline_s)
        else:
            answer = await self._parts.searching.here(query)
        return await self._search_view(answer, embedder, space_map, trio.current_time() - began_s)

    def _map(self, embedder: Embedder, collections: Sequence[bytes]) -> SpaceMap | None:
        """How to ask where there are vectors, and none of this embedder's."""
        chosen = set(collections) or set(self._parts.charters.followed())
        spaces = [space for space in self._parts.store.stats().spaces if space.collection in chosen and space.vectors]
        if not spaces or any(space.fingerprint == embedder.fingerprint for space in spaces):
            return None
        found = best_map(self._parts.store, sorted(chosen), embedder.fingerprint, embedder.dimension, self._parts.now_ms())
        return found if found is not None and any(space.fingerprint == found.target for space in spaces) else None

    async def _whom_to_ask(self, collections: Sequence[bytes], deadline_s: float) -> list[tuple[Charter, str]]:
        """(collection, peer) for each collection that is searched, or that is followed; who is found on the DHT in time as well."""
        chosen = list(collections or self._parts.charters.followed())[:COLLECTIONS_ASKED_MAX]
        peers = {collection: dict.fromkeys(self._parts.syncing.peers_of(collection)) for collection in chosen}

        async def look(collection: bytes) -> None:
            await self._parts.finding.followers(collection, lambda peer: peers[collection].setdefault(peer))

        with trio.move_on_after(deadline_s):
            async with trio.open_nursery() as nursery:
                for collection in chosen:
                    nursery.start_soon(look, collection)
        found = [(collection, peer) for collection in chosen for peer in list(peers[collection])[:PEERS_MAX]]
        # What is looked into without being followed is known as well, or nobody was found that has it.
        known = [(self._parts.charters.find(collection), peer) for collection, peer in found[: 4 * PEERS_MAX]]
        return [(charter, peer) for charter, peer in known if charter is not None]

    async def _search_view(self, answer: Answer, embedder: Embedder, space_map: SpaceMap | None, took_s: float) -> SearchView:
        blocks = [hit.block for hit in answer.result.hits if hit.block is not None]
        brackets = await trio.to_thread.run_sync(self._parts.witnessing.brackets, blocks)
        names = self._parts.names()
        hits = tuple(
            HitView(
                block_view(hit.block, brackets[hit.id], self._parts.charters, self._parts.names, whole=False),
                hit.score,
                hit.cosine,
                answer.sources.get(hit.id, ""),
            )
            for hit in answer.result.hits
            if hit.block is not None
        )
        explain = answer.result.explain
        lines = [f"{path}: compared {count}" for path, count in zip(explain.paths, explain.candidates, strict=True)]
        if space_map is not None:
            lines.insert(
                0, f"no vectors of {embedder.name} here: asked through a map, recall {space_map.recall:.2f} by its author's word"
            )
        lines += [f"{step}: {seconds * 1000:.2f} ms" for step, seconds in explain.seconds.items()]
        lines += [
            f"{peer.peer_id}: {peer.outcome}, {peer.blocks} good blocks, {peer.refused} refused, {peer.took_s * 1000:.0f} ms"
            for peer in answer.heard
        ]
        return SearchView(
            hits=hits,
            model=embedder.name,
            took_s=took_s,
            complete=all(peer.outcome == ANSWERED for peer in answer.heard),
            asked=tuple(
                AskedView(peer.peer_id, names.get(peer.peer_id, ""), peer.outcome, peer.blocks, peer.took_s)
                for peer in answer.heard
            ),
            explain=tuple(lines),
        )

    async def get(self, block: str, *, network: bool) -> BlockView:
        try:
            stored = await self.stored(block)
            if stored.block is not None or not network or stored.state in (State.REMOVED, State.EXPIRED):
                await self._receipts_now(stored)
                return await self.view(stored, whole=True)
        except NotFoundError:
            if not network:
                raise
        return await self._fetch(_whole_id(block))

    async def _receipts_now(self, stored: StoredBlock) -> None:
        """Ask once for what attests a block that a user looks at."""
        with trio.move_on_after(RECEIPTS_TIMEOUT_S):
            for peer_id in self._parts.syncing.peers_of(stored.collection)[:2]:
                with suppress(PeerError, TimedOutError, CapacityError, LocalError):
                    await self._parts.witnessing.ask_peer(peer_id, [stored.id])

    async def _fetch(self, identifier: bytes) -> BlockView:
        """A block that is not here. It is kept where its collection is followed, else only shown."""
        peer_id, batch = await self._parts.finding.block(identifier)
        (opened,) = open_batch(batch)
        collection = opened.block.collection
        if self._parts.charters.find(collection) is None:
            answer = await self._parts.asking.collections(peer_id, ids=[collection])
            self._parts.charters.note(answer.charters, [collection])
        if self._parts.charters.follows(collection):
            taken = await self._parts.accepting.take([batch], public_key_of(peer_id))
            stored = await trio.to_thread.run_sync(self._parts.store.get, identifier)
            if stored is not None:
                return await self.view(stored, whole=True)
            refused = taken.refused
        else:
            refused = [(identifier, refusal) for refusal in self._parts.accepting.check_kept([opened]) if refusal is not None]
        if refused:
            raise VerificationError(f"the block that {peer_id} has does not hold: {refused[0][1].cause}", peer=peer_id)
        content = self._parts.accepting.content_of(opened.block)
        shown = StoredBlock(
            id=identifier,
            state=State.LIVE,
            collection=collection,
            author=opened.block.author,
            kind=opened.block.kind,
            created_ms=opened.block.created_ms,
            expires_ms=opened.block.expires_ms,
            received_ms=self._parts.now_ms(),
            sender=public_key_of(peer_id),
            pinned=False,
            data=opened.data,
            block=opened.block,
            content=content,
        )
        return await self.view(shown, whole=True)

    async def listed(self, filters: Filters, limit: int) -> list[BlockView]:
        wanted = await self._filters(filters)
        blocks = await trio.to_thread.run_sync(self._parts.store.listing, wanted, min(limit, LIST_MAX), self._parts.now_ms())
        brackets = await trio.to_thread.run_sync(self._parts.witnessing.brackets, blocks)
        return [block_view(stored, brackets[stored.id], self._parts.charters, self._parts.names, whole=False) for stored in blocks]

    async def view(self, stored: StoredBlock, *, whole: bool) -> BlockView:
        brackets: dict[bytes, Bracket] = await trio.to_thread.run_sync(self._parts.witnessing.brackets, [stored])
        return block_view(stored, brackets[stored.id], self._parts.charters, self._parts.names, whole=whole)

    async def _filters(self, filters: Filters, *, look_around: bool = False) -> records.Filters:
        """With ids for names. `look_around`: a collection that is not known here may be known to others."""
        collections = []
        for reference in filters.collections:
            try:
                collections.append(self._parts.charters.resolve(reference).id)
            except NotFoundError:
                if not look_around:
                    raise
                signed, _ = await self._parts.finding.collection(reference, None)
                self._parts.charters.note([signed.to_bytes()], [signed.charter.id])
                collections.append(signed.charter.id)
        near = Near(*filters.near, filters.near_km) if filters.near is not None else None
        return records.Filters(
            collections=tuple(collections),
            tags=filters.tags,
            authors=tuple(public_key_of(self._parts.find_peer(author)) for author in filters.authors),
            langs=(filters.lang,) if filters.lang else (),
            kinds=(CONTENT, SEALED),
            since_ms=filters.since_ms or 0,
            until_ms=filters.until_ms or 0,
            near=near,
        )

    async def resolve(self, block: str) -> bytes:
        """The id that a user means by a CID or the start of one. Raises NotFoundError, UsageError."""
        found = await trio.to_thread.run_sync(self._parts.store.find, block, 3)
        if len(found) > 1:
            raise UsageError(f"{block!r} fits several blocks", f"Say more of the id: {', '.join(map(id_text, found))}")
        if not found:
            raise NotFoundError(
                f"no block {block!r} is here", "`nexus memory ls` lists those that are; `get --network` asks others"
            )
        return found[0]

    async def stored(self, block: str) -> StoredBlock:
        stored = await trio.to_thread.run_sync(self._parts.store.get, await self.resolve(block))
        if stored is None:
            raise NotFoundError(f"the block {block!r} is gone", "It was damaged or dropped; peers may still have it: get --network")
        return stored


def _whole_id(text: str) -> bytes:
    """An id that is to be found elsewhere. Raises UsageError."""
    try:
        return parse_id(text.strip())
    except MalformedError as error:
        raise UsageError(f"{text[:80]!r} is not the whole id of a block", "To find it at others, give all 59 characters") from error
