"""nexus memory search, nexus memory ls: find blocks, and show them as a list."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nexus_cli import show, values
from nexus_cli.options import NexusCommand, Shared, pass_shared
from nexus_cli.vectors import vector_body, vector_options

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from nexus.gateway.wire import Json
    from nexus.node.memory.api import BlockView, HitView, SearchView

F = TypeVar("F", bound=Callable[..., Any])

SEARCH_TIMEOUT_S = 60.0
LINES_SHOWN = 3
INDENT = "    "
TEXT_CELLS_MIN = 24
_WORD = re.compile(r"\w+")
_SENTENCE_START = re.compile(r"(?<=[.!?:;]) +")


def filter_options(function: F) -> F:
    """Which blocks a command is about."""
    for option in reversed(
        (
            click.option(
                "--collection",
                "collections",
                type=values.text,
                multiple=True,
                metavar="NAME",
                help="Only of this collection; may be given several times. [default: all]",
            ),
            click.option(
                "--tag", "tags", type=values.text, multiple=True, help="Only with this tag; given several times, with all of them."
            ),
            click.option(
                "--author",
                "authors",
                type=values.text,
                multiple=True,
                metavar="PEER",
                help="Only by this author, an id or a name; may be given several times.",
            ),
            click.option("--lang", type=values.text, help="Only in this language."),
            click.option(
                "--since", type=values.moment, metavar="TIME", help="Only made from then on: 2026-11-30, or 7d for a week ago."
            ),
            click.option("--until", type=values.moment, metavar="TIME", help="Only made before then."),
            click.option(
                "--near", type=values.place, metavar="LAT,LON", help="Only stamped near this place, in degrees: 48.2,16.4."
            ),
            click.option("--near-km", type=values.kilometres, metavar="KM", help="How near, in kilometres. [default: 100]"),
        )
    ):
        function = option(function)
    return function


def filters_body(
    collections: tuple[str, ...],
    tags: tuple[str, ...],
    authors: tuple[str, ...],
    lang: str | None,
    since: int | None,
    until: int | None,
    near: tuple[float, float] | None,
    near_km: float | None,
) -> dict[str, Json]:
    """Filters as a request has them, without what was not given."""
    if near_km is not None and near is None:
        raise click.UsageError("--near-km says how near to --near, which is missing")
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until")
    filters: dict[str, Json] = {"collections": list(collections), "tags": list(tags), "authors": list(authors), "lang": lang}
    filters |= {"since_ms": since, "until_ms": until, "near": None if near is None else list(near), "near_km": near_km}
    return {key: value for key, value in filters.items() if value not in (None, [])}


@click.command("search", cls=NexusCommand)
@click.argument("question", type=values.text, required=False, default="")
@filter_options
@vector_options
@click.option("--k", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many hits.")
@click.option("--hybrid", is_flag=True, help="Search by words too, and fuse the two rankings.")
@click.option("--model", type=values.text, metavar="NAME", help="Search by the vectors of this model. [default: this node's own]")
@click.option("--network", is_flag=True, help="Ask peers too; what they find is verified here.")
@click.option(
    "--deadline",
    type=values.deadline,
    default="5",
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for peers.",
)
@click.option("--explain", is_flag=True, help="Say how the hits were found, and what became of every peer that was asked.")
@pass_shared
def memory_search(
    shared: Shared,
    /,
    question: str,
    vector: Path | None,
    vector_model: str | None,
    vector_fingerprint: str | None,
    k: int,
    hybrid: bool,
    model: str | None,
    network: bool,
    deadline: float,
    explain: bool,
    **filters: Any,
) -> None:
    """Find the blocks nearest in meaning to QUESTION, or to a vector."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import SearchView
    from nexus_cli.bars import waiting_for
    from nexus_cli.client import connected

    given = vector_body(vector, vector_model, vector_fingerprint)
    if not question and not given:
        raise click.UsageError("Missing argument 'QUESTION': say what to search for, or give --vector.")
    body: dict[str, Json] = {
        "text": question,
        "filters": filters_body(**filters),
        "k": k,
        "hybrid": hybrid,
        "model": model,
        **given,
    }
    with connected(shared, SEARCH_TIMEOUT_S + deadline) as daemon, waiting_for(shared, "searching"):
        view = daemon.post_as(SearchView, "/v0/memory/search", body | {"network": network, "deadline_s": deadline})
    if shared.json:
        show.print_json({"search": to_json(view)})
    else:
        _print_hits(shared, view, question)
        if explain:
            _print_explanation(shared, view)
    if not view.complete and not shared.json:
        late = [peer.name or show.short_id(peer.peer_id) for peer in view.asked if peer.outcome != "answered"]
        click.echo(
            f"partial: {len(late)} of {show.count(len(view.asked), 'peer')} did not answer in time"
            + (f" ({show.printable(', '.join(late[:8]))})" if late else "")
            + "; with a longer --deadline there may be more",
            err=True,
        )


def _print_hits(shared: Shared, view: SearchView, question: str) -> None:
    screen = show.console(shared)
    words = words_of(question)
    for rank, hit in enumerate(view.hits, 1):
        if rank > 1:
            screen.print()
        for line in hit_lines(rank, hit, words, screen):
            screen.print(line, soft_wrap=True)
    if not view.hits:
        click.echo("nothing found", err=True)
    else:
        click.echo(
            f"{show.count(len(view.hits), 'hit')} in {show.duration(view.took_s)}, by {show.printable(view.model)}", err=True
        )


def _print_explanation(shared: Shared, view: SearchView) -> None:
    click.echo()
    for sentence in view.explain:
        show.paragraph(shared, f"- {sentence}")
    if view.asked:
        rows = [
            (peer.name, show.short_id(peer.peer_id), peer.outcome, str(peer.hits), show.duration(peer.took_s))
            for peer in view.asked
        ]
        show.console(shared).print(
            show.table(("asked", "peer", "outcome", "hits", "time"), rows, right=("hits", "time"), wrap=("asked", "outcome"))
        )


def hit_lines(rank: int, hit: HitView, words: frozenset[str], screen: Console) -> list[Text]:
    """A hit: what it is, where it comes from, and the lines of its text where most of the words are."""
    from rich.cells import cell_len
    from rich.text import Text

    block = hit.block
    head = Text(f"{rank:>2}. {_scored(hit)}  ")
    collection = f"  {show.printable(block.collection)}" if block.title else ""
    room = max(TEXT_CELLS_MIN, screen.width - cell_len(head.plain + collection))
    head.append(cut_title(show.printable(block.title or block.collection), room), style="bold")
    head.append(collection, style="dim")
    author = block.author_name or show.short_id(block.author)
    about = [author, block.grade, show.ago(block.created_ms), show.short_id(block.id)]
    about += [f"from {show.short_id(hit.found_at)}"] if hit.found_at else []
    about += [block.state] if block.state != "live" else []
    lines = [head, Text(INDENT + show.printable(", ".join(about)), style="dim")]
    room = max(20, screen.width - len(INDENT))
    text = Text(show.printable(excerpt(block.text, words, LINES_SHOWN * room * 9 // 10)))
    for match in _WORD.finditer(text.plain):
        if is_meant(match.group(), words):
            text.stylize("bold", match.start(), match.end())
    wrapped = text.wrap(screen, room)
    for index, line in enumerate(wrapped[:LINES_SHOWN]):
        line.rstrip()
        if index == LINES_SHOWN - 1 and len(wrapped) > LINES_SHOWN:
            line.truncate(room - 2)
            line.append(" …")
        lines.append(Text(INDENT) + line)
    return lines


def _scored(hit: HitView) -> str:
    """The score, and beside one that is fused of two rankings how near in meaning the block is."""
    if hit.similarity is None:
        return f"{hit.score:.3f} by its words"
    return f"{hit.score:.3f}" + (f" (cosine {hit.similarity:.3f})" if abs(hit.similarity - hit.score) > 1e-6 else "")


def words_of(question: str) -> frozenset[str]:
    """The words of a question that say what it is about, or so it is taken: those of three letters or more."""
    return frozenset(word for word in _WORD.findall(question.casefold()) if len(word) >= 3)


def is_meant(word: str, words: frozenset[str]) -> bool:
    """Whether a word of a text is one of these, or begins like one: "river" and "rivers"."""
    folded = word.casefold()
    return folded in words or any(folded.startswith(one) or (len(folded) >= 4 and one.startswith(folded)) for one in words)


def excerpt(text: str, words: frozenset[str], chars: int) -> str:
    """About `chars` characters on one line: from the sentence on after which the most of the words come."""
    line = " ".join(text.split())
    if len(line) <= chars:
        return line
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(line))]
    marks = [(match.start(), match.group().casefold()) for match in _WORD.finditer(line) if is_meant(match.group(), words)]
    counts = {start: len({word for at, word in marks if start <= at < start + chars}) for start in starts}
    most = max(counts.values())
    equal = [start for start in starts if counts[start] == most] if most else [0]
    # The last of equals is the nearest to the words, as long as there is text enough behind it.
    best = max((start for start in equal if start <= len(line) - chars), default=equal[0])
    end = line.rfind(" ", best, best + chars) if best + chars < len(line) else len(line)
    shown = line[best : end if end > best else best + chars]
    return ("… " if best else "") + shown + (" …" if best + len(shown) < len(line) else "")


@click.command("ls", cls=NexusCommand)
@filter_options
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many at most.")
@pass_shared
def memory_ls(shared: Shared, /, limit: int, **filters: Any) -> None:
    """List the blocks that are here, the newest first."""
    from urllib.parse import urlencode

    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import BlockView
    from nexus_cli.client import connected

    query: list[tuple[str, str]] = [("limit", str(limit))]
    for key, value in filters_body(**filters).items():
        if key == "near" and isinstance(value, list):
            query.append((key, ",".join(f"{degrees:.9f}" for degrees in value)))
        elif isinstance(value, list):
            query += [(key, str(one)) for one in value]
        else:
            query.append((key, f"{value:.9f}" if isinstance(value, float) else str(value)))
    with connected(shared) as daemon:
        found = daemon.get_list(BlockView, f"/v0/memory/blocks?{urlencode(query)}", "blocks")
    if shared.json:
        show.print_json({"blocks": to_json(found)})
        return
    if not found:
        click.echo(
            "no blocks" + (" that fit; leave out a filter" if len(query) > 1 else "; add some with: nexus memory add"), err=True
        )
        return
    screen = show.console(shared)
    screen.print(block_list(found, screen.width))
    if len(found) == limit:
        click.echo(f"these are the newest {limit}; for more give a larger --limit", err=True)


def block_list(blocks: Sequence[BlockView], width: int) -> RenderableType:
    """A line per block, its text in what the other columns leave of `width` cells; where that is too little, on a second line."""
    from rich.cells import cell_len
    from rich.console import Group
    from rich.text import Text

    columns = ("block", "made", "collection", "author", "grade", "state")
    rows = [
        tuple(
            show.printable(cell)
            for cell in (
                show.short_id(block.id),
                show.ago(block.created_ms),
                block.collection,
                block.author_name or show.short_id(block.author),
                block.grade,
                ("pinned, " if block.pinned else "") + block.state,
            )
        )
        for block in blocks
    ]
    # Two cells part columns, and one is at either end.
    room = width - 2 - sum(max(map(cell_len, cells)) + 2 for cells in zip(columns, *rows, strict=True))
    texts = [show.printable(first_words(block)) for block in blocks]
    if room >= TEXT_CELLS_MIN:
        return show.table((*columns, "text"), [(*row, cut(text, room)) for row, text in zip(rows, texts, strict=True)])
    lines: list[Text] = []
    for row, text in zip(rows, texts, strict=True):
        lines += [Text("  ".join(row), style="bold"), Text(INDENT + cut(text, max(TEXT_CELLS_MIN, width - len(INDENT))))]
    return Group(*lines)


def cut(text: str, cells: int) -> str:
    """The text in at most `cells` cells of a terminal."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= cells else set_cell_size(text, max(0, cells - 1)).rstrip() + "…"


def cut_title(title: str, cells: int) -> str:
    """A title such as "file > chapter > section" in at most `cells` cells: what is in the middle goes first."""
    from rich.cells import cell_len

    parts = title.split(" > ")
    if cell_len(title) > cells and len(parts) > 2:
        title = f"{parts[0]} > … > {parts[-1]}"
    if cell_len(title) > cells:
        title = parts[-1]
    return cut(title, cells)


def first_words(block: BlockView) -> str:
    """A line that tells blocks apart: the end of the title, where it says the section, and how the text begins."""
    text = " ".join(block.text[:400].split()) or f"({block.kind})"
    section = block.title.rpartition(" > ")[2]
    return f"{section}: {text}" if section else text
