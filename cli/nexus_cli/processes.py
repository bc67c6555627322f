"""Daemon processes from the outside: start one in the background, wait for it, end it, and never end anybody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexus.core.errors import LocalError, NexusError, NotAllowedError, NotFoundError, UsageError

DAEMON = "nexus_cli.daemon"
LOG_TAIL_BYTES = 4096
LOG_KEPT_BYTES = 8 * 1024 * 1024
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it will be found again: a pid alone may by then be somebody else's. `started`: opaque, as the system says it."""

    pid: int
    started: str


def find_process(pid: int) -> Process | None:
    """The running process with this pid; None if there is none, or only what is left of one until its parent asks."""
    started = _start_time(pid)
    return Process(pid, started) if started else None


def is_running(process: Process) -> bool:
    return find_process(process.pid) == process


def _start_time(pid: int) -> str:
    """Linux tells by /proc, others by ps. Empty if it does not run."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        except OSError:
            return ""
        # The name in parentheses may hold anything; state is the first field after it, the start time the twentieth.
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    shown = subprocess.run(  # noqa: S603
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, timeout=10
    ).stdout.split(maxsplit=1)
    return "" if len(shown) < 2 or shown[0].startswith("Z") else shown[1].strip()


def send_signal(process: Process, number: signal.Signals) -> bool:
    """Signal that process and no other. False if it is gone already."""
    if not is_running(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise NotAllowedError(f"process {process.pid} belongs to another user", "Run as the user that started it") from error
    return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: an impatient second one must not leave half of a cleanup undone. For short, bounded work only."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for_end(processes: Sequence[Process], timeout_s: float) -> list[Process]:
    """Those that still run after the time."""
    until = time.monotonic() + timeout_s
    running = [process for process in processes if is_running(process)]
    while running and time.monotonic() < until:
        time.sleep(POLL_S)
        running = [process for process in running if is_running(process)]
    return running


def spawn_daemon(
    home: Path, arguments: Sequence[str], log_file: Path, environ: Mapping[str, str], module: str = DAEMON
) -> subprocess.Popen[bytes]:
    """Start nexusd in a session of its own, so that a Ctrl-C here does not reach it. Its log goes to `log_file`."""
    try:
        if log_file.exists() and log_file.stat().st_size > LOG_KEPT_BYTES:
            log_file.replace(log_file.with_name(log_file.name + ".1"))
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise LocalError(
            f"cannot write the log {log_file}: {error.strerror}", "Make the directory, and writable for you"
        ) from error
    try:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", module, "--home", str(home), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            env=dict(environ),
            cwd="/",
        )
    finally:
        os.close(descriptor)


def log_size(log_file: Path) -> int:
    """Where the log ends now; what comes after is the next daemon's."""
    return log_file.stat().st_size if log_file.exists() else 0


def last_words(exit_code: int, log_file: Path, since: int) -> NexusError:
    """The error that a daemon ended with at once, as its own: same cause, fix and exit code."""
    kinds: Mapping[int, type[NexusError]] = {kind.exit_code: kind for kind in (UsageError, NotAllowedError, NotFoundError)}
    said, marker, fix = why_it_ended(log_file, since).partition("\nfix: ")
    if not marker:
        return LocalError(f"the daemon ended at once, with exit code {exit_code}. It says:\n{said}", f"All of its log: {log_file}")
    cause = said.removeprefix("error: ")
    return kinds.get(exit_code, LocalError)(f"the daemon ended at once: {cause}", f"{fix}\nall of its log: {log_file}")


def why_it_ended(log_file: Path, since: int = 0) -> str:
    """What a daemon wrote last: its error and fix if it got so far, otherwise the end of its log."""
    try:
        with log_file.open("rb") as stream:
            stream.seek(max(since, log_file.stat().st_size - LOG_TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "it left no log"
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-12:])
