"""Vectors as they stand in blocks: one byte per dimension and one scale (`nexus.memory.block.INT8`).

    scale = round(max|v| * 1e9)      codes = rint(v * 127 / max|v|)      v is about codes * scale / (127 * 1e9)

On real sentences this finds more than 99 of 100 of what float32 finds among the nearest ten, in a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nexus.core.errors import MalformedError, UsageError
from nexus.memory.block import DIMENSION_MAX, SCALE_MAX

CODE_MAX = 127
SCALE_MIN, SCALE_UNIT = 1, 1_000_000_000
# How far the length of a vector may be from 1 once it is decoded. Rounding moves it by less; a longer vector would be near to
# everything.
NORM_TOLERANCE = 0.02

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Scales = NDArray[np.int64]


def unit_vectors(vectors: ArrayLike, dimension: int) -> Floats:
    """float32 [n, dimension] of length 1, from vectors that are handed in, of any length but 0.

    Raises UsageError for another shape or dimension, for what is not a number or infinite, and for a vector that is all zero.
    """
    try:
        given = np.asarray(vectors, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError("the vectors are not numbers in rows of one length", f"Give {dimension} numbers for each text") from error
    if given.ndim != 2 or given.shape[1] != dimension:
        raise UsageError(
            f"vectors of shape {list(given.shape)} are not of dimension {dimension}", "Was another model used for them?"
        )
    finite = np.isfinite(given).all(axis=1)
    if not finite.all():
        raise UsageError(
            f"vector {int(np.argmin(finite))} holds what is not a number, or an infinite one", "Leave it out, or make it again"
        )
    # Divided by the largest first: squares of very large or very small numbers would be infinite or zero.
    largest = np.abs(given).max(axis=1, initial=0.0, keepdims=True)
    if not largest.all():
        raise UsageError(f"vector {int(np.argmin(largest))} is all zero: it has no direction", "Leave it out, or make it again")
    scaled = given / largest
    unit: Floats = (scaled / np.linalg.norm(scaled, axis=1, keepdims=True)).astype(np.float32)
    return unit


def quantise(vectors: ArrayLike) -> tuple[Codes, Scales]:
    """Codes int8 [n, d] and scales int64 [n] of vectors [n, d] of length 1.

    Raises UsageError for anything else: not a number, all zero, of another length, or of more than 4,096 dimensions.
    """
    given = np.asarray(vectors, np.float32)
    if given.ndim != 2 or not 1 <= given.shape[1] <= DIMENSION_MAX:
        raise UsageError(f"vectors of shape {list(given.shape)} have no codes", f"Give rows of 1 to {DIMENSION_MAX} numbers")
    with np.errstate(over="ignore", invalid="ignore"):  # refused
        lengths = np.linalg.norm(given, axis=1)
    sound = np.abs(lengths - 1) <= NORM_TOLERANCE / 4  # NaN is not
    if not sound.all():
        row = int(np.argmin(sound))
        raise UsageError(f"vector {row} has the length {lengths[row]:.4g}, not 1", "Scale the vectors to length 1 first")
    largest = np.abs(given).max(axis=1).astype(np.float64)
    codes = np.rint(given.astype(np.float64) * (CODE_MAX / largest)[:, None]).astype(np.int8)
    return codes, np.rint(largest * SCALE_UNIT).astype(np.int64)


def restore(codes: Codes, scales: Scales) -> Floats:
    """float32 [n, d] of codes int8 [n, d] and scales [n], as they are: of length 1 within some thousandths."""
    return (codes * (scales / (CODE_MAX * SCALE_UNIT))[:, None]).astype(np.float32)


def unit(vectors: Floats) -> Floats:
    """The same directions with length 1; [n, d], none of them zero."""
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return scaled


def read_codes(codes: bytes, scale: int) -> tuple[Codes, int]:
    """The codes int8 [d] of one vector from a peer, checked. Raises MalformedError."""
    array, scales = read_many([(codes, scale)], len(codes))
    return array[0], int(scales[0])


def read_many(vectors: Sequence[tuple[bytes, int]], dimension: int) -> tuple[Codes, Scales]:
    """Codes int8 [n, dimension] and scales int64 [n] of vectors (codes, scale) from a peer. Raises MalformedError for another
    dimension, a scale or code out of range, and for a vector that does not decode to about length 1."""
    if not 1 <= dimension <= DIMENSION_MAX:
        raise MalformedError(f"a vector of {dimension} dimensions; there are 1 to {DIMENSION_MAX}")
    for codes, scale in vectors:
        if len(codes) != dimension:
            raise MalformedError(f"a vector of {len(codes)} dimensions where {dimension} are expected")
        if type(scale) is not int or not SCALE_MIN <= scale <= SCALE_MAX:
            raise MalformedError(f"the scale of a vector is from {SCALE_MIN} to {SCALE_MAX}")
    array = np.frombuffer(b"".join(codes for codes, _ in vectors), np.int8).reshape(len(vectors), dimension)
    scales = np.array([scale for _, scale in vectors], np.int64)
    check_codes(array, scales)
    return array, scales


def check_codes(codes: Codes, scales: Scales) -> None:
    """That codes [n, d] and scales [n] are those of vectors of length 1. Raises MalformedError."""
    if codes.size and int(codes.min()) < -CODE_MAX:
        raise MalformedError("a vector holds the code -128, which nothing encodes to")
    if codes.size and not (np.abs(codes).max(axis=1) == CODE_MAX).all():
        raise MalformedError("the largest code of a vector is 127: this is not its only form")
    # Sums of 4,096 squares of bytes are exact in float64, so every node decides alike.
    squares = np.einsum("nd,nd->n", codes.astype(np.float64), codes.astype(np.float64))
    lengths = np.sqrt(squares) * (scales.astype(np.float64) / (CODE_MAX * SCALE_UNIT))
    sound = np.abs(lengths - 1) <= NORM_TOLERANCE
    if not sound.all():
        raise MalformedError(f"a vector decodes to the length {lengths[int(np.argmin(sound))]:.4g}, not about 1")
