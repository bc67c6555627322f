"""Bars on stderr for work that counts more than one thing; nothing where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from nexus_cli import show
from nexus_cli.options import Shared

if TYPE_CHECKING:
    from rich.progress import TaskID

BARS_MAX = 16


class Advance(Protocol):
    def __call__(self, bar: str, label: str, done: int, total: int, amount: str = "") -> None:
        """Move a bar, which appears when it is first named. `amount`: what stands behind it, "done of total" otherwise. `total` 0:
        it is not known, and the bar only moves."""


@contextmanager
def waiting_for(shared: Shared, what: str) -> Iterator[None]:
    """A bar that only moves, while an answer takes its time."""
    with bars(shared) as advance:
        advance("waiting", what, 0, 0)
        yield


@contextmanager
def bars(shared: Shared) -> Iterator[Advance]:
    """What is printed to stdout has to wait until they are gone: it would end up on stderr, where they are."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = show.console(shared, stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}", markup=False))
    with Bars(*columns, console=console, transient=True, disable=shared.json or not console.is_terminal) as screen:
        tasks: dict[str, TaskID] = {}

        def advance(bar: str, label: str, done: int, total: int, amount: str = "") -> None:
            if bar not in tasks and len(tasks) < BARS_MAX:
                tasks[bar] = screen.add_task("", total=None, amount="")
            if bar in tasks:
                screen.update(
                    tasks[bar],
                    description=show.printable(label),
                    completed=done,
                    total=total or None,
                    amount=show.printable(amount or (f"{done} of {total}" if total else "")),
                )

        yield advance
