"""One process of `scripts/bench transfer`: a node with its blobs, or one end of plain TLS between two files.

python -m scripts.benchmarks.transfer_child node DIRECTORY UPLOAD_MAX     announces where it is, then serves and fetches
python -m scripts.benchmarks.transfer_child tls                           one end of the comparison
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
import trio

from nexus.core.keys import Identity
from nexus.core.manifest import Manifest
from nexus.network.fastpath import FastPathOptions, _Contexts, open_fastpath
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.transport import PeerAddress
from nexus.node.blobs import BlobService, Fetcher
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog

HOST = "127.0.0.1"
BUFFER = 1 << 20


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


async def node(directory: str, upload_max: str) -> None:
    identity = Identity(os.urandom(32))
    listen = NetworkOptions(listen=(f"/ip4/{HOST}/tcp/0",), mdns=False)
    path = Path(directory)
    store, catalog = BlobStore.open(path), Catalog.open(path)
    async with open_libp2p(identity, listen) as below, open_fastpath(below, identity, FastPathOptions((HOST,))) as fast:
        BlobService(fast, store, catalog, upload_max=int(upload_max)).start()
        answer(peer_id=identity.peer_id, addresses=[text.rpartition("/p2p/")[0] for text in below.addresses])
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            ask = json.loads(line)
            if ask["do"] == "fetch":
                target = Path(ask["into"])
                fetcher = Fetcher(fast if ask["fast"] else below, BlobStore.open(target), Catalog.open(target))
                answer(**await fetch(fetcher, ask, fast if ask["fast"] else None))
            elif ask["do"] == "peak":
                answer(peak=memory("VmHWM"))
                forget_peak()
            elif ask["do"] == "resident":
                forget_peak()
                answer(resident=memory("VmRSS"))


async def fetch(fetcher: Fetcher, ask: dict[str, Any], fast: Any) -> dict[str, object]:
    manifest = Manifest.from_bytes(bytes.fromhex(ask["manifest"]))
    sources = [PeerAddress(peer_id, tuple(addresses)) for peer_id, addresses in ask["sources"]]
    opened = fast.opened_fast if fast is not None else 0
    forget_peak()
    before = memory("VmRSS")

    async def progress(phase: str, done: int, total: int) -> None:
        if ask.get("tell"):
            answer(done=done)

    began = time.perf_counter()
    cpu = time.process_time()
    fetched = await fetcher.blobs(manifest, (*manifest.files, *manifest.pieces), sources, progress)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "received": dict(fetched.received_bytes),
        "growth": memory("VmHWM") - before,
        "fast": fast.opened_fast - opened if fast is not None else 0,
    }


def tls() -> None:
    """Serves one file to one connection after the other, and fetches such a file into another: with Python's blocking ssl."""
    contexts = _Contexts.fresh()
    listener = socket.create_server((HOST, 0))
    source: list[str] = [""]

    def serve() -> None:
        while True:
            raw, _ = listener.accept()
            with suppress(OSError), contexts.server.wrap_socket(raw, server_side=True) as sock:
                give(sock, source[0])
                sock.recv(1)

    threading.Thread(target=serve, daemon=True).start()
    answer(port=listener.getsockname()[1])
    while line := sys.stdin.readline():
        ask = json.loads(line)
        if ask["do"] == "serve":
            source[0] = ask["file"]
            answer(ok=True)
        elif ask["do"] == "fetch":
            answer(seconds=take(contexts.client, ask["port"], ask["into"], ask["size"]))


def give(sock: ssl.SSLSocket, file: str) -> None:
    buffer = bytearray(BUFFER)
    handle = os.open(file, os.O_RDONLY)
    try:
        offset = 0
        while count := os.preadv(handle, [buffer], offset):
            sock.sendall(memoryview(buffer)[:count])
            offset += count
    finally:
        os.close(handle)


def take(context: ssl.SSLContext, port: int, into: str, size: int) -> float:
    """Seconds, from connecting to the file being on the disk; `into` "": it is thrown away."""
    buffer = memoryview(bytearray(BUFFER))
    began = time.perf_counter()
    with context.wrap_socket(socket.create_connection((HOST, port))) as sock:
        handle = os.open(into, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) if into else -1
        offset = 0
        while offset < size:
            count = 0
            while count < min(BUFFER, size - offset):
                count += sock.recv_into(buffer[count : min(BUFFER, size - offset)])
            if into:
                os.pwrite(handle, buffer[:count], offset)
            offset += count
        if into:
            os.fsync(handle)
            os.close(handle)
    return time.perf_counter() - began


if __name__ == "__main__":
    # Standard output is for the answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if sys.argv[1] == "node":
        trio.run(node, *sys.argv[2:])
    else:
        tls()
