"""The shared memory of a node, put together: what users ask of it, and what runs in the background. See `nexus.node.memory.api`."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
import trio

from nexus.core.encoding import decode, encode
from nexus.core.errors import (
    LocalError,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UsageError,
    VerificationError,
)
from nexus.core.hashing import HASH_BYTES
from nexus.core.keys import Identity, public_key_of
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.external import ExternalVectors
from nexus.engine.embedding.opening import Stored
from nexus.memory import collection as rules
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import AFTER_MAX, id_text, parse_id
from nexus.memory.bracket import Bracket
from nexus.memory.collection import Charter, SignedCharter
from nexus.memory.item_set import Item
from nexus.memory.quantise import quantise
from nexus.memory.sky.kernel import SkyKernel
from nexus.network.transport import Transport
from nexus.node.memory.accepting import Accepting, reasons
from nexus.node.memory.api import (
    AddedView,
    AddRequest,
    AskedView,
    BlockView,
    CollectionStats,
    CollectionView,
    ExportPart,
    Filters,
    HitView,
    ImportView,
    PruneRequest,
    PruneView,
    ReindexView,
    SearchRequest,
    SearchView,
    StatsView,
    SyncView,
    VerifyView,
    WitnessView,
)
from nexus.node.memory.asking import Answering, Asking
from nexus.node.memory.charters import Charters
from nexus.node.memory.embedders import Embedders
from nexus.node.memory.finding import Finding
from nexus.node.memory.searching import ANSWERED, PEERS_MAX, Answer, Searching
from nexus.node.memory.syncing import Syncing
from nexus.node.memory.views import block_view, collection_view
from nexus.node.memory.witnessing import Witnessing
from nexus.node.memory.writing import Document, Writing
from nexus.node.options import MemoryOptions
from nexus.node.progress import Progress
from nexus.storage.home import Home
from nexus.storage.memory import records
from nexus.storage.memory.records import Near, Query, State, StoredBlock, VectorRow
from nexus.storage.memory.store import MemoryStore
from nexus.storage.sky_tables import load_sky_kernel

log = structlog.get_logger("nexus.memory")

T = TypeVar("T")

EXPORT_BLOCKS = 256
PART_BYTES_MAX = 1024 * 1024
REINDEX_AT_ONCE = 256
MAINTAIN_EVERY_S = 1.0
EXPIRE_EVERY_S = 5.0
REASONS_MAX = 5
LIST_MAX = 1000
_CHARTER_PART, _BATCH_PART = 1, 2


def open_memory(home: Home, options: MemoryOptions) -> tuple[MemoryStore, SkyKernel]:
    """The store of a node and the sky to check its blocks by; some tenths of a second. Raises LocalError."""
    store = MemoryStore(home.memory, bytes_max=options.disk_max_bytes, author_bytes_max=options.author_max_bytes)
    try:
        return store, load_sky_kernel()
    except BaseException:
        store.close()
        raise


class Tell(Protocol):
    """Runs long work in a task of the node: its progress as it comes, then what it returned."""

    def __call__(self, work: Callable[[Callable[[Progress], None]], Awaitable[T]], /) -> AsyncGenerator[Progress | T, None]: ...


class Memory:
    """`find_peer`: a peer that a user names. `names`: what nodes call themselves, by peer id. `told`: see `Tell`."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        store: MemoryStore,
        sky: SkyKernel,
        options: MemoryOptions,
        stored_models: Stored,
        take_in_model: Callable[[str], Awaitable[None]],
        threads: int,
        find_peer: Callable[[str], str],
        names: Callable[[], dict[str, str]],
        told: Tell,
        now_ms: Callable[[], int],
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._store = store
        self._options = options
        self._find_peer = find_peer
        self._names = names
        self._told = told
        self._now_ms = now_ms
        self._embedders = Embedders(options.model, stored_models, take_in_model, threads)
        self._charters = Charters(store, identity, now_ms)
        self._accepting = Accepting(store, self._charters, sky.check_stamps, now_ms, self._added)
        self._asking = Asking(transport)
        self._syncing = Syncing(
            transport,
            store,
            self._charters,
            self._asking,
            self._accepting.from_sync,
            self._charters_changed,
            options.blocks_per_peer_s,
        )
        self._witnessing = Witnessing(
            identity,
            store,
            self._asking,
            self._syncing.peers_of,
            now_ms,
            every_s=options.witness_every_s,
            wanted=options.witnesses,
            trusted=frozenset(map(public_key_of, options.trusted_witnesses)) or None,
        )
        place = (*options.place, round(options.place_step * 100)) if options.place is not None else None
        self._writing = Writing(identity, store, self._charters, self._accepting, sky, place, self._after, now_ms)
        self._searching = Searching(
            store, self._charters, self._accepting, self._asking, sky.check_stamps, now_ms, self._syncing.offend
        )
        self._finding = Finding(transport, self._charters, self._asking, self._newest_own)
        self._answering = Answering(transport, store, self._charters, self._searching.for_peer, self._witnessing.attested)
        self._write_lock = trio.Lock()
        self._newest: list[bytes] = []
        self._notices: Counter[str] = Counter()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, keep collections the same as on other nodes, and keep the store in order, until cancelled."""
        await trio.to_thread.run_sync(self._load)
        self._answering.start()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._syncing.run)
            await nursery.start(self._witnessing.run)
            nursery.start_soon(self._keep_maintaining)
            nursery.start_soon(self._keep_expiring)
            task_status.started()

    def _load(self) -> None:
        self._charters.load()
        self._witnessing.load()
        self._newest = self._read_newest_own(128)

    def announced(self) -> list[bytes]:
        """DHT keys that this node wants announced for its memory."""
        return self._finding.announced()

    # --- events ------------------------------------------------------------------------------------------------------------------

    def _added(self, collection: bytes, items: Sequence[Item], /, *, tombstones: bool, own: bool) -> None:
        self._syncing.added(collection, items)
        self._witnessing.added(collection, items, own=own)
        if tombstones:
            self._syncing.changed(collection)
        charter = self._charters.find(collection)
        if own and charter is not None and charter.mode != rules.PRIVATE:
            self._newest = [*(item.id for item in reversed(items)), *self._newest][:128]

    async def _charters_changed(self, collections: Sequence[bytes]) -> None:
        """Other rules, or new keys: versions are decided anew, and what could not be read may be readable now."""
        for collection in collections:
            await trio.to_thread.run_sync(self._store.resolve, collection, self._accepting.rule)
            while True:
                opened = await trio.to_thread.run_sync(self._read_sealed, collection)
                if not opened:
                    break
            self._syncing.changed(collection)

    def _read_sealed(self, collection: bytes) -> int:
        """Some sealed blocks that can be read now; how many."""
        contents = []
        for identifier, stored in self._store.get_many(self._store.unread(collection, 4096)).items():
            content = self._accepting.content_of(stored.block) if stored.block else None
            if content is not None:
                contents.append((identifier, content))
        return self._store.read_sealed(contents) if contents else 0

    async def _keep_maintaining(self) -> None:
        while True:
            try:
                more = await trio.to_thread.run_sync(self._store.maintain)
            except LocalError as error:
                log.error("maintenance_failed", reason=error.cause, fix=error.fix)
                more = False
            while self._store.notices:
                notice = self._store.notices.pop(0)
                self._notices[notice] += 1
                log.warning("store", notice=notice)
            await trio.sleep(0.01 if more else MAINTAIN_EVERY_S)

    async def _keep_expiring(self) -> None:
        while True:
            await trio.sleep(EXPIRE_EVERY_S)
            try:
                gone = await trio.to_thread.run_sync(self._store.expire, self._now_ms())
            except LocalError as error:
                log.error("expiry_failed", reason=error.cause, fix=error.fix)
                continue
            if gone:
                found = await trio.to_thread.run_sync(self._store.get_many, gone)
                for collection in {stored.collection for stored in found.values()}:
                    self._syncing.changed(collection)

    # --- writing -----------------------------------------------------------------------------------------------------------------

    async def add(self, request: AddRequest) -> AsyncGenerator[Progress | AddedView, None]:
        async def work(tell: Callable[[Progress], None]) -> AddedView:
            async with self._write_lock:
                charter = await self._writable(request.collection)
                document = await self._document(request)
                # A vector that is handed in needs no model.
                embedder = await self._embedders.get() if document.vector is None else None

                def report(phase: str, done: int, total: int) -> None:
                    trio.from_thread.check_cancelled()
                    trio.from_thread.run_sync(tell, Progress(self._identity.peer_id, phase, done, total))

                ids, known = await self._writing.add(charter, document, embedder, report)
                return AddedView(self._charters.name(charter.id), tuple(map(id_text, ids)), known)

        async with aclosing(self._told(work)) as events:
            async for event in events:
                yield event

    async def _writable(self, reference: str) -> Charter:
        """The collection that a user writes in; the default one is made when it is first used, and is private."""
        try:
            return self._charters.resolve(reference)
        except NotFoundError:
            if reference != "main":
                raise
        charter = await trio.to_thread.run_sync(self._charters.create, "main", rules.PRIVATE, (), "", b"")
        self._syncing.followed(charter.id)
        return charter

    async def _document(self, request: AddRequest) -> Document:
        links = tuple([await self._resolve(link) for link in request.links])
        parents: tuple[bytes, ...] = ()
        if request.replaces is not None:
            stored = await self._stored(request.replaces)
            heads = stored.versions.heads if stored.versions else ()
            parents = tuple(heads) or (stored.id,)
        vector = None
        if request.vector:
            fingerprint = None
            if request.vector_fingerprint:
                try:
                    fingerprint = bytes.fromhex(request.vector_fingerprint)
                except ValueError as error:
                    raise UsageError("the fingerprint of the vector's model is not hex", f"It has {HASH_BYTES} bytes") from error
            vector = (ExternalVectors(request.vector_model, len(request.vector), fingerprint), request.vector)
        return Document(
            text=request.text,
            title=request.title,
            tags=tuple(sorted(set(request.tags))),
            lang=request.lang,
            ttl_ms=round(request.ttl_s * 1000) if request.ttl_s else 0,
            links=links,
            parents=parents,
            vector=vector,
        )

    async def _after(self, collection: bytes) -> list[bytes]:
        """What a new block says it comes after: the newest of what others signed."""
        half = AFTER_MAX // 2

        def newest() -> list[bytes]:
            heads = self._store.get_many(self._store.heads(collection, 32)).values()
            others = [stored for stored in heads if stored.author != self._identity.public_key]
            return [stored.id for stored in sorted(others, key=lambda each: (-each.created_ms, each.id))[:half]]

        return [*self._witnessing.newest_attestations(half), *await trio.to_thread.run_sync(newest)]

    async def remove(self, block: str) -> tuple[str, ...]:
        async with self._write_lock:
            return tuple(map(id_text, await self._writing.remove(await self._stored(block))))

    async def pin(self, block: str, pinned: bool) -> BlockView:
        stored = await self._stored(block)
        await trio.to_thread.run_sync(self._store.pin, stored.id, pinned)
        return await self._view(await self._stored(block), whole=False)

    async def prune(self, request: PruneRequest) -> PruneView:
        older_ms = round(request.older_than_s * 1000) if request.older_than_s is not None else None
        report = await trio.to_thread.run_sync(
            partial(self._store.prune, older_ms, request.bytes_max, self._now_ms(), dry_run=request.dry_run)
        )
        return PruneView(len(report.ids), report.size, request.dry_run)

    # --- reading -----------------------------------------------------------------------------------------------------------------

    async def search(self, request: SearchRequest) -> SearchView:
        began_s = trio.current_time()
        embedder = await self._embedders.get(request.model)
        vector = (await trio.to_thread.run_sync(embedder.embed, [request.text]))[0]
        query = Query(
            k=request.k,
            vector=vector,
            fingerprint=embedder.fingerprint,
            text=request.text,
            hybrid=request.hybrid,
            filters=await self._filters(request.filters, look_around=request.network),
        )
        if request.network:
            asked = await self._whom_to_ask(query.filters.collections)
            answer = await self._searching.everywhere(query, asked, request.deadline_s)
        else:
            answer = await self._searching.here(query)
        return await self._search_view(answer, embedder, trio.current_time() - began_s)

    async def _whom_to_ask(self, collections: Sequence[bytes]) -> list[tuple[Charter, str]]:
        """(collection, peer) for each collection that is searched, or that is followed."""
        found: dict[tuple[bytes, str], None] = {}
        for collection in collections or self._charters.followed():
            peers = dict.fromkeys(self._syncing.peers_of(collection))
            peers |= dict.fromkeys(await self._finding.followers(collection))
            found |= dict.fromkeys((collection, peer) for peer in list(peers)[:PEERS_MAX])
        return [(self._charters.of(collection), peer) for collection, peer in list(found)[: 4 * PEERS_MAX]]

    async def _search_view(self, answer: Answer, embedder: Embedder, took_s: float) -> SearchView:
        blocks = [hit.block for hit in answer.result.hits if hit.block is not None]
        brackets = await trio.to_thread.run_sync(self._witnessing.brackets, blocks)
        names = self._names()
        hits = tuple(
            HitView(
                block_view(hit.block, brackets[hit.id], self._charters, self._names, whole=False),
                hit.score,
                hit.cosine,
                answer.sources.get(hit.id, ""),
            )
            for hit in answer.result.hits
            if hit.block is not None
        )
        explain = answer.result.explain
        lines = [f"{path}: compared {count}" for path, count in zip(explain.paths, explain.candidates, strict=True)]
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
            stored = await self._stored(block)
            if stored.block is not None or not network or stored.state in (State.REMOVED, State.EXPIRED):
                await self._receipts_now(stored)
                return await self._view(stored, whole=True)
        except NotFoundError:
            if not network:
                raise
        return await self._fetch(_whole_id(block))

    async def _receipts_now(self, stored: StoredBlock) -> None:
        """Ask once for what attests a block that a user looks at."""
        for peer_id in self._syncing.peers_of(stored.collection)[:2]:
            with suppress(PeerError, TimedOutError):
                await self._witnessing.ask_peer(peer_id, [stored.id])

    async def _fetch(self, identifier: bytes) -> BlockView:
        """A block that is not here. It is kept where its collection is followed, else only shown."""
        peer_id, batch = await self._finding.block(identifier)
        (opened,) = open_batch(batch)
        collection = opened.block.collection
        if self._charters.find(collection) is None:
            answer = await self._asking.collections(peer_id, ids=[collection])
            self._charters.note(answer.charters, [collection])
        if self._charters.follows(collection):
            taken = await self._accepting.take([batch], public_key_of(peer_id))
            stored = await trio.to_thread.run_sync(self._store.get, identifier)
            if stored is not None:
                return await self._view(stored, whole=True)
            refused = taken.refused
        else:
            refused = [(identifier, refusal) for refusal in self._accepting.check_kept([opened]) if refusal is not None]
        if refused:
            raise VerificationError(f"the block that {peer_id} has does not hold: {refused[0][1].cause}", peer=peer_id)
        content = self._accepting.content_of(opened.block)
        shown = StoredBlock(
            id=identifier,
            state=State.LIVE,
            collection=collection,
            author=opened.block.author,
            kind=opened.block.kind,
            created_ms=opened.block.created_ms,
            expires_ms=opened.block.expires_ms,
            received_ms=self._now_ms(),
            sender=public_key_of(peer_id),
            pinned=False,
            data=opened.data,
            block=opened.block,
            content=content,
        )
        return await self._view(shown, whole=True)

    async def listed(self, filters: Filters, limit: int) -> list[BlockView]:
        wanted = await self._filters(filters)
        blocks = await trio.to_thread.run_sync(self._store.listing, wanted, min(limit, LIST_MAX), self._now_ms())
        brackets = await trio.to_thread.run_sync(self._witnessing.brackets, blocks)
        return [block_view(stored, brackets[stored.id], self._charters, self._names, whole=False) for stored in blocks]

    async def _view(self, stored: StoredBlock, *, whole: bool) -> BlockView:
        brackets: dict[bytes, Bracket] = await trio.to_thread.run_sync(self._witnessing.brackets, [stored])
        return block_view(stored, brackets[stored.id], self._charters, self._names, whole=whole)

    async def _filters(self, filters: Filters, *, look_around: bool = False) -> records.Filters:
        """With ids for names. `look_around`: a collection that is not known here may be known to others."""
        collections = []
        for reference in filters.collections:
            try:
                collections.append(self._charters.resolve(reference).id)
            except NotFoundError:
                if not look_around:
                    raise
                signed, _ = await self._finding.collection(reference, None)
                self._charters.note([signed.to_bytes()], [signed.charter.id])
                collections.append(signed.charter.id)
        near = Near(*filters.near, filters.near_km) if filters.near is not None else None
        return records.Filters(
            collections=tuple(collections),
            tags=filters.tags,
            authors=tuple(public_key_of(self._find_peer(author)) for author in filters.authors),
            langs=(filters.lang,) if filters.lang else (),
            since_ms=filters.since_ms or 0,
            until_ms=filters.until_ms or 0,
            near=near,
        )

    async def _resolve(self, block: str) -> bytes:
        """The id that a user means by a CID or the start of one. Raises NotFoundError, UsageError."""
        found = await trio.to_thread.run_sync(self._store.find, block, 3)
        if len(found) > 1:
            raise UsageError(f"{block!r} fits several blocks", f"Say more of the id: {', '.join(map(id_text, found))}")
        if not found:
            raise NotFoundError(
                f"no block {block!r} is here", "`nexus memory ls` lists those that are; `get --network` asks others"
            )
        return found[0]

    async def _stored(self, block: str) -> StoredBlock:
        stored = await trio.to_thread.run_sync(self._store.get, await self._resolve(block))
        if stored is None:
            raise NotFoundError(f"the block {block!r} is gone", "It was damaged or dropped; peers may still have it: get --network")
        return stored

    def _newest_own(self, most: int) -> list[bytes]:
        return self._newest[:most]

    def _read_newest_own(self, most: int) -> list[bytes]:
        public = tuple(each for each in self._charters.followed() if self._charters.of(each).mode != rules.PRIVATE)
        if not public:
            return []
        own = records.Filters(collections=public, authors=(self._identity.public_key,))
        return [stored.id for stored in self._store.listing(own, most, self._now_ms())]

    # --- upkeep ------------------------------------------------------------------------------------------------------------------

    async def stats(self) -> StatsView:
        stats = await trio.to_thread.run_sync(self._store.stats)
        disk = await trio.to_thread.run_sync(_disk_bytes, self._store)
        collections = tuple(
            CollectionStats(
                collection=self._charters.name(collection),
                live=live,
                bytes=size,
                vectors=tuple((space.model, space.vectors) for space in stats.spaces if space.collection == collection),
            )
            for collection, live, size in stats.collections
        )
        return StatsView(
            collections=collections,
            blocks=tuple((state.name.lower(), stats.blocks.get(state, 0)) for state in State),
            bytes=stats.size,
            bytes_max=stats.size_max,
            disk_bytes=disk,
            model=self._options.model,
            notices=tuple(self._notices),
        )

    async def export(self, collections: Sequence[str]) -> AsyncGenerator[ExportPart, None]:
        chosen = [self._charters.resolve(name).id for name in collections] or [charter.id for charter in self._charters.all()]
        for collection in chosen:
            signed = self._charters.signed(collection)
            if signed is not None:
                yield ExportPart(encode((_CHARTER_PART, signed.to_bytes())), 0)
            items = await trio.to_thread.run_sync(lambda each=collection: list(self._store.items(each)))
            ids = [item.id for item in items if item.state in (State.LIVE, State.SUPERSEDED)]
            while ids:
                batches = await trio.to_thread.run_sync(self._store.batches, ids[:EXPORT_BLOCKS], PART_BYTES_MAX)
                for batch in batches:
                    yield ExportPart(encode((_BATCH_PART, batch.to_bytes())), len(batch.blocks))
                sent = sum(len(batch.blocks) for batch in batches)
                # What is damaged is left out: it was noticed and is asked of peers again.
                ids = ids[max(sent, 1) if sent < len(ids[:EXPORT_BLOCKS]) else EXPORT_BLOCKS :]

    async def import_part(self, content: bytes) -> ImportView:
        if len(content) > 2 * PART_BYTES_MAX:
            raise UsageError(
                f"a part of an export has at most {2 * PART_BYTES_MAX} bytes", "Is this a file of nexus memory export?"
            )
        kind, data = _part(content)
        if kind == _CHARTER_PART:
            signed = SignedCharter.from_bytes(data)
            charter = signed.verify()
            await trio.to_thread.run_sync(self._charters.take, signed)
            if not self._charters.follows(charter.id):
                await trio.to_thread.run_sync(self._charters.follow, charter.id)
            self._syncing.followed(charter.id)
            return ImportView(0, 0, 0, ())
        taken = await self._accepting.take([SignedBatch.from_bytes(data)], b"")
        return ImportView(len(taken.new), taken.known, len(taken.refused), reasons(taken.refused, REASONS_MAX))

    async def verify(self, block: str | None) -> AsyncGenerator[Progress | VerifyView, None]:
        identifier = await self._resolve(block) if block is not None else None

        async def work(tell: Callable[[Progress], None]) -> VerifyView:
            def report(done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                trio.from_thread.run_sync(tell, Progress(self._identity.peer_id, "verify", done, total))

            ids = [identifier] if identifier is not None else None
            kept = await trio.to_thread.run_sync(self._store.verify, ids, report)
            signed, problems = await trio.to_thread.run_sync(self._check_again, ids, report)
            for collection in self._charters.followed() if kept.damaged else ():
                self._syncing.changed(collection)
            problems = [f"{id_text(each)}: damaged on the disk, and dropped" for each in kept.damaged[:REASONS_MAX]] + problems
            return VerifyView(max(kept.checked, signed), len(kept.damaged), len(kept.repaired), (*problems, *kept.repaired))

        async with aclosing(self._told(work)) as events:
            async for event in events:
                yield event

    def _check_again(self, ids: list[bytes] | None, report: Callable[[int, int], None]) -> tuple[int, list[str]]:
        """Signatures, sky and rules of what is stored: how many blocks, and what does not hold."""
        every = ids if ids is not None else [item.id for each in self._charters.all() for item in self._store.items(each.id)]
        checked, problems = 0, []
        for at in range(0, len(every), EXPORT_BLOCKS):
            for batch in self._store.batches(every[at : at + EXPORT_BLOCKS], 1 << 30):
                try:
                    opened = open_batch(batch)
                except PeerError as error:
                    problems.append(f"a batch of {len(batch.blocks)} blocks: {error.cause}")
                    continue
                checked += len(opened)
                for one, refusal in zip(opened, self._accepting.check_kept(opened), strict=True):
                    if refusal is not None:
                        problems.append(f"{id_text(one.id)}: {refusal.cause}")
            report(min(at + EXPORT_BLOCKS, len(every)), len(every))
        return checked, problems[:100]

    async def reindex(self, model: str, collection: str | None) -> AsyncGenerator[Progress | ReindexView, None]:
        chosen = [self._charters.resolve(collection).id] if collection is not None else self._charters.followed()

        async def work(tell: Callable[[Progress], None]) -> ReindexView:
            embedder = await self._embedders.get(model)
            embedded = missing = 0
            for each in chosen:
                done, without = await self._reindex(each, embedder, tell)
                embedded, missing = embedded + done, missing + without
            return ReindexView(embedder.name, embedded, missing)

        async with aclosing(self._told(work)) as events:
            async for event in events:
                yield event

    async def _reindex(self, collection: bytes, embedder: Embedder, tell: Callable[[Progress], None]) -> tuple[int, int]:
        """How many blocks got a vector, and how many have no text here to make one of."""
        every = await trio.to_thread.run_sync(self._store.missing_vectors, collection, embedder.fingerprint, 1 << 30)
        done = without = 0
        for at in range(0, len(every), REINDEX_AT_ONCE):

            def step(ids: list[bytes] = every[at : at + REINDEX_AT_ONCE]) -> tuple[int, int]:
                contents = [
                    (identifier, stored.content) for identifier, stored in self._store.get_many(ids).items() if stored.content
                ]
                texts = [
                    (each, "\n\n".join(filter(None, (content.title, content.text)))) for each, content in contents if content.text
                ]
                if texts:
                    codes, scales = quantise(embedder.embed([text for _, text in texts]))
                    rows = [
                        VectorRow(identifier, int(scales[number]), codes[number].tobytes())
                        for number, (identifier, _) in enumerate(texts)
                    ]
                    self._store.add_vectors(collection, embedder.fingerprint, embedder.name, rows)
                return len(texts), len(ids) - len(texts)

            new, empty = await trio.to_thread.run_sync(step)
            done, without = done + new, without + empty
            tell(Progress(self._identity.peer_id, "embed", min(at + REINDEX_AT_ONCE, len(every)), len(every)))
        return done, without

    # --- collections -------------------------------------------------------------------------------------------------------------

    async def collections(self) -> list[CollectionView]:
        stats = await trio.to_thread.run_sync(self._store.stats)
        held = {collection: (live, size) for collection, live, size in stats.collections}
        return [self._collection_view(charter, held) for charter in self._charters.all()]

    def _collection_view(self, charter: Charter, held: dict[bytes, tuple[int, int]]) -> CollectionView:
        return collection_view(
            charter, self._charters, self._names, self._identity.public_key, self._now_ms(), held.get(charter.id, (0, 0))
        )

    async def _one_collection(self, charter: Charter) -> CollectionView:
        stats = await trio.to_thread.run_sync(self._store.stats)
        return self._collection_view(charter, {collection: (live, size) for collection, live, size in stats.collections})

    async def create_collection(self, name: str, mode: str, writers: Sequence[str]) -> CollectionView:
        if mode not in ("public", "writers", "private"):
            raise UsageError(f"there is no kind of collection {mode!r}", "Choose public, writers or private")
        others = [public_key_of(self._find_peer(writer)) for writer in writers]
        number = rules.MODE_NAMES.index(mode)
        charter = await trio.to_thread.run_sync(self._charters.create, name, number, others, "", b"")
        self._syncing.followed(charter.id)
        return await self._one_collection(charter)

    async def grant(self, collection: str, peer: str, *, write: bool, revoke: bool) -> CollectionView:
        charter = self._charters.resolve(collection)
        key = public_key_of(self._find_peer(peer))
        if revoke:
            # --write takes the right to write and leaves that to read.
            changed = await trio.to_thread.run_sync(
                partial(self._charters.revoke, charter, key, may_still_read=write and charter.mode == rules.PRIVATE)
            )
        else:
            changed = await trio.to_thread.run_sync(partial(self._charters.grant, charter, key, write=write))
        await self._charters_changed([changed.id])
        self._syncing.followed(changed.id)
        return await self._one_collection(changed)

    async def subscribe(self, name: str, peer: str | None) -> CollectionView:
        peer_id = self._find_peer(peer) if peer is not None else None
        charter = self._known(name, peer_id)
        if charter is None:
            signed, grants = await self._finding.collection(name, peer_id)
            charter = signed.charter
            await trio.to_thread.run_sync(self._charters.take, signed)
            for grant in grants:
                await trio.to_thread.run_sync(self._charters.take_grant, grant)
        if not rules.may_read(charter, self._identity.public_key):
            raise NotAllowedError(f"{name!r} is private and you are not in it", "Ask its owner: nexus collection grant")
        await trio.to_thread.run_sync(self._charters.follow, charter.id)
        self._syncing.followed(charter.id)
        return await self._one_collection(charter)

    def _known(self, name: str, peer_id: str | None) -> Charter | None:
        """A collection that is known here, unless a peer is named whose own it is not."""
        try:
            charter = self._charters.resolve(name)
        except NotFoundError:
            return None
        return charter if peer_id is None or charter.owner == public_key_of(peer_id) else None

    async def unsubscribe(self, name: str) -> CollectionView:
        charter = self._charters.resolve(name)
        await trio.to_thread.run_sync(self._charters.unfollow, charter.id)
        self._syncing.unfollowed(charter.id)
        return await self._one_collection(charter)

    async def sync(self, collection: str | None) -> list[SyncView]:
        await self._syncing.sync_now(self._charters.resolve(collection).id if collection is not None else None)
        return await self.sync_status()

    async def sync_status(self) -> list[SyncView]:
        now_s, now_ms, names = trio.current_time(), self._now_ms(), self._names()
        views = []
        for status, received, refused in self._syncing.status():
            since_s = now_s - status.last_success_s if status.last_success_s is not None else None
            state = status.state
            if state == "waiting":
                state = "in sync" if status.in_sync else "behind" if status.missing else "waiting"
            views.append(
                SyncView(
                    collection=self._charters.name(status.collection),
                    peer_id=status.peer,
                    name=names.get(status.peer, ""),
                    state="failing" if state == "retrying" else state,
                    missing=status.missing,
                    received=received,
                    refused=refused,
                    failures=status.failures,
                    last_success_ms=now_ms - round(since_s * 1000) if since_s is not None else 0,
                    next_try_s=max(0.0, status.next_try_s - now_s) if status.next_try_s is not None else 0.0,
                    reason=status.cause,
                )
            )
        return views

    async def witness(self) -> WitnessView:
        last = self._witnessing.last
        return WitnessView(
            issued=self._witnessing.issued,
            at_ms=last.at_ms if last else 0,
            blocks=last.size if last else 0,
            root=last.root if last else b"",
            previous=last.previous if last else b"",
            interval_s=self._witnessing.every_s,
            witnesses_wanted=self._witnessing.wanted,
        )


def _whole_id(text: str) -> bytes:
    """An id that is to be found elsewhere. Raises UsageError."""
    try:
        return parse_id(text.strip())
    except MalformedError as error:
        raise UsageError(f"{text[:80]!r} is not the whole id of a block", "To find it at others, give all 59 characters") from error


def _part(content: bytes) -> tuple[int, bytes]:
    """Kind and bytes of a part of an export. Raises MalformedError."""
    match decode(content, 2):
        case (int(kind), bytes(data)) if kind in (_CHARTER_PART, _BATCH_PART):
            return kind, data
    raise MalformedError("this is no part of an export")


def _disk_bytes(store: MemoryStore) -> int:
    return sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
