"""Bounds of integer sums: what they say is what the worst operands give, and no shape that could overflow is converted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import ModelFormatError
from nexus.engine.architecture import read_config
from nexus.engine.exact.plan import plan_of
from nexus.engine.pooling import Pooling
from nexus.models import builtin_path
from nexus.proof.arithmetic.bounds import CONTEXT_MAX, FLOAT64_LIMIT, INT32_LIMIT, bounds_of, check_bounds
from nexus.proof.arithmetic.plan import ExactPlan


@cache
def plan(name: str = "nano") -> ExactPlan:
    return plan_of(read_config(builtin_path(name) / "config.json"), Pooling())


def extreme(depth: int, *pairs: tuple[range, range]) -> int:
    """The largest magnitude of a sum of `depth` products of values of these ranges, by trying the corners."""
    return depth * max(abs(a * b) for one, other in pairs for a in (one[0], one[-1]) for b in (other[0], other[-1]))


BYTES, WEIGHTS = range(-128, 128), range(-127, 128)
shapes = st.fixed_dictionaries(
    {
        "hidden": st.integers(1, 32767),
        "ffn": st.integers(1, 130_000),
        "heads": st.integers(1, 64),
        "head_dim": st.integers(1, 256),
        "context": st.integers(1, 2**20),
    }
)


@settings(deadline=None)  # the first reads a config, which imports transformers
@given(shapes)
def test_they_are_what_the_worst_operands_give(shape: dict[str, int]) -> None:
    one = replace(plan(), **shape)  # type: ignore[arg-type]
    bounds = {name: bound.value for name, bound in bounds_of(one).items()}
    depths = {"qkv": one.hidden, "o": one.heads * one.head_dim, "gate_up": one.hidden, "down": one.ffn, "head": one.hidden}
    for name, depth in depths.items():
        assert bounds[name] == extreme(depth, (BYTES, WEIGHTS))
    wide = range(-32512, 32513)
    assert bounds["scores"] >= extreme(one.head_dim, (WEIGHTS, WEIGHTS))
    # The four products of high and low bytes, each shifted to its place, reach no further than the values themselves.
    assert bounds["scores_wide"] == extreme(one.head_dim, (wide, wide))
    fixed = range(-(2**19), 2**19 + 1)
    assert bounds["norm"] >= extreme(max(one.hidden, one.head_dim), (fixed, fixed))
    assert bounds["attention_values"] == extreme(one.context, (range(32768), WEIGHTS))
    assert bounds["attention_weights"] == one.context * 2**24


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-32512, 32512), st.integers(-127, 127)), min_size=1, max_size=64))
def test_no_sum_of_any_operands_is_larger(pairs: list[tuple[int, int]]) -> None:
    """Both halves of 16-bit values, as docs/exact.md splits them, stay within what an 8-bit linear operation reaches."""
    bound = bounds_of(replace(plan(), ffn=len(pairs)))["down"].value
    high = [(q + 128) >> 8 for q, _ in pairs]
    low = [q - 256 * h for (q, _), h in zip(pairs, high, strict=True)]
    assert all(-128 <= value <= 127 for value in (*high, *low))
    for part in (high, low):
        assert abs(sum(q * w for q, (_, w) in zip(part, pairs, strict=True))) <= bound


def test_an_encoder_has_no_head_and_sums_its_pool() -> None:
    bounds = bounds_of(plan("minilm"))
    assert "head" not in bounds
    assert bounds["pooling"].value == 512 * 2**19


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden": 32768}, "norm"),
        ({"ffn": 132_105}, "down"),
        ({"heads": 1024, "head_dim": 256, "kv_heads": 1024}, "o"),
    ],
)
def test_a_shape_that_could_overflow_is_refused(change: dict[str, int], name: str) -> None:
    good = replace(plan(), **{key: value - 1 if key in ("hidden", "ffn") else 16 for key, value in change.items()})  # type: ignore[arg-type]
    assert set(check_bounds(good)) == set(bounds_of(good))
    with pytest.raises(ModelFormatError, match=f"overflow.* of {name} ") as caught:
        check_bounds(replace(plan(), **change))  # type: ignore[arg-type]
    assert "--profile float" in caught.value.fix


def test_a_context_is_bounded_by_its_tables() -> None:
    bounds = bounds_of(replace(plan(), context=CONTEXT_MAX))
    assert bounds["attention_weights"].holds
    assert bounds["attention_values"].holds
    with pytest.raises(ModelFormatError, match="contexts of 16777217"):
        check_bounds(replace(plan(), context=CONTEXT_MAX + 1))


def test_every_limit_is_that_of_the_type_that_holds_the_sum() -> None:
    bounds = bounds_of(plan())
    integers = {"qkv", "o", "gate_up", "down", "head", "scores"}
    assert {name for name, bound in bounds.items() if bound.limit == INT32_LIMIT} == integers
    assert {bound.limit for name, bound in bounds.items() if name not in integers} == {FLOAT64_LIMIT}


def test_encoders_of_endless_texts_are_refused() -> None:
    """All of a text is in memory at once: rows times the widest layer."""
    config = read_config(builtin_path("minilm") / "config.json")
    config.settings.max_position_embeddings = 8192
    assert plan_of(config, Pooling()).context == 8192
    config.settings.max_position_embeddings = 8193
    with pytest.raises(ModelFormatError, match="encoders"):
        plan_of(config, Pooling())
