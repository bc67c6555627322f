"""nexus demo --byzantine: a stage cheats, and is caught, proven guilty, shut out and done without.

Nothing is taken for granted: what is not seen raises VerificationError.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.audits import CONVICTED, LIGHT, OFF, OK, REPLICA
from nexus_cli import show
from nexus_cli.options import Shared

if TYPE_CHECKING:
    from nexus.node.api import AuditView, EvidenceView, SlashedView
    from nexus_cli.client import Daemon
    from nexus_cli.demo import Answer
    from nexus_cli.testnet import TestnetNode

# One whose answer suffers so that everybody sees it.
DEMO_ATTACK = "stale-cache"
# A conviction travels by gossip, and every node checks the proof before it believes it.
SPREAD_TIMEOUT_S = 30.0
CONVICTION_TIMEOUT_S = 5.0
CHECK_TIMEOUT_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Proof:
    """A file of evidence as another process found it. `check_s`: of the check alone; `process_s`: with all that a process takes."""

    file: Path
    size: int
    check_s: float
    process_s: float


def show_cheater(
    shared: Shared, members: Sequence[TestnetNode], prompt: str, max_tokens: int, keep: Path | None, directory: Path
) -> None:
    """`members`: of a running testnet, the last one the cheater. `keep`: where the proof goes; None: into `directory`, which is
    temporary. Raises VerificationError, which says what was not seen."""
    from nexus_cli.attacks import deed
    from nexus_cli.client import Daemon
    from nexus_cli.demo import DEMO_MODEL, add_model, say

    began_s = time.monotonic()
    cheater, honest = members[-1], members[:-1]
    with ExitStack() as stack:
        daemons = {node.name: stack.enter_context(closing(Daemon(node.socket))) for node in honest}
        daemon = daemons[honest[0].name]
        say(shared, f"{honest[0].name} takes in {DEMO_MODEL} ...")
        add_model(shared, daemon)
        _tell(shared, "")
        _tell(shared, f"1  {cheater.name} cheats: it {deed(cheater.attack)}. The others do not know.")
        _tell(shared, "")
        _tell(
            shared,
            f"2  {honest[0].name} asks {DEMO_MODEL}, split over all {show.count(len(members), 'node')}, and audits the answer:",
        )
        first, found_by = _ask_and_catch(shared, daemon, cheater, prompt, max_tokens, len(members))
        conviction = _conviction(daemon, cheater, first)
        _tell_conviction(shared, cheater, conviction, seen=not isinstance(first, str))
        proof = _check_elsewhere(daemon, conviction, keep or directory / "proof.evidence", directory)
        _tell_proof(shared, cheater, proof, keep is not None)
        slashed = _spread(shared, daemons, cheater)
        second, alone = _ask_again(shared, daemon, cheater, prompt, max_tokens, len(honest))
    took_s = time.monotonic() - began_s
    if shared.json:
        _print_json(cheater, first, found_by, conviction, proof, keep is not None, slashed, second, alone, took_s)
        return
    if not isinstance(first, str):
        same = first.tokens == second.tokens
        _tell(
            shared,
            "   The first answer reads the same: it was luck, not proof."
            if same
            else "   The first answer was another one, and wrong.",
        )
    _tell(shared, "")
    _tell(shared, f"Cheated, caught, proven, shut out by all, done without: in {show.duration(took_s)}.")


# ---- 2: asked, and caught


def _ask_and_catch(
    shared: Shared, daemon: Daemon, cheater: TestnetNode, prompt: str, max_tokens: int, stages: int
) -> tuple[Answer | str, str]:
    """The answer, or why there is none; and what found the cheater, or "" where nothing did yet."""
    from nexus.core.errors import NexusError
    from nexus_cli.demo import ask
    from nexus_cli.run import closing_line

    _tell(shared, f"   > {show.printable(prompt)}")
    try:
        answer = ask(shared, daemon, prompt, max_tokens, stages, LIGHT)
    except NexusError as error:
        _tell(shared, "")
        _tell(shared, f"3  The answer was given up: {_named(error.cause, cheater)}")
        return error.cause, "receipts"
    _tell(shared, f"   {closing_line(answer.finished)}")
    _tell(shared, "")
    _tell(shared, "3  The signatures hold. Do the numbers?")
    if answer.finished.audit is not None:
        _print_audit(shared, answer.finished.audit)
        if found_by := _convicting_mode(answer.finished.audit, cheater):
            return answer, found_by
    _tell(shared, "   A light audit looks at a few cells and found nothing there that convicts. So all is computed again:")
    view = _audit(daemon, answer.planned.session)
    _print_audit(shared, view)
    return answer, _convicting_mode(view, cheater)


def _audit(daemon: Daemon, session: bytes) -> AuditView:
    from nexus.core.errors import LocalError
    from nexus.node.api import AuditView

    for event in daemon.stream(f"/v0/audits/{session.hex()}", {"mode": REPLICA}):
        if isinstance(event, AuditView):
            return event
    raise LocalError("the daemon ended the audit without saying what came of it", "Please report it")


def _convicting_mode(view: AuditView, node: TestnetNode) -> str:
    """The audit that convicted the node, or "" where none did."""
    return next((stage.mode for stage in view.stages if stage.peer_id == node.peer_id and stage.verdict == CONVICTED), "")


def _print_audit(shared: Shared, view: AuditView) -> None:
    from nexus_cli.audit import audit_table

    if not shared.json:
        show.console(shared).print(audit_table(view))


# ---- convicted, and proven


def _conviction(daemon: Daemon, cheater: TestnetNode, first: Answer | str) -> EvidenceView:
    """What the first node has against the cheater. Raises VerificationError where it has nothing."""
    from nexus.core.errors import VerificationError
    from nexus.node.api import EvidenceView

    until = time.monotonic() + CONVICTION_TIMEOUT_S
    while not (found := _convicted(daemon, [cheater])):
        if time.monotonic() > until:
            how = f"the answer failed ({first})" if isinstance(first, str) else "no audit proved anything against it"
            raise VerificationError(
                f"missing: {cheater.name}, which plays {cheater.attack!r}, was not convicted: {how}",
                "Not every attack can be proven; docs/threats.md says what becomes of each",
            )
        time.sleep(POLL_S)
    return daemon.get_as(EvidenceView, f"/v0/evidence/{found[0].evidence.hex()}")


def _convicted(daemon: Daemon, cheaters: Sequence[TestnetNode]) -> list[SlashedView]:
    """Those whom this node holds for convicted. Raises VerificationError if an honest node is among them."""
    from nexus.core.errors import VerificationError
    from nexus.node.api import SlashedView

    found = list(daemon.get_list(SlashedView, "/v0/slashed", "slashed"))
    for one in found:
        if one.peer_id not in {node.peer_id for node in cheaters}:
            raise VerificationError(
                f"{one.name} is convicted, and it is honest: {one.summary}", "This is a fault of Nexus: please report it"
            )
    return found


def _tell_conviction(shared: Shared, cheater: TestnetNode, conviction: EvidenceView, *, seen: bool) -> None:
    """`seen`: the table of an audit has said already what it did."""
    where = [
        f"stage {conviction.stage}" if conviction.stage is not None else "",
        f"step {conviction.step}" if conviction.step is not None else "",
        f"layer {conviction.layer}" if conviction.layer is not None else "",
        f"operation {conviction.op}" if conviction.op else "",
    ]
    _tell(shared, f"   {cheater.name} is convicted: {', '.join(filter(None, where)) or conviction.kind}.")
    if not seen:
        _tell(shared, f"   {_named(conviction.summary, cheater)}")
    _tell(shared, "")


def _check_elsewhere(daemon: Daemon, conviction: EvidenceView, file: Path, directory: Path) -> Proof:
    """Write the proof, and have a process verify it that has nothing else: an empty data directory, no daemon, no model."""
    from nexus.core.errors import VerificationError
    from nexus.node.api import EvidenceFile
    from nexus_cli.evidence import write_file

    content = daemon.get_as(EvidenceFile, f"/v0/evidence/{conviction.id.hex()}/file").content
    write_file(file, content)
    empty = directory / "empty"
    empty.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("NEXUS_")} | {"NEXUS_HOME": str(empty)}
    began_s = time.monotonic()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "nexus_cli.main", "evidence", "verify", str(file.absolute()), "--json"],
        env=environ,
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHECK_TIMEOUT_S,
    )
    process_s = time.monotonic() - began_s
    said = json.loads(done.stdout) if done.returncode == 0 else {}
    if not said.get("convicts") or said["verdict"]["evidence"] != conviction.id.hex():
        raise VerificationError(
            f"missing: the proof did not verify elsewhere: {done.stderr.strip()[-500:]}",
            "This is a fault of Nexus: please report it",
        )
    return Proof(file, len(content), float(said["check_s"]), process_s)


def _tell_proof(shared: Shared, cheater: TestnetNode, proof: Proof, kept: bool) -> None:
    where = str(proof.file) if kept else "one file (--evidence FILE keeps it)"
    _tell(shared, f"4  The proof against {cheater.name}: {where}, {show.size(proof.size)}.")
    _tell(
        shared,
        "   `nexus evidence verify`, in a new process without daemon, network or model: it convicts. "
        f"Checked in {show.duration(proof.check_s)}.",
    )
    _tell(shared, "")


# ---- slashed everywhere, and done without


def _spread(shared: Shared, daemons: dict[str, Daemon], cheater: TestnetNode) -> dict[str, SlashedView]:
    """What each honest node says of the cheater, once all of them hold it for convicted."""
    from nexus.core.errors import VerificationError

    began_s = time.monotonic()
    slashed: dict[str, SlashedView] = {}
    while len(slashed) < len(daemons):
        for name in daemons.keys() - slashed.keys():
            if found := _convicted(daemons[name], [cheater]):
                slashed[name] = found[0]
        if len(slashed) < len(daemons):
            if time.monotonic() - began_s > SPREAD_TIMEOUT_S:
                late = ", ".join(sorted(daemons.keys() - slashed.keys()))
                raise VerificationError(
                    f"missing: {late} did not hear of the conviction within {SPREAD_TIMEOUT_S:.0f} s", "Look at: nexus peers"
                )
            time.sleep(POLL_S)
    if not shared.json:
        click.echo("5  The proof went round; every node checked it for itself. What `nexus slashed` says on each:")
        rows = [
            (name, slashed[name].name or cheater.name, slashed[name].state, slashed[name].kind, slashed[name].evidence.hex()[:16])
            for name in sorted(slashed)
        ]
        show.console(shared).print(show.table(("on", "node", "state", "kind", "evidence"), rows))
    return slashed


def _ask_again(
    shared: Shared, daemon: Daemon, cheater: TestnetNode, prompt: str, max_tokens: int, stages: int
) -> tuple[Answer, Answer]:
    """The answer of the honest nodes, and that of one of them alone: the same tokens. Raises VerificationError."""
    from nexus.core.errors import VerificationError
    from nexus_cli.demo import ask
    from nexus_cli.run import check_verified, closing_line

    _tell(shared, f"6  Asked again; the plan does without {cheater.name}:")
    _tell(shared, f"   > {show.printable(prompt)}")
    second = ask(shared, daemon, prompt, max_tokens, stages, LIGHT)
    alone = ask(shared, daemon, prompt, max_tokens, 1, OFF, silently=True)
    for answer in (second, alone):
        if any(stage.peer_id == cheater.peer_id for stage in answer.finished.stages):
            raise VerificationError(f"missing: {cheater.name} got work although it is convicted", "Please report it")
        check_verified(answer.finished)
    audit = second.finished.audit
    wrong = [stage for stage in audit.stages if stage.mode != OFF and stage.verdict != OK] if audit else []
    if audit is None or wrong:
        said = "; ".join(f"stage {stage.stage}: {stage.verdict} {stage.detail}".rstrip() for stage in wrong)
        raise VerificationError(f"missing: the second answer was not found right: {said or 'no audit'}", "Please report it")
    if second.tokens != alone.tokens:
        raise VerificationError("missing: the second answer differs from that of an honest node alone", "Please report it")
    _tell(shared, f"   {closing_line(second.finished)}")
    _print_audit(shared, audit)
    _tell(shared, f"   Token for token what {_who(alone)} answers alone.")
    return second, alone


def _named(text: str, node: TestnetNode) -> str:
    """With the node's name in the place of its id."""
    return show.printable(text.replace(node.peer_id, node.name))


def _who(answer: Answer) -> str:
    return ", ".join(stage.name for stage in answer.finished.stages)


def _tell(shared: Shared, line: str) -> None:
    if not shared.json:
        click.echo(line)


def _print_json(
    cheater: TestnetNode,
    first: Answer | str,
    found_by: str,
    conviction: EvidenceView,
    proof: Proof,
    kept: bool,
    slashed: dict[str, SlashedView],
    second: Answer,
    alone: Answer,
    took_s: float,
) -> None:
    from nexus.gateway.wire import to_json

    show.print_json(
        {
            "cheater": {"name": cheater.name, "peer_id": cheater.peer_id, "attack": cheater.attack},
            "first": {"error": first} if isinstance(first, str) else _answer_json(first),
            "found_by": found_by,
            "conviction": to_json(conviction),
            "proof": {
                "file": str(proof.file) if kept else None,
                "size": proof.size,
                "check_s": proof.check_s,
                "process_s": round(proof.process_s, 3),
            },
            "slashed": {name: to_json(view) for name, view in sorted(slashed.items())},
            "second": _answer_json(second),
            "honest": _answer_json(alone),
            "took_s": round(took_s, 3),
        }
    )


def _answer_json(answer: Answer) -> dict[str, object]:
    from nexus.gateway.wire import to_json

    return {
        "text": answer.text,
        "tokens": list(answer.tokens),
        "session": answer.planned.session.hex(),
        "stages": to_json(answer.finished.stages),
        "audit": to_json(answer.finished.audit),
    }
