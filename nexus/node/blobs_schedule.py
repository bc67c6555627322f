"""Which chunk to ask whom for next. Pure: no clock, no network, no disk.

Over all blobs of a fetch at once: each source is asked for the chunks that fewest others have (rarest first, as in BitTorrent;
Cohen 2003, "Incentives build robustness in BitTorrent"), so that several nodes which fetch the same model from one soon have
different parts of it and get the rest from each other. Among equally rare ones each node has an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Flags: TypeAlias = npt.NDArray[np.bool_]

# Blobs written at once: each is an open file.
OPEN_MAX = 16
# Once nothing is left that nobody was asked for, what is on its way from one source is asked of one other, in runs of this.
AGAIN_MAX = 2
# Chunks that are in order in every node's order.
BLOCK_MAX = 8
_CLOSED, _OPENING, _OPEN, _DONE = range(4)


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks [start, start + count) of blob number `blob`."""

    blob: int
    start: int
    count: int


class Schedule:
    """`counts`: chunks of each blob. `turn`: any number; it decides the order among equally rare chunks.
    Sources are named by their peer ids.

    A blob is *opened* before its chunks are handed out: its hashes have to be known first.
    """

    def __init__(self, counts: Sequence[int], turn: int = 0) -> None:
        self._counts = list(counts)
        self._first = [0, *accumulate(counts)]
        total = self._first[-1]
        self._needed = np.ones(total, np.bool_)
        self._open = np.zeros(total, np.bool_)
        self._claims = np.zeros(total, np.uint8)
        self._rarity = np.zeros(total, np.int32)
        self._states = [_CLOSED] * len(counts)
        self._opener: dict[int, str] = {}
        self._has: dict[str, Flags] = {}
        self._held: dict[str, Flags] = {}
        # By blocks, so that what is asked for at once mostly lies together. A mere shift would not do: two nodes next to each
        # other in one order would want the same chunk each time.
        block = max(1, min(BLOCK_MAX, total // 256))
        blocks = np.random.default_rng(turn).permutation(-(-total // block))
        self._order = blocks[np.arange(total) // block] * block + np.arange(total) % block
        self._blob_of = np.repeat(np.arange(len(counts)), counts)

    # What is known.

    @property
    def done(self) -> bool:
        """Whether every blob is."""
        return all(state == _DONE for state in self._states)

    def undone(self) -> list[int]:
        return [blob for blob, state in enumerate(self._states) if state != _DONE]

    def knows(self, source: str) -> bool:
        return source in self._has

    def set_source(self, source: str, has: Flags) -> bool:
        """What a source has, chunk by chunk over all blobs. Whether that is more than before."""
        before = self._has.get(source)
        self._has[source] = has
        self._rarity += has
        if before is not None:
            self._rarity -= before
        return bool((has if before is None else has & ~before).any())

    def lacks(self, source: str, run: Run) -> None:
        """It does not have these after all."""
        has = self._has.get(source)
        if has is not None:
            part = slice(self._first[run.blob] + run.start, self._first[run.blob] + run.start + run.count)
            self._rarity[part] -= has[part]
            has[part] = False

    def drop_source(self, source: str) -> None:
        self.release(source)
        has = self._has.pop(source, None)
        if has is not None:
            self._rarity -= has

    def wanted_of(self, source: str) -> bool:
        """Whether the source has anything that is still needed."""
        has = self._has.get(source)
        return has is not None and bool((has & self._needed).any())

    def is_complete(self, source: str) -> bool:
        """Whether it has everything that is still needed."""
        has = self._has.get(source)
        return has is not None and not bool((self._needed & ~has).any())

    # Blobs.

    def to_open(self, source: str, run_max: int) -> int | None:
        """A blob that this source should open now, because it will soon have nothing else to do; None: none."""
        has = self._has.get(source)
        if has is None or sum(state in (_OPENING, _OPEN) for state in self._states) >= OPEN_MAX:
            return None
        free = has & self._needed & (self._claims == 0)
        if np.count_nonzero(free & self._open) >= 2 * run_max:
            return None
        closed = np.array([state == _CLOSED for state in self._states], np.bool_)
        found = np.flatnonzero(free & closed[self._blob_of])
        if not len(found):
            return None
        blob = int(self._blob_of[self._rarest(found)])
        self._states[blob] = _OPENING
        self._opener[blob] = source
        return blob

    def opened(self, blob: int, missing: Sequence[int]) -> None:
        """Its hashes are known; these chunks are still to come."""
        part = slice(self._first[blob], self._first[blob + 1])
        self._needed[part] = False
        self._needed[self._first[blob] + np.asarray(missing, np.int64)] = True
        self._open[part] = True
        self._states[blob] = _OPEN
        self._opener.pop(blob, None)

    def is_open(self, blob: int) -> bool:
        return self._states[blob] in (_OPEN, _DONE)

    def has_all_of(self, blob: int) -> bool:
        """Whether every chunk of it is here."""
        return self._states[blob] == _OPEN and not self._needed[self._first[blob] : self._first[blob + 1]].any()

    def close(self, blob: int) -> None:
        """It is whole."""
        self._states[blob] = _DONE

    def needs(self, blob: int, index: int) -> bool:
        return bool(self._needed[self._first[blob] + index])

    # Chunks.

    def claim(self, source: str, run_max: int) -> Run | None:
        """The next chunks to ask this source for, at most `run_max` in a row; None: none that it should be asked for."""
        has = self._has.get(source)
        if has is None:
            return None
        usable = has & self._needed & self._open
        found = np.flatnonzero(usable & (self._claims == 0))
        if not len(found):
            # Whoever is faster ends it, so that one slow source does not hold up the end. Not one that this source was asked for.
            run_max = min(run_max, AGAIN_MAX)
            usable &= self._claims == 1
            if source in self._held:
                usable &= ~self._held[source]
            found = np.flatnonzero(usable)
            if not len(found):
                return None
        first = self._rarest(found)
        blob, rarity = int(self._blob_of[first]), self._rarity[first]
        free = set(found[(found >= first) & (found < first + run_max)].tolist())
        end = first
        while end - first < run_max and end < self._first[blob + 1] and end in free and self._rarity[end] == rarity:
            end += 1
        self._claims[first:end] += 1
        if source not in self._held:
            self._held[source] = np.zeros(len(self._needed), np.bool_)
        self._held[source][first:end] = True
        return Run(blob, first - self._first[blob], end - first)

    def _rarest(self, found: npt.NDArray[np.int64]) -> int:
        rarity = self._rarity[found]
        rarest = found[rarity == rarity.min()]
        return int(rarest[self._order[rarest].argmin()])

    def release(self, source: str) -> None:
        """All that the source was asked for and has not sent may be asked of others."""
        held = self._held.pop(source, None)
        if held is not None:
            self._claims -= held
        for blob in [blob for blob, opener in self._opener.items() if opener == source]:
            del self._opener[blob]
            self._states[blob] = _CLOSED

    def is_sole(self, source: str) -> bool:
        """Whether it has something that is needed and that no other source has."""
        has = self._has.get(source)
        return has is not None and bool((has & self._needed & (self._rarity == 1)).any())

    def lose_turn(self, source: str) -> None:
        """What the source was asked for may be asked of others that have it. What nobody else has is waited for."""
        held = self._held.get(source)
        if held is not None:
            shared = held & (self._rarity > 1)
            held &= ~shared
            self._claims -= shared
        for blob in [blob for blob, opener in self._opener.items() if opener == source]:
            if (self._rarity[self._first[blob] : self._first[blob + 1]] > 1).any():
                del self._opener[blob]
                self._states[blob] = _CLOSED

    def finish(self, source: str, blob: int, index: int) -> bool:
        """A chunk came from the source, and was right. Whether it was still needed."""
        at = self._first[blob] + index
        self.let_go(source, blob, index)
        fresh = bool(self._needed[at])
        self._needed[at] = False
        return fresh

    def let_go(self, source: str, blob: int, index: int) -> None:
        """The source is no longer asked for this chunk."""
        at = self._first[blob] + index
        held = self._held.get(source)
        if held is not None and held[at]:
            held[at] = False
            self._claims[at] -= 1
