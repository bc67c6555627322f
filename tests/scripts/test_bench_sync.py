"""The benchmark of reconciliation counts what goes over the wire, and only sessions that found every difference."""

from __future__ import annotations

import argparse

from scripts.benchmarks import sync


def test_it_counts_every_kind_of_difference() -> None:
    result = sync.run(argparse.Namespace(blocks=12_000, rounds=1, quick=True)).as_dict()
    parts = result["parts"]
    assert isinstance(parts, dict)
    assert set(parts) > set(sync.SPREADS)
    for name in sync.SPREADS:
        assert parts[name]["need"] == parts[name]["have"] == sync.DIFFERENCES // 2
        # The ids that are lacking here have to come over in any case.
        assert parts[name]["bytes"] > 32 * sync.DIFFERENCES // 2
        assert parts[name]["trips"] <= 3
    assert parts["equal"]["trips"] == 1
    assert parts["recent"]["bytes"] < parts["scattered"]["bytes"]
    assert result["ratio"] == round(parts["recent"]["bytes"] / (12_000 * 32), 4)
