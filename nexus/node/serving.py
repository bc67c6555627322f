"""What the user of a node does with fragments and versions: `FragmentsApi` over the services that do the work; and leaving."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

import structlog
import trio

from nexus.core.errors import NotAllowedError, UsageError
from nexus.core.keys import public_key_of
from nexus.core.manifest import Manifest
from nexus.models import BUILTIN_NAMES
from nexus.node.fragments import Fragments
from nexus.node.fragments_api import DEADLINE_MAX_S, DrainView, ServeRequest, ServingView, VersionView
from nexus.node.progress import Notice, Progress
from nexus.storage.catalog import check_name
from nexus.swarm.fragments import Publication

log = structlog.get_logger("nexus.serving")

LOOK_S = 0.5


class Sessions(Protocol):
    """What runs on this node."""

    def refuse_new(self, refused: bool) -> None:
        """Whether sessions of others and requests of this node's users are turned away from now on."""

    def hand_over(self) -> None:
        """Tell the coordinators of what is served here to go on elsewhere."""

    @property
    def running(self) -> int: ...


ImportModel = Callable[[Path | str, str], AsyncGenerator[Progress | Notice | Manifest, None]]


class Serving:
    """`resolve`: the model that a name stands for. `find_peer`: the peer that a user means. `import_model`: takes in a source in a
    profile, without a name. `announce`: tells the others that this node leaves, or stays after all."""

    def __init__(
        self,
        fragments: Fragments,
        resolve: Callable[[str], Awaitable[tuple[str, bytes]]],
        find_peer: Callable[[str], str],
        import_model: ImportModel,
        sessions: Sessions,
        announce: Callable[[], None],
    ) -> None:
        self._fragments = fragments
        self._resolve = resolve
        self._find_peer = find_peer
        self._import_model = import_model
        self._sessions = sessions
        self._announce = announce

    async def serve(self, request: ServeRequest) -> AsyncGenerator[Progress | Notice | ServingView, None]:
        check_name(request.name)
        await self._fragments.meet()
        publisher = None if request.publisher is None else public_key_of(self._find_peer(request.publisher))
        root = self._fragments.names().get(request.name)
        if root is None and publisher is not None:
            root = self._fragments.versions.root_of(publisher, request.name)
        if root is None:
            _, root = await self._resolve(request.name)
        async with aclosing(self._fragments.serve(request, root, publisher)) as events:
            async for event in events:
                yield event

    async def unserve(self, name: str) -> list[str]:
        return await self._fragments.unserve(name)

    async def serving(self) -> list[ServingView]:
        return self._fragments.views()

    async def versions(self, name: str) -> list[VersionView]:
        return self._fragments.versions.views(name)

    async def update(self, name: str, source: Path | str, profile: str) -> AsyncGenerator[Progress | Notice | VersionView, None]:
        self._fragments.versions.check_may_publish(name)
        if str(source) not in BUILTIN_NAMES and not Path(source).is_absolute():
            raise UsageError(f"{str(source)!r} is no absolute path", "The daemon has a working directory of its own")
        async with aclosing(self._import_model(source, profile)) as events:
            async for event in events:
                if not isinstance(event, Manifest):
                    yield event
                    continue
                publication = await self._fragments.versions.publish(name, event)
        async with aclosing(self._rolled(publication)) as progress:
            async for item in progress:
                yield item

    async def rollback(self, name: str, to: int | None) -> AsyncGenerator[Progress | Notice | VersionView, None]:
        publication = await self._fragments.versions.publish(name, self._fragments.versions.earlier(name, to))
        async with aclosing(self._rolled(publication)) as progress:
            async for item in progress:
                yield item

    async def _rolled(self, publication: Publication) -> AsyncGenerator[Progress | Notice | VersionView, None]:
        yield VersionView(publication.version, publication.model_root)
        async with aclosing(self._fragments.versions.rolling(publication)) as progress:
            async for event in progress:
                yield event

    async def drain(self, deadline_s: float) -> AsyncGenerator[DrainView, None]:
        """First others take over what this node serves, while it goes on serving; then it takes nothing new and what runs here ends
        or goes on elsewhere. So there is no moment in which a layer is nowhere."""
        if self._fragments.leaving:
            raise NotAllowedError("this node is draining already", "`nexus status` shows how far it is")
        if not 0 <= deadline_s <= DEADLINE_MAX_S:
            raise UsageError(f"the deadline is {deadline_s:g} s", f"Give 0 to {DEADLINE_MAX_S:g} seconds")
        until_s = trio.current_time() + deadline_s
        self._fragments.leaving = True
        done = False
        told: DrainView | None = None
        handed_over = False
        try:
            self._announce()
            await self._fragments.meet()
            while not done:
                models = tuple(await self._fragments.hand_over())
                left_s = max(0.0, until_s - trio.current_time())
                if not handed_over and (not left_s or not any(one.waiting for one in models)):
                    handed_over = True
                    self._sessions.refuse_new(True)
                    self._sessions.hand_over()
                    log.info("drain_handed_over", models=len(models), sessions=self._sessions.running)
                done = handed_over and (not self._sessions.running or not left_s)
                view = DrainView(models, self._sessions.running, left_s, done)
                if told is None or done or (view.models, view.sessions) != (told.models, told.sessions):
                    told = view
                    yield view
                if not done:
                    await trio.sleep(min(LOOK_S, max(0.01, left_s)))
        finally:
            if not done:
                log.info("drain_called_off")
                self._fragments.leaving = False
                self._sessions.refuse_new(False)
                self._announce()
