"""The definition of a signature, by the library skyfield: what the fast kernel is held to, and slow."""

from __future__ import annotations

from typing import Any

import numpy as np

from nexus.memory.sky.stamp import BODIES, UNITS
from nexus.memory.sky.tables import DAY_MS, Floats, Ints

_TARGETS = {"Jupiter": "jupiter barycenter", "Saturn": "saturn barycenter"}


class SkyReference:
    """`ephemeris` and `timescale`: skyfield's own objects (`nexus.storage.sky_tables.load_sky_reference`)."""

    def __init__(self, ephemeris: Any, timescale: Any) -> None:
        self._ephemeris, self._timescale = ephemeris, timescale

    def vectors(self, t_ms: Ints | int, latitude: Floats | float, longitude: Floats | float) -> Floats:
        """[n, 7, 3] direction cosines East, North, Up in units of 1e-9, not rounded; [7, 3] for single numbers.

        Apparent and from the place itself, deflected by the Sun, Jupiter and Saturn; no refraction, no polar motion.
        """
        from skyfield.api import wgs84  # type: ignore[import-untyped]

        # Days and seconds apart: seconds counted from 1970 in one number would be read as if there had been no leap seconds.
        time = self._timescale.utc(1970, 1, 1 + t_ms // DAY_MS, 0, 0, t_ms % DAY_MS / 1000)
        place = wgs84.latlon(latitude, longitude)
        observer = (self._ephemeris["earth"] + place).at(time)
        turn = place.rotation_at(time)
        seen = []
        for body in BODIES:
            astrometric = observer.observe(self._ephemeris[_TARGETS.get(body, body.lower())])
            # Without it, skyfield leaves out the bending of light by the Earth, which steps to nothing below the horizon.
            astrometric.center_barycentric._observer_gcrs_au = None
            apparent = astrometric.apparent().xyz.au
            north, east, up = np.einsum("ij...,j...->i...", turn, apparent / np.sqrt((apparent**2).sum(axis=0)))
            seen.append((east, north, up))
        return np.moveaxis(np.array(seen) * UNITS, -1, 0) if np.ndim(t_ms) else np.array(seen) * UNITS
