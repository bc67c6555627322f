"""One tensor of a model directory, read in pieces: never more of it in memory than one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CHUNK_BYTES
from nexus.engine.safetensors_check import TensorSpec


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a tensor is. `name`: its name in the file, to speak of it."""

    name: str
    path: Path
    spec: TensorSpec

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Its bytes in runs of `chunk_bytes`, the last one shorter. Raises ModelFormatError."""
        return file_chunks(self.path, self.spec.start, self.spec.size, chunk_bytes)


def file_chunks(path: Path, start: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """`size` bytes of a file from `start` on, in whole runs. Raises ModelFormatError where it ends before."""
    with path.open("rb") as file:
        file.seek(start)
        while size:
            chunk = file.read(min(size, chunk_bytes))
            if len(chunk) < min(size, chunk_bytes):
                raise ModelFormatError(
                    f"{path.name} became shorter while it was read", "Leave the directory alone while it is added"
                )
            size -= len(chunk)
            yield chunk
