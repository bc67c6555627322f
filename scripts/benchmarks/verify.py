"""What verification costs: proving over not proving, auditing over the decode that is audited, all on the exact profile.

One process holds one stage with all layers of a model. Both sides of a ratio are timed in turn in that process, token by token
where they are sessions, so that a drift of the machine meets both; a ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scripts.benchmarks import models
from scripts.benchmarks.engine_child import Child
from scripts.benchmarks.result import Result

PROVER_GOAL = 0.06
REPLICA_GOAL = 0.04
CELL_GOAL = 0.02
# What the design aims at in the end: told beside the measurement.
PROVER_TARGET = 0.03
PROMPT_TOKENS = 16
CELL_CHECKS = 50
DEFAULT_SHAPES = ("1b", "135m", "nano")
QUICK_SHAPES = ("nano",)

Part = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(("nano", *models.SHAPES))
    parser.add_argument("--shapes", help=f"any of {known}; the first leads [default: {','.join(DEFAULT_SHAPES)}; quick: nano]")
    parser.add_argument("--threads", type=int, default=1, help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per ratio; the median counts [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded per round [default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    shapes: Sequence[str] = options.shapes.split(",") if options.shapes else QUICK_SHAPES if options.quick else DEFAULT_SHAPES
    unknown = set(shapes) - {"nano", *models.SHAPES}
    if unknown:
        raise SystemExit(f"unknown shapes: {', '.join(sorted(unknown))}; known are nano, {', '.join(models.SHAPES)}")
    rounds, tokens = (min(options.rounds, 2), min(options.tokens, 48)) if options.quick else (options.rounds, options.tokens)
    measured = {name: _measure(name, options.threads, rounds, tokens) for name in shapes}
    lead: Any = measured[shapes[0]]["prover_overhead"]
    parts: Part = {"profile": "exact", "threads": options.threads, "rounds": rounds, "tokens": tokens}
    return Result("verify", lead["ratio"], PROVER_GOAL, "lower", parts | measured)


def _measure(name: str, threads: int, rounds: int, tokens: int) -> Part:
    from scripts.benchmarks import engine_store

    with tempfile.TemporaryDirectory(prefix="nexus-bench-verify-") as text:
        directory = Path(text)
        print(f"{name}: making and converting the model", file=sys.stderr, flush=True)
        source = directory / "model"
        source = models.endless_nano(source) if name == "nano" else models.random_llama(source, models.SHAPES[name])
        manifest = engine_store.add(source, directory / "store", "exact")
        prompt: list[int] = np.random.default_rng(1).integers(0, manifest.vocab_size, PROMPT_TOKENS).tolist()
        with Child("scripts.benchmarks.verify_child", directory / "store", threads=threads) as side:
            print(f"{name}: proving, replaying, checking cells", file=sys.stderr, flush=True)
            side.ask("overhead", prompt=prompt, tokens=4)
            overhead = [side.ask("overhead", prompt=prompt, tokens=tokens + 1) for _ in range(rounds)]
            audits = [side.ask("audit", prompt=prompt, tokens=tokens) for _ in range(rounds)]
            cells = [side.ask("cell", prompt=prompt, repeats=CELL_CHECKS) for _ in range(rounds)]
            described = side.ask("describe")
    wrong = [what for what, right in _verdicts(overhead, audits, cells).items() if not right]
    if wrong:
        raise RuntimeError(f"{name}: {', '.join(wrong)}: nothing of this run is worth a figure")
    return {
        "kernel": described["kernel"],
        "prover_overhead": summary(overhead, PROVER_GOAL) | {"target": PROVER_TARGET},
        "replica_audit_over_decode": summary(audits, REPLICA_GOAL),
        "freivalds_cell_over_its_products": summary(cells, CELL_GOAL),
    }


def _verdicts(
    overhead: Sequence[Mapping[str, Any]], audits: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> dict[str, bool]:
    return {
        "proving changed the tokens": all(one["same_tokens"] for one in overhead),
        "the replay differs from the session": all(one["same"] for one in audits),
        "a right product failed its check": all(one["right"] for one in cells),
    }


def summary(answers: Sequence[Mapping[str, Any]], goal: float) -> Part:
    """The medians of all figures of the rounds, and whether the ratio's meets its goal."""
    figures = {
        name: round(median(one[name] for one in answers), 4) for name in answers[0] if not isinstance(answers[0][name], bool)
    }
    ratio = figures.pop("ratio")
    return {"ratio": ratio, "goal": goal, "better": "lower", "met": ratio <= goal, **figures}
