"""What a block has to be before it is kept, beyond its form and its author's signature, which `open_batch` has checked.

Whether a block is good follows from the block, the collection's charter and the clock, and from nothing else that a node happens
to know: nodes that hold different blocks would otherwise refuse different ones for ever. So a tombstone of somebody else's block is
no ground for refusal, as only some nodes know whose it is; it has no effect (`nexus.memory.versions`). All blocks of a call are
checked together, the sky and the vectors in arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nexus.memory.batch import OpenedBlock
from nexus.memory.block import CONTENT, MAP, SEALED, SKY_BYTES, TOMBSTONE, Vector, split_ids
from nexus.memory.collection import PRIVATE, Charter, write_until
from nexus.memory.quantise import CODE_MAX, NORM_TOLERANCE, SCALE_UNIT
from nexus.memory.sky.stamp import MODEL_BYTES, SKY_MODEL

# How far ahead of this node's clock a block may be.
AHEAD_MAX_MS = 120_000

Flags = NDArray[np.bool_]
Charters = Callable[[bytes], Charter | None]
CheckSky = Callable[[NDArray[np.int64], list[bytes]], Flags]

# Sums of so many squares of codes are whole numbers that float32 holds, in whatever order they are added.
_EXACT_IN_FLOAT32 = 2**24 // 128**2
_IN_PUBLIC = frozenset((CONTENT, TOMBSTONE, MAP))
_IN_PRIVATE = frozenset((SEALED, TOMBSTONE))


class Fault(Enum):
    """What a refusal says about the peer that the block came from. SENDER: it should have refused the block itself. CHARTER: one of
    the two has an older charter, or none. CLOCK: one of the two clocks is off, or the block was long on its way. SOFTWARE: one of
    the two is older."""

    SENDER = auto()
    CHARTER = auto()
    CLOCK = auto()
    SOFTWARE = auto()


class Refusal(Enum):
    """Why a block is not kept: a stable code, what is wrong, and what that says about the sender."""

    FUTURE = "future", f"it is dated more than {AHEAD_MAX_MS // 1000} s ahead", Fault.CLOCK
    EXPIRED = "expired", "it has expired", Fault.CLOCK
    UNKNOWN_COLLECTION = "unknown-collection", "the charter of its collection is not known here", Fault.CHARTER
    FOREIGN_AUTHOR = "foreign-author", "its author may not write in its collection, or not any more at its time", Fault.CHARTER
    SEALED_IN_PUBLIC = "sealed-in-public", "it is sealed, in a collection that anybody may read", Fault.CHARTER
    OPEN_IN_PRIVATE = "open-in-private", "it is not sealed, in a private collection", Fault.CHARTER
    PLACE_TOO_EXACT = "place-too-exact", "it tells its place more exactly than its collection allows", Fault.CHARTER
    UNKNOWN_SKY = "unknown-sky", "its sky is of a model that this node does not have", Fault.SOFTWARE
    WRONG_SKY = "wrong-sky", "its sky is not that of its time and place", Fault.SENDER
    BAD_VECTOR = "bad-vector", "a vector of it is none that a unit vector is encoded to, or one model has two", Fault.SENDER
    NAMES_ITSELF = "names-itself", "it refers to itself", Fault.SENDER

    def __init__(self, code: str, cause: str, fault: Fault) -> None:
        self.code = code
        self.cause = cause
        self.fault = fault

    @property
    def later(self) -> bool:
        """The same block may be good later on, with no change anywhere."""
        return self is Refusal.FUTURE


class _Terms(NamedTuple):
    """What a charter says to one author now. `refusal`: of whatever it writes. `until_ms`: up to when it may write.
    `latest_ms`: the latest time that a block of it may have at all."""

    refusal: Refusal | None
    until_ms: int
    latest_ms: int
    kinds: frozenset[int]
    sky_step: int


_NO_TERMS = _Terms(Refusal.UNKNOWN_COLLECTION, 0, 0, frozenset(), 0)


def validate(opened: Sequence[OpenedBlock], charters: Charters, check_sky: CheckSky, now_ms: int) -> list[Refusal | None]:
    """For each block, why it is refused, or None: it may be kept.

    `charters`: the charter of a collection that this node follows, by id. `check_sky`: which
    stamps of 98 bytes agree with times in ms (`SkyKernel.check_stamps`). Of several reasons one is given. No block raises.
    """
    refusals: list[Refusal | None] = [None] * len(opened)
    terms_of: dict[tuple[bytes, bytes], _Terms] = {}
    last_collection = last_author = b""
    terms = _NO_TERMS
    stamped: list[int] = []
    finest: list[int] = []
    owners: list[int] = []
    vectors: list[Vector] = []
    for at, one in enumerate(opened):
        kind, collection, author, created_ms, expires_ms, parents, links, _, sky, after, _, _, _, _, _, _, own = one.block
        if author != last_author or collection != last_collection:
            last_collection, last_author = collection, author
            found = terms_of.get((collection, author))
            if found is None:
                found = terms_of[collection, author] = _terms(charters(collection), author, now_ms)
            terms = found
        # What nearly all blocks pass, in one step: this runs for every block of a collection.
        if (
            created_ms > terms.latest_ms or kind not in terms.kinds or expires_ms or parents or links or after or len(own) > 1
        ) and (refusal := _refusal(one, terms, now_ms)):
            refusals[at] = refusal
            continue
        if sky:
            stamped.append(at)
            finest.append(terms.sky_step)
        for vector in own:
            owners.append(at)
            vectors.append(vector)
    for at in _of(owners, ~sound_vectors(vectors)):
        refusals[at] = Refusal.BAD_VECTOR
    if stamped:
        _validate_sky(refusals, opened, stamped, finest, check_sky)
    return refusals


def sound_vectors(vectors: Sequence[Vector]) -> Flags:
    """Which vectors `nexus.memory.quantise.check_codes` lets pass. Sums are exact, so every node decides alike."""
    good = np.zeros(len(vectors), np.bool_)
    dimensions = [len(vector.codes) for vector in vectors]
    if len(set(dimensions)) == 1:
        return _sound(vectors, dimensions[0])
    places: dict[int, list[int]] = {}
    for at, dimension in enumerate(dimensions):
        places.setdefault(dimension, []).append(at)
    for dimension, group in places.items():
        good[group] = _sound([vectors[at] for at in group], dimension)
    return good


def _sound(vectors: Sequence[Vector], dimension: int) -> Flags:
    codes = np.frombuffer(b"".join([vector.codes for vector in vectors]), np.int8).reshape(-1, dimension)
    values: NDArray[Any] = codes.astype(np.float32 if dimension <= _EXACT_IN_FLOAT32 else np.float64)
    squares = np.einsum("nd,nd->n", values, values).astype(np.float64)
    lengths = np.sqrt(squares) * (np.array([vector.scale for vector in vectors], np.float64) / (CODE_MAX * SCALE_UNIT))
    least = codes.min(axis=1)
    widest = (least == -CODE_MAX) | (codes.max(axis=1) == CODE_MAX)
    sound: Flags = (np.abs(lengths - 1) <= NORM_TOLERANCE) & widest & (least >= -CODE_MAX)
    return sound


def _terms(charter: Charter | None, author: bytes, now_ms: int) -> _Terms:
    if charter is None:
        return _NO_TERMS
    until_ms = write_until(charter, author)
    if until_ms is None:
        return _Terms(Refusal.FOREIGN_AUTHOR, 0, 0, frozenset(), 0)
    kinds = _IN_PRIVATE if charter.mode == PRIVATE else _IN_PUBLIC
    return _Terms(None, until_ms, min(until_ms, now_ms + AHEAD_MAX_MS), kinds, charter.sky_step)


def _refusal(one: OpenedBlock, terms: _Terms, now_ms: int) -> Refusal | None:
    block = one.block
    if terms.refusal is not None:
        return terms.refusal
    if block.created_ms > terms.until_ms:
        return Refusal.FOREIGN_AUTHOR
    if block.kind not in terms.kinds:
        return Refusal.SEALED_IN_PUBLIC if block.kind == SEALED else Refusal.OPEN_IN_PRIVATE
    if block.created_ms > terms.latest_ms:
        return Refusal.FUTURE
    if 0 < block.expires_ms <= now_ms:
        return Refusal.EXPIRED
    if one.id in split_ids(block.parents + block.links + block.after):
        return Refusal.NAMES_ITSELF
    if len({vector.fingerprint for vector in block.vectors}) < len(block.vectors):
        return Refusal.BAD_VECTOR
    return None


def _validate_sky(
    refusals: list[Refusal | None],
    opened: Sequence[OpenedBlock],
    stamped: Sequence[int],
    finest: Sequence[int],
    check_sky: CheckSky,
) -> None:
    """`stamped`: which blocks have a stamp; `finest`: of each of them the smallest cell that it may name."""
    stamps = [opened[at].block.sky for at in stamped]
    rows = np.frombuffer(b"".join(stamps), np.uint8).reshape(-1, SKY_BYTES)
    allowed = np.array(finest)
    # A cell begins with its side.
    steps = np.ascontiguousarray(rows[:, MODEL_BYTES : MODEL_BYTES + 2]).view("<u2")[:, 0]
    unknown = (rows[:, :MODEL_BYTES] != np.frombuffer(SKY_MODEL, np.uint8)).any(axis=1)
    for at in _of(stamped, unknown):
        refusals[at] = Refusal.UNKNOWN_SKY
    for at in _of(stamped, (steps < allowed) | (allowed == 0)):
        refusals[at] = Refusal.PLACE_TOO_EXACT
    open_ones = [place for place, at in enumerate(stamped) if refusals[at] is None]
    if open_ones:
        to_check = [stamped[place] for place in open_ones]
        times = np.array([opened[at].block.created_ms for at in to_check], np.int64)
        for at in _of(to_check, ~check_sky(times, [stamps[place] for place in open_ones])):
            refusals[at] = Refusal.WRONG_SKY


def _of(places: Sequence[int], flags: Flags) -> Iterator[int]:
    return (places[at] for at in np.flatnonzero(flags).tolist())
