"""What the exact profile computes for a model: its shape and options, read from config.json, as docs/exact.md names them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL

if TYPE_CHECKING:
    from nexus.engine.architecture import Config

SPEC = 1
# transformers' model_type: the architectures whose every option below was tested against float.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "bert")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
LINEARS = ("qkv", "o", "gate_up", "down")
ATTENTION, HEAD_OP = "attention", "head"
WIDE_OPS = (*LINEARS, ATTENTION, HEAD_OP)
FLOAT_FIX = "Add it with --profile float"

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


def plan_of(config: Config) -> ExactPlan:
    """The plan of a model, all operations 8 bits wide. Raises ModelFormatError for what the exact profile does not cover."""
    try:
        with np.errstate(over="ignore"):  # infinities are refused
            return _plan_of(config)
    except ModelFormatError:
        raise
    # The config is the model author's, and transformers checks few of its values: whatever they break here is a bad model.
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"config.json does not describe a model of the exact profile: {error}", "Check config.json"
        ) from error


def _plan_of(config: Config) -> ExactPlan:
    settings = config.settings
    kind = str(settings.model_type)
    if kind not in SUPPORTED:
        raise ModelFormatError(f"the exact profile does not cover models of type {kind!r}", FLOAT_FIX)
    heads = int(settings.num_attention_heads)
    head_dim = int(getattr(settings, "head_dim", None) or config.hidden_size // heads)
    activation = getattr(settings, "hidden_activation", None) or settings.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelFormatError(f"the exact profile does not cover the activation {activation!r}", FLOAT_FIX)
    gemma = kind.startswith("gemma")
    attention_bias = bool(getattr(settings, "attention_bias", False))
    ropes, rope_of_type = _ropes(settings) if config.kind == CAUSAL else ((), {})
    types = list(getattr(settings, "layer_types", None) or ["full_attention"] * config.layers)
    plan = ExactPlan(
        causal=config.kind == CAUSAL,
        layers=tuple(
            LayerPlan(window=_window(window, config.context), rope=rope_of_type.get(kind_of_layer, 0))
            for window, kind_of_layer in zip(_windows(config), types, strict=True)
        ),
        hidden=config.hidden_size,
        ffn=int(settings.intermediate_size),
        heads=heads,
        kv_heads=int(getattr(settings, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        rotated=int(head_dim * float(ropes[0].get("partial_rotary_factor") or 1.0)) if ropes else 0,
        vocab=config.vocab_size,
        context=config.context,
        eps=float(settings.layer_norm_eps if kind == "bert" else settings.rms_norm_eps),
        activation=ACTIVATIONS[activation],
        gated=kind != "bert",
        tied=config.tied,
        qkv_bias=kind in ("qwen2", "bert") or attention_bias,
        o_bias=kind == "bert" or (attention_bias and kind != "qwen2"),
        mlp_bias=kind == "bert" or bool(getattr(settings, "mlp_bias", False)),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        post_norms=kind in ("gemma2", "gemma3_text"),
        norm_offset=gemma,
        attention_scale=float(np.float32(1 / math.sqrt(getattr(settings, "query_pre_attn_scalar", None) or head_dim))),
        attention_cap=float(np.float32(getattr(settings, "attn_logit_softcapping", None) or 0)),
        logit_cap=float(np.float32(getattr(settings, "final_logit_softcapping", None) or 0)),
        embed_scale=float(np.float32(math.sqrt(config.hidden_size))) if gemma else 0.0,
        ropes=ropes,
    )
    _check(plan, settings)
    return plan


def _check(plan: ExactPlan, settings: Any) -> None:
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
    if getattr(settings, "position_embedding_type", "absolute") != "absolute":
        raise ModelFormatError("the exact profile does not cover relative position embeddings", FLOAT_FIX)
    if getattr(settings, "use_bidirectional_attention", False):
        raise ModelFormatError("the exact profile does not cover bidirectional attention in a decoder", FLOAT_FIX)


HEAD_DIM_MAX = 256
# A text goes through an encoder as one batch of so many rows; the longest known read 8,192 tokens.
ENCODER_CONTEXT_MAX = 8192
EPS_MIN = 2.0**-60
FACTOR_MAX = 2.0**20
ROPES_MAX = 2
# Bases of rotary embeddings go up to some hundred millions, their factors to some dozen.
ROPE_NUMBER_MAX = 2.0**40


def _window(window: int | None, context: int) -> int:
    """Who sees the whole context sees all."""
    if window is not None and window < 1:
        raise ModelFormatError(f"a sliding window of {window} positions sees nothing", "Check config.json")
    return 0 if window is None or window >= context else window


def _windows(config: Config) -> list[int | None]:
    from nexus.engine.kv import windows_of

    return windows_of(config.settings) if config.kind == CAUSAL else [None] * config.layers


def _ropes(settings: Any) -> tuple[tuple[Rope, ...], dict[str, int]]:
    """The kinds of rotary embedding, and which of them a type of layer has."""
    parameters = dict(getattr(settings, "rope_parameters", None) or {})
    per_type = {name: entry for name, entry in parameters.items() if isinstance(entry, dict)}
    found = []
    for entry in per_type.values() or [parameters]:
        kind = entry.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ModelFormatError(f"the exact profile does not cover rotary embeddings of type {kind!r}", FLOAT_FIX)
        found.append(Rope(tuple(sorted((name, _rope_value(name, value)) for name, value in entry.items() if value is not None))))
    if len(found) > ROPES_MAX:
        raise ModelFormatError(f"the exact profile does not cover {len(found)} kinds of rotary embedding", FLOAT_FIX)
    return tuple(found), {name: index for index, name in enumerate(per_type)}


def _rope_value(name: str, value: Any) -> Any:
    if isinstance(value, bool | str) and name in ("rope_type", "type", "truncate"):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not (name == "rope_theta") < value <= ROPE_NUMBER_MAX:
        raise ModelFormatError(
            f"rotary embeddings have {name} = {value!r}, which is no number that makes angles", "Check config.json"
        )
    return value
