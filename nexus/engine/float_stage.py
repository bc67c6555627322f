"""The float profile of a stage: the model's own code in transformers, in float32 or bfloat16."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import NexusError, UsageError
from nexus.core.manifest import EMBEDDING, HEAD, Manifest, layer_name
from nexus.engine.architecture import Config, Layout, layout_of
from nexus.engine.fragment import Fragment
from nexus.engine.kv import KVCache
from nexus.engine.pooling import Pooling
from nexus.engine.sampling import sample
from nexus.engine.stage import Pass, Session, Stage, check_config, path_of
from nexus.engine.weights import read_piece

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL_STAGE_BYTES = 64 << 20
# What the process was given (OMP_NUM_THREADS). The setting that counts is each calling thread's own.
_THREADS: int = torch.get_num_threads()
_of_thread = threading.local()


def use_threads(weight_bytes: int) -> int:
    """How many threads this calling thread's torch uses from now on for a stage of this size.

    Small matrices are slower on several threads than on one: handing out the parts costs more than the parts.
    """
    wanted = 1 if weight_bytes < SMALL_STAGE_BYTES else _THREADS
    if getattr(_of_thread, "threads", None) != wanted:
        torch.set_num_threads(wanted)
        _of_thread.threads = wanted
    return int(wanted)


class FloatStage(Stage):
    """Computes through transformers' class for the model; sessions one after the other."""

    def __init__(self, manifest: Manifest, start: int, end: int, fragment: Fragment, pooling: Pooling) -> None:
        super().__init__(manifest, start, end, pooling)
        self._fragment = fragment

    @property
    def weight_bytes(self) -> int:
        count: int = self._fragment.weight_bytes
        return count

    @property
    def kernel(self) -> str:
        return "transformers"

    @property
    def is_traced(self) -> bool:
        """Whether decode steps take the fast way (see `Fragment.is_traced`)."""
        return self._fragment.is_traced

    @property
    def is_fused(self) -> bool:
        """Whether they take the fastest way (see `Fragment.is_fused`)."""
        return self._fragment.is_fused

    def _new_cache(self) -> KVCache:
        return self._fragment.new_cache()

    def _compute(self, passes: Sequence[Pass]) -> list[NDArray[np.float32] | NexusError]:
        use_threads(self.weight_bytes)
        results: list[NDArray[np.float32] | NexusError] = []
        for one in passes:
            try:
                results.append(self._forward(one))
            except NexusError as error:
                results.append(error)
        return results

    @torch.inference_mode()
    def _forward(self, one: Pass) -> NDArray[np.float32]:
        cache = one.session.cache
        assert cache is None or isinstance(cache, KVCache)
        out = self._fragment.forward(self._tensor(one.inputs), cache, one.session.position)
        if self.last:
            out = out[0, -1] if self.causal else self.pooling(out)
        values: NDArray[np.float32] = out.float().numpy()
        return values

    def _tensor(self, inputs: NDArray[np.int64] | NDArray[np.float32]) -> torch.Tensor:
        """int64 [1, n] token ids or [1, n, hidden] states in the stage's dtype."""
        if self.first:
            return torch.from_numpy(inputs).view(1, -1)
        # A tensor of torch's own: its memory is aligned, which the sums of vectorised kernels may depend on.
        x = torch.empty(1, *inputs.shape)
        np.copyto(x[0].numpy(), inputs)
        return x.to(self._fragment.dtype)

    def _choose(self, session: Session) -> int:
        assert session.logits is not None
        return sample(session.logits, session.sampling, session.steps, session.tokens)


def load_float_stage(
    manifest: Manifest, config: Config, start: int, end: int, files: Mapping[str, Path], pooling: Pooling, dtype: str
) -> FloatStage:
    """See `nexus.engine.stage.load_stage`."""
    if dtype not in DTYPES:
        raise UsageError(f"cannot compute in {dtype!r}", f"Use one of {', '.join(DTYPES)}")
    check_config(manifest, config, config.kv_bytes)
    tensors = _tensors(config, layout_of(config), start, end, files, DTYPES[dtype])
    return FloatStage(manifest, start, end, Fragment(config, start, end, tensors, DTYPES[dtype]), pooling)


def _tensors(
    config: Config, layout: Layout, start: int, end: int, files: Mapping[str, Path], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of the stage under its name in the whole model, with layers counted from the stage's first."""
    tensors: dict[str, torch.Tensor] = {}
    first, last = start == 0, end == config.layers
    outside = layout.embedding_tensors()
    if first:
        tensors |= read_piece(path_of(files, EMBEDDING), outside, {name: name for name in outside}, dtype)
    elif last and config.tied:
        tensors |= read_piece(
            path_of(files, EMBEDDING), outside, {name: name for name in layout.tied_sources & outside.keys()}, dtype
        )
    for index in range(start, end):
        shapes = layout.layer_tensors(index)
        names = {name: f"{layout.layers}.{index - start}.{name}" for name in shapes}
        tensors |= read_piece(path_of(files, layer_name(index)), shapes, names, dtype)
    if last:
        outside = layout.head_tensors()
        tensors |= read_piece(path_of(files, HEAD), outside, {name: name for name in outside}, dtype)
    return tensors
