"""One byte per dimension keeps the neighbours; what a peer sends is no vector of its own length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nexus.core.errors import MalformedError, UsageError
from nexus.memory.block import DIMENSION_MAX, SCALE_MAX
from nexus.memory.quantise import CODE_MAX, check_codes, quantise, read_codes, read_many, restore, unit, unit_vectors

finite = st.floats(-1e3, 1e3, width=32)
VECTORS = st.integers(1, 40).flatmap(lambda d: arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(d)), elements=finite))


def units(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    given = np.random.default_rng(seed).standard_normal((count, dimension))
    return unit_vectors(given, dimension)


@given(VECTORS)
def test_codes_come_back_within_half_a_step(vectors: np.ndarray) -> None:
    if not np.abs(vectors).max(axis=1).all():
        with pytest.raises(UsageError, match="all zero"):
            unit_vectors(vectors, vectors.shape[1])
        return
    given_units = unit_vectors(vectors, vectors.shape[1])
    codes, scales = quantise(given_units)
    assert codes.dtype == np.int8
    assert int(np.abs(codes.astype(int)).max(axis=1).min()) == CODE_MAX
    step = np.abs(given_units).max(axis=1, keepdims=True) / CODE_MAX
    assert (np.abs(restore(codes, scales) - given_units) <= 0.5001 * step + 1e-8).all()
    # What this side makes, the other side takes.
    read = read_many([(row.tobytes(), int(scale)) for row, scale in zip(codes, scales, strict=True)], vectors.shape[1])
    assert np.array_equal(read[0], codes)
    assert np.array_equal(read[1], scales)


@pytest.mark.parametrize("dimension", [1, 2, 384, DIMENSION_MAX])
def test_every_dimension_stays_within_the_tolerance(dimension: int) -> None:
    """Also the vector whose rounding goes the same way everywhere, which grows or shrinks the most."""
    worst = np.full((2, dimension), 0.5 / 127, np.float32)
    worst[0] *= 1.01
    worst[1] *= 0.99
    worst[:, 0] = 1
    if dimension <= 384:
        check_codes(*quantise(unit(worst)))
    check_codes(*quantise(units(50, dimension)))


def test_signs_ties_and_order() -> None:
    codes, scales = quantise(np.array([[0.6, -0.8, 0.0], [-1.0, 0.0, 0.0]], np.float32))
    assert codes.tolist() == [[95, -127, 0], [-127, 0, 0]]
    assert scales.tolist() == [800_000_012, 1_000_000_000]


@pytest.mark.parametrize(
    "vectors",
    [
        [[float("nan"), 1.0]],
        [[float("inf"), 0.0]],
        [[0.0, 0.0]],
        [[1.0, 1.0]],
        [[0.5, 0.5]],
        [1.0, 0.0],
        [[]],
        np.ones((1, DIMENSION_MAX + 1)) / np.sqrt(DIMENSION_MAX + 1),
    ],
    ids=["nan", "inf", "zero", "long", "short", "flat", "empty", "wide"],
)
def test_what_is_no_unit_vector_is_refused(vectors: object) -> None:
    with pytest.raises(UsageError):
        quantise(vectors)  # type: ignore[arg-type]


def code(values: list[int]) -> bytes:
    return np.array(values, np.int8).tobytes()


@pytest.mark.parametrize(
    ("codes", "scale", "cause"),
    [
        (code([127, 0]), 0, "scale"),
        (code([127, 0]), -1, "scale"),
        (code([127, 0]), SCALE_MAX + 1, "scale"),
        (code([127, 0]), True, "scale"),
        (code([-128, 0]), 1_000_000_000, "-128"),
        (code([126, 0]), 1_007_000_000, "largest"),
        (code([0, 0]), 1_000_000_000, "largest"),
        (code([127, 0]), 1_020_100_000, "length"),
        (code([127, 0]), 979_000_000, "length"),
        (code([127, 127]), 1_000_000_000, "length"),
        (code([127] * 384), SCALE_MAX, "length"),
        (b"", 1_000_000_000, "dimensions"),
        (bytes(DIMENSION_MAX + 1), 1_000_000_000, "dimensions"),
    ],
)
def test_what_a_peer_cannot_have_made_is_refused(codes: bytes, scale: int, cause: str) -> None:
    with pytest.raises(MalformedError, match=cause):
        read_codes(codes, scale)


def test_a_vector_among_many_of_another_dimension_is_refused() -> None:
    good = (code([127, 0]), 1_000_000_000)
    assert len(read_many([good, good], 2)[0]) == 2
    with pytest.raises(MalformedError, match="1 dimensions where 2"):
        read_many([good, (code([127]), 1_000_000_000)], 2)
    with pytest.raises(MalformedError, match="length"):
        read_many([good, (code([127, 127]), 1_000_000_000)], 2)


@given(st.binary(min_size=1, max_size=64), st.integers(-5, 2**40))
def test_anything_is_refused_or_of_length_one(codes: bytes, scale: int) -> None:
    try:
        read = read_codes(codes, scale)
    except MalformedError:
        return
    assert abs(float(np.linalg.norm(restore(read[0][None], np.array([read[1]])))) - 1) <= 0.0201
