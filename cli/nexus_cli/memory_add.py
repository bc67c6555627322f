"""nexus memory add: documents into the shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show, values
from nexus_cli.options import NexusCommand, Shared, pass_shared
from nexus_cli.vectors import vector_body, vector_options

if TYPE_CHECKING:
    from nexus.core.errors import NexusError
    from nexus.gateway.wire import Json
    from nexus.node.memory.api import AddedView
    from nexus_cli.bars import Advance
    from nexus_cli.client import Daemon
    from nexus_cli.documents import Source


@dataclass(frozen=True, slots=True)
class Added:
    """What came of one document, or of a part of one that was too long for one request."""

    file: str
    title: str
    collection: str
    ids: tuple[str, ...]
    known: int


@click.command("add", cls=NexusCommand)
@click.argument("names", nargs=-1, metavar="FILE|DIR|-...")
@click.option("--collection", type=values.text, help="Where to: NAME, or NAME@PEER for another owner's. [default: main]")
@click.option("--tag", "tags", type=values.text, multiple=True, help="A tag of its blocks; may be given several times.")
@click.option("--lang", type=values.text, help="The language, such as en or de.")
@click.option("--ttl", type=values.span, help="May be forgotten after this time: 30d, 12h. [default: never]")
@click.option(
    "--link", "links", type=values.text, multiple=True, metavar="ID", help="A block that it refers to; may be given several times."
)
@click.option("--title", type=values.text, help="What it is called. [default: the name of the file]")
@click.option("--replaces", type=values.text, metavar="ID", help="The block of which this is the next version.")
@vector_options
@pass_shared
def memory_add(
    shared: Shared,
    names: tuple[str, ...],
    collection: str | None,
    tags: tuple[str, ...],
    lang: str | None,
    ttl: float | None,
    links: tuple[str, ...],
    title: str | None,
    replaces: str | None,
    vector: Path | None,
    vector_model: str | None,
    vector_fingerprint: str | None,
) -> None:
    """Add text to the shared memory. Files of text or Markdown in UTF-8, directories of them, or - for standard input.

    Every document is cut into blocks, which get a vector, a time and this node's signature. Prints the ids of the new blocks.
    """
    from nexus.core.errors import LocalError, NexusError
    from nexus_cli.bars import bars
    from nexus_cli.client import connected
    from nexus_cli.documents import find_documents

    external = vector_body(vector, vector_model, vector_fingerprint)
    if not names and vector is None:
        raise click.UsageError("Missing argument 'FILE|DIR|-'.")
    sources, skipped = find_documents(names)
    alone = len(names) <= 1 and not any(Path(name).is_dir() for name in names)
    if not alone:
        for option, value in (("--title", title), ("--replaces", replaces), ("--vector", vector)):
            if value is not None:
                raise click.UsageError(f"{option} is for one document, not for several")
    options: dict[str, Json] = {"collection": collection, "tags": list(dict.fromkeys(tags)), "lang": lang, "ttl_s": ttl}
    options |= {"links": list(dict.fromkeys(links)), "replaces": replaces, **external}
    added: list[Added] = []
    files = 0
    failed: NexusError | None = None
    with connected(shared, None) as daemon, bars(shared) as advance:
        try:
            documents: list[Source | None] = [*sources] if names else [None]
            for number, source in enumerate(documents):
                advance("files", "adding", number, len(sources), f"{number} of {show.count(len(sources), 'file')}")
                try:
                    texts = [""] if source is None else _texts(source, whole="vector" in options or replaces is not None)
                except NexusError as error:
                    if alone:
                        raise
                    skipped.append((source.shown if source else "", error.cause))
                    continue
                # What came before a failure stays in the list.
                added.extend(_add(daemon, advance, source, title, texts, options))
                files += 1
        except NexusError as error:
            failed = error
    if not shared.json:
        for file, reason in skipped:
            # A cause that names the file does not name it twice.
            click.echo(f"skipped: {show.printable(reason if file in reason else f'{file} {reason}')}", err=True)
        for one in added:
            for id_ in one.ids:
                click.echo(show.printable(id_))
    if failed is not None:
        if not alone:
            failed.cause += f" (after {files} of {show.count(len(sources), 'file')}: what was added stays, and is not added twice)"
        raise failed
    blocks, known = sum(len(one.ids) for one in added), sum(one.known for one in added)
    if shared.json:
        show.print_json(
            {
                "added": [asdict(one) for one in added],
                "skipped": [{"file": file, "reason": reason} for file, reason in skipped],
                "files": files,
                "blocks": blocks,
                "known": known,
            }
        )
    else:
        click.echo(_summary(files, blocks, known, len(skipped)), err=True)
    if not added:
        raise LocalError("nothing was added: no text was found", "Give files of text in UTF-8")


def _summary(files: int, blocks: int, known: int, skipped: int) -> str:
    text = f"{show.count(files, 'file')}, {show.count(blocks, 'new block')}"
    if known:
        text += f", {known} {'was' if known == 1 else 'were'} here already"
    return text + (f", {skipped} skipped" if skipped else "")


def _texts(source: Source, *, whole: bool) -> list[str]:
    """The document in parts that one request can carry. `whole`: it has to be one."""
    from nexus.core.errors import UsageError
    from nexus_cli.documents import read_document, split_text

    texts = [text for text in split_text(read_document(source)) if text.strip()]
    if whole and len(texts) > 1:
        raise UsageError(f"{source.shown} is too long for one block", "Give a shorter text")
    return texts


def _add(
    daemon: Daemon,
    advance: Advance,
    source: Source | None,
    title: str | None,
    texts: list[str],
    options: dict[str, Json],
) -> Iterator[Added]:
    from nexus_cli.documents import fit_title

    for number, text in enumerate(texts):
        ending = f" (part {number + 1})" if len(texts) > 1 else ""
        called = fit_title(title if title is not None else source.title if source else "", ending)
        view = _add_one(daemon, advance, options | {"text": text, "title": called})
        yield Added(source.shown if source else "", called, view.collection, view.ids, view.known)


def _add_one(daemon: Daemon, advance: Advance, body: dict[str, Json]) -> AddedView:
    from nexus.core.errors import LocalError
    from nexus.node.memory.api import AddedView
    from nexus.node.progress import Progress

    added: AddedView | None = None
    for event in daemon.stream("/v0/memory/blocks", body):
        match event:
            case Progress():
                advance("step", event.phase, event.done, event.total)
            case AddedView():
                added = event
    if added is None:
        raise LocalError("the daemon did not say that the document is in", "See its log, and: nexus memory ls")
    return added
