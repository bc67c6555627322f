"""What this machine computes, measured in a tenth of a second: the real kernels at the shapes of one session that decodes.

Such a session multiplies one row by every weight. Many steps of less than a millisecond are timed and the fastest one counts, which
is what the machine can do: nodes that start together, or beside other work, then do not take each other for slowness. Threads that
wait for each other while others have the cores are slow a hundredfold, so one thread alone is tried as well. torch is used only
where something else has loaded it: a node that serves nothing never pays for that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import NexusError
from nexus.core.manifest import layer_name
from nexus.engine.exact import native
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan

# 11 million weights: more than the caches of one core hold on most machines, and less than a millisecond to read on all of them.
_LAYER = ExactPlan(
    causal=True,
    layers=(LayerPlan(), LayerPlan(), LayerPlan()),
    hidden=1024,
    ffn=2816,
    heads=16,
    kv_heads=4,
    head_dim=64,
    rotated=0,
    vocab=256,
    context=512,
    eps=1e-6,
    activation="silu",
    gated=True,
    tied=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    post_norms=False,
    norm_offset=False,
    attention_scale=0.125,
    attention_cap=0.0,
    logit_cap=0.0,
    embed_scale=0.0,
    ropes=(),
)
_WEIGHTS = sum(rows * depth for rows, depth in _LAYER.linear_shapes().values())
_FLOAT_SIDE = 2048
_STEPS = 64
# A slow machine is known as such after fewer.
_ENOUGH_S = 0.2


@dataclass(frozen=True, slots=True)
class Speeds:
    """Millions of multiply-adds per second while one session decodes, in each profile; at least 1."""

    exact: int
    float: int


def measure_speeds(threads: int, perf_counter: Callable[[], float] = time.perf_counter) -> Speeds:
    """Now, on `threads` threads where a kernel takes them. Blocks for 0.1 to 1 s. `perf_counter`: seconds that only grow."""
    counts = sorted({1, threads})
    floating = max(_rate(_FLOAT_SIDE**2, product, perf_counter) for product in _float_products(counts))
    try:
        steps = _native_steps(counts) if native.available() else []
    except NexusError:  # a library of another build: what serves then is torch
        steps = []
    # Without the compiled kernel exact sums are made of float32 products, weight by weight (`nexus.engine.exact.gemm`).
    exact = max((_rate(_WEIGHTS, step, perf_counter) for step in steps), default=floating)
    return Speeds(exact=exact, float=floating)


def _rate(work: int, compute: Callable[[], object], perf_counter: Callable[[], float]) -> int:
    """Millions of multiply-adds per second in the fastest step."""
    compute()
    fastest, began = float("inf"), perf_counter()
    for _ in range(_STEPS):
        step_began = perf_counter()
        compute()
        now = perf_counter()
        fastest = min(fastest, now - step_began)
        if now - began > _ENOUGH_S:
            break
    return max(1, round(work / max(fastest, 1e-9) / 1e6))


def _native_steps(threads: Sequence[int]) -> list[Callable[[], object]]:
    """One layer decodes a token, on so many threads."""
    # Not the tables of the arithmetic, which take longer to make than to measure with: as many numbers, about as large.
    tables = {"exp_hi": np.exp(-np.arange(256) / 8), "exp_lo": np.exp(-np.arange(4096) / 32768), "phi": np.linspace(0.5, 1, 4098)}
    model = native.build(_LAYER, 1, 2, {layer_name(1): _Counted(_LAYER)}, tables)
    cache, row = model.new_cache(), np.ones((1, _LAYER.hidden), np.float32)
    return [partial(lambda count: model.compute([model.run(cache, 0, 1)], row, count), count) for count in threads]


class _Counted:
    """A layer of made-up weights (`nexus.engine.exact.native.Tensors`)."""

    def __init__(self, plan: ExactPlan) -> None:
        self._shapes = plan.layer_tensors()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][1]

    def tensor(self, name: str) -> NDArray[Any]:
        dtype, shape = self._shapes[name]
        if dtype == "I8":
            rows, depth = shape
            return np.tile(np.arange(depth, dtype=np.int64) % 255 - 127, (rows, 1)).astype(np.int8)
        return np.full(shape, 2.0**-9 if name.endswith(".scale") else 1, np.float32)

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        yield 0, self.tensor(name)


def _float_products(threads: Sequence[int]) -> list[Callable[[], object]]:
    """One row times a matrix, on so many threads."""
    weight, row = np.ones((_FLOAT_SIDE, _FLOAT_SIDE), np.float32), np.ones(_FLOAT_SIDE, np.float32)
    if "torch" not in sys.modules:
        # The one is a loop of numpy's own, the other takes every core.
        return [partial(np.einsum, "ij,j->i", weight, row), *([partial(np.matmul, weight, row)] if max(threads) > 1 else [])]
    import torch

    x, w = torch.from_numpy(row[None]), torch.from_numpy(weight)
    before = torch.get_num_threads()

    def product(count: int) -> None:
        # torch keeps the number for each thread on its own, and others may use this one next.
        torch.set_num_threads(count)
        torch.nn.functional.linear(x, w)
        torch.set_num_threads(before)

    return [partial(product, count) for count in threads]
