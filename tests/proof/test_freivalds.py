"""Freivalds' check: right products pass always, wrong ones never, keys are small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.core.errors import MalformedError
from nexus.proof.freivalds import KEYS, FreivaldsKey, PieceKeys, check, make_key, piece_keys, random_rows

SEED = bytes(range(32))


def matrix(seed: int, *shape: int) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def products(x: NDArray[np.int8], weights: NDArray[np.int8]) -> NDArray[np.int32]:
    return (x.astype(np.int64) @ weights.astype(np.int64).T).astype(np.int32)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 70))


@given(shapes, st.integers(0, 2**32), st.integers(1, 41), st.binary(min_size=32, max_size=32))
def test_right_sums_pass_and_a_key_does_not_depend_on_how_the_rows_came(
    shape: tuple[int, int, int], numbers: int, per_block: int, seed: bytes
) -> None:
    n, rows, depth = shape
    weights, x = matrix(numbers, rows, depth), matrix(numbers + 1, n, depth)
    key = make_key([weights[at : at + per_block] for at in range(0, rows, per_block)], seed)
    assert key == make_key([weights], seed) == FreivaldsKey.from_bytes(key.to_bytes())
    assert check(key, x, products(x, weights))
    assert check(key, x, products(x, weights).astype(np.int64))


@given(shapes, st.integers(0, 2**32), st.data())
def test_any_change_of_a_sum_is_found(shape: tuple[int, int, int], numbers: int, data: st.DataObject) -> None:
    n, rows, depth = shape
    weights, x = matrix(numbers, rows, depth), matrix(numbers + 1, n, depth)
    key, sums = make_key([weights], SEED), products(x, weights)
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, rows - 1))
    # A power of two is what the ring forgives most.
    change = data.draw(st.one_of(st.integers(1, 2**31), st.sampled_from([1 << bit for bit in range(32)])))
    sums[row, column] = np.int64(int(sums[row, column]) + change).astype(np.int32)
    assert not check(key, x, sums)


def test_the_vector_is_the_product_modulo_two_to_the_64() -> None:
    weights = matrix(3, 700, 300)
    key = make_key([weights], SEED)
    right = random_rows(SEED, 0, 700) @ weights.astype(np.int64).view(np.uint64)
    assert np.array_equal(key.vectors(), right)
    assert np.array_equal(random_rows(SEED, 100, 150), random_rows(SEED, 0, 700)[:, 100:150])


def test_the_extremes_of_the_weights_are_exact() -> None:
    weights = np.full((3000, 8), -128, np.int8)
    key = make_key([weights], SEED)
    assert np.array_equal(key.vectors(), random_rows(SEED, 0, 3000) @ weights.astype(np.int64).view(np.uint64))


def test_a_miss_is_as_rare_as_promised_for_short_rings() -> None:
    """A difference of 2^t is missed by a key where the low 64 - t bits of its r are zero: once in 2^(64 - t)."""
    r = random_rows(bytes(32), 0, 1 << 14)
    for bits in (4, 6, 8):
        missed = int(np.count_nonzero(r << np.uint64(64 - bits) == 0))
        expected = KEYS * (1 << 14) / (1 << bits)
        assert abs(missed - expected) < 6 * expected**0.5


def test_sums_beyond_int32_are_refused() -> None:
    """A difference of 2^63 would pass with every second key."""
    weights, x = matrix(5, 8, 16), matrix(6, 2, 16)
    key, sums = make_key([weights], SEED), products(x, weights).astype(np.int64)
    for beyond in (2**32, 2**63 - 1):
        changed = sums.copy()
        changed[0, 0] = beyond
        assert not check(key, x, changed)
    assert not check(key, x, sums.astype(np.float64))  # type: ignore[arg-type]


def test_other_forms_are_refused() -> None:
    weights, x = matrix(7, 8, 16), matrix(8, 2, 16)
    key, sums = make_key([weights], SEED), products(x, weights)
    assert not check(key, x, sums[:, :7])
    assert not check(key, x[:1], sums)
    assert not check(key, x[:, :15], sums)
    assert not check(key, x.astype(np.int16), sums)  # type: ignore[arg-type]
    with pytest.raises(MalformedError):
        check(FreivaldsKey(SEED, 8, b"\0" * 17), x, sums)
    with pytest.raises(ValueError, match="seed"):
        make_key([weights], b"short")
    with pytest.raises(ValueError, match="without rows"):
        make_key([], SEED)
    with pytest.raises(ValueError, match="int8"):
        make_key([weights.astype(np.int16)], SEED)  # type: ignore[list-item]


def test_keys_of_the_1b_shape_are_115_kb_per_layer_and_key() -> None:
    """qkv, o, gate_up and down of a 1B model: 61 MB of weights."""
    depths = {"qkv": 2048, "o": 2048, "gate_up": 2048, "down": 8192}
    sizes = [len(make_key([np.ones((1, depth), np.int8)], SEED).to_bytes()) for depth in depths.values()]
    assert 114_000 * KEYS < sum(sizes) < 116_000 * KEYS


def test_of_a_piece_the_small_tensors_are_kept() -> None:
    tensors = {
        "o.weight": matrix(1, 6, 4),
        "o.scale": np.arange(6, dtype=np.float32),
        "mlp_norm.weight": np.arange(4, dtype=np.float32) / 3,
        "position.weight": np.zeros((3, 4), np.float32),
    }
    keys = piece_keys(tensors, ["o"], SEED)
    assert PieceKeys.from_bytes(keys.to_bytes()) == keys
    assert keys.key("o").rows == 6
    assert keys.key("o").seed != SEED
    assert np.array_equal(keys.tensor("mlp_norm.weight"), tensors["mlp_norm.weight"])  # type: ignore[arg-type]
    assert keys.tensor("position.weight") is None
    x = matrix(9, 3, 4)
    assert check(keys.key("o"), x, products(x, tensors["o.weight"]))
