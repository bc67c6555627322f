"""What a node offers to whoever steers it, of serving fragments, versions of models, and leaving. Plain data in, plain data out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nexus.node.progress import Notice, Progress

DEADLINE_MAX_S = 7 * 86_400.0

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """`fragment`: "auto", or layers as "A-B" with the last one included. Limits in bytes, and bytes per second; 0: none but the
    node's own. `publisher`: the peer whose versions count, by id or name; None: as it follows from who announces the name.
    `preload`: load layers as soon as they are here."""

    name: str
    fragment: str = "auto"
    memory_max_bytes: int = 0
    disk_max_bytes: int = 0
    upload_max_bytes: int = 0
    publisher: str | None = None
    preload: bool = False


@dataclass(frozen=True, slots=True)
class VersionView:
    """A version of a name, and which model it is."""

    version: int
    model_root: bytes


@dataclass(frozen=True, slots=True)
class ServingView:
    """What this node undertook for one name, and how it stands.

    `publisher`: whose versions it follows, "" where nobody's. `version`: 0 where the name has none. `fragment`: as it was
    asked for. `served`, `fetching`: layers [start, end) of that version. `older`: versions that are still served beside it.
    `state`: "serving", "fetching", "loading" or "waiting", with `detail`. `replicas`: per layer the nodes in reach that serve it,
    this one too. `short`: what the swarm lacks for this model, or ""."""

    name: str
    publisher: str
    version: int
    model_root: bytes
    layers: int
    fragment: str
    served: Ranges
    fetching: Ranges
    older: tuple[VersionView, ...]
    state: str
    detail: str
    memory_max_bytes: int
    disk_max_bytes: int
    upload_max_bytes: int
    replicas: tuple[int, ...]
    short: str


@dataclass(frozen=True, slots=True)
class HandOverView:
    """How far a model is with leaving this node. Layers that enough others serve, those that wait for it, and those that
    nobody else serves. `to`: the others, by name."""

    name: str
    model_root: bytes
    handed_over: Ranges
    waiting: Ranges
    lost: Ranges
    to: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrainView:
    """How far a node is with leaving. `sessions`: requests and stages that still run here. `left_s`: until it leaves in any case.
    `done`: it leaves now, and the daemon ends."""

    models: tuple[HandOverView, ...]
    sessions: int
    left_s: float
    done: bool


class FragmentsApi(Protocol):
    """Every method raises the errors of `nexus.core.errors`."""

    def serve(self, request: ServeRequest) -> AsyncIterator[Progress | Notice | ServingView]:
        """Undertake to serve a model, durably; progress, then how it stands as the last item. The undertaking stays when the
        iterator is closed."""
        ...

    async def unserve(self, name: str) -> list[str]:
        """End an undertaking; what is to be said of it."""
        ...

    async def serving(self) -> list[ServingView]: ...

    async def versions(self, name: str) -> list[VersionView]:
        """The versions of a name that are known here, the oldest first."""
        ...

    def update(self, name: str, source: Path | str, profile: str) -> AsyncIterator[Progress | Notice | VersionView]:
        """Take a model in as the next version of a name; the new version comes before the progress of the swarm with it. The
        version stays when the iterator is closed."""
        ...

    def rollback(self, name: str, to: int | None) -> AsyncIterator[Progress | Notice | VersionView]:
        """Make an earlier version's content the next version, as `update` does."""
        ...

    def drain(self, deadline_s: float) -> AsyncIterator[DrainView]:
        """Hand over what this node serves and what runs here; the last item is done, and then the caller ends the daemon. Closing
        the iterator before that calls it off."""
        ...
