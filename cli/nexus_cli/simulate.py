"""nexus simulate: whole nodes in a seeded, deterministic simulation in which things go wrong."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from nexus.core.errors import UsageError
from nexus_cli import show
from nexus_cli.byzantine import check_attack
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.simulation.chaos import Verdict

SCENARIOS = ("chaos",)
NIGHT_S = 8 * 3600.0


@click.command(cls=NexusCommand)
@click.argument("scenario", type=click.Choice(SCENARIOS))
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Everything follows from it.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="So many seeds, from --seed on.")
@click.option("--nodes", type=click.IntRange(4, 500), default=50, show_default=True, help="Nodes of the swarm.")
@click.option("--faults", default=None, help="Only these, by comma, or none. [default: all]")
@click.option("--chaos-s", type=click.FloatRange(1, 3600), default=30.0, show_default=True, help="Virtual seconds of faults.")
@click.option("--cheats", default="", help="Only these ways to cheat, by comma; nexus attacks lists them.")
@click.option("--questions", type=click.IntRange(1, 9), default=9, show_default=True, help="Different questions that are asked.")
@click.option("--plant", default="", help="Put a bug in, to see it found.")
@click.option("--nightly", is_flag=True, help="Fresh seeds for eight hours, or for --for-s.")
@click.option("--for-s", type=click.FloatRange(min=1), default=None, help="Begin no new seed after so many seconds.")
@click.option("--jobs", type=click.IntRange(1, 256), default=None, help="Processes. [default: one per core]")
@click.option("--log", is_flag=True, help="Show what the nodes log, with virtual times; one process.")
@pass_shared
def simulate(
    shared: Shared,
    scenario: str,
    seed: int,
    seeds: int,
    nodes: int,
    faults: str | None,
    chaos_s: float,
    cheats: str,
    questions: int,
    plant: str,
    nightly: bool,
    for_s: float | None,
    jobs: int | None,
    log: bool,
) -> None:
    """Run whole nodes in a simulation, and say what did not hold.

    chaos: a swarm under load in which machines crash, stop, lose what they had not synced, fill their disks and lose their clocks,
    links fail, and some nodes cheat; then nothing goes wrong any more, and everything must come right. The same seed gives the same
    trace hash in every process. Exit code 1 and the command that replays it where something did not hold.
    """
    # Before torch is imported, which the simulation does.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from nexus.simulation.chaos import ALL_FAULTS, Options
    from nexus.simulation.plants import PLANTS
    from nexus.simulation.running import as_json, failure_text, run_many

    chosen = ALL_FAULTS if faults is None else tuple(name for name in faults.split(",") if name and name != "none")
    for name in chosen:
        if name not in ALL_FAULTS:
            raise UsageError(f"there is no fault {name!r}", f"There are: {', '.join(ALL_FAULTS)}")
    if plant and plant not in PLANTS:
        raise UsageError(f"there is no bug {plant!r} to plant", f"There are: {', '.join(PLANTS)}")
    ways = tuple(name for name in cheats.split(",") if name)
    for name in ways:
        check_attack(name)
    options = Options(nodes, chosen, chaos_s, plant, ways, questions, log)
    numbers: Iterator[int] = iter(range(seed, seed + seeds))
    if nightly:
        for_s = for_s or NIGHT_S
        numbers = itertools.count(random.SystemRandom().getrandbits(40))
    elif for_s:
        numbers = itertools.count(seed)
    endless = nightly or bool(for_s)

    def tell(verdict: Verdict) -> None:
        if not verdict.held:
            click.echo(failure_text(verdict, options), err=True)
        elif not endless and seeds == 1 and not shared.json:
            click.echo(f"trace {verdict.trace}: {verdict.events} events in {verdict.virtual_s:.0f} virtual s")

    count = 1 if log or (not endless and seeds == 1) else jobs or os.cpu_count() or 1
    summary = run_many(numbers, options, count, tell, until_s=for_s)
    if shared.json:
        show.print_json(as_json(summary, options))
    else:
        verdict = "everything held" if not summary.failed else f"{show.count(len(summary.failed), 'seed')} failed"
        click.echo(
            f"{verdict}: {show.count(summary.seeds, 'seed')} of {nodes} nodes, {summary.faults} faults, "
            f"{summary.answered} of {summary.asked} requests answered, {summary.virtual_s:.0f} virtual s in {summary.took_s:.0f} s"
        )
    if summary.failed:
        sys.exit(1)
