"""Maps between spaces find what they can find, say how much that is, and travel in parts of one form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, UsageError
from nexus.memory.block import DATA_BYTES_MAX
from nexus.memory.quantise import unit_vectors
from nexus.memory.space_map import MapPart, SpaceMap, fit_map, join_parts, measured_recall, read_part, rows_per_part

SOURCE, TARGET = b"s" * 32, b"t" * 32


def themes(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Vectors in groups, as those of sentences are."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((count // 12, dimension))
    return unit_vectors(centres[np.arange(count) % len(centres)] + 0.5 * random.standard_normal((count, dimension)), dimension)


def rotation(dimension: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0]


@pytest.fixture(scope="module")
def fitted() -> SpaceMap:
    x = themes(200, 12)
    return fit_map(SOURCE, TARGET, x, x @ rotation(12))


def test_a_rotation_is_found(fitted: SpaceMap) -> None:
    x = themes(80, 12, seed=5)
    turned = unit_vectors(x @ rotation(12), 12)
    assert (fitted.apply(x) * turned).sum(1).min() > 0.999
    assert fitted.recall > 0.95
    assert measured_recall(fitted, x, turned) > 0.95
    assert fitted.may_answer


def test_a_shift_and_a_stretch_between_other_dimensions_are_found() -> None:
    x = themes(300, 20)
    y = x @ np.random.default_rng(2).standard_normal((20, 33)) + 0.4
    made = fit_map(SOURCE, TARGET, x, y)
    assert (made.source_dimension, made.target_dimension) == (20, 33)
    assert made.recall > 0.9


def test_what_has_nothing_in_common_may_not_answer() -> None:
    made = fit_map(SOURCE, TARGET, themes(300, 12), np.random.default_rng(3).standard_normal((300, 12)))
    assert made.recall < 0.2
    assert not made.may_answer


def test_half_is_enough_to_answer(fitted: SpaceMap) -> None:
    assert replace(fitted, recall_ppm=500_000).may_answer
    assert not replace(fitted, recall_ppm=499_999).may_answer


def test_the_recall_is_of_anchors_that_were_not_fitted() -> None:
    """With hardly more anchors than dimensions noise fits noise, and must not look like knowledge."""
    random = np.random.default_rng(4)
    made = fit_map(SOURCE, TARGET, random.standard_normal((320, 180)), random.standard_normal((320, 8)))
    assert made.recall < 0.2


@pytest.mark.parametrize("count", [0, 10, 200, 640])
def test_too_few_anchors_are_refused(count: int) -> None:
    x = themes(count, 384) if count > 12 else np.zeros((count, 384))
    with pytest.raises(UsageError, match="too few") as raised:
        fit_map(SOURCE, TARGET, x, x)
    needed = int(raised.value.fix.rsplit(" ", 1)[1])
    fitted = sum(n % 5 < 3 for n in range(needed))
    assert 384 < fitted < 384 + 8


def test_what_is_said_to_be_enough_is() -> None:
    for dimension in (2, 3, 12):
        with pytest.raises(UsageError) as raised:
            fit_map(SOURCE, TARGET, np.ones((5, dimension)), np.ones((5, dimension)))
        x = themes(int(raised.value.fix.rsplit(" ", 1)[1]), dimension)
        assert join_parts(fit_map(SOURCE, TARGET, x, x @ rotation(dimension)).to_parts()).source_dimension == dimension


@pytest.mark.parametrize(
    ("source", "target", "x", "y"),
    [
        (SOURCE, SOURCE, themes(200, 12), themes(200, 12)),
        (b"short", TARGET, themes(200, 12), themes(200, 12)),
        (SOURCE, TARGET, themes(200, 12), themes(199, 12)),
        (SOURCE, TARGET, themes(200, 12)[0], themes(200, 12)),
        (SOURCE, TARGET, themes(200, 12), np.full((200, 12), np.nan)),
        (SOURCE, TARGET, themes(200, 12), np.zeros((200, 12))),
        (SOURCE, TARGET, np.ones((9, 4096)), np.ones((9, 4096))),
        (SOURCE, TARGET, np.ones((20_001, 2)), np.ones((20_001, 2))),
    ],
    ids=["itself", "short", "counts", "flat", "nan", "zero", "large", "many"],
)
def test_what_makes_no_map_is_refused(source: bytes, target: bytes, x: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(UsageError):
        fit_map(source, target, x, y)


def test_vectors_of_another_dimension_are_refused(fitted: SpaceMap) -> None:
    with pytest.raises(UsageError):
        fitted.apply(themes(20, 13))
    with pytest.raises(UsageError):
        measured_recall(fitted, themes(20, 12), themes(19, 12))


@pytest.fixture(scope="module")
def large() -> SpaceMap:
    """Of several parts, and with a row that is all zero."""
    random = np.random.default_rng(6)
    codes = random.integers(-127, 128, (701, 300)).astype(np.int8)
    codes[:, 0] = 127
    codes[9] = 0
    scales = random.integers(1000, 2**32, 701)
    scales[9] = 0
    return SpaceMap(SOURCE, TARGET, codes, scales, 5000, 1000, 812_345)


def test_parts_come_back_in_any_order(large: SpaceMap) -> None:
    parts = large.to_parts()
    assert len(parts) == 5
    assert all(len(part) <= DATA_BYTES_MAX for part in parts)
    back = join_parts(parts[::-1])
    assert np.array_equal(back.codes, large.codes)
    assert np.array_equal(back.scales, large.scales)
    assert replace(back, codes=large.codes, scales=large.scales) == large
    assert back.to_parts() == parts
    x = themes(24, 700)
    assert np.array_equal(back.apply(x), large.apply(x))


def test_the_largest_map_fits() -> None:
    assert rows_per_part(4096) >= 11
    x = SpaceMap(SOURCE, TARGET, np.full((1025, 1024), 127, np.int8), np.full(1025, 1000), 5000, 1000, 0)
    parts = x.to_parts()
    assert len(parts) == 22
    assert max(map(len, parts)) <= DATA_BYTES_MAX


def altered(parts: list[bytes], which: int, **changes: object) -> list[bytes]:
    changed = list(parts)
    changed[which] = replace(MapPart.from_bytes(parts[which]), **changes).to_bytes()  # type: ignore[arg-type]
    return changed


def test_parts_that_do_not_belong_together_are_refused(large: SpaceMap) -> None:
    parts = large.to_parts()
    rows = bytearray(MapPart.from_bytes(parts[2]).rows)
    rows[50] ^= 1
    for bad in (
        [],
        parts[:-1],
        [*parts, parts[0]],
        [*parts[:-1], parts[0]],
        altered(parts, 1, recall=900_000),
        altered(parts, 1, source=b"x" * 32),
        altered(parts, 1, whole=b"x" * 32),
        altered(parts, 2, rows=bytes(rows)),
        [parts[0]] * 100,
    ):
        with pytest.raises(MalformedError):
            join_parts(bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 5},
        {"number": 4},
        {"rows": b""},
        {"rows": bytes(DATA_BYTES_MAX)},
        {"source": TARGET},
        {"anchors": 700},
        {"held_out": 10},
        {"held_out": 5000},
        {"source_dimension": 100},
        {"target_dimension": 299},
        {"source_dimension": 4096, "target_dimension": 4096},
    ],
    ids=str,
)
def test_a_part_that_cannot_be_is_refused(changes: dict[str, object], large: SpaceMap) -> None:
    with pytest.raises(MalformedError):
        read_part(altered(large.to_parts(), 0, **changes)[0])


@pytest.mark.parametrize("field", ["spec", "recall", "target_dimension", "number"])
def test_numbers_out_of_range_are_refused(field: str, large: SpaceMap) -> None:
    with pytest.raises(MalformedError):
        read_part(altered(large.to_parts(), 0, **{field: 10**7})[0])


def forged(codes: np.ndarray, scales: np.ndarray) -> list[bytes]:
    return SpaceMap(SOURCE, TARGET, codes.astype(np.int8), scales, 100, 20, 0).to_parts()


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        ([[126, 0], [127, 1], [0, 0]], [5000, 5000, 0]),
        ([[-128, 127], [127, 1], [0, 0]], [5000, 5000, 0]),
        ([[127, 0], [127, 1], [0, 0]], [5000, 5000, 1000]),
        ([[127, 0], [127, 1], [127, 0]], [5000, 0, 1000]),
        ([[0, 0], [0, 0], [127, 0]], [0, 0, 5000]),
    ],
)
def test_rows_of_another_form_are_refused(codes: list[list[int]], scales: list[int]) -> None:
    good = forged(np.array([[127, 0], [127, 1], [0, 0]]), np.array([5000, 5000, 0]))
    assert join_parts(good).codes.shape == (3, 2)
    with pytest.raises(MalformedError):
        join_parts(forged(np.array(codes), np.array(scales)))


@settings(max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 399), st.integers(1, 255))
def test_no_other_bytes_are_a_part(junk: bytes, at: int, flip: int) -> None:
    (good,) = forged(np.array([[127, 0], [127, 1], [0, 0]]), np.array([5000, 5000, 0]))
    spoilt = bytearray(good)
    spoilt[at % len(good)] ^= flip
    for data in (junk, bytes(spoilt)):
        try:
            part = read_part(data)
        except MalformedError:
            continue
        assert part.to_bytes() == data
