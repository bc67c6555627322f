"""The scenario `chaos`: the same in every process, clean, and able to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexus.simulation.chaos import ALL_FAULTS, Options, World, run_seed
from nexus.simulation.plants import PLANTS
from nexus.simulation.running import failure_text

ROOT = Path(__file__).parents[2]
REGRESSIONS = Path(__file__).parent / "regressions"
SMALL = Options(nodes=8, chaos_s=15.0)
SEEDS = 12


def cases() -> list[dict[str, Any]]:
    """What was found once: a file each, with the seed, the options and what it was."""
    return [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(REGRESSIONS.glob("*.json"))]


def process(*arguments: str, hash_seed: str = "0") -> Any:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nexus_cli.main", "simulate", "chaos", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_one_seed_gives_one_trace_in_two_processes() -> None:
    """Another order of hashes in each: nothing may depend on it."""
    arguments = ("--seed", "11", "--nodes", "16", "--chaos-s", "20")
    one, two, other = (
        process(*arguments, hash_seed="1"),
        process(*arguments, hash_seed="2"),
        process("--seed", "12", *arguments[2:]),
    )
    assert one.stdout.startswith("trace ")
    assert one.stdout.split(":")[0] == two.stdout.split(":")[0]
    assert one.stdout.split(":")[0] != other.stdout.split(":")[0]


@pytest.mark.slow
def test_small_seeds_are_clean(world: World) -> None:
    verdicts = [run_seed(seed, SMALL, world) for seed in range(SEEDS)]
    assert not [failure_text(verdict, SMALL) for verdict in verdicts if not verdict.held]
    # Something went on: requests, most of them answered, and faults of every seed.
    assert sum(verdict.answered for verdict in verdicts) > 3 * SEEDS
    assert all(verdict.faults >= 6 for verdict in verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["name"]))
def test_what_was_found_once_is_not_there_again(case: dict[str, Any], world: World) -> None:
    options = Options(nodes=case["nodes"], chaos_s=case.get("chaos_s", Options().chaos_s))
    verdict = run_seed(case["seed"], options, world)
    assert verdict.held, failure_text(verdict, options)


@pytest.mark.slow
@pytest.mark.parametrize("plant", sorted(PLANTS))
def test_a_planted_bug_is_found(plant: str, world: World) -> None:
    what = PLANTS[plant]
    options = Options(what.nodes, what.faults or ALL_FAULTS, 15.0, plant, what.cheats, what.questions)
    for seed in range(100):
        verdict = run_seed(seed, options, world)
        if not verdict.held:
            assert PLANTS[plant].rule in {violation.rule for violation in verdict.violations}
            assert f"--plant {plant}" in failure_text(verdict, options)
            return
    pytest.fail(f"{plant} was not found in 100 seeds")
