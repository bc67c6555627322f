"""nexus witness: what this node attests about when it had seen which blocks."""

from __future__ import annotations

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared


@click.command(cls=NexusCommand)
@pass_shared
def witness(shared: Shared) -> None:
    """Show what this node attested last. It had seen these blocks by then, which bounds the time of each from above."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import WitnessView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        view = daemon.get_as(WitnessView, "/v0/witness")
    if shared.json:
        show.print_json({"witness": to_json(view)})
        return
    every = (
        f"every {show.duration(view.interval_s)} while there is news"
        if view.interval_s > 0
        else "never: memory.witness_every_s is 0"
    )
    lines = [
        ("attests", every),
        ("issued", f"{show.count(view.issued, 'attestation')} in all"),
        ("last", f"{show.moment(view.at_ms)} UTC, {show.ago(view.at_ms)}" if view.issued else "none yet"),
        ("blocks", f"{view.blocks} under one root" if view.issued else ""),
        ("root", view.root.hex() if view.issued else ""),
        ("previous", view.previous.hex() if view.previous.strip(b"\0") else ""),
        ("wanted", f"{show.count(view.witnesses_wanted, 'other node')} before the time of a block counts as bounded"),
    ]
    show.pairs([(name, value) for name, value in lines if value])
