"""Weight rows out of pieces on disk, proven under the model's root: what evidence that carries no weights is verified with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError, ModelFormatError, NotFoundError
from nexus.core.hashing import MerkleTree
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, Manifest
from nexus.engine.exact.pieces import Piece
from nexus.engine.safetensors_check import check_safetensors
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import (
    TABLES,
    RowLayout,
    Section,
    WeightProof,
    leaf_hashes_of,
    linear_leaves,
    piece_names,
    row_layout,
    tensor_leaves,
)
from nexus.proof.evidence.model import checked_plan

# Trees of pieces that are kept: an embedding of 150,000 rows takes some 25 MB.
_TREES_MAX = 4
_BLOCK_ROWS = 4096

# A model's manifest, and where its blobs are by name. Raises NotFoundError for a model that is not here.
Find = Callable[[bytes], tuple[Manifest, Mapping[str, Path]]]


class StoredWeights:
    """A `nexus.proof.evidence.WeightSource` over the models of this machine. Not for several threads at once."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._open: OrderedDict[tuple[bytes, int], _StoredPiece] = OrderedDict()

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        """Leaves [start, start + count) of a piece's tree of rows. Raises NotFoundError, and LocalError where the disk fails or
        does not hold what the manifest names."""
        return self._piece(model_root, piece).prove(start, count)

    def _piece(self, model_root: bytes, number: int) -> _StoredPiece:
        key = model_root, number
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        manifest, files = self._find(model_root)
        try:
            plan = checked_plan(manifest, _path(files, EXACT_PLAN).read_bytes())
            name = piece_names(plan)[number]
            stored = _StoredPiece(number, plan, name, _path(files, EXACT_TABLES if name == TABLES else name))
        except OSError as error:
            raise LocalError(f"the model's files cannot be read: {error.strerror}", "Check the disk") from error
        except ModelFormatError as error:
            raise LocalError(f"the model's files are damaged: {error.cause}", "Fetch the model again") from error
        if stored.root != manifest.rows[number]:
            raise LocalError(f"{name} of model {model_root.hex()[:16]} is not what its manifest names", "Fetch the model again")
        while len(self._open) >= _TREES_MAX:
            self._open.popitem(last=False)
        self._open[key] = stored
        return stored


def _path(files: Mapping[str, Path], name: str) -> Path:
    if name not in files:
        raise NotFoundError(f"{name} of the model is not on this machine", "Verify it where the model is whole")
    return files[name]


class _StoredPiece:
    """One piece, or the tables: the tree of its rows in memory, the rows on disk."""

    def __init__(self, number: int, plan: ExactPlan, name: str, path: Path) -> None:
        self._number = number
        self._layout: RowLayout = row_layout(plan, name)
        self._piece = Piece(path, _shapes(path) if name == TABLES else plan.piece_tensors(name))
        self._vectors: dict[str, NDArray[Any]] = {}
        hashes = []
        for section in self._layout.sections:
            for start in range(0, section.count, _BLOCK_ROWS):
                hashes += leaf_hashes_of(self._rows(section, start, min(_BLOCK_ROWS, section.count - start)))
        self._tree = MerkleTree(hashes)

    @property
    def root(self) -> bytes:
        return self._tree.root

    def prove(self, start: int, count: int) -> WeightProof:
        data = []
        for section in self._layout.sections:
            low, high = max(start, section.first), min(start + count, section.first + section.count)
            if low < high:
                data.append(self._rows(section, low - section.first, high - low).tobytes())
        siblings = self._tree.range_proof(start, start + count)
        return WeightProof(self._number, start, count, b"".join(data), tuple(siblings))

    def _rows(self, section: Section, start: int, count: int) -> NDArray[np.uint8]:
        """Leaves [count, leaf bytes] of a section."""
        here, piece = slice(start, start + count), self._piece
        if section.linear:
            bias = self._vector(f"{section.name}.bias")[here] if section.biased else None
            scale = self._vector(f"{section.name}.scale")[here]
            return linear_leaves(piece.rows(f"{section.name}.weight", start, count), scale, bias)
        if section.float64:
            return tensor_leaves(piece.tensor(section.name)[here])
        if len(piece.shape(section.name)) == 1:
            return tensor_leaves(piece.tensor(section.name))
        return tensor_leaves(piece.rows(section.name, start, count))

    def _vector(self, name: str) -> NDArray[Any]:
        """Read once: a prompt's tokens are proven one by one, and scales are as many as the vocabulary."""
        if name not in self._vectors:
            self._vectors[name] = self._piece.tensor(name)
        return self._vectors[name]


def _shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (spec.dtype, spec.shape) for name, spec in check_safetensors(path).items()}
