"""FragmentsApi without a swarm: it remembers what it was asked for, and answers as a node would."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import trio

from nexus.core.errors import CapacityError, NotFoundError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.node.fragments_api import DrainView, HandOverView, ServeRequest, ServingView, VersionView
from nexus.node.progress import Notice, Progress

PUBLISHER = Identity(bytes([9]) * 32)
ROOT, NEW_ROOT = leaf_hash(b"one"), leaf_hash(b"two")


def serving_view(request: ServeRequest) -> ServingView:
    return ServingView(
        name=request.name,
        publisher=PUBLISHER.peer_id,
        version=2,
        model_root=ROOT,
        layers=12,
        fragment=request.fragment,
        served=((0, 6),),
        fetching=(),
        older=(),
        state="serving",
        detail="",
        memory_max_bytes=request.memory_max_bytes,
        disk_max_bytes=request.disk_max_bytes,
        upload_max_bytes=request.upload_max_bytes,
        replicas=(2,) * 6 + (1,) * 6,
        short="layers 6-11 have 1 of 2 replicas: 1.0 MiB missing",
    )


class FakeFragments:
    """The name "missing" is not known; "huge" has no room. `waits`: draining comes to no end."""

    def __init__(self) -> None:
        self.served: list[ServeRequest] = []
        self.updated: list[tuple[str, Path | str, str]] = []
        self.deadlines: list[float] = []
        self.waits = False
        self.off: trio.Event | None = None  # set when a drain is called off

    async def serve(self, request: ServeRequest) -> AsyncGenerator[Progress | Notice | ServingView, None]:
        if request.name == "missing":
            raise NotFoundError("no model 'missing' here", "`nexus model list`")
        if request.name == "huge":
            raise CapacityError("layers 0-5 of 'huge' take 9 bytes of memory, and 5 are given", "Raise --max-memory")
        self.served.append(request)
        yield Progress(PUBLISHER.peer_id, "fetching", 10, 100)
        yield Notice("layers 6-11 have 1 of 2 replicas\x1b[2J")
        yield serving_view(request)

    async def unserve(self, name: str) -> list[str]:
        if name == "missing":
            raise NotFoundError("this node does not undertake to serve 'missing'", "`nexus model serve`")
        return [f"nobody else in reach serves layers 6-11 of {name!r}"]

    async def serving(self) -> list[ServingView]:
        return [serving_view(request) for request in self.served]

    async def versions(self, name: str) -> list[VersionView]:
        return [VersionView(1, ROOT), VersionView(2, NEW_ROOT)]

    async def update(self, name: str, source: Path | str, profile: str) -> AsyncGenerator[Progress | Notice | VersionView, None]:
        self.updated.append((name, source, profile))
        yield Progress(PUBLISHER.peer_id, "import", 10, 100)
        yield VersionView(2, NEW_ROOT)
        yield Progress(PUBLISHER.peer_id, "layers served in version 2", 12, 12)

    async def rollback(self, name: str, to: int | None) -> AsyncGenerator[Progress | Notice | VersionView, None]:
        yield VersionView(3 if to is None else to + 10, ROOT)
        yield Notice("nobody serves it")

    async def drain(self, deadline_s: float) -> AsyncGenerator[DrainView, None]:
        self.deadlines.append(deadline_s)
        done = False
        try:
            yield DrainView((HandOverView("nano", ROOT, (), ((0, 6),), ((0, 6),), ()),), 1, deadline_s, False)
            if self.waits:
                await trio.sleep_forever()
            done = True
            yield DrainView((HandOverView("nano", ROOT, ((0, 6),), (), (), ("node\x1b[31m",)),), 0, 1.0, True)
        finally:
            if not done and self.off is not None:
                self.off.set()
