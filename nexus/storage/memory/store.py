"""The memory store: what this node holds of the shared memory, one directory.

    memory.db           blocks, proofs of their authors, versions, receipts, documents; the full-text index. The truth
    codes/<n>.codes     vectors of one model in one collection, made from the blocks
    index/<n>.usearch   what finds the nearest of many vectors, made from the codes

Any method may be called from any thread, and none from where it may not wait for the disk. Writes go one at a time. What a write
was given is durable when it returns, and found by searches from then on. Milliseconds: `put`, `get`, `known`, `batches`, `find`,
`search`, `listing`, `heads`, receipts and documents, in proportion to what is asked for. Seconds and more: opening, `close`,
`verify`, `prune`, `expire`, `resolve`; these work in steps and let others in between. `maintain` does one step of what can wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError, UsageError
from nexus.memory.batch import SignedBatch
from nexus.memory.block import CONTENT, SEALED, TOMBSTONE
from nexus.memory.versions import Version
from nexus.storage.database import Database
from nexus.storage.memory import documents, upkeep, words
from nexus.storage.memory.codes import PAGE_ROWS
from nexus.storage.memory.columns import Columns
from nexus.storage.memory.damage import forget
from nexus.storage.memory.families import decide, family_of
from nexus.storage.memory.filters import Matcher
from nexus.storage.memory.index import SpaceIndex
from nexus.storage.memory.names import Names
from nexus.storage.memory.reading import prefix_bounds, read_batches, read_blocks
from nexus.storage.memory.records import (
    WITH_BODY,
    Arrival,
    Content,
    Filters,
    Item,
    PruneReport,
    Query,
    Rules,
    SearchResult,
    SpaceStats,
    State,
    Stats,
    StoredBlock,
    VectorRow,
    VerifyReport,
)
from nexus.storage.memory.rows import CheckedRow, in_parts, rows_by_id, rows_by_number
from nexus.storage.memory.schema import SCHEMA, SCHEMA_VERSION
from nexus.storage.memory.search import Searcher
from nexus.storage.memory.spaces import Space, SpaceKey, Spaces, keep_pages
from nexus.storage.memory.writing import Quotas, Writing

_AT_ONCE = 500
_ITEMS_AT_ONCE = 4096

# Told how many of how many are done, between the steps of a long task.
Progress = Callable[[int, int], None]


class MemoryStore:
    """`notices`: sentences about what was found damaged and was made anew; the caller takes them out and logs them."""

    def __init__(self, root: Path, *, bytes_max: int, author_bytes_max: int) -> None:
        """Open or make it, and bring everything that follows from memory.db in step with it: about 1 s per 100,000 blocks.

        Raises LocalError, also where another process has it open.
        """
        self.root = root
        self.notices: list[str] = []
        self._quotas = Quotas(bytes_max, author_bytes_max)
        self._lock = threading.RLock()
        self._upkeep = threading.Lock()
        self._database = Database(root / "memory.db", SCHEMA, SCHEMA_VERSION)
        self._indexes: dict[int, SpaceIndex] = {}
        try:
            with self._database.transaction() as connection:
                self._names = Names(connection)
                self._columns = Columns(connection)
                self._spaces = Spaces(root / "codes", connection, self._names, self.notices)
                for space in self._spaces.all():
                    self._index(space.number).load(connection, self.notices)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Save what is worth it, and let go. A store that is not closed loses nothing but the time to make its indexes again."""
        with self._upkeep, self._lock:
            try:
                for index in self._indexes.values():
                    self._save(index)
            except LocalError as error:
                self.notices.append(f"an index was not saved, and will be made anew: {error.cause}")
            self._spaces.close()
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Blocks.

    def put(self, arrivals: Sequence[Arrival], rules: Rules) -> list[bytes]:
        """Keep blocks, all of them or none, durably: the ids that are new. Known ones, in whatever state, are passed over.

        `rules`: for the id of a collection, who may replace whose blocks there (the rule of `nexus.memory.versions.resolve`).
        Raises QuotaError, and LocalError for a full disk: then nothing has changed.
        """
        with self._writing() as writing:
            return writing.put(arrivals, rules)

    def get(self, identifier: bytes) -> StoredBlock | None:
        """A block, checked against its id. Raises LocalError for a damaged one, which is forgotten: not known any more, so that
        peers are asked for it again."""
        return self.get_many([identifier]).get(identifier)

    def get_many(self, ids: Sequence[bytes]) -> dict[bytes, StoredBlock]:
        """Those of the blocks that are known. Raises LocalError as `get` does."""
        with self._database.transaction() as connection:
            blocks = read_blocks(connection, ids)
        if blocks.damaged:
            with self._writing() as writing:
                forget(writing, blocks.damaged)
            raise self._database.damaged(f"the block {blocks.damaged[0].row.id.hex()[:16]}")
        return blocks.found

    def known(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those that were stored here once, whatever became of them, unless they were found damaged."""
        found: set[bytes] = set()
        with self._database.transaction() as connection:
            for marks, part in in_parts(list(ids)):
                query = f"SELECT id FROM block WHERE id IN ({marks})"  # noqa: S608 - question marks only
                found.update(identifier for (identifier,) in connection.execute(query, part))
        return found

    def items(self, collection: bytes, after: int = 0) -> Iterator[Item]:
        """All blocks of a collection in order of arrival, from behind number `after` on, in whatever state. Which belong into the
        sets that peers compare is for the caller: LIVE, SUPERSEDED and PRUNED ones; what was removed or has expired nobody
        sends any more, so whoever never had it would ask for it in vain."""
        name = self._names.known(collection)
        if name is None:
            return
        query = "SELECT number, created_ms, id, state FROM block WHERE number > ? AND collection = ? ORDER BY number LIMIT ?"
        while rows := self._database.rows(query, after, name, _ITEMS_AT_ONCE):
            for number, created_ms, identifier, state in rows:
                yield Item(number, created_ms, identifier, State(state))  # type: ignore[arg-type]
            after = int(rows[-1][0])

    def batches(self, ids: Sequence[bytes], bytes_max: int) -> list[SignedBatch]:
        """These blocks with what proves their authors, as they are sent: as many, in the order of `ids`, as fit in `bytes_max`
        bytes, the hashes of the proofs not counted. What is not here any more, or is damaged, is left out."""
        with self._database.transaction() as connection:
            return read_batches(connection, ids, bytes_max)

    def find(self, prefix: str, limit: int = 20) -> list[bytes]:
        """The ids of known blocks whose text begins so (see `id_text`), in order. Raises UsageError for what no id begins with."""
        low, high = prefix_bounds(prefix)
        rows = self._database.rows("SELECT id FROM block WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?", low, high, limit)
        return [identifier for (identifier,) in rows if isinstance(identifier, bytes)]

    def listing(self, filters: Filters, limit: int, now_ms: int, before: tuple[int, bytes] | None = None) -> list[StoredBlock]:
        """Blocks by (time, id), the newest first. `before`: the time and id of the last one of the page before."""
        matcher = Matcher(self._columns, self._names, filters, now_ms)
        with self._database.transaction() as connection:
            matcher.read_tags(connection)
        numbers = np.arange(1, self._columns.count)
        numbers = numbers[matcher(numbers)]
        created = self._columns.array("created_ms")[numbers]
        if before is not None:
            kept = created <= before[0]
            numbers, created = numbers[kept], created[kept]
        listed = (
            (time_ms, self._columns.id_of(number)) for time_ms, number in zip(created.tolist(), numbers.tolist(), strict=True)
        )
        newest = sorted((pair for pair in listed if before is None or pair < before), reverse=True)[:limit]
        found = self.get_many([identifier for _, identifier in newest])
        return [found[identifier] for _, identifier in newest if identifier in found]

    def heads(self, collection: bytes, limit: int) -> list[bytes]:
        """The ids of the newest live blocks of a collection, for the `after` links of a new one."""
        name = self._names.known(collection)
        count = self._columns.count
        state, owner = self._columns.array("state")[:count], self._columns.array("collection")[:count]
        numbers = np.flatnonzero((state == State.LIVE) & (owner == name)) if name is not None else np.zeros(0, np.int64)
        created = self._columns.array("created_ms")[numbers]
        newest = numbers[created >= np.partition(created, -limit)[-limit]] if len(numbers) > limit else numbers
        times = self._columns.array("created_ms")[newest].tolist()
        pairs = sorted(
            ((time_ms, self._columns.id_of(number)) for time_ms, number in zip(times, newest, strict=True)), reverse=True
        )
        return [identifier for _, identifier in pairs[:limit]]

    def family(self, identifier: bytes, rules: Rules) -> list[Version]:
        """A block with all its versions, earlier and later, in whatever state; empty for one that is not known."""
        with self._database.transaction() as connection:
            row = rows_by_id(connection, [identifier]).get(identifier)
            return family_of(connection, row, rules(row.collection)) if row is not None else []

    def pin(self, identifier: bytes, pinned: bool = True) -> bool:
        """Keep a block from being pruned, or from expiring here; whether it is known."""
        with self._writing() as writing:
            row = rows_by_id(writing.connection, [identifier]).get(identifier)
            if row is not None and row.good:
                writing.pin(row, pinned)
            return row is not None

    def forget(self, ids: Sequence[bytes]) -> None:
        """Take blocks out altogether, as if they had never come: those that the rules of their collection allow no longer."""
        with self._writing() as writing:
            forget(writing, list(rows_by_id(writing.connection, ids).values()))

    def resolve(self, collection: bytes, rules: Rules) -> int:
        """Decide anew which versions of a collection count, after its rules have changed: how many blocks changed their state."""
        with self._writing() as writing:
            query = "SELECT child FROM edge JOIN block ON block.number = child WHERE collection = ? ORDER BY child"
            name = self._names.known(collection)
            numbers = [number for (number,) in writing.connection.execute(query, (name,))]
            changes = decide(writing.connection, numbers, rules)
            writing.change(changes)
            return len(changes)

    # Search.

    def search(self, query: Query, now_ms: int) -> SearchResult:
        """The best `query.k` hits, what expires by `now_ms` left out. Damaged blocks are left out, and forgotten (see `get`).
        Raises UsageError."""
        searcher = Searcher(self._columns, self._names, self._spaces, self._indexes, self._database)
        hits, explain = searcher.search(query, now_ms)
        if query.blocks and hits:
            with self._database.transaction() as connection:
                blocks = read_blocks(connection, [hit.id for hit in hits])
            if blocks.damaged:
                self._forget(blocks.damaged)
            hits = [hit._replace(block=blocks.found[hit.id]) for hit in hits if hit.id in blocks.found]
        return SearchResult(tuple(hits), explain)

    def add_vectors(self, collection: bytes, fingerprint: bytes, model: str, rows: Sequence[VectorRow]) -> int:
        """Vectors of another model for blocks that are here; how many were taken. Left out: blocks that are not in the collection,
        are gone, or have one of this model already. All have one dimension. Raises UsageError, QuotaError, LocalError."""
        if not rows:
            return 0
        dimension = len(rows[0].codes)
        if not dimension or any(len(row.codes) != dimension for row in rows):
            raise UsageError("vectors of one model have one dimension", "Add those of each model by themselves")
        with self._writing() as writing:
            stored = rows_by_id(writing.connection, [row.id for row in rows])
            have = {number for space in self._with_model(collection, fingerprint) for number in space.view.numbers.tolist()}
            taken = []
            for row in rows:
                there = stored.get(row.id)
                if there is None or not there.good or there.collection != collection or there.row.state not in WITH_BODY:
                    continue
                if there.row.number not in have:
                    have.add(there.row.number)
                    taken.append((there, row.scale, row.codes))
            if taken:
                writing.add_vectors(SpaceKey(collection, fingerprint, dimension), model, taken)
            return len(taken)

    def missing_vectors(self, collection: bytes, fingerprint: bytes, limit: int) -> list[bytes]:
        """Ids of blocks with something to embed that have no vector of this model, in order of arrival."""
        name = self._names.known(collection)
        if name is None:
            return []
        have = {number for space in self._with_model(collection, fingerprint) for number in space.view.numbers.tolist()}
        found: list[bytes] = []
        after = 0
        query = (
            "SELECT block.number, id FROM block JOIN body ON body.number = block.number WHERE block.number > ? AND collection = ?"
            " AND state IN (0, 1) AND (kind = ? OR (kind = ? AND content <> x'')) ORDER BY block.number LIMIT ?"
        )
        while len(found) < limit and (rows := self._database.rows(query, after, name, CONTENT, SEALED, _ITEMS_AT_ONCE)):
            found.extend(identifier for number, identifier in rows if number not in have and isinstance(identifier, bytes))
            after = int(rows[-1][0])
        return found[:limit]

    def unread(self, collection: bytes, limit: int) -> list[bytes]:
        """Ids of sealed blocks of a collection whose content this node could not read when they came."""
        name = self._names.known(collection)
        query = (
            "SELECT id FROM block JOIN body ON body.number = block.number WHERE collection = ? AND kind = ? AND state IN (0, 1)"
            " AND content = x'' ORDER BY block.number LIMIT ?"
        )
        return [row[0] for row in self._database.rows(query, name, SEALED, limit)] if name is not None else []  # type: ignore[misc]

    def read_sealed(self, contents: Sequence[tuple[bytes, Content]]) -> int:
        """What can be read now of sealed blocks (see `unread`), by id; of how many. They are searched from now on."""
        with self._writing() as writing:
            ids = dict(contents)
            rows = rows_by_id(writing.connection, list(ids)).values()
            query = "SELECT 1 FROM body WHERE number = ? AND content = x''"
            unread = [
                (row, ids[row.row.id])
                for row in rows
                if row.good and row.row.kind == SEALED and writing.connection.execute(query, (row.row.number,)).fetchone()
            ]
            writing.open_sealed(unread)
            return len(unread)

    # Upkeep.

    def maintain(self) -> bool:
        """One step of what can wait, some tens of milliseconds mostly: indexes grow and are saved, and traces of erased blocks go
        for good. Whether there is more to do: then call it again soon, else after the next write."""
        with self._upkeep:
            erasing = {number for (number,) in self._database.rows("SELECT space FROM erasing")}
            for space in self._spaces.all():
                index = self._index(space.number)
                if space.number in erasing and index.rows and not index.renewing:
                    index.renew()
                if index.grow(space.view):
                    return True
                if space.number in erasing:
                    self._save(index, always=True)
                    self._erased(space.number)
                else:
                    self._save(index)
                with self._lock, self._database.transaction() as connection:
                    keep_pages(connection, space)
            if 0 in erasing:
                with self._database.transaction() as connection:
                    words.erase(connection)
                self._database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
                self._erased(0)
            return False

    def expire(self, now_ms: int) -> list[bytes]:
        """Drop blocks whose time is over, pinned ones excepted: their ids."""
        count = self._columns.count
        expires = self._columns.array("expires_ms")[:count]
        over = (expires > 0) & (expires <= now_ms) & self._with_body(count) & (self._columns.array("pinned")[:count] == 0)
        return self._drop(np.flatnonzero(over).tolist(), State.EXPIRED)

    def prune(self, older_than_ms: int | None, max_bytes: int | None, now_ms: int, *, dry_run: bool = False) -> PruneReport:
        """Drop blocks that came longer than `older_than_ms` ago, then those that came first until all take at most `max_bytes`;
        None: no such limit. Pinned ones and tombstones stay. Blocks that no other node has are lost by it."""
        count = self._columns.count
        column = self._columns.array
        size = column("size")[:count].astype(np.int64)
        may = self._with_body(count) & (column("pinned")[:count] == 0) & (column("kind")[:count] != TOMBSTONE)
        numbers = np.flatnonzero(may)
        received = column("received_ms")[numbers]
        numbers = numbers[np.argsort(received, kind="stable")]
        goes = np.zeros(len(numbers), bool)
        if older_than_ms is not None:
            goes |= np.sort(received, kind="stable") < now_ms - older_than_ms
        if max_bytes is not None:
            total = int(size[self._with_body(count)].sum())
            goes |= total - np.cumsum(size[numbers]) + size[numbers] > max_bytes
        chosen = numbers[goes].tolist()
        report = PruneReport(tuple(self._columns.id_of(number) for number in chosen), int(size[numbers[goes]].sum()))
        if not dry_run:
            self._drop(chosen, State.PRUNED)
        return report

    def stats(self) -> Stats:
        count = self._columns.count
        state, size = self._columns.array("state")[:count], self._columns.array("size")[:count].astype(np.int64)
        owner = self._columns.array("collection")[:count]
        with_body = self._with_body(count)
        collections = []
        for number in np.unique(owner[state >= 0]).tolist():
            mine = owner == number
            live = int(np.count_nonzero(mine & (state == State.LIVE)))
            collections.append((self._names.value(number), live, int(size[mine & with_body].sum())))
        spaces = [
            SpaceStats(
                space.key.collection,
                space.key.fingerprint,
                space.model,
                space.key.dimension,
                space.count,
                self._index(space.number).rows,
            )
            for space in self._spaces.all()
        ]
        by_state = {each: int(np.count_nonzero(state == each)) for each in State}
        return Stats(by_state, int(size[with_body].sum()), self._quotas.total, tuple(sorted(collections)), tuple(spaces))

    def verify(self, ids: Sequence[bytes] | None = None, progress: Progress | None = None) -> VerifyReport:
        """Read blocks and check their hashes: these, or all. With all also what follows from them, which is made anew where it does
        not agree. Damaged blocks are forgotten (see `get`)."""
        if ids is not None:
            with self._database.transaction() as connection:
                checked = upkeep.check_ids(connection, ids)
            self._forget(checked.damaged)
            return VerifyReport(checked.rows, tuple(row.row.id for row in checked.damaged))
        total = self._columns.count - 1
        after = count = 0
        damaged: list[bytes] = []
        while True:
            with self._database.transaction() as connection:
                checked = upkeep.check_after(connection, after, _AT_ONCE)
            if not checked.rows:
                break
            self._forget(checked.damaged)
            damaged.extend(row.row.id for row in checked.damaged)
            after, count = checked.last, count + checked.rows
            if progress is not None:
                progress(min(count, total), total)
        return VerifyReport(count, tuple(damaged), tuple(self._repaired()))

    # Beside the blocks.

    def put_receipts(self, receipts: Sequence[tuple[bytes, bytes, bytes]]) -> int:
        """Receipts for blocks: (block id, witness key, bytes) each; how many are new. See `documents.put_receipts`."""
        with self._database.transaction() as connection:
            return documents.put_receipts(connection, receipts)

    def receipts(self, identifier: bytes) -> dict[bytes, bytes]:
        """Receipts for a block, by witness."""
        with self._database.transaction() as connection:
            return documents.receipts(connection, identifier)

    def put_document(self, kind: str, key: bytes, data: bytes) -> None:
        """Keep a document in place of an earlier one of this key. Raises CapacityError, LocalError."""
        with self._database.transaction() as connection:
            documents.put_document(connection, kind, key, data)

    def document(self, kind: str, key: bytes) -> bytes | None:
        """Raises LocalError for a damaged one."""
        return self._documents(kind, key).get(key)

    def documents(self, kind: str) -> dict[bytes, bytes]:
        """All of one kind. Raises LocalError where one is damaged."""
        return self._documents(kind, None)

    def sound_documents(self, kind: str) -> dict[bytes, bytes]:
        """All of one kind that are not damaged; of the others there is a notice."""
        with self._database.transaction() as connection:
            read = dict(documents.read_documents(connection, kind, None))
        found = {key: data for key, data in read.items() if data is not None}
        if len(found) < len(read):
            self.notices.append(f"{len(read) - len(found)} documents {kind!r} are damaged, and are left out")
        return found

    def remove_document(self, kind: str, key: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM document WHERE kind = ? AND key = ?", (kind, key))

    def _documents(self, kind: str, key: bytes | None) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with self._database.transaction() as connection:
            for each, data in documents.read_documents(connection, kind, key):
                if data is None:
                    raise self._database.damaged(f"a document {kind!r}")
                found[each] = data
        return found

    @contextmanager
    def _writing(self) -> Iterator[Writing]:
        """One write: all or nothing, on disk and in memory."""
        with self._lock:
            done = False
            try:
                with self._database.transaction() as connection:
                    writing = Writing(connection, self._names, self._spaces, self._columns, self._quotas)
                    yield writing
                done = True
            finally:
                self._names.settle(done)
                self._spaces.settle(done)
            try:
                writing.apply()
            except LocalError as error:
                # What was written is durable, and the pages are made anew when the store is opened next.
                self.notices.append(f"codes of erased blocks are still on the disk: {error.cause}")

    def _forget(self, damaged: Sequence[CheckedRow]) -> None:
        if damaged:
            with self._writing() as writing:
                forget(writing, damaged)
            self.notices.append(f"{len(damaged)} blocks were damaged on this disk: they are forgotten, and asked for again")

    def _drop(self, numbers: Sequence[int], state: State) -> list[bytes]:
        dropped: list[bytes] = []
        for at in range(0, len(numbers), _AT_ONCE):
            with self._writing() as writing:
                rows = rows_by_number(writing.connection, numbers[at : at + _AT_ONCE]).values()
                chosen = [row for row in rows if row.good and row.row.state in WITH_BODY]
                writing.change([(row, state) for row in chosen])
                dropped.extend(row.row.id for row in chosen)
        return dropped

    def _repaired(self) -> Iterator[str]:
        for space in self._spaces.all():
            pages = 0
            for page in range(-(-space.count // PAGE_ROWS)):
                with self._lock, self._database.transaction() as connection:
                    pages += upkeep.repair_codes(connection, space, page)
            if pages:
                yield f"{pages} pages of {space.file.path.name}"
            if pages or not self._sound(space.number):
                self._indexes[space.number] = SpaceIndex(self.root / "index", space)
                if not pages:
                    yield self._index(space.number).path.name
        with self._lock, self._database.transaction() as connection:
            if upkeep.repair_words(connection, self._columns):
                yield "the full-text index"

    def _index(self, number: int) -> SpaceIndex:
        index = self._indexes.get(number)
        if index is None:
            index = self._indexes[number] = SpaceIndex(self.root / "index", self._spaces.of_number(number))
        return index

    def _sound(self, number: int) -> bool:
        with self._database.transaction() as connection:
            return self._index(number).is_sound(connection)

    def _save(self, index: SpaceIndex, always: bool = False) -> None:
        if index.rows and (always or index.needs_saving()):
            rows, checksum = index.write()
            with self._database.transaction() as connection:
                index.keep(connection, rows, checksum)

    def _erased(self, space: int) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM erasing WHERE space = ?", (space,))

    def _with_model(self, collection: bytes, fingerprint: bytes) -> list[Space]:
        return [space for space in self._spaces.of_collection(collection) if space.key.fingerprint == fingerprint]

    def _with_body(self, count: int) -> NDArray[np.bool_]:
        return np.isin(self._columns.array("state")[:count], WITH_BODY)
