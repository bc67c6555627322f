"""Reading a stage's tensors out of its pieces, straight into the memory they are computed from.

Nothing is memory-mapped: a mapped file counts twice while it is copied, and one cut short behind our back kills the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from nexus.core.errors import ModelFormatError
from nexus.engine.safetensors_check import TensorSpec, check_safetensors

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONVERT_BYTES = 4 << 20


def read_piece(
    path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one piece in `dtype`. `shapes`: what the piece must hold, by name; `wanted`: names to read -> names to give them.

    Reads only what is wanted, with at most 4 MiB beside the result. Raises ModelFormatError where the piece is not as it should be.
    """
    specs = check_safetensors(path)
    if {name: spec.shape for name, spec in specs.items()} != dict(shapes):
        raise ModelFormatError(f"the piece {path.name} does not hold the tensors that config.json asks for", "Add the model again")
    with path.open("rb", buffering=0) as file:
        return {new: _read(file, specs[name], dtype) for name, new in wanted.items()}


def _read(file: BinaryIO, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    stored = TORCH_DTYPES.get(spec.dtype)
    if stored is None:
        raise ModelFormatError(
            f"weights in {spec.dtype} are not supported", "Use a float32, float16 or bfloat16 version of the model"
        )
    file.seek(spec.start)
    tensor = torch.empty(spec.shape, dtype=dtype)
    flat = tensor.view(-1)
    if stored == dtype:
        _fill(file, flat)
        return tensor
    step = _CONVERT_BYTES // stored.itemsize
    buffer = torch.empty(min(step, max(1, flat.numel())), dtype=stored)
    for at in range(0, flat.numel(), step):
        part = flat[at : at + step]
        _fill(file, buffer[: part.numel()])
        part.copy_(buffer[: part.numel()])
    return tensor


def _fill(file: BinaryIO, flat: torch.Tensor) -> None:
    view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelFormatError("a piece ends before its last tensor", "Check the disk, then add the model again")
        view = view[count:]
