"""What an unfinished import has stored already, so that the next try does not make it again.

    <hex key>.import    JSON: name, size and root of every piece that is whole in the blob store

A journal is a hint. A piece counts only if its blob is in the store and still has the bytes of its root; a damaged journal counts
as none. It is removed when the model is in the catalog.
"""

from __future__ import annotations

import json
from pathlib import Path

from nexus.core.errors import LocalError, NotFoundError
from nexus.core.hashing import HASH_BYTES
from nexus.core.manifest import LAYERS_MAX, Blob
from nexus.storage.blobs import BlobStore
from nexus.storage.durable import replace_file, storage_error

# Imports that were given up leave theirs behind: the oldest go.
JOURNALS_MAX = 16
_BYTES_MAX = 1 << 20


class ImportJournal:
    """Of one import at a time, in the directory `root`. `begin` comes first."""

    def __init__(self, root: Path, store: BlobStore) -> None:
        self._root = root
        self._store = store
        self._path: Path | None = None
        self._blobs: dict[str, Blob] = {}

    def begin(self, key: bytes) -> None:
        """Go on with the import `key`, or start it. Raises LocalError."""
        self._path = self._root / f"{key.hex()}.import"
        self._blobs = _read(self._path)
        self._drop_oldest()

    def recall(self, name: str) -> Blob | None:
        """The piece `name` if it is stored, read once more and found whole."""
        blob = self._blobs.get(name)
        if blob is None:
            return None
        try:
            if self._store.size(blob.root) == blob.size:
                self._store.verify(blob.root)
                return blob
        except (NotFoundError, LocalError):
            pass  # gone or damaged: it is made anew
        return None

    def note(self, blob: Blob) -> None:
        """Remember a piece that is stored. Raises LocalError."""
        assert self._path is not None, "begin() comes first"
        self._blobs[blob.name] = blob
        listed = [[one.name, one.size, one.root.hex()] for one in self._blobs.values()]
        replace_file(self._path, json.dumps({"spec": 1, "pieces": listed}).encode("ascii") + b"\n")

    def end(self) -> None:
        """Forget the import: it is whole. Raises LocalError."""
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error, self._path) from error
        self._path, self._blobs = None, {}

    def _drop_oldest(self) -> None:
        try:
            paths = sorted(self._root.glob("*.import"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in [path for path in paths if path != self._path][JOURNALS_MAX - 1 :]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self._root) from error


def _read(path: Path) -> dict[str, Blob]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_BYTES_MAX))
        listed = value["pieces"] if value["spec"] == 1 else []
        blobs = {name: Blob(name, size, bytes.fromhex(root)) for name, size, root in listed}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise storage_error(error, path) from error
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    sound = all(
        isinstance(blob.name, str) and type(blob.size) is int and blob.size >= 0 and len(blob.root) == HASH_BYTES
        for blob in blobs.values()
    )
    return blobs if sound and len(blobs) <= LAYERS_MAX + 2 else {}
