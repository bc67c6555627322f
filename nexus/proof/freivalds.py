"""Freivalds' check (1977) of integer matrix products over Z/2^64: with a small secret key of a weight matrix anyone checks a row of
its products without the matrix.

For weights W [rows, depth] a key is a random r [rows] of 32-bit numbers and v = r W mod 2^64 [depth]. Sums s = W x are right only
if r.s = v.x. Wrong sums differ from the right ones by some e. Where e_i is not 0, it is a difference of int32 numbers with at most
31 zero bits at its low end, so that for any other entries of r one r_i in 2^32 at most gives r.e = 0. Two keys miss one wrong
product in 2^64. (Longer r would miss hardly less, and to make it anew is most of a check's time.) `check` refuses sums beyond
int32; an operation whose input is 16 bits wide has two rows of sums, one for hi and one for lo.

A key never leaves its auditor: who knows r can write sums that pass. Of r only the seed is kept; v takes 8 bytes per column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import MalformedError
from nexus.core.record import Record, many, nested, raw, text, uint

KEYS = 2
SEED_BYTES = 32
DEPTH_MAX = 1 << 20
ROWS_MAX = 1 << 24
# Of W at a time: in float64 this stays within a processor's cache.
BLOCK_ELEMENTS = 1 << 17
# 2^32 * 2^7 * 2^14: with so many rows at a time all sums stay exact in float64.
BLOCK_ROWS_MAX = 1 << 14
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True, slots=True)
class FreivaldsKey(Record):
    """The keys of one weight matrix. `v`: uint64 little-endian [KEYS, depth]."""

    seed: bytes = raw(SEED_BYTES)
    rows: int = uint(ROWS_MAX, least=1)
    v: bytes = raw(most=KEYS * DEPTH_MAX * 8)

    @property
    def depth(self) -> int:
        return len(self.v) // (KEYS * 8)

    def vectors(self) -> NDArray[np.uint64]:
        """[KEYS, depth]."""
        if not self.v or len(self.v) % (KEYS * 8):
            raise MalformedError(f"a key of {len(self.v)} bytes is not {KEYS} vectors of 64-bit numbers")
        return np.frombuffer(self.v, np.dtype("<u8")).reshape(KEYS, -1)


def random_rows(seed: bytes, start: int, end: int) -> NDArray[np.uint64]:
    """r of the rows [start, end), below 2^32, of every key, [KEYS, end - start], by BLAKE3 as an extendable function."""
    drawn = [
        blake3(b"nexus/v1/freivalds\0" + seed + bytes([number])).digest(4 * (end - start), seek=4 * start) for number in range(KEYS)
    ]
    return np.stack([np.frombuffer(r, np.dtype("<u4")) for r in drawn]).astype(np.uint64)


def make_key(weights: Iterable[NDArray[np.int8]], seed: bytes) -> FreivaldsKey:
    """The keys of a matrix that comes as blocks of rows [any, depth], so that it need not be in memory at once.

    `seed`: 32 secret random bytes, of this matrix alone. Takes about 1 ns of one core per weight.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed of {len(seed)} bytes, not {SEED_BYTES}")
    total: NDArray[np.uint64] | None = None
    rows = 0
    for block in weights:
        if block.dtype != np.int8 or block.ndim != 2 or not block.size:
            raise ValueError("weights are blocks of int8 rows")
        if total is None:
            total = np.zeros((KEYS, block.shape[1]), np.uint64)
        per_part = min(BLOCK_ROWS_MAX, max(1, BLOCK_ELEMENTS // block.shape[1]))
        for at in range(0, len(block), per_part):
            part = block[at : at + per_part]
            total += _times(random_rows(seed, rows + at, rows + at + len(part)), part)
        rows += len(block)
    if total is None:
        raise ValueError("a matrix without rows has no key")
    return FreivaldsKey(seed, rows, total.astype("<u8").tobytes())


def _times(r: NDArray[np.uint64], weights: NDArray[np.int8]) -> NDArray[np.uint64]:
    """r W mod 2^64, [KEYS, depth]. In float64 a multiplication of matrices is several times as fast as in integers."""
    products: NDArray[np.int64] = (r.astype(np.float64) @ weights.astype(np.float64)).astype(np.int64)
    return products.view(np.uint64)


def check(key: FreivaldsKey, x: NDArray[np.int8], sums: NDArray[np.signedinteger]) -> bool:
    """Whether `sums` [n, rows] are the weights' products with the rows of `x` [n, depth]; a false yes has probability 2^-64."""
    v = key.vectors()
    if x.dtype != np.int8 or x.ndim != 2 or sums.shape != (len(x), key.rows) or x.shape[1] != v.shape[1]:
        return False
    if not np.issubdtype(sums.dtype, np.signedinteger):
        return False
    # Wider ones could differ from the right ones by a multiple of a high power of two, which a key would not see.
    if sums.dtype != np.int32 and sums.size and not INT32_MIN <= int(sums.min()) <= int(sums.max()) <= INT32_MAX:
        return False
    # einsum goes through integers in order; the product of integer matrices in numpy does not, and takes twice as long.
    claimed = np.einsum("nr,kr->nk", sums.astype(np.int64).view(np.uint64), random_rows(key.seed, 0, key.rows))
    right = np.einsum("nd,kd->nk", x.astype(np.int64).view(np.uint64), v)
    return bool(np.array_equal(claimed, right))


@dataclass(frozen=True, slots=True)
class Floats(Record):
    """A float32 tensor of a piece: scales, biases, weights of norms."""

    name: str = text(64)
    data: bytes = raw(most=ROWS_MAX * 4)


@dataclass(frozen=True, slots=True)
class Linear(Record):
    name: str = text(16)
    key: FreivaldsKey = nested(FreivaldsKey)


@dataclass(frozen=True, slots=True)
class PieceKeys(Record):
    """What an auditor keeps of a layer's piece, or of the head's: keys in place of weight matrices, small tensors as they are."""

    linears: tuple[Linear, ...] = many(nested(Linear), 4)
    floats: tuple[Floats, ...] = many(nested(Floats), 32)

    def key(self, linear: str) -> FreivaldsKey:
        return next(entry.key for entry in self.linears if entry.name == linear)

    def tensor(self, name: str) -> NDArray[np.float32] | None:
        """None where the piece has none of that name."""
        return next((np.frombuffer(entry.data, np.dtype("<f4")) for entry in self.floats if entry.name == name), None)


def piece_keys(tensors: Mapping[str, NDArray[np.generic]], linears: Iterable[str], seed: bytes) -> PieceKeys:
    """The keys of a piece from its tensors, which may be memory-mapped: of `linears` "NAME.weight" int8 [rows, depth]; what is of
    float32 and one dimension is kept. `seed`: 32 secret bytes of this piece alone."""
    return PieceKeys(
        tuple(
            Linear(name, make_key([_int8(tensors[f"{name}.weight"])], blake3(seed + name.encode("ascii")).digest()))
            for name in linears
        ),
        tuple(
            Floats(name, np.ascontiguousarray(tensor, "<f4").tobytes())
            for name, tensor in sorted(tensors.items())
            if tensor.dtype == np.float32 and tensor.ndim == 1
        ),
    )


def _int8(tensor: NDArray[np.generic]) -> NDArray[np.int8]:
    if tensor.dtype != np.int8:
        raise ValueError(f"weights of {tensor.dtype}, not int8")
    return tensor.view(np.int8)
