"""Network namespaces, cables between them, and masquerading NATs: homes and an Internet on one machine, without iptables or nft.

The rules are written into the kernel over netlink (nf_tables), so that nothing but root and iproute2's `ip` is needed. Everything
lives in the namespaces, and goes with them; the machine's own network is not touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

# <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETFILTER = 12
_NLM_REQUEST, _NLM_ACK, _NLM_CREATE = 0x1, 0x4, 0x400
_NLMSG_ERROR, _BATCH_BEGIN, _BATCH_END = 2, 0x10, 0x11
_NFTABLES = 10 << 8
_NEWTABLE, _NEWCHAIN, _NEWRULE = 0, 3, 6
_IPV4 = 2
_NESTED = 0x8000
_CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """What is missing for namespaces on this machine, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (`ip`)"
    name = f"nxprobe{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"this machine gives no network namespaces: {error.stderr.strip()}"
    try:
        inside(name, lambda: _masquerade("lo"))
    except OSError as error:
        return f"this kernel has no nf_tables NAT: {error}"
    finally:
        _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def inside(name: str, work: Callable[[], Any]) -> Any:
    """Run `work` in a namespace, in a thread of its own: a thread may be in another one than its process."""
    out: list[Any] = []

    def run() -> None:
        try:
            with Path("/run/netns", name).open("rb") as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            out.append((work(), None))
        except OSError as error:
            out.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = out[0]
    if error is not None:
        raise error
    return value


# Netlink: attributes are a length, a type and a value, padded to four bytes.


def _attribute(kind: int, value: bytes) -> bytes:
    size = 4 + len(value)
    return struct.pack("HH", size, kind) + value + bytes(-size % 4)


def _nested(kind: int, *values: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(values))


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return _attribute(kind, struct.pack("!I", number & 0xFFFFFFFF))


def _message(kind: int, flags: int, sequence: int, family: int, body: bytes = b"", resource: int = 0) -> bytes:
    payload = struct.pack("!BBH", family, 0, resource) + body
    return struct.pack("IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *attributes))


def _compared(data: bytes) -> bytes:
    """Register 1 equals `data`."""
    return _expression("cmp", _number(1, 1), _number(2, 0), _nested(3, _attribute(1, data)))


def _rule(chain: str, *expressions: bytes) -> tuple[int, bytes]:
    return _NEWRULE, _text(1, "nexus") + _text(2, chain) + _nested(4, *expressions)


def _chain(name: str, kind: str, hook: int, priority: int) -> tuple[int, bytes]:
    return _NEWCHAIN, _text(1, "nexus") + _text(3, name) + _nested(4, _number(1, hook), _number(2, priority)) + _text(7, kind)


def _masquerade(outside: str, *, random_ports: bool = False) -> None:
    """A home router, in the namespace of the calling thread: what leaves by `outside` gets its address, and what comes in there
    uncalled is dropped. `random_ports`: another outside port for each destination (address-dependent mapping)."""
    interface = outside.encode().ljust(16, b"\0")
    out_name, in_name = (_expression("meta", _number(1, 1), _number(2, key)) for key in (7, 6))
    state = _expression("ct", _number(1, 1), _number(2, 0))
    masked = _expression(
        "bitwise",
        _number(1, 1),
        _number(2, 1),
        _number(3, 4),
        _nested(4, _attribute(1, struct.pack("=I", 8 | 1))),  # new or invalid
        _nested(5, _attribute(1, bytes(4))),
    )
    not_zero = _expression("cmp", _number(1, 1), _number(2, 1), _nested(3, _attribute(1, bytes(4))))
    drop = _expression("immediate", _number(1, 0), _nested(2, _nested(2, _number(1, 0))))
    flags = (_number(1, 1 << 4),) if random_ports else ()  # NF_NAT_RANGE_PROTO_RANDOM_FULLY
    steps = [
        (_NEWTABLE, _text(1, "nexus")),
        _chain("out", "nat", 4, 100),
        _rule("out", out_name, _compared(interface), _expression("masq", *flags)),
        _chain("in", "filter", 1, 0),
        _rule("in", in_name, _compared(interface), state, masked, not_zero, drop),
        _chain("through", "filter", 2, 0),
        _rule("through", in_name, _compared(interface), state, masked, not_zero, drop),
    ]
    batch = [_message(_BATCH_BEGIN, _NLM_REQUEST, 0, 0, resource=10)]
    for sequence, (kind, body) in enumerate(steps, 1):
        flags_of = _NLM_REQUEST | _NLM_ACK | _NLM_CREATE | (0x800 if kind == _NEWRULE else 0)
        batch.append(_message(_NFTABLES | kind, flags_of, sequence, _IPV4, body))
    batch.append(_message(_BATCH_END, _NLM_REQUEST, len(steps) + 1, 0, resource=10))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(5)
        netlink.send(b"".join(batch))
        answered = 0
        while answered < len(steps):
            data = netlink.recv(65536)
            while len(data) >= 16:
                size, kind, _, sequence, _ = struct.unpack_from("IHHII", data)
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("i", data, 16)
                    if code:
                        raise OSError(-code, f"nf_tables step {sequence}: {os.strerror(-code)}")
                    answered += 1
                data = data[(size + 3) & ~3 :]


class Internet:
    """A bridge in a namespace of its own, with homes on it. `prefix`: keeps the names of two test runs apart."""

    def __init__(self, stack: ExitStack, prefix: str) -> None:
        self._stack = stack
        self._prefix = prefix
        self._cables = 0
        self.name = self._namespace("net")
        _ip("-n", self.name, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.name, "link", "set", "br0", "up")

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        _ip("netns", "add", full)
        self._stack.callback(_remove, full)
        _ip("-n", full, "link", "set", "lo", "up")
        return full

    def _cable(self, one: str, one_end: str, other: str, other_end: str) -> None:
        self._cables += 1
        ends = [f"{self._prefix}{self._cables}{side}" for side in "ab"]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, space, name in zip(ends, (one, other), (one_end, other_end), strict=True):
            _ip("link", "set", end, "netns", space, "name", name)
            _ip("-n", space, "link", "set", name, "up")

    def host(self, name: str, address: str) -> str:
        """A machine straight on the Internet, at `address` (/24). Its namespace."""
        space = self._namespace(name)
        self._plug(space, address)
        return space

    def _plug(self, space: str, address: str) -> None:
        port = f"p{self._cables}"
        self._cable(space, "wan", self.name, port)
        _ip("-n", self.name, "link", "set", port, "master", "br0")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "wan")

    def home(self, name: str, address: str, inside_address: str, *, random_ports: bool = False) -> str:
        """A machine at `inside_address` (/24) behind a router that masquerades as `address`. The machine's namespace."""
        router = self._namespace(f"{name}r")
        self._plug(router, address)
        space = self._namespace(name)
        self._cable(space, "eth0", router, "lan")
        gateway = f"{inside_address.rpartition('.')[0]}.1"
        _ip("-n", router, "addr", "add", f"{gateway}/24", "dev", "lan")
        _ip("-n", space, "addr", "add", f"{inside_address}/24", "dev", "eth0")
        _ip("-n", space, "route", "add", "default", "via", gateway)
        inside(router, lambda: _route_and_masquerade(random_ports))
        return space


def _route_and_masquerade(random_ports: bool) -> None:
    # /proc/sys/net is the namespace's of the thread that opens it.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    _masquerade("wan", random_ports=random_ports)


def _remove(name: str) -> None:
    """With everything that runs in it."""
    with suppress(subprocess.CalledProcessError):
        for pid in _ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
    with suppress(subprocess.CalledProcessError):
        _ip("netns", "del", name)


@contextmanager
def internet() -> Iterator[Internet]:
    with ExitStack() as stack:
        yield Internet(stack, f"nx{os.getpid() % 100_000}")
