"""A node's blocks in the mass: counted, pruned, checked, carried from one machine to another, embedded anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial

import structlog
import trio

from nexus.core.encoding import decode, encode
from nexus.core.errors import (
    MalformedError,
    NexusError,
    PeerError,
    UsageError,
)
from nexus.core.manifest import ENCODER
from nexus.engine.embedding.embedder import Embedder
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import id_text
from nexus.memory.collection import SignedCharter
from nexus.memory.quantise import quantise
from nexus.memory.space_map import SpaceMap
from nexus.models import held_out_text
from nexus.node.memory.accepting import reasons
from nexus.node.memory.api import (
    CollectionStats,
    ExportPart,
    ImportView,
    PruneRequest,
    PruneView,
    ReindexView,
    StatsView,
    VerifyView,
)
from nexus.node.memory.mapping import Anchors
from nexus.node.memory.parts import Parts
from nexus.node.progress import Progress
from nexus.storage.memory.records import State, VectorRow
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory")

MAINTAIN_EVERY_S = 1.0
EXPIRE_EVERY_S = 5.0
EXPORT_BLOCKS = 256
PART_BYTES_MAX = 1024 * 1024
REINDEX_AT_ONCE = 256
REASONS_MAX = 5
PROBLEMS_MAX = 100
NOTICES_MAX = 100
_CHARTER_PART, _BATCH_PART = 1, 2


class Upkeep:
    """See `nexus.node.memory.api` for what is promised. `resolve`: the id that a user means. `charters_changed`: told of
    collections whose rules are new."""

    def __init__(
        self,
        parts: Parts,
        resolve: Callable[[str], Awaitable[bytes]],
        charters_changed: Callable[[Sequence[bytes]], Awaitable[None]],
    ) -> None:
        self._parts = parts
        self._resolve = resolve
        self._charters_changed = charters_changed
        self._notices: Counter[str] = Counter()

    async def run(self) -> None:
        """Keep the store in order until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_maintaining)
            nursery.start_soon(self._keep_expiring)

    async def _keep_maintaining(self) -> None:
        while True:
            try:
                more = await trio.to_thread.run_sync(self._parts.store.maintain)
            except NexusError as error:
                log.error("maintenance_failed", reason=error.cause, fix=error.fix)
                more = False
            while self._parts.store.notices:
                notice = self._parts.store.notices.pop(0)
                if notice in self._notices or len(self._notices) < NOTICES_MAX:
                    self._notices[notice] += 1
                log.warning("store", notice=notice)
            await trio.sleep(0.01 if more else MAINTAIN_EVERY_S)

    async def _keep_expiring(self) -> None:
        while True:
            await trio.sleep(EXPIRE_EVERY_S)
            try:
                left = await trio.to_thread.run_sync(self._expire)
            except NexusError as error:
                log.error("expiry_failed", reason=error.cause, fix=error.fix)
                # Some may have gone before it failed.
                left = set(self._parts.charters.followed())
            for collection in left:
                self._parts.syncing.changed(collection)

    def _expire(self) -> set[bytes]:
        """The collections that blocks have left."""
        gone = self._parts.store.expire(self._parts.now_ms())
        return {stored.collection for stored in self._parts.store.get_many(gone).values()} if gone else set()

    async def prune(self, request: PruneRequest) -> PruneView:
        older_ms = round(request.older_than_s * 1000) if request.older_than_s is not None else None
        report = await trio.to_thread.run_sync(
            partial(self._parts.store.prune, older_ms, request.bytes_max, self._parts.now_ms(), dry_run=request.dry_run)
        )
        return PruneView(len(report.ids), report.size, request.dry_run)

    async def stats(self) -> StatsView:
        stats = await trio.to_thread.run_sync(self._parts.store.stats)
        disk = await trio.to_thread.run_sync(_disk_bytes, self._parts.store)
        collections = tuple(
            CollectionStats(
                collection=self._parts.charters.name(collection),
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
            model=self._parts.options.model,
            notices=tuple(self._notices),
        )

    async def export(self, collections: Sequence[str]) -> AsyncGenerator[ExportPart, None]:
        chosen = [self._parts.charters.resolve(name).id for name in collections] or [
            charter.id for charter in self._parts.charters.all()
        ]
        for collection in chosen:
            signed = self._parts.charters.signed(collection)
            if signed is not None:
                yield ExportPart(encode((_CHARTER_PART, signed.to_bytes())), 0)
            items = await trio.to_thread.run_sync(lambda each=collection: list(self._parts.store.items(each)))
            ids = [item.id for item in items if item.state in (State.LIVE, State.SUPERSEDED)]
            while ids:
                batches = await trio.to_thread.run_sync(self._parts.store.batches, ids[:EXPORT_BLOCKS], PART_BYTES_MAX)
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
            news = await trio.to_thread.run_sync(self._parts.charters.take, signed)
            if not self._parts.charters.follows(charter.id):
                await trio.to_thread.run_sync(self._parts.charters.follow, charter.id)
            if news:
                await self._charters_changed([charter.id])
            self._parts.syncing.followed(charter.id)
            return ImportView(0, 0, 0, ())
        taken = await self._parts.accepting.take([SignedBatch.from_bytes(data)], b"")
        return ImportView(len(taken.new), taken.known, len(taken.refused), reasons(taken.refused, REASONS_MAX))

    async def verify(self, block: str | None) -> AsyncGenerator[Progress | VerifyView, None]:
        identifier = await self._resolve(block) if block is not None else None

        async def work(tell: Callable[[Progress], None]) -> VerifyView:
            def report(done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                trio.from_thread.run_sync(tell, Progress(self._parts.identity.peer_id, "verify", done, total))

            ids = [identifier] if identifier is not None else None
            kept = await trio.to_thread.run_sync(self._parts.store.verify, ids, report)
            signed, problems = await trio.to_thread.run_sync(self._check_again, ids, report)
            for collection in self._parts.charters.followed() if kept.damaged else ():
                self._parts.syncing.changed(collection)
            problems = [f"{id_text(each)}: damaged on the disk, and dropped" for each in kept.damaged[:REASONS_MAX]] + problems
            return VerifyView(max(kept.checked, signed), len(kept.damaged), len(kept.repaired), (*problems, *kept.repaired))

        async with aclosing(self._parts.told(work)) as events:
            async for event in events:
                yield event

    def _check_again(self, ids: list[bytes] | None, report: Callable[[int, int], None]) -> tuple[int, list[str]]:
        """Signatures, sky and rules of what is stored: how many blocks, and what does not hold."""
        every = (
            ids
            if ids is not None
            else [item.id for each in self._parts.charters.all() for item in self._parts.store.items(each.id)]
        )
        checked, problems = 0, []
        for at in range(0, len(every), EXPORT_BLOCKS):
            for batch in self._parts.store.batches(every[at : at + EXPORT_BLOCKS], 1 << 30):
                try:
                    opened = open_batch(batch)
                except PeerError as error:
                    problems.append(f"a batch of {len(batch.blocks)} blocks: {error.cause}")
                    continue
                checked += len(opened)
                for one, refusal in zip(opened, self._parts.accepting.check_kept(opened), strict=True):
                    if refusal is not None:
                        problems.append(f"{id_text(one.id)}: {refusal.cause}")
            report(min(at + EXPORT_BLOCKS, len(every)), len(every))
        return checked, problems[:PROBLEMS_MAX]

    async def reindex(self, model: str, collection: str | None) -> AsyncGenerator[Progress | ReindexView, None]:
        chosen = [self._parts.charters.resolve(collection).id] if collection is not None else self._parts.charters.followed()

        async def work(tell: Callable[[Progress], None]) -> ReindexView:
            embedder = await self._parts.embedders.get(model)
            embedded = missing = maps = 0
            for each in chosen:
                anchors = Anchors()
                done, without = await self._reindex(each, embedder, anchors, tell)
                embedded, missing = embedded + done, missing + without
                made = await self._maps(anchors, embedder) if done else []
                maps += await self._parts.writing.publish_maps(self._parts.charters.of(each), made)
            return ReindexView(embedder.name, embedded, missing, maps)

        async with aclosing(self._parts.told(work)) as events:
            async for event in events:
                yield event

    async def _maps(self, anchors: Anchors, embedder: Embedder) -> list[SpaceMap]:
        known = await self._parts.embedders.get()

        def make() -> list[SpaceMap]:
            anchors.add_sentences(held_out_text(ENCODER)[1].splitlines(), known, embedder)
            return anchors.maps(embedder.fingerprint)

        return await trio.to_thread.run_sync(make)

    async def _reindex(
        self, collection: bytes, embedder: Embedder, anchors: Anchors, tell: Callable[[Progress], None]
    ) -> tuple[int, int]:
        """How many blocks got a vector, and how many have no text here to make one of."""
        every = await trio.to_thread.run_sync(self._parts.store.missing_vectors, collection, embedder.fingerprint, 1 << 30)
        done = without = 0
        for at in range(0, len(every), REINDEX_AT_ONCE):

            def step(ids: list[bytes] = every[at : at + REINDEX_AT_ONCE]) -> tuple[int, int]:
                contents = [
                    (identifier, stored.content) for identifier, stored in self._parts.store.get_many(ids).items() if stored.content
                ]
                texts = [
                    (each, "\n\n".join(filter(None, (content.title, content.text)))) for each, content in contents if content.text
                ]
                if texts:
                    vectors = embedder.embed([text for _, text in texts])
                    codes, scales = quantise(vectors)
                    known = {identifier: content.vectors for identifier, content in contents}
                    for number, (identifier, _) in enumerate(texts):
                        anchors.add(known[identifier], vectors[number])
                    rows = [
                        VectorRow(identifier, int(scales[number]), codes[number].tobytes())
                        for number, (identifier, _) in enumerate(texts)
                    ]
                    self._parts.store.add_vectors(collection, embedder.fingerprint, embedder.name, rows)
                return len(texts), len(ids) - len(texts)

            new, empty = await trio.to_thread.run_sync(step)
            done, without = done + new, without + empty
            tell(Progress(self._parts.identity.peer_id, "embed", min(at + REINDEX_AT_ONCE, len(every)), len(every)))
        return done, without


def _part(content: bytes) -> tuple[int, bytes]:
    """Kind and bytes of a part of an export. Raises MalformedError."""
    match decode(content, 2):
        case (int(kind), bytes(data)) if kind in (_CHARTER_PART, _BATCH_PART):
            return kind, data
    raise MalformedError("this is no part of an export")


def _disk_bytes(store: MemoryStore) -> int:
    return sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
