"""The operations by their definitions in docs/exact.md: integers by Python's own, shapes and values from strangers refused."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, OutOfBoundsError
from nexus.engine.exact.pieces import TABLE_SHA256
from nexus.proof.arithmetic import ops, reference
from nexus.proof.arithmetic.ops import Tables
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan
from tests.proof.arithmetic.made import encoder_plan, make_plan

PLAN = make_plan()
WIDE = LayerPlan(wide=frozenset({"attention"}))
seeds = st.integers(0, 1 << 30)


def floats(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def weights(seed: int, *shape: int) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-127, 128, shape, np.int8)


@settings(max_examples=50)
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 300), st.booleans(), st.floats(-39, 38))
def test_a_linear_part_is_its_definition(seed: int, n: int, rows: int, depth: int, wide: bool, magnitude: float) -> None:
    x, weight = floats(seed, n, depth, scale=2.0**magnitude), weights(seed, rows, depth)
    scale, bias = np.exp(floats(seed + 1, rows)), floats(seed + 2, rows)
    left, sums, s = ops.linear_sums(x, weight, wide=wide)
    most = np.float32(32512 if wide else 127)
    for row in range(n):
        a = max(np.abs(x[row]).max(), np.float32(2.0**-40))
        q = [int(np.rint(value * (most / a))) for value in x[row]]
        assert s[row] == a / most
        if wide:
            high, low = left[row].tolist(), left[n + row].tolist()
            assert [256 * hi + lo for hi, lo in zip(high, low, strict=True)] == q
        else:
            assert left[row].tolist() == q
    exact = [[sum(a * b for a, b in zip(q, w, strict=True)) for w in weight.tolist()] for q in left.tolist()]
    assert sums.tolist() == exact
    y = ops.linear(x, weight, scale, bias, wide)
    assert y.tobytes() == ops.from_sums(sums, s, scale, bias, wide=wide).tobytes()
    some = slice(rows // 2, rows)
    assert ops.linear(x, weight[some], scale[some], bias[some], wide).tobytes() == y[:, some].tobytes()


@pytest.mark.parametrize("wide", [False, True])
def test_the_largest_sums_are_exact(wide: bool) -> None:
    depth = 132_000
    x = np.full((1, depth), 1.0, np.float32)
    x[0, 0] = -1.0
    weight = np.full((2, depth), 127, np.int8)
    weight[1] = -127
    _, sums, _ = ops.linear_sums(x, weight, wide=wide)
    total = (depth - 2) * 127 * (32512 if wide else 127)
    found = sums[0] * 256 + sums[1] if wide else sums[0]
    assert found.tolist() == [total, -total]


@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=30))
def test_fixed_point_is_exact(values: list[float]) -> None:
    x = np.array([values], np.float32)
    v, c = ops.fixed_point(x)
    assert math.log2(float(c[0, 0])).is_integer()
    assert (np.abs(v) <= 2**19).all()
    if np.abs(x).max() >= 2.0**-40:
        assert np.abs(v).max() >= 2**18
    assert v.tolist() == [[float(round(float(np.float32(value) * np.float32(c[0, 0])))) for value in values]]


def test_functions_are_close_to_what_they_are_called() -> None:
    x = np.linspace(-12, 12, 4801).astype(np.float32)
    tables = Tables()
    for name, right in (
        ("silu", x / (1 + np.exp(-x.astype(np.float64)))),
        ("gelu_tanh", 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))),
        ("gelu", np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])),
    ):
        got = ops.activation(encoder_plan(activation=name), None, x[None], tables)[0]
        assert np.abs(got - right).max() < 2e-4, name
    assert np.abs(ops.capped(x, 5.0, tables) - 5 * np.tanh(x / 5)).max() < 1e-3
    assert np.abs(ops.exp_neg(np.abs(x), tables) - np.exp(-np.abs(x.astype(np.float64)))).max() < 2e-5


def test_the_tables_are_the_ones_that_nodes_ask_for() -> None:
    tables = Tables()
    found = {"exp_hi": tables.exp_hi, "exp_lo": tables.exp_lo, "phi": tables.phi}
    assert {name: sha256(table.astype("<f8").tobytes()).hexdigest() for name, table in found.items()} == TABLE_SHA256


# --- keys and values ------------------------------------------------------------------------------------------------------------


@given(seeds, st.booleans(), st.integers(1, 5))
def test_records_come_back(seed: int, wide: bool, n: int) -> None:
    layer = WIDE if wide else LayerPlan()
    angles = np.broadcast_to(np.array([1.0, 0.0]), (n, 4, 2))
    heads = ops.qkv_heads(PLAN, layer, floats(seed, n, PLAN.qkv_size), None, None, (angles, angles))
    for head in range(PLAN.kv_heads):
        records = [ops.kv_record(heads, row, head, wide) for row in range(n)]
        assert {len(record) for record in records} == {ops.record_bytes(PLAN, wide)}
        k, sk, v, sv = ops.parse_records(b"".join(records), PLAN, wide)
        for got, put in ((k, heads.k), (sk, heads.sk), (v, heads.v), (sv, heads.sv)):
            np.testing.assert_array_equal(got, put[:, head])


def record(keys: NDArray[Any], values: NDArray[Any], key_scale: float, value_scale: float) -> bytes:
    return keys.tobytes() + values.tobytes() + np.array([key_scale, value_scale], "<f4").tobytes()


@pytest.mark.parametrize("scale", [0.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 1e-20, 2.0**41])
def test_scales_that_no_computation_stores_are_refused(scale: float) -> None:
    zeros = np.zeros(8, np.int8)
    ops.parse_records(record(zeros, zeros, 1.0, 1.0), PLAN, False)
    for raw in (record(zeros, zeros, scale, 1.0), record(zeros, zeros, 1.0, scale)):
        with pytest.raises(MalformedError):
            ops.parse_records(raw, PLAN, False)


def test_integers_that_no_computation_stores_are_refused() -> None:
    low, zeros = np.full(8, -128, np.int8), np.zeros(8, np.int8)
    for raw in (record(low, zeros, 1.0, 1.0), record(zeros, low, 1.0, 1.0)):
        with pytest.raises(MalformedError):
            ops.parse_records(raw, PLAN, False)
    ops.parse_records(record(np.full(8, -32512, "<i2"), zeros, 1.0, 1.0), PLAN, True)
    for most in (-32513, 32513, -32768):
        with pytest.raises(MalformedError):
            ops.parse_records(record(np.full(8, most, "<i2"), zeros, 1.0, 1.0), PLAN, True)
    with pytest.raises(MalformedError, match="whole number"):
        ops.parse_records(bytes(25), PLAN, False)


@settings(max_examples=40)
@given(seeds, st.integers(1, 40), st.integers(0, 12), st.booleans(), st.sampled_from([0.0, 2.5]))
def test_attention_is_close_to_softmax(seed: int, seen: int, window: int, wide: bool, cap: float) -> None:
    plan, layer = make_plan(attention_cap=cap), LayerPlan(window=window, wide=WIDE.wide if wide else frozenset())
    q, k, v = floats(seed, 8), floats(seed + 1, seen, 8), floats(seed + 2, seen, 8)
    (qi, sq), (ki, sk) = (ops.quantised(part, wide=wide) for part in (q, k))
    vi, sv = ops.quantised(v, wide=False)
    got = ops.attend_head(plan, layer, qi, sq[()], ki, sk, vi, sv)
    first = max(0, seen - window) if window else 0
    scores = (k[first:] @ q) * plan.attention_scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    share = np.exp(scores - scores.max())
    assert np.abs(got - (share / share.sum()) @ v[first:]).max() < 0.1


# --- what comes from strangers --------------------------------------------------------------------------------------------------


def wrong_calls() -> dict[str, Any]:
    x, w, s = floats(0, 2, 24), weights(0, 5, 24), floats(1, 5)
    y, angles = floats(2, 2, PLAN.qkv_size), np.zeros((2, 4, 2))
    q, k, vector = np.zeros(8, np.int32), np.zeros((3, 8), np.int32), np.ones(3, np.float32)
    one = np.float32(1)
    encoder = encoder_plan()
    return {
        "x of another depth": lambda: ops.linear(x[:, 1:], w, s, None, False),
        "x of one dimension": lambda: ops.linear(x[0], w, s, None, False),
        "x of float64": lambda: ops.linear(x.astype(np.float64), w, s, None, False),  # type: ignore[arg-type]
        "no rows": lambda: ops.linear(x[:0], w, s, None, False),
        "no weights": lambda: ops.linear(x, w[:0], s[:0], None, False),
        "weights of int16": lambda: ops.linear(x, w.astype(np.int16), s, None, False),  # type: ignore[arg-type]
        "scales of another count": lambda: ops.linear(x, w, s[1:], None, False),
        "biases of another count": lambda: ops.linear(x, w, s, s[1:], False),
        "sums of another count": lambda: ops.from_sums(np.zeros((2, 5), np.int64), np.ones(2, np.float32), s, None, wide=True),
        "a norm of another width": lambda: ops.norm(PLAN, x, x[0, 1:]),
        "a norm's bias of another width": lambda: ops.norm(PLAN, x, x[0], x[0, 1:]),
        "y of another shape": lambda: ops.after_linear(PLAN, x, x[:1], None),
        "a norm that the model lacks": lambda: ops.after_linear(PLAN, x, x, (x[0], None)),
        "no norm where the model has one": lambda: ops.after_linear(encoder, x, x, None),
        "no gate": lambda: ops.activation(PLAN, None, x),
        "a gate too many": lambda: ops.activation(encoder, x, x),
        "gate and up of two shapes": lambda: ops.activation(PLAN, x, x[:1]),
        "qkv of another width": lambda: ops.qkv_heads(PLAN, LayerPlan(), y[:, 1:], None, None, (angles, angles)),
        "no angles": lambda: ops.qkv_heads(PLAN, LayerPlan(), y, None, None, None),
        "angles of other rows": lambda: ops.qkv_heads(PLAN, LayerPlan(), y, None, None, (angles, angles[:1])),
        "norms that the model lacks": lambda: ops.qkv_heads(PLAN, LayerPlan(), y, s, s, (angles, angles)),
        "no keys": lambda: ops.attend_head(PLAN, LayerPlan(), q, one, k[:0], vector[:0], k[:0], vector[:0]),
        "values of other positions": lambda: ops.attend_head(PLAN, LayerPlan(), q, one, k, vector, k[1:], vector),
        "scales of other positions": lambda: ops.attend_head(PLAN, LayerPlan(), q, one, k, vector[1:], k, vector),
        "a query of another size": lambda: ops.attend_head(PLAN, LayerPlan(), q[1:], one, k, vector, k, vector),
        "more than the context": lambda: ops.attend_head(replace(PLAN, context=2), LayerPlan(), q, one, k, vector, k, vector),
        "an embedding of another width": lambda: ops.embed(PLAN, w[:, 1:], s),
        "an encoder without positions": lambda: ops.embed(encoder, w, s),
        "states of another width": lambda: ops.pooled(encoder, x[:, 1:]),
        "no states": lambda: ops.pooled(encoder, x[:0]),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_what_does_not_fit_together_is_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        wrong_calls()[name]()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**40 * 1.000001])
def test_nothing_is_computed_from_values_out_of_bounds(value: float) -> None:
    x = floats(0, 2, 24)
    x[1, 7] = value
    ones = np.ones(24, np.float32)
    encoder = encoder_plan(normalized=True)
    for call in (
        lambda: ops.linear(x, weights(0, 3, 24), ones[:3], None, False),
        lambda: ops.linear(x, weights(0, 3, 24), ones[:3], None, True),
        lambda: ops.norm(PLAN, x, ones),
        lambda: ops.norm(encoder, x, ones, ones),
        lambda: ops.pooled(encoder, x),
        lambda: ops.quantised(x, wide=False),
    ):
        with pytest.raises(OutOfBoundsError):
            call()
    if not math.isfinite(value):
        with pytest.raises(OutOfBoundsError):
            ops.activation(PLAN, x, x)


def test_nothing_in_it_may_differ_between_machines() -> None:
    """No float sums but of integers, no math functions but those that IEEE 754 rounds correctly."""
    allowed = {
        *("abs", "maximum", "minimum", "rint", "where", "copysign", "clip", "isfinite", "frexp", "ldexp", "sqrt", "float32"),
        *("float64", "int8", "int32", "int64", "uint8", "integer", "generic", "dtype", "errstate", "empty", "array", "arange"),
        *("concatenate", "split", "moveaxis", "frombuffer", "ascontiguousarray"),
    }
    for module in (ops, reference):
        used = {
            node.attr
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np"
        }
        assert used <= allowed, module.__name__


def test_an_encoders_vector() -> None:
    plan: ExactPlan = encoder_plan(pooling="cls")
    hidden = floats(4, 5, 24)
    assert ops.pooled(plan, hidden).tobytes() == hidden[0].tobytes()
    mean = ops.pooled(replace(plan, pooling="mean"), hidden)
    assert np.abs(mean - hidden.mean(0)).max() < 1e-4
    unit = ops.pooled(replace(plan, pooling="mean", normalized=True), hidden)
    assert abs(float((unit.astype(np.float64) ** 2).sum()) - 1) < 1e-4
