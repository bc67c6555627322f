"""Reading a stage's tensors out of its pieces, straight into the memory they are computed from.

Nothing is memory-mapped: a mapped file counts twice while it is copied, and one cut short behind our back kills the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from nexus.core.errors import ModelFormatError
from nexus.engine.safetensors_check import TensorSpec, check_safetensors

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONVERT_BYTES = 4 << 20
_ALIGNMENT_BYTES = 64


def read_piece(
    path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one piece in `dtype`. `shapes`: what the piece must hold, by name; `wanted`: names to read -> names to give them.

    The tensors are parts of one block of memory, weights in the order of `wanted`, so that what follows one another there can be
    used as one (see `nexus.engine.decoder_step`). Reads only what is wanted, with at most 4 MiB beside the result. Raises
    ModelFormatError where the piece is not as it should be.
    """
    specs = check_safetensors(path)
    if {name: spec.shape for name, spec in specs.items()} != dict(shapes):
        raise ModelFormatError(f"the piece {path.name} does not hold the tensors that config.json asks for", "Add the model again")
    # Biases first: each stands between its weight and the next one in the model.
    order = sorted(wanted, key=lambda name: name.rpartition(".")[2])
    block = torch.empty(sum(_padded(specs[name], dtype) for name in order), dtype=dtype)
    tensors, at = {}, 0
    with path.open("rb", buffering=0) as file:
        for name in order:
            spec = specs[name]
            tensors[wanted[name]] = tensor = block[at : at + math.prod(spec.shape)].view(spec.shape)
            _read(file, spec, tensor.view(-1))
            at += _padded(spec, dtype)
    return tensors


def _padded(spec: TensorSpec, dtype: torch.dtype) -> int:
    """Elements of a tensor in a block. Each begins where torch's own would: the sums of vectorised kernels may depend on that."""
    return -(-math.prod(spec.shape) * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES // dtype.itemsize


def _read(file: BinaryIO, spec: TensorSpec, flat: torch.Tensor) -> None:
    stored = TORCH_DTYPES.get(spec.dtype)
    if stored is None:
        raise ModelFormatError(
            f"weights in {spec.dtype} are not supported", "Use a float32, float16 or bfloat16 version of the model"
        )
    file.seek(spec.start)
    if stored == flat.dtype:
        _fill(file, flat)
        return
    step = _CONVERT_BYTES // stored.itemsize
    buffer = torch.empty(min(step, max(1, flat.numel())), dtype=stored)
    for at in range(0, flat.numel(), step):
        part = flat[at : at + step]
        _fill(file, buffer[: part.numel()])
        part.copy_(buffer[: part.numel()])


def _fill(file: BinaryIO, flat: torch.Tensor) -> None:
    view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelFormatError("a piece ends before its last tensor", "Check the disk, then add the model again")
        view = view[count:]
