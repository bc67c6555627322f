"""nexus receipts: check the proof of a session, offline, on a machine that never saw the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.proof.bundle import AnswerProof, BundleReport

receipts = NexusGroup(name="receipts", help="Proofs of what was computed, by whom.")


@receipts.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@pass_shared
def receipts_verify(shared: Shared, file: Path) -> None:
    """Check every signature, chain link and root in FILE. `nexus run --receipts` writes it; no daemon and no network are needed."""
    parts = verify_file(file)
    count = sum(report.receipts for report in parts)
    if shared.json:
        from nexus.gateway.wire import to_json

        show.print_json({"verified": True, "receipts": count, "parts": to_json(parts)})
        return
    for number, report in enumerate(parts, 1):
        if len(parts) > 1:
            click.echo(f"part {number} of {len(parts)} of the answer")
        _print_report(shared, report)
    click.echo(f"{count} of {count} receipts verified")


def _print_report(shared: Shared, report: BundleReport) -> None:
    show.pairs(
        [
            ("model", report.model_root.hex()),
            ("called", f"{report.model_name} (by whoever wrote the file: nothing signs the name)"),
            ("session", report.session.hex()),
            ("asked by", report.coordinator),
            ("profile", f"{report.profile} (shows who answered what, not that the arithmetic was right)"),
            ("steps", f"{report.steps}, over {report.prompt_tokens} tokens of input"),
        ]
    )
    rows = [
        (str(stage), peer_id, show.layers([(start, end)]), str(count))
        for stage, (peer_id, start, end, count) in enumerate(report.receipts_by_stage)
    ]
    show.console(shared).print(show.table(("stage", "peer", "layers", "receipts"), rows, right=("stage", "receipts")))


def verify_file(file: Path) -> tuple[BundleReport, ...]:
    """What each part of the answer says, mostly one. Raises NotFoundError or LocalError for the file, VerificationError for what is
    no proof or does not hold."""
    from nexus.core.errors import MalformedError, VerificationError
    from nexus.proof.bundle import BUNDLE_BYTES_MAX, AnswerProof, verify_answer

    content = read_file(file, BUNDLE_BYTES_MAX, "a proof bundle", "Write one with: nexus run --receipts FILE")
    # Exit code 7 for every proof that does not hold: a script that checks must not have to tell them apart.
    try:
        proof = AnswerProof.from_bytes(content)
    except MalformedError as error:
        raise VerificationError(
            f"{file} is not a proof bundle: {error.cause}", "It may be cut off or changed: get it again"
        ) from error
    try:
        return verify_answer(proof)
    except (MalformedError, VerificationError) as error:
        raise VerificationError(
            f"{file} does not hold: {error.cause}", "Do not rely on the answer that it is about; it may be changed: get it again"
        ) from error


def read_file(file: Path, bytes_max: int, what: str, fix: str) -> bytes:
    """All of a file that a user names. Raises NotFoundError, LocalError, UsageError for one larger than `what` can be."""
    from nexus.core.errors import LocalError, NotFoundError, UsageError

    try:
        with file.open("rb") as stream:
            content = stream.read(bytes_max + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}", fix) from error
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror}", "Give a file that you may read") from error
    if len(content) > bytes_max:
        raise UsageError(f"{file} is larger than {what} can be ({show.size(bytes_max)})", fix)
    return content


def check_writable(file: Path) -> None:
    """Refuse before the work starts what could not be kept after it. Raises LocalError."""
    from nexus.core.errors import LocalError

    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise LocalError(f"cannot write {file}", "Give --receipts a file in a directory that exists and that you may write to")


def write_proof(file: Path, proof: AnswerProof) -> None:
    """Whole or not at all."""
    from nexus.core.errors import LocalError

    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(proof.to_bytes())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LocalError(f"cannot write {file}: {error.strerror}", "Give --receipts another file") from error
