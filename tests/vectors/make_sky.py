"""Skies for other implementations, by skyfield and not by Nexus's kernel. `python -m tests.vectors.make_sky` writes them anew.

They are to be met within the tolerance, never byte for byte: the last digit of a number may be rounded either way.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import SKY_MODEL, SkyStamp
from nexus.memory.sky.tables import END_MS, FIRST_MS
from nexus.storage.sky_tables import load_sky_reference

FILE = Path(__file__).with_name("sky.json")
# Time in milliseconds since 1970 UTC, and the cell: its side in hundredths of a degree, row, column.
CASES = (
    (0, Cell(100, 90, 180)),
    (FIRST_MS, Cell(1000, 0, 0)),
    (END_MS - 1, Cell(10, 1799, 3599)),
    (946_728_000_000, Cell.of(51.5, -0.1)),
    (1_483_228_799_999, Cell.of(-33.9, 18.4)),  # around the leap second at the end of 2016
    (1_483_228_800_000, Cell.of(-33.9, 18.4)),
    (1_608_574_000_000, Cell.of(47.4, 8.5, 50)),  # Saturn 6' from Jupiter
    (1_338_943_000_000, Cell.of(20.7, -156.3, 500)),  # Venus before the Sun
    (1_212_984_000_000, Cell.of(20.7, -156.3, 500)),  # and behind him
    (1_764_000_000_000, Cell(10, 1799, 0)),  # beside the north pole
    (1_764_000_000_000, Cell(10, 0, 1800)),  # beside the south pole
    (2_524_608_000_000, Cell.of(35.7, 139.7)),
)


def text() -> str:
    reference = load_sky_reference()
    vectors = []
    for t_ms, cell in CASES:
        signature = np.rint(reference.vectors(t_ms, *cell.centre())).astype("<i4").tobytes()
        latitude, longitude = cell.centre()
        stamp = SkyStamp(SKY_MODEL, cell, signature).to_bytes().hex()
        vectors.append({"t_ms": t_ms, "latitude": latitude, "longitude": longitude, "stamp": stamp})
    return json.dumps({"model": SKY_MODEL.hex(), "skies": vectors}, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
