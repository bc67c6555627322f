"""The sky in a block: which model of the sky, which cell, and where seven bodies stood as seen from the cell's centre.

    8 bytes   id of the sky model (`SKY_MODEL`): ephemeris, Earth rotation, leap seconds, bodies
    6 bytes   the cell (`nexus.memory.sky.place`)
   84 bytes   the signature: for each of `BODIES` its direction cosines East, North and Up, times 1e9, as little-endian int32

A stamp says nothing about a time of its own: it belongs to the time that the block states. Whether the two agree is for
`nexus.memory.sky.kernel` to say. Nothing here is compared for equality or hashed again: a signature is right if every number is
within `TOLERANCE` of what the receiver computes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from nexus.core.errors import MalformedError
from nexus.memory.sky.place import CELL_BYTES, Cell

BODIES = ("Sun", "Moon", "Mercury", "Venus", "Mars", "Jupiter", "Saturn")
UNITS = 1_000_000_000
# Two units are what machines may differ by, all told; five are a milliarcsecond, the time that the Earth takes for 70 us.
TOLERANCE = 5
# The one sky that blocks are signed under. `nexus.memory.sky.tables.model_id` says what it covers; another ephemeris or other
# tables of the Earth's rotation make another model, and never the same id.
SKY_MODEL = bytes.fromhex("2b6469f52b0339ca")
MODEL_BYTES = 8
SIGNATURE_BYTES = len(BODIES) * 3 * 4
STAMP_BYTES = MODEL_BYTES + CELL_BYTES + SIGNATURE_BYTES

_SIGNATURE = struct.Struct(f"<{len(BODIES) * 3}i")


@dataclass(frozen=True, slots=True)
class SkyStamp:
    """`model`: 8 bytes, `signature`: 84 bytes."""

    model: bytes
    cell: Cell
    signature: bytes

    def to_bytes(self) -> bytes:
        return self.model + self.cell.to_bytes() + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises MalformedError for another length, a cell of no grid, or numbers that no direction has.

        A model that this node does not know is no fault of form; whether such a block is kept is decided elsewhere.
        """
        if len(data) != STAMP_BYTES:
            raise MalformedError(f"a stamp of the sky is {STAMP_BYTES} bytes, not {len(data)}")
        cell = Cell.from_bytes(data[MODEL_BYTES : MODEL_BYTES + CELL_BYTES])
        signature = data[MODEL_BYTES + CELL_BYTES :]
        cosines(signature)
        return cls(data[:MODEL_BYTES], cell, signature)


def cosines(signature: bytes) -> tuple[tuple[int, int, int], ...]:
    """East, North and Up of each body, in units of 1e-9.

    Raises MalformedError for another length, or a number beyond 1e9 by more than the tolerance.
    """
    if len(signature) != SIGNATURE_BYTES:
        raise MalformedError(f"a signature of the sky is {SIGNATURE_BYTES} bytes, not {len(signature)}")
    numbers = _SIGNATURE.unpack(signature)
    if max(numbers) > UNITS + TOLERANCE or min(numbers) < -UNITS - TOLERANCE:
        raise MalformedError("a direction cosine beyond 1")
    return tuple((numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(0, len(numbers), 3))
