"""What the sky is computed from: an ephemeris, the Earth's rotation, leap seconds. And the id that pins them.

`nexus.storage.sky_tables` reads them; here they are only arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError
from nexus.core.hashing import tagged_hash
from nexus.memory.sky.stamp import BODIES, MODEL_BYTES, SKY_MODEL

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# Goes up when the same tables are to be read in another way.
MODEL_VERSION = 1
# Julian days from the first day that can be computed to the first that cannot; the ephemeris reaches some weeks further.
FIRST_DAY, END_DAY = -25_567, 30_589  # since 1970: 1 January 1900, 1 October 2053
DAY_MS = 86_400_000
FIRST_MS, END_MS = FIRST_DAY * DAY_MS, END_DAY * DAY_MS

SUN, MERCURY, VENUS, EARTH_MOON, MARS, JUPITER, SATURN = 10, 1, 2, 3, 4, 5, 6
MOON, EARTH = 301, 399
# (centre, target) of every segment in use.
SEGMENTS = (
    *((0, body) for body in (SUN, MERCURY, VENUS, EARTH_MOON, MARS, JUPITER, SATURN)),
    (EARTH_MOON, MOON),
    (EARTH_MOON, EARTH),
)


@dataclass(frozen=True, slots=True)
class Segment:
    """Chebyshev series of one position, km. `start`: seconds from J2000 TDB, `length`: seconds of one interval.

    `coefficients`: [intervals, terms, 3], lowest term first.
    """

    start: float
    length: float
    coefficients: Floats


@dataclass(frozen=True, slots=True)
class SkyTables:
    """`ephemeris_hash`: SHA-256 of the file that the segments come from.

    `delta_t_days`, `delta_t`: TT - UT1 in seconds, at Julian days TT; between them it is linear. `delta_t_splines`: for other days,
    [6, pieces]: start and end in Julian years, then four coefficients, highest first.
    `leap_days`: days since 1970 UTC from which on TAI - UTC is `leap_seconds`.
    """

    ephemeris_hash: bytes
    segments: Mapping[tuple[int, int], Segment]
    delta_t_days: Floats
    delta_t: Floats
    delta_t_splines: Floats
    leap_days: Ints
    leap_seconds: Ints


def model_id(tables: SkyTables) -> bytes:
    """The 8 bytes that name what a signature was computed from.

    The Earth's rotation enters as what comes out of the tables, every fifty days in units of 10 us: so a change of the way in which
    they are joined together makes another model too, while the last bit of a float does not.
    """
    days = np.arange(FIRST_DAY, END_DAY, 50) + 2_440_587.5
    parts: list[Any] = [
        MODEL_VERSION.to_bytes(4, "little"),
        tables.ephemeris_hash,
        np.rint(delta_t_at(tables, days) * 1e5).astype("<i8").tobytes(),
        np.rint(tables.delta_t * 1e7).astype("<i8").tobytes(),
        np.rint(tables.delta_t_days * 86_400).astype("<i8").tobytes(),
        tables.leap_days.astype("<i8").tobytes(),
        tables.leap_seconds.astype("<i8").tobytes(),
        ",".join(BODIES).encode("ascii"),
    ]
    return tagged_hash("sky-model", *parts)[:MODEL_BYTES]


def check_model(tables: SkyTables) -> None:
    """Raises LocalError if these are not the tables that blocks are signed under."""
    found = model_id(tables)
    if found != SKY_MODEL:
        raise LocalError(
            f"the installed tables of the sky make model {found.hex()}, and blocks are signed under {SKY_MODEL.hex()}",
            "Install the versions of skyfield and skyfield-data that constraints.txt names",
        )


def delta_t_at(tables: SkyTables, days: Floats) -> Floats:
    """TT - UT1 in seconds at Julian days TT."""
    values = np.interp(days, tables.delta_t_days, tables.delta_t)
    outside = (days < tables.delta_t_days[0]) | (days > tables.delta_t_days[-1])
    if outside.any():
        splines = tables.delta_t_splines
        years = (days[outside] - 1_721_045.0) / 365.25
        piece = np.clip(np.searchsorted(splines[0], years, side="right") - 1, 0, splines.shape[1] - 1)
        along = (years - splines[0, piece]) / (splines[1, piece] - splines[0, piece])
        value = splines[2, piece]
        for coefficient in splines[3:]:
            value = value * along + coefficient[piece]
        values[outside] = value
    return values
