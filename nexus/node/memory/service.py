"""The shared memory of a node, put together: what users ask of it, and what runs in the background. See `nexus.node.memory.api`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import structlog
import trio

from nexus.core.errors import (
    NotFoundError,
)
from nexus.core.keys import Identity, public_key_of
from nexus.engine.embedding.opening import Stored
from nexus.memory import collection as rules
from nexus.memory.block import AFTER_MAX, PARENTS_MAX, id_text
from nexus.memory.collection import Charter
from nexus.memory.item_set import Item
from nexus.memory.sky.kernel import SkyKernel
from nexus.network.transport import Transport
from nexus.node.environment import Environment
from nexus.node.memory.accepting import Accepting
from nexus.node.memory.api import (
    AddedView,
    AddRequest,
    BlockView,
    CollectionView,
    ExportPart,
    Filters,
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
from nexus.node.memory.embedders import Embedders, external_model
from nexus.node.memory.finding import Finding
from nexus.node.memory.following import Following
from nexus.node.memory.parts import Parts, Tell
from nexus.node.memory.reading import Reading
from nexus.node.memory.searching import Searching
from nexus.node.memory.syncing import Syncing
from nexus.node.memory.upkeep import Upkeep
from nexus.node.memory.witnessing import Witnessing
from nexus.node.memory.writing import Document, Writing
from nexus.node.options import MemoryOptions
from nexus.node.progress import Progress
from nexus.storage.home import Home
from nexus.storage.memory import records
from nexus.storage.memory.store import MemoryStore
from nexus.storage.sky_tables import load_sky_kernel

log = structlog.get_logger("nexus.memory")

NEWEST_MAX = 128


def open_memory(home: Home, options: MemoryOptions) -> tuple[MemoryStore, SkyKernel]:
    """The store of a node and the sky to check its blocks by; some tenths of a second. Raises LocalError."""
    store = MemoryStore(home.memory, bytes_max=options.disk_max_bytes, author_bytes_max=options.author_max_bytes)
    try:
        return store, load_sky_kernel()
    except BaseException:
        store.close()
        raise


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
        environment: Environment,
    ) -> None:
        now_ms = environment.now_ms
        self._transport = transport
        self._identity = identity
        self._store = store
        self._options = options
        self._find_peer = find_peer
        self._names = names
        self._told = told
        self._now_ms = now_ms
        self._embedders = Embedders(options.model, stored_models, take_in_model, threads)
        self._charters = Charters(store, identity, environment)
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
            environment.rng,
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
        self._writing = Writing(identity, store, self._charters, self._accepting, sky, place, self._after, environment)
        self._searching = Searching(
            store, self._charters, self._accepting, self._asking, sky.check_stamps, now_ms, self._syncing.offend
        )
        self._finding = Finding(transport, self._charters, self._asking, self._newest_own)
        self._answering = Answering(
            transport, store, self._charters, self._searching.for_peer, self._witnessing.attested, self._syncing
        )
        self._write_lock = trio.Lock()
        self._newest: list[bytes] = []
        parts = Parts(
            identity=identity,
            options=options,
            store=store,
            charters=self._charters,
            accepting=self._accepting,
            asking=self._asking,
            syncing=self._syncing,
            witnessing=self._witnessing,
            searching=self._searching,
            finding=self._finding,
            writing=self._writing,
            embedders=self._embedders,
            find_peer=find_peer,
            names=names,
            told=told,
            now_ms=now_ms,
        )
        self._reading = Reading(parts)
        self._upkeep = Upkeep(parts, self._reading.resolve, self._charters_changed)
        self._following = Following(parts, self._charters_changed)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, keep collections the same as on other nodes, and keep the store in order, until cancelled."""
        await trio.to_thread.run_sync(self._load)
        self._answering.start()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._syncing.run)
            await nursery.start(self._witnessing.run)
            nursery.start_soon(self._upkeep.run)
            task_status.started()

    def _load(self) -> None:
        self._charters.load()
        self._witnessing.load()
        self._newest = self._read_newest_own(NEWEST_MAX)

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
            self._newest = [*(item.id for item in reversed(items)), *self._newest][:NEWEST_MAX]

    async def _charters_changed(self, collections: Sequence[bytes]) -> None:
        """Other rules, or new keys: versions are decided anew, and what could not be read may be readable now."""
        for collection in collections:
            forgotten = await trio.to_thread.run_sync(self._accepting.recheck, collection)
            if forgotten:
                log.info("blocks_forgotten", collection=collection.hex()[:16], blocks=forgotten, reason="its charter has changed")
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
        links = tuple([await self._reading.resolve(link) for link in request.links])
        parents: tuple[bytes, ...] = ()
        if request.replaces is not None:
            stored = await self._reading.stored(request.replaces)
            heads = stored.versions.heads if stored.versions else ()
            parents = tuple(heads[:PARENTS_MAX]) or (stored.id,)
        vector = None
        if request.vector:
            model = external_model(request.vector_model, request.vector_fingerprint, len(request.vector))
            vector = (model, request.vector)
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
            return tuple(map(id_text, await self._writing.remove(await self._reading.stored(block))))

    async def pin(self, block: str, pinned: bool) -> BlockView:
        stored = await self._reading.stored(block)
        await trio.to_thread.run_sync(self._store.pin, stored.id, pinned)
        return await self._reading.view(await self._reading.stored(block), whole=False)

    def _newest_own(self, most: int) -> list[bytes]:
        return self._newest[:most]

    def _read_newest_own(self, most: int) -> list[bytes]:
        followed = [charter for charter in self._charters.all() if self._charters.follows(charter.id)]
        public = tuple(charter.id for charter in followed if charter.mode != rules.PRIVATE)
        if not public:
            return []
        own = records.Filters(collections=public, authors=(self._identity.public_key,))
        return [stored.id for stored in self._store.listing(own, most, self._now_ms())]

    # --- what others of this package answer ---------------------------------------------------------------------------------------

    async def search(self, request: SearchRequest) -> SearchView:
        return await self._reading.search(request)

    async def get(self, block: str, *, network: bool) -> BlockView:
        return await self._reading.get(block, network=network)

    async def listed(self, filters: Filters, limit: int) -> list[BlockView]:
        return await self._reading.listed(filters, limit)

    async def prune(self, request: PruneRequest) -> PruneView:
        return await self._upkeep.prune(request)

    async def stats(self) -> StatsView:
        return await self._upkeep.stats()

    def export(self, collections: Sequence[str]) -> AsyncGenerator[ExportPart, None]:
        return self._upkeep.export(collections)

    async def import_part(self, content: bytes) -> ImportView:
        return await self._upkeep.import_part(content)

    def verify(self, block: str | None) -> AsyncGenerator[Progress | VerifyView, None]:
        return self._upkeep.verify(block)

    def reindex(self, model: str, collection: str | None) -> AsyncGenerator[Progress | ReindexView, None]:
        return self._upkeep.reindex(model, collection)

    async def collections(self) -> list[CollectionView]:
        return await self._following.collections()

    async def create_collection(self, name: str, mode: str, writers: Sequence[str]) -> CollectionView:
        return await self._following.create_collection(name, mode, writers)

    async def grant(self, collection: str, peer: str, *, write: bool, revoke: bool) -> CollectionView:
        return await self._following.grant(collection, peer, write=write, revoke=revoke)

    async def subscribe(self, name: str, peer: str | None) -> CollectionView:
        return await self._following.subscribe(name, peer)

    async def unsubscribe(self, name: str) -> CollectionView:
        return await self._following.unsubscribe(name)

    async def sync(self, collection: str | None) -> list[SyncView]:
        return await self._following.sync(collection)

    async def sync_status(self) -> list[SyncView]:
        return await self._following.sync_status()

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
