"""Another library, with series and transformations of its own (ERFA's), sees the same sky. Skipped where astropy is not installed.

It is given the same ephemeris and the same UT1, and an Earth without polar motion: a signature leaves that out, which may be 0.6
arcseconds (3,000 units). What is left is 0.27 units at most, measured over 2,300 skies, for the Moon and the planets. The Sun is
another matter: astropy bends the Sun's own light as if it came from behind him, mostly by some units, by 3 arcseconds at worst.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.stamp import BODIES
from nexus.memory.sky.tables import END_MS, FIRST_MS, SkyTables, delta_t_at
from nexus.storage.sky_tables import ephemeris_file

pytest.importorskip("astropy", reason="a second opinion; install astropy and jplephem to have it")

COUNT = 60
DIFFERENCE, SUN_DIFFERENCE = 0.5, 50.0


@pytest.fixture
def still_earth() -> Any:
    """Tables of the Earth without polar motion, so that astropy's pole is the mean one."""
    from astropy.utils import iers

    class Still(iers.IERS_B):  # type: ignore[misc]
        def pm_xy(self, jd1: Any, jd2: Any = 0.0, return_status: bool = False) -> Any:
            from astropy import units

            none = np.zeros(np.shape(getattr(jd1, "jd1", jd1))) * units.arcsec
            return (none, none, np.zeros(none.shape, int)) if return_status else (none, none)

    with iers.conf.set_temp("auto_download", False), iers.earth_orientation_table.set(Still(iers.IERS_B.open())):
        yield


def test_as_astropy(kernel: SkyKernel, tables: SkyTables, still_earth: None) -> None:
    from astropy import units
    from astropy.coordinates import AltAz, EarthLocation, get_body, solar_system_ephemeris
    from astropy.time import Time

    random = np.random.default_rng(8)
    t_ms = random.integers(FIRST_MS, END_MS, COUNT)
    # From 1960 to 1972 UTC had seconds of another length: astropy knows that, and a signature's UTC does not.
    t_ms = t_ms[(t_ms < -315_619_200_000) | (t_ms > 78_796_800_000)]
    latitude, longitude = np.degrees(np.arcsin(random.uniform(-1, 1, len(t_ms)))), random.uniform(-180, 180, len(t_ms))
    leap = np.searchsorted(tables.leap_days * 86_400_000, t_ms, side="right")
    offset_s = np.where(leap > 0, tables.leap_seconds[leap - 1], tables.leap_seconds[0] - 1) + 32.184
    time = Time(t_ms // 86_400_000 + 2_440_587.5, (t_ms % 86_400_000 / 1000 + offset_s) / 86_400, format="jd", scale="tt")
    with solar_system_ephemeris.set(str(ephemeris_file())):
        # Before 1960, astropy's UTC is UT1.
        utc = time.utc
        before = ((time.jd1 - utc.jd1) + (time.jd2 - utc.jd2)) * 86_400
        tt_minus_utc_s = np.where(t_ms < 0, before, offset_s)
        time.delta_ut1_utc = tt_minus_utc_s - delta_t_at(tables, time.jd)
        here = EarthLocation.from_geodetic(longitude * units.deg, latitude * units.deg, 0 * units.m)
        found = []
        for body in BODIES:
            seen = get_body(body.lower(), time, here).transform_to(AltAz(obstime=time, location=here))
            flat = np.cos(seen.alt.rad)
            found.append((flat * np.sin(seen.az.rad), flat * np.cos(seen.az.rad), np.sin(seen.alt.rad)))
    off = np.abs(np.moveaxis(np.array(found) * 1e9, 2, 0) - kernel.vectors(t_ms.astype(np.float64), latitude, longitude))
    assert off[:, 1:].max() < DIFFERENCE
    assert np.median(off[:, 0].max(axis=1)) < SUN_DIFFERENCE
