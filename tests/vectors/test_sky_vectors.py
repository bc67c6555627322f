"""The skies of `sky.json` hold, and each is the sky of no other time."""

from __future__ import annotations

import json

import numpy as np

from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import SKY_MODEL, SkyStamp, cosines
from nexus.storage.sky_tables import load_sky_kernel, load_sky_reference
from tests.vectors.make_sky import CASES, FILE

VECTORS = json.loads(FILE.read_text("utf-8"))
STAMPS = [bytes.fromhex(sky["stamp"]) for sky in VECTORS["skies"]]


def test_the_kernel_takes_them() -> None:
    assert VECTORS["model"] == SKY_MODEL.hex()
    times = [sky["t_ms"] for sky in VECTORS["skies"]]
    kernel = load_sky_kernel()
    assert kernel.check_stamps(times, STAMPS).all()
    # Twelve of one kind and none of the other; the first moment has none before it, the last none after it.
    assert not kernel.check_stamps([t_ms + 1 for t_ms in times], STAMPS).any()
    assert not kernel.check_stamps([t_ms - 1 for t_ms in times], STAMPS).any()


def test_they_are_what_they_say() -> None:
    reference = load_sky_reference()
    assert [(sky["t_ms"], SkyStamp.from_bytes(stamp).cell) for sky, stamp in zip(VECTORS["skies"], STAMPS, strict=True)] == list(
        CASES
    )
    for sky, data in zip(VECTORS["skies"], STAMPS, strict=True):
        stamp = SkyStamp.from_bytes(data)
        assert stamp.cell == Cell.of(sky["latitude"], sky["longitude"], stamp.cell.step)
        assert stamp.cell.centre() == (sky["latitude"], sky["longitude"])
        expected = reference.vectors(sky["t_ms"], sky["latitude"], sky["longitude"])
        assert np.abs(np.array(cosines(stamp.signature)) - expected).max() < 0.51
