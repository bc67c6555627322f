"""A MemoryApi without a store, for tests of what is in front of one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from hashlib import sha256

import trio

from nexus.core.errors import CapacityError, NotAllowedError, NotFoundError, VerificationError
from nexus.core.keys import Identity
from nexus.memory.block import id_text
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
from nexus.node.progress import Progress

OWNER, OTHER = (Identity(bytes([number]) * 32) for number in (1, 4))
NOW_MS = 1_795_000_000_000
DANUBE = (
    "The Danube rises in the Black Forest and flows through ten countries, more than any other river of the world.\n\n"
    "It passes Vienna, Bratislava, Budapest and Belgrade before it reaches the Black Sea by way of a wide delta. "
    "In spring, when the snow of the Alps melts, its level rises by several metres; towns along its banks have built "
    "walls and gates against floods since the Middle Ages, and keep marks of the highest waters on their houses."
)


def identifier(text: str) -> str:
    return id_text(sha256(text.encode()).digest())


def block_view(text: str = DANUBE, **changes: object) -> BlockView:
    view = BlockView(
        id=identifier(text),
        kind="content",
        collection="main",
        author=OWNER.peer_id,
        author_name="al\x1b[31mice",
        created_ms=NOW_MS - 3 * 86_400_000,
        expires_ms=0,
        received_ms=NOW_MS,
        title="Rivers of Europe\x1b[2J",
        lang="en",
        tags=("geography", "water"),
        text=text,
        source=sha256(b"document").hexdigest(),
        part=0,
        links=(identifier("linked"),),
        parents=(),
        models=("minilm",),
        place="48.5, 16.5",
        place_step=1.0,
        grade="bounded",
        not_before_ms=NOW_MS - 4 * 86_400_000,
        not_after_ms=None,
        witnesses=2,
        state="live",
        pinned=False,
        winner=identifier(text),
        heads=(identifier(text),),
        size=1234,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def collection_view(name: str = "main", mode: str = "open") -> CollectionView:
    owner = "" if mode == "open" else OWNER.peer_id
    writers = (OTHER.peer_id,) if mode in ("writers", "private") else ()
    return CollectionView(
        name, sha256(name.encode()).digest(), mode, owner, "fake" if owner else "", 1, writers, (), True, True, True, 12, 9000
    )


class FakeMemory:
    """What there is: one block about the Danube, and whatever a test adds. Texts steer it: "fail at once", "fail half way",
    "crash", "wait" (for ever); so do `damaged`, `complete`, `content` (of the export) and `refused` (of every import)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.known: dict[str, BlockView] = {}
        self.put(block_view())
        self.complete = True
        self.damaged = 0
        self.refused = 0
        self.content = [b"part one", b"part two" * 1000]
        self.imported: list[bytes] = []
        self.cancelled = 0
        self.idle = trio.Event()

    def put(self, view: BlockView) -> None:
        self.known[view.id] = view

    async def add(self, request: AddRequest) -> AsyncGenerator[Progress | AddedView, None]:
        self.calls.append(("add", request))
        if "fail at once" in request.text:
            raise NotAllowedError("this node may not write in 'closed'", "Ask its owner: nexus collection grant")
        try:
            chunks = [chunk for chunk in request.text.split("\n\n") if chunk.strip()] or [request.vector_model]
            for number in range(len(chunks)):
                yield Progress(OWNER.peer_id, "embedding", number, len(chunks))
            if "fail half way" in request.text:
                raise CapacityError("the disk is full", "Make room, then add it again")
            if "crash" in request.text:
                raise ZeroDivisionError("secret detail")
            if "wait" in request.text:
                await trio.sleep_forever()
            views = [block_view(chunk, collection=request.collection, title=request.title) for chunk in chunks]
            new = [view for view in views if view.id not in self.known]
            for view in new:
                self.put(view)
            yield AddedView(request.collection, tuple(view.id for view in new), len(views) - len(new))
        except (trio.Cancelled, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.idle.set()

    async def search(self, request: SearchRequest) -> SearchView:
        self.calls.append(("search", request))
        if request.text == "nothing":
            return SearchView((), "minilm", 0.002, True, (), ())
        hits = tuple(
            HitView(view, 0.9 - 0.1 * rank, None if rank else 0.9, OTHER.peer_id if rank else "")
            for rank, view in enumerate(list(self.known.values())[: request.k])
        )
        asked = (
            AskedView(OTHER.peer_id, "bo\x1b[31mb", "answered", 1, 0.012),
            AskedView(OWNER.peer_id, "carol", "answered" if self.complete else "timed out", 0, 5.0),
        )
        explain = ("the question was embedded by minilm in 3 ms", "1 of 1 blocks passed the filters")
        return SearchView(hits, "minilm", 0.0123, self.complete, asked if request.network else (), explain)

    def _find(self, block: str) -> BlockView:
        found = [view for name, view in self.known.items() if name.startswith(block)]
        if len(found) != 1:
            raise NotFoundError(f"{len(found)} blocks here have an id that begins with {block}", "See: nexus memory ls")
        return found[0]

    async def get(self, block: str, *, network: bool) -> BlockView:
        self.calls.append(("get", network))
        return self._find(block)

    async def listed(self, filters: Filters, limit: int) -> list[BlockView]:
        self.calls.append(("listed", (filters, limit)))
        wanted = filters.collections
        return [view for view in self.known.values() if not wanted or view.collection in wanted][:limit]

    async def remove(self, block: str) -> tuple[str, ...]:
        view = self._find(block)
        if view.author != OWNER.peer_id:
            raise NotAllowedError("only its author can take a block away", "Prune it to have it no longer on this node")
        del self.known[view.id]
        return (view.id, *view.parents)

    async def pin(self, block: str, pinned: bool) -> BlockView:
        self.put(replace(self._find(block), pinned=pinned))
        return self._find(block)

    async def prune(self, request: PruneRequest) -> PruneView:
        self.calls.append(("prune", request))
        return PruneView(3, 4000, request.dry_run)

    async def stats(self) -> StatsView:
        rows = (CollectionStats("main", 12, 9000, (("minilm", 12),)),)
        return StatsView(
            rows, (("live", 12), ("removed", 2)), 9000, 2**31, 20_000, "minilm", ("the index is being built anew\x1b[2J",)
        )

    async def export(self, collections: Sequence[str]) -> AsyncGenerator[ExportPart, None]:
        self.calls.append(("export", tuple(collections)))
        if "missing" in collections:
            raise NotFoundError("there is no collection 'missing'", "See: nexus collection ls")
        for content in self.content:
            yield ExportPart(content, 2)
        if "broken" in collections:
            raise VerificationError("a block on the disk is damaged", "See: nexus memory verify")

    async def import_part(self, content: bytes) -> ImportView:
        self.imported.append(content)
        reasons = ("the signature of a batch does not hold\x1b[2J",) if self.refused else ()
        return ImportView(2 - self.refused, 1, self.refused, reasons)

    async def verify(self, block: str | None) -> AsyncGenerator[Progress | VerifyView, None]:
        self.calls.append(("verify", block))
        yield Progress(OWNER.peer_id, "verifying", 1, 12)
        problems = ("block bafkreix has another hash\x1b[2J",) if self.damaged else ()
        yield VerifyView(12, self.damaged, self.damaged, problems)

    async def reindex(self, model: str, collection: str | None) -> AsyncGenerator[Progress | ReindexView, None]:
        self.calls.append(("reindex", (model, collection)))
        yield Progress(OWNER.peer_id, "embedding", 1, 12)
        yield ReindexView(model, 11, 1, 2)

    async def collections(self) -> list[CollectionView]:
        return [collection_view(), collection_view("no\x1btes", "private")]

    async def create_collection(self, name: str, mode: str, writers: Sequence[str]) -> CollectionView:
        self.calls.append(("create", (name, mode, tuple(writers))))
        return collection_view(name, mode)

    async def grant(self, collection: str, peer: str, *, write: bool, revoke: bool) -> CollectionView:
        self.calls.append(("grant", (collection, peer, write, revoke)))
        return collection_view(collection, "private")

    async def subscribe(self, name: str, peer: str | None) -> CollectionView:
        self.calls.append(("subscribe", (name, peer)))
        if name == "missing":
            raise NotFoundError("nobody in reach has a collection 'missing'", "Name a peer that has it: --from PEER")
        return collection_view(name, "public")

    async def unsubscribe(self, name: str) -> CollectionView:
        self.calls.append(("unsubscribe", name))
        return replace(collection_view(name, "public"), subscribed=False)

    async def sync(self, collection: str | None) -> list[SyncView]:
        self.calls.append(("sync", collection))
        return await self.sync_status()

    async def sync_status(self) -> list[SyncView]:
        return [
            SyncView("main", OTHER.peer_id, "bo\x1b[31mb", "in sync", 0, 41, 0, 0, NOW_MS, 12.0, ""),
            SyncView("notes", OTHER.peer_id, "bob", "demoted", 7, 3, 2, 1, 0, 480.0, "it sent 2 blocks that do not hold"),
        ]

    async def witness(self) -> WitnessView:
        return WitnessView(5, NOW_MS, 120, bytes(range(32)), bytes(32), 60.0, 2)
