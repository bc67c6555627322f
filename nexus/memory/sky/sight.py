"""Sight reduction: time and place from a signature alone, as a navigator finds them from angles between bodies and their heights.

The angles between the Sun and the planets are nearly the same from everywhere on the Earth, and no two days from 1900 to 2053 share
them. So a table of these angles by the day gives the day; a finer scan the hour; the attitude of the horizon among the bodies
(Wahba's problem) then gives the zenith, and with it the place to some degrees. From there a Gauss-Newton fit of time, latitude and
longitude to all 21 numbers converges in a few rounds, the Moon's parallax and motion doing most of the work.

The table takes a quarter of a second to build; whoever solves more than one signature keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from nexus.core.errors import VerificationError
from nexus.memory.sky.geocentre import ROWS, Geocentre
from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.stamp import BODIES, TOLERANCE, UNITS, cosines
from nexus.memory.sky.tables import DAY_MS, END_DAY, FIRST_DAY, Floats

# Days of the table that are looked at more closely, and how: from a day before to a day after, so many times an hour.
CANDIDATES = 8
_SCAN_PER_HOUR = 1
_ROUNDS_MAX = 12
# A signature may be off by the tolerance; what is left of that after a fit may be somewhat more in a single number.
RESIDUAL_MAX = 2 * TOLERANCE
_NO_SKY = "no sky of 1900 to 2053 looks like this"

# The Moon's parallax, up to a degree, would hide the day.
_WITHOUT_MOON = [at for at, body in enumerate(BODIES) if body != "Moon"]
_FIRST, _SECOND = (np.array(side) for side in zip(*[(a, b) for a in _WITHOUT_MOON for b in _WITHOUT_MOON if a < b], strict=True))
_J2000_UNIX_S = 946_728_000.0


@dataclass(frozen=True, slots=True)
class Fix:
    """Where and when a sky is seen from. `t_ms`: milliseconds since 1970 UTC; degrees north and east.

    `residual`: what is left of the worst of the 21 numbers, in units of 1e-9.
    """

    t_ms: float
    latitude: float
    longitude: float
    residual: float


@dataclass(frozen=True, slots=True)
class SightTable:
    """`angles`: cosines between Sun and planets at the middle of every day, [days, 15] float32, from 1 January 1900 on."""

    angles: Floats

    @classmethod
    def build(cls, geocentre: Geocentre) -> Self:
        days = np.arange(FIRST_DAY, END_DAY, dtype=np.float64)
        parts = [_angles(geocentre, days[start : start + 2048] + 0.5) for start in range(0, len(days), 2048)]
        return cls(np.concatenate(parts).astype(np.float32))


def _angles(geocentre: Geocentre, days: Floats) -> Floats:
    """[n, 15] at days since 1970. A minute between UTC and TDB does not matter here."""
    seen = geocentre.directions(days * 86_400.0 - _J2000_UNIX_S)
    between: Floats = np.einsum("cpn,cpn->np", seen[:, _FIRST], seen[:, _SECOND])
    return between


def solve(signature: bytes, kernel: SkyKernel, table: SightTable) -> Fix:
    """Time and place of the 84 bytes. Raises MalformedError for what is no signature, VerificationError if no sky looks like it."""
    numbers = np.array(cosines(signature), np.float64)
    lengths = np.linalg.norm(numbers, axis=1)
    if np.abs(lengths - UNITS).max() > 2 * TOLERANCE:
        raise VerificationError(_NO_SKY, "Its numbers are no directions: were these the 84 bytes of a signature?")
    rays = numbers / lengths[:, None]
    angles = (rays[_FIRST] * rays[_SECOND]).sum(axis=1)
    best = None
    for day in _scan(kernel.geocentre, angles, _nearest(table, angles)):
        fix = _fit(kernel, numbers, day * DAY_MS, *_place(kernel, rays, day))
        if fix is not None and fix.residual <= RESIDUAL_MAX:
            return fix
        if fix is not None and (best is None or fix.residual < best.residual):
            best = fix
    left = "" if best is None else f"; the nearest is off by {best.residual * 1e-9 * 206_265:.3g} arcseconds"
    raise VerificationError(_NO_SKY + left, "It was made up, damaged, or made by another model of the sky")


def _nearest(table: SightTable, angles: Floats) -> list[float]:
    """The middles of the days, since 1970, whose angles are most like these: the best of each run of days."""
    off = ((table.angles - angles.astype(np.float32)) ** 2).sum(axis=1)
    found: list[int] = []
    for at in np.argsort(off)[: 40 * CANDIDATES].tolist():
        if all(abs(at - other) > 1 for other in found):
            found.append(at)
        if len(found) == CANDIDATES:
            break
    return [FIRST_DAY + at + 0.5 for at in found]


def _scan(geocentre: Geocentre, angles: Floats, days: list[float]) -> list[float]:
    """The best moment around each of the days, the most likely first; in days since 1970."""
    around = np.arange(-24 * _SCAN_PER_HOUR, 24 * _SCAN_PER_HOUR + 1) / (24 * _SCAN_PER_HOUR)
    times = np.clip(np.array(days)[:, None] + around, FIRST_DAY, END_DAY)
    off = ((_angles(geocentre, times.ravel()) - angles) ** 2).sum(axis=1).reshape(times.shape)
    best = off.argmin(axis=1)
    return [float(times[row, best[row]]) for row in np.argsort(off.min(axis=1))]


def _place(kernel: SkyKernel, rays: Floats, day: float) -> tuple[float, float]:
    """Latitude and longitude in degrees, to some degrees, by the attitude of the horizon among the bodies."""
    columns = kernel.columns(np.array([day * DAY_MS]))[:, 0]
    places = columns[ROWS.place].reshape(3, -1).T[_WITHOUT_MOON]
    places /= np.linalg.norm(places, axis=1)[:, None]
    left, _, right = np.linalg.svd(rays[_WITHOUT_MOON].T @ places)
    turn = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    # Rows: East, North and Up in the equator's axes. East gives the longitude even at a pole, where Up does not.
    longitude = np.arctan2(-turn[0, 0], turn[0, 1]) - columns[ROWS.spin]
    return float(np.degrees(np.arcsin(np.clip(turn[2, 2], -1, 1)))), float(np.degrees(longitude))


def _fit(kernel: SkyKernel, numbers: Floats, t_ms: float, latitude: float, longitude: float) -> Fix | None:
    """Least squares from a first guess; None where it does not settle within the times that there is a sky for."""
    steps = np.diag([500.0, 1e-4, 1e-4])  # ms, degrees, degrees
    moves = np.concatenate((np.zeros((1, 3)), steps, -steps))
    most = np.array([DAY_MS / 4, 20.0, 20.0])
    at = np.array([t_ms, latitude, longitude])
    for _ in range(_ROUNDS_MAX):
        if not (FIRST_DAY + 1e-4) * DAY_MS < at[0] < (END_DAY - 1e-4) * DAY_MS:
            at[0] = np.clip(at[0], (FIRST_DAY + 1e-3) * DAY_MS, (END_DAY - 1e-3) * DAY_MS)
        seen = kernel.vectors(*(at + moves).T).reshape(7, -1)
        slopes = (seen[1:4] - seen[4:]) / (2 * steps.diagonal())[:, None]
        step = np.linalg.lstsq(slopes.T, numbers.ravel() - seen[0], rcond=None)[0]
        at = at + np.clip(step, -most, most)
        if abs(step[0]) < 0.01 and np.abs(step[1:]).max() < 1e-7:  # ten microseconds, a centimetre
            break
    else:
        return None
    # A step may lead a little over a pole, where all goes on smoothly; the place itself is not beyond it.
    at[1] = np.clip(at[1], -90, 90)
    if not FIRST_DAY * DAY_MS <= at[0] < END_DAY * DAY_MS:
        return None
    left = numbers.ravel() - kernel.vectors(*at[:, None])[0].ravel()
    return Fix(float(at[0]), float(at[1]), float((at[2] + 180) % 360 - 180), float(np.abs(left).max()))
