"""Sharded decode over plain transformers: one stream, greedy, 4 stages on loopback, the same model on the same cores.

The swarm computes in the exact profile, as it does by default, and its tokens must be those of the same model in one stage.
With the float profile, beside it, they must be transformers' own. Plain transformers runs with one thread and with all cores; the
faster of the two is what the swarm is compared with.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from scripts.benchmarks import models
from scripts.benchmarks.result import Result
from scripts.benchmarks.swarm import Measured, add_model, generate, plain, swarm

STAGES = 4
GOAL = 0.8
PROFILES = ("exact", "float")


def run(rounds: int, tokens: int, quick: bool) -> Result:
    cores = os.cpu_count() or 1
    nano, nano_parts = _compare(models.endless_nano, "nano", 1, cores, rounds, tokens)
    parts: dict[str, object] = {"nano": nano_parts}
    if not quick:
        # Weights of this size do not fit the caches: every stage needs all the memory bandwidth, so all the cores.
        _, parts["135m"] = _compare(models.random_135m, "r135m", cores, cores, max(3, rounds // 3), min(tokens, 64))
    return Result("decode", nano, GOAL, "higher", parts)


def _compare(
    make: Callable[[Path], Path], name: str, threads: int, cores: int, rounds: int, tokens: int
) -> tuple[float, dict[str, object]]:
    with tempfile.TemporaryDirectory(prefix="nexus-bench-model-") as directory, ExitStack() as stack:
        path = make(Path(directory) / name)
        prompt = models.prompt_ids(path)
        ours = stack.enter_context(swarm(STAGES, threads))
        theirs = {count: stack.enter_context(plain(path, count, prompt)) for count in sorted({1, cores})}
        for profile in PROFILES:
            add_model(ours, path, f"{name}-{profile}", profile)

        def sharded(profile: str, stages: int = STAGES) -> Measured:
            return generate(ours, f"{name}-{profile}", models.PROMPT, tokens, stages)

        whole = sharded("exact", 1)
        warm = {profile: sharded(profile) for profile in PROFILES}
        first = [other.generate(tokens) for other in theirs.values()]
        best = max(theirs, key=lambda count: theirs[count].generate(tokens).tokens_per_s)
        taken = [({profile: sharded(profile) for profile in PROFILES}, theirs[best].generate(tokens)) for _ in range(rounds)]
    expected = {"exact": whole.tokens, "float": first[0].tokens}
    parts: dict[str, object] = {
        "plain_tokens_per_s": round(median(other.tokens_per_s for _, other in taken), 1),
        "plain_threads": best,
        "stage_threads": threads,
    }
    ratios = {}
    for profile in PROFILES:
        runs = [mine[profile] for mine, _ in taken]
        rate, share = median(run.tokens_per_s for run in runs), median(run.compute_share for run in runs)
        ratios[profile] = median(mine[profile].tokens_per_s / other.tokens_per_s for mine, other in taken)
        parts[profile] = {
            "ratio": round(ratios[profile], 4),
            "tokens_per_s": round(rate, 1),
            "same_tokens": all(run.tokens == expected[profile] for run in (*runs, warm[profile])),
            "ms_per_token": round(1000 / rate, 3),
            "of_it_in_the_engine_ms": round(1000 / rate * share, 3),
            "of_it_hops_and_bookkeeping_ms": round(1000 / rate * (1 - share), 3),
        }
    return ratios["exact"], parts
