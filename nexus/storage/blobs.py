"""Content-addressed blobs on disk, whole or half fetched.

    <hex root>.blob     the bytes, whole and verified
    <hex root>.part     the same length, while chunks are still missing
    <hex root>.hashes   its size (8 bytes little-endian) and the leaf hash of every chunk; they add up to the root in the name
    *.tmp               being written; swept at start

Every name comes from a root, never from a peer's text. A `.part` needs no record of what it holds: when it is opened again, each
chunk on disk is hashed and counts if it is right, so a crash or a power loss at any point costs at most the chunks not yet synced.
One process uses a store at a time (the daemon locks its data directory); threads may share it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator
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
        self._downloading: set[bytes] = set()

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
        return self._file(root, "blob")

    def roots(self) -> list[bytes]:
        """Every whole blob here, sorted."""
        return sorted(root for root in self._named("blob") if self.has(root))

    def chunk_hashes(self, root: bytes) -> list[bytes]:
        """Leaf hashes of every chunk, checked against the root. Raises NotFoundError, LocalError where they are damaged."""
        size = self.size(root)
        hashes = self._read_hashes(root, size)
        if hashes is None:
            raise self._damaged(root)
        return hashes

    def read_chunk(self, root: bytes, index: int) -> bytes:
        """One chunk, checked against its hash. Raises NotFoundError, MalformedError, LocalError where the disk changed it."""
        size = self.size(root)
        length = chunk_length(size, index)
        try:
            with open(self._file(root, "hashes"), "rb") as file:
                file.seek(_SIZE_BYTES + index * HASH_BYTES)
                expected = file.read(HASH_BYTES)
            with open(self._file(root, "blob"), "rb") as file:
                file.seek(index * CHUNK_BYTES)
                data = file.read(length)
        except FileNotFoundError:
            raise NotFoundError(f"blob {root.hex()[:16]} was just removed from this node") from None
        except OSError as error:
            raise storage_error(error, self._root) from error
        if leaf_hash(data) != expected:
            raise self._damaged(root)
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
        kept = frozenset(keep) | self._downloading
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

    def require_space(self, size: int) -> None:
        """Raises CapacityError if `size` more bytes break the quota, LocalError if the disk cannot take them."""
        if self._quota_bytes is not None and self.used_bytes() + size > self._quota_bytes:
            raise CapacityError(
                f"{size:,} bytes more do not fit: models take {self.used_bytes():,} of {self._quota_bytes:,} bytes",
                "Raise serve.disk_max_bytes, or keep this model in another data directory (--home)",
            )
        try:
            self._prepare()
            disk = os.statvfs(self._root)
        except OSError as error:
            raise storage_error(error, self._root) from error
        if size > disk.f_bavail * disk.f_frsize:
            raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self._root)

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
            self._downloading.add(blob.root)
        partial = Partial(self, blob, handle)
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
        self._verified: set[int] = set()
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
        return sum(chunk_length(self.blob.size, index) for index in tuple(self._verified))

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
                self._verified.add(index)

    def missing(self) -> list[int]:
        """Chunks still to come, in order; all of them as long as the hashes are not known."""
        return [index for index in range(chunk_count(self.blob.size)) if index not in self._verified]

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
        self._verified.add(index)

    def commit(self) -> None:
        """Make it a whole blob, durably, and close. Raises LocalError; what was written stays to be resumed."""
        if self._hashes is None or self.missing():
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
            self._store._downloading.discard(self.blob.root)
