"""nexus attacks: what the cheaters of a test network do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import click

from nexus.core.errors import UsageError
from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

# In the place of a name: different ones, as they come.
MIXED = "mixed"


@click.command(cls=NexusCommand)
@pass_shared
def attacks(shared: Shared) -> None:
    """List what cheaters of a testnet do, by name.

    No setting makes a node do any of it.
    """
    from nexus.node.attacks import ATTACKS

    if shared.json:
        show.print_json({"attacks": [{"name": attack.name, "summary": attack.summary} for attack in ATTACKS.values()]})
        return
    rows = [(attack.name, attack.summary) for attack in ATTACKS.values()]
    show.console(shared).print(show.table(("name", "what the node does"), rows, wrap=("what the node does",)))
    click.echo("try one: nexus demo --byzantine --attack NAME; what becomes of each: docs/threats.md", err=True)


def attacks_of(nodes: int, byzantine: int | None, names: Sequence[str]) -> list[str]:
    """What each cheater of a testnet does. `byzantine`: how many there are; None: as many as there are names. Raises UsageError."""
    from nexus_cli.byzantine import check_attack

    for name in names:
        if name != MIXED:
            check_attack(name)
    count = len(names) if byzantine is None else byzantine
    if count < len(names):
        raise UsageError(f"{len(names)} attacks are named for {show.count(count, 'cheater')}", "Raise --byzantine")
    if count >= nodes and count:
        raise UsageError(
            f"of {show.count(nodes, 'node')} at most {nodes - 1} can cheat: node-1, which the others meet first, is honest",
            "Raise --nodes",
        )
    if MIXED not in names:
        return [names[index % len(names)] for index in range(count)] if names else _drawn(count)
    # In turn as well, only that MIXED stands for one that is not among those named.
    wanted = [names[index % len(names)] for index in range(count)]
    drawn = iter(_drawn(wanted.count(MIXED)))
    return [next(drawn) if name == MIXED else name for name in wanted]


def _drawn(count: int) -> list[str]:
    """Different attacks, as long as there are more."""
    from nexus.node.attacks import ATTACKS

    drawn: list[str] = []
    while len(drawn) < count:
        drawn += random.sample(sorted(ATTACKS), min(count - len(drawn), len(ATTACKS)))
    return drawn


def deed(name: str) -> str:
    """What a node with this attack does, in words."""
    from nexus.node.attacks import ATTACKS

    return ATTACKS[name].summary if name in ATTACKS else f"does what this version does not know ({name})"
