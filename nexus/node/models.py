"""The models of this node: what is on disk, what is loaded, and the memory that both they and the KV caches share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from nexus.core.errors import CapacityError, NotFoundError
from nexus.core.manifest import Manifest, stage_pieces
from nexus.network.transport import PeerAddress
from nexus.node.blobs import Fetcher
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog

if TYPE_CHECKING:
    from nexus.engine.stage import Stage

log = structlog.get_logger("nexus.models")

ProgressSink = Callable[[str, int, int], Awaitable[None]]
StageKey = tuple[bytes, int, int, str]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class _Loaded:
    stage: Stage
    users: int = 0
    last_used_s: float = 0.0
    lock: trio.Lock = field(default_factory=trio.Lock)


class Models:
    """Loaded stages are shared between sessions and kept while there is room; the least recently used goes first.

    `changed` is called when more of a model has come to this node, so that it is announced.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        fetcher: Fetcher,
        *,
        auto_fetch: bool,
        memory_max_bytes: int,
        changed: Callable[[], None],
    ) -> None:
        self.catalog = catalog
        self.blobs = blobs
        self._fetcher = fetcher
        self._auto_fetch = auto_fetch
        self._memory_max_bytes = memory_max_bytes
        self._changed = changed
        self._loaded: dict[StageKey, _Loaded] = {}
        self._loading: dict[StageKey, trio.Lock] = {}
        self._kv_bytes: dict[bytes, int] = {}

    @property
    def memory_used_bytes(self) -> int:
        weights: int = sum(loaded.stage.weight_bytes for loaded in self._loaded.values())
        return weights + sum(self._kv_bytes.values())

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress]) -> Manifest:
        """The manifest of a root, fetched and checked if it is not here. Raises NotFoundError."""
        if self.catalog.has(model_root):
            return self.catalog.manifest(model_root)
        self._check_may_fetch(model_root)
        return await self._fetcher.manifest(model_root, sources)

    async def files(self, manifest: Manifest, sources: Sequence[PeerAddress], progress: ProgressSink) -> dict[str, Path]:
        """Config and tokenizer, by name, as paths to read."""
        await self._complete(manifest, None, sources, progress)
        return {blob.name: self.blobs.path(blob.root) for blob in manifest.files}

    @asynccontextmanager
    async def stage(
        self, manifest: Manifest, start: int, end: int, dtype: str, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> AsyncIterator[Stage]:
        """The loaded layers [start, end), fetched and read if need be; they stay loaded at least while the context is open."""
        key = (manifest.root, start, end, dtype)
        async with self._loading.setdefault(key, trio.Lock()):
            if key not in self._loaded:
                self._loaded[key] = _Loaded(await self._load(manifest, start, end, dtype, sources, progress))
            loaded = self._loaded[key]
            loaded.users += 1
        try:
            yield loaded.stage
        finally:
            loaded.users -= 1
            loaded.last_used_s = trio.current_time()

    def reserve_kv(self, session: bytes, n_bytes: int) -> None:
        """Count `n_bytes` of KV cache to a session; 0 gives all back. Raises CapacityError when nothing more can make room."""
        before = self._kv_bytes.pop(session, 0)
        if not n_bytes:
            return
        self._make_room(n_bytes, f"the KV cache of a session needs {n_bytes} bytes")
        self._kv_bytes[session] = max(n_bytes, before)

    async def _load(
        self, manifest: Manifest, start: int, end: int, dtype: str, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> Stage:
        pieces = stage_pieces(manifest, start, end)
        await self._complete(manifest, (start, end), sources, progress)
        needed = sum(piece.size for piece in pieces) * DTYPE_BYTES.get(dtype, 4) // DTYPE_BYTES.get(manifest.dtype, 4)
        self._make_room(needed, f"layers {start} to {end - 1} need {needed} bytes")
        await progress("loading", 0, 0)
        paths = {blob.name: self.blobs.path(blob.root) for blob in (*manifest.files, *pieces)}
        stage = await trio.to_thread.run_sync(partial(_load_stage, manifest, start, end, paths, dtype))
        log.info("stage_loaded", model=manifest.root.hex()[:16], start=start, end=end, bytes=stage.weight_bytes)
        return stage

    async def _complete(
        self, manifest: Manifest, layers: tuple[int, int] | None, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> None:
        """Get what is missing of these layers and of the model's files; None: the files alone."""
        pieces = () if layers is None else stage_pieces(manifest, *layers)
        missing = [blob for blob in (*manifest.files, *pieces) if not self.blobs.has(blob.root)]
        if missing:
            self._check_may_fetch(manifest.root)
            await self._fetcher.blobs(manifest, missing, sources, progress)
            self._changed()

    def _check_may_fetch(self, model_root: bytes) -> None:
        if not self._auto_fetch:
            raise NotFoundError(
                f"model {model_root.hex()[:16]} is not complete here, and this node does not fetch",
                "`nexus model add` it there, or set serve.auto_fetch = true",
            )

    def _make_room(self, needed: int, why: str) -> None:
        """Unload idle stages, the longest idle first, until `needed` bytes fit. Raises CapacityError."""
        idle = sorted((key for key, loaded in self._loaded.items() if not loaded.users), key=lambda k: self._loaded[k].last_used_s)
        for key in idle:
            if self.memory_used_bytes + needed <= self._memory_max_bytes:
                return
            del self._loaded[key]
            log.info("stage_unloaded", start=key[1], end=key[2])
        if self.memory_used_bytes + needed > self._memory_max_bytes:
            raise CapacityError(
                f"{why}, and {self.memory_used_bytes} of {self._memory_max_bytes} bytes are in use",
                "Wait for other sessions to end, or raise serve.memory_max there",
            )


def _load_stage(manifest: Manifest, start: int, end: int, paths: dict[str, Path], dtype: str) -> Stage:
    # torch and transformers take seconds to import: a node that serves nothing never pays for them.
    from nexus.engine.stage import load_stage

    return load_stage(manifest, start, end, paths, dtype=dtype)
