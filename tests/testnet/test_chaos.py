"""The short form of scripts/chaos: real daemons killed, stopped, drained and restarted while they answer, and not a token lost."""

from __future__ import annotations

import os

import pytest

from scripts.chaos_runs.__main__ import run
from scripts.chaos_runs.faults import KINDS

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("NEXUS_TEST_SEED", "1"))
MINUTES = 40 / 60


def test_every_answer_is_the_undisturbed_one_whatever_becomes_of_the_other_nodes() -> None:
    report = run(SEED, MINUTES, nodes=5, streams=4, stages=3, together=2, keep=None)
    assert report.held, report.as_text()
    assert set(report.faults) <= set(KINDS)
    assert sum(report.faults.values()) >= 4
    assert report.failovers > 0, report.as_text()
