"""The tables of the sky, read from the packages skyfield and skyfield-data."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nexus.core.errors import LocalError
from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.reference import SkyReference
from nexus.memory.sky.tables import SEGMENTS, Segment, SkyTables, check_model

EPHEMERIS = "de421.bsp"
_FIX = "Install the versions of skyfield, skyfield-data and jplephem that constraints.txt names"


def ephemeris_file() -> Path:
    """The ephemeris in the package skyfield-data. Raises LocalError if it is not there."""
    # Asking the package itself warns that its file of the Earth's orientation is old; that file is not used.
    spec = find_spec("skyfield_data")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        path = Path(place) / "data" / EPHEMERIS
        if path.is_file():
            return path
    raise LocalError(f"there is no ephemeris {EPHEMERIS} on this machine", _FIX)


@cache
def load_sky_tables() -> SkyTables:
    """The tables of the one sky model (`SKY_MODEL`), read once. Raises LocalError if they are not installed, or others are."""
    path = ephemeris_file()
    try:
        tables = _read(path)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise LocalError(f"cannot read the tables of the sky: {error}", _FIX) from error
    check_model(tables)
    return tables


@cache
def load_sky_kernel() -> SkyKernel:
    """The kernel over these tables, with what it has kept so far. Raises LocalError as `load_sky_tables` does."""
    return SkyKernel(load_sky_tables())


@cache
def load_sky_reference() -> SkyReference:
    """The same sky by skyfield itself. Raises LocalError."""
    from skyfield.iokit import Loader  # type: ignore[import-untyped]

    load_sky_tables()
    loader = Loader(str(ephemeris_file().parent), verbose=False, expire=False)
    return SkyReference(loader(EPHEMERIS), loader.timescale(builtin=True))


def _read(path: Path) -> SkyTables:
    from jplephem.spk import SPK  # type: ignore[import-untyped]
    from skyfield.iokit import Loader

    scale = Loader(str(path.parent), verbose=False, expire=False).timescale(builtin=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    kernel = SPK.open(str(path))
    try:
        segments = {pair: _segment(kernel, pair) for pair in SEGMENTS}
    finally:
        kernel.close()
    days, seconds = scale.delta_t_table
    return SkyTables(
        ephemeris_hash=digest,
        segments=segments,
        delta_t_days=np.array(days, np.float64),
        delta_t=np.array(seconds, np.float64),
        delta_t_splines=np.array(scale.delta_t_function.long_term_function.table, np.float64),
        leap_days=np.rint(np.array(scale.leap_dates) - 2_440_587.5).astype(np.int64),
        leap_seconds=np.rint(np.array(scale.leap_offsets)).astype(np.int64),
    )


def _segment(kernel: Any, pair: tuple[int, int]) -> Segment:
    start, length, coefficients = kernel[pair].load_array()  # days; [3, intervals, terms], lowest term first
    return Segment(
        round((start - 2_451_545.0) * 86_400),
        round(length * 86_400),
        np.ascontiguousarray(np.transpose(coefficients, (1, 2, 0)), dtype=np.float64),
    )
