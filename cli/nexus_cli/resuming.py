"""An answer whose daemon goes away in the middle is taken up again when the daemon is back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from nexus_cli import show

if TYPE_CHECKING:
    from nexus.gateway.wire import Json
    from nexus.node.api import StreamItem
    from nexus_cli.client import Daemon

# A daemon that is started again is there, and knows its peers, well before.
WAIT_S = 60.0
EVERY_S = 0.5


def answer_events(daemon: Daemon, path: str, body: Mapping[str, Json]) -> Iterator[StreamItem]:
    """Events of an answer, to its end, over as many daemon's lives as it takes; no token comes twice."""
    from nexus.core.errors import CapacityError, DaemonNotRunningError, NotAllowedError, NotFoundError, TimedOutError
    from nexus.node.api import Planned, Token
    from nexus.node.progress import Notice

    answer: str | None = None
    tokens: dict[int, int] = {}
    until_s: float | None = None
    lost: DaemonNotRunningError | None = None
    while True:
        try:
            for event in daemon.stream(path, body):
                if isinstance(event, Planned):
                    answer, until_s = event.answer.hex(), None
                elif isinstance(event, Token):
                    tokens[event.step] = event.token
                yield event
            return
        except DaemonNotRunningError as error:
            if answer is None:
                raise
            if until_s is None:
                until_s, lost = time.monotonic() + WAIT_S, error
                yield Notice(f"the daemon went away after {show.count(len(tokens), 'token')}: the answer goes on when it is back")
        except (NotFoundError, NotAllowedError, CapacityError, TimedOutError):
            # Just started, it may not have met anybody yet, or not have noticed that we were gone.
            if until_s is None or lost is None:
                raise
        if time.monotonic() >= until_s:
            raise lost if lost is not None else AssertionError
        time.sleep(EVERY_S)
        path, body = "/v0/run/resume", {"answer": answer, "tokens": [tokens[step] for step in sorted(tokens)]}
