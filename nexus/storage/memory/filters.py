"""Filters over the columns of all blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.storage.memory.columns import Columns
from nexus.storage.memory.names import Names
from nexus.storage.memory.records import Filters, Near

_EARTH_KM = 6371.0088
_HUNDREDTHS = 100.0


class Matcher:
    """`selective`: whether it asks for more than a state and a collection."""

    def __init__(self, columns: Columns, names: Names, filters: Filters, now_ms: int) -> None:
        self._columns = columns
        self._now_ms = now_ms
        self._filters = filters
        self._named = {
            "collection": _numbers(names, filters.collections),
            "author": _numbers(names, filters.authors),
            "lang": _numbers(names, [lang.encode("utf-8", "replace") for lang in filters.langs]),
        }
        self._tagged: NDArray[np.bool_] | None = None
        self.selective = bool(
            filters.tags
            or filters.authors
            or filters.langs
            or filters.kinds
            or filters.since_ms
            or filters.until_ms
            or filters.near
        )

    def read_tags(self, connection: sqlite3.Connection) -> None:
        """Look up which blocks have the tags; nothing to do without any."""
        for tag in dict.fromkeys(self._filters.tags):
            found = [number for (number,) in connection.execute("SELECT block FROM tag WHERE name = ?", (_clean(tag),))]
            mask = np.zeros(self._columns.count, bool)
            mask[[number for number in found if number < len(mask)]] = True
            self._tagged = mask if self._tagged is None else self._tagged & mask

    def __call__(self, numbers: NDArray[np.int64], *, in_collections: bool = False) -> NDArray[np.bool_]:
        """bool [n]: which of these blocks are such. `in_collections`: they are known to be in one that is asked for."""
        column, filters = self._columns.array, self._filters
        states = filters.states
        # One state is the usual case, and the fastest.
        state = column("state")[numbers]
        mask: NDArray[Any] = state == states[0] if len(states) == 1 else np.isin(state, states)
        expires = column("expires_ms")[numbers]
        mask &= (expires == 0) | (expires > self._now_ms)
        for name, wanted in self._named.items():
            if wanted is not None and not (in_collections and name == "collection"):
                found = column(name)[numbers]
                mask &= found == wanted[0] if len(wanted) == 1 else np.isin(found, wanted)
        if filters.kinds:
            mask &= np.isin(column("kind")[numbers], filters.kinds)
        if filters.since_ms:
            mask &= column("created_ms")[numbers] >= filters.since_ms
        if filters.until_ms:
            mask &= column("created_ms")[numbers] <= filters.until_ms
        if self._tagged is not None:
            known = numbers < len(self._tagged)
            mask &= known
            mask[known] &= self._tagged[numbers[known]]
        if filters.near is not None:
            mask &= _is_near(column("cell")[numbers], filters.near)
        return mask


def _numbers(names: Names, values: Sequence[bytes]) -> list[int] | None:
    """None if any value will do; those that no block has are left out."""
    if not values:
        return None
    known = [names.known(value) for value in values]
    return [number for number in known if number is not None]


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_near(cells: NDArray[np.int64], near: Near) -> NDArray[np.bool_]:
    """Whether some of the cell may lie within the radius: its middle does, or half a diagonal of it does not reach beyond it."""
    step = (cells >> 32) & 0xFFFF
    row, column = (cells >> 16) & 0xFFFF, cells & 0xFFFF
    latitude = np.radians((step * (2 * row + 1) / 2) / _HUNDREDTHS - 90)
    longitude = np.radians((step * (2 * column + 1) / 2) / _HUNDREDTHS - 180)
    here, there = np.radians(near.latitude), np.radians(near.longitude)
    half = np.sin((latitude - here) / 2) ** 2 + np.cos(latitude) * np.cos(here) * np.sin((longitude - there) / 2) ** 2
    distance = 2 * _EARTH_KM * np.arcsin(np.minimum(1.0, np.sqrt(half)))
    reach = np.radians(step / _HUNDREDTHS) * _EARTH_KM * np.sqrt(0.5)
    return np.asarray((cells != 0) & (distance <= near.radius_km + reach))
