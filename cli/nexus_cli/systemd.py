"""sd_notify(3) in a few lines: tell the service manager that we are ready, alive, stopping. Does nothing without NOTIFY_SOCKET."""

from __future__ import annotations

import socket
from collections.abc import Mapping


def notify(message: str, environ: Mapping[str, str]) -> None:
    """Send one datagram such as "READY=1". A service manager that is gone is no reason to stop."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    # "@" stands for the abstract namespace, whose names start with a zero byte.
    name = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.setblocking(False)
            notifier.sendto(message.encode("utf-8"), name)
    except OSError:
        return


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Half of the time after which the service manager takes us for hung; None where it does not watch."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(usec) / 1_000_000 / 2
