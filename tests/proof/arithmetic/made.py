"""Plans and weights of models that were never trained, in every shape that the exact profile covers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan, Rope
from nexus.proof.arithmetic.tables import exp_tables, phi_table, rope_tables

OPS = ("qkv", "o", "gate_up", "down", "attention")
Arrays = dict[str, NDArray[Any]]


def make_plan(**options: Any) -> ExactPlan:
    base: dict[str, Any] = {
        "causal": True,
        "layers": (LayerPlan(), LayerPlan()),
        "hidden": 24,
        "ffn": 40,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "rotated": 8,
        "vocab": 50,
        "context": 512,
        "eps": 1e-5,
        "activation": "silu",
        "gated": True,
        "tied": True,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "post_norms": False,
        "norm_offset": False,
        "attention_scale": float(np.float32(0.35)),
        "attention_cap": 0.0,
        "logit_cap": 0.0,
        "embed_scale": 0.0,
        "ropes": (Rope((("rope_theta", 10000.0),)),),
    }
    return ExactPlan(**base | options)


def encoder_plan(**options: Any) -> ExactPlan:
    base = {"causal": False, "gated": False, "tied": False, "activation": "gelu", "ropes": (), "rotated": 0, "context": 200}
    base |= {"pooling": "mean"}
    return make_plan(**base | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True) | options)


def random_pieces(plan: ExactPlan, seed: int, extreme: bool = False) -> dict[str, Arrays]:
    """`extreme`: every weight is 127 or -127, so that sums are as large as they get."""
    random = np.random.default_rng(seed)

    def values(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if dtype == "I8" and extreme:
            return random.choice(np.array([-127, 127], np.int8), shape, p=(0.02, 0.98))
        if dtype == "I8":
            return random.integers(-127, 128, shape, np.int8)
        if name.endswith(".scale"):
            return np.exp(random.normal(-6, 0.5, shape)).astype(np.float32)
        if name.endswith("norm.weight"):
            return random.normal(1, 0.3, shape).astype(np.float32)
        return random.normal(0, 0.3, shape).astype(np.float32)

    shapes = {f"layer.{index}": plan.layer_tensors() for index in range(len(plan.layers))}
    shapes |= {"embedding": plan.embedding_tensors(), "head": plan.head_tensors()}
    return {
        piece: {name: values(name, dtype, shape) for name, (dtype, shape) in tensors.items()} for piece, tensors in shapes.items()
    }


@cache
def tables_of(ropes: tuple[Rope, ...], rotated: int, context: int) -> Mapping[str, NDArray[np.float64]]:
    exp_hi, exp_lo = exp_tables()
    tables = {"exp_hi": exp_hi, "exp_lo": exp_lo, "phi": phi_table()}
    for number, rope in enumerate(ropes):
        tables[f"rope.{number}.coarse"], tables[f"rope.{number}.fine"] = rope_tables(rope, rotated, context)
    return tables


@st.composite
def decoder_plans(draw: st.DrawFn) -> ExactPlan:
    kv_heads = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 6, 8, 16, 20, 48, 64, 80]))
    flag = st.booleans()
    layers = tuple(
        LayerPlan(
            window=draw(st.sampled_from([0, 0, 1, 5, 64, 70])),
            rope=draw(st.integers(0, 1)),
            wide=frozenset(draw(st.sets(st.sampled_from(OPS), max_size=5))),
        )
        for _ in range(draw(st.integers(1, 2)))
    )
    cap = st.sampled_from([0.0, 0.0, 30.0, float(np.float32(0.7))])
    return make_plan(
        layers=layers,
        hidden=draw(st.integers(3, 100)),
        ffn=draw(st.integers(1, 150)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 7, 9, 16])),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotated=draw(st.sampled_from([head_dim, head_dim // 4 * 2])),
        vocab=draw(st.integers(2, 90)),
        activation=draw(st.sampled_from(["silu", "gelu_tanh", "gelu"])),
        tied=draw(flag),
        qkv_bias=draw(flag),
        o_bias=draw(flag),
        mlp_bias=draw(flag),
        qk_norm=draw(flag),
        post_norms=draw(flag),
        attention_cap=draw(cap),
        logit_cap=draw(cap),
        embed_scale=draw(st.sampled_from([0.0, float(np.float32(np.sqrt(48)))])),
        ropes=(Rope((("rope_theta", 10000.0),)), Rope((("factor", 8.0), ("rope_theta", 1e6), ("rope_type", "linear")))),
        wide_head=draw(flag),
    )


@st.composite
def encoder_plans(draw: st.DrawFn) -> ExactPlan:
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), draw(st.booleans()))
    wide = frozenset(draw(st.sets(st.sampled_from(OPS))))
    return encoder_plan(
        layers=(LayerPlan(wide=wide),) * draw(st.integers(1, 3)),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "silu"])),
        pooling=draw(st.sampled_from(["mean", "cls"])),
        normalized=draw(st.booleans()),
        **biases,
    )
