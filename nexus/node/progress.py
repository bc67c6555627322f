"""What any long work of a node tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` and `total` count bytes while fetching, other things as `phase` says, 0 of 0 while only waiting. `peer_id`: the node
    that reports it."""

    peer_id: str
    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that whoever asked should know, in a sentence. It is not an error."""

    text: str
