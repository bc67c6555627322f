"""Signatures of the sky, thousands at a time, and the check of those that others made.

What depends on the time alone (`nexus.memory.sky.geocentre`) is smooth, so it is kept as one polynomial per column and day; all
columns of a day's blocks are then one product of two matrices. What is left per block is the observer: his place on the turning
Earth, the light time over the last 6400 km, the Sun's bending of the light, aberration, and the turn to his horizon. That is some
five hundred multiplications, done for a chunk of blocks at a time in arrays that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError
from nexus.memory.sky.geocentre import BODY_COUNT, DEFLECTION_KM, LIGHT_KM_S, ROW_COUNT, ROWS, Geocentre
from nexus.memory.sky.place import CELL_BYTES, STEP_MAX, STEP_MIN, Cell
from nexus.memory.sky.stamp import MODEL_BYTES, SKY_MODEL, STAMP_BYTES, TOLERANCE, UNITS, SkyStamp
from nexus.memory.sky.tables import DAY_MS, END_MS, FIRST_MS, Floats, Ints, SkyTables

Signatures = NDArray[np.int32]
Flags = NDArray[np.bool_]

# Terms of a day's polynomials.
TERMS = 9
# Days whose polynomials are kept: 5 KB each.
PAGES_MAX = 4096
# Polynomials are made at once for so many days. If more are new in one call, those with fewer blocks than PAGE_PAYS are computed
# one by one: what scattered days can cost stays within a factor of three.
NEW_PAGES_MAX = 64
PAGE_PAYS = TERMS // 3
CHUNK = 2048

_EARTH_KM = 6378.137
_SQUASHED = (1 - 1 / 298.257_223_563) ** 2
_SPIN_RAD_S = 7.292_115_0e-5
# Closer to the Sun's centre than 1 arcsecond, no deflection: what the definition says (skyfield, after NOVAS).
_HIDDEN = 0.999_999_999_99
# Behind the Sun's disk, or within a degree of its centre.
_BEHIND = 0.999_8


def _nodes() -> tuple[Floats, Floats]:
    """Where a day is sampled, in [-1, 1], and the matrix that turns samples into coefficients."""
    angles = math.pi * (np.arange(TERMS) + 0.5) / TERMS
    fit = 2 / TERMS * np.cos(np.outer(angles, np.arange(TERMS)))
    fit[:, 0] /= 2
    return np.cos(angles), fit


class SkyKernel:
    """Computes and checks signatures. May be used by several threads at once."""

    def __init__(self, tables: SkyTables) -> None:
        self.geocentre = Geocentre(tables)
        self._pages: dict[int, Floats] = {}
        nodes, self._fit = _nodes()
        self._node_ms = (nodes + 1) * (DAY_MS / 2)

    def signatures(self, t_ms: Ints, latitude: Floats, longitude: Floats) -> Signatures:
        """[n, 7, 3] as `stamp` lays them out, at milliseconds since 1970 UTC and degrees north and east, on the ellipsoid.

        Raises MalformedError for a time outside 1 January 1900 to 30 September 2053, or what is no place.
        """
        t_ms, latitude, longitude = _as_columns(t_ms, latitude, longitude)
        if not bool(_covered(t_ms).all()):
            raise MalformedError("a time outside 1900 to 2053, for which there is no sky")
        if not bool(_on_earth(latitude, longitude).all()):
            raise MalformedError("a latitude or longitude that is no place on the Earth")
        out = np.empty((len(t_ms), BODY_COUNT * 3), np.int32)
        for places, found in self._in_chunks(t_ms, latitude, longitude):
            out[places] = found
        return out.reshape(-1, BODY_COUNT, 3)

    def check(self, t_ms: Ints, latitude: Floats, longitude: Floats, signatures: Signatures) -> Flags:
        """Which of the signatures [n, 7, 3] are those of their times and places, to within `TOLERANCE`.

        A time without a sky or what is no place is False, not an error.
        """
        t_ms, latitude, longitude = _as_columns(t_ms, latitude, longitude)
        good = _covered(t_ms) & _on_earth(latitude, longitude)
        if not bool(good.all()):
            good[good] = self.check(t_ms[good], latitude[good], longitude[good], signatures[good])
            return good
        flat = signatures.reshape(-1, BODY_COUNT * 3)
        for places, found in self._in_chunks(t_ms, latitude, longitude):
            # As floats: a hostile number must not wrap around.
            found -= flat[places]
            good[places] = np.abs(found, out=found).max(axis=1) <= TOLERANCE
        return good

    def stamps(self, t_ms: Sequence[int], cells: Sequence[Cell]) -> list[SkyStamp]:
        """The stamps of blocks with these times and cells. Raises MalformedError as `signatures` does."""
        centres = np.array([cell.centre() for cell in cells], np.float64).reshape(-1, 2)
        made = self.signatures(np.asarray(t_ms, np.int64), centres[:, 0], centres[:, 1]).astype("<i4")
        return [SkyStamp(SKY_MODEL, cell, signature.tobytes()) for cell, signature in zip(cells, made, strict=True)]

    def check_stamps(self, t_ms: Sequence[int] | Ints, stamps: Sequence[bytes]) -> Flags:
        """Which stamps, as they stand in blocks, are whole, of this model, and the sky of their times. None raises."""
        sized = [len(stamp) == STAMP_BYTES for stamp in stamps]
        rows = np.frombuffer(
            b"".join(stamp if good else bytes(STAMP_BYTES) for stamp, good in zip(stamps, sized, strict=True)), np.uint8
        ).reshape(-1, STAMP_BYTES)
        cells_at = MODEL_BYTES + CELL_BYTES
        model = np.frombuffer(SKY_MODEL, np.uint8)
        step, row, column = np.ascontiguousarray(rows[:, MODEL_BYTES:cells_at]).view("<u2").astype(np.int64).T
        good: Flags = np.array(sized, np.bool_) & (rows[:, :MODEL_BYTES] == model).all(axis=1)
        good &= (step >= STEP_MIN) & (step <= STEP_MAX)
        step = np.maximum(step, 1)
        good &= (18_000 % step == 0) & (row < 18_000 // step) & (column < 36_000 // step)
        signatures = np.ascontiguousarray(rows[:, cells_at:]).view("<i4").reshape(-1, BODY_COUNT, 3)
        latitude, longitude = (step * (2 * row + 1) - 18_000) / 200, (step * (2 * column + 1) - 36_000) / 200
        times = np.asarray(t_ms, np.int64)
        if bool(good.all()):
            return self.check(times, latitude, longitude, signatures)
        good[good] = self.check(times[good], latitude[good], longitude[good], signatures[good])
        return good

    def vectors(self, t_ms: Floats, latitude: Floats, longitude: Floats) -> Floats:
        """[n, 7, 3] direction cosines in units of 1e-9, not rounded. Times need not be whole; all has to be within bounds."""
        seen = _seen(self.columns(t_ms), np.radians(latitude), np.radians(longitude))
        return seen.transpose(2, 1, 0)

    def columns(self, t_ms: Floats) -> Floats:
        """[ROW_COUNT, n]: the columns of `geocentre`, by the polynomials of the days, at times within bounds."""
        days = np.floor(t_ms / DAY_MS).astype(np.int64)
        order = np.argsort(days, kind="stable")
        found = np.empty((ROW_COUNT, len(days)))
        self._columns(days[order], (t_ms - days * DAY_MS)[order], self._pages_for(days), found)
        found[:, order] = found.copy()
        return found

    def _in_chunks(self, t_ms: Ints, latitude: Floats, longitude: Floats) -> Iterator[tuple[Ints, Floats]]:
        """Which of the blocks, and their rounded numbers [chunk, 21]; all blocks, a chunk at a time."""
        days = t_ms // DAY_MS
        order = np.argsort(days, kind="stable") if len(t_ms) > 1 else np.zeros(len(t_ms), np.int64)
        days, t_ms = days[order], t_ms[order]
        latitude, longitude = np.radians(latitude[order]), np.radians(longitude[order])
        pages = self._pages_for(days)
        columns = np.empty((ROW_COUNT, min(CHUNK, len(t_ms))))
        for start in range(0, len(t_ms), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(t_ms)))
            here = columns[:, : chunk.stop - start]
            self._columns(days[chunk], t_ms[chunk] - days[chunk] * DAY_MS, pages, here)
            seen = _seen(here, latitude[chunk], longitude[chunk])
            np.rint(seen, out=seen)
            yield order[chunk], seen.transpose(2, 1, 0).reshape(-1, BODY_COUNT * 3)

    def _columns(self, days: Ints, ms: Ints | Floats, pages: dict[int, Floats], out: Floats) -> None:
        """The columns for days in ascending order."""
        starts = np.flatnonzero(np.diff(days, prepend=days[0] - 1)).tolist()
        chebyshev = np.empty((TERMS, len(days)))
        x = ms * (2 / DAY_MS) - 1
        chebyshev[0] = 1
        chebyshev[1] = x
        twice = 2 * x
        for term in range(2, TERMS):
            np.multiply(twice, chebyshev[term - 1], out=chebyshev[term])
            chebyshev[term] -= chebyshev[term - 2]
        alone: list[int] = []
        for start, end in zip(starts, [*starts[1:], len(days)], strict=True):
            page = pages.get(int(days[start]))
            if page is None:
                alone.extend(range(start, end))
            else:
                np.matmul(page, chebyshev[:, start:end], out=out[:, start:end])
        if alone:
            out[:, alone] = self.geocentre.columns(days[alone], ms[alone])

    def _pages_for(self, days: Ints) -> dict[int, Floats]:
        """The polynomials of the days that have them, making those that pay."""
        wanted, counts = np.unique(days, return_counts=True)
        known = self._pages
        missing = [int(day) for day in wanted if int(day) not in known]
        if len(missing) > NEW_PAGES_MAX:
            many = {int(day) for day, count in zip(wanted, counts, strict=True) if count >= PAGE_PAYS}
            missing = [day for day in missing if day in many][:PAGES_MAX]
        if not missing:
            return known
        made = {}
        for start in range(0, len(missing), NEW_PAGES_MAX):
            made.update(self._make_pages(missing[start : start + NEW_PAGES_MAX]))
        # A new dictionary each time: whoever is at work with the old one is not disturbed.
        kept = {day: known[day] for day in list(known)[max(0, len(known) + len(made) - PAGES_MAX) :]}
        self._pages = dict(list((kept | made).items())[-PAGES_MAX:])
        return known | made

    def _make_pages(self, days: list[int]) -> dict[int, Floats]:
        repeated = np.repeat(np.array(days, np.int64), TERMS)
        values = self.geocentre.columns(repeated, np.tile(self._node_ms, len(days))).reshape(ROW_COUNT, len(days), TERMS)
        # The nodes run backwards through the day, less than half a turn of the Earth from one to the next.
        values[ROWS.spin] = np.unwrap(values[ROWS.spin], axis=1)
        made = np.matmul(values.transpose(1, 0, 2), self._fit)
        return {day: made[at].copy() for at, day in enumerate(days)}


def _as_columns(t_ms: Ints, latitude: Floats, longitude: Floats) -> tuple[Ints, Floats, Floats]:
    return (
        np.atleast_1d(np.asarray(t_ms, np.int64)),
        np.atleast_1d(np.asarray(latitude, np.float64)),
        np.atleast_1d(np.asarray(longitude, np.float64)),
    )


def _covered(t_ms: Ints) -> Flags:
    return (t_ms >= FIRST_MS) & (t_ms < END_MS)


def _on_earth(latitude: Floats, longitude: Floats) -> Flags:
    return (np.abs(latitude) <= 90) & (np.abs(longitude) <= 360)


def _seen(columns: Floats, latitude: Floats, longitude: Floats) -> Floats:
    """[3, 7, n]: East, North, Up in units of 1e-9, from the columns of the times and radians north and east."""
    n = len(latitude)
    place = columns[ROWS.place].reshape(3, BODY_COUNT, n)
    drag = columns[ROWS.drag].reshape(3, BODY_COUNT, n)
    angle = columns[ROWS.spin] + longitude
    sin_l, cos_l = np.sin(angle), np.cos(angle)
    sin_p, cos_p = np.sin(latitude), np.cos(latitude)

    # The observer, and his velocity over c.
    curvature = _EARTH_KM / np.sqrt(cos_p * cos_p + _SQUASHED * (sin_p * sin_p))
    out_km = curvature * cos_p
    here = np.empty((3, 1, n))
    np.multiply(out_km, cos_l, out=here[0, 0])
    np.multiply(out_km, sin_l, out=here[1, 0])
    np.multiply(_SQUASHED * curvature, sin_p, out=here[2, 0])
    speed = columns[ROWS.velocity].reshape(3, 1, n).copy()
    speed[0] -= (_SPIN_RAD_S / LIGHT_KM_S) * here[1]
    speed[1] += (_SPIN_RAD_S / LIGHT_KM_S) * here[0]

    # From the observer; the light comes by `later` km sooner or later than to the Earth's centre.
    ray = place - here
    work = ray * ray
    later = np.add.reduce(work, axis=0)
    np.sqrt(later, out=later)
    later -= columns[ROWS.distance]
    np.multiply(drag, later, out=work)
    ray -= work
    length = later * columns[ROWS.along]
    length += columns[ROWS.distance]
    # The Moon is so near that the line of sight from the Earth's centre will not do for her.
    moon = ray[:, 1]
    length[1] = np.sqrt(moon[0] * moon[0] + moon[1] * moon[1] + moon[2] * moon[2])
    ray /= length

    # The Sun bends the light of the planets: along the line to them by `cosine`, away from the Sun's by 1.
    sun, planets, planets_km = ray[:, :1], ray[:, 2:], length[2:]
    bend = work[:, 2:]
    np.multiply(planets, sun, out=bend)
    cosine = np.add.reduce(bend, axis=0)
    from_sun = columns[ROWS.solar_drag] * later[2:]
    np.subtract(columns[ROWS.solar], from_sun, out=from_sun)
    from_sun += length[0]
    from_sun -= planets_km * cosine
    share = planets_km / from_sun
    share *= DEFLECTION_KM / length[0]
    behind = bool(cosine.max() > _BEHIND)
    if behind:
        share[cosine > _HIDDEN] = 0
    planets *= 1 + share * cosine
    np.multiply(sun, share, out=bend)
    planets -= bend
    if behind:
        # Bent so far that the square counts: the ray is longer than 1 again.
        planets /= np.sqrt(planets[0] * planets[0] + planets[1] * planets[1] + planets[2] * planets[2])

    # Aberration, exactly.
    slow = np.sqrt(1 - np.add.reduce(speed * speed, axis=0))
    np.multiply(ray, speed, out=work)
    ahead = np.add.reduce(work, axis=0)
    scale = UNITS / (1 + ahead)
    ahead /= 1 + slow
    ahead += 1
    ahead *= scale
    scale *= slow
    ray *= scale
    np.multiply(speed, ahead, out=work)
    ray += work

    # To the horizon.
    x, y, z = ray
    seen = work
    np.multiply(x, cos_l, out=seen[2])
    outward = seen[2]
    outward += y * sin_l
    np.multiply(y, cos_l, out=seen[0])
    seen[0] -= x * sin_l
    np.multiply(z, cos_p, out=seen[1])
    seen[1] -= outward * sin_p
    outward *= cos_p
    outward += z * sin_p
    return seen
