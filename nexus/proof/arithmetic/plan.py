"""What the exact profile computes for a model: its shape and options, as docs/exact.md names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import EMBEDDING, HEAD, LAYERS_MAX
from nexus.proof import trace
from nexus.proof.arithmetic.bounds import FLOAT_FIX, VOCAB_MAX, check_bounds
from nexus.proof.trace import TraceShape

# Of exact.json.
SPEC = 2
# The deepest model takes half of it.
PLAN_BYTES_MAX = 1 << 17
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
# How an encoder makes one vector of a text: the mean of all tokens, or the first.
MEAN, CLS = "mean", "cls"
HEAD_DIM_MAX = 256
# A text goes through an encoder as one batch of so many rows; the longest known read 8,192 tokens.
ENCODER_CONTEXT_MAX = 8192
EPS_MIN = 2.0**-60
FACTOR_MAX = 2.0**20
ROPES_MAX = 2
# Bases of rotary embeddings go up to some hundred millions, their factors to some dozen.
ROPE_NUMBER_MAX = 2.0**40
# What a kind of rotary embedding needs, beside `rope_theta`, and what else there is that decides angles.
ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
_YARN_OPTIONS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
ROPE_NUMBERS = frozenset({"rope_theta", *_YARN_OPTIONS, *(name for names in ROPE_NEEDS.values() for name in names)})
ROPE_TYPE, ROPE_TRUNCATE = "rope_type", "truncate"
# Operations; of one whose result is committed to, that has the same name.
LINEARS = (trace.QKV, trace.ATTENTION_OUT, trace.GATE_UP, trace.DOWN)
ATTENTION, HEAD_OP = trace.ATTENTION, "head"
WIDE_OPS = (*LINEARS, ATTENTION, HEAD_OP)

Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Rope:
    """One kind of rotary embedding. `parameters`: those of transformers' `rope_parameters` that decide angles, by name."""

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
    """Shape and options of a model. Scales are float32 values; 0 stands for "none" in caps and `embed_scale`. `pooling`: of an
    encoder, `MEAN` or `CLS`, and whether the vector is `normalized`."""

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
    pooling: str = ""
    normalized: bool = False
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
        *(("scale of embeddings", scale, 1 / FACTOR_MAX, FACTOR_MAX) for scale in (plan.embed_scale,) if scale != 0),
    ):
        if not least <= value <= most:
            raise ModelFormatError(f"the exact profile does not cover a {name} of {value}", FLOAT_FIX)
    if any(float(np.float32(value)) != value for value in _float32_values(plan)):
        raise ModelFormatError("a scale or cap of the model is no float32 value", FLOAT_FIX)
    if plan.heads % plan.kv_heads:
        raise ModelFormatError(f"{plan.heads} heads do not share {plan.kv_heads} key-value heads evenly", "Check config.json")
    if plan.rotated % 2 or not (2 if plan.causal else 0) <= plan.rotated <= plan.head_dim or plan.head_dim > HEAD_DIM_MAX:
        raise ModelFormatError(f"the exact profile does not cover heads of {plan.head_dim}, {plan.rotated} rotated", FLOAT_FIX)
    if plan.causal and plan.vocab > VOCAB_MAX:
        raise ModelFormatError(f"the exact profile does not cover a vocabulary of {plan.vocab} tokens", FLOAT_FIX)
    if not plan.causal and plan.context > ENCODER_CONTEXT_MAX:
        raise ModelFormatError(f"the exact profile does not cover encoders of {plan.context} tokens", FLOAT_FIX)
    if plan.activation not in ACTIVATIONS:
        raise ModelFormatError(f"the exact profile does not cover the activation {plan.activation!r}", FLOAT_FIX)
    _check_kind(plan)
    _check_layers(plan)


def _float32_values(plan: ExactPlan) -> tuple[float, ...]:
    return plan.attention_scale, plan.attention_cap, plan.logit_cap, plan.embed_scale


def _check_kind(plan: ExactPlan) -> None:
    """A decoder has gates, rotary embeddings and no pooling; an encoder pools, and has nothing that only decoders have."""
    sound = (
        plan.gated and plan.ropes and not plan.pooling and not plan.normalized
        if plan.causal
        else plan.pooling in (MEAN, CLS)
        and not (plan.gated or plan.ropes or plan.rotated or plan.qk_norm or plan.post_norms or plan.wide_head)
        and not (plan.logit_cap or plan.embed_scale)
    )
    if not sound:
        raise ModelFormatError("the exact profile does not cover a model with these parts", FLOAT_FIX)


def _check_layers(plan: ExactPlan) -> None:
    if not 0 < len(plan.layers) <= LAYERS_MAX:
        raise ModelFormatError(f"a model of {len(plan.layers)} layers", f"A model has 1 to {LAYERS_MAX}")
    if len(plan.ropes) > ROPES_MAX:
        raise ModelFormatError(f"the exact profile does not cover {len(plan.ropes)} kinds of rotary embedding", FLOAT_FIX)
    for rope in plan.ropes:
        _check_rope(rope)
    for layer in plan.layers:
        if not 0 <= layer.window < (plan.context if plan.causal else 1) or not 0 <= layer.rope < max(1, len(plan.ropes)):
            raise ModelFormatError("a layer's window or rotary embedding is none of the model's", "Add the model again")
        if not layer.wide <= {*LINEARS, ATTENTION}:
            raise ModelFormatError("a layer's wide operations are none that a layer has", "Add the model again")


def _check_rope(rope: Rope) -> None:
    kind = rope.get(ROPE_TYPE, "default")
    if kind not in ROPE_NEEDS:
        raise ModelFormatError(f"the exact profile does not cover rotary embeddings of type {kind!r}", FLOAT_FIX)
    names = [name for name, _ in rope.parameters]
    if names != sorted(set(names)) or not {"rope_theta", *ROPE_NEEDS[kind]}.issubset(names):
        raise ModelFormatError(f"rotary embeddings of type {kind!r} lack what makes their angles", "Check config.json")
    for name, value in rope.parameters:
        if name == ROPE_TYPE or (name == ROPE_TRUNCATE and type(value) is bool):
            continue
        if name not in ROPE_NUMBERS or type(value) not in (int, float) or not (name == "rope_theta") < value <= ROPE_NUMBER_MAX:
            raise ModelFormatError(
                f"rotary embeddings have {name} = {value!r}, which is no number that makes angles", "Check config.json"
            )


_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
# Of the plan's fields those of one value, with their types; the others are `layers` and `ropes`.
_PLAIN = {field.name: _SCALARS[str(field.type)] for field in fields(ExactPlan) if field.type in _SCALARS}
_COUNT_MAX = 1 << 32


def plan_to_json(plan: ExactPlan) -> bytes:
    """exact.json: the one byte form of a plan."""
    layers = [{"rope": layer.rope, "wide": sorted(layer.wide), "window": layer.window} for layer in plan.layers]
    value = {name: getattr(plan, name) for name in _PLAIN} | {"spec": SPEC, "layers": layers}
    value["ropes"] = [dict(rope.parameters) for rope in plan.ropes]
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plan_from_json(raw: bytes) -> ExactPlan:
    """The plan that exact.json holds, checked by `check_plan` and `check_bounds`. Raises ModelFormatError for all else than the one
    byte form of a plan."""
    if len(raw) > PLAN_BYTES_MAX:
        raise _no_plan(f"it has {len(raw)} bytes")
    try:
        value = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError):
        raise _no_plan("it is no JSON") from None
    plan = _plan_of_value(value)
    check_plan(plan)
    check_bounds(plan)
    if plan_to_json(plan) != raw:
        raise _no_plan("it is not in the one form that a plan has")
    return plan


def _plan_of_value(value: object) -> ExactPlan:
    entries = _object(value, {"spec", "layers", "ropes", *_PLAIN})
    if entries["spec"] != SPEC or type(entries["spec"]) is not int:
        raise _no_plan(f"it is of version {entries['spec']!r}")
    plain: dict[str, Any] = {name: _plain(name, entries[name]) for name in _PLAIN}
    layers = tuple(_layer(entry) for entry in _list(entries["layers"], LAYERS_MAX))
    return ExactPlan(**plain, layers=layers, ropes=tuple(_rope(entry) for entry in _list(entries["ropes"], ROPES_MAX)))


def _layer(value: object) -> LayerPlan:
    entries = _object(value, {"rope", "wide", "window"})
    wide = _list(entries["wide"], len(LINEARS) + 1)
    if not all(type(op) is str for op in wide):
        raise _no_plan("an operation has no name")
    return LayerPlan(_count("window", entries["window"]), _count("rope", entries["rope"]), frozenset(map(str, wide)))


def _rope(value: object) -> Rope:
    known = {ROPE_TYPE, ROPE_TRUNCATE, *ROPE_NUMBERS}
    if not isinstance(value, dict) or not value.keys() <= known or not all(type(v) in _SCALARS.values() for v in value.values()):
        raise _no_plan("a rotary embedding is none")
    return Rope(tuple(sorted(value.items())))


def _object(value: object, names: set[str]) -> dict[str, object]:
    if not isinstance(value, dict) or value.keys() != names:
        raise _no_plan("its entries are not those of a plan")
    return value


def _list(value: object, most: int) -> list[object]:
    if not isinstance(value, list) or len(value) > most:
        raise _no_plan(f"a list of it is none of at most {most}")
    return value


def _plain(name: str, value: object) -> Any:
    kind = _PLAIN[name]
    if kind is int:
        return _count(name, value)
    if type(value) is not kind:
        raise _no_plan(f"{name} is no {kind.__name__}")
    return value


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < _COUNT_MAX:
        raise _no_plan(f"{name} is no count")
    return value


def _no_plan(why: str) -> ModelFormatError:
    return ModelFormatError(
        f"exact.json is not a plan that this version of Nexus knows: {why}", "Update Nexus, or add the model again"
    )
