"""Ranking: how alike two vectors are, to the last bit the same on every machine, and one list out of several.

Codes are whole numbers, and so is the vector asked for once it is rounded to fifteen bits. Their products and sums stay below 2^53,
so float64 holds them exactly in whatever order a machine adds; the one division that follows is rounded the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import UsageError

FUSION_K = 60
_ASKED_MAX = 127 * 128
_ROWS = 256  # so many at a time stay in the processor's cache

_T = TypeVar("_T", bound=Hashable)


class Asked(NamedTuple):
    """A vector to compare with, rounded. `whole`: float64 [d], whole numbers; `inverse`: 1 / its length."""

    whole: NDArray[np.float64]
    inverse: float


def round_asked(vector: NDArray[np.float32]) -> Asked:
    """Round a vector, float32 [d], for exact comparison. Raises UsageError for zero, NaN or infinity: they have no direction."""
    wide = np.asarray(vector, np.float64)
    largest = float(np.abs(wide).max()) if wide.ndim == 1 and wide.size else 0.0
    if not 0 < largest < math.inf:  # also where one is NaN
        raise UsageError("the vector to search for is empty, zero or not finite", "Give it the numbers of an embedding")
    whole = wide / largest
    whole *= _ASKED_MAX
    np.rint(whole, out=whole)
    return Asked(whole, 1.0 / math.sqrt(float(whole @ whole)))


def inverse_lengths(codes: NDArray[np.int8]) -> NDArray[np.float64]:
    """1 / length of each row of codes, int8 [n, d]; 0 for rows of zeros."""
    squares = np.empty(len(codes), np.float64)
    for at in range(0, len(codes), _ROWS):
        part = codes[at : at + _ROWS].astype(np.float64)
        squares[at : at + _ROWS] = np.einsum("nd,nd->n", part, part)
    lengths = np.sqrt(squares)
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def cosines(asked: Asked, codes: NDArray[np.int8], inverses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine between the vector asked for and each row, float64 [n]. `inverses`: as `inverse_lengths` gives them."""
    if len(codes) <= _ROWS:
        dots = codes.astype(np.float64) @ asked.whole
    else:
        dots = np.concatenate([codes[at : at + _ROWS].astype(np.float64) @ asked.whole for at in range(0, len(codes), _ROWS)])
    return dots * inverses * asked.inverse


def fuse(rankings: Sequence[Sequence[_T]], k: int = FUSION_K) -> dict[_T, float]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009): each list gives 1 / (k + rank) to its items, ranks from 1."""
    scores: dict[_T, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (k + rank)
    return scores
