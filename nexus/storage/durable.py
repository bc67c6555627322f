"""Small files that survive a crash: written whole under another name, synced, renamed, and the directory synced."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from nexus.core.errors import LocalError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def storage_error(error: OSError, path: Path) -> LocalError:
    """What a failed file operation means to the owner of this machine."""
    if error.errno in _FULL:
        return LocalError(
            f"the disk that holds {path} is full",
            "Free some space there and try again; what was stored is kept",
        )
    reason = error.strerror or type(error).__name__
    return LocalError(f"{path} cannot be used: {reason}", "Check that the disk is healthy and that your user may write there")


def sync_directory(path: Path) -> None:
    """Make renames and removals in this directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes, offset: int) -> None:
    """`pwrite` until all of it is written: a single call may write less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` (mode 0600): after a crash there is the old file or the new one, whole. Raises LocalError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            try:
                write_all(handle, data, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


def move_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged`, replacing an older one, and say where it is. Raises LocalError."""
    aside = path.with_name(path.name + ".damaged")
    try:
        path.replace(aside)
        sync_directory(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    return aside
