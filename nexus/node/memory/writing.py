"""What this node writes into the shared memory: documents cut, embedded, stamped and signed; later versions; tombstones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import numpy as np
import trio
from numpy.typing import NDArray

from nexus.core.errors import NotAllowedError, NotFoundError, UsageError
from nexus.core.keys import Identity
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.external import ExternalVectors
from nexus.memory import collection as rules
from nexus.memory.batch import BLOCKS_MAX, sign_batch
from nexus.memory.block import (
    AFTER_MAX,
    CONTENT,
    INT8,
    MAP,
    PARENTS_MAX,
    TEXT_BYTES_MAX,
    TIME_MAX_MS,
    TITLE_BYTES_MAX,
    TOMBSTONE,
    Block,
    Vector,
    encode_block,
    split_ids,
)
from nexus.memory.chunk import Chunk, chunks_of
from nexus.memory.collection import Charter
from nexus.memory.quantise import quantise
from nexus.memory.sealing import NONCE_BYTES, seal
from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.place import Cell
from nexus.memory.space_map import SpaceMap
from nexus.memory.versions import to_remove
from nexus.node.environment import Environment
from nexus.node.memory.accepting import Accepting
from nexus.node.memory.charters import Charters
from nexus.storage.memory.records import Content, Filters, Query, StoredBlock
from nexus.storage.memory.store import MemoryStore

Report = Callable[[str, int, int], None]

# Of one text: a chunk is a block, and all of a document become durable together.
CHUNKS_MAX = 4 * BLOCKS_MAX


@dataclass(frozen=True, slots=True)
class Document:
    """What is to be written, as `nexus.node.memory.api.AddRequest` says, its references resolved. `parents`: ids; `vector`: None,
    or the model and the vector of the whole text."""

    text: str
    title: str
    tags: tuple[str, ...]
    lang: str
    ttl_ms: int
    links: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    vector: tuple[ExternalVectors, Sequence[float]] | None


class Writing:
    """`place`: of this node, latitude and longitude, and the side of its cell in hundredths of a degree; None: blocks have no sky.
    `after`: what a new block of a collection says it comes after."""

    def __init__(
        self,
        identity: Identity,
        store: MemoryStore,
        charters: Charters,
        accepting: Accepting,
        sky: SkyKernel,
        place: tuple[float, float, int] | None,
        after: Callable[[bytes], Awaitable[Sequence[bytes]]],
        environment: Environment,
    ) -> None:
        self._identity = identity
        self._store = store
        self._charters = charters
        self._accepting = accepting
        self._sky = sky
        self._place = place
        self._after = after
        self._now_ms = environment.now_ms
        self._rng = environment.rng

    async def add(self, charter: Charter, document: Document, embedder: Embedder | None, report: Report) -> tuple[list[bytes], int]:
        """The ids of the new blocks, and how many chunks were there already. `embedder`: None where the document has its vector.
        `report` is called in a worker thread. Raises NotAllowedError, UsageError, CapacityError, LocalError."""
        self._check_may_write(charter)
        after = await self._after(charter.id)
        drafts, known = await trio.to_thread.run_sync(partial(self._drafts, charter, document, embedder, report))
        ids: list[bytes] = []
        for at in range(0, len(drafts), BLOCKS_MAX):
            ids += await self._sign(charter, drafts[at : at + BLOCKS_MAX], after)
        return ids, known

    async def publish_maps(self, charter: Charter, maps: Sequence[SpaceMap]) -> int:
        """Sign maps between models into a collection that this node may write and others may read; how many."""
        if charter.mode == rules.PRIVATE or not rules.may_write(charter, self._identity.public_key, self._now_ms()):
            return 0
        for space_map in maps:
            title = f"map {space_map.source.hex()[:16]} to {space_map.target.hex()[:16]}, recall {space_map.recall:.3f}"
            blocks = [
                Block(MAP, charter.id, self._identity.public_key, self._now_ms(), title=title, part=number, data=part)
                for number, part in enumerate(space_map.to_parts())
            ]
            await self._accepting.own(sign_batch(self._identity, list(map(encode_block, blocks))), [None] * len(blocks))
        return len(maps)

    async def remove(self, stored: StoredBlock) -> list[bytes]:
        """Sign tombstones over an own block, its own later versions and all that they replaced; the ids that they name. Raises
        NotAllowedError, LocalError."""
        charter = self._charters.of(stored.collection)
        if stored.author != self._identity.public_key:
            raise NotAllowedError(
                "this block was written by somebody else", "Only its author can take it back; `nexus memory prune` frees your disk"
            )
        family = await trio.to_thread.run_sync(self._store.family, stored.id, self._accepting.rule)
        heads = stored.versions.heads if stored.versions else ()
        rule = self._accepting.rule(charter.id)
        named: dict[bytes, None] = {}
        for target in dict.fromkeys((stored.id, *heads)):
            if any(version.id == target and version.author == stored.author for version in family):
                # Every version and not only the last: a node that never saw those between can apply it all the same.
                named |= dict.fromkeys(each for joined in to_remove(family, target, rule) for each in split_ids(joined))
        gone = list(named)
        blocks = [
            encode_block(Block(TOMBSTONE, charter.id, stored.author, self._now_ms(), parents=b"".join(gone[at : at + PARENTS_MAX])))
            for at in range(0, len(gone), PARENTS_MAX)
        ]
        await self._accepting.own(sign_batch(self._identity, blocks), [None] * len(blocks))
        return gone

    def _check_may_write(self, charter: Charter) -> None:
        if not rules.may_write(charter, self._identity.public_key, self._now_ms()):
            raise NotAllowedError(
                f"you may not write in {self._charters.name(charter.id)!r}", "Its owner can let you: nexus collection grant --write"
            )
        if charter.mode == rules.PRIVATE and charter.epoch not in self._charters.keys(charter.id):
            raise NotFoundError(
                f"the key of {self._charters.name(charter.id)!r} has not arrived here yet",
                "It comes from the owner's node when that is in reach: nexus collection sync",
            )

    # --- in a worker thread ------------------------------------------------------------------------------------------------------

    def _drafts(self, charter: Charter, document: Document, embedder: Embedder | None, report: Report) -> tuple[list[Block], int]:
        """The blocks without what comes after them and their sky."""
        if document.vector is not None:
            model, given = document.vector
            chunks = [_whole(document)]
            vectors = model.take([list(given)])
            names, fingerprint = model.name, model.fingerprint
        else:
            assert embedder is not None
            chunks = self._chunks(document, embedder)
            vectors = embedder.embed([chunk.embedded for chunk in chunks], lambda done, total: report("embed", done, total))
            names, fingerprint = embedder.name, embedder.fingerprint
        if any(len(chunk.text.encode("utf-8")) > TEXT_BYTES_MAX for chunk in chunks):
            raise UsageError(f"the text is longer than the {TEXT_BYTES_MAX} bytes that a block has room for", "Give less at a time")
        codes, scales = quantise(vectors)
        source = sha256(document.text.encode("utf-8")).digest()
        created_ms = self._now_ms()
        expires_ms = min(created_ms + document.ttl_ms, TIME_MAX_MS) if document.ttl_ms else 0
        drafts, known = [], 0
        for at, chunk in enumerate(chunks):
            vector = Vector(names, fingerprint, INT8, int(scales[at]), codes[at].tobytes())
            title = _title(chunk)
            if not document.parents and self._is_known(charter, chunk.text, title, fingerprint, vectors[at]):
                known += 1
                continue
            drafts.append(
                Block(
                    CONTENT,
                    charter.id,
                    self._identity.public_key,
                    created_ms,
                    expires_ms,
                    parents=b"".join(document.parents),
                    links=b"".join(document.links),
                    source=source,
                    tags=document.tags,
                    title=title,
                    lang=document.lang,
                    part=at,
                    text=chunk.text,
                    vectors=(vector,),
                )
            )
        return drafts, known

    def _chunks(self, document: Document, embedder: Embedder) -> list[Chunk]:
        if not document.text.strip():
            raise UsageError("there is no text to remember", "Give at least one word")
        if document.parents:
            return [_whole(document)]  # one block replaces one block
        chunks = chunks_of(
            document.text,
            embedder.count_tokens,
            embedder.tokens_max,
            markdown=document.title.lower().endswith((".md", ".markdown")),
            title=document.title,
        )
        if len(chunks) > CHUNKS_MAX:
            raise UsageError(f"the text makes {len(chunks)} blocks, more than {CHUNKS_MAX} at a time", "Add it in parts")
        return chunks

    def _is_known(self, charter: Charter, text: str, title: str, fingerprint: bytes, vector: NDArray[np.float32]) -> bool:
        """Whether this node has written just this text there before, and it still stands."""
        own = Filters(collections=(charter.id,), authors=(self._identity.public_key,))
        hits = self._store.search(Query(3, vector, fingerprint, filters=own), self._now_ms()).hits
        for hit in hits:
            content = hit.block.content if hit.block else None
            if content is not None and content.text == text and content.title == title:
                return True
        return False

    # --- signing -----------------------------------------------------------------------------------------------------------------

    async def _sign(self, charter: Charter, drafts: Sequence[Block], after: Sequence[bytes]) -> list[bytes]:
        if not drafts:
            return []

        def work() -> tuple[list[bytes], list[Content]]:
            stamp = self._stamp(charter, drafts[0].created_ms)
            blocks = [draft._replace(after=b"".join(after[:AFTER_MAX]), sky=stamp) for draft in drafts]
            contents = [Content.of(block) for block in blocks]
            if charter.mode == rules.PRIVATE:
                key = self._charters.keys(charter.id)[charter.epoch]
                blocks = [seal(block, charter.epoch, key, self._rng.randbytes(NONCE_BYTES)) for block in blocks]
            return [encode_block(block) for block in blocks], contents

        encoded, contents = await trio.to_thread.run_sync(work)
        opened = await self._accepting.own(sign_batch(self._identity, encoded), contents)
        return [one.id for one in opened]

    def _stamp(self, charter: Charter, created_ms: int) -> bytes:
        """The sky over the middle of this node's cell; blocks of one batch share a time, so one serves them all."""
        if self._place is None or not charter.sky_step:
            return b""
        latitude, longitude, step = self._place
        cell = Cell.of(latitude, longitude, max(step, charter.sky_step))
        return self._sky.stamps([created_ms], [cell])[0].to_bytes()


def _whole(document: Document) -> Chunk:
    return Chunk(document.text, 0, len(document.text), (document.title,) if document.title else ())


def _title(chunk: Chunk) -> str:
    """The document's title and the headings above the chunk, as much as there is room for, without what no title may have."""
    printable = "".join(character if character.isprintable() else " " for character in chunk.context)
    return printable.encode("utf-8")[:TITLE_BYTES_MAX].decode("utf-8", errors="ignore").strip()
