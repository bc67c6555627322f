"""The ids that a node knows of one collection, sorted by time, and salted views of them for reconciliation.

An item is a block's time and id. It is kept as 40 bytes, the time big-endian and the id, so that the order of items is the order of
bytes. `ItemSet` is an array of them; `View` is what one session sees of it: with a keyed hash of every item and their running sums,
so that the fingerprint of any range is the difference of two numbers.

Why the hash is keyed afresh for every session: a sum of unkeyed hashes can be ground. Whoever writes blocks can find two sets of
some thousand blocks with equal sums of 256-bit hashes in about 2^33 steps (a generalised birthday), give one set to one node and
the other to another, and they would never know that they differ. Nobody who writes blocks knows the salt beforehand, and for two
sets that were there before the salt the sums are equal with a chance of 2^-64, once: the next session has another salt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nexus.memory.block import ID_BYTES, TIME_MAX_MS, TIME_MIN_MS

TIME_BYTES = 8
ITEM_BYTES = TIME_BYTES + ID_BYTES
SALT_BYTES = 16
# Before all items, and behind them.
FIRST = bytes(ITEM_BYTES)
END = (TIME_MAX_MS + 1).to_bytes(TIME_BYTES, "big") + bytes(ID_BYTES)

Keys: TypeAlias = "np.ndarray[Any, np.dtype[np.bytes_]]"
Words: TypeAlias = "npt.NDArray[np.uint64]"

_KEY = np.dtype(f"S{ITEM_BYTES}")
_MASK = 2**64 - 1
# So many additions wait at most.
_ADDED_MAX = 4096
# Rows hashed at once: their working arrays fit in a processor's second-level cache.
_ROWS = 4096


class Item(NamedTuple):
    """`t_ms`: in [2^32, 2^53), the time in the block; `id`: 32 bytes."""

    t_ms: int
    id: bytes


def pack_item(item: Item) -> bytes:
    """Its 40 bytes. Raises ValueError for what is no item."""
    if not TIME_MIN_MS <= item[0] <= TIME_MAX_MS or len(item[1]) != ID_BYTES:
        raise ValueError(f"no item: time {item[0]}, id of {len(item[1])} bytes")
    return item[0].to_bytes(TIME_BYTES, "big") + item[1]


def unpack_item(key: bytes) -> Item:
    return Item(int.from_bytes(key[:TIME_BYTES], "big"), key[TIME_BYTES:])


def unpack_items(packed: bytes) -> list[Item]:
    return [unpack_item(packed[at : at + ITEM_BYTES]) for at in range(0, len(packed), ITEM_BYTES)]


def as_keys(packed: bytes | Sequence[bytes]) -> Keys:
    """Packed items, one after another or in a list, as an array that compares like bytes."""
    if isinstance(packed, bytes):
        return np.frombuffer(packed, dtype=_KEY)
    return np.array(packed, dtype=_KEY)


def as_bytes(keys: Keys) -> bytes:
    """What `as_keys` took. (A single element of such an array has lost the zeros at its end.)"""
    return np.ascontiguousarray(keys).tobytes()


class ItemSet:
    """A sorted set of items. Additions are gathered and merged when they are first needed: 100 into 100,000 take milliseconds.

    It belongs to one thread; only `view` may be called from others, while that one goes on.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._keys: Keys = np.empty(0, dtype=_KEY)
        self._added: list[bytes] = []
        self.add(items)

    def add(self, items: Iterable[Item]) -> None:
        """Items that are there already change nothing."""
        self._added.extend([pack_item(item) for item in items])
        if len(self._added) > _ADDED_MAX:
            self._merged()

    def add_packed(self, packed: bytes) -> None:
        """Items as 40 bytes each, one after another, in any order: how a store hands over very many of them. Raises ValueError."""
        if len(packed) % ITEM_BYTES:
            raise ValueError("packed items have 40 bytes each")
        times = np.frombuffer(packed, dtype=[("t", ">u8"), ("id", f"V{ID_BYTES}")])["t"]
        if times.size and not (times.min() >= TIME_MIN_MS and times.max() <= TIME_MAX_MS):
            raise ValueError("a packed item has a time that no block has")
        self._keys = _merge(self._merged(), as_keys(packed))

    def discard(self, items: Iterable[Item]) -> None:
        """Items that are not there change nothing."""
        gone = as_keys([pack_item(item) for item in items])
        keys = self._merged()
        if (there := gone[_found(keys, gone)]).size:
            self._keys = np.delete(keys, np.searchsorted(keys, there))

    def __len__(self) -> int:
        return int(self._merged().size)

    def __contains__(self, item: Item) -> bool:
        return bool(_found(self._merged(), as_keys([pack_item(item)]))[0])

    def __iter__(self) -> Iterator[Item]:
        return iter(unpack_items(as_bytes(self._merged())))

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """Those of `items` that are not in the set, in their order."""
        if not items:
            return []
        found = _found(self._merged(), as_keys([pack_item(item) for item in items]))
        return [item for item, there in zip(items, found.tolist(), strict=True) if not there]

    def view(self, salt: bytes) -> View:
        """The set as it is now: what is added later does not show in it."""
        # In this order, and changing nothing: if the owner merges in between, additions are seen twice and never not at all.
        added = [*self._added]
        return View(_merge(self._keys, as_keys(added)), salt)

    def _merged(self) -> Keys:
        if self._added:
            self._keys = _merge(self._keys, as_keys(self._added))
            self._added = []
        return self._keys


def _merge(keys: Keys, added: Keys) -> Keys:
    """Never in place: views that were handed out keep the array that they have."""
    if not added.size:
        return keys
    fresh = np.unique(added)
    if keys.size:
        fresh = fresh[~_found(keys, fresh)]
        return np.insert(keys, np.searchsorted(keys, fresh), fresh) if fresh.size else keys
    return fresh


def _found(keys: Keys, sought: Keys) -> npt.NDArray[np.bool_]:
    """Which of `sought` are in the sorted `keys`."""
    if not keys.size:
        return np.zeros(sought.size, dtype=np.bool_)
    at = np.minimum(np.searchsorted(keys, sought), keys.size - 1)
    return np.asarray(keys[at] == sought)


class View:
    """A set as one session sees it. Positions are indices into the sorted items; bounds are keys of 40 bytes."""

    __slots__ = ("_keys", "_sums", "hashes", "salt")

    def __init__(self, keys: Keys, salt: bytes) -> None:
        self._keys = keys
        self.salt = salt
        self.hashes = item_hashes(keys, salt)
        self._sums: Words = np.zeros(keys.size + 1, dtype=np.uint64)
        np.cumsum(self.hashes, out=self._sums[1:])

    def __len__(self) -> int:
        return int(self._keys.size)

    def positions(self, bounds: Sequence[bytes]) -> list[int]:
        """For each bound, how many items are before it."""
        return np.searchsorted(self._keys, as_keys(bounds)).tolist() if bounds else []

    def fingerprint(self, low: int, high: int) -> int:
        """The sum of the hashes of items [low, high), modulo 2^64."""
        return (int(self._sums[high]) - int(self._sums[low])) & _MASK

    def keys(self, low: int, high: int) -> list[bytes]:
        return _split(as_bytes(self._keys[low:high]))

    def keys_at(self, positions: Sequence[int]) -> list[bytes]:
        return _split(as_bytes(self._keys[np.asarray(positions, dtype=np.intp)]))

    def bound(self, at: int) -> bytes:
        """The shortest bound with items [0, at) before it and the others behind: a time, or a time and the start of an id."""
        if at == 0:
            return FIRST
        if at == len(self):
            return END
        before, after = self.keys(at - 1, at + 1)
        shared = TIME_BYTES
        if before[:TIME_BYTES] == after[:TIME_BYTES]:
            while before[shared] == after[shared]:
                shared += 1
            shared += 1
        return after[:shared].ljust(ITEM_BYTES, b"\0")

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return _found(self._keys, as_keys(keys)).tolist() if keys else []


def _split(packed: bytes) -> list[bytes]:
    return [packed[at : at + ITEM_BYTES] for at in range(0, len(packed), ITEM_BYTES)]


def item_hashes(keys: Keys, salt: bytes) -> Words:
    """SipHash-2-4 (64 bits) of every item under the salt as its key.

    Written over arrays: a call per item into a faster hash costs three times as much.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes")
    rows = np.ascontiguousarray(keys).view("<u8").reshape(keys.size, ITEM_BYTES // 8)
    hashes = np.empty(keys.size, dtype=np.uint64)
    for start in range(0, keys.size, _ROWS):
        words = np.ascontiguousarray(rows[start : start + _ROWS].T, dtype=np.uint64)
        hashes[start : start + _ROWS] = _siphash(words, salt)
    return hashes


def _siphash(words: Words, salt: bytes) -> Words:
    """`words`: (5, n), the little-endian words of n items. Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012)."""
    count = words.shape[1]
    keys = (int.from_bytes(salt[:8], "little"), int.from_bytes(salt[8:], "little"))
    start = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    v0, v1, v2, v3 = (np.full(count, word ^ keys[place % 2], dtype=np.uint64) for place, word in enumerate(start))
    spare = np.empty(count, dtype=np.uint64)

    def rotate(word: Words, bits: int) -> None:
        np.left_shift(word, np.uint64(bits), out=spare)
        np.right_shift(word, np.uint64(64 - bits), out=word)
        np.bitwise_or(word, spare, out=word)

    def rounds(number: int) -> None:
        for _ in range(number):
            for a, b, turn_b, turn_a in ((v0, v1, 13, 32), (v2, v3, 16, 0), (v0, v3, 21, 0), (v2, v1, 17, 32)):
                np.add(a, b, out=a)
                rotate(b, turn_b)
                np.bitwise_xor(b, a, out=b)
                if turn_a:
                    rotate(a, turn_a)

    # The last word of the message holds its length in the highest byte.
    for word in (*words, np.uint64(ITEM_BYTES << 56)):
        np.bitwise_xor(v3, word, out=v3)
        rounds(2)
        np.bitwise_xor(v0, word, out=v0)
    np.bitwise_xor(v2, np.uint64(0xFF), out=v2)
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3
