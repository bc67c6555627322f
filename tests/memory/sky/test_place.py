"""Cells: every place on the Earth has one, its centre is inside, and no other bytes make one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, UsageError
from nexus.memory.sky.place import CELL_BYTES, STEP_MAX, STEP_MIN, Cell, check_step

STEPS = [step for step in range(STEP_MIN, STEP_MAX + 1) if 18_000 % step == 0]
steps = st.sampled_from(STEPS)
latitudes, longitudes = st.floats(-90, 90), st.floats(-180, 180)


@given(latitudes, longitudes, steps)
def test_a_place_lies_in_its_cell(latitude: float, longitude: float, step: int) -> None:
    cell = Cell.of(latitude, longitude, step)
    middle_latitude, middle_longitude = cell.centre()
    half = step / 200
    assert abs(latitude - middle_latitude) <= half * (1 + 1e-9)
    assert abs((longitude - middle_longitude + 180) % 360 - 180) <= half * (1 + 1e-9)
    assert cell.holds(latitude, longitude)
    assert cell.holds(middle_latitude, middle_longitude)


@given(latitudes, longitudes, steps)
def test_a_cell_comes_back(latitude: float, longitude: float, step: int) -> None:
    cell = Cell.of(latitude, longitude, step)
    assert len(cell.to_bytes()) == CELL_BYTES
    assert Cell.from_bytes(cell.to_bytes()) == cell


@given(
    st.binary(min_size=CELL_BYTES, max_size=CELL_BYTES)
    | st.tuples(steps, latitudes).map(lambda x: Cell.of(x[1], 0, x[0]).to_bytes())
)
def test_no_other_bytes_make_a_cell(data: bytes) -> None:
    try:
        cell = Cell.from_bytes(data)
    except MalformedError:
        return
    assert cell.to_bytes() == data
    assert cell == Cell.of(*cell.centre(), cell.step)


@pytest.mark.parametrize("step", STEPS)
def test_every_row_and_column_ends_where_the_earth_does(step: int) -> None:
    rows, columns = 18_000 // step, 36_000 // step
    last = Cell(step, rows - 1, columns - 1)
    assert Cell.of(90, 179.999999, step) == last
    assert Cell.of(90, 180, step) == Cell.of(90, -180, step) == Cell(step, rows - 1, 0)
    assert Cell.of(-90, -180, step) == Cell(step, 0, 0)
    assert Cell.from_bytes(last.to_bytes()) == last
    for beyond in (Cell(step, rows, 0), Cell(step, 0, columns)):
        with pytest.raises(MalformedError):
            Cell.from_bytes(beyond.to_bytes())


@pytest.mark.parametrize(
    "data", [b"", bytes(5), bytes(7), bytes(6), Cell(7, 0, 0).to_bytes(), Cell(1001, 0, 0).to_bytes(), b"\xff" * 6]
)
def test_what_is_no_cell(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Cell.from_bytes(data)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [(90.1, 0), (-91, 0), (0, 180.5), (0, -181), (math.nan, 0), (0, math.nan), (math.inf, 0), (0, -math.inf)],
)
def test_what_is_no_place(latitude: float, longitude: float) -> None:
    with pytest.raises(UsageError):
        Cell.of(latitude, longitude)


@pytest.mark.parametrize("step", [0, -100, 9, 7, 70, 1001, 1800, 18_000])
def test_what_is_no_step(step: int) -> None:
    with pytest.raises(UsageError):
        check_step(step)
    with pytest.raises(UsageError):
        Cell.of(0, 0, step)
