"""Whether the kernels of this machine are right: small models with every feature, whose bits are known, and products of any depth.

Each kernel computes the same two models, a decoder and an encoder made of counted numbers. All of them must give `EXPECTED`, which
every machine gives: that they agree with each other would not tell. Products are tried at their extremes for every depth in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import NexusError
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.engine.exact import gemm, native, torch_step
from nexus.engine.exact.commit import Kernel
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, LayerPlan, Rope
from nexus.proof.arithmetic.tables import tables_of

# Of the outputs of both models. It changes only with the arithmetic (docs/exact.md) or with what is made below.
EXPECTED = "6180f81ab5c187e2692a1d9a8641732f5b97bea2418662fcf0e643d3c0a3b5c1"
# Hidden and inner sizes of models in wide use, from MiniLM to 8B.
DEFAULT_DEPTHS = (384, 576, 1536, 2048, 4096, 8192, 14336)
TORCH = "torch"

Arrays = dict[str, NDArray[Any]]
Tables = Mapping[str, NDArray[np.float64]]

_DECODER = ExactPlan(
    causal=True,
    layers=(
        LayerPlan(),
        LayerPlan(window=5, rope=1, wide=frozenset(("qkv", "down", ATTENTION))),
        LayerPlan(wide=frozenset(("o", "gate_up"))),
    ),
    hidden=72,
    ffn=136,
    heads=6,
    kv_heads=2,
    head_dim=20,
    rotated=16,
    vocab=97,
    context=512,
    eps=1e-6,
    activation="gelu_tanh",
    gated=True,
    tied=False,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=False,
    attention_scale=0.25,
    attention_cap=30.0,
    logit_cap=20.0,
    embed_scale=8.5,
    ropes=(Rope((("rope_theta", 10000.0),)), Rope((("factor", 4.0), ("rope_theta", 500.0), ("rope_type", "linear")))),
    wide_head=True,
)
_ENCODER = replace(
    _DECODER,
    causal=False,
    layers=(LayerPlan(), LayerPlan(wide=frozenset(("qkv", "o", "gate_up", "down", ATTENTION)))),
    kv_heads=6,
    rotated=0,
    context=64,
    activation="gelu",
    gated=False,
    o_bias=True,
    qk_norm=False,
    post_norms=False,
    attention_cap=0.0,
    logit_cap=0.0,
    embed_scale=0.0,
    ropes=(),
    wide_head=False,
)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """`reason`: why a kernel is not right, else the empty string."""

    name: str
    right: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DepthReport:
    """Which kernel multiplies rows of `depth` values here, and why; none is the empty string."""

    depth: int
    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineReport:
    """`digest`: what every right kernel gave. `kernels`: in the order of preference, the fastest first."""

    kernels: tuple[KernelReport, ...]
    depths: tuple[DepthReport, ...]
    digest: str

    @property
    def kernel(self) -> str:
        """What the exact profile computes with here; the empty string where nothing is right."""
        return next((kernel.name for kernel in self.kernels if kernel.right), "")


class _Piece:
    """A piece of a model in memory, for either implementation."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def tensor(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        yield 0, self._arrays[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values) for name, values in self._arrays.items()}


def check_engine(depths: Sequence[int], progress: Callable[[int, int], None]) -> EngineReport:
    """Try every kernel on the models and on products of these depths. `progress`: told what is done, of how much."""
    wrong: dict[str, dict[int, str]] = {}
    kernels = []
    names = kernel_names()
    for name in names:
        reason = _model_verdict(name)
        wrong[name] = {}
        for depth in depths:
            wrong[name][depth] = reason or _depth_verdict(name, depth)
            progress(sum(map(len, wrong.values())), len(names) * len(depths))
        reasons = [reason, *wrong[name].values()]
        kernels.append(KernelReport(name, not any(reasons), next(filter(None, reasons), "")))
    if not native.available():
        missing = "not built for this machine: install a C compiler, then: python -m nexus.engine.exact.native --build"
        kernels.insert(0, KernelReport("compiled", False, missing))
    return EngineReport(tuple(kernels), tuple(_chosen(depth, wrong) for depth in depths), EXPECTED)


def compiled_kernel() -> str:
    """The fastest variant of the compiled kernel that gives the right bits here; the empty string where none does."""
    return next((name for name in native.available() if not _model_verdict(name)), "")


def kernel_names() -> list[str]:
    """Everything that may compute here, the fastest first, as `load_stage` names them."""
    return [*native.available(), *(f"{TORCH}:{kernel.name}" for kernel in gemm.KERNELS)]


def _chosen(depth: int, wrong: Mapping[str, Mapping[int, str]]) -> DepthReport:
    passed: list[str] = []
    for name, reasons in wrong.items():
        if not reasons[depth]:
            return DepthReport(depth, name, "; ".join(passed) or "the fastest here, and right")
        passed.append(f"not {name}: {reasons[depth]}")
    return DepthReport(depth, "", "; ".join(passed))


@cache
def _model_verdict(name: str) -> str:
    try:
        found = model_digest(name)
    except (NexusError, RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        return f"not available: {str(error).splitlines()[0][:100]}"
    return "" if found == EXPECTED else f"gives other bits ({found[:16]}, not {EXPECTED[:16]})"


@cache
def _depth_verdict(name: str, depth: int) -> str:
    if name.startswith(TORCH):
        (verdict,) = (one for one in gemm.verdicts([depth]) if one.name == name.partition(":")[2])
        return verdict.reason
    # The compiled step has no product by itself: a layer of that inner size, against the kernel that is right everywhere.
    plan = replace(_DECODER, layers=(LayerPlan(), LayerPlan(wide=frozenset(("down",))), LayerPlan()), ffn=depth, mlp_bias=False)
    pieces = _pieces(plan, extreme=True)
    x = torch.from_numpy(_counted("depth", (5, plan.hidden)).astype(np.float32) / np.float32(64))
    given, expected = (_run(_build(plan, pieces, kernel), x) for kernel in (name, f"{TORCH}:{gemm.Float32Blocks.name}"))
    return "" if torch.equal(given, expected) else f"wrong sums at depth {depth}"


def _run(model: Kernel, x: torch.Tensor) -> torch.Tensor:
    return model.step([model.run(model.new_cache(), 0, len(x))], x)


def model_digest(kernel: str) -> str:
    """Of what both models give: a prompt at once and in parts, decoding, and two sessions in one batch."""
    digest = blake3()
    for plan in (_DECODER, _ENCODER):
        model = _build(plan, _pieces(plan, extreme=False), kernel)
        first, second = (torch.from_numpy((np.arange(count) * 37 + count) % plan.vocab) for count in (11, 6))
        if not plan.causal:
            digest.update(_run(model, first).numpy().tobytes())
            continue
        one, other = model.new_cache(), model.new_cache()
        digest.update(model.step([model.run(one, 0, 7)], first[:7]).numpy().tobytes())
        digest.update(model.step([model.run(one, 7, 4), model.run(other, 0, 6)], torch.cat((first[7:], second))).numpy().tobytes())
        for position in range(3):
            runs = [model.run(one, 11 + position, 1), model.run(other, 6 + position, 1)]
            digest.update(model.step(runs, torch.tensor([position, 90 - position])).numpy().tobytes())
    return digest.hexdigest()


def _build(plan: ExactPlan, pieces: Mapping[str, _Piece], kernel: str) -> Kernel:
    if not kernel.startswith(TORCH):
        return native.build(plan, *_range(plan, pieces), pieces, _tables(plan), kernel)
    product = next(one for one in gemm.KERNELS if one.name == kernel.partition(":")[2])
    tensors = {name: piece.tensors() for name, piece in pieces.items()}
    return torch_step.build(plan, *_range(plan, pieces), tensors, _tables(plan), product)


def _range(plan: ExactPlan, pieces: Mapping[str, _Piece]) -> tuple[int, int]:
    """All layers, or without embedding and head the middle one."""
    return (0, len(plan.layers)) if EMBEDDING in pieces else (1, 2)


def _pieces(plan: ExactPlan, *, extreme: bool) -> dict[str, _Piece]:
    """`extreme`: the middle layer alone, with inputs and weights of `down` all as large as they can be."""
    shapes = {layer_name(index): plan.layer_tensors() for index in range(len(plan.layers))}
    shapes = (
        {layer_name(1): shapes[layer_name(1)]}
        if extreme
        else shapes | {EMBEDDING: plan.embedding_tensors(), HEAD: plan.head_tensors()}
    )
    pieces = {}
    for piece, tensors in shapes.items():
        arrays = {name: _values(f"{piece}.{name}", dtype, shape) for name, (dtype, shape) in tensors.items()}
        if extreme:
            arrays["gate_up.weight"][:] = arrays["gate_up.weight"][0]
            arrays["gate_up.scale"][:] = arrays["gate_up.scale"][0]
            arrays["down.weight"][0::3], arrays["down.weight"][1::3] = 127, -127
        pieces[piece] = _Piece(arrays)
    return pieces


def _values(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    counted = _counted(name, shape)
    if dtype == "I8":
        return counted.astype(np.int8)
    parts = counted.astype(np.float32) / np.float32(128)
    if name.endswith(".scale"):
        return (np.float32(1.5) + parts) * np.float32(2**-9)
    return np.float32(1) + parts * np.float32(0.25) if name.endswith("norm.weight") else parts * np.float32(0.5)


def _counted(name: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Numbers from -127 to 127 without order, the same everywhere."""
    salt = int.from_bytes(blake3(name.encode()).digest()[:4], "little")
    values: NDArray[np.int64] = ((np.arange(int(np.prod(shape)), dtype=np.int64) + salt) * 2654435761 >> 13) % 255 - 127
    return values.reshape(shape)


@cache
def _tables(plan: ExactPlan) -> Tables:
    """Most of the time that a check takes goes into the tables: those that are the same for all plans are made once."""
    if plan.ropes:
        return tables_of(plan)
    return {name: values for name, values in _tables(_DECODER).items() if not name.startswith("rope")}
