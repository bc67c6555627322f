"""The embedders of this node: opened when they are first needed, in a worker thread, and kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from nexus.core.errors import CapacityError, UsageError
from nexus.core.hashing import HASH_BYTES
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.external import ExternalVectors
from nexus.engine.embedding.opening import Stored, open_embedder
from nexus.models import BUILTIN_NAMES

LOADED_MAX = 4


class Embedders:
    """`default`: the model of the settings. `stored`: models that were added here. `take_in`: adds a built-in model that is not."""

    def __init__(self, default: str, stored: Stored, take_in: Callable[[str], Awaitable[None]], threads: int) -> None:
        self.default = default
        self._stored = stored
        self._take_in = take_in
        self._threads = threads
        self._loaded: dict[str, Embedder] = {}
        self._loading = trio.Lock()

    async def get(self, name: str | None = None) -> Embedder:
        """Raises UsageError, NotFoundError, ModelFormatError, LocalError, CapacityError."""
        name = name or self.default
        async with self._loading:
            embedder = self._loaded.get(name)
            if embedder is None:
                if len(self._loaded) >= LOADED_MAX:
                    raise CapacityError(f"this node has {LOADED_MAX} embedding models loaded", "Restart it to use others")
                if name in BUILTIN_NAMES:
                    await self._take_in(name)
                embedder = await trio.to_thread.run_sync(lambda: open_embedder(name, self._stored, workers=self._threads))
                self._loaded[name] = embedder
            return embedder

    def loaded(self, fingerprint: bytes) -> Embedder | None:
        """The loaded embedder of this fingerprint."""
        return next((one for one in self._loaded.values() if one.fingerprint == fingerprint), None)


def external_model(name: str, fingerprint: str, dimension: int) -> ExternalVectors:
    """The model that a user names beside a vector of its own. `fingerprint`: in hex, or empty. Raises UsageError."""
    try:
        given = bytes.fromhex(fingerprint) if fingerprint else None
    except ValueError as error:
        raise UsageError("the fingerprint of the vector's model is not hex", f"It has {HASH_BYTES} bytes") from error
    return ExternalVectors(name, dimension, given)
