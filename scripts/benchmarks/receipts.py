"""The cost of receipts: sharded decode with them over the same without, on nano, where they weigh the most."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median, quantiles

from scripts.benchmarks import models
from scripts.benchmarks.result import Result
from scripts.benchmarks.swarm import add_model, generate, swarm

STAGES = 4
GOAL = 0.97
ROUNDS_MIN = 41
TOKENS_MAX = 65


def run(rounds: int, tokens: int, quick: bool) -> Result:
    # A few per cent are less than a noisy machine wavers from second to second: many short rounds, close together.
    rounds, tokens = (rounds, tokens) if quick else (max(rounds, ROUNDS_MIN), min(tokens, TOKENS_MAX))
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
            "quartiles": [round(quartile, 4) for quartile in quantiles(ratios, n=4)],
        },
    )
