"""nexus audit: check again what others computed, and say what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nexus.core.audits import CONVICTED, LIGHT, MISMATCH, OFF, OK, OWN, SESSION_MODES, UNANSWERED, UNAUDITED
from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from nexus.node.api import AuditView, Finished, SessionView, StageAuditView

audit = NexusGroup(name="audit", help="Check answers again after they were given.")
_COLUMNS = ("stage", "node", "audit", "verdict", "checked", "time", "why")


@audit.command("run")
@click.argument("session")
@click.option("--mode", type=click.Choice(SESSION_MODES), default=LIGHT, show_default=True, help="How to audit it.")
@pass_shared
def audit_run(shared: Shared, session: str, mode: str) -> None:
    """Audit SESSION, the start of whose id is enough. `nexus audit list` shows those that are kept."""
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import to_json
    from nexus.node.api import AuditView
    from nexus.node.progress import Progress
    from nexus_cli.client import connected
    from nexus_cli.run import waiting

    view: AuditView | None = None
    with connected(shared, None) as daemon, waiting(shared) as progress:
        for event in daemon.stream(_path(session), {"mode": mode}):
            match event:
                case Progress():
                    progress(event)
                case AuditView():
                    view = event
    if view is None:
        raise LocalError("the daemon ended the audit without saying what came of it", "Its log says more")
    if shared.json:
        show.print_json({"audit": to_json(view)})
    else:
        _print(shared, view)
    _check(view, asked=True)


@audit.command("list")
@pass_shared
def audit_list(shared: Shared) -> None:
    """Sessions that are kept, so that they can be audited."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import SessionSummary
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        found = daemon.get_list(SessionSummary, "/v0/audits", "sessions")
    if shared.json:
        show.print_json({"sessions": to_json(found)})
        return
    if not found:
        click.echo("no sessions are kept; a model of the exact profile leaves one: nexus run MODEL PROMPT", err=True)
        return
    rows = [(one.session.hex()[:16], show.moment(one.ended_ms), one.model, show.size(one.size), str(one.audits)) for one in found]
    columns = ("session", "ended (UTC)", "model", "size", "audits")
    show.console(shared).print(show.table(columns, rows, right=("size", "audits")))


@audit.command("show")
@click.argument("session")
@pass_shared
def audit_show(shared: Shared, session: str) -> None:
    """Every audit of SESSION, stage by stage."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import SessionView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        view = daemon.get_as(SessionView, _path(session))
    if shared.json:
        show.print_json({"session": to_json(view)})
        return
    _print_session(shared, view)


def _print_session(shared: Shared, view: SessionView) -> None:
    show.pairs(
        [
            ("session", view.session.hex()),
            ("model", f"{view.model} {view.model_root.hex()[:16]}"),
            ("ended", f"{show.moment(view.ended_ms)} UTC"),
            ("steps", f"{view.steps}, over {show.count(view.stages, 'stage')}"),
            ("audits", str(len(view.audits))),
        ]
    )
    for one in view.audits:
        click.echo()
        _print(shared, one)


def _print(shared: Shared, view: AuditView) -> None:
    click.echo(f"{show.moment(view.at_ms)} UTC")
    show.console(shared).print(audit_table(view))


def audit_table(view: AuditView) -> Table:
    rows = [
        (
            str(stage.stage),
            stage.name or show.short_id(stage.peer_id),
            stage.mode,
            stage.verdict,
            _checked(stage),
            show.duration(stage.cost_s),
            _detail(stage) + (f" (evidence {stage.evidence.hex()[:16]})" if stage.evidence else ""),
        )
        for stage in view.stages
    ]
    return show.table(_COLUMNS, rows, right=("stage", "time"), wrap=("node", "why"))


def _path(session: str) -> str:
    from nexus.core.errors import NotFoundError

    if not session.isascii() or not session.isalnum():
        raise NotFoundError(f"no session is called {session!r}", "`nexus audit list` shows those that are kept")
    return f"/v0/audits/{session}"


def _detail(stage: StageAuditView) -> str:
    """For where the stage has been named already."""
    return stage.detail.replace(stage.peer_id, "it")


def _checked(stage: StageAuditView) -> str:
    if stage.cells:
        return show.count(stage.cells, "cell")
    return show.count(stage.steps, "step") if stage.steps else "-"


# --- the closing line of an answer ------------------------------------------------------------------------------------------


def audit_line(view: AuditView, total_s: float) -> str:
    """What was checked, by which audit, and what it cost, in one line. `total_s`: what the answer took."""
    if all(stage.verdict in (UNAUDITED, OWN) for stage in view.stages):
        reasons = sorted({stage.detail for stage in view.stages if stage.detail})
        return "not audited: " + ("; ".join(reasons) or "nothing was asked for")
    cost_s = sum(stage.cost_s for stage in view.stages)
    share = f" ({100 * cost_s / total_s:.1f} % of the answer)" if total_s > 0 else ""
    return f"audited: {_summary(view.stages)}, {show.duration(cost_s)}{share}"


def _summary(stages: Sequence[StageAuditView]) -> str:
    passed = [stage for stage in stages if stage.verdict == OK]
    own = sum(stage.verdict == OWN for stage in stages)
    text = f"{len(passed)} of {show.count(len(stages) - own, 'stage')}" + (" of others" if own else "")
    if passed:
        modes = sorted({stage.mode for stage in passed})
        cells = sorted({stage.cells for stage in passed if stage.cells})
        each = f" ({_range(cells)} each)" if cells else ""
        text += f" by {' and '.join(modes)} audit{each}"
    for verdict in (CONVICTED, MISMATCH, UNANSWERED):
        if count := sum(stage.verdict == verdict for stage in stages):
            text += f", {count} {verdict}"
    return text


def _range(cells: Sequence[int]) -> str:
    """Of a sorted list."""
    return show.count(cells[0], "cell") if len(cells) == 1 else f"{cells[0]} to {cells[-1]} cells"


def report_audit(finished: Finished) -> None:
    """The line on stderr that says how far the answer was audited, and a warning where it is wrong."""
    for part in finished.earlier:
        if part.audit is not None:
            click.echo(f"earlier part {part.session.hex()[:16]}: {audit_line(part.audit, finished.total_s)}", err=True)
    if finished.audit is None:
        return
    click.echo(audit_line(finished.audit, finished.total_s), err=True)
    if any(part.audit is not None and _wrong(part.audit) for part in finished.earlier) or _wrong(finished.audit):
        click.echo(click.style("the answer above is WRONG, or may be: do not use it", fg="red"), err=True)


def check_audit(finished: Finished, asked: str | None) -> None:
    """Raises VerificationError where an audit found the answer wrong, or where one was asked for and did not take place. Of an
    answer's earlier parts a node went away, which cannot show its work any more: that alone is no reason."""
    from nexus.core.errors import VerificationError

    for part in finished.earlier:
        if part.audit is not None:
            _check(part.audit, asked=False)
    if finished.audit is not None:
        _check(finished.audit, asked=asked not in (None, OFF))
    elif asked not in (None, OFF):
        raise VerificationError(
            "nothing of this answer can be audited", "Use a model of the exact profile: nexus model add --profile exact"
        )


def _check(view: AuditView, *, asked: bool) -> None:
    from nexus.core.errors import VerificationError

    for stage in view.stages:
        who = f"stage {stage.stage} ({stage.name or stage.peer_id}, {stage.peer_id})"
        if stage.verdict == CONVICTED:
            raise VerificationError(
                f"{who} is convicted: {_detail(stage)}",
                f"Do not use this answer; run it again. The proof: nexus evidence show {stage.evidence.hex()[:16]}",
                stage.peer_id,
            )
        if stage.verdict == MISMATCH:
            raise VerificationError(f"{who}: {stage.detail}", "Do not use this answer; run it again", stage.peer_id)
    for stage in view.stages:
        if asked and stage.verdict in (UNANSWERED, UNAUDITED) and stage.mode != OFF:
            raise VerificationError(
                f"stage {stage.stage} ({stage.name or stage.peer_id}) could not be audited: {stage.detail}",
                "Audit it again later with `nexus audit run`, or run it again",
                stage.peer_id,
            )


def _wrong(view: AuditView) -> bool:
    return any(stage.verdict in (CONVICTED, MISMATCH) for stage in view.stages)
