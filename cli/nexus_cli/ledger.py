"""nexus ledger: what an account comes to, what its owner is thought of, and the signed chain behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.node.api import EntryView, LedgerView

# A long chain is read page by page from its first entry.
ANSWER_TIMEOUT_S = 90.0


@click.command(cls=NexusCommand)
@click.argument("peer", required=False)
@pass_shared
def ledger(shared: Shared, peer: str | None) -> None:
    """Show the account of PEER: standing, balance, bond, earnings.

    Then its reputation and the newest entries of its chain. PEER is an id, the start of one, or a node's name; without it, the
    account of your own node. The chain is read from the node itself and checked from its first entry on.
    """
    from nexus.gateway.wire import to_json
    from nexus.node.api import LedgerView
    from nexus_cli.client import connected

    with connected(shared, ANSWER_TIMEOUT_S) as daemon:
        view = daemon.get_as(LedgerView, "/v0/ledger" + (f"?peer={quote(peer, safe='')}" if peer is not None else ""))
    if shared.json:
        show.print_json({"ledger": to_json(view)})
        return
    show.pairs(_lines(view))
    if view.chain:
        rows = [_row(entry) for entry in view.chain]
        show.console(shared).print(
            show.table(("entry", "kind", "credits", "session", "to"), rows, right=("entry", "credits"), wrap=("to",))
        )
    if view.frozen:
        click.echo(f"this ledger is frozen, nothing is paid or earned: {show.printable(view.frozen)}", err=True)


def _lines(view: LedgerView) -> list[tuple[str, str]]:
    from nexus.swarm.ledger import BOND_ENTRIES, in_credits

    checked = "" if view.checked == view.entries else f", of which the first {view.checked} were read and count here"
    audited = view.audits_ok + view.audits_bad
    bad = f", {view.audits_bad} of them bad" if view.audits_bad else ""
    known = f"{view.reputation:.2f} after {show.count(audited, 'audit')} here{bad}"
    entries = f"{view.entries} {'entry' if view.entries == 1 else 'entries'}"
    lines = [
        ("node", f"{view.peer_id} {view.name}".rstrip()),
        ("standing", view.standing + (f": {view.cause}" if view.cause else "")),
        ("until", f"{show.moment(view.until_ms)} UTC" if view.until_ms else ""),
        ("balance", in_credits(view.balance)),
        ("bond", f"{in_credits(view.bond)} (what it earned last, over {BOND_ENTRIES} entries; cannot be spent)"),
        ("earned", in_credits(view.earned)),
        ("paid", in_credits(view.paid)),
        ("owes you", in_credits(view.owed) if view.owed > 0 else ""),
        ("price", f"{in_credits(view.price)} per token and layer"),
        (
            "reputation",
            known if audited else "no audit of it here yet",
        ),
        ("chain", f"{entries}{checked}"),
    ]
    return [(name, value) for name, value in lines if value]


def _row(entry: EntryView) -> tuple[str, ...]:
    from nexus.proof.accounts import PAY
    from nexus.swarm.ledger import in_credits

    amount = -entry.amount if entry.kind == PAY else entry.amount
    payees = ", ".join(show.short_id(peer_id) for peer_id in entry.payees)
    return str(entry.seq), entry.kind, in_credits(amount).removesuffix(" credits"), entry.session.hex()[:16], payees or "-"
