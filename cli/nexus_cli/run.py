"""nexus run, nexus embed: use a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.audits import MODES, OFF
from nexus_cli import show
from nexus_cli.audit import check_audit, report_audit
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from nexus.gateway.wire import Json
    from nexus.node.api import Finished

INPUT_BYTES_MAX = 4 * 1024 * 1024


@click.command(cls=NexusCommand)
@click.argument("name", required=False)
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=int, help="Tokens of the answer at most. [default: 128]")
@click.option("--temperature", type=float, help="0 always takes the likeliest token; higher is more varied. [default: 0]")
@click.option("--top-k", type=int, help="Sample among so many of the likeliest tokens; 0 is all. [default: 0]")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that make up this share. [default: 1]")
@click.option("--min-p", type=float, help="Sample among tokens at least this times as likely as the likeliest. [default: 0]")
@click.option("--repetition-penalty", type=float, help="Above 1, tokens of the answer so far get less likely. [default: 1]")
@click.option("--seed", type=int, help="Makes sampling repeatable. [default: drawn anew]")
@click.option("--stop", multiple=True, help="End the answer before this text; may be given several times.")
@click.option("--stages", type=int, help="Split over this many nodes. [default: the node decides]")
@click.option("--receipts", type=click.Path(path_type=Path, dir_okay=False), help="Write the proof bundle to this file.")
@click.option("--no-receipts", is_flag=True, help="Ask the nodes to sign nothing: the answer cannot be verified.")
@click.option("--verify", type=click.Choice(MODES), help="How the answer is audited. [default: audit.policy of the settings]")
@click.option("--resume", metavar="ID", help="Go on with the answer of this id, which broke off, instead of asking.")
@pass_shared
def run(
    shared: Shared,
    name: str | None,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    stages: int | None,
    receipts: Path | None,
    no_receipts: bool,
    verify: str | None,
    resume: str | None,
) -> None:
    """Answer PROMPT with model NAME, token by token. A prompt of - is read from standard input.

    The answer goes on when nodes that compute it go away, and when the daemon is started again in the middle of it."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import Finished, Planned, Token
    from nexus.node.progress import Notice, Progress
    from nexus_cli.client import connected
    from nexus_cli.receipts import check_writable, write_proof
    from nexus_cli.resuming import answer_events

    if receipts is not None and no_receipts:
        raise click.UsageError("--receipts and --no-receipts exclude each other")
    if no_receipts and verify not in (None, OFF):
        raise click.UsageError(f"--verify {verify} needs the receipts that --no-receipts leaves out")
    if resume is None and (name is None or prompt is None):
        raise click.UsageError("give the NAME of a model and a PROMPT, or the ID of an answer with --resume")
    if resume is not None and name is not None:
        raise click.UsageError("an answer that is taken up again has its model and prompt already: give --resume ID alone")
    if receipts is not None:
        check_writable(receipts)
    body: dict[str, Json] = {
        "max_tokens": max_tokens,
        "temperature": check_finite(temperature, "--temperature"),
        "top_k": top_k,
        "top_p": check_finite(top_p, "--top-p"),
        "min_p": check_finite(min_p, "--min-p"),
        "repetition_penalty": check_finite(repetition_penalty, "--repetition-penalty"),
        "seed": seed,
        "stages": stages,
        "verify": verify,
    }
    if name is not None and prompt is not None:
        text = read_input() if prompt == "-" else check_text(prompt, "the prompt")
        path = "/v0/run"
        body |= {
            "model": name,
            "prompt": text,
            "stop": [check_text(entry, "--stop") for entry in stop],
            "receipts": not no_receipts,
        }
    elif stop or no_receipts or any(value is not None for value in body.values()):
        raise click.UsageError("--resume goes on as the answer began: leave the options of the answer out")
    else:
        path, body = "/v0/run/resume", {"answer": resume}
    tokens: list[Token] = []
    notices: list[str] = []
    writer = Writer()
    planned: Planned | None = None
    finished: Finished | None = None
    with connected(shared, None) as daemon, waiting(shared) as progress:
        for event in answer_events(daemon, path, body):
            match event:
                case Planned():
                    planned = event
                case Progress():
                    progress(event)
                case Notice(notice):
                    notices.append(f"after {show.count(len(tokens), 'token')}: {notice}")
                case Token():
                    progress(None)
                    tokens.append(event)
                    if not shared.json:
                        writer.write(event.text)
                case Finished():
                    finished = event
    if not shared.json:
        writer.end()
    done = check_finished(finished)
    if receipts is not None:
        write_proof(receipts, done.proof)
    if shared.json:
        summary = to_json(done)
        assert isinstance(summary, dict)
        drop_bundles(summary)
        show.print_json(
            {"text": "".join(token.text for token in tokens), "tokens": [token.token for token in tokens], "plan": to_json(planned)}
            | {"notices": notices}
            | summary
        )
    else:
        for notice in notices:
            click.echo(show.printable(notice), err=True)
        click.echo(closing_line(done, asked_for_receipts=not no_receipts), err=True)
        report_audit(done)
    if not no_receipts and (resume is None or done.receipts):
        check_verified(done)
    check_audit(done, verify)


@click.command(cls=NexusCommand)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--model", help="The encoder. [default: minilm]")
@click.option("--stages", type=int, help="Split over this many nodes. [default: the node decides]")
@click.option("--receipts", type=click.Path(path_type=Path, dir_okay=False), help="Write the proof bundle to this file.")
@click.option("--verify", type=click.Choice(MODES), help="How the vectors are audited. [default: audit.policy of the settings]")
@pass_shared
def embed(
    shared: Shared, texts: tuple[str, ...], model: str | None, stages: int | None, receipts: Path | None, verify: str | None
) -> None:
    """Turn each TEXT into a vector. One JSON array per line; a text of - is read from standard input."""
    import json

    from nexus.gateway.wire import to_json
    from nexus.node.api import Embedding, Finished
    from nexus.node.progress import Progress
    from nexus_cli.client import connected
    from nexus_cli.receipts import check_writable, write_proof

    given = [read_input() if text == "-" else check_text(text, "the text") for text in texts]
    if receipts is not None:
        check_writable(receipts)
    body: dict[str, Json] = {"texts": given, "model": model, "stages": stages, "verify": verify}
    vectors: dict[int, tuple[float, ...]] = {}
    finished: Finished | None = None
    with connected(shared, None) as daemon, waiting(shared) as progress:
        for event in daemon.stream("/v0/embed", body):
            match event:
                case Progress():
                    progress(event)
                case Embedding():
                    vectors[event.index] = event.vector
                case Finished():
                    finished = event
    done = check_finished(finished)
    if receipts is not None:
        write_proof(receipts, done.proof)
    ordered = [vectors[index] for index in sorted(vectors)]
    if shared.json:
        summary = to_json(done)
        assert isinstance(summary, dict)
        drop_bundles(summary)
        show.print_json({"embeddings": to_json(ordered)} | summary)
    else:
        for vector in ordered:
            click.echo(json.dumps(vector))
        click.echo(f"{show.count(len(ordered), 'vector')} in {show.duration(done.total_s)}; {verified_line(done)}", err=True)
        report_audit(done)
    check_verified(done)
    check_audit(done, verify)


def read_input() -> str:
    """All of standard input as text. Raises UsageError for too much, or for what is not UTF-8."""
    from nexus.core.errors import UsageError

    content = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
    if len(content) > INPUT_BYTES_MAX:
        raise UsageError(f"standard input is larger than {show.size(INPUT_BYTES_MAX)}", "Give less")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not valid UTF-8 (byte {error.start})", "Convert it first, for example with iconv"
        ) from error


def check_text(text: str, what: str) -> str:
    """An argument as text. Python keeps bytes that are not UTF-8 as lone surrogates, which must not go further."""
    from nexus.core.errors import UsageError

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not valid UTF-8 (character {error.start})", "Convert it first, for example with iconv"
        ) from error
    return text


def check_finite(number: float | None, option: str) -> float | None:
    """JSON has no NaN and no infinity."""
    import math

    if number is not None and not math.isfinite(number):
        raise click.BadParameter(f"{number} is not a number to work with", param_hint=option)
    return number


def check_finished(finished: Finished | None) -> Finished:
    from nexus.core.errors import LocalError

    if finished is None:
        raise LocalError("the daemon ended the answer without saying how it went", "Its log says more")
    return finished


def check_verified(finished: Finished) -> None:
    """Raises VerificationError unless there are receipts, and all of them hold."""
    from nexus.core.errors import VerificationError

    if not 0 < finished.receipts == finished.receipts_verified:
        raise VerificationError(verified_line(finished), "Do not rely on this answer; the daemon's log says which receipt failed")


def drop_bundles(summary: dict[str, Json]) -> None:
    """Leave out what --receipts writes to a file."""
    del summary["bundle"]
    earlier = summary["earlier"]
    assert isinstance(earlier, list)
    for part in earlier:
        del part["bundle"]


def verified_line(finished: Finished) -> str:
    return f"{finished.receipts_verified} of {finished.receipts} receipts verified"


def closing_line(finished: Finished, *, asked_for_receipts: bool = True) -> str:
    """Speed and proof in one line. The rate leaves the first token out: it waits for the prompt, the others do not."""
    rest_s = finished.total_s - finished.first_token_s
    proof = verified_line(finished) if asked_for_receipts else "no receipts were asked for, so nothing of this is verified"
    rate = f"{(finished.completion_tokens - 1) / rest_s:.1f} tokens/s, " if finished.completion_tokens > 1 and rest_s > 0 else ""
    return (
        f"{show.count(finished.completion_tokens, 'token')}, {rate}first token after {show.duration(finished.first_token_s)} "
        f"({finished.reason}); {proof}"
    )


@contextmanager
def waiting(shared: Shared, *, disable: bool = False) -> Iterator[Callable[[object], None]]:
    """Progress while fragments are fetched; calling with None takes it off the screen, since the answer begins."""
    from contextlib import ExitStack

    from nexus.node.progress import Progress
    from nexus_cli.model import progress_bars

    with ExitStack() as stack:
        bars: list[Callable[[Progress], None]] = []

        def report(event: object) -> None:
            if isinstance(event, Progress):
                if disable:
                    return
                if not bars:
                    bars.append(stack.enter_context(progress_bars(shared)))
                bars[0](event)
            elif bars:
                bars.clear()
                stack.close()

        yield report


class Writer:
    """An answer on stdout as it grows. The blank with which most tokenizers begin a first word is not shown."""

    def __init__(self) -> None:
        self._began = False
        self._ended_line = True

    def write(self, text: str) -> None:
        if text and not self._began:
            self._began = True
            text = text.removeprefix(" ")
        if not text:
            return
        self._ended_line = text.endswith("\n")
        sys.stdout.write(show.printable_stream(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def end(self) -> None:
        """What comes next begins a line."""
        if not self._ended_line or not self._began:
            sys.stdout.write("\n")
            sys.stdout.flush()
