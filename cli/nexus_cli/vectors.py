"""What commands of the memory share about vectors that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nexus_cli import values

if TYPE_CHECKING:
    from nexus.gateway.wire import Json

F = TypeVar("F", bound=Callable[..., Any])


def vector_options(function: F) -> F:
    """A vector that was computed elsewhere."""
    for option in reversed(
        (
            click.option(
                "--vector",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Its vector, computed elsewhere: a JSON list of numbers.",
            ),
            click.option("--vector-model", type=values.text, metavar="NAME", help="The model that computed --vector."),
            click.option(
                "--vector-fingerprint",
                type=values.text,
                metavar="HEX",
                help="64 hex digits that are the same for all vectors of that model.",
            ),
        )
    ):
        function = option(function)
    return function


def vector_body(vector: Path | None, model: str | None, fingerprint: str | None) -> dict[str, Json]:
    """The vector as a request has it; empty without one."""
    from nexus_cli.documents import read_vector

    together = (vector, model, fingerprint)
    if any(together) and not all(together):
        raise click.UsageError("--vector, --vector-model and --vector-fingerprint belong together")
    return {"vector": read_vector(vector), "vector_model": model, "vector_fingerprint": fingerprint} if vector else {}
