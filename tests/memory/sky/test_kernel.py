"""The kernel gives the sky that skyfield gives, everywhere and at all times, whichever way it takes."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus.core.errors import LocalError, MalformedError
from nexus.memory.sky import kernel as kernel_module
from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.place import Cell
from nexus.memory.sky.reference import SkyReference
from nexus.memory.sky.stamp import SKY_MODEL, STAMP_BYTES, TOLERANCE, SkyStamp
from nexus.memory.sky.tables import DAY_MS, END_MS, FIRST_MS, Floats, Ints, SkyTables, check_model, model_id

# What the kernel may differ from skyfield by, in units of 1e-9. Measured: 0.03, and half a unit for rounding.
DIFFERENCE = 0.1
WEEK_MS = 7 * DAY_MS
NOW_MS = 1_764_000_000_000


def drawn(seed: int, count: int, start: int = FIRST_MS, end: int = END_MS) -> tuple[Ints, Floats, Floats]:
    """Times, and places spread evenly over the globe."""
    random = np.random.default_rng(seed)
    latitude = np.degrees(np.arcsin(random.uniform(-1, 1, count)))
    return random.integers(start, end, count), latitude, random.uniform(-180, 180, count)


def one_by_one(kernel: SkyKernel, t_ms: Ints, latitude: Floats, longitude: Floats) -> Floats:
    """As `vectors`, from the ephemeris itself and not by polynomials."""
    days = t_ms // DAY_MS
    columns = kernel.geocentre.columns(days, t_ms - days * DAY_MS)
    return kernel_module._seen(columns, np.radians(latitude), np.radians(longitude)).transpose(2, 1, 0)


def test_as_skyfield_from_1900_to_2053(kernel: SkyKernel, reference: SkyReference) -> None:
    t_ms, latitude, longitude = drawn(1, 300)
    latitude[:8], latitude[8:16], longitude[16:24] = 90, -90, 180
    expected = reference.vectors(t_ms, latitude, longitude)
    assert np.abs(one_by_one(kernel, t_ms, latitude, longitude) - expected).max() < DIFFERENCE
    assert np.abs(kernel.signatures(t_ms, latitude, longitude) - expected).max() < DIFFERENCE + 0.5


def test_as_skyfield_by_pages(kernel: SkyKernel, reference: SkyReference) -> None:
    # Many blocks a day, on days of every decade: all by polynomials.
    starts = np.linspace(FIRST_MS, END_MS - DAY_MS, 24).astype(np.int64) // DAY_MS * DAY_MS
    t_ms, latitude, longitude = drawn(2, 960, 0, DAY_MS)
    t_ms = t_ms + np.repeat(starts, 40)
    expected = reference.vectors(t_ms, latitude, longitude)
    assert np.abs(kernel.signatures(t_ms, latitude, longitude) - expected).max() < DIFFERENCE + 0.5


def test_a_planet_beside_and_behind_the_sun(kernel: SkyKernel, reference: SkyReference) -> None:
    # Venus behind the Sun, 9 June 2008; in front of it, 6 June 2012; Saturn 6' from Jupiter, 21 December 2020.
    for middle in (1_212_984_000_000, 1_338_943_000_000, 1_608_574_000_000):
        t_ms, latitude, longitude = drawn(3, 200, middle - DAY_MS, middle + DAY_MS)
        expected = reference.vectors(t_ms, latitude, longitude)
        assert np.abs(kernel.signatures(t_ms, latitude, longitude) - expected).max() < DIFFERENCE + 0.5
        assert np.abs(kernel.vectors(t_ms.astype(np.float64), latitude, longitude) - expected).max() < DIFFERENCE


# Where the formula for bending light is worst: planets that passed within an arcminute of the Sun's centre, behind it.
@pytest.mark.parametrize("middle_ms", [1_465_250_040_000, 626_727_180_000, 1_956_555_660_000, 957_844_020_000])
def test_a_planet_behind_the_centre_of_the_sun(kernel: SkyKernel, reference: SkyReference, middle_ms: int) -> None:
    t_ms, latitude, longitude = drawn(9, 60, middle_ms - 1_800_000, middle_ms + 1_800_000)
    expected = reference.vectors(t_ms, latitude, longitude)
    assert np.abs(kernel.signatures(t_ms, latitude, longitude) - expected).max() < 2 * DIFFERENCE + 0.5


LEAP_MS = 1_483_228_800_000  # 1 January 2017, after the last leap second


@settings(max_examples=60, deadline=None)
@given(
    st.integers(FIRST_MS, END_MS - 1) | st.integers(LEAP_MS - 2000, LEAP_MS + 2000),
    st.floats(-90, 90),
    st.floats(-180, 180),
)
@example(FIRST_MS, 90.0, 0.0)
@example(END_MS - 1, -90.0, 180.0)
@example(LEAP_MS - 1, 0.0, 0.0)
@example(LEAP_MS, 0.0, -180.0)
@example(78_796_800_000 - 1, 10.0, 10.0)  # the last moment before leap seconds
@example(94_694_400_000, 10.0, 10.0)  # around here the daily table of the Earth's rotation begins
@example(0, 0.0, 0.0)
def test_one_place_at_one_time(kernel: SkyKernel, reference: SkyReference, t_ms: int, latitude: float, longitude: float) -> None:
    found = kernel.signatures(np.array([t_ms]), np.array([latitude]), np.array([longitude]))[0]
    assert np.abs(found - reference.vectors(t_ms, latitude, longitude)).max() < DIFFERENCE + 0.5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1e9, atol=1)


def test_the_way_taken_makes_no_difference(tables: SkyTables) -> None:
    t_ms, latitude, longitude = drawn(4, 400, NOW_MS, NOW_MS + 4 * WEEK_MS)
    fresh, paged = SkyKernel(tables), SkyKernel(tables)
    whole = paged.signatures(t_ms, latitude, longitude)
    alone = np.concatenate(
        [paged.signatures(t_ms[at : at + 1], latitude[at : at + 1], longitude[at : at + 1]) for at in range(100)]
    )
    by_time = one_by_one(fresh, t_ms, latitude, longitude)
    assert np.abs(whole[:100] - alone).max() <= 1  # a number on the edge may be rounded either way
    assert np.abs(whole - by_time).max() < 0.51
    assert np.abs(paged.vectors(t_ms.astype(np.float64), latitude, longitude) - by_time).max() < 0.002


def test_order_and_chunks_make_no_difference(kernel: SkyKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    t_ms, latitude, longitude = drawn(5, 300, NOW_MS, NOW_MS + WEEK_MS)
    whole = kernel.signatures(t_ms, latitude, longitude)
    monkeypatch.setattr(kernel_module, "CHUNK", 7)
    assert np.abs(kernel.signatures(t_ms, latitude, longitude) - whole).max() <= 1
    assert np.abs(kernel.signatures(t_ms[::-1], latitude[::-1], longitude[::-1])[::-1] - whole).max() <= 1


def test_what_is_kept_is_bounded(tables: SkyTables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "PAGES_MAX", 5)
    monkeypatch.setattr(kernel_module, "NEW_PAGES_MAX", 3)
    kernel, plain = SkyKernel(tables), SkyKernel(tables)
    made = 0
    for seed in range(6):
        # A few days with many blocks each, and many days with one.
        crowded = drawn(seed, 60, NOW_MS + seed * WEEK_MS, NOW_MS + seed * WEEK_MS + 4 * DAY_MS)
        sparse = drawn(seed, 10, NOW_MS, NOW_MS + 50 * WEEK_MS)
        t_ms, latitude, longitude = (np.concatenate(pair) for pair in zip(crowded, sparse, strict=True))
        found = kernel.signatures(t_ms, latitude, longitude)
        assert np.abs(found - one_by_one(plain, t_ms, latitude, longitude)).max() < 0.51
        made = max(made, len(kernel._pages))
        assert len(kernel._pages) <= 5
    assert made == 5


def test_several_threads_at_once(tables: SkyTables) -> None:
    kernel = SkyKernel(tables)
    batches = [drawn(seed, 200, NOW_MS + seed % 3 * WEEK_MS, NOW_MS + (seed % 3 + 2) * WEEK_MS) for seed in range(6)]
    found: dict[int, Ints] = {}

    def work(at: int) -> None:
        found[at] = kernel.signatures(*batches[at])

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, batch in enumerate(batches):
        assert np.abs(found[at] - kernel.signatures(*batch)).max() <= 1


def test_no_blocks_no_signatures(kernel: SkyKernel) -> None:
    none = np.zeros(0)
    assert kernel.signatures(none.astype(np.int64), none, none).shape == (0, 7, 3)
    assert kernel.check_stamps([], []).shape == (0,)
    assert kernel.stamps([], []) == []


@pytest.mark.parametrize("t_ms", [FIRST_MS - 1, END_MS, -(2**63), 2**63 - 1])
def test_a_time_without_a_sky(kernel: SkyKernel, t_ms: int) -> None:
    times, zero = np.array([NOW_MS, t_ms, NOW_MS]), np.zeros(3)
    with pytest.raises(MalformedError):
        kernel.signatures(times, zero, zero)
    good = np.repeat(kernel.signatures(np.array([NOW_MS]), np.zeros(1), np.zeros(1)), 3, axis=0)
    assert kernel.check(times, zero, zero, good).tolist() == [True, False, True]


@pytest.mark.parametrize(("latitude", "longitude"), [(91.0, 0.0), (np.nan, 0.0), (0.0, np.inf), (0.0, np.nan)])
def test_a_place_off_the_earth(kernel: SkyKernel, latitude: float, longitude: float) -> None:
    with pytest.raises(MalformedError):
        kernel.signatures(np.array([NOW_MS]), np.array([latitude]), np.array([longitude]))
    good = kernel.signatures(np.array([NOW_MS]), np.zeros(1), np.zeros(1))
    assert not kernel.check(np.array([NOW_MS]), np.array([latitude]), np.array([longitude]), good)[0]


def test_the_tolerance_is_sharp(kernel: SkyKernel) -> None:
    t_ms, latitude, longitude = drawn(6, 21 * 4, NOW_MS, NOW_MS + WEEK_MS)
    right = kernel.signatures(t_ms, latitude, longitude).astype(np.int64)
    changed = right.reshape(-1, 21).copy()
    for row in range(len(changed)):
        changed[row, row // 4] += (TOLERANCE, -TOLERANCE, TOLERANCE + 1, -TOLERANCE - 1)[row % 4]
    assert kernel.check(t_ms, latitude, longitude, changed.reshape(-1, 7, 3)).tolist() == [True, True, False, False] * 21


def test_extreme_numbers_do_not_wrap_around(kernel: SkyKernel) -> None:
    worst = np.full((2, 7, 3), -(2**31), np.int32)
    worst[1] = 2**31 - 1
    assert not kernel.check(np.full(2, NOW_MS), np.zeros(2), np.zeros(2), worst).any()


CELL = Cell.of(50.1, 8.7)


@given(
    st.integers(FIRST_MS, END_MS - 1),
    st.floats(-90, 90),
    st.floats(-180, 180),
    st.integers(0, STAMP_BYTES - 1),
    st.integers(1, 255),
)
@settings(max_examples=60, deadline=None)
def test_a_changed_stamp_is_found(kernel: SkyKernel, t_ms: int, latitude: float, longitude: float, at: int, flip: int) -> None:
    stamp = kernel.stamps([t_ms], [Cell.of(latitude, longitude)])[0]
    data = stamp.to_bytes()
    assert SkyStamp.from_bytes(data) == stamp
    assert kernel.check_stamps([t_ms], [data]).tolist() == [True]
    changed = data[:at] + bytes((data[at] ^ flip,)) + data[at + 1 :]
    # The last bits of a number are within the tolerance.
    small = at >= 14 and (at - 14) % 4 == 0 and abs(changed[at] - data[at]) <= 2 * TOLERANCE
    assert small or kernel.check_stamps([t_ms], [changed]).tolist() == [False]


def test_bad_stamps_among_good_ones(kernel: SkyKernel) -> None:
    good = kernel.stamps([NOW_MS] * 2, [CELL, Cell.of(-33.9, 18.4, 10)])
    data = good[0].to_bytes()
    cases = [
        (NOW_MS, data, True),
        (NOW_MS, good[1].to_bytes(), True),
        (NOW_MS, b"", False),
        (NOW_MS, data[:-1], False),
        (NOW_MS, data + b"\0", False),
        (NOW_MS, bytes(STAMP_BYTES), False),
        (NOW_MS, b"\xff" * STAMP_BYTES, False),
        (NOW_MS, bytes(8) + data[8:], False),
        (NOW_MS, SKY_MODEL + bytes(6) + data[14:], False),
        (NOW_MS, SKY_MODEL + Cell(100, 180, 0).to_bytes() + data[14:], False),
        (NOW_MS, SKY_MODEL + Cell(7, 0, 0).to_bytes() + data[14:], False),
        (NOW_MS, SKY_MODEL + Cell.of(50.1, 9.7).to_bytes() + data[14:], False),
        (NOW_MS + 1, data, False),
        (NOW_MS - 1, data, False),
        (END_MS, data, False),
        (NOW_MS, data, True),
    ]
    found = kernel.check_stamps([t_ms for t_ms, _, _ in cases], [stamp for _, stamp, _ in cases])
    assert found.tolist() == [right for _, _, right in cases]


def test_a_signature_that_is_pinned(kernel: SkyKernel) -> None:
    # Noon of 1 January 2000 in Greenwich's cell. Another value here is another sky model, and needs another id.
    found = kernel.signatures(np.array([946_728_000_000]), np.array([51.5]), np.array([-0.5]))[0]
    assert np.abs(found - np.array(PINNED)).max() <= 1


PINNED = [
    [21198487, -963601564, 266500751],
    [-830523405, -531974262, 165028052],
    [-124896334, -963223846, 237909077],
    [-610590301, -765159780, 204230252],
    [751924617, -626053135, 206559536],
    [959777874, 279041293, -31022406],
    [855096551, 503956487, -121810295],
]


def test_the_model_is_the_one_that_blocks_are_signed_under(tables: SkyTables) -> None:
    assert model_id(tables) == SKY_MODEL
    check_model(tables)


@pytest.mark.parametrize("field", ["ephemeris_hash", "delta_t", "delta_t_days", "delta_t_splines", "leap_days", "leap_seconds"])
def test_other_tables_make_another_model(tables: SkyTables, field: str) -> None:
    value = getattr(tables, field)
    changed = bytes(32) if isinstance(value, bytes) else value + 1
    other = replace(tables, **{field: changed})
    assert model_id(other) != SKY_MODEL
    with pytest.raises(LocalError):
        check_model(other)
