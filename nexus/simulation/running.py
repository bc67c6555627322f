"""Many seeds, side by side, and what is printed of them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from nexus.simulation.chaos import Options, Verdict, World, ram_directory, run_seed
from nexus.simulation.model import make_model

SHOWN_MAX = 6


@dataclass
class Summary:
    """`failed`: verdicts of seeds in which something did not hold, as they came."""

    seeds: int = 0
    asked: int = 0
    answered: int = 0
    faults: int = 0
    events: int = 0
    virtual_s: float = 0.0
    took_s: float = 0.0
    failed: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.seeds += 1
        self.asked += verdict.asked
        self.answered += verdict.answered
        self.faults += verdict.faults
        self.events += verdict.events
        self.virtual_s += verdict.virtual_s
        if not verdict.held:
            self.failed.append(verdict)


_world: World | None = None


def _open_world(root: Path) -> None:
    global _world
    _world = World(root, root / f"nodes-{os.getpid()}")


def _run(seed: int, options: Options) -> Verdict:
    assert _world is not None
    return run_seed(seed, options, _world)


def run_many(
    seeds: Iterable[int],
    options: Options,
    jobs: int,
    tell: Callable[[Verdict], None],
    *,
    until_s: float | None = None,
    stop_at_failure: bool = False,
) -> Summary:
    """Run seeds in `jobs` processes; `tell` hears of each as it ends, in no order. `until_s`: no new seed is begun once it took
    so long. `stop_at_failure`: nor after the first in which something did not hold."""
    summary, began_s = Summary(), time.monotonic()
    root = ram_directory()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products: threads would only wait for each other
    try:
        for verdict in _verdicts(iter(seeds), options, jobs, root, until_s and began_s + until_s):
            summary.add(verdict)
            tell(verdict)
            if stop_at_failure and not verdict.held:
                break
    finally:
        shutil.rmtree(root, ignore_errors=True)
    summary.took_s = time.monotonic() - began_s
    return summary


def _verdicts(seeds: Iterator[int], options: Options, jobs: int, root: Path, due_s: float | None) -> Iterator[Verdict]:
    if jobs == 1:
        world = World(root)
        for seed in seeds:
            yield run_seed(seed, options, world)
            if due_s is not None and time.monotonic() > due_s:
                return
        return
    make_model(root / "model")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _open_world, (root,)) as pool:
        running: set[Future[Verdict]] = set()
        try:
            while True:
                late = due_s is not None and time.monotonic() > due_s
                if not late:
                    running |= {pool.submit(_run, seed, options) for seed in itertools.islice(seeds, 2 * jobs - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


def failure_text(verdict: Verdict, options: Options) -> str:
    """What did not hold, and how to see it again."""
    lines = [f"seed {verdict.seed}: {len(verdict.violations)} violations, trace {verdict.trace}"]
    shown = list(dict.fromkeys((one.rule, one.what) for one in verdict.violations))
    when = {(one.rule, one.what): one.at_s for one in reversed(verdict.violations)}
    for rule, what in shown[:SHOWN_MAX]:
        lines.append(f"  {when[rule, what]:8.2f} s  {rule}: {what}")
    if len(shown) > SHOWN_MAX:
        lines.append(f"            and {len(shown) - SHOWN_MAX} more")
    lines.append(f"  again: {options.command(verdict.seed)}")
    return "\n".join(lines)


def as_json(summary: Summary, options: Options) -> dict[str, object]:
    return {
        "scenario": "chaos",
        "held": not summary.failed,
        "seeds": summary.seeds,
        "nodes": options.nodes,
        "faults": summary.faults,
        "asked": summary.asked,
        "answered": summary.answered,
        "events": summary.events,
        "virtual_s": round(summary.virtual_s, 1),
        "took_s": round(summary.took_s, 1),
        "failed": [
            {
                "seed": one.seed,
                "trace": one.trace,
                "violations": [{"at_s": round(each.at_s, 3), "rule": each.rule, "what": each.what} for each in one.violations],
                "again": options.command(one.seed),
            }
            for one in summary.failed
        ],
    }
