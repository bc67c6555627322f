"""Maps between the vector spaces of two models, so that a question asked with one finds blocks embedded with the other.

Both models embed the same anchor texts. The map is affine, y = x M + b, then scaled to length 1: orthogonal (Procrustes) or by
ridge regression, whichever does better on anchors that it was not fitted to. How well it works is measured on further anchors that
neither the fit nor that choice has seen: of the ten nearest texts by the target's own vector, the share that the mapped one finds.

A map travels in parts that fit a block (`nexus.memory.block.MAP`): rows of int8 codes with a scale each, a quarter of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nexus.core.errors import MalformedError, UsageError
from nexus.core.hashing import HASH_BYTES, tagged_hash
from nexus.core.record import Record, digest, raw, uint
from nexus.memory.block import DATA_BYTES_MAX, DIMENSION_MAX
from nexus.memory.quantise import CODE_MAX, unit_vectors

# Below this a map may tell which nodes to ask, but what it finds is no answer.
ANSWER_RECALL = 0.5
NEIGHBOURS = 10
# Every so many-th anchor is kept from the fit, and of the others as many from the choice between fits.
HELD_OUT_EVERY = 5
ANCHORS_MAX = 20_000
PARTS_MAX = 64

_SCALE_UNIT, _SCALE_BYTES, _SCALE_LEAST, _SCALE_MAX = 1e-8, 4, 1000, 2**32 - 1
_PART_HEAD_BYTES = 256
_PPM = 1_000_000
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MapPart(Record):
    """`source`, `target`: fingerprints of the two models. `recall`: in millionths, as its author measured it with `held_out` of
    `anchors` texts. `whole`: a hash over all rows. `rows`: those from `number` times `rows_per_part` on, each a scale as 4 bytes
    little-endian in units of 1e-8 and a code per dimension of the target; the last row of all is the b of y = x M + b."""

    spec: int = uint(1, least=1)
    source: bytes = digest()
    target: bytes = digest()
    source_dimension: int = uint(DIMENSION_MAX, least=1)
    target_dimension: int = uint(DIMENSION_MAX, least=1)
    anchors: int = uint(ANCHORS_MAX)
    held_out: int = uint(ANCHORS_MAX)
    recall: int = uint(_PPM)
    whole: bytes = digest()
    number: int = uint(PARTS_MAX - 1)
    rows: bytes = raw(most=DATA_BYTES_MAX)

    @property
    def parts(self) -> int:
        return _parts(self.source_dimension, self.target_dimension)


@dataclass(frozen=True, slots=True)
class SpaceMap:
    """`codes` int8 [source dimension + 1, target dimension], `scales` int64 [source dimension + 1]; see `MapPart`."""

    source: bytes
    target: bytes
    codes: NDArray[np.int8]
    scales: NDArray[np.int64]
    anchors: int
    held_out: int
    recall_ppm: int

    @property
    def source_dimension(self) -> int:
        return len(self.codes) - 1

    @property
    def target_dimension(self) -> int:
        return int(self.codes.shape[1])

    @property
    def recall(self) -> float:
        """As its author measured it. A node that has both models measures again: `measured_recall`."""
        return self.recall_ppm / _PPM

    @property
    def may_answer(self) -> bool:
        """Whether what is found with it is an answer; else it may only say whom to ask."""
        return self.recall >= ANSWER_RECALL

    def apply(self, vectors: ArrayLike) -> Floats:
        """float32 [n, target dimension] of length 1, of vectors [n, source dimension]. Raises UsageError for vectors of another
        dimension, or one that has no place in the target's space."""
        matrix = (self.codes * (self.scales * (_SCALE_UNIT / CODE_MAX))[:, None]).astype(np.float32)
        mapped = unit_vectors(vectors, self.source_dimension) @ matrix[:-1] + matrix[-1]
        return unit_vectors(mapped, self.target_dimension)

    def to_parts(self) -> list[bytes]:
        """What goes into the blocks, in order: at most PARTS_MAX times DATA_BYTES_MAX bytes."""
        size = (self.source_dimension, self.target_dimension)
        per_part, whole = rows_per_part(size[1]), self._row_bytes()
        width = size[1] + _SCALE_BYTES
        common = (1, self.source, self.target, *size, self.anchors, self.held_out, self.recall_ppm, _whole(size, whole))
        return [
            MapPart(*common, number, whole[number * per_part * width : (number + 1) * per_part * width]).to_bytes()
            for number in range(_parts(*size))
        ]

    def _row_bytes(self) -> bytes:
        rows = np.empty((len(self.codes), self.target_dimension + _SCALE_BYTES), np.uint8)
        rows[:, :_SCALE_BYTES] = self.scales.astype("<u4")[:, None].view(np.uint8)
        rows[:, _SCALE_BYTES:] = self.codes.view(np.uint8)
        return rows.tobytes()


def rows_per_part(target_dimension: int) -> int:
    return (DATA_BYTES_MAX - _PART_HEAD_BYTES) // (target_dimension + _SCALE_BYTES)


def _parts(source_dimension: int, target_dimension: int) -> int:
    return ceil((source_dimension + 1) / rows_per_part(target_dimension))


def _whole(size: tuple[int, int], rows: bytes) -> bytes:
    return tagged_hash("space-map", *(value.to_bytes(4, "little") for value in size), rows)


# ---- from a peer


def read_part(data: bytes) -> MapPart:
    """One part, checked for all that can be checked by itself. Raises MalformedError."""
    part = MapPart.from_bytes(data)
    if part.parts > PARTS_MAX:
        raise MalformedError(
            f"a map of {part.source_dimension} to {part.target_dimension} dimensions takes more than {PARTS_MAX} parts"
        )
    per_part = rows_per_part(part.target_dimension)
    rows = min(per_part, part.source_dimension + 1 - part.number * per_part)
    if part.number >= part.parts or len(part.rows) != rows * (part.target_dimension + _SCALE_BYTES):
        raise MalformedError("a part of a map has other rows than its number says")
    if part.source == part.target:
        raise MalformedError("a map leads from a model to itself")
    if not part.source_dimension < part.anchors or not NEIGHBOURS < part.held_out < part.anchors:
        raise MalformedError("a map was made from fewer anchors than can make one")
    return part


def join_parts(parts: Sequence[bytes]) -> SpaceMap:
    """The map whose parts these are, in any order. Raises MalformedError unless each is there once and they belong together."""
    read = sorted((read_part(part) for part in parts[: PARTS_MAX + 1]), key=lambda part: part.number)
    if not read or [part.number for part in read] != list(range(read[0].parts)):
        raise MalformedError("a part of the map is missing, or there twice")
    first = read[0]
    if any(part.to_value()[:9] != first.to_value()[:9] for part in read):  # type: ignore[index]
        raise MalformedError("the parts are of different maps")
    size = (first.source_dimension, first.target_dimension)
    rows = b"".join(part.rows for part in read)
    if _whole(size, rows) != first.whole:
        raise MalformedError("the parts are not those of the map that they name")
    table = np.frombuffer(rows, np.uint8).reshape(size[0] + 1, size[1] + _SCALE_BYTES)
    scales = np.ascontiguousarray(table[:, :_SCALE_BYTES]).view("<u4")[:, 0].astype(np.int64)
    codes = np.ascontiguousarray(table[:, _SCALE_BYTES:]).view(np.int8)
    largest = np.abs(codes.astype(np.int16)).max(axis=1)
    if not np.isin(largest, (0, CODE_MAX)).all() or not ((largest == 0) == (scales == 0)).all() or not largest[:-1].any():
        raise MalformedError("a row of the map is not in its one form: its largest code is 127, or all of it is zero")
    return SpaceMap(first.source, first.target, codes, scales, first.anchors, first.held_out, first.recall)


# ---- making one


def fit_map(source: bytes, target: bytes, source_vectors: ArrayLike, target_vectors: ArrayLike) -> SpaceMap:
    """The map from the model with fingerprint `source` to `target`, from their vectors [n, dimension] of the same n anchor texts.

    Use as many and as different texts as there are, shuffled: two of five are held out, and what remains must be more than the
    source has dimensions. Takes a second or two for 384 dimensions and 5,000 anchors. Raises UsageError.
    """
    given, wanted = np.asarray(source_vectors), np.asarray(target_vectors)
    if given.ndim != 2 or wanted.ndim != 2 or len(given) != len(wanted):
        raise UsageError("the two models did not embed the same texts", "Embed the same anchor texts with both, in one order")
    if len(source) != HASH_BYTES or len(target) != HASH_BYTES or source == target:
        raise UsageError("a map leads from one model to another", "Give the fingerprints of two different models")
    size = (given.shape[1], wanted.shape[1])
    if max(size) > DIMENSION_MAX or min(size) < 1 or _parts(*size) > PARTS_MAX:
        raise UsageError(f"a map of {size[0]} to {size[1]} dimensions is too large to travel", "Embed the texts again instead")
    if len(given) > ANCHORS_MAX:
        raise UsageError(f"{len(given)} anchors are more than are of use", f"Give at most {ANCHORS_MAX}")
    number = np.arange(len(given))
    held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    choosing = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 2
    fitted = ~held_out & ~choosing
    if int(fitted.sum()) <= size[0] or int(held_out.sum()) <= NEIGHBOURS:
        needed = max(HELD_OUT_EVERY * (size[0] + 1) // (HELD_OUT_EVERY - 2) + HELD_OUT_EVERY, HELD_OUT_EVERY * (NEIGHBOURS + 1))
        raise UsageError(
            f"{len(given)} anchors are too few for {size[0]} dimensions: any texts would seem to fit", f"Give at least {needed}"
        )
    x, y = unit_vectors(given, size[0]), unit_vectors(wanted, size[1])

    def made(matrix: Wide) -> SpaceMap:
        return SpaceMap(source, target, *_coded(matrix), len(x), int(held_out.sum()), 0)

    candidates = [made(matrix) for matrix in _candidates(x[fitted].astype(np.float64), y[fitted].astype(np.float64))]
    chosen = max(candidates, key=lambda one: _recall(one, x, y, choosing))
    recall = _recall(chosen, x, y, held_out)
    return SpaceMap(source, target, chosen.codes, chosen.scales, len(x), int(held_out.sum()), int(recall * _PPM))


def measured_recall(space_map: SpaceMap, source_vectors: ArrayLike, target_vectors: ArrayLike) -> float:
    """How well a map does on the vectors of texts that its author did not choose. Raises UsageError."""
    x = unit_vectors(source_vectors, space_map.source_dimension)
    y = unit_vectors(target_vectors, space_map.target_dimension)
    if len(x) != len(y) or not NEIGHBOURS < len(x) <= ANCHORS_MAX:
        raise UsageError("the vectors are not of the same texts, or too few", f"Give {NEIGHBOURS + 1} to {ANCHORS_MAX} of each")
    return _recall(space_map, x, y, np.ones(len(x), bool))


def _recall(space_map: SpaceMap, x: Floats, y: Floats, asked: NDArray[np.bool_]) -> float:
    """Of the nearest of all other texts by the target's vectors, the share found with the mapped ones, over those asked."""
    questions = np.flatnonzero(asked)
    mapped = space_map.apply(x[questions])
    shared = 0
    for start in range(0, len(questions), 512):  # of so many at once, for the memory
        some = questions[start : start + 512]
        right, found = (_nearest(vectors @ y.T, some) for vectors in (y[some], mapped[start : start + 512]))
        shared += sum(len(np.intersect1d(a, b)) for a, b in zip(right, found, strict=True))
    return shared / (NEIGHBOURS * len(questions))


def _nearest(scores: Floats, itself: NDArray[np.int64]) -> NDArray[np.int64]:
    scores[np.arange(len(itself)), itself] = -np.inf
    nearest: NDArray[np.int64] = np.argpartition(-scores, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return nearest


def _candidates(x: Wide, y: Wide) -> list[Wide]:
    """Affine maps [source dimension + 1, target dimension], the last row b."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    cross = (x - x_mean).T @ (y - y_mean)
    values, basis = np.linalg.eigh((x - x_mean).T @ (x - x_mean))
    inner = basis.T @ cross
    least = max(float(values.mean()), 1e-12)
    linear = [basis @ (inner / (np.maximum(values, 0) + ridge * least)[:, None]) for ridge in _RIDGES]
    if x.shape[1] == y.shape[1]:
        u, _, v = np.linalg.svd(cross)
        linear.append(u @ v)
    return [np.vstack([matrix, y_mean - x_mean @ matrix]) for matrix in linear]


def _coded(matrix: Wide) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    largest = np.abs(matrix).max(axis=1)
    scales = np.minimum(np.rint(largest / _SCALE_UNIT), _SCALE_MAX).astype(np.int64)
    # Of smaller ones the largest code would not round to 127; beside the others they are nothing.
    scales[scales < _SCALE_LEAST] = 0
    steps = np.where(scales > 0, scales * _SCALE_UNIT / CODE_MAX, 1.0)
    codes = np.where(scales[:, None] > 0, np.clip(np.rint(matrix / steps[:, None]), -CODE_MAX, CODE_MAX), 0)
    return codes.astype(np.int8), scales
