"""The cost of receipts: sharded decode with them over the same without, on nano, where they weigh the most."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from scripts.benchmarks import models
from scripts.benchmarks.result import Result
from scripts.benchmarks.swarm import add_model, generate, swarm

STAGES = 4
GOAL = 0.97


def run(rounds: int, tokens: int, quick: bool) -> Result:
    rounds = rounds if quick else max(rounds, 15)
    with tempfile.TemporaryDirectory(prefix="nexus-bench-model-") as directory, swarm(STAGES, 1) as daemon:
        add_model(daemon, models.endless_nano(Path(directory) / "nano"), "nano")

        def once(receipts: bool) -> float:
            return generate(daemon, "nano", models.PROMPT, tokens, STAGES, receipts).tokens_per_s

        for receipts in (True, False):
            once(receipts)
        ratios, on_rates, off_rates = [], [], []
        for number in range(rounds):
            # Who goes first changes from round to round, so that a drift of the machine favours neither.
            first = number % 2 == 0
            rates = {first: once(first)}
            rates[not first] = once(not first)
            on_rates.append(rates[True])
            off_rates.append(rates[False])
            ratios.append(rates[True] / rates[False])
    return Result(
        "receipts",
        median(ratios),
        GOAL,
        "higher",
        {
            "on_tokens_per_s": round(median(on_rates), 1),
            "off_tokens_per_s": round(median(off_rates), 1),
            "rounds": rounds,
            "ratios": [round(ratio, 4) for ratio in ratios],
        },
    )
