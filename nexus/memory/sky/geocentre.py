"""The sky of the Earth's centre: everything about a signature that depends on the time alone.

Positions and velocities come from the ephemeris, precession and nutation from skyfield's series (IAU 2006 and 2000A), the Earth's
rotation from the tables of delta T. Everything is turned into the true equator of date, where an observer's own place is a matter
of one angle. `nexus.memory.sky.kernel` keeps these columns as polynomials, a day at a time, and adds the observer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nexus.memory.sky.tables import (
    EARTH,
    EARTH_MOON,
    JUPITER,
    MARS,
    MERCURY,
    MOON,
    SATURN,
    SUN,
    VENUS,
    Floats,
    Ints,
    Segment,
    SkyTables,
    delta_t_at,
)

LIGHT_KM_S = 299_792.458
# Twice the Sun's gravity over the square of the speed of light, km: what deflection of light is measured in.
DEFLECTION_KM = 2 * 1.327_124_400_179_87e11 / LIGHT_KM_S**2
JUPITER_MASSES = 1047.3486  # the Sun's mass in masses of Jupiter
_ARCSECOND = math.pi / 180 / 3600
_DAY_S = 86_400.0
_CENTURY_DAYS = 36_525.0
_J2000_UNIX_DAYS = 10_957.5
_J2000_JD = 2_451_545.0
_TT_FROM_TAI_S = 32.184

# The rows of the columns. Vectors: row = component * 7 + body.
BODY_COUNT, PLANETS = 7, 5
_PLANETS_AT = slice(2, 7)


class Rows(NamedTuple):
    """Which rows hold what, all in km and km/s in the true equator of date, for light that arrives at the Earth's centre.

    place: body from the Earth's centre, [3, 7]. drag: the body's velocity v over (c + v's part along the line of sight), [3, 7].
    distance: [7]. along: 1 - drag along the line of sight, [7]. solar: planet's distance from the Sun, [5]; solar_drag: its drag
    less the Sun's along the line between them, [5]. velocity: of the Earth's centre over c, [3]. spin: apparent sidereal time of
    Greenwich, radians.
    """

    place: slice = slice(0, 21)
    drag: slice = slice(21, 42)
    distance: slice = slice(42, 49)
    along: slice = slice(49, 56)
    solar: slice = slice(56, 61)
    solar_drag: slice = slice(61, 66)
    velocity: slice = slice(66, 69)
    spin: int = 69


ROWS = Rows()
ROW_COUNT = 70

# Nutation is kept on a grid of half days, in pages of 16 days, and taken from it by six points.
_GRID_DAYS, _PAGE = 0.5, 32
_POINTS = np.arange(-2, 4)


def _dot(a: Floats, b: Floats) -> Floats:
    product: Floats = np.einsum("c...,c...->...", a, b)
    return product


class Geocentre:
    """The columns at any time that the tables cover. Keeps pages of nutation: 1 KB for 16 days, 4 MB for all there are."""

    def __init__(self, tables: SkyTables) -> None:
        self._tables = tables
        self._nutation: dict[int, Floats] = {}

    def columns(self, days: Ints, ms: Ints | Floats) -> Floats:
        """[ROW_COUNT, n] at days since 1970 and milliseconds of the day, UTC. The spin is in [0, 2 pi)."""
        tables = self._tables
        leap = np.searchsorted(tables.leap_days, days, side="right")
        # Before there were leap seconds, UTC kept what it had when they began.
        tai_s = np.where(leap > 0, tables.leap_seconds[leap - 1], tables.leap_seconds[0] - 1)
        tt_s = ms / 1000 + tai_s + _TT_FROM_TAI_S
        whole = days - _J2000_UNIX_DAYS
        tt = whole + tt_s / _DAY_S
        tdb_s = tt_s + _tdb_from_tt_s(tt / _CENTURY_DAYS)
        ut_days = (tt_s - delta_t_at(tables, tt + _J2000_JD)) / _DAY_S
        turn, spin = self._turn(tt, whole + tdb_s / _DAY_S, whole, ut_days)

        # Seconds from J2000 in two parts: in one, the last bit is worth a microsecond, and that is 3 cm of the Moon's way.
        place, velocity, earth_velocity, from_sun = self._bodies(whole * _DAY_S, tdb_s)
        distance = np.sqrt(_dot(place, place))
        toward = place / distance
        drag = velocity / (LIGHT_KM_S + _dot(velocity, toward))
        solar = np.sqrt(_dot(from_sun, from_sun))
        out = np.empty((ROW_COUNT, len(days)))
        out[ROWS.along] = 1 - _dot(drag, toward)
        out[ROWS.solar_drag] = _dot(drag[:, _PLANETS_AT] - drag[:, :1], from_sun / solar)
        out[ROWS.distance] = distance
        out[ROWS.solar] = solar
        place[:, 6] += _bent_by_jupiter(place, distance)
        out[ROWS.place] = np.einsum("ijn,jbn->ibn", turn, place).reshape(21, -1)
        out[ROWS.drag] = np.einsum("ijn,jbn->ibn", turn, drag).reshape(21, -1)
        out[ROWS.velocity] = np.einsum("ijn,jn->in", turn, earth_velocity / LIGHT_KM_S)
        out[ROWS.spin] = spin
        return out

    def directions(self, tdb_s: Floats) -> Floats:
        """[3, 7, n]: where the bodies seem to stand from the Earth's centre, at seconds from J2000 TDB, in the ephemeris' own axes.

        Without deflection: for where angles to some milliarcseconds will do.
        """
        place, _, earth_velocity, _ = self._bodies(np.zeros_like(tdb_s), tdb_s)
        place /= np.sqrt(_dot(place, place))
        speed = earth_velocity[:, None] / LIGHT_KM_S
        ahead = _dot(place, speed)
        slow = np.sqrt(1 - _dot(speed, speed))
        seen: Floats = (place * slow + speed * (1 + ahead / (1 + slow))) / (1 + ahead)
        return seen

    def _bodies(self, base_s: Floats, tdb_s: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Body from Earth [3, 7, n] and its velocity, when the light left it; the Earth's velocity; planet from Sun [3, 5, n]."""
        segments = self._tables.segments
        centre, centre_v = _series(segments[0, EARTH_MOON], base_s, tdb_s)
        earth, earth_v = _series(segments[EARTH_MOON, EARTH], base_s, tdb_s)
        earth += centre
        earth_v += centre_v
        place = np.empty((3, BODY_COUNT, len(tdb_s)))
        velocity = np.empty_like(place)
        for at, body in enumerate((SUN, MOON, MERCURY, VENUS, MARS, JUPITER, SATURN)):

            def where(time_s: Floats, body: int = body) -> tuple[Floats, Floats]:
                if body != MOON:
                    return _series(segments[0, body], base_s, time_s)
                barycentre, barycentre_v = _series(segments[0, EARTH_MOON], base_s, time_s)
                moon, moon_v = _series(segments[EARTH_MOON, MOON], base_s, time_s)
                return barycentre + moon, barycentre_v + moon_v

            # Light that left the body `delay` ago arrives now. First along the present velocity, then from where it was.
            position, speed = where(tdb_s)
            gap = position - earth
            delay = np.sqrt(_dot(gap, gap)) / LIGHT_KM_S
            for _ in range(3):
                gap = position - speed * delay - earth
                delay = np.sqrt(_dot(gap, gap)) / LIGHT_KM_S
            position, speed = where(tdb_s - delay)
            gap = position - earth
            length = np.sqrt(_dot(gap, gap))
            late = (length - LIGHT_KM_S * delay) / (LIGHT_KM_S + _dot(speed, gap) / length)
            place[:, at] = gap - speed * late
            velocity[:, at] = speed
        return place, velocity, earth_v, place[:, _PLANETS_AT] - place[:, :1]

    def _turn(self, tt: Floats, tdb: Floats, whole: Floats, ut_days: Floats) -> tuple[Floats, Floats]:
        """From the ephemeris' axes to the true equator of date [3, 3, n], and the spin [n]. Days from J2000."""
        from skyfield.framelib import ICRS_to_J2000  # type: ignore[import-untyped]
        from skyfield.nutationlib import build_nutation_matrix, mean_obliquity  # type: ignore[import-untyped]
        from skyfield.precessionlib import compute_precession  # type: ignore[import-untyped]

        in_longitude, in_obliquity, complementary = self._nutation_at(tt)
        julian = tdb + _J2000_JD
        mean = mean_obliquity(julian) * _ARCSECOND
        nutation = build_nutation_matrix(mean, mean + in_obliquity, in_longitude)
        precession = compute_precession(julian)
        turn = np.einsum("ijn,jkn,kl->iln", nutation, precession, ICRS_to_J2000, optimize=True)
        # Rotation angle of the Earth (IAU 2000), then the precession in right ascension and the equation of the equinoxes.
        angle = 0.779_057_273_264 + 0.002_737_811_911_354_48 * (whole + ut_days) + (ut_days + 0.5) % 1.0
        t = tdb / _CENTURY_DAYS
        seconds = (((-0.000_000_036_8 * t - 0.000_029_956) * t - 0.000_000_44) * t + 1.391_581_7) * t + 4_612.156_534
        spin = math.tau * (angle % 1.0) + (0.014_506 + seconds * t) * _ARCSECOND
        return turn, (spin + in_longitude * np.cos(mean) + complementary) % math.tau

    def _nutation_at(self, tt: Floats) -> Floats:
        """[3, n]: nutation in longitude and in obliquity, complementary terms of the equation of the equinoxes; radians."""
        steps = tt / _GRID_DAYS
        index = np.floor(steps).astype(np.int64)
        along = steps - index
        weights = np.ones((len(_POINTS), len(tt)))
        for row, point in enumerate(_POINTS):
            for other in _POINTS[point != _POINTS]:
                weights[row] *= (along - other) / (point - other)
        out = np.empty((3, len(tt)))
        pages = index // _PAGE
        for page in np.unique(pages):
            here = np.flatnonzero(pages == page)
            at = (index[here] - page * _PAGE - _POINTS[0]) + _POINTS[:, None]
            out[:, here] = np.einsum("ckn,kn->cn", self._nutation_page(int(page))[:, at], weights[:, here])
        return out

    def _nutation_page(self, page: int) -> Floats:
        found = self._nutation.get(page)
        if found is None:
            from skyfield.nutationlib import equation_of_the_equinoxes_complimentary_terms, iau2000a

            julian = _J2000_JD + (page * _PAGE + np.arange(_POINTS[0], _PAGE + _POINTS[-1])) * _GRID_DAYS
            in_longitude, in_obliquity = iau2000a(julian)
            tenth_us = 1e-7 * _ARCSECOND
            complementary = equation_of_the_equinoxes_complimentary_terms(julian)
            found = np.stack((in_longitude * tenth_us, in_obliquity * tenth_us, complementary))
            self._nutation[page] = found
        return found


def _series(segment: Segment, base_s: Floats, tdb_s: Floats) -> tuple[Floats, Floats]:
    """Position [3, n] in km and velocity in km/s at base + tdb seconds from J2000 TDB, the base in whole seconds."""
    since = base_s - segment.start
    interval = np.floor((since + tdb_s) / segment.length).astype(np.int64)
    x = ((since - interval * segment.length) + tdb_s) * (2 / segment.length) - 1
    coefficients = segment.coefficients[interval]  # [n, terms, 3]
    terms = coefficients.shape[1]
    values = np.empty((2, terms, len(tdb_s)))  # Chebyshev polynomials and their derivatives
    values[0, 0], values[0, 1], values[1, 0], values[1, 1] = 1, x, 0, 1
    for term in range(2, terms):
        values[0, term] = 2 * x * values[0, term - 1] - values[0, term - 2]
        values[1, term] = 2 * x * values[1, term - 1] + 2 * values[0, term - 1] - values[1, term - 2]
    both = np.matmul(values.transpose(2, 0, 1), coefficients)  # [n, 2, 3]
    return np.ascontiguousarray(both[:, 0].T), both[:, 1].T * (2 / segment.length)


def _bent_by_jupiter(place: Floats, distance: Floats) -> Floats:
    """How far Jupiter's gravity moves Saturn [3, n], km. The one pair of planets where this counts: Saturn is never in front."""
    toward, away = place[:, 5] / distance[5], place[:, 6] / distance[6]
    between = place[:, 6] - place[:, 5]
    cosine = _dot(toward, away)
    strength = DEFLECTION_KM / JUPITER_MASSES / distance[5]
    share = distance[6] / (np.sqrt(_dot(between, between)) + distance[5] - distance[6] * cosine)
    moved: Floats = strength * share * distance[6] * (cosine * away - toward)
    return moved


def _tdb_from_tt_s(centuries: Floats) -> Floats:
    """TDB - TT in seconds (USNO Circular 179, equation 2.6)."""
    t = centuries
    seconds: Floats = (
        0.001657 * np.sin(628.3076 * t + 6.2401)
        + 0.000022 * np.sin(575.3385 * t + 4.2970)
        + 0.000014 * np.sin(1256.6152 * t + 6.1969)
        + 0.000005 * np.sin(606.9777 * t + 4.0212)
        + 0.000005 * np.sin(52.9691 * t + 0.4444)
        + 0.000002 * np.sin(21.3299 * t + 5.5431)
        + 0.000010 * t * np.sin(628.3076 * t + 4.2490)
    )
    return seconds
