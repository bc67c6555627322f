"""nexus judge: what is proven of a plan before it may run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.proof.solver import Proven


@click.command(cls=NexusCommand)
@click.argument("name")
@click.option(
    "--nodes", type=click.IntRange(1, 256), help="Judge the plan of this many nodes such as this one. [default: those in reach]"
)
@pass_shared
def judge(shared: Shared, name: str, nodes: int | None) -> None:
    """Prove the plan for model NAME. Exit code 7 if it does not hold: then it does not run either."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import JudgementView
    from nexus_cli.client import connected, model_path
    from nexus_cli.model import plan_table

    path = model_path(name) + "/judgement" + (f"?nodes={nodes}" if nodes else "")
    with connected(shared) as daemon:
        view = daemon.get_as(JudgementView, path)
    if shared.json:
        show.print_json({"plan": to_json(view.plan), "proofs": [to_json(proof) for proof in view.proofs], "proven": True})
        return
    screen = show.console(shared)
    screen.print(plan_table(view.plan))
    rows = [(proof.name, proof.statement, bound(proof), f"{proof.ms:.1f}") for proof in view.proofs]
    screen.print(show.table(("proven", "which says", "bound", "ms"), rows, right=("ms",), wrap=("which says", "bound")))
    took_s = sum(proof.ms for proof in view.proofs) / 1000
    click.echo(f"plan {view.plan.plan_root.hex()}")
    click.echo(f"{show.count(len(view.proofs), 'statement')} proven by Z3 in {show.duration(took_s)}; the plan may run")


def bound(proof: Proven) -> str:
    """The most that a quantity reaches, and what it stays below."""
    from nexus.proof.solver import shown

    return f"{shown(proof.value)} < {shown(proof.limit)}" if proof.limit else ""
