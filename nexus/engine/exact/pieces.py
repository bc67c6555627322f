"""Reading the pieces and tables of an exact model, block by block, each checked for form and meaning before anything uses it."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError
from nexus.engine.safetensors_check import TensorSpec, check_safetensors
from nexus.proof.arithmetic.plan import Shapes

_DTYPES: dict[str, np.dtype[Any]] = {"I8": np.dtype("i1"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_BLOCK_BYTES = 16 << 20
# A piece has some dozen tensors.
HEADER_BYTES_MAX = 1 << 20
SCALE_MIN, SCALE_MAX = 2.0**-60, 2.0**20
VALUE_MAX, STATE_MAX = 2.0**20, 2.0**40
# Tables that are the same in every model. With another's no sum would stay within its bounds, and known answers read only a few
# of their entries: an author could make honest machines differ.
TABLE_SHA256 = {
    "exp_hi": "a072235bc997306595f5f44c422889f7a699757f3e9e81b36ec19456e3b4b7b8",
    "exp_lo": "b7f2de0104ff32761d02c37cab009e6ad7dbb925dda2a5ba1f32f9b4baf3cd63",
    "phi": "4cb28a4465ad1d74eb3550a9ce6a4aab829b6acb23a55b73724d1268f7474812",
}
# What a computation gave, as opposed to what it works with (vectors.safetensors).
_ANSWERS = ("states", "logits", "vector")

Array = NDArray[Any]


class Piece:
    """One safetensors file whose tensors are as the plan says. Nothing of it is kept in memory."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        """Raises ModelFormatError where the file does not hold exactly these tensors."""
        self.path = path
        self._specs = check_safetensors(path, HEADER_BYTES_MAX)
        if {name: (spec.dtype, spec.shape) for name, spec in self._specs.items()} != shapes:
            raise ModelFormatError(f"the piece {path.name} does not hold the tensors that the model's config asks for", _AGAIN)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def tensor(self, name: str) -> Array:
        """A whole tensor, checked. Raises ModelFormatError."""
        spec = self._specs[name]
        values = _read(self.path, spec, spec.start, spec.size).reshape(spec.shape)
        _check(name, values)
        return values

    def rows(self, name: str, start: int, count: int) -> Array:
        """Rows [start, start + count) of a two-dimensional tensor, checked."""
        spec = self._specs[name]
        rows, depth = spec.shape
        if not 0 <= start <= start + count <= rows:
            raise IndexError(f"rows {start} to {start + count} of {rows}")
        row_bytes = depth * _DTYPES[spec.dtype].itemsize
        values = _read(self.path, spec, spec.start + start * row_bytes, count * row_bytes).reshape(count, depth)
        _check(name, values)
        return values

    def blocks(self, name: str) -> Iterator[tuple[int, Array]]:
        """A two-dimensional tensor by blocks of whole rows: (first row, rows)."""
        spec = self._specs[name]
        rows, depth = spec.shape
        step = max(1, _BLOCK_BYTES // (depth * _DTYPES[spec.dtype].itemsize))
        for start in range(0, rows, step):
            yield start, self.rows(name, start, min(step, rows - start))


_AGAIN = "Fetch or add the model again"


def _read(path: Path, spec: TensorSpec, start: int, size: int) -> Array:
    values: Array = np.empty(size // _DTYPES[spec.dtype].itemsize, _DTYPES[spec.dtype])
    view = memoryview(values.view(np.uint8).data)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelFormatError(f"{path.name} ends before its last tensor", "Check the disk, then add the model again")
            view = view[count:]
    return values


def _check(name: str, values: Array) -> None:
    """Values outside these bounds are no honest conversion's, and could overflow what comes after."""
    if values.dtype == np.int8:
        if values.size and int(values.min()) < -127:
            raise ModelFormatError(f"{name} holds -128, which no conversion writes", _AGAIN)
    elif values.dtype == np.float32 and values.size:
        low, high = float(values.min()), float(values.max())  # NaN where any is
        if name.endswith(".scale"):
            if not (low >= SCALE_MIN and high <= SCALE_MAX):
                raise ModelFormatError(f"{name} holds scales from {low} to {high}, outside [2^-60, 2^20]", _AGAIN)
        else:
            most = STATE_MAX if name in _ANSWERS else VALUE_MAX
            if not (low >= -most and high <= most):
                raise ModelFormatError(f"{name} holds values from {low} to {high}, beyond {most:.0f} or not numbers", _AGAIN)


def read_tables(path: Path, expected: Shapes) -> dict[str, NDArray[np.float64]]:
    """The tables of a model by name. Raises ModelFormatError for anything but finite float64 of the shapes expected."""
    piece = Piece(path, expected)
    tables = {}
    for name in expected:
        values = piece.tensor(name).astype(np.float64, copy=False)
        # Beyond these no cosine, exponential or distribution function goes; amplitudes of long contexts are below 2.
        if not (np.isfinite(values).all() and float(np.abs(values).max()) <= 4.0):
            raise ModelFormatError(f"the table {name} holds values that cannot be", _AGAIN)
        if name in TABLE_SHA256 and sha256(values.astype("<f8", copy=False).tobytes()).hexdigest() != TABLE_SHA256[name]:
            raise ModelFormatError(f"the table {name} is not that of docs/exact.md, which all models share", _AGAIN)
        tables[name] = values
    return tables
