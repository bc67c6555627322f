"""The CLI's end of the control API: one connection to the daemon's Unix socket, typed answers, errors as `NexusError`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx

from nexus.core.errors import (
    DaemonNotRunningError,
    LocalError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    TimedOutError,
    UsageError,
)
from nexus.gateway.problems import error_of
from nexus.gateway.wire import ERROR_EVENT, Json, event_from_json, from_json
from nexus.node.api import StreamItem
from nexus_cli.options import Shared
from nexus_config.settings import control_socket

T = TypeVar("T")

ANSWER_TIMEOUT_S = 30.0
LINE_BYTES_MAX = 512 * 1024 * 1024


@contextmanager
def deadline(timeout_s: float | None) -> Iterator[None]:
    """Raise TimedOutError in the block when it takes longer, wherever it is. For the main thread of a command."""
    if timeout_s is None:
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise TimedOutError(f"no answer within {timeout_s:g} s", "Give it longer with --timeout, or look at: nexus doctor")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Daemon:
    """A running daemon, by its control socket. Every method raises `NexusError`."""

    def __init__(
        self, socket: Path, answer_timeout_s: float | None = None, start_with: str = "Start one with: nexus start --detach"
    ) -> None:
        """`start_with`: what to tell a user whose daemon does not run."""
        self.socket = socket
        self._start_with = start_with
        transport = httpx.HTTPTransport(uds=str(socket))
        # The deadline of a whole command is `deadline`; this one is for every single answer.
        self._http = httpx.Client(
            transport=transport, base_url="http://nexusd", timeout=httpx.Timeout(answer_timeout_s, connect=5.0)
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Json:
        with self._explained():
            return self._answer(self._http.get(path))

    def get_as(self, kind: type[T], path: str) -> T:
        return from_json(kind, self.get(path))

    def get_list(self, kind: type[T], path: str, key: str) -> tuple[T, ...]:
        return _list_of(kind, self.get(path), key)

    def post(self, path: str, body: Mapping[str, Json]) -> Json:
        return self.post_bytes(path, _encode(body))

    def post_as(self, kind: type[T], path: str, body: Mapping[str, Json]) -> T:
        return from_json(kind, self.post(path, body))

    def post_list(self, kind: type[T], path: str, body: Mapping[str, Json], key: str) -> tuple[T, ...]:
        return _list_of(kind, self.post(path, body), key)

    def post_bytes(self, path: str, body: bytes) -> Json:
        """With a body that is not JSON."""
        with self._explained():
            return self._answer(self._http.post(path, content=body))

    def stream(self, path: str, body: Mapping[str, Json]) -> Iterator[StreamItem]:
        """Events as they come. Leaving the loop closes the connection, which cancels the work."""
        with self._explained(), self._http.stream("POST", path, content=_encode(body)) as response:
            if response.status_code >= 400:
                response.read()
                self._answer(response)
            for line in _lines(response.iter_bytes()):
                value = _decode(line)
                if isinstance(value, Mapping) and value.get("event") == ERROR_EVENT:
                    problem = value.get("problem")
                    raise error_of(problem if isinstance(problem, Mapping) else {})
                yield event_from_json(value)

    def _answer(self, response: httpx.Response) -> Json:
        value = _decode(response.text)
        if response.status_code >= 400:
            raise error_of(value if isinstance(value, Mapping) else {})
        return value

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            if isinstance(_root_cause(error), PermissionError):
                raise NotAllowedError(
                    f"the control socket {self.socket} belongs to another user", "Run as the user of the daemon"
                ) from error
            raise DaemonNotRunningError(f"no daemon answers at {self.socket}", self._start_with) from error
        except httpx.TimeoutException as error:
            raise TimedOutError(
                "the daemon does not answer", "It may be busy starting; try again, or look at: nexus doctor"
            ) from error
        except httpx.TransportError as error:
            raise DaemonNotRunningError(
                "the daemon went away while it answered", "Its log says why; start it with: nexus start"
            ) from error


def _list_of(kind: type[T], answer: Json, key: str) -> tuple[T, ...]:
    entries = answer.get(key) if isinstance(answer, Mapping) else None
    if not isinstance(entries, list):
        raise LocalError(f"the daemon's answer has no list of {key}", "Run the same version of nexus and nexusd")
    return tuple(from_json(kind, entry) for entry in entries)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a stream. They end in a line feed alone: JSON text may hold other characters that Unicode counts as ends."""
    rest = bytearray()
    for chunk in chunks:
        start = len(rest)
        rest += chunk
        while (end := rest.find(b"\n", start)) >= 0:
            yield rest[:end].decode("utf-8", "replace")
            del rest[: end + 1]
            start = 0
        if len(rest) > LINE_BYTES_MAX:
            raise LocalError("the daemon's answer has no end", "Run the same version of nexus and nexusd")
    if rest:
        yield rest.decode("utf-8", "replace")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def _encode(body: Mapping[str, Json]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        given = next((name for name, value in body.items() if isinstance(value, str) and not _is_text(value)), "the input")
        raise UsageError(f"{given} is not valid UTF-8", "Give it in UTF-8; rename a file or directory whose name is not") from error


def _is_text(text: str) -> bool:
    """Python keeps bytes of an argument that are not UTF-8 as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def model_path(name: str) -> str:
    """Where the control API has the model. Raises NotFoundError for what cannot be a model's name."""
    if not name or "/" in name or name in (".", "..") or not name.isprintable():
        raise NotFoundError(f"no model can be called {name!r}", "`nexus model list` shows those that there are")
    return f"/v0/models/{quote(name, safe='')}"


def _decode(text: str) -> Json:
    try:
        value: Json = json.loads(text)
    except ValueError as error:
        raise LocalError("the daemon's answer is not JSON", "Run the same version of nexus and nexusd") from error
    return value


@contextmanager
def connected(shared: Shared, default_timeout_s: float | None = ANSWER_TIMEOUT_S) -> Iterator[Daemon]:
    """The daemon of this command's data directory, with the command's deadline running. `default_timeout_s` None: no limit."""
    known = (shared.path / "identity.key").exists()
    daemon = Daemon(
        control_socket(shared.settings(), shared.path),
        start_with="Start one with: nexus start --detach"
        if known
        else f"There is no node at {shared.path}. Make one with: nexus init, or say where it is with --home or NEXUS_HOME",
    )
    try:
        with deadline(shared.timeout_s if shared.timeout_s is not None else default_timeout_s):
            yield daemon
    finally:
        daemon.close()


def alive(socket: Path) -> bool:
    """Whether a daemon answers there now."""
    daemon = Daemon(socket)
    try:
        daemon.get("/livez")
    except NexusError:
        return False
    finally:
        daemon.close()
    return True
