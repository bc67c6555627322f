"""nexus: the command line. Data goes to stdout, messages to stderr, and the exit code says what went wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from nexus.core.errors import LocalError, NexusError, UsageError
from nexus_cli import (
    attacks,
    audit,
    collection,
    demo,
    doctor,
    engine,
    evidence,
    fragments,
    judge,
    ledger,
    lifecycle,
    memory,
    model,
    netcheck,
    node,
    peers,
    plan,
    receipts,
    run,
    settings,
    show,
    simulate,
    sky,
    slashed,
    swarm,
    testnet,
    witness,
)
from nexus_cli.options import NexusGroup, Shared

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


nexus = NexusGroup(
    name="nexus",
    help="Pool machines to run a language model that none of them could run alone, and prove that every node did its part.",
    epilog="A first look at everything: nexus demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (plan.model_plan, fragments.serve, fragments.unserve, fragments.update, fragments.rollback):
    model.model.add_command(part)
nexus = click.version_option(package_name="nexus-swarm", prog_name="nexus")(nexus)
for command in (
    node.init,
    node.id_,
    settings.config,
    lifecycle.start,
    lifecycle.status,
    lifecycle.stop,
    fragments.drain,
    peers.peers,
    peers.ping,
    swarm.swarm,
    netcheck.netcheck,
    doctor.doctor,
    model.model,
    run.run,
    receipts.receipts,
    run.embed,
    audit.audit,
    judge.judge,
    evidence.evidence,
    slashed.slashed,
    ledger.ledger,
    sky.sky,
    memory.memory,
    collection.collection,
    witness.witness,
    engine.engine,
    engine.bench,
    testnet.testnet,
    attacks.attacks,
    simulate.simulate,
    demo.demo,
):
    nexus.add_command(command)


def main() -> None:
    """Entry point of `nexus`."""
    run_command(nexus)


def run_command(command: click.Command) -> NoReturn:
    """Run a command and end the process with the right exit code."""
    shared = Shared()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end an answer
    try:
        code = command.main(standalone_mode=False, obj=shared)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except NexusError as error:
        _report(error, shared)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        code = EXIT_USAGE if isinstance(error, click.UsageError) else error.exit_code
        if wants_json(sys.argv[1:]):
            shared.json = True
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else command.name
            _report(UsageError(error.format_message(), f"See: {where} --help"), shared)
        else:
            error.show()
        sys.exit(code)
    except (click.Abort, KeyboardInterrupt):
        # The process ends now: another Ctrl-C must not turn its exit code into a death by signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough. The interpreter must not stumble over the same pipe again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        # Of our own files and streams: what is wrong with the daemon or a peer has a class of its own.
        place = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else " the output"
        _report(
            LocalError(f"cannot read or write{place}: {error.strerror or error}", "Make room there, or write elsewhere"), shared
        )
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json is among the arguments, also where they could not be parsed."""
    return "--json" in itertools.takewhile(lambda argument: argument != "--", arguments)


def _report(error: NexusError, shared: Shared) -> None:
    if shared.json:
        problem = {"code": error.code, "cause": error.cause, "fix": error.fix, "exit_code": error.exit_code}
        click.echo(show.json_line({"error": problem}), err=True)
        return
    click.echo(
        click.style("error: ", fg="red") + error.cause,
        err=True,
        color=False if shared.no_color or "NO_COLOR" in os.environ else None,
    )
    if error.fix:
        click.echo(f"fix: {error.fix}", err=True)


if __name__ == "__main__":
    main()
