"""Ranking: how alike two vectors are, to the last bit the same on every machine, and one list out of several.

Codes are whole numbers, and so is the vector asked for once it is rounded to fifteen bits. Their products and sums are exact in
any order, so how a machine adds does not show; the one division that follows is rounded the same everywhere (IEEE 754).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import UsageError

FUSION_K = 60
# The vector asked for is 128 * high + low, each of them small enough for sums of float32 products of so many terms to be exact.
_STEP = 128
_HIGH_MAX = 127
_TERMS_MAX = 1024

_T = TypeVar("_T", bound=Hashable)


class Asked(NamedTuple):
    """A vector to compare with. `parts`: float32 [2, d], whole numbers; `inverse`: 1 / its length."""

    parts: NDArray[np.float32]
    inverse: float


def round_asked(vector: NDArray[np.float32]) -> Asked:
    """Round a vector, float32 [d], for exact comparison. Raises UsageError for zero, NaN or infinity: they have no direction."""
    wide = np.asarray(vector, np.float64)
    if wide.ndim != 1 or not wide.size or not np.isfinite(wide).all() or not wide.any():
        raise UsageError("the vector to search for is empty, zero or not finite", "Give it the numbers of an embedding")
    whole = np.rint(wide / np.abs(wide).max() * (_HIGH_MAX * _STEP)).astype(np.int64)
    high = (whole + _STEP // 2) // _STEP
    parts = np.stack([high, whole - high * _STEP]).astype(np.float32)
    return Asked(parts, 1.0 / float(np.sqrt(np.float64((whole * whole).sum()))))


def inverse_lengths(codes: NDArray[np.int8]) -> NDArray[np.float64]:
    """1 / length of each row of codes, int8 [n, d]; 0 for rows of zeros."""
    squares = np.empty(len(codes), np.float64)
    for at in range(0, len(codes), 4096):
        part = codes[at : at + 4096].astype(np.float32)
        squares[at : at + 4096] = sum(
            np.einsum("nd,nd->n", part[:, low : low + _TERMS_MAX], part[:, low : low + _TERMS_MAX]).astype(np.float64)
            for low in range(0, part.shape[1], _TERMS_MAX)
        )
    lengths = np.sqrt(squares)
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def cosines(asked: Asked, codes: NDArray[np.int8], inverses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine between the vector asked for and each row, float64 [n]. `inverses`: as `inverse_lengths` gives them."""
    dots = np.empty(len(codes), np.float64)
    for at in range(0, len(codes), 4096):  # so many at a time stay in the cache
        part = codes[at : at + 4096].astype(np.float32)
        total = np.zeros((len(part), 2), np.float64)
        for low in range(0, part.shape[1], _TERMS_MAX):
            total += part[:, low : low + _TERMS_MAX] @ asked.parts[:, low : low + _TERMS_MAX].T
        dots[at : at + 4096] = total[:, 0] * _STEP + total[:, 1]
    return dots * inverses * asked.inverse


def fuse(rankings: Sequence[Sequence[_T]], k: int = FUSION_K) -> dict[_T, float]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009): each list gives 1 / (k + rank) to its items, ranks from 1."""
    scores: dict[_T, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (k + rank)
    return scores
