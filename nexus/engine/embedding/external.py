"""Vectors that somebody else makes: of a model that Nexus cannot run, a service, or pictures. Here they are only checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from numpy.typing import ArrayLike

from nexus.core.errors import UsageError
from nexus.core.hashing import HASH_BYTES, tagged_hash
from nexus.engine.embedding.embedder import Progress, Vectors
from nexus.memory.block import DIMENSION_MAX, MODEL_BYTES_MAX
from nexus.memory.quantise import unit_vectors


class ExternalVectors:
    """A model that is known by its name, dimension and fingerprint alone. `take` is the way in for its vectors."""

    exact = False
    tokens_max = 0

    def __init__(self, name: str, dimension: int, fingerprint: bytes | None = None) -> None:
        """`fingerprint`: 32 bytes; None makes it from name and dimension, so that all who name the model alike mean the same.
        Raises UsageError."""
        if not 1 <= len(name.encode("utf-8")) <= MODEL_BYTES_MAX:
            raise UsageError("the model's name is empty or too long", f"Give 1 to {MODEL_BYTES_MAX} bytes")
        if not 1 <= dimension <= DIMENSION_MAX:
            raise UsageError(f"vectors of {dimension} dimensions", f"There are 1 to {DIMENSION_MAX}")
        if fingerprint is not None and len(fingerprint) != HASH_BYTES:
            raise UsageError(f"a fingerprint of {len(fingerprint)} bytes", f"It has {HASH_BYTES}")
        self.name, self.dimension = name, dimension
        self.fingerprint = fingerprint or tagged_hash("external-model", name.encode("utf-8"), dimension.to_bytes(4, "little"))

    def take(self, vectors: ArrayLike) -> Vectors:
        """The vectors [n, dimension] with length 1. Raises UsageError for a wrong dimension, NaN, infinity, and zero vectors."""
        return unit_vectors(vectors, self.dimension)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        self._cannot()

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        self._cannot()

    def _cannot(self) -> NoReturn:
        raise UsageError(f"nothing embeds for {self.name!r}: its vectors are made elsewhere", "Hand the vectors in with the texts")
