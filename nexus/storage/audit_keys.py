"""The secret keys with which this node audits layers that it does not hold (nexus.proof.freivalds), one file per piece of a model.

<home>/audit-keys/<piece root, hex>.keys    0600: a checksum of 32 bytes, then the record

A file that is lost or damaged costs the time to derive the keys again, no more, so nothing here is ever repaired.
"""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from nexus.core.errors import LocalError, MalformedError
from nexus.core.hashing import HASH_BYTES
from nexus.proof.freivalds import PieceKeys
from nexus.storage.durable import replace_file, storage_error

# 1,500 layers of a model of a billion parameters. The longest unused go first.
KEYS_BYTES_MAX = 512 * 1024 * 1024
_SUFFIX = ".keys"


class AuditKeys:
    """Files of keys, least recently used out first. `bytes_max`: of all together."""

    def __init__(self, directory: Path, bytes_max: int = KEYS_BYTES_MAX) -> None:
        self._directory = directory
        self._bytes_max = bytes_max

    def get(self, piece_root: bytes) -> PieceKeys | None:
        """The keys of a piece, None where there are none or the disk damaged them."""
        path = self._file(piece_root)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        try:
            if blake3(content[HASH_BYTES:]).digest() != content[:HASH_BYTES]:
                raise MalformedError("the checksum does not hold")
            return PieceKeys.from_bytes(content[HASH_BYTES:])
        except MalformedError:
            self.drop(piece_root)
            return None

    def put(self, piece_root: bytes, keys: PieceKeys) -> None:
        """Keep keys, readable by this user alone. Raises LocalError."""
        body = keys.to_bytes()
        self._make_room(len(body))
        replace_file(self._file(piece_root), blake3(body).digest() + body)

    def drop(self, piece_root: bytes) -> None:
        """Forget the keys of a piece: they failed, or might be known to somebody."""
        self._file(piece_root).unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        try:
            files = [(path, path.stat()) for path in self._directory.glob(f"*{_SUFFIX}")]
            total = needed + sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
                if total <= self._bytes_max:
                    return
                path.unlink(missing_ok=True)
                total -= stat.st_size
        except OSError as error:
            raise storage_error(error, self._directory) from error
        if total > self._bytes_max:
            raise LocalError(f"keys of {needed} bytes are more than {self._directory} may hold", "Audit a smaller model")

    def _file(self, piece_root: bytes) -> Path:
        return self._directory / f"{piece_root.hex()}{_SUFFIX}"
