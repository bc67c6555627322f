"""Scores are exact in any order of addition; fused ranks are what the formula says."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.memory.ranking import cosines, fuse, inverse_lengths, round_asked


@given(seed=st.integers(0, 2**32 - 1), dimension=st.sampled_from([1, 3, 8, 384, 1025, 4096]), rows=st.sampled_from([0, 1, 7, 600]))
def test_scores_do_not_depend_on_how_a_machine_adds(seed: int, dimension: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (rows, dimension)).astype(np.int8)
    vector = rng.normal(size=dimension).astype(np.float32)
    scores = cosines(round_asked(vector), codes, inverse_lengths(codes))
    order = rng.permutation(dimension)
    shuffled = np.ascontiguousarray(codes[:, order])
    assert (cosines(round_asked(vector[order]), shuffled, inverse_lengths(shuffled)) == scores).all()
    one_by_one = [float(cosines(round_asked(vector), row[None, :], inverse_lengths(row[None, :]))[0]) for row in codes[:8]]
    assert one_by_one == scores[:8].tolist()


def test_scores_are_cosines_of_what_was_rounded() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-127, 128, (50, 40)).astype(np.int8)
    vector = rng.normal(size=40).astype(np.float32)
    asked = round_asked(vector)
    for row, score in zip(codes.tolist(), cosines(asked, codes, inverse_lengths(codes)), strict=True):
        dot = sum(Fraction(int(a)) * b for a, b in zip(asked.whole.tolist(), row, strict=True))
        lengths = math.sqrt(sum(int(a) ** 2 for a in asked.whole.tolist())) * math.sqrt(sum(b * b for b in row))
        assert score == pytest.approx(float(dot) / lengths, rel=1e-15, abs=1e-15)
        assert score == pytest.approx(float(np.dot(vector, row) / np.linalg.norm(vector) / np.linalg.norm(row)), abs=2e-4)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_the_length_of_what_is_asked_does_not_count(values: list[float], factor: float) -> None:
    vector = np.array(values, np.float64)
    if not vector.any():
        with pytest.raises(UsageError):
            round_asked(vector)  # type: ignore[arg-type]
        return
    one, two = round_asked(vector), round_asked(vector * factor)  # type: ignore[arg-type]
    assert np.abs(one.whole).max() == 127 * 128
    assert np.abs(one.whole - two.whole).max() <= 1


def test_rows_of_zeros_have_no_length_and_no_score() -> None:
    codes = np.array([[0, 0], [3, 4]], np.int8)
    assert inverse_lengths(codes).tolist() == [0.0, 0.2]
    assert cosines(round_asked(np.array([3, 4], np.float32)), codes, inverse_lengths(codes)).tolist() == [
        0.0,
        pytest.approx(1.0, rel=1e-6),
    ]


@given(st.lists(st.permutations(range(6)).flatmap(lambda items: st.integers(0, 6).map(lambda count: items[:count])), max_size=4))
def test_fusion_adds_one_over_sixty_and_the_rank(rankings: list[list[int]]) -> None:
    fused = fuse(rankings)
    for item in range(6):
        expected = sum(1 / (60 + ranking.index(item) + 1) for ranking in rankings if item in ranking)
        assert fused.get(item, 0) == pytest.approx(expected)
