"""nexus evidence: proofs that a node cheated. `verify` needs no daemon, no network, and no model if the proof carries its rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.core.manifest import Manifest
    from nexus.proof.evidence import Evidence, Verdict, WeightSource

evidence = NexusGroup(name="evidence", help="Proofs that a node cheated.")


@evidence.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@pass_shared
def evidence_verify(shared: Shared, file: Path) -> None:
    """Say whether FILE convicts the node that it accuses, by redoing what it is about. No daemon and no network are needed."""
    from time import perf_counter

    import nexus.proof.evidence  # noqa: F401 - before the clock runs: loading the program is no part of the check

    weights = own_weights(shared)
    began_s = perf_counter()
    proof, verdict = verify_file(file, weights)
    took_s = perf_counter() - began_s
    if shared.json:
        from nexus.gateway.wire import to_json

        show.print_json({"convicts": True, "verdict": to_json(verdict), "check_s": round(took_s, 6)})
        return
    where = [
        ("session", verdict.session.hex()),
        ("model", verdict.model_root.hex()),
        ("stage", "" if verdict.stage is None else str(verdict.stage)),
        ("step", "" if verdict.step is None else str(verdict.step)),
        ("layer", "" if verdict.layer is None else str(verdict.layer)),
        ("operation", verdict.op),
    ]
    show.pairs(
        [
            ("evidence", verdict.evidence.hex()),
            ("kind", verdict.kind),
            ("accused", verdict.peer_id),
            *((name, value) for name, value in where if value),
            ("size", show.size(len(proof.to_file()))),
            ("checked in", show.duration(took_s)),
        ]
    )
    click.echo(f"convicts: {show.printable(verdict.summary)}")


@evidence.command("list")
@pass_shared
def evidence_list(shared: Shared) -> None:
    """List the proofs that this node has: those that it found, and those that others passed on and it verified itself."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import EvidenceView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        found = daemon.get_list(EvidenceView, "/v0/evidence", "evidence")
    if shared.json:
        show.print_json({"evidence": to_json(found)})
        return
    if not found:
        click.echo("no evidence against anybody is kept here", err=True)
        return
    rows = [
        (
            one.id.hex()[:16],
            one.kind,
            f"{show.short_id(one.accused)} {one.name}".rstrip(),
            show.moment(one.known_ms),
            show.short_id(one.sender) if one.sender else "this node",
            show.size(one.size),
            one.state,
        )
        for one in found
    ]
    columns = ("evidence", "kind", "against", "since (UTC)", "from", "size", "state")
    show.console(shared).print(show.table(columns, rows, right=("size",), wrap=("against",)))


@evidence.command("show")
@click.argument("id")
@click.option("--output", type=click.Path(path_type=Path), help="Write the file that `nexus evidence verify` takes.")
@pass_shared
def evidence_show(shared: Shared, id: str, output: Path | None) -> None:
    """Say what the evidence ID proves, against whom, and since when. The start of its id is enough."""
    from nexus.core.errors import NotFoundError
    from nexus.gateway.wire import to_json
    from nexus.node.api import EvidenceFile, EvidenceView
    from nexus_cli.client import connected

    if not id.isalnum():
        raise NotFoundError(f"no evidence has the id {id!r}", "`nexus evidence list` shows those that there are")
    with connected(shared) as daemon:
        view = daemon.get_as(EvidenceView, f"/v0/evidence/{id}")
        content = daemon.get_as(EvidenceFile, f"/v0/evidence/{view.id.hex()}/file").content if output is not None else b""
    if output is not None:
        write_file(output, content)
    if shared.json:
        show.print_json({"evidence": to_json(view)})
        return
    where = [
        ("session", view.session.hex()),
        ("model", view.model_root.hex()),
        ("stage", "" if view.stage is None else str(view.stage)),
        ("step", "" if view.step is None else str(view.step)),
        ("layer", "" if view.layer is None else str(view.layer)),
        ("operation", view.op),
    ]
    show.pairs(
        [
            ("evidence", view.id.hex()),
            ("kind", f"{view.kind} ({KINDS_IN_WORDS.get(view.kind, 'of a kind that this version does not know')})"),
            ("against", f"{view.accused} {view.name}".rstrip()),
            ("signed by", "the accused itself: without its own signature there is no evidence"),
            ("known since", f"{show.moment(view.known_ms)} UTC" if view.known_ms else "it is not believed yet"),
            ("came from", view.sender or "this node found it"),
            ("state", view.state),
            *((name, value) for name, value in where if value),
            ("size", show.size(view.size)),
        ]
    )
    click.echo(f"proves: {show.printable(view.summary)}")
    if output is not None:
        click.echo(f"written to {output}; check it anywhere with: nexus evidence verify", err=True)


KINDS_IN_WORDS = {
    "OP": "it signed for a value that its own inputs and the model's weights do not give",
    "EQUIVOCATION": "it signed two answers to one question",
    "CHAIN": "it signed a receipt that contradicts those that it names",
    "KV": "its keys and values are not those that it computed, or not those that it had before",
    "FALSE-RESPONSE": "it signed an answer to an audit that contradicts its receipt",
    "FORK": "it signed two different entries of one number of its account",
}


def write_file(file: Path, content: bytes) -> None:
    """Whole or not at all. Raises LocalError."""
    from nexus.core.errors import LocalError

    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LocalError(f"cannot write {file}: {error.strerror}", "Give --output another file") from error


def verify_file(file: Path, weights: WeightSource | None = None) -> tuple[Evidence, Verdict]:
    """Raises NotFoundError or LocalError for the file, VerificationError for what convicts nobody, NotFoundError for a proof that
    does not carry its weights where `weights` has them not either."""
    from nexus.core.errors import MalformedError, VerificationError
    from nexus.proof.evidence import EVIDENCE_BYTES_MAX, Evidence, verify_evidence
    from nexus_cli.receipts import read_file

    content = read_file(file, EVIDENCE_BYTES_MAX, "evidence", "Give a file of evidence")
    # Exit code 7 for all that convicts nobody: a script that checks must not have to tell them apart.
    try:
        proof = Evidence.from_file(content)
    except MalformedError as error:
        raise VerificationError(f"{file} is no evidence: {error.cause}", "It may be cut off or changed: get it again") from error
    try:
        return proof, verify_evidence(proof, weights)
    except (MalformedError, VerificationError) as error:
        raise VerificationError(
            f"{file} does not convict {proof.peer_id}: {error.cause}", "Do nothing about that node because of it"
        ) from error


def own_weights(shared: Shared) -> WeightSource:
    """The weights of the models in this data directory, looked at only where a proof does not carry its own."""
    from nexus.core.errors import NotFoundError
    from nexus.engine.exact.weight_rows import StoredWeights

    def find(model_root: bytes) -> tuple[Manifest, Mapping[str, Path]]:
        from nexus.storage.blobs import BlobStore
        from nexus.storage.catalog import Catalog
        from nexus.storage.home import Home

        models = Home(shared.path).models
        if not models.is_dir():
            raise NotFoundError(
                f"the proof does not carry the weights that it is about, of model {model_root.hex()}",
                "Verify it on a node that has the model: nexus --home",
            )
        manifest, blobs = Catalog.open(models).manifest(model_root), BlobStore(models)
        return manifest, {blob.name: blobs.path(blob.root) for blob in (*manifest.pieces, *manifest.files) if blobs.has(blob.root)}

    return StoredWeights(find)
