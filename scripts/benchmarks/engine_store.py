"""A model taken apart on disk for the processes of a benchmark: the daemon's own blob store, and the manifest beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nexus.core.manifest import Manifest, stage_pieces
from nexus.storage.blobs import BlobStore

if TYPE_CHECKING:
    from nexus.engine.stage import Stage

_MANIFEST_FILE = "manifest"


def add(source: Path, store: Path, profile: str) -> Manifest:
    """Import the model directory `source` into the directory `store` as `profile` ("exact" or "float")."""
    from nexus.engine.importer import import_model

    manifest = import_model(source, BlobStore.open(store), lambda name, done, total: None, profile=profile)
    (store / _MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def read_manifest(store: Path) -> Manifest:
    return Manifest.from_bytes((store / _MANIFEST_FILE).read_bytes()).check()


def paths(store: Path, manifest: Manifest, start: int, end: int) -> dict[str, Path]:
    """The files that the stage of layers [start, end) needs, by name."""
    blobs = BlobStore(store)
    return {blob.name: blobs.path(blob.root) for blob in (*stage_pieces(manifest, start, end), *manifest.files)}


def load(store: Path, start: int = 0, end: int | None = None, kernel: str | None = None) -> Stage:
    """The stage of layers [start, end), by default the whole model. `kernel`: None for the one that the engine chooses."""
    from nexus.engine.stage import load_stage

    manifest = read_manifest(store)
    last = manifest.layers if end is None else end
    return load_stage(manifest, start, last, paths(store, manifest, start, last), kernel=kernel)


def bytes_per_token(manifest: Manifest) -> int:
    """Stored weights that decoding a token reads: all but the embedding, of which it takes one row, unless the head shares it."""
    return manifest.weight_bytes - (0 if manifest.tied else manifest.pieces[0].size)


def balanced_cut(manifest: Manifest) -> int:
    """Where to cut the model in two so that both halves read about as many bytes per token.

    The last half reads the head, which for a tied model is the embedding; the first reads one row of the embedding only.
    """
    embedding, *layers, head = manifest.pieces
    end = head.size + (embedding.size if manifest.tied else 0)

    def uneven(cut: int) -> int:
        return abs(sum(piece.size for piece in layers[:cut]) - sum(piece.size for piece in layers[cut:]) - end)

    return min(range(1, manifest.layers), key=uneven)
