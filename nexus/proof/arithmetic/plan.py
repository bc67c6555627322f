"""What the exact profile computes for a model: its shape and options, as docs/exact.md names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import EMBEDDING, HEAD
from nexus.proof import trace
from nexus.proof.arithmetic.bounds import FLOAT_FIX
from nexus.proof.trace import TraceShape

SPEC = 1
HEAD_DIM_MAX = 256
# A text goes through an encoder as one batch of so many rows; the longest known read 8,192 tokens.
ENCODER_CONTEXT_MAX = 8192
EPS_MIN = 2.0**-60
FACTOR_MAX = 2.0**20
ROPES_MAX = 2
# Bases of rotary embeddings go up to some hundred millions, their factors to some dozen.
ROPE_NUMBER_MAX = 2.0**40
# Operations; of one whose result is committed to, that has the same name.
LINEARS = (trace.QKV, trace.ATTENTION_OUT, trace.GATE_UP, trace.DOWN)
ATTENTION, HEAD_OP = trace.ATTENTION, "head"
WIDE_OPS = (*LINEARS, ATTENTION, HEAD_OP)

Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Rope:
    """One kind of rotary embedding. `parameters`: transformers' `rope_parameters` of it, numbers and names only."""

    parameters: tuple[tuple[str, Any], ...]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.parameters).get(name, default)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """`window`: positions that a query sees, itself included; 0 for all. `rope`: which of `ExactPlan.ropes`. `wide`: operations
    whose input is 16 bits wide, of `LINEARS` and "attention"."""

    window: int = 0
    rope: int = 0
    wide: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """Shape and options of a model. Scales are float32 values; 0 stands for "none" in caps and `embed_scale`."""

    causal: bool
    layers: tuple[LayerPlan, ...]
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    vocab: int
    context: int
    eps: float
    activation: str
    gated: bool
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    norm_offset: bool
    attention_scale: float
    attention_cap: float
    logit_cap: float
    embed_scale: float
    ropes: tuple[Rope, ...]
    wide_head: bool = False

    @property
    def norm_after_linear(self) -> bool:
        """Whether a norm follows "o" and "down"."""
        return self.post_norms or not self.causal

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def gate_up_size(self) -> int:
        return self.ffn * (2 if self.gated else 1)

    @property
    def kv_bytes(self) -> int:
        """KV cache per token and layer: int8 keys and values, a float32 scale each; keys of wide attention take two bytes."""
        if not self.causal:
            return 0
        wide = any(ATTENTION in layer.wide for layer in self.layers)
        return self.kv_heads * (self.head_dim * (3 if wide else 2) + 8)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and depth of a layer's linear operations."""
        return {
            "qkv": (self.qkv_size, self.hidden),
            "o": (self.hidden, self.q_size),
            "gate_up": (self.gate_up_size, self.hidden),
            "down": (self.hidden, self.ffn),
        }

    def layer_tensors(self) -> Shapes:
        """safetensors dtype and shape of every tensor in a layer's piece."""
        biased = {"qkv": self.qkv_bias, "o": self.o_bias, "gate_up": self.mlp_bias, "down": self.mlp_bias}
        shapes: Shapes = {}
        for name, (rows, depth) in self.linear_shapes().items():
            shapes |= _linear(name, rows, depth)
            if biased[name]:
                shapes[f"{name}.bias"] = ("F32", (rows,))
        norms = ["attention_norm", "mlp_norm", *(["post_attention_norm", "post_mlp_norm"] if self.post_norms else [])]
        for name in norms:
            shapes |= self._norm(name)
        if self.qk_norm:
            shapes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), ("F32", (self.head_dim,)))
        return shapes

    def piece_tensors(self, piece: str) -> Shapes:
        """Those of the piece of this name."""
        return {EMBEDDING: self.embedding_tensors, HEAD: self.head_tensors}.get(piece, self.layer_tensors)()

    def embedding_tensors(self) -> Shapes:
        shapes = _linear("embed", self.vocab, self.hidden)
        if not self.causal:
            shapes |= {"position.weight": ("F32", (self.context, self.hidden)), "type.weight": ("F32", (self.hidden,))}
            shapes |= self._norm("embed_norm")
        return shapes

    def head_tensors(self) -> Shapes:
        if not self.causal:
            return {}
        return self._norm("norm") | ({} if self.tied else _linear("head", self.vocab, self.hidden))

    def _norm(self, name: str) -> Shapes:
        shapes: Shapes = {f"{name}.weight": ("F32", (self.hidden,))}
        return shapes if self.causal else shapes | {f"{name}.bias": ("F32", (self.hidden,))}

    def widened(self, wide: Mapping[str, Sequence[int]]) -> ExactPlan:
        """This plan with `wide` of exact.json: operation -> layers ("head": [0] for a wide head)."""
        layers = tuple(
            replace(layer, wide=frozenset(op for op, indices in wide.items() if op != HEAD_OP and index in indices))
            for index, layer in enumerate(self.layers)
        )
        return replace(self, layers=layers, wide_head=bool(wide.get(HEAD_OP)))

    def wide_ops(self) -> dict[str, list[int]]:
        """What `widened` takes."""
        by_op = {op: [i for i, layer in enumerate(self.layers) if op in layer.wide] for op in (*LINEARS, ATTENTION)}
        return by_op | {HEAD_OP: [0] if self.wide_head else []}


def _linear(name: str, rows: int, depth: int) -> Shapes:
    return {f"{name}.weight": ("I8", (rows, depth)), f"{name}.scale": ("F32", (rows,))}


def value_widths(plan: ExactPlan) -> dict[str, int]:
    """Float32 values per row of everything that a stage commits to (`nexus.proof.trace`)."""
    # Where a norm follows the linear, what it takes in cannot be told from what comes out: both are committed to.
    residual = 2 * plan.hidden if plan.norm_after_linear else plan.hidden
    widths = {
        trace.QKV: plan.qkv_size,
        trace.ATTENTION: plan.q_size,
        trace.ATTENTION_OUT: residual,
        trace.GATE_UP: plan.ffn,
        trace.DOWN: residual,
    }
    return widths | {trace.LOGITS: plan.vocab} if plan.causal else widths


def trace_shape(plan: ExactPlan, start: int, end: int) -> TraceShape:
    """The form of the traces of the stage of layers [start, end)."""
    return TraceShape(end - start, plan.kv_heads if plan.causal else 0, plan.causal and end == len(plan.layers))


def check_plan(plan: ExactPlan) -> None:
    """That the shape and options are ones that docs/exact.md covers; `check_bounds` is for the sums. Raises ModelFormatError."""
    for name in ("hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "context"):
        if getattr(plan, name) < 1:
            raise ModelFormatError(f"config.json gives an impossible shape: {name} of {getattr(plan, name)}", "Check config.json")
    # Within these no step of docs/exact.md gives what is not a number, which processors need not agree on.
    for name, value, least, most in (
        ("epsilon of norms", plan.eps, EPS_MIN, 1.0),
        ("scale of attention", plan.attention_scale, 1 / FACTOR_MAX, FACTOR_MAX),
        *(("cap", cap, 1 / FACTOR_MAX, FACTOR_MAX) for cap in (plan.attention_cap, plan.logit_cap) if cap != 0),
    ):
        if not least <= value <= most:
            raise ModelFormatError(f"the exact profile does not cover a {name} of {value}", FLOAT_FIX)
    if plan.heads % plan.kv_heads:
        raise ModelFormatError(f"{plan.heads} heads do not share {plan.kv_heads} key-value heads evenly", "Check config.json")
    if plan.rotated % 2 or not (2 if plan.causal else 0) <= plan.rotated <= plan.head_dim or plan.head_dim > HEAD_DIM_MAX:
        raise ModelFormatError(f"the exact profile does not cover heads of {plan.head_dim}, {plan.rotated} rotated", FLOAT_FIX)
    if not plan.causal and plan.context > ENCODER_CONTEXT_MAX:
        raise ModelFormatError(f"the exact profile does not cover encoders of {plan.context} tokens", FLOAT_FIX)
