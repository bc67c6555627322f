"""Serve an ASGI application on a Unix socket that nobody but its owner can ever open."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from nexus.core.errors import LocalError

_BACKLOG = 128
_GRACE_S = 3.0


@contextmanager
def bound_socket(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket at `path`, mode 0600 from its first moment; removed at the end.

    One that a crashed daemon left is replaced. Raises LocalError if one is in use, or something else is in its place.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode must hold when bind makes the file: a chmod afterwards would leave a gap. Other threads only get stricter files.
        umask = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        except OSError as error:
            raise LocalError(
                f"cannot make the control socket {path}: {error.strerror or error}", "Set control.socket to another path"
            ) from error
        finally:
            os.umask(umask)
        listener.listen(_BACKLOG)
        made = path.stat().st_ino
        try:
            yield listener
        finally:
            if path.exists() and path.stat().st_ino == made:
                path.unlink()
    finally:
        listener.close()


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise LocalError(f"cannot look at {path}: {error.strerror}", "Set control.socket to another path") from error
    if not stat.S_ISSOCK(mode):
        raise LocalError(f"{path} is in the way of the control socket", "Move it away, or set control.socket to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise LocalError(f"cannot tell whether {path} is in use: {error}", "Stop what uses it, or remove it") from error
        else:
            raise LocalError(f"a daemon answers on {path} already", "Stop it with: nexus stop")
    path.unlink(missing_ok=True)


async def serve_on(listener: socket.socket, app: Callable[..., Awaitable[None]], shutdown: trio.Event) -> None:
    """Answer HTTP/1.1 on `listener` until `shutdown` is set, then let running requests end for a moment."""
    config = Config()
    # A copy of the descriptor: hypercorn closes what it is given.
    config.bind = [f"fd://{os.dup(listener.fileno())}"]
    config.graceful_timeout = _GRACE_S
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    await serve(cast(Any, app), config, shutdown_trigger=shutdown.wait)
