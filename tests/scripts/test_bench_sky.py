"""The benchmark of the sky compares like with like: three sides over the same skies, which agree."""

from __future__ import annotations

from scripts.benchmarks.sky import measure


def test_three_sides_of_the_same_sky() -> None:
    parts = measure(rounds=2, sizes=(64,), scalars=2)
    assert set(parts) == {"batch_64"}
    part = parts["batch_64"]
    assert isinstance(part, dict)
    assert 0 < part["difference_max"] < 0.6
    # No figure to publish; but a kernel that is slower than what it stands in for has no reason to be.
    assert 0 < part["kernel_us"] < part["skyfield_vectorised_us"] < part["skyfield_scalar_us"]
    assert part["over_vectorised"] > 1
    assert part["over_scalar"] > 10
