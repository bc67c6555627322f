"""nexus demo: everything at once on throw-away nodes: a model split over them, an answer, and the proof of who computed it."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.node.api import Finished, ModelView, Planned, PlanView
    from nexus.proof.bundle import BundleReport
    from nexus_cli.client import Daemon
    from nexus_cli.testnet import TestnetNode

DEMO_TIMEOUT_S = 600.0
DEMO_MODEL = "nano"
DEMO_PROMPT = "Why is the sky blue?"
DEMO_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """`planned`: which nodes computed it, in the end."""

    planned: Planned
    text: str
    tokens: tuple[int, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a demo came to."""

    plan: PlanView
    answer: Answer
    report: BundleReport


@click.command(cls=NexusCommand)
@click.option("--nodes", type=click.IntRange(1, 16), default=4, show_default=True, help="How many nodes share the work.")
@click.option("--prompt", default=DEMO_PROMPT, show_default=True, help="What to ask.")
@click.option("--max-tokens", type=click.IntRange(1), default=DEMO_TOKENS, show_default=True, help="Tokens of the answer at most.")
@click.option("--receipts", type=click.Path(path_type=Path, dir_okay=False), help="Keep the proof bundle in this file.")
@click.option("--byzantine", is_flag=True, help="One of the nodes cheats, and is caught.")
@click.option("--attack", metavar="NAME", help="What the cheater does; nexus attacks lists the names. [default: stale-cache]")
@click.option(
    "--evidence", type=click.Path(path_type=Path, dir_okay=False), help="Keep the proof against the cheater in this file."
)
@pass_shared
def demo(
    shared: Shared,
    nodes: int,
    prompt: str,
    max_tokens: int,
    receipts: Path | None,
    byzantine: bool,
    attack: str | None,
    evidence: Path | None,
) -> None:
    """Show everything at once on nodes that are gone afterwards.

    Start several nodes, split the built-in model over them, answer a prompt, verify every receipt, and clean up.

    With --byzantine the last node cheats: its work is audited, it is convicted by a proof that anybody can check, every node shuts
    it out, and the prompt is answered again without it. The exit code is 0 only if each of those was seen.
    """
    from nexus_cli.byzantine import check_attack
    from nexus_cli.demo_cheater import DEMO_ATTACK, show_cheater
    from nexus_cli.receipts import check_writable
    from nexus_cli.run import check_text

    check_text(prompt, "the prompt")
    if byzantine and receipts is not None:
        raise click.UsageError("--receipts is of the demo without --byzantine; that keeps its proof with --evidence")
    if not byzantine and (attack is not None or evidence is not None):
        raise click.UsageError("--attack and --evidence are about a cheater: add --byzantine")
    if byzantine and nodes < 2:
        raise click.UsageError("with --byzantine there are at least two nodes: one that cheats and one that finds out")
    for file in (receipts, evidence):
        if file is not None:
            check_writable(file)
    if byzantine:
        chosen = attack or DEMO_ATTACK
        check_attack(chosen)
        with demo_network(shared, nodes, [chosen]) as (members, directory):
            show_cheater(shared, members, prompt, max_tokens, evidence, directory)
        return
    with demo_network(shared, nodes) as (members, directory):
        outcome = _show_off(shared, members, prompt, max_tokens, receipts or directory / "proof.nexus")
    if shared.json:
        _print_json(outcome)


@contextmanager
def demo_network(shared: Shared, nodes: int, attacks: Sequence[str] = ()) -> Iterator[tuple[list[TestnetNode], Path]]:
    """A testnet under a directory, both gone afterwards. The command's deadline runs inside. `attacks`: of the last nodes."""
    from nexus_cli.client import deadline
    from nexus_cli.testnet import Testnet

    with terminate_as_interrupt(), temporary_directory() as directory:
        net = Testnet(directory / "net")
        try:
            with deadline(shared.timeout_s or DEMO_TIMEOUT_S):
                say(shared, f"Starting {nodes} nodes on this machine, each with a key, a home and a port of its own ...")
                began = time.monotonic()
                members = net.up(nodes, shared.timeout_s or DEMO_TIMEOUT_S, lambda message: None, attacks)
                say(shared, f"{nodes} nodes connected and ready after {show.duration(time.monotonic() - began)}")
                yield members, directory
        finally:
            if net.exists():
                net.down()


def _show_off(shared: Shared, members: Sequence[TestnetNode], prompt: str, max_tokens: int, bundle_file: Path) -> Outcome:
    from nexus.core.errors import VerificationError
    from nexus.node.api import PlanView
    from nexus_cli.client import Daemon
    from nexus_cli.model import plan_path, print_plan
    from nexus_cli.receipts import verify_file, write_proof
    from nexus_cli.run import check_verified, closing_line

    daemon = Daemon(members[0].socket)
    try:
        added = add_model(shared, daemon)
        manifest = added.manifest
        say(
            shared,
            f"{members[0].name} has {DEMO_MODEL}: {manifest.layers} layers, {show.size(manifest.weight_bytes)}, "
            f"root {manifest.root.hex()[:16]}. The others have nothing and will fetch their layers from it.",
        )
        plan = daemon.get_as(PlanView, plan_path(DEMO_MODEL, len(members)))
        if not shared.json:
            print_plan(shared, plan)
            click.echo(f"> {show.printable(prompt)}")
        answer = ask(shared, daemon, prompt, max_tokens, len(members))
        finished = answer.finished
    finally:
        daemon.close()
    say(shared, closing_line(finished))
    write_proof(bundle_file, finished.proof)
    report = verify_file(bundle_file)[-1]
    if not shared.json:
        _print_who_did_what(shared, finished)
    check_verified(finished)
    # Two counts that were made apart: the daemon's while it ran, and the offline check's from the file alone.
    if report.receipts != finished.receipts or len(report.receipts_by_stage) != len(members):
        raise VerificationError(
            f"the file proves {report.receipts} receipts of {len(report.receipts_by_stage)} stages, "
            f"the daemon said {finished.receipts} of {len(members)}",
            "This is a fault of Nexus: please report it",
        )
    if not shared.json:
        click.echo(f"{report.receipts} of {finished.receipts} receipts verified")
    return Outcome(plan, answer, report)


def add_model(shared: Shared, daemon: Daemon) -> ModelView:
    from nexus.core.errors import LocalError
    from nexus.node.api import ModelView
    from nexus.node.progress import Progress
    from nexus_cli.model import progress_bars

    added: ModelView | None = None
    with progress_bars(shared) as advance:
        for event in daemon.stream("/v0/models", {"source": DEMO_MODEL}):
            if isinstance(event, Progress):
                advance(event)
            elif isinstance(event, ModelView):
                added = event
    if added is None:
        raise LocalError(f"the daemon did not say that {DEMO_MODEL} is there", "Please report it")
    return added


def ask(
    shared: Shared, daemon: Daemon, prompt: str, max_tokens: int, stages: int, verify: str | None = None, *, silently: bool = False
) -> Answer:
    """Ask the model, and show the answer as it grows unless `silently`. `verify`: how it is audited; None: as the settings say."""
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import Json
    from nexus.node.api import Finished, Planned, Token
    from nexus.node.progress import Progress
    from nexus_cli.run import Writer, check_finished, waiting

    tokens: list[Token] = []
    writer = None if shared.json or silently else Writer()
    planned: Planned | None = None
    finished: Finished | None = None
    body: dict[str, Json] = {"model": DEMO_MODEL, "prompt": prompt, "max_tokens": max_tokens, "stages": stages, "verify": verify}
    try:
        with waiting(shared, disable=silently) as progress:
            for event in daemon.stream("/v0/run", body):
                match event:
                    case Planned():
                        planned = event
                    case Progress():
                        progress(event)
                    case Token():
                        progress(None)
                        tokens.append(event)
                        if writer:
                            writer.write(event.text)
                    case Finished():
                        finished = event
    finally:
        if writer:
            writer.end()
    done = check_finished(finished)
    if planned is None:
        raise LocalError("the daemon did not say who computed the answer", "Please report it")
    return Answer(planned, "".join(token.text for token in tokens), tuple(token.token for token in tokens), done)


def _print_who_did_what(shared: Shared, finished: Finished) -> None:
    rows = [
        (
            str(stage.stage),
            stage.name,
            show.short_id(stage.peer_id),
            show.layers([(stage.start, stage.end)]),
            str(stage.steps),
            show.duration(stage.compute_s),
            str(stage.receipts),
        )
        for stage in finished.stages
    ]
    columns = ("stage", "node", "peer", "layers", "steps", "computing", "receipts")
    show.console(shared).print(show.table(columns, rows, right=("stage", "steps", "computing", "receipts")))


def _print_json(outcome: Outcome) -> None:
    from nexus.gateway.wire import to_json

    summary = to_json(outcome.answer.finished)
    assert isinstance(summary, dict)
    del summary["bundle"]
    show.print_json({"text": outcome.answer.text, "plan": to_json(outcome.plan), "report": to_json(outcome.report)} | summary)


def say(shared: Shared, message: str) -> None:
    if not shared.json:
        click.echo(message, err=True)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Gone afterwards, whatever happens. Its name is short, since sockets live in it."""
    directory = Path(tempfile.mkdtemp(prefix="nexus-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that a demo that is ended by a script cleans up too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaned up, and about to say so with the exit code
        raise
    signal.signal(signal.SIGTERM, previous)
