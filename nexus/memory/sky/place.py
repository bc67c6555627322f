"""Coarse places: a block names a cell of a grid on the Earth, never the place itself.

A signature of the sky gives the place it was computed for away to centimetres (`nexus.memory.sky.sight`). So it is computed for the
centre of a cell, and a reader learns the cell that stands in the block anyway. Cells are `step` hundredths of a degree high and
wide (1 degree of latitude is 111 km); rows count from the south pole, columns eastward from 180 degrees west.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple, Self

from nexus.core.errors import MalformedError, UsageError

CELL_BYTES = 6
STEP_MIN, STEP_MAX = 10, 1000
STEP_DEFAULT = 100
_HALF_TURN = 18_000
_FORM = struct.Struct("<HHH")


def check_step(step: int) -> int:
    """`step` as it is, if it may be the side of a cell, in hundredths of a degree. Raises UsageError."""
    if not STEP_MIN <= step <= STEP_MAX or _HALF_TURN % step:
        raise UsageError(
            f"cells of {step / 100:g} degrees do not make a grid",
            f"Choose {STEP_MIN / 100:g} to {STEP_MAX / 100:g} degrees, a number that divides 180 evenly: 0.1, 0.5, 1, 5, 10",
        )
    return step


class Cell(NamedTuple):
    """One cell. `step`: its side in hundredths of a degree; `row` from the south pole, `column` eastward from 180 degrees west."""

    step: int
    row: int
    column: int

    @classmethod
    def of(cls, latitude: float, longitude: float, step: int = STEP_DEFAULT) -> Self:
        """The cell around a place, in degrees north and east. Raises UsageError for what is no place on the Earth."""
        check_step(step)
        if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):  # also false for NaN
            raise UsageError(
                f"{latitude:g}, {longitude:g} is no place on the Earth", "Latitude is -90 to 90, longitude -180 to 180, in degrees"
            )
        row = math.floor((latitude * 100 + _HALF_TURN / 2) / step)
        column = math.floor((longitude * 100 + _HALF_TURN) / step)
        # The north pole belongs to the last row; 180 degrees east is 180 degrees west.
        return cls(step, min(row, _HALF_TURN // step - 1), column % (2 * _HALF_TURN // step))

    def centre(self) -> tuple[float, float]:
        """Latitude and longitude of the middle, in degrees. One correctly rounded division each: the same on every machine."""
        return (
            (self.step * (2 * self.row + 1) - _HALF_TURN) / 200,
            (self.step * (2 * self.column + 1) - 2 * _HALF_TURN) / 200,
        )

    def holds(self, latitude: float, longitude: float) -> bool:
        """Whether a place, in degrees, lies in this cell."""
        return Cell.of(latitude, longitude, self.step) == self

    def to_bytes(self) -> bytes:
        return _FORM.pack(*self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises MalformedError for anything but the encoding of a cell of a grid."""
        if len(data) != CELL_BYTES:
            raise MalformedError(f"a cell is {CELL_BYTES} bytes, not {len(data)}")
        step, row, column = _FORM.unpack(data)
        if not STEP_MIN <= step <= STEP_MAX or _HALF_TURN % step:
            raise MalformedError(f"cells of {step} hundredths of a degree do not make a grid")
        if row >= _HALF_TURN // step or column >= 2 * _HALF_TURN // step:
            raise MalformedError("the cell lies outside its grid")
        return cls(step, row, column)
