"""What commands print: one JSON object, or text for people. Text from peers is made harmless first."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from nexus_cli.options import Shared

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1


def print_json(value: Mapping[str, object]) -> None:
    """One object on one line. `schema` changes when a key changes its meaning or goes away; new keys may come at any time."""
    click.echo(json_line(value))


def json_line(value: Mapping[str, object]) -> str:
    """UTF-8 text, whatever is in it: bytes of a file name that are not come out as JSON escapes of lone surrogates."""
    text = json.dumps({"schema": SCHEMA} | dict(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """One line without control or direction characters: a peer's name must not steer the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def printable_stream(text: str) -> str:
    """Running text without what could steer the terminal; line breaks and tabs stay."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def size(count: int) -> str:
    """Bytes for people: "512 B", "1.5 MiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def count(number: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Time for people: "0.4 ms", "12.3 s", "3 h 20 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(unix_ms: int) -> str:
    """When, in UTC: "2026-11-21 01:39:36"."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if unix_ms else "-"


def ago(unix_ms: int) -> str:
    """How long it is since then, in one unit: "5 min ago", "3 days ago"; a date where that is easier to grasp."""
    import time

    seconds = time.time() - unix_ms / 1000
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86_400:
        return f"{seconds // 3600:.0f} h ago"
    days = int(seconds // 86_400)
    return f"{count(days, 'day')} ago" if days <= 60 else f"on {moment(unix_ms)[:10]}"


def layers(ranges: Iterable[tuple[int, int]]) -> str:
    """Layer ranges, the last one included, as people count: "0-3, 6"."""
    return ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in ranges) or "none"


def short_id(peer_id: str) -> str:
    """Enough of a peer id to tell peers apart, and to give back to a command: the first eight characters are always the same."""
    return peer_id[:16]


def console(shared: Shared, *, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Not a terminal: a fixed width, so that what a script or a log gets does not depend on where it runs.
    width = None if stream.isatty() else 120
    return Console(
        file=stream, no_color=shared.no_color or "NO_COLOR" in os.environ or None, highlight=False, soft_wrap=False, width=width
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = (), wrap: Iterable[str] = ()) -> Table:
    """A plain table. `right`: the columns of numbers. `wrap`: those that may take several lines; the others stay whole."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    numbers, wrapping = set(right), set(wrap)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in numbers else "left",
            overflow="fold" if column in wrapping else "ellipsis",
            no_wrap=column not in wrapping,
        )
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def paragraph(shared: Shared, text: str) -> None:
    """Running text: broken between words on a terminal, one line elsewhere."""
    from rich.text import Text

    screen = console(shared)
    screen.print(Text(printable(text)), soft_wrap=not screen.is_terminal)


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Name and value per line."""
    entries = list(rows)
    width = max(len(name) for name, _ in entries)
    for name, value in entries:
        click.echo(f"{name:<{width}}  {printable(value)}")
