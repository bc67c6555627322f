"""The plan of a model from its config.json, which transformers reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL
from nexus.proof.arithmetic.bounds import FLOAT_FIX
from nexus.proof.arithmetic.plan import ROPE_NUMBERS, ROPE_TRUNCATE, ROPE_TYPE, ExactPlan, LayerPlan, Rope, check_plan

if TYPE_CHECKING:
    from nexus.engine.architecture import Config
    from nexus.engine.pooling import Pooling

# transformers' model_type: the architectures whose every option was tested against float.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "bert")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}


def plan_of(config: Config, pooling: Pooling) -> ExactPlan:
    """The plan of a model, all operations 8 bits wide. `pooling`: of an encoder, no matter what for others. Raises
    ModelFormatError for what the exact profile does not cover."""
    try:
        with np.errstate(over="ignore"):  # infinities are refused
            return _plan_of(config, pooling)
    except ModelFormatError:
        raise
    # The config is the model author's, and transformers checks few of its values: whatever they break here is a bad model.
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"config.json does not describe a model of the exact profile: {error}", "Check config.json"
        ) from error


def _plan_of(config: Config, pooling: Pooling) -> ExactPlan:
    settings = config.settings
    kind = str(settings.model_type)
    if kind not in SUPPORTED:
        raise ModelFormatError(f"the exact profile does not cover models of type {kind!r}", FLOAT_FIX)
    heads = int(settings.num_attention_heads)
    head_dim = int(getattr(settings, "head_dim", None) or config.hidden_size // heads)
    activation = getattr(settings, "hidden_activation", None) or settings.hidden_act
    if activation not in _ACTIVATIONS:
        raise ModelFormatError(f"the exact profile does not cover the activation {activation!r}", FLOAT_FIX)
    gemma, causal = kind.startswith("gemma"), config.kind == CAUSAL
    attention_bias = bool(getattr(settings, "attention_bias", False))
    ropes, rope_of_type = _ropes(settings) if causal else ((), {})
    types = list(getattr(settings, "layer_types", None) or ["full_attention"] * config.layers)
    plan = ExactPlan(
        causal=causal,
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
        activation=_ACTIVATIONS[activation],
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
        pooling="" if causal else pooling.mode,
        normalized=pooling.normalize and not causal,
    )
    check_plan(plan)
    _check_settings(settings)
    return plan


def _check_settings(settings: Any) -> None:
    if getattr(settings, "position_embedding_type", "absolute") != "absolute":
        raise ModelFormatError("the exact profile does not cover relative position embeddings", FLOAT_FIX)
    if getattr(settings, "use_bidirectional_attention", False):
        raise ModelFormatError("the exact profile does not cover bidirectional attention in a decoder", FLOAT_FIX)


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
    return tuple(_rope(entry) for entry in per_type.values() or [parameters]), {name: n for n, name in enumerate(per_type)}


def _rope(entry: Mapping[str, Any]) -> Rope:
    """Older configs have the type twice, as "type" too. `check_plan` looks at the values."""
    given = {name: value for name, value in entry.items() if name != "type" and value is not None}
    if unknown := sorted(given.keys() - {ROPE_TYPE, ROPE_TRUNCATE, *ROPE_NUMBERS}):
        raise ModelFormatError(f"the exact profile does not cover rotary embeddings with {unknown[0]!r}", FLOAT_FIX)
    return Rope(tuple(sorted(given.items())))
