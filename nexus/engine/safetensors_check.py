"""A strict check of a safetensors file's header, before anything in the file is used.

The format: 8 bytes little-endian N, then N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end)}}, then the data. The
offsets count from the end of the header and must cover the data exactly: no overlaps, no holes, nothing behind the last tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError

HEADER_BYTES_MAX = 100_000_000
TENSORS_MAX = 100_000
DIMENSIONS_MAX = 8
TENSOR_BYTES_MAX = 1 << 48
DATA_ALIGNMENT = 64
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
NUMPY_DTYPES = {"int8": "I8", "int64": "I64", "float32": "F32", "float64": "F64"}
_FIX = "Download the file again, or save the model again with safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file. `start` and `end`: its bytes, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def check_safetensors(path: Path, header_bytes_max: int = HEADER_BYTES_MAX) -> dict[str, TensorSpec]:
    """The tensors of the file at `path`, by name. Raises ModelFormatError unless every byte of the file is accounted for."""
    try:
        with path.open("rb") as file:
            return _check(file, os.fstat(file.fileno()).st_size, header_bytes_max)
    except OSError as error:
        raise ModelFormatError(f"{path.name} cannot be read: {error.strerror}", "Check the file and its permissions") from error
    except ModelFormatError as error:
        raise ModelFormatError(f"{path.name} is not a sound safetensors file: {error.cause}", _FIX) from error.__cause__


def _check(file: BinaryIO, size: int, header_bytes_max: int) -> dict[str, TensorSpec]:
    head = file.read(8)
    if len(head) < 8:
        raise ModelFormatError(f"it is only {size} bytes long")
    length = int.from_bytes(head, "little")
    if length > header_bytes_max:
        raise ModelFormatError(f"its header claims {length} bytes, more than the {header_bytes_max} allowed")
    if 8 + length > size:
        raise ModelFormatError(f"its header claims {length} bytes, but the file has {size}")
    raw = file.read(length)
    if len(raw) < length:
        raise ModelFormatError("its header is cut short")
    return _parse(raw, 8 + length, size)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ModelFormatError("its header names something twice")
    return names


def _parse(raw: bytes, data_start: int, size: int) -> dict[str, TensorSpec]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelFormatError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFormatError("its metadata is not text")
    if len(header) > TENSORS_MAX:
        raise ModelFormatError(f"it has {len(header)} tensors, more than the {TENSORS_MAX} allowed")
    specs = {name: _spec(name, entry, data_start) for name, entry in header.items()}
    at = data_start
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != at:
            problem = "overlaps another" if spec.start < at else "leaves a hole before it"
            raise ModelFormatError(f"tensor {name!r} {problem}")
        at = spec.end
    if at != size:
        raise ModelFormatError(f"its tensors end at byte {at}, but the file has {size}")
    return specs


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < TENSOR_BYTES_MAX


def _spec(name: str, entry: object, data_start: int) -> TensorSpec:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFormatError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_MAX or not all(map(_is_count, shape)):
        raise ModelFormatError(f"tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
        raise ModelFormatError(f"tensor {name!r} has impossible offsets")
    # Python's integers do not overflow; the bound keeps what is built from them within 64 bits.
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if expected >= TENSOR_BYTES_MAX:
        raise ModelFormatError(f"tensor {name!r} is larger than any machine")
    if expected != offsets[1] - offsets[0]:
        raise ModelFormatError(f"tensor {name!r} needs {expected} bytes and has {offsets[1] - offsets[0]}")
    return TensorSpec(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The one header for tensors (name, dtype, shape): sorted by name, no metadata, padded so that data starts at a multiple of
    64 bytes. The same tensors give the same bytes on every machine."""
    at = 0
    listed = {}
    for name, dtype, shape in sorted(tensors):
        end = at + prod(shape) * DTYPE_BYTES[dtype]
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(listed, separators=(",", ":")).encode("ascii")
    raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def encode_safetensors(tensors: Mapping[str, NDArray[np.generic]]) -> bytes:
    """A whole file of arrays (int8, int64, float32, float64), in the one form of `encode_header`."""
    header = encode_header((name, NUMPY_DTYPES[values.dtype.name], values.shape) for name, values in tensors.items())
    little = (values.astype(values.dtype.newbyteorder("<"), copy=False) for _, values in sorted(tensors.items()))
    return b"".join((header, *(values.tobytes() for values in little)))
