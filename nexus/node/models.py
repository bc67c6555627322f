"""The models of this node: what is on disk, what is loaded, and the memory that both they and the KV caches share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from nexus.core.errors import CapacityError, LocalError, ModelFormatError, NotFoundError, TimedOutError
from nexus.core.manifest import EXACT_PLAN, FLOAT, Manifest, stage_pieces
from nexus.network.transport import PeerAddress
from nexus.node.blobs import Fetcher
from nexus.proof.arithmetic.plan import PLAN_BYTES_MAX, ExactPlan, plan_from_json
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog, held_bytes

if TYPE_CHECKING:
    from nexus.engine.stage import Stage

log = structlog.get_logger("nexus.models")

ProgressSink = Callable[[str, int, int], Awaitable[None]]
StageKey = tuple[bytes, int, int, str]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MANIFEST_TIMEOUT_S = 60.0
# Models that nobody here gave a name: fetched because a plan of some other node asked for it.
UNNAMED_MAX = 256


@dataclass
class _Slot:
    """One stage that is loaded, or on its way. `n_bytes`: what it takes of the memory, from before the first weight is read."""

    stage: Stage | None = None
    n_bytes: int = 0
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
        self.kept: Callable[[], set[bytes]] = set  # models that stay known here though they may have no name
        self._slots: dict[StageKey, _Slot] = {}
        self._kv_bytes: dict[bytes, int] = {}

    def loaded_roots(self) -> list[bytes]:
        """The blobs of every stage that is loaded, or on its way. From any thread."""
        roots: list[bytes] = []
        for model_root, start, end, _ in list(self._slots):
            try:
                manifest = self.catalog.manifest(model_root)
            except (NotFoundError, LocalError):
                continue
            roots += [blob.root for blob in (*manifest.files, *stage_pieces(manifest, start, end))]
        return roots

    @property
    def memory_used_bytes(self) -> int:
        return sum(slot.n_bytes for slot in self._slots.values()) + sum(self._kv_bytes.values())

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress], *, wanted_here: bool = False) -> Manifest:
        """The manifest of a root, fetched and checked if it is not here. `wanted_here`: by the owner of this node, which may keep
        it from fetching for the plans of others. Raises NotFoundError, TimedOutError, CapacityError."""
        if self.catalog.has(model_root):
            return self.catalog.manifest(model_root)
        if not wanted_here:
            self._check_may_fetch(model_root)
        await trio.to_thread.run_sync(self._forget_unused)
        with trio.move_on_after(MANIFEST_TIMEOUT_S):
            return await self._fetcher.manifest(model_root, sources)
        raise TimedOutError(
            f"nobody gave the manifest of model {model_root.hex()[:16]} within {MANIFEST_TIMEOUT_S:.0f} s", "See `nexus peers`"
        )

    def _forget_unused(self) -> None:
        """Make room among the models that strangers named: those go of which nothing is here. Raises CapacityError."""
        named = set(self.catalog.names().values()) | self.kept()
        unnamed = [root for root in self.catalog.roots() if root not in named]
        if len(unnamed) < UNNAMED_MAX:
            return
        for root in unnamed:
            if not held_bytes(self.catalog.manifest(root), self.blobs):
                self.catalog.remove(root)
                return
        raise CapacityError(
            f"this node holds parts of {UNNAMED_MAX} models for others, its limit", "Set serve.auto_fetch = false, or remove some"
        )

    async def files(self, manifest: Manifest, sources: Sequence[PeerAddress], progress: ProgressSink) -> dict[str, Path]:
        """Config and tokenizer, by name, as paths to read."""
        await self._complete(manifest, None, sources, progress)
        return {blob.name: self.blobs.path(blob.root) for blob in manifest.files}

    async def hold(self, manifest: Manifest, start: int, end: int, sources: Sequence[PeerAddress], progress: ProgressSink) -> None:
        """Have the layers [start, end) on the disk because the owner wants it, also where this node fetches nothing for the plans
        of others. Raises NotFoundError, CapacityError (quota), LocalError."""
        await self._complete(manifest, (start, end), sources, progress, wanted_here=True)

    async def exact_plan(self, manifest: Manifest, sources: Sequence[PeerAddress]) -> ExactPlan:
        """What a model of the exact profile computes, as its own exact.json says. Raises ModelFormatError."""
        blob = manifest.file(EXACT_PLAN)
        if blob is None or blob.size > PLAN_BYTES_MAX:
            raise ModelFormatError("the model's exact.json is missing or larger than any", "Add the model again")
        await self._complete(manifest, None, sources, _ignore_progress)
        return plan_from_json(await trio.to_thread.run_sync(self.blobs.path(blob.root).read_bytes))

    def paths(self, manifest: Manifest) -> dict[str, Path]:
        """The model's files and pieces that are here, by name."""
        return {blob.name: self.blobs.path(blob.root) for blob in (*manifest.files, *manifest.pieces) if self.blobs.has(blob.root)}

    def find(self, model_root: bytes) -> tuple[Manifest, dict[str, Path]]:
        """A model that is known here, and what of it is here. Raises NotFoundError."""
        manifest = self.catalog.manifest(model_root)
        return manifest, self.paths(manifest)

    @asynccontextmanager
    async def borrowed(self, manifest: Manifest, name: str, sources: Sequence[PeerAddress]) -> AsyncIterator[Path]:
        """A piece of the model to read from once: one that is not here is fetched, and let go again."""
        piece = manifest.piece(name)
        is_ours = await trio.to_thread.run_sync(self.blobs.has, piece.root)
        if not is_ours:
            self._check_may_fetch(manifest.root)
            await self._fetcher.blobs(manifest, [piece], sources)
        try:
            yield self.blobs.path(piece.root)
        finally:
            # Somebody may have begun to load it meanwhile.
            if not is_ours and all(key[0] != manifest.root for key in self._slots):
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self.blobs.remove, piece.root)

    @asynccontextmanager
    async def stage(
        self, manifest: Manifest, start: int, end: int, dtype: str, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> AsyncIterator[Stage]:
        """The loaded layers [start, end), fetched and read if need be; they stay loaded at least while the context is open."""
        key = (manifest.root, start, end, dtype)
        slot = self._slots.setdefault(key, _Slot())
        slot.users += 1
        try:
            async with slot.lock:
                if slot.stage is None:
                    slot.stage = await self._load(slot, manifest, start, end, dtype, sources, progress)
            yield slot.stage
        finally:
            slot.users -= 1
            slot.last_used_s = trio.current_time()
            if slot.stage is None and not slot.users:
                del self._slots[key]

    def reserve_kv(self, session: bytes, n_bytes: int) -> None:
        """Count `n_bytes` of KV cache to a session; 0 gives all back. Raises CapacityError when nothing more can make room."""
        before = self._kv_bytes.pop(session, 0)
        if not n_bytes:
            return
        self._make_room(n_bytes, f"the KV cache of a session needs {n_bytes} bytes")
        self._kv_bytes[session] = max(n_bytes, before)

    async def _load(
        self,
        slot: _Slot,
        manifest: Manifest,
        start: int,
        end: int,
        dtype: str,
        sources: Sequence[PeerAddress],
        progress: ProgressSink,
    ) -> Stage:
        pieces = stage_pieces(manifest, start, end)
        needed = sum(piece.size for piece in pieces)
        if manifest.profile == FLOAT:
            needed = needed * DTYPE_BYTES.get(dtype, 4) // DTYPE_BYTES.get(manifest.dtype, 4)
        if needed > self._memory_max_bytes:  # before gigabytes are fetched for nothing
            raise self._no_room(f"layers {start} to {end - 1} need {needed} bytes")
        await self._complete(manifest, (start, end), sources, progress)
        paths = {blob.name: self.blobs.path(blob.root) for blob in (*manifest.files, *pieces)}
        if manifest.profile == FLOAT:
            # What the pieces hold, not what the manifest says they hold: 16-bit weights that pass for float32 take twice as much.
            needed = await trio.to_thread.run_sync(_loaded_bytes, [paths[piece.name] for piece in pieces], dtype)
        else:
            needed = await trio.to_thread.run_sync(_exact_bytes, [paths[piece.name] for piece in pieces])
        self._make_room(needed, f"layers {start} to {end - 1} need {needed} bytes")
        slot.n_bytes = needed  # now, so that what is loaded at the same time counts it
        try:
            await progress("loading", 0, 0)
            stage = await trio.to_thread.run_sync(partial(_load_stage, manifest, start, end, paths, dtype))
        except BaseException:
            slot.n_bytes = 0
            raise
        slot.n_bytes = stage.weight_bytes
        log.info("stage_loaded", model=manifest.root.hex()[:16], start=start, end=end, bytes=stage.weight_bytes)
        return stage

    async def _complete(
        self,
        manifest: Manifest,
        layers: tuple[int, int] | None,
        sources: Sequence[PeerAddress],
        progress: ProgressSink,
        *,
        wanted_here: bool = False,
    ) -> None:
        """Get what is missing of these layers and of the model's files; None: the files alone. `wanted_here`: by the owner."""
        pieces = () if layers is None else stage_pieces(manifest, *layers)
        missing = [blob for blob in (*manifest.files, *pieces) if not self.blobs.has(blob.root)]
        if missing:
            if not wanted_here:
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
        idle = sorted((key for key, slot in self._slots.items() if not slot.users), key=lambda key: self._slots[key].last_used_s)
        for key in idle:
            if self.memory_used_bytes + needed <= self._memory_max_bytes:
                return
            del self._slots[key]
            log.info("stage_unloaded", start=key[1], end=key[2])
        if self.memory_used_bytes + needed > self._memory_max_bytes:
            raise self._no_room(why)

    def _no_room(self, why: str) -> CapacityError:
        return CapacityError(
            f"{why}, and {self.memory_used_bytes} of {self._memory_max_bytes} bytes are in use",
            "Wait for other sessions to end, or raise serve.memory_max_bytes there",
        )


def _loaded_bytes(pieces: Sequence[Path], dtype: str) -> int:
    """Memory of the weights in these files once they are loaded. Raises ModelFormatError for a file that is no sound piece."""
    from nexus.engine.safetensors_check import check_safetensors

    return DTYPE_BYTES[dtype] * sum(prod(spec.shape) for path in pieces for spec in check_safetensors(path).values())


def _exact_bytes(pieces: Sequence[Path]) -> int:
    """The same of pieces in the exact profile: more than they hold where their shapes or this processor ask for it."""
    from nexus.engine.exact.stage import loaded_bytes

    return loaded_bytes(pieces)


def _load_stage(manifest: Manifest, start: int, end: int, paths: dict[str, Path], dtype: str) -> Stage:
    # torch and transformers take seconds to import: a node that serves nothing never pays for them.
    from nexus.engine.stage import load_stage

    return load_stage(manifest, start, end, paths, dtype=dtype)


async def _ignore_progress(phase: str, done: int, total: int) -> None:
    """Of files that are small."""
