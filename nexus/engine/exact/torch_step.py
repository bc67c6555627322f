"""The exact profile in stock torch operations: the reference, and the way on machines where the compiled kernel is missing.

Follows docs/exact.md line by line. Every torch operation used here was seen to give the same bits under every instruction set that
torch and oneDNN choose between; numpy does the square roots, since torch's go through a vector library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import LocalError, OutOfBoundsError
from nexus.engine.exact.gemm import Kernel, Product
from nexus.engine.exact.pieces import STATE_MAX
from nexus.proof.arithmetic.plan import ATTENTION, HEAD_OP, LINEARS, ExactPlan, LayerPlan
from nexus.proof.arithmetic.tables import PHI_MAX, PHI_PER_UNIT, ROPE_FINE
from nexus.proof.trace import ATTENTION_OUT, DOWN, GATE_UP, QKV

SMALLEST, LARGEST = 2.0**-40, STATE_MAX
MAX8, MAX16 = 127.0, 32512.0
_PAGE_TOKENS = 64
_P_MAX = 32767.0
_UNIT = 2.0**24
_EXP_MAX, _EXP_STEPS = 31.75, 32768.0


Tensors = Mapping[str, torch.Tensor]


class Trace(Protocol):
    """Receives what every operation of a step computed: the int32 sums of linear operations [rows, N] (with 16 bits the rows of the
    high parts, then those of the low parts), and the float32 output of attention [rows, heads * head_dim]."""

    def __call__(self, layer: int, op: str, values: torch.Tensor) -> None: ...


class WrongSumsError(LocalError):
    """A step that commits found a product that is not the one of the model's weights."""

    def __init__(self, kernel: str) -> None:
        super().__init__(
            f"this machine computed wrongly: a sum over the model's weights is not the right one (kernel {kernel})",
            "Nothing of the step was used. Load the model again; if it comes back, test the memory and do not overclock",
        )


class CommitSink(Protocol):
    """Receives what a step commits to (docs/evidence.md), as it is computed."""

    def value(self, layer: int, op: str, rows: torch.Tensor) -> None:
        """float32 [rows, width]; `op` of `nexus.proof.trace.OPS`."""
        ...

    def records(self, layer: int, records: torch.Tensor) -> None:
        """uint8 [rows, key-value heads, bytes of a record]; of a decoder only."""
        ...


class TorchCache:
    """Keys and values of one session in one stage: int8 with a float32 scale per head and token, grown by pages of 64 tokens.

    Wide keys are int16: the high and the low byte of docs/exact.md in one.
    """

    def __init__(self, plan: ExactPlan, layers: Sequence[LayerPlan]) -> None:
        self._plan = plan
        self._capacity = 0
        heads, size = plan.kv_heads, plan.head_dim
        self.keys = [torch.empty(heads, 0, size, dtype=torch.int16 if ATTENTION in layer.wide else torch.int8) for layer in layers]
        self.values = [torch.empty(heads, 0, size, dtype=torch.int8) for _ in layers]
        self.key_scales = [torch.empty(heads, 0) for _ in layers]
        self.value_scales = [torch.empty(heads, 0) for _ in layers]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self._parts() for part in parts)

    def records(self, layer: int, start: int, end: int) -> NDArray[np.uint8]:
        """The records of tokens [start, end) in the logs of a layer, uint8 [key-value heads, tokens, bytes]."""
        parts = (part[layer][:, start:end] for part in (self.keys, self.values, self.key_scales, self.value_scales))
        values: NDArray[np.uint8] = kv_records(*parts).numpy()
        return values

    def _parts(self) -> tuple[list[torch.Tensor], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales

    def reserve(self, length: int) -> None:
        if length <= self._capacity:
            return
        pages = -(-length // _PAGE_TOKENS)
        more = max(pages * _PAGE_TOKENS, min(2 * self._capacity, -(-self._plan.context // _PAGE_TOKENS) * _PAGE_TOKENS))
        for parts in self._parts():
            for index, part in enumerate(parts):
                grown = part.new_empty((part.shape[0], more, *part.shape[2:]))
                grown[:, : self._capacity] = part
                parts[index] = grown
        self._capacity = more


def kv_records(keys: torch.Tensor, values: torch.Tensor, key_scales: torch.Tensor, value_scales: torch.Tensor) -> torch.Tensor:
    """Records of keys and values as nexus.proof.trace hashes them, uint8 [..., bytes]. `keys`: int8, or int16 of wide attention,
    [..., size]; `values`: int8 [..., size]; scales: float32 [...]."""
    parts = (keys, values, key_scales[..., None], value_scales[..., None])
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


@dataclass(frozen=True, slots=True)
class TorchRun:
    """Consecutive tokens of one session. `cache` is None for an encoder, which sees all of the run and nothing else. `logits`: of
    the "last" token, of "all" or "none"."""

    cache: TorchCache | None
    position: int
    count: int
    logits: str = "last"


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, kept as a last dimension of one. Raises OutOfBoundsError."""
    a = x.abs().amax(-1, keepdim=True)
    if not bool((a <= LARGEST).all()):  # also where it is not a number
        raise OutOfBoundsError
    return a.clamp_min(SMALLEST)


def quotient(number: float, x: torch.Tensor) -> torch.Tensor:
    """number / x, rounded once. torch makes of `number / x` the product with a reciprocal, which is rounded twice."""
    return _constant(number, x.dtype) / x


@cache
def _constant(number: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(number, dtype=dtype)


def quantise8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n] to int8 and scale [..., 1]."""
    a = amax(x)
    return (x * quotient(MAX8, a)).round().to(torch.int8), a / MAX8


def quantise16(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n] to int32 of 16 bits and scale [..., 1]."""
    a = amax(x)
    return (x * quotient(MAX16, a)).round().to(torch.int32), a / MAX16


def split16(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low byte, int8 each: q = 256 high + low."""
    high = (q + 128) >> 8
    return high.to(torch.int8), (q - (high << 8)).to(torch.int8)


def fixed_point(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 integers below 2^19 and the power of two they were multiplied with, float64, one per row."""
    exponent = torch.frexp(amax(x))[1]
    scale = ((127 + 19 - exponent.to(torch.int32)) << 23).view(torch.float32)  # the bits of 2^(19 - exponent)
    return (x * scale).round().double(), scale.double()


def inverse_sqrt(m: torch.Tensor) -> torch.Tensor:
    """f32(1 / sqrt(m)) of float64."""
    return torch.from_numpy((1.0 / np.sqrt(m.numpy())).astype(np.float32))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    v, c = fixed_point(x)
    m = (v * v).sum(-1, keepdim=True) / (c * c) / x.shape[-1] + eps
    return (x * inverse_sqrt(m)) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    v, c = fixed_point(x)
    n = x.shape[-1]
    mean = v.sum(-1, keepdim=True) / c / n
    m = ((v * v).sum(-1, keepdim=True) / (c * c) / n - mean * mean).clamp_min(0) + eps
    return ((x - mean.float()) * inverse_sqrt(m)) * weight + bias


class Functions:
    """EXP, SIG, CAP and PHI of docs/exact.md over the model's tables."""

    def __init__(self, tables: Mapping[str, NDArray[np.float64]]) -> None:
        self._hi, self._lo, self._phi = (torch.from_numpy(tables[name].copy()) for name in ("exp_hi", "exp_lo", "phi"))

    def exp_neg(self, x: torch.Tensor) -> torch.Tensor:
        """e^-x, float64, of float32 x >= 0."""
        i = (x.clamp(max=_EXP_MAX) * _EXP_STEPS).round().to(torch.int32)
        # index_select on a flat index is several times faster than indexing with a tensor.
        flat = i.reshape(-1)
        return (self._hi.index_select(0, flat >> 12) * self._lo.index_select(0, flat & 4095)).view(i.shape)

    def sigmoid(self, v: torch.Tensor) -> torch.Tensor:
        e = self.exp_neg(v.abs())
        return torch.where(v >= 0, quotient(1.0, 1.0 + e), e / (1.0 + e))

    def cap(self, v: torch.Tensor, cap: float) -> torch.Tensor:
        e = self.exp_neg((v / cap).abs() * 2.0)
        return torch.copysign(((1.0 - e) / (1.0 + e) * cap).float(), v)

    def phi(self, v: torch.Tensor) -> torch.Tensor:
        t = v.abs().clamp(max=PHI_MAX - 0.002).double() * PHI_PER_UNIT
        i = t.to(torch.int64)
        p = self._phi[i] + (t - i) * (self._phi[i + 1] - self._phi[i])
        return torch.where(v < 0, 1.0 - p, p)

    def activation(self, name: str, g: torch.Tensor) -> torch.Tensor:
        d = g.double()
        match name:
            case "silu":
                return (d * self.sigmoid(g)).float()
            case "gelu_tanh":
                z = (d + ((d * d) * d) * 0.044715) * 1.5957691216057308
                return (d * self.sigmoid(z.clamp(-1e30, 1e30).float())).float()
            case "gelu":
                return (d * self.phi(g)).float()
        raise ValueError(f"no activation {name!r}")


class SumsCheck:
    """Freivalds (1977): with a random r per row of the weights W and v = r W, made as they were loaded, r.sums = v.x must hold mod
    2^64. One wrong sum is always found, as r is odd; several are missed once in 2^31 times."""

    _ROWS_AT_ONCE = 256

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight`: int8 [N, K]."""
        rows = len(weight)
        # Nobody else may know it, so that nothing can be made to pass.
        r = np.frombuffer(os.urandom(4 * rows), np.int32) | 1
        # Halves of 16 bits, whose products with so many rows are exact in float64.
        halves = np.stack((r & 0xFFFF, r >> 16)).astype(np.float64)
        self._r = r.astype(np.int64).view(np.uint64)
        self._v = np.zeros(weight.shape[1], np.uint64)
        for at in range(0, rows, self._ROWS_AT_ONCE):
            block = weight[at : at + self._ROWS_AT_ONCE].numpy().astype(np.float64)
            low, high = (halves[:, at : at + len(block)] @ block).astype(np.int64).view(np.uint64)
            self._v += low + (high << np.uint64(16))
        self.nbytes = self._r.nbytes + self._v.nbytes

    def holds(self, x: torch.Tensor, sums: torch.Tensor) -> bool:
        """`x`: int8 [M, K]; `sums`: int32 [M, N]."""
        given = sums.numpy().astype(np.int64).view(np.uint64) @ self._r
        return bool(np.array_equal(given, x.numpy().astype(np.int64).view(np.uint64) @ self._v))


@dataclass(slots=True)
class _Linear:
    product: Product
    scale: torch.Tensor
    bias: torch.Tensor | None
    wide: bool
    check: SumsCheck | None

    def __call__(
        self, x: torch.Tensor, trace: Callable[[torch.Tensor], None] | None = None, *, checked: bool = False
    ) -> torch.Tensor:
        if self.wide:
            wide, s = quantise16(x)
            q = torch.cat(split16(wide))
            sums = self.product(q)
            high, low = torch.split(sums.double(), len(x))
            total = (high * 256.0 + low).float()
        else:
            q, s = quantise8(x)
            if trace or checked:
                sums = self.product.sums(q)
                total = sums.float()
            else:
                total = self.product(q)
        if trace:
            trace(sums)
        if checked and (self.check is None or not self.check.holds(q, sums)):
            raise WrongSumsError("torch")
        y = (total * s) * self.scale
        return y if self.bias is None else y + self.bias


@dataclass(slots=True)
class _Layer:
    plan: LayerPlan
    linear: dict[str, _Linear]
    norms: dict[str, tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(slots=True)
class TorchModel:
    """Layers [start, end) of a model, with the embedding where they are the first and the head where they are the last."""

    plan: ExactPlan
    first: bool
    last: bool
    functions: Functions
    layers: list[_Layer]
    ropes: list[tuple[torch.Tensor, torch.Tensor]]
    embed: tuple[torch.Tensor, torch.Tensor] | None
    extras: Tensors
    head: _Linear | None
    weight_bytes: int
    kernel: str = ""

    def new_cache(self) -> TorchCache | None:
        return TorchCache(self.plan, [layer.plan for layer in self.layers]) if self.plan.causal else None

    def run(self, cache: TorchCache | None, position: int, count: int, logits: str = "last") -> TorchRun:
        return TorchRun(cache, position, count, logits)

    def step(
        self, runs: Sequence[TorchRun], x: torch.Tensor, trace: Trace | None = None, commit: CommitSink | None = None
    ) -> torch.Tensor:
        """`x`: token ids, int64 [rows], for the first stage, else float32 [rows, hidden]; the rows of all runs one after the other.

        Gives float32 [rows, hidden], or, from the last stage of a causal model, the logits [n, vocab] that the runs ask for, in
        their order. `commit`: told what the step commits to, all of whose products are checked. Raises OutOfBoundsError, and
        WrongSumsError where a step that commits finds that it computed wrongly.
        """
        x = self.hidden(runs, self.embedded(runs, x) if self.first else x, trace, commit)
        return self.logits(runs, x, checked=commit is not None) if self.last and self.plan.causal else x

    def hidden(
        self, runs: Sequence[TorchRun], x: torch.Tensor, trace: Trace | None = None, commit: CommitSink | None = None
    ) -> torch.Tensor:
        """`x` [rows, hidden] through the layers."""
        for run in runs:
            if run.cache is not None:
                run.cache.reserve(run.position + run.count)
        for index, layer in enumerate(self.layers):
            x = self._layer(index, layer, runs, x, trace, commit)
        amax(x)
        return x

    def logits(self, runs: Sequence[TorchRun], x: torch.Tensor, *, checked: bool = False) -> torch.Tensor:
        """float32 [n, vocab] of the rows of `x` whose logits the runs ask for."""
        wanted, end = [], 0
        for run in runs:
            end += run.count
            wanted += list(range(end - {"none": 0, "last": 1, "all": run.count}[run.logits], end))
        assert self.head is not None
        if not wanted:
            return x.new_empty((0, self.plan.vocab))
        logits = self.head(rms_norm(x[wanted], self.extras["norm.weight"], self.plan.eps), checked=checked)
        return self.functions.cap(logits, self.plan.logit_cap) if self.plan.logit_cap else logits

    def embedded(self, runs: Sequence[TorchRun], ids: torch.Tensor) -> torch.Tensor:
        """Token ids [rows] to the hidden states before the first layer."""
        assert self.embed is not None
        weight, scale = self.embed
        positions = torch.cat([torch.arange(run.position, run.position + run.count) for run in runs])
        places = None if self.plan.causal else self.extras["position.weight"][positions]
        return embed(self.plan, weight[ids], scale[ids], self.extras, places)

    def _norm(self, layer: _Layer, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.norms[name]
        return rms_norm(x, weight, self.plan.eps) if bias is None else layer_norm(x, weight, bias, self.plan.eps)

    def _layer(
        self, index: int, layer: _Layer, runs: Sequence[TorchRun], x: torch.Tensor, trace: Trace | None, commit: CommitSink | None
    ) -> torch.Tensor:
        def op(name: str, y: torch.Tensor) -> torch.Tensor:
            traced = None if trace is None else lambda sums: trace(index, name, sums)
            return layer.linear[name](y, traced, checked=commit is not None)

        def committed(name: str, *parts: torch.Tensor) -> None:
            if commit:
                commit.value(index, name, parts[0] if len(parts) == 1 else torch.cat(parts, -1))

        plan = self.plan
        y = op(QKV, self._norm(layer, "attention_norm", x) if plan.causal else x)
        committed(QKV, y)
        attended = self._attention(index, layer, runs, y, commit)
        if trace:
            trace(index, ATTENTION, attended)
        committed(ATTENTION, attended)
        y = op(ATTENTION_OUT, attended)
        if not plan.causal:
            x = self._norm(layer, "attention_norm", x + y)
            committed(ATTENTION_OUT, y, x)
            h = self.functions.activation(plan.activation, op(GATE_UP, x))
            committed(GATE_UP, h)
            y = op(DOWN, h)
            x = self._norm(layer, "mlp_norm", x + y)
            committed(DOWN, y, x)
            return x
        if plan.post_norms:
            x = x + self._norm(layer, "post_attention_norm", y)
            committed(ATTENTION_OUT, y, x)
        else:
            x = x + y
            committed(ATTENTION_OUT, x)
        gate, up = torch.split(op(GATE_UP, self._norm(layer, "mlp_norm", x)), plan.ffn, -1)
        h = self.functions.activation(plan.activation, gate) * up
        committed(GATE_UP, h)
        y = op(DOWN, h)
        if plan.post_norms:
            x = x + self._norm(layer, "post_mlp_norm", y)
            committed(DOWN, y, x)
        else:
            x = x + y
            committed(DOWN, x)
        return x

    def _rotated(self, x: torch.Tensor, rope: int, positions: torch.Tensor) -> torch.Tensor:
        """`x`: [rows, heads, head_dim]."""
        coarse, fine = self.ropes[rope]
        (ca, sa), (cb, sb) = coarse[positions // ROPE_FINE].unbind(-1), fine[positions % ROPE_FINE].unbind(-1)
        c, s = (ca * cb - sa * sb).float()[:, None], (sa * cb + ca * sb).float()[:, None]
        half = self.plan.rotated // 2
        one, two, rest = torch.split(x, [half, half, self.plan.head_dim - 2 * half], -1)
        return torch.cat((one * c - two * s, two * c + one * s, rest), -1)

    def _attention(
        self, index: int, layer: _Layer, runs: Sequence[TorchRun], y: torch.Tensor, commit: CommitSink | None
    ) -> torch.Tensor:
        plan = self.plan
        q, k, v = torch.split(y, [plan.q_size, plan.kv_size, plan.kv_size], -1)
        q, k, v = (part.reshape(len(y), -1, plan.head_dim) for part in (q, k, v))
        if plan.qk_norm:
            q, k = self._norm(layer, "q_norm", q), self._norm(layer, "k_norm", k)
        if plan.ropes:
            positions = torch.cat([torch.arange(run.position, run.position + run.count) for run in runs])
            q, k = (self._rotated(part, layer.plan.rope, positions) for part in (q, k))
        wide = ATTENTION in layer.plan.wide
        quantise = quantise16 if wide else quantise8
        (qi, qs), (ki, ks), (vi, vs) = quantise(q), quantise(k), quantise8(v)
        if commit and plan.causal:
            keys = ki.to(torch.int16 if wide else torch.int8)
            commit.records(index, kv_records(keys, vi, ks[..., 0], vs[..., 0]))
        out, at = [], 0
        for run in runs:
            rows = slice(at, at + run.count)
            at += run.count
            stored = self._seen(index, run, (ki[rows], ks[rows, :, 0], vi[rows], vs[rows, :, 0]))
            first = 0
            if layer.plan.window and run.count == 1:
                first = max(0, run.position + 1 - layer.plan.window)
            out.append(self._attend(layer.plan, run, first, (qi[rows], qs[rows]), [seen[:, first:] for seen in stored]))
        return torch.cat(out)

    def _seen(self, index: int, run: TorchRun, new: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Keys, their scales, values and theirs of all positions so far, [kv heads, positions, ...], the new ones put in."""
        new = tuple(part.transpose(0, 1) for part in new)
        if run.cache is None:
            return list(new)
        seen = []
        stored = (run.cache.keys, run.cache.key_scales, run.cache.values, run.cache.value_scales)
        end = run.position + run.count
        for parts, part in zip(stored, new, strict=True):
            parts[index][:, run.position : end] = part.to(parts[index].dtype)
            seen.append(parts[index][:, :end])
        return seen

    def _attend(
        self,
        layer: LayerPlan,
        run: TorchRun,
        first: int,
        queries: tuple[torch.Tensor, torch.Tensor],
        stored: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """One run's queries [rows, heads, size] over positions from `first` on; [rows, heads * size]."""
        (q, q_scale), (keys, key_scales, values, value_scales) = queries, stored
        plan, rows, seen = self.plan, len(q), keys.shape[1]
        groups, size = plan.kv_heads, plan.head_dim
        each = plan.heads // groups

        def grouped(part: torch.Tensor) -> torch.Tensor:
            return part.view(rows, groups, each, -1).permute(1, 2, 0, 3).reshape(groups, each * rows, -1)

        # 127 * 127 * 256 < 2^24: exact in float32. Of 16 bits it takes float64.
        number = torch.float64 if ATTENTION in layer.wide else torch.float32
        sums = (grouped(q).to(number) @ keys.to(number).transpose(1, 2)).float()
        scores = (sums * (grouped(q_scale) * plan.attention_scale)) * key_scales[:, None]
        if plan.attention_cap:
            scores = self.functions.cap(scores, plan.attention_cap)
        hidden = self._hidden(layer, run, first, seen)
        if hidden is not None:
            hidden = hidden.repeat(each, 1)  # rows of one head follow one another
            scores = scores.masked_fill(hidden, -math.inf)
        e = self.functions.exp_neg(scores.amax(-1, keepdim=True) - scores)
        if hidden is not None:
            e = e.masked_fill(hidden, 0.0)
        total = (e * _UNIT).round().sum(-1, keepdim=True)
        b = e * value_scales.double()[:, None]
        largest = b.amax(-1, keepdim=True)
        p = (b * quotient(_P_MAX, largest)).round()
        out = (p @ values.double()).float() * ((largest * _UNIT) / (total * _P_MAX)).float()
        return out.view(groups, each, rows, size).permute(2, 0, 1, 3).reshape(rows, groups * each * size)

    def _hidden(self, layer: LayerPlan, run: TorchRun, first: int, seen: int) -> torch.Tensor | None:
        """Which positions [rows, seen] each row must not see; None where it sees all."""
        if not self.plan.causal or run.count == 1:
            return None
        row, position = torch.arange(run.position, run.position + run.count)[:, None], torch.arange(first, first + seen)
        hidden = position > row
        return hidden | (position <= row - layer.window) if layer.window else hidden


def embed(plan: ExactPlan, rows: torch.Tensor, scale: torch.Tensor, extras: Tensors, places: torch.Tensor | None) -> torch.Tensor:
    """Rows of the embedding, int8 [n, hidden], with their scales [n], to hidden states. `places`: of an encoder, the rows
    [n, hidden] of its embedding of positions; `extras`: its other tensors."""
    x = rows.float() * scale[:, None]
    if plan.embed_scale:
        x = x * plan.embed_scale
    if places is None:
        return x
    return layer_norm((x + extras["type.weight"]) + places, extras["embed_norm.weight"], extras["embed_norm.bias"], plan.eps)


def build(
    plan: ExactPlan,
    start: int,
    end: int,
    pieces: Mapping[str, Tensors],
    tables: Mapping[str, NDArray[np.float64]],
    kernel: Kernel,
    checks: bool = True,
) -> TorchModel:
    """`pieces`: tensors by piece name as docs/exact.md lists them; "layer.N" counted in the whole model. `checks`: whether steps
    will commit, for which every product is checked."""
    first, last = start == 0, end == len(plan.layers)
    embedding, head_piece = pieces.get("embedding", {}), pieces.get("head", {})
    weight_bytes = 0

    def linear(tensors: Tensors, name: str, wide: bool) -> _Linear:
        nonlocal weight_bytes
        product = kernel(tensors[f"{name}.weight"], wide)
        check = SumsCheck(tensors[f"{name}.weight"]) if checks else None
        weight_bytes += product.nbytes + tensors[f"{name}.scale"].nbytes + (check.nbytes if check else 0)
        return _Linear(product, tensors[f"{name}.scale"], tensors.get(f"{name}.bias"), wide, check)

    layers = []
    for index in range(start, end):
        tensors = pieces[f"layer.{index}"]
        layer = plan.layers[index]
        norms = {
            name.removesuffix(".weight"): (value, tensors.get(name.replace(".weight", ".bias")))
            for name, value in tensors.items()
            if name.endswith("norm.weight")
        }
        layers.append(_Layer(layer, {name: linear(tensors, name, name in layer.wide) for name in LINEARS}, norms))
    head = None
    if last and plan.causal:
        head = linear(embedding, "embed", plan.wide_head) if plan.tied else linear(head_piece, HEAD_OP, plan.wide_head)
    embed = (embedding["embed.weight"], embedding["embed.scale"]) if first else None
    weight_bytes += embedding["embed.weight"].nbytes if first else 0
    ropes = [
        (torch.from_numpy(tables[f"rope.{n}.coarse"].copy()), torch.from_numpy(tables[f"rope.{n}.fine"].copy()))
        for n in range(len(plan.ropes))
    ]
    extras = {name: value for name, value in (*embedding.items(), *head_piece.items()) if value.dtype == torch.float32}
    name = f"torch ({kernel.name})"
    return TorchModel(plan, first, last, Functions(tables), layers, ropes, embed, extras, head, weight_bytes, name)
