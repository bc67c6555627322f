"""Sharded decode over plain transformers: one stream, greedy, 4 stages on loopback, the same model on the same cores.

Plain transformers runs with one thread and with all cores; the faster of the two is what the swarm is compared with.
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
        add_model(ours, path, name)
        theirs = {count: stack.enter_context(plain(path, count, prompt)) for count in sorted({1, cores})}

        def sharded() -> Measured:
            return generate(ours, name, models.PROMPT, tokens, STAGES)

        warm = [sharded(), *(other.generate(tokens) for other in theirs.values())]
        best = max(theirs, key=lambda count: theirs[count].generate(tokens).tokens_per_s)
        pairs = [(sharded(), theirs[best].generate(tokens)) for _ in range(rounds)]
    same = all(one.tokens == warm[1].tokens for one in warm) and all(a.tokens == b.tokens for a, b in pairs)
    rate, plain_rate = median(a.tokens_per_s for a, _ in pairs), median(b.tokens_per_s for _, b in pairs)
    share = median(a.compute_share for a, _ in pairs)
    return median(a.tokens_per_s / b.tokens_per_s for a, b in pairs), {
        "ratio": round(median(a.tokens_per_s / b.tokens_per_s for a, b in pairs), 4),
        "sharded_tokens_per_s": round(rate, 1),
        "plain_tokens_per_s": round(plain_rate, 1),
        "plain_threads": best,
        "stage_threads": threads,
        "same_tokens": same,
        "sharded_ms_per_token": round(1000 / rate, 3),
        "of_it_in_the_engine_ms": round(1000 / rate * share, 3),
        "of_it_hops_and_bookkeeping_ms": round(1000 / rate * (1 - share), 3),
    }
