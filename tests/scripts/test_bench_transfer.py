"""The benchmark of transfers moves real bytes between real processes, the way that it says."""

from __future__ import annotations

import argparse

from scripts.benchmarks import transfer


def test_it_measures_every_part() -> None:
    result = transfer.run(argparse.Namespace(megabytes=1024, rounds=9, cap=32, quick=True)).as_dict()
    parts = result["parts"]
    assert isinstance(parts, dict)
    assert result["ratio"] > 0
    assert set(parts["megabytes_per_s"]) == set(transfer.SIDES)
    resumed = parts["resumed"]
    assert resumed["met"]
    assert resumed["twice"] == 0
    assert 0 < resumed["here_after_the_kill"] < resumed["chunks"]
    assert resumed["here_after_the_kill"] + resumed["fetched_after_it"] <= resumed["chunks"]
    assert parts["three_sources"]["megabytes_per_s"]["1"] < 1.5 * parts["three_sources"]["cap_megabytes_per_s"]
    assert parts["peak_growth_bytes"]["receiver"] < transfer.GROWTH_GOAL_BYTES
