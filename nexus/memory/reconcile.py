"""Range-based reconciliation: what one set has and another lacks, found in two or three round trips.

The initiator (`Reconciliation`) asks about ranges of the items' order, the responder (`answer`) replies to each in turn: it holds
the same there; or it has these parts with these fingerprints; or the initiator shall send short handles of what it has there; or
these are all its ids. Only the initiator keeps state, and only it learns the result. A reply says nothing about ranges that were
not asked about.

Whatever a peer sends ends in a result, a MalformedError or a VerificationError, after work in proportion to the bytes received and
the own set: ranges, ids and handles per message, bytes, ranges that wait and rounds are bounded, and nobody can divide without end,
because the initiator divides what is left by its own items each time. A responder that lies can hide what it has and name ids that
nobody has; it cannot make the initiator believe that it holds a block. The bytes are described in `docs/memory-sync.md`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nexus.core.errors import VerificationError
from nexus.memory.item_set import END, FIRST, Item, View, unpack_item
from nexus.memory.reconcile_wire import (
    HANDLE_BYTES,
    IDS_MAX,
    PARTS_MAX,
    PAYLOAD_MAX,
    PAYLOAD_MIN,
    Ask,
    Asked,
    Kind,
    Listed,
    QueryWriter,
    ReplyWriter,
    Split,
    decode_query,
    decode_reply,
)

HANDLE_MASK = 2 ** (8 * HANDLE_BYTES) - 1
# Of so many items the initiator sends handles, in place of fingerprints of parts: either costs about 200 bytes.
HANDLES_BELOW = 32
# A responder with so few items in a range lists their ids or asks for handles; with more it divides the range.
LISTED_BELOW = 64
# It lists ids at once if all small ranges of a message that differ have no more items together: a round trip less for a kilobyte.
LISTED_AT_ONCE = 32
# Asked for the handles of more items, the initiator has the few ids of the other side listed in full.
HANDLES_ASKED_MAX = 176
_PART_ITEMS = 16
# From here on arrays are faster than sets.
_FEW = 256
QUEUE_MAX = 2**17
ROUNDS_MAX = 512
# What one peer can make this side remember: 15 MB.
NEED_MAX = 2**16


class Found(NamedTuple):
    """`need`: what the other side has and this one lacks; `have`: what this side has and the other lacks. Both sorted."""

    need: list[Item]
    have: list[Item]


class _Range(NamedTuple):
    """Something to ask about [low, high), which are this side's items [start, end). `kind` None: to be divided before."""

    low: bytes
    high: bytes
    start: int
    end: int
    kind: Kind | None


@dataclass(slots=True)
class Reconciliation:
    """The initiator's side: send `query()`, hand the reply to `take`, until `query` gives None.

    It stops with `exhausted` set after `need_max` ids that are lacking here, or `rounds_max` rounds: the rest is for another
    session.
    """

    view: View
    payload_max: int = PAYLOAD_MAX
    need_max: int = NEED_MAX
    rounds_max: int = ROUNDS_MAX
    rounds: int = 0
    needed: int = 0
    exhausted: bool = False
    _queue: deque[_Range] = field(default_factory=deque)
    _asked: list[_Range] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not PAYLOAD_MIN <= self.payload_max <= PAYLOAD_MAX:
            raise ValueError(f"a payload has {PAYLOAD_MIN} to {PAYLOAD_MAX} bytes")
        count = len(self.view)
        if count <= HANDLES_BELOW:
            self._queue.append(_Range(FIRST, END, 0, count, Kind.HANDLES if count else Kind.TELL))
        else:
            self._queue.extend(self._divided(_Range(FIRST, END, 0, count, None), _first_cuts(count)))

    def query(self) -> bytes | None:
        """The next message, or None at the end."""
        if self._asked:
            raise ValueError("the last query has no reply yet")
        if not self._queue or self.exhausted:
            return None
        if self.rounds == self.rounds_max:
            self.exhausted = True
            return None
        self.rounds += 1
        writer = QueryWriter(self.payload_max)
        while self._queue:
            part = self._queue.popleft()
            while part.kind is Kind.TELL and self._queue and self._queue[0].kind is Kind.TELL and self._queue[0].low == part.high:
                following = self._queue.popleft()
                part = part._replace(high=following.high, end=following.end)
            if part.kind is None:
                self._queue.extendleft(reversed(self._divided(part, _cuts(part.start, part.end))))
            elif writer.add(self._as_asked(part)):
                self._asked.append(part)
            else:
                self._queue.appendleft(part)
                break
        return writer.data

    def take(self, reply: bytes) -> Found:
        """What a reply brings to light. Raises MalformedError and VerificationError: the session is over then."""
        asked, self._asked = self._asked, []
        answers = decode_reply(reply, [self._as_asked(part) for part in asked])
        found = Found([], [])
        again: list[_Range] = []
        for part, answer in zip(asked, answers, strict=False):
            if isinstance(answer, Split):
                again.extend(self._unequal_parts(part, answer))
            elif isinstance(answer, Ask):
                few = part.end - part.start <= min(HANDLES_ASKED_MAX, (self.payload_max - PAYLOAD_MIN // 2) // HANDLE_BYTES)
                again.append(part._replace(kind=Kind.HANDLES if few and part.end > part.start else Kind.TELL))
            elif isinstance(answer, Listed):
                again.extend(self._compare(part, answer, found))
        self._queue.extendleft(reversed([*again, *asked[len(answers) :]]))
        if len(self._queue) > QUEUE_MAX:
            raise VerificationError("a peer divides into more ranges than there can be")
        self.needed += len(found.need)
        if self.needed > self.need_max:
            del found.need[len(found.need) - (self.needed - self.need_max) :]
            self.needed = self.need_max
            self.exhausted = True
        return found

    def _as_asked(self, part: _Range) -> Asked:
        if part.kind is Kind.FINGERPRINT:
            return Asked(part.low, part.high, part.kind, fingerprint=self.view.fingerprint(part.start, part.end))
        if part.kind is Kind.HANDLES:
            return Asked(part.low, part.high, part.kind, handles=tuple(handles(self.view, part.start, part.end)))
        return Asked(part.low, part.high, Kind.TELL)

    def _divided(self, part: _Range, cuts: Sequence[int]) -> list[_Range]:
        """The part in ranges that end before these of this side's items."""
        bounds = [part.low, *map(self.view.bound, cuts), part.high]
        places = [part.start, *cuts, part.end]
        return [_Range(bounds[at], bounds[at + 1], places[at], places[at + 1], Kind.FINGERPRINT) for at in range(len(bounds) - 1)]

    def _unequal_parts(self, part: _Range, split: Split) -> list[_Range]:
        bounds = [part.low, *split.bounds, part.high]
        places = [part.start, *self.view.positions(split.bounds), part.end]
        unequal = []
        for at, fingerprint in enumerate(split.fingerprints):
            start, end = places[at], places[at + 1]
            if fingerprint != self.view.fingerprint(start, end):
                kind = Kind.TELL if start == end else Kind.HANDLES if end - start <= HANDLES_BELOW else None
                unequal.append(_Range(bounds[at], bounds[at + 1], start, end, kind))
        if not unequal:
            raise VerificationError("a peer says that a range differs, of which no part does")
        return unequal

    def _compare(self, part: _Range, listed: Listed, found: Found) -> list[_Range]:
        """Add what a list of ids shows to `found`; what it left open comes back."""
        end = part.end if listed.cut is None else self.view.positions([listed.cut])[0]
        mine = self.view.keys(part.start, end)
        need = [unpack_item(key) for key, there in zip(listed.keys, self.view.contains(listed.keys), strict=True) if not there]
        if listed.lacked is None:
            theirs = set(listed.keys)
            have = [unpack_item(key) for key in mine if key not in theirs]
            if part.kind is Kind.FINGERPRINT and listed.cut is None and not need and not have:
                raise VerificationError("a peer says that a range differs and lists the same ids")
        else:
            if len(need) != len(listed.keys):
                raise VerificationError("a peer lists an id as missing here of which it was told")
            have = [unpack_item(key) for key, lacks in zip(mine, listed.lacked, strict=False) if lacks]
        found.need.extend(need)
        found.have.extend(have)
        if listed.cut is None:
            return []
        kind = Kind.HANDLES if part.kind is Kind.HANDLES and end < part.end else Kind.TELL
        return [_Range(listed.cut, part.high, end, part.end, kind)]


def answer(view: View, query: bytes, payload_max: int = PAYLOAD_MAX) -> bytes:
    """The responder's reply. It may end before all ranges are answered; the initiator asks about the others again.

    Raises MalformedError.
    """
    asked = decode_query(query)
    places = view.positions([bound for part in asked for bound in (part.low, part.high)])
    spans = list(zip(places[::2], places[1::2], strict=True))
    differs = [
        part.kind is not Kind.FINGERPRINT or part.fingerprint != view.fingerprint(*at)
        for part, at in zip(asked, spans, strict=True)
    ]
    small = sum(
        end - start
        for part, (start, end), unequal in zip(asked, spans, differs, strict=True)
        if unequal and part.kind is Kind.FINGERPRINT and end - start <= LISTED_BELOW
    )
    writer = ReplyWriter(payload_max)
    for part, (start, end), unequal in zip(asked, spans, differs, strict=True):
        if not unequal:
            fits = writer.add_same()
        elif part.kind is Kind.HANDLES:
            fits = _answer_handles(view, part, start, end, writer)
        elif part.kind is Kind.TELL or start == end or (end - start <= LISTED_BELOW and small <= LISTED_AT_ONCE):
            fits = _list(view, part, view.keys(start, min(end, start + IDS_MAX + 1)), None, writer)
        elif end - start <= LISTED_BELOW:
            fits = writer.add_ask()
        else:
            cuts = _cuts(start, end)
            fits = writer.add_split(part.low, *_parts(view, start, end, cuts))
            if not fits and not writer.answers:
                fits = writer.add_split(part.low, *_parts(view, start, end, cuts[len(cuts) // 2 :][:1]))
        if not fits:
            break
    return writer.data


def handles(view: View, start: int, end: int) -> list[int]:
    """48 bits of each item's hash: enough to tell items of one range apart, in one session."""
    return [hashed & HANDLE_MASK for hashed in view.hashes[start:end].tolist()]


def _answer_handles(view: View, part: Asked, start: int, end: int, writer: ReplyWriter) -> bool:
    if end - start <= _FEW:
        mine = handles(view, start, end)
        theirs, own = frozenset(part.handles), frozenset(mine)
        unknown = [start + at for at, handle in enumerate(mine) if handle not in theirs]
        lacked = tuple(handle not in own for handle in part.handles)
    else:
        hashes = view.hashes[start:end] & np.uint64(HANDLE_MASK)
        told = np.unique(np.array(part.handles, dtype=np.uint64))
        nearest = told[np.minimum(np.searchsorted(told, hashes), told.size - 1)]
        known = nearest == hashes
        unknown = (start + np.flatnonzero(~known)[: IDS_MAX + 1]).tolist()
        there = frozenset(nearest[known].tolist())
        lacked = tuple(handle not in there for handle in part.handles)
    return _list(view, part, view.keys_at(unknown[: IDS_MAX + 1]), lacked, writer)


def _list(view: View, part: Asked, keys: Sequence[bytes], lacked: tuple[bool, ...] | None, writer: ReplyWriter) -> bool:
    """List as many of the keys as fit. False: no room for more answers behind it."""
    taken = writer.fitting(part.low, keys, lacked)
    if taken == len(keys):
        return writer.add_listed(part.low, Listed(tuple(keys), lacked, None))
    if taken > 0:
        # The keys may have others between them that the peer knows: the cut is before the first that is left out.
        cut = view.bound(view.positions([keys[taken]])[0])
        writer.add_listed(part.low, Listed(tuple(keys[:taken]), lacked, cut))
    return False


def _parts(view: View, start: int, end: int, cuts: Sequence[int]) -> tuple[list[int], list[bytes]]:
    places = [start, *cuts, end]
    return [view.fingerprint(places[at], places[at + 1]) for at in range(len(places) - 1)], [view.bound(cut) for cut in cuts]


def _cuts(start: int, end: int) -> list[int]:
    """Where to divide items [start, end), more than one: into 2 to 16 parts of as many items each."""
    parts = min(PARTS_MAX, max(2, (end - start) // _PART_ITEMS))
    return [start + (end - start) * at // parts for at in range(1, parts)]


def _first_cuts(count: int) -> list[int]:
    """As `_cuts`, with the last part halved towards the newest items: there most differences are, and one round trip finds them."""
    cuts = _cuts(0, count)
    while count - cuts[-1] > _PART_ITEMS:
        cuts.append(cuts[-1] + (count - cuts[-1] + 1) // 2)
    return cuts
