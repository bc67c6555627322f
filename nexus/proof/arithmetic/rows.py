"""Weights under the model's root: the rows of every piece are the leaves of a tree whose root is in the manifest (docs/exact.md).

A linear part has one leaf per output row: its scale, its bias where the part has one, and its int8 weights. Every other tensor of
two dimensions has one leaf per row, of one dimension one leaf. So a proof that an operation is wrong carries the rows that it is
about, and nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError
from nexus.core.hashing import MAX_PROOF_HASHES, leaf_hash, merkle_range_proof, merkle_root, verify_merkle_range
from nexus.core.manifest import EMBEDDING, HEAD, LAYERS_MAX, Manifest, layer_name
from nexus.core.record import Record, digest, many, raw, uint
from nexus.proof.arithmetic.plan import HEAD_OP, LINEARS, ExactPlan, Shapes
from nexus.proof.arithmetic.tables import ROPE_FINE

EMBED = "embed"
# The name of what stands behind the pieces in a manifest's `rows`: the tables that differ from model to model.
TABLES = "tables"
PROOF_BYTES_MAX = 64 << 20
_FLOAT32, _FLOAT64, _INT8 = np.dtype("<f4"), np.dtype("<f8"), np.dtype("i1")
# In the order in which they stand in front.
_LINEAR_PARTS = (*LINEARS, EMBED, HEAD_OP)


@dataclass(frozen=True, slots=True)
class Section:
    """The leaves of one linear part or tensor: `count` of them from number `first` on, of `leaf_bytes` each.

    `depth`: values in a row; of a linear part int8 after its scale and, where it is `biased`, its bias. `float64`: a table.
    """

    name: str
    first: int
    count: int
    depth: int
    linear: bool = False
    biased: bool = False
    float64: bool = False

    @property
    def leaf_bytes(self) -> int:
        if self.linear:
            return self.depth + _FLOAT32.itemsize * (2 if self.biased else 1)
        return self.depth * (_FLOAT64 if self.float64 else _FLOAT32).itemsize


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The leaves of one piece, section by section."""

    sections: tuple[Section, ...]

    @property
    def total(self) -> int:
        return sum(section.count for section in self.sections)

    def section(self, name: str) -> Section:
        """Raises MalformedError where the piece has none of this name."""
        for section in self.sections:
            if section.name == name:
                return section
        raise MalformedError(f"this piece of the model has no {name!r}")

    def leaf_sizes(self, index: int, count: int) -> list[int]:
        """Bytes of each of `count` leaves from number `index` on. Raises MalformedError where there are not so many."""
        return [section.leaf_bytes for section, here in self._within(index, count) for _ in range(here)]

    def range_bytes(self, index: int, count: int) -> int:
        """Bytes of all these leaves, which takes no longer for many. Raises MalformedError where there are not so many."""
        return sum(section.leaf_bytes * here for section, here in self._within(index, count))

    def _within(self, index: int, count: int) -> list[tuple[Section, int]]:
        """How many of the leaves are in each section."""
        if index < 0 or not 0 < count <= self.total - index:
            raise MalformedError(f"rows {index} to {index + count} of a piece that has {self.total}")
        return [
            (section, max(0, min(index + count, section.first + section.count) - max(index, section.first)))
            for section in self.sections
        ]


def row_layout(plan: ExactPlan, piece: str) -> RowLayout:
    """The leaves of the piece of this name, or of `TABLES`. Raises MalformedError for a piece that the model does not have."""
    if piece == TABLES:
        return _laid_out(_table_sections(plan))
    if piece not in piece_names(plan):
        raise MalformedError(f"the model has no piece {piece!r}")
    return _laid_out(_piece_sections(plan.piece_tensors(piece)))


def piece_names(plan: ExactPlan) -> list[str]:
    """What a manifest's `rows` are about, in their order."""
    return [EMBEDDING, *(layer_name(index) for index in range(len(plan.layers))), HEAD, TABLES]


def _piece_sections(shapes: Shapes) -> list[Section]:
    sections, rest = [], dict(shapes)
    for part in _LINEAR_PARTS:
        if f"{part}.scale" in shapes:
            _, (rows, depth) = rest.pop(f"{part}.weight")
            del rest[f"{part}.scale"]
            biased = rest.pop(f"{part}.bias", None) is not None
            sections.append(Section(part, 0, rows, depth, linear=True, biased=biased))
    for name in sorted(rest):
        _, shape = rest[name]
        rows, depth = shape if len(shape) == 2 else (1, *shape)
        sections.append(Section(name, 0, rows, depth))
    return sections


def _table_sections(plan: ExactPlan) -> list[Section]:
    coarse = -(-plan.context // ROPE_FINE)
    return [
        Section(rope_table(number, kind), 0, count, plan.rotated, float64=True)
        for number in range(len(plan.ropes))
        for kind, count in (("coarse", coarse), ("fine", ROPE_FINE))
    ]


def rope_table(number: int, kind: str) -> str:
    """The name of a table of rotary angles. `kind`: "coarse" or "fine"."""
    return f"rope.{number}.{kind}"


def _laid_out(sections: Sequence[Section]) -> RowLayout:
    firsts = accumulate((section.count for section in sections), initial=0)
    return RowLayout(tuple(replace(section, first=first) for section, first in zip(sections, firsts, strict=False)))


def rows_root(leaf_hashes: Sequence[bytes]) -> bytes:
    """What stands for a piece in a manifest's `rows`."""
    return merkle_root(leaf_hashes)


@dataclass(frozen=True, slots=True)
class WeightProof(Record):
    """Rows of a model, and that they are its. `piece`: number of the piece in the manifest, the one behind the last for the tables.
    `data`: the leaves from number `index` on, one after the other. `siblings`: of `verify_merkle_range`."""

    piece: int = uint(LAYERS_MAX + 2)
    index: int = uint(2**32)
    count: int = uint(2**32, least=1)
    data: bytes = raw(most=PROOF_BYTES_MAX)
    siblings: tuple[bytes, ...] = many(digest(), 2 * MAX_PROOF_HASHES)


def check_weights(proof: WeightProof, manifest: Manifest, plan: ExactPlan) -> list[bytes]:
    """The leaves that the proof shows, which are the model's. Hashes no more bytes than it carries.

    `plan` must be that of `manifest.file("exact.json")`. Raises MalformedError, VerificationError.
    """
    names = piece_names(plan)
    if len(manifest.rows) != len(names):
        raise MalformedError(f"a manifest of {len(manifest.rows)} rows roots is not that of a plan of {len(plan.layers)} layers")
    if proof.piece >= len(names):
        raise MalformedError(f"the model has no piece number {proof.piece}")
    return check_weight_rows(proof, manifest.rows[proof.piece], plan)


def check_weight_rows(proof: WeightProof, root: bytes, plan: ExactPlan) -> list[bytes]:
    """The same where `root` is known to be that over the piece's rows."""
    names = piece_names(plan)
    if proof.piece >= len(names):
        raise MalformedError(f"the model has no piece number {proof.piece}")
    layout = row_layout(plan, names[proof.piece])
    if layout.range_bytes(proof.index, proof.count) != len(proof.data):
        raise MalformedError(f"{len(proof.data)} bytes are not rows {proof.index} to {proof.index + proof.count}")
    leaves = split_leaves(layout, proof.index, proof.count, proof.data)
    hashes = [leaf_hash(leaf) for leaf in leaves]
    verify_merkle_range(root, layout.total, proof.index, hashes, proof.siblings)
    return leaves


def split_leaves(layout: RowLayout, index: int, count: int, data: bytes) -> list[bytes]:
    """`data`, the leaves from number `index` on one after the other, leaf by leaf. Its length must be `range_bytes`."""
    sizes = layout.leaf_sizes(index, count)
    return [data[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def prove_weights(piece: int, index: int, leaves: Sequence[bytes], leaf_hashes: Sequence[bytes]) -> WeightProof:
    """The proof of `leaves` from number `index` on. `leaf_hashes`: of the whole piece."""
    siblings = merkle_range_proof(leaf_hashes, index, index + len(leaves))
    return WeightProof(piece, index, len(leaves), b"".join(leaves), tuple(siblings))


@dataclass(frozen=True, slots=True)
class LinearRows:
    """Output rows of a linear part: `weight` int8 [n, depth], `scale` float32 [n], `bias` float32 [n] or None."""

    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None


def linear_rows(section: Section, leaves: Sequence[bytes]) -> LinearRows:
    """The rows out of leaves of a linear section. Raises MalformedError for leaves of another size."""
    block = _block(section, leaves)
    if not section.linear:
        raise MalformedError(f"{section.name} is no linear part")
    at = _FLOAT32.itemsize
    scale = _floats(block[:, :at])
    bias = _floats(block[:, at : 2 * at]) if section.biased else None
    weight = np.ascontiguousarray(block[:, section.leaf_bytes - section.depth :]).view(_INT8)
    return LinearRows(weight, scale, bias)


def float_rows(section: Section, leaves: Sequence[bytes]) -> NDArray[np.float32]:
    """float32 [n, depth] out of leaves of a section that is neither linear nor a table. Raises MalformedError."""
    block = _block(section, leaves)
    if section.linear or section.float64:
        raise MalformedError(f"{section.name} holds no float32 values")
    return block.view(_FLOAT32).astype(np.float32, copy=False)


def table_rows(section: Section, leaves: Sequence[bytes]) -> NDArray[np.float64]:
    """float64 [n, depth / 2, 2], (cos, sin) each, out of leaves of a table. Raises MalformedError."""
    block = _block(section, leaves)
    if not section.float64:
        raise MalformedError(f"{section.name} is no table")
    return block.view(_FLOAT64).astype(np.float64, copy=False).reshape(len(leaves), section.depth // 2, 2)


def _block(section: Section, leaves: Sequence[bytes]) -> NDArray[np.uint8]:
    if any(len(leaf) != section.leaf_bytes for leaf in leaves):
        raise MalformedError(f"a row of {section.name} has {section.leaf_bytes} bytes")
    return np.frombuffer(b"".join(leaves), np.uint8).reshape(len(leaves), section.leaf_bytes)


def _floats(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(columns).view(_FLOAT32).astype(np.float32, copy=False)[:, 0]


def linear_leaves(weight: NDArray[np.int8], scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """The leaves [n, leaf bytes] of rows of a linear part, in memory of their own."""
    rows, depth = weight.shape
    fronts = [scale] if bias is None else [scale, bias]
    at = _FLOAT32.itemsize
    block = np.empty((rows, len(fronts) * at + depth), np.uint8)
    for number, front in enumerate(fronts):
        block[:, number * at : (number + 1) * at] = front.astype(_FLOAT32, copy=False)[:, None].view(np.uint8)
    block[:, len(fronts) * at :] = weight.view(np.uint8)
    return block


def tensor_leaves(values: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.uint8]:
    """The leaves [n, leaf bytes] of a tensor that is no linear part: of one dimension one leaf, else one for each first index."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.reshape(1 if values.ndim == 1 else len(values), -1).view(np.uint8)


def leaf_hashes_of(leaves: NDArray[np.uint8]) -> list[bytes]:
    """The leaf hash of each row of [n, leaf bytes]."""
    return [leaf_hash(row.tobytes()) for row in leaves]
