"""`scripts/simulate byzantine`, small: the same table for the same seed, every cheat found, no honest node harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--nodes", "60", "--requests", "260", "--probation", "3", "--rate", "0.3")


@cache
def simulate(*arguments: str, run: int = 0) -> str:
    """What one process of its own prints. `run` tells runs of the same arguments apart."""
    # Another order of hashes in every process: nothing may depend on it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(run)}
    command = [sys.executable, "-m", "scripts.simulations", "byzantine", *SMALL, *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    return done.stdout


def report(*arguments: str) -> Any:
    return json.loads(simulate(*arguments))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_in_two_processes() -> None:
    assert simulate("--seed", "5") == simulate("--seed", "5", run=1)
    assert simulate("--seed", "5") != simulate("--seed", "6")


PROOFS = {
    "requantised-weights": ["OP"],
    "random-output": ["OP"],
    "one-bit": ["OP"],
    "forged-trace": ["OP"],
    "rewritten-log": ["KV"],
    "equivocation": ["EQUIVOCATION"],
    "broken-chain": ["CHAIN"],
    "double-spender": ["FORK"],
}


@pytest.mark.slow
def test_cheaters_are_convicted_by_the_proof_of_their_kind() -> None:
    strategies = {row["strategy"]: row for row in report("--seed", "5")["strategies"]}
    assert {name: strategies[name]["proof"] for name in PROOFS} == PROOFS
    assert all(strategies[name]["state"] == ["slashed"] for name in PROOFS)


@pytest.mark.slow
def test_who_only_keeps_silent_is_demoted_and_nobody_else_is_punished_without_proof() -> None:
    strategies = {row["strategy"]: row for row in report("--seed", "5")["strategies"]}
    assert strategies["withheld-trace"]["proof"] == []
    assert strategies["withheld-trace"]["convicted"] == 0
    assert "slashed" not in strategies["withheld-trace"]["state"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--seed", "5"), ("--seed", "6"), ("--seed", "5", "--dual")])
def test_no_honest_node_is_harmed_and_no_credit_is_made_or_lost(arguments: tuple[str, ...]) -> None:
    summary = report(*arguments)["summary"]
    assert (summary["honest_slashed"], summary["honest_harmed"], summary["ledger_sum"]) == (0, 0, 0)
    assert summary["accusations_believed"] == 0
    assert summary["slashed_sets_equal"]
    assert summary["answered"] > 0.98 * summary["requests"]


@pytest.mark.slow
def test_false_accusations_are_made_and_none_is_believed() -> None:
    summary = report("--seed", "5")["summary"]
    assert summary["accusations"] > 20
    assert summary["accusations_believed"] == 0


@pytest.mark.slow
def test_two_runs_that_are_compared_let_no_wrong_answer_through() -> None:
    summary = report("--seed", "5", "--dual")["summary"]
    assert summary["wrong_before"] + summary["wrong_after"] == 0


@pytest.mark.slow
def test_without_audits_the_same_cheats_get_through() -> None:
    """The simulation can fail: what keeps wrong answers out is the audits."""
    unaudited = report("--seed", "5", "--rate", "0", "--probation", "0")["summary"]
    assert unaudited["wrong_after"] > 20
    assert unaudited["changers_evicted"] < unaudited["changers"]
