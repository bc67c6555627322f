"""Content-addressed blobs on disk, whole or half fetched.

    <hex root>.blob     the bytes, whole and verified
    <hex root>.part     the same length, while chunks are still missing
    <hex root>.hashes   its size (8 bytes little-endian) and the leaf hash of every chunk; they add up to the root in the name
    *.tmp               being written; swept at start

Every name comes from a root, never from a peer's text. A `.part` needs no record of what it holds: when it is opened again, each
chunk on disk is hashed and counts if it is right, so a crash or a power loss at any point costs at most the chunks not yet synced.
One process uses a store at a time (the daemon locks its data directory); threads may share it.

The store is a cache with a quota. What does not fit makes room among what nobody protects (`protect`, `hold`), the blob that was
used longest ago first. When a blob was used last is the time of change of its file, which nothing else here has a use for.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from nexus.core.errors import CapacityError, LocalError, MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import HASH_BYTES, leaf_hash
from nexus.core.manifest import CHUNK_BYTES, Blob, blob_root, chunk_count
from nexus.storage.durable import replace_file, storage_error, sync_directory, write_all

# Bounds the hash list of a blob (2 MiB) before any of it is asked for. The largest layers known need a third of it.
BLOB_BYTES_MAX = 1 << 36
_SIZE_BYTES = 8
# How often a use of a blob is written down, at most. What was used a moment ago somebody may just be about to open: it stays.
TOUCH_S = 5.0
GRACE_S = 30.0
_TOUCHED_MAX = 4096


def chunk_length(size: int, index: int) -> int:
    """Bytes in chunk `index` of a blob of `size` bytes. Raises MalformedError for a chunk that it does not have."""
    if not 0 <= index < chunk_count(size):
        raise MalformedError(f"there is no chunk {index} in a blob of {size} bytes")
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


def _whole_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut at multiples of CHUNK_BYTES; one empty chunk for no bytes at all."""
    held = bytearray()
    index = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            room = CHUNK_BYTES - len(held)
            held += view[:room]
            view = view[room:]
            if len(held) == CHUNK_BYTES:
                yield bytes(held)
                held.clear()
                index += 1
    if held or not index:
        yield bytes(held)


def _reading(name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces; trouble with their source is told apart from trouble with the store."""
    try:
        yield from pieces
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LocalError(f"{name} cannot be read: {reason}", "Check the file and the disk that it is on") from error


def _read_chunks(handle: int, size: int) -> Iterator[bytes]:
    for index in range(chunk_count(size)):
        yield os.pread(handle, chunk_length(size, index), index * CHUNK_BYTES)


def _read_at(path: Path, length: int, offset: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, length, offset)
    finally:
        os.close(handle)


def _chunks_with_data(handle: int, size: int) -> Iterator[int]:
    """Chunks of a sparse file that hold anything at all, so that an almost empty download is not read through."""
    at = 0
    while at < size:
        try:
            at = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        index = at // CHUNK_BYTES
        yield index
        at = (index + 1) * CHUNK_BYTES


class BlobStore:
    """Blobs under one directory. `quota_bytes`: the most that blobs and downloads may take together, None for no limit."""

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        """Touches no file; `open` does."""
        self._root = root
        self._quota_bytes = quota_bytes
        self._space = threading.Lock()
        self._holding = threading.Lock()
        self._downloading: dict[bytes, Partial | None] = {}
        self._protectors: list[Callable[[], Iterable[bytes]]] = []
        self._held: Counter[bytes] = Counter()
        # Stored here in this run and not yet seen protected: an import has no model yet that its pieces belong to.
        self._stored: set[bytes] = set()
        self._touched_s: dict[bytes, float] = {}
        self.evicted = 0

    @classmethod
    def open(cls, root: Path, quota_bytes: int | None = None) -> Self:
        """The store under `root`, made if need be, with the leftovers of a crash swept. Raises LocalError."""
        store = cls(root, quota_bytes)
        try:
            store._prepare()
            store._sweep()
        except OSError as error:
            raise storage_error(error, root) from error
        return store

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
        """Store `size` bytes, given in pieces of any length; a copy that is here already is replaced, which mends a damaged one.

        Raises LocalError (the disk, or other than `size` bytes came), CapacityError (the quota)."""
        if size > BLOB_BYTES_MAX:
            raise CapacityError(
                f"{name} has {size} bytes; a blob has at most {BLOB_BYTES_MAX}", "Split the model into smaller layers"
            )
        temporary: Path | None = None
        try:
            self._prepare()
            with self._space:
                self.require_space(size)
                handle, text = tempfile.mkstemp(dir=self._root, suffix=".tmp")
                temporary = Path(text)
                os.ftruncate(handle, size)
            try:
                hashes, written = [], 0
                for chunk in _whole_chunks(_reading(name, chunks)):
                    if written + len(chunk) > size:
                        raise _changed(name, size)
                    hashes.append(leaf_hash(chunk))
                    write_all(handle, chunk, written)
                    written += len(chunk)
                if written != size:
                    raise _changed(name, size)
                os.fsync(handle)
            finally:
                os.close(handle)
            blob = Blob(name, size, blob_root(size, hashes))
            self._write_hashes(blob.root, size, hashes)
            temporary.replace(self._file(blob.root, "blob"))
            if blob.root not in self._downloading:
                self._file(blob.root, "part").unlink(missing_ok=True)
            sync_directory(self._root)
            self._stored.add(blob.root)
            return blob
        except OSError as error:
            raise storage_error(error, self._root) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def has(self, root: bytes) -> bool:
        """Whether the whole blob is here."""
        try:
            self.size(root)
        except NotFoundError:
            return False
        return True

    def size(self, root: bytes) -> int:
        """Its bytes. Raises NotFoundError unless the whole blob is here."""
        try:
            with open(self._file(root, "hashes"), "rb") as file:
                size = int.from_bytes(file.read(_SIZE_BYTES), "little")
            if self._file(root, "blob").stat().st_size == size:
                return size
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, self._root) from error
        raise NotFoundError(
            f"blob {root.hex()[:16]} is not on this node", "Fetch it from a node that has it, or add its model again"
        )

    def path(self, root: bytes) -> Path:
        """The file with exactly the blob's bytes, to be read and not changed. Raises NotFoundError."""
        self.size(root)
        self._touch(root)
        return self._file(root, "blob")

    def here(self, root: bytes) -> bool | bytes:
        """True for a whole blob, False for none of it; for one on its way a byte per chunk, 1 where the chunk is here."""
        partial = self._downloading.get(root)
        return partial.here() if partial is not None else self.has(root)

    def roots(self) -> list[bytes]:
        """Every whole blob here, sorted."""
        return sorted(root for root in self._named("blob") if self.has(root))

    def announced_size(self, root: bytes) -> int:
        """Bytes of a blob that is here or on its way here with its hashes. Raises NotFoundError."""
        partial = self._downloading.get(root)
        return partial.blob.size if partial is not None and partial.hashes_known else self.size(root)

    def chunk_hashes(self, root: bytes) -> list[bytes]:
        """Leaf hashes of every chunk, checked against the root; also of a blob on its way here. Raises NotFoundError, LocalError
        where they are damaged."""
        size = self.announced_size(root)
        hashes = self._read_hashes(root, size)
        if hashes is None:
            raise self._damaged(root)
        return hashes

    def read_chunk(self, root: bytes, index: int) -> bytes:
        """One chunk, checked against its hash; also of a blob on its way here. Raises NotFoundError, MalformedError,
        LocalError where the disk changed it."""
        partial = self._downloading.get(root)
        if partial is not None and not partial.has_chunk(index):
            raise NotFoundError(f"chunk {index} of blob {root.hex()[:16]} is not here yet")
        size = self.announced_size(root)
        length = chunk_length(size, index)
        try:
            with open(self._file(root, "hashes"), "rb") as file:
                file.seek(_SIZE_BYTES + index * HASH_BYTES)
                expected = file.read(HASH_BYTES)
            try:
                data = _read_at(self._file(root, "part" if partial is not None else "blob"), length, index * CHUNK_BYTES)
            except FileNotFoundError:  # it has just become whole
                data = _read_at(self._file(root, "blob"), length, index * CHUNK_BYTES)
        except FileNotFoundError:
            raise NotFoundError(f"blob {root.hex()[:16]} was just removed from this node") from None
        except OSError as error:
            raise storage_error(error, self._root) from error
        if leaf_hash(data) != expected:
            raise self._damaged(root)
        if partial is None:
            self._touch(root)
        return data

    def verify(self, root: bytes) -> None:
        """Read all of it and compare with the root. Raises NotFoundError, LocalError where the disk changed it."""
        size = self.size(root)
        try:
            with open(self._file(root, "blob"), "rb") as file:
                hashes = [leaf_hash(chunk) for chunk in _read_chunks(file.fileno(), size)]
        except OSError as error:
            raise storage_error(error, self._root) from error
        if blob_root(size, hashes) != root:
            raise self._damaged(root)

    def remove(self, root: bytes) -> None:
        """Forget a blob, whole or half fetched; nothing happens if there is none. Raises LocalError, also while it is fetched."""
        if root in self._downloading:
            raise LocalError(f"blob {root.hex()[:16]} is being fetched", "Wait until that has ended, then try again")
        try:
            # The hashes go last: what has lost its bytes is no blob, and the sweep takes what a crash leaves here.
            for suffix in ("blob", "part", "hashes"):
                self._file(root, suffix).unlink(missing_ok=True)
            if self._root.exists():
                sync_directory(self._root)
        except OSError as error:
            raise storage_error(error, self._root) from error

    def collect(self, keep: Collection[bytes]) -> int:
        """Remove every blob and download that is not in `keep` (a set of roots); the bytes freed."""
        kept = frozenset(keep) | set(self._downloading)
        before = self.used_bytes()
        for root in sorted({*self._named("blob"), *self._named("part")} - kept):
            self.remove(root)
        return before - self.used_bytes()

    def used_bytes(self) -> int:
        """What counts against the quota: whole blobs, and the full length of everything on its way here."""
        if not self._root.exists():
            return 0
        total = 0
        with os.scandir(self._root) as entries:
            for entry in entries:
                if entry.name.endswith((".blob", ".part", ".tmp")):
                    try:
                        total += entry.stat().st_size
                    except FileNotFoundError:
                        continue
        return total

    def protect(self, roots: Callable[[], Iterable[bytes]]) -> None:
        """What `roots` returns, asked each time when room is needed and from any thread, is not evicted: models that somebody
        named, fragments that this node undertook to serve, layers that are loaded."""
        self._protectors.append(roots)

    @contextmanager
    def hold(self, roots: Iterable[bytes]) -> Iterator[None]:
        """While the context is open these are not evicted."""
        held = list(roots)
        with self._holding:
            self._held.update(held)
        try:
            yield
        finally:
            with self._holding:
                self._held.subtract(held)
                self._held += Counter()  # drops those at zero

    def require_space(self, size: int) -> None:
        """Make room for `size` more bytes. Raises CapacityError if what is protected leaves too little of the quota, LocalError if
        the disk cannot take them."""
        if self._quota_bytes is not None:
            short = self.used_bytes() + size - self._quota_bytes
            if short > 0:
                freed = self._evict(short)
                if freed < short:
                    raise CapacityError(
                        f"{size:,} bytes more do not fit: models take {self.used_bytes():,} of {self._quota_bytes:,} bytes, "
                        "and all of it is named, served or in use",
                        "Raise serve.disk_max_bytes, or remove a model",
                    )
        try:
            self._prepare()
            disk = os.statvfs(self._root)
        except OSError as error:
            raise storage_error(error, self._root) from error
        if size > disk.f_bavail * disk.f_frsize:
            raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self._root)

    def require_room_for(self, blobs: Iterable[Blob]) -> None:
        """The same for all that is still to come of these, of which some may be here in part."""
        with self._space:
            wanted = 0
            for blob in blobs:
                try:
                    wanted += max(0, blob.size - self._file(blob.root, "part").stat().st_size)
                except FileNotFoundError:
                    wanted += blob.size
                except OSError as error:
                    raise storage_error(error, self._root) from error
            self.require_space(wanted)

    def _evict(self, wanted: int) -> int:
        """Remove what was used longest ago until `wanted` bytes are free, or nothing if that cannot be; the bytes freed."""
        protected = {root for roots in self._protectors for root in roots()}
        self._stored -= protected
        with self._holding:
            kept = protected | self._stored | set(self._held) | set(self._downloading)
        now_s = time.time()
        idle: list[tuple[float, bytes, int]] = []
        for suffix in ("blob", "part"):
            for root in self._named(suffix) - kept:
                try:
                    status = self._file(root, suffix).stat()
                except FileNotFoundError:
                    continue
                # Of a clock that was set back we know nothing: what was used in the future is as good as used long ago.
                if not 0 <= now_s - status.st_mtime < GRACE_S:
                    idle.append((status.st_mtime, root, status.st_size))
        if sum(size for _, _, size in idle) < wanted:
            return 0
        freed = 0
        for _, root, size in sorted(idle):
            if freed >= wanted:
                break
            self.remove(root)
            self.evicted += 1
            freed += size
        return freed

    def _touch(self, root: bytes) -> None:
        """It was used now."""
        now_s = time.monotonic()
        if now_s - self._touched_s.get(root, -TOUCH_S) < TOUCH_S:
            return
        if len(self._touched_s) >= _TOUCHED_MAX:
            self._touched_s.clear()
        self._touched_s[root] = now_s
        try:
            os.utime(self._file(root, "blob"))
        except OSError:
            return  # gone, or a disk that takes no more: then this use does not count

    def begin(self, blob: Blob) -> Partial:
        """Start or resume fetching a blob; close it in any case. Hashes what is already on disk, so keep it off the trio thread.

        Raises CapacityError (quota), LocalError (disk, or already begun), MalformedError for a blob larger than any can be."""
        if blob.size > BLOB_BYTES_MAX:
            raise MalformedError(f"a blob of {blob.size} bytes, more than any may have")
        with self._space:
            if blob.root in self._downloading:
                raise LocalError(f"blob {blob.root.hex()[:16]} is being fetched already", "Wait until that has ended")
            path = self._file(blob.root, "part")
            try:
                already = path.stat().st_size if path.exists() else 0
                self.require_space(max(0, blob.size - already))
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.ftruncate(handle, blob.size)
            except OSError as error:
                raise storage_error(error, self._root) from error
            self._downloading[blob.root] = None
        partial = Partial(self, blob, handle)
        self._downloading[blob.root] = partial
        try:
            hashes = self._read_hashes(blob.root, blob.size)
            if hashes is not None:
                partial._resume(hashes)
        except BaseException:
            partial.close()
            raise
        return partial

    def _prepare(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _file(self, root: bytes, suffix: str) -> Path:
        if len(root) != HASH_BYTES:
            raise ValueError(f"a root has {HASH_BYTES} bytes, not {len(root)}")
        return self._root / f"{root.hex()}.{suffix}"

    def _named(self, suffix: str) -> set[bytes]:
        found = set()
        for path in self._root.glob(f"*.{suffix}"):
            try:
                root = bytes.fromhex(path.stem)
            except ValueError:
                continue
            if len(root) == HASH_BYTES and path.stem == root.hex():
                found.add(root)
        return found

    def _sweep(self) -> None:
        for path in self._root.glob("*.tmp"):
            path.unlink(missing_ok=True)
        for root in self._named("blob"):
            # Blobs are renamed into place after their hashes, so this is the work of somebody else's hand. It may be the only copy.
            if not self._file(root, "hashes").exists():
                self._rebuild_hashes(root)
        for root in self._named("part") & self._named("blob"):
            self._file(root, "part").unlink(missing_ok=True)
        for root in self._named("hashes") - self._named("blob") - self._named("part"):
            self._file(root, "hashes").unlink(missing_ok=True)
        sync_directory(self._root)

    def _rebuild_hashes(self, root: bytes) -> None:
        path = self._file(root, "blob")
        size = path.stat().st_size
        with open(path, "rb") as file:
            hashes = [leaf_hash(chunk) for chunk in _read_chunks(file.fileno(), size)]
        if blob_root(size, hashes) == root:
            self._write_hashes(root, size, hashes)

    def _write_hashes(self, root: bytes, size: int, hashes: list[bytes]) -> None:
        replace_file(self._file(root, "hashes"), size.to_bytes(_SIZE_BYTES, "little") + b"".join(hashes))

    def _read_hashes(self, root: bytes, size: int) -> list[bytes] | None:
        """The stored chunk hashes, or None where there are none or they do not add up to the root."""
        wanted = chunk_count(size) * HASH_BYTES
        try:
            with open(self._file(root, "hashes"), "rb") as file:
                raw = file.read(_SIZE_BYTES + wanted + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, self._root) from error
        hashes = [raw[at : at + HASH_BYTES] for at in range(_SIZE_BYTES, len(raw), HASH_BYTES)]
        if len(raw) != _SIZE_BYTES + wanted or blob_root(size, hashes) != root:
            return None
        return hashes

    def _damaged(self, root: bytes) -> LocalError:
        return LocalError(
            f"the stored copy of blob {root.hex()[:16]} is damaged",
            "The disk may be failing: check it. Then add the model again, which replaces what is damaged",
        )


def _changed(name: str, size: int) -> LocalError:
    return LocalError(
        f"{name} was to have {size} bytes and has not: its file changed while it was read", "Leave it alone and try again"
    )


class Partial:
    """A blob on its way here, from `BlobStore.begin`. Threads may write different chunks at once."""

    def __init__(self, store: BlobStore, blob: Blob, handle: int) -> None:
        self.blob = blob
        self._store = store
        self._handle = handle
        self._hashes: list[bytes] | None = None
        self._here = bytearray(chunk_count(blob.size))
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def hashes_known(self) -> bool:
        return self._hashes is not None

    @property
    def verified_bytes(self) -> int:
        last = chunk_length(self.blob.size, len(self._here) - 1)
        return self._here.count(1) * CHUNK_BYTES - (CHUNK_BYTES - last if self._here[-1] else 0)

    def here(self) -> bytes:
        """A byte per chunk, 1 where it is here and verified."""
        return bytes(self._here)

    def has_chunk(self, index: int) -> bool:
        return 0 <= index < len(self._here) and self._here[index] == 1

    def accept_hashes(self, hashes: list[bytes]) -> None:
        """Take the leaf hashes of every chunk. Raises VerificationError unless they are the ones under the blob's root."""
        right_form = len(hashes) == chunk_count(self.blob.size) and all(len(entry) == HASH_BYTES for entry in hashes)
        if not right_form or blob_root(self.blob.size, hashes) != self.blob.root:
            raise VerificationError(f"the chunk hashes of {self.blob.name} do not add up to its root")
        try:
            self._store._write_hashes(self.blob.root, self.blob.size, hashes)
            self._resume(hashes)
        except OSError as error:
            raise storage_error(error, self._store._root) from error

    def _resume(self, hashes: list[bytes]) -> None:
        self._hashes = list(hashes)
        for index in _chunks_with_data(self._handle, self.blob.size):
            data = os.pread(self._handle, chunk_length(self.blob.size, index), index * CHUNK_BYTES)
            if leaf_hash(data) == hashes[index]:
                self._here[index] = 1

    def missing(self) -> list[int]:
        """Chunks still to come, in order; all of them as long as the hashes are not known."""
        return [index for index, here in enumerate(self._here) if not here]

    def write_chunk(self, index: int, data: bytes) -> None:
        """Keep one chunk. Raises VerificationError if it is not the right one, LocalError if the disk does not take it."""
        if self._hashes is None:
            raise RuntimeError("the chunk hashes come before the chunks")
        length = chunk_length(self.blob.size, index)
        if len(data) != length or leaf_hash(data) != self._hashes[index]:
            raise VerificationError(f"chunk {index} of {self.blob.name} is not the one that its hash names")
        try:
            write_all(self._handle, data, index * CHUNK_BYTES)
        except OSError as error:
            raise storage_error(error, self._store._root) from error
        self._here[index] = 1

    def commit(self) -> None:
        """Make it a whole blob, durably, and close. Raises LocalError; what was written stays to be resumed."""
        if self._hashes is None or not all(self._here):
            raise RuntimeError(f"{self.blob.name} still misses chunks")
        source, target = (self._store._file(self.blob.root, suffix) for suffix in ("part", "blob"))
        try:
            os.fsync(self._handle)
            source.replace(target)
            sync_directory(self._store._root)
        except OSError as error:
            raise storage_error(error, self._store._root) from error
        self.close()

    def close(self) -> None:
        """Stop here; what was written stays on disk to be resumed."""
        if self._open:
            self._open = False
            os.close(self._handle)
            self._store._downloading.pop(self.blob.root, None)
