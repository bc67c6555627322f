"""Memory and disk under strangers' plans: what is loaded at the same time is counted, and nothing grows without bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from nexus.core.errors import CapacityError, ModelFormatError, NotFoundError, TimedOutError
from nexus.core.hashing import leaf_hash
from nexus.core.manifest import EMBEDDING, HEAD, Blob, Manifest, layer_name, stage_pieces
from nexus.engine.safetensors_check import DTYPE_BYTES, encode_header
from nexus.network.transport import PeerAddress
from nexus.node import models
from nexus.node.models import Models
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog

WEIGHTS = 256
PIECE_BYTES = 4 * WEIGHTS


def model_in(store: BlobStore, number: int = 0, stored: str = "F32") -> Manifest:
    """A model of eight layers, all of it in the store; n layers take n * PIECE_BYTES, and more at the ends. It says that it is
    stored in float32, and is so in `stored`."""

    def blob(name: str) -> Blob:
        header = encode_header([(f"{number} {name}", stored, (WEIGHTS,))])
        content = header + bytes(WEIGHTS * DTYPE_BYTES[stored])
        return store.put(name, len(content), [content])

    pieces = tuple(blob(name) for name in (EMBEDDING, *(layer_name(i) for i in range(8)), HEAD))
    return Manifest(1, "causal", "Toy", "float", "float32", 8, 4, 256, 4096, 8, 0, pieces, (blob("config.json"),), ()).check()


def elsewhere(number: int) -> Manifest:
    """A model of which nothing is here."""

    def blob(name: str) -> Blob:
        return Blob(name, PIECE_BYTES, leaf_hash(f"elsewhere {number} {name}".encode()))

    pieces = tuple(map(blob, (EMBEDDING, "layer.0", HEAD)))
    return Manifest(1, "causal", "Toy", "float", "float32", 1, 4, 256, 4096, 8, 0, pieces, (blob("config.json"),), ())


@dataclass
class ToyFetcher:
    """Gives any manifest it was told of, and no blob; or does nothing at all."""

    catalog: Catalog
    stalls: bool = False
    known: dict[bytes, Manifest] = field(default_factory=dict)
    asked_for_blobs: int = 0

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress]) -> Manifest:
        if self.stalls:
            await trio.sleep_forever()
        self.catalog.keep(self.known[model_root])
        return self.known[model_root]

    async def blobs(self, *_: object) -> None:
        self.asked_for_blobs += 1
        raise NotFoundError("nobody has it")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which layers were loaded, in order. Loading takes the time that the trio thread needs to start the others."""
    begun: list[tuple[int, int]] = []

    def load(manifest: Manifest, start: int, end: int, paths: dict[str, Path], dtype: str) -> SimpleNamespace:
        begun.append((start, end))
        trio.from_thread.run(trio.testing.wait_all_tasks_blocked)
        return SimpleNamespace(weight_bytes=len(stage_pieces(manifest, start, end)) * PIECE_BYTES)

    monkeypatch.setattr(models, "_load_stage", load)
    return begun


def models_in(path: Path, memory: int) -> tuple[Models, ToyFetcher]:
    store, catalog = BlobStore.open(path), Catalog.open(path)
    fetcher = ToyFetcher(catalog)
    return Models(catalog, store, fetcher, auto_fetch=True, memory_max_bytes=memory, changed=lambda: None), fetcher  # type: ignore[arg-type]


async def ignore(phase: str, done: int, total: int) -> None:
    pass


async def test_stages_loaded_at_the_same_time_do_not_each_take_the_same_room(tmp_path: Path, loads: list[tuple[int, int]]) -> None:
    held, _ = models_in(tmp_path, memory=2 * PIECE_BYTES)
    manifest = model_in(held.blobs)
    used: list[int] = []
    refused: list[CapacityError] = []
    settled = trio.Event()

    def settle() -> None:
        if len(used) + len(refused) == 6:
            settled.set()

    async def hold(layer: int) -> None:
        try:
            async with held.stage(manifest, layer, layer + 1, "float32", (), ignore):
                used.append(held.memory_used_bytes)
                settle()
                await settled.wait()
        except CapacityError as error:
            refused.append(error)
            settle()

    async with trio.open_nursery() as nursery:
        for layer in range(1, 7):
            nursery.start_soon(hold, layer)
    assert len(loads) == len(used) == 2
    assert max(used) == 2 * PIECE_BYTES


async def test_a_stage_is_loaded_once_for_all_who_want_it_and_counted_once(tmp_path: Path, loads: list[tuple[int, int]]) -> None:
    held, _ = models_in(tmp_path, memory=10 * PIECE_BYTES)
    manifest = model_in(held.blobs)
    stages = []

    async def use() -> None:
        async with held.stage(manifest, 1, 3, "float32", (), ignore) as stage:
            stages.append(stage)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(use)
    assert loads == [(1, 3)]
    assert len(set(map(id, stages))) == 1
    assert held.memory_used_bytes == 2 * PIECE_BYTES


async def test_weights_count_as_what_they_are_and_not_as_what_the_manifest_says(
    tmp_path: Path, loads: list[tuple[int, int]]
) -> None:
    held, _ = models_in(tmp_path, memory=4 * PIECE_BYTES - 1)
    liar = model_in(held.blobs, stored="BF16")
    assert sum(piece.size for piece in liar.pieces[2:6]) < held._memory_max_bytes
    with pytest.raises(CapacityError):
        async with held.stage(liar, 1, 5, "float32", (), ignore):
            pass
    assert not loads


async def test_a_piece_that_is_none_is_not_loaded(tmp_path: Path, loads: list[tuple[int, int]]) -> None:
    held, _ = models_in(tmp_path, memory=10_000)
    manifest = model_in(held.blobs)
    junk = held.blobs.put("layer.1", 8, [bytes(8)])
    pieces = (*manifest.pieces[:2], junk, *manifest.pieces[3:])
    with pytest.raises(ModelFormatError):
        async with held.stage(replace(manifest, pieces=pieces), 1, 2, "float32", (), ignore):
            pass
    assert not loads
    assert not held._slots


async def test_what_never_fits_is_not_even_fetched(tmp_path: Path) -> None:
    held, fetcher = models_in(tmp_path, memory=2 * PIECE_BYTES)
    with pytest.raises(CapacityError):
        async with held.stage(elsewhere(1), 0, 1, "float32", (), ignore):
            pass
    assert not fetcher.asked_for_blobs


async def test_a_load_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    held, fetcher = models_in(tmp_path, memory=10 * PIECE_BYTES)
    for start in range(50):
        with pytest.raises(NotFoundError):
            async with held.stage(elsewhere(start), 0, 1, "float32", (), ignore):
                pass
    assert fetcher.asked_for_blobs == 50
    assert not held.memory_used_bytes
    assert not held._slots


async def test_the_models_that_strangers_name_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "UNNAMED_MAX", 4)
    held, fetcher = models_in(tmp_path, memory=10 * PIECE_BYTES)
    mine = elsewhere(0)
    held.catalog.add("mine", mine)
    served = model_in(held.blobs, 1)
    held.catalog.keep(served)
    for number in range(2, 30):
        manifest = elsewhere(number)
        fetcher.known[manifest.root] = manifest
        assert await held.manifest(manifest.root, ()) == manifest
    assert len(held.catalog.roots()) == 5
    assert {mine.root, served.root} <= set(held.catalog.roots())


async def test_parts_held_for_others_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "UNNAMED_MAX", 2)
    held, fetcher = models_in(tmp_path, memory=10 * PIECE_BYTES)
    for number in range(2):
        held.catalog.keep(model_in(held.blobs, number))
    stranger = elsewhere(9)
    fetcher.known[stranger.root] = stranger
    with pytest.raises(CapacityError):
        await held.manifest(stranger.root, ())
    assert stranger.root not in held.catalog.roots()


async def test_a_model_that_nobody_gives_is_not_waited_for_without_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    held, fetcher = models_in(tmp_path, memory=10 * PIECE_BYTES)
    fetcher.stalls = True
    with pytest.raises(TimedOutError):
        await held.manifest(elsewhere(1).root, ())
