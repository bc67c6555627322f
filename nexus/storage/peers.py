"""The address book: where peers were last seen, so that a node finds its swarm again after a restart without a bootstrap list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nexus.core.errors import LocalError, MalformedError, NexusError
from nexus.core.keys import public_key_of
from nexus.storage.durable import move_aside, replace_file, storage_error

PEERS_MAX = 1024
ADDRESSES_MAX = 16
ADDRESS_CHARS_MAX = 256
FILE_BYTES_MAX = 8 << 20


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """`addresses`: multiaddrs without the /p2p part, as they last worked. `seen_ms`: Unix time."""

    peer_id: str
    addresses: tuple[str, ...]
    seen_ms: int


class AddressBook:
    """Peers that this node has met, in memory until `save`. `warning`: what was wrong with the file, or ""."""

    def __init__(self, path: Path, peers_max: int = PEERS_MAX) -> None:
        """Touches no file; `open` does."""
        self._path = path
        self._peers_max = peers_max
        self._peers: dict[str, KnownPeer] = {}
        self._changed = False
        self.warning = ""

    @classmethod
    def open(cls, path: Path, peers_max: int = PEERS_MAX) -> Self:
        """The book in that file; a damaged one is moved aside and the book starts empty. Raises LocalError if it cannot be read."""
        book = cls(path, peers_max)
        try:
            with open(path, "rb") as file:
                peers = _parse(file.read(FILE_BYTES_MAX + 1))
        except FileNotFoundError:
            return book
        except OSError as error:
            raise storage_error(error, path) from error
        except MalformedError as error:
            aside = move_aside(path)
            book.warning = f"{path} was damaged ({error.cause}) and is now {aside}; peers are learnt anew from the bootstrap list"
            return book
        for peer in peers:
            book._peers[peer.peer_id] = peer
        book._trim()
        book._changed = False
        return book

    def remember(self, peer_id: str, addresses: tuple[str, ...], now_ms: int) -> None:
        """A peer was reached at these addresses. Addresses out of form are left out. Raises MalformedError for a bad peer id."""
        public_key_of(peer_id)
        known = self._peers.get(peer_id)
        good = tuple(dict.fromkeys(address for address in addresses if _is_address(address)))[:ADDRESSES_MAX]
        kept = good or (known.addresses if known else ())
        self._peers[peer_id] = KnownPeer(peer_id, kept, max(now_ms, known.seen_ms if known else 0, 0))
        self._changed = True
        self._trim()

    def forget(self, peer_id: str) -> None:
        self._changed |= self._peers.pop(peer_id, None) is not None

    def get(self, peer_id: str) -> KnownPeer | None:
        return self._peers.get(peer_id)

    def peers(self) -> list[KnownPeer]:
        """The last seen first."""
        return sorted(self._peers.values(), key=lambda peer: (-peer.seen_ms, peer.peer_id))

    def save(self) -> None:
        """Write the file if anything changed since the last time. Raises LocalError."""
        if not self._changed:
            return
        self._changed = False  # before looking, so that what changes meanwhile is written next time
        listed = [{"peer_id": peer.peer_id, "addresses": peer.addresses, "seen_ms": peer.seen_ms} for peer in self.peers()]
        try:
            replace_file(self._path, json.dumps({"spec": 1, "peers": listed}, indent=1).encode() + b"\n")
        except LocalError:
            self._changed = True
            raise

    def _trim(self) -> None:
        for peer in self.peers()[self._peers_max :]:
            del self._peers[peer.peer_id]


def _is_address(text: object) -> bool:
    return (
        isinstance(text, str) and text.startswith("/") and len(text) <= ADDRESS_CHARS_MAX and text.isprintable() and text.isascii()
    )


def _parse(raw: bytes) -> list[KnownPeer]:
    if len(raw) > FILE_BYTES_MAX:
        raise MalformedError("too large")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MalformedError("not JSON") from error
    entries = value.get("peers") if isinstance(value, dict) and value.get("spec") == 1 else None
    if not isinstance(entries, list):
        raise MalformedError("not a list of peers")
    return [_parse_peer(entry) for entry in entries]


def _parse_peer(entry: object) -> KnownPeer:
    if not isinstance(entry, dict) or set(entry) != {"peer_id", "addresses", "seen_ms"}:
        raise MalformedError("an entry that is no peer")
    peer_id, addresses, seen_ms = entry["peer_id"], entry["addresses"], entry["seen_ms"]
    if not isinstance(peer_id, str) or not isinstance(addresses, list) or len(addresses) > ADDRESSES_MAX:
        raise MalformedError("an entry that is no peer")
    if type(seen_ms) is not int or not 0 <= seen_ms < 2**53 or not all(_is_address(address) for address in addresses):
        raise MalformedError("an entry that is no peer")
    try:
        public_key_of(peer_id)
    except NexusError as error:
        raise MalformedError("an entry without a peer id") from error
    return KnownPeer(peer_id, tuple(addresses), seen_ms)
