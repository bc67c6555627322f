"""The parts of a node's memory, for those that answer what users ask."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nexus.core.keys import Identity
from nexus.node.memory.accepting import Accepting
from nexus.node.memory.asking import Asking
from nexus.node.memory.charters import Charters
from nexus.node.memory.embedders import Embedders
from nexus.node.memory.finding import Finding
from nexus.node.memory.searching import Searching
from nexus.node.memory.syncing import Syncing
from nexus.node.memory.witnessing import Witnessing
from nexus.node.memory.writing import Writing
from nexus.node.options import MemoryOptions
from nexus.node.progress import Progress
from nexus.storage.memory.store import MemoryStore

T = TypeVar("T")


class Tell(Protocol):
    """Runs long work in a task of the node: its progress as it comes, then what it returned."""

    def __call__(self, work: Callable[[Callable[[Progress], None]], Awaitable[T]], /) -> AsyncGenerator[Progress | T, None]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """`find_peer`: the id of a peer that a user names. `names`: what nodes call themselves, by peer id. `now_ms`: Unix time."""

    identity: Identity
    options: MemoryOptions
    store: MemoryStore
    charters: Charters
    accepting: Accepting
    asking: Asking
    syncing: Syncing
    witnessing: Witnessing
    searching: Searching
    finding: Finding
    writing: Writing
    embedders: Embedders
    find_peer: Callable[[str], str]
    names: Callable[[], dict[str, str]]
    told: Tell
    now_ms: Callable[[], int]
