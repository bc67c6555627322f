"""exact.json: every plan has one byte form, and whatever is not one is a bad model, found before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import LAYERS_MAX
from nexus.proof.arithmetic.plan import (
    PLAN_BYTES_MAX,
    ExactPlan,
    LayerPlan,
    Rope,
    check_plan,
    plan_from_json,
    plan_to_json,
    trace_shape,
    value_widths,
)
from nexus.proof.trace import TraceShape
from tests.proof.arithmetic.made import OPS, decoder_plans, encoder_plan, encoder_plans, make_plan

plans = st.one_of(decoder_plans(), encoder_plans())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def written(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


@given(plans)
def test_a_plan_comes_back_from_its_bytes(plan: ExactPlan) -> None:
    raw = plan_to_json(plan)
    assert plan_from_json(raw) == plan
    assert len(raw) <= PLAN_BYTES_MAX


def test_the_deepest_model_has_room() -> None:
    number = 1.2345678901234567e11
    names = ("attention_factor", "beta_fast", "beta_slow", "factor", "original_max_position_embeddings", "rope_theta")
    rope = Rope((*((name, number) for name in names), ("rope_type", "yarn")))
    layer = LayerPlan(4_000_000, 1, frozenset(OPS))
    plan = make_plan(layers=(layer,) * LAYERS_MAX, ropes=(rope, rope), context=1 << 24)
    raw = plan_to_json(plan)
    assert len(raw) <= PLAN_BYTES_MAX
    assert plan_from_json(raw) == plan


@settings(max_examples=300)
@given(plans, st.data())
def test_with_another_value_anywhere_it_is_no_plan_or_another(plan: ExactPlan, data: st.DataObject) -> None:
    """Never an error of another kind, and never a plan that has another byte form."""
    value = json.loads(plan_to_json(plan))
    place: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    try:
        read = plan_from_json(written(value))
    except ModelFormatError:
        return
    assert plan_to_json(read) == written(value)


@given(st.binary(max_size=64) | json_values.map(written))
def test_what_is_no_plan_is_a_bad_model(raw: bytes) -> None:
    with pytest.raises(ModelFormatError):
        plan_from_json(raw)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    value = json.loads(plan_to_json(make_plan()))
    change(value)
    return written(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"spec":' + b"9" * 5_000 + b"}",
        b" " * (PLAN_BYTES_MAX + 1),
        plan_to_json(make_plan()) + b"\n",
        plan_to_json(make_plan()).replace(b'"spec":2', b'"spec":2,"spec":2'),
        plan_to_json(make_plan()).replace(b'"eps":1e-05', b'"eps":0.00001'),
        plan_to_json(make_plan()).replace(b'"eps":1e-05', b'"eps":1e-5'),
        plan_to_json(make_plan()).replace(b'"eps":1e-05', b'"eps":NaN'),
        plan_to_json(make_plan()).replace(b'"eps":1e-05', b'"eps":1e999'),
        plan_to_json(make_plan()).replace(b'"hidden"', b'"h\\u0069dden"'),
        plan_to_json(make_plan()).replace(b'"silu"', '"silü"'.encode()),
        changed(lambda value: value.update(spec=1)),
        changed(lambda value: value.update(spec=True)),
        changed(lambda value: value.update(spec=2.0)),
        changed(lambda value: value.update(more=1)),
        changed(lambda value: value.pop("ffn")),
        changed(lambda value: value.update(ffn=40.0)),
        changed(lambda value: value.update(ffn=True)),
        changed(lambda value: value.update(ffn=-40)),
        changed(lambda value: value.update(ffn=2**40)),
        changed(lambda value: value.update(tied=1)),
        changed(lambda value: value.update(eps=1)),
        changed(lambda value: value.update(activation=None)),
        changed(lambda value: value.update(layers={})),
        changed(lambda value: value.update(layers=[])),
        changed(lambda value: value.update(layers=value["layers"] * LAYERS_MAX)),
        changed(lambda value: value["layers"][0].update(wide=["qkv", "o"])),
        changed(lambda value: value["layers"][0].update(wide=["o", "o"])),
        changed(lambda value: value["layers"][0].update(wide=["head"])),
        changed(lambda value: value["layers"][0].update(wide=[["o"]])),
        changed(lambda value: value["layers"][0].update(wide="o")),
        changed(lambda value: value["layers"][0].update(wide=["o"] * 6)),
        changed(lambda value: value["layers"][0].update(rope=1)),
        changed(lambda value: value["layers"][0].update(window=512)),
        changed(lambda value: value["layers"][0].pop("window")),
        changed(lambda value: value.update(ropes=[])),
        changed(lambda value: value.update(ropes=value["ropes"] * 3)),
        changed(lambda value: value["ropes"][0].update(rope_theta="1e4")),
        changed(lambda value: value["ropes"][0].update(rope_theta=[1e4])),
        changed(lambda value: value["ropes"][0].update(rope_theta=1)),
        changed(lambda value: value["ropes"][0].update(rope_theta=True)),
        changed(lambda value: value["ropes"][0].update(rope_type="dynamic")),
        changed(lambda value: value["ropes"][0].update(rope_type="yarn")),
        changed(lambda value: value["ropes"][0].update(type="default")),
        changed(lambda value: value["ropes"][0].pop("rope_theta")),
    ],
    ids=lambda raw: raw[:30].decode("latin-1"),
)
def test_other_forms_are_refused(raw: bytes) -> None:
    with pytest.raises(ModelFormatError):
        plan_from_json(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 0},
        {"hidden": 140_000},  # sums of the norm and of the linear parts
        {"ffn": 200_000},
        {"kv_heads": 3},
        {"head_dim": 300},
        {"head_dim": 1, "rotated": 0},
        {"rotated": 7},
        {"rotated": 10},
        {"context": 1 << 25},
        {"vocab": 1 << 23},
        {"eps": 0.0},
        {"eps": 1.5},
        {"attention_scale": 0.0},
        {"attention_scale": 0.1},  # no float32
        {"attention_cap": -1.0},
        {"attention_cap": float(np.float32(1e30))},
        {"logit_cap": 1e-9},
        {"embed_scale": -2.0},
        {"embed_scale": float(np.float32(1e30))},
        {"activation": "relu"},
        {"gated": False},
        {"pooling": "mean"},
        {"normalized": True},
        {"ropes": ()},
        {"layers": (LayerPlan(window=-1),)},
        {"layers": (LayerPlan(wide=frozenset({"head"})),)},
    ],
    ids=str,
)
def test_shapes_and_options_that_the_profile_does_not_cover_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError):
        plan_from_json(plan_to_json(make_plan(**change)))


@pytest.mark.parametrize(
    "change",
    [
        {"context": 8193},
        {"pooling": ""},
        {"pooling": "max"},
        {"gated": True},
        {"ropes": make_plan().ropes},
        {"rotated": 4},
        {"qk_norm": True},
        {"post_norms": True},
        {"wide_head": True},
        {"logit_cap": 30.0},
        {"embed_scale": 2.0},
        {"layers": (LayerPlan(window=3),)},
    ],
    ids=str,
)
def test_encoders_that_the_profile_does_not_cover_are_refused(change: dict[str, Any]) -> None:
    check_plan(encoder_plan())
    with pytest.raises(ModelFormatError):
        plan_from_json(plan_to_json(encoder_plan(**change)))


def test_what_a_stage_commits_to() -> None:
    plan = make_plan()
    widths = {"qkv": 64, "attention": 32, "o": 24, "gate_up": 40, "down": 24, "logits": 50}
    assert value_widths(plan) == widths
    assert value_widths(replace(plan, post_norms=True)) == widths | {"o": 48, "down": 48}
    encoder = value_widths(encoder_plan())
    assert encoder == {name: width for name, width in (widths | {"o": 48, "down": 48}).items() if name != "logits"}
    assert trace_shape(plan, 0, 1) == TraceShape(1, 2, logits=False)
    assert trace_shape(plan, 1, 2) == TraceShape(1, 2, logits=True)
    assert trace_shape(encoder_plan(), 0, 2) == TraceShape(2, 0, logits=False)
