"""What it costs two nodes to find out what each lacks, over what the list of all ids would: bytes of all frames, both directions.

Blocks have random ids and random times within a year. "Recent" is what is left after two nodes wrote 50 blocks each since they last
compared: the newest 100 of all. Both ends run in this process; what is counted are the frames that they hand to the network.
"""

from __future__ import annotations

import argparse
import random
from statistics import median
from time import perf_counter
from typing import Any

from nexus.core.record import Record
from nexus.memory.item_set import Item, ItemSet, View
from nexus.memory.sync import Heard, SyncResponder, SyncSession
from nexus.memory.sync_messages import MESSAGES, Told
from scripts.benchmarks.result import Result

GOAL = 0.0012
ID_BYTES = 32
FRAME_HEAD_BYTES = 4
COLLECTION = bytes(32)
DIFFERENCES = 100
YEAR_MS = 365 * 86_400_000
# Of how many of the newest blocks the differences are; None: of all.
SPREADS: dict[str, int | None] = {
    "recent": DIFFERENCES,
    "newest_200": 200,
    "newest_1000": 1000,
    "newest_10000": 10_000,
    "scattered": None,
}

Part = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=100_000, help="that each node has [default: %(default)s]")
    parser.add_argument(
        "--rounds", type=int, default=5, help="random collections; the median counts [default: %(default)s; quick: 1]"
    )


def run(options: argparse.Namespace) -> Result:
    rounds = 1 if options.quick else options.rounds
    measured: dict[str, list[Part]] = {}
    for seed in range(rounds):
        rng = random.Random(seed)
        items = _items(rng, options.blocks + DIFFERENCES // 2)
        for name, spread in SPREADS.items():
            measured.setdefault(name, []).append(_measure(*_differing(items, spread, rng), rng))
        same = ItemSet(items)
        measured.setdefault("equal", []).append(_measure(same, same, rng))
        if not options.quick:
            measured.setdefault("other_side_empty", []).append(_measure(same, ItemSet(), rng))
            measured.setdefault("first_sync", []).append(_measure(ItemSet(), same, rng))
    parts: Part = {"blocks": options.blocks, "id_list_bytes": options.blocks * ID_BYTES, "rounds": rounds}
    for name, each in measured.items():
        parts[name] = {key: _middle([one[key] for one in each]) for key in each[0]} | {
            "bytes_most": max(one["bytes"] for one in each)
        }
        parts[name]["ratio"] = round(parts[name]["bytes"] / (options.blocks * ID_BYTES), 6)
    parts["set"] = _set_costs(options.blocks, options.quick)
    return Result("sync", parts["recent"]["ratio"], GOAL, "lower", parts)


def _items(rng: random.Random, count: int) -> list[Item]:
    return sorted(Item(1_700_000_000_000 + rng.randrange(YEAR_MS), rng.randbytes(ID_BYTES)) for _ in range(count))


def _differing(items: list[Item], spread: int | None, rng: random.Random) -> tuple[ItemSet, ItemSet]:
    """Two sets with 50 items each that the other has not, among the newest `spread`."""
    start = 0 if spread is None else len(items) - spread
    chosen = rng.sample(range(start, len(items)), DIFFERENCES)
    only_mine, only_theirs = frozenset(chosen[: DIFFERENCES // 2]), frozenset(chosen[DIFFERENCES // 2 :])
    mine = ItemSet(item for at, item in enumerate(items) if at not in only_theirs)
    theirs = ItemSet(item for at, item in enumerate(items) if at not in only_mine)
    return mine, theirs


class _Served:
    def __init__(self, items: ItemSet) -> None:
        self._items = items

    def view(self, collection: bytes, salt: bytes, /) -> View | None:
        return self._items.view(salt)

    def serves(self, collection: bytes, /) -> bool:
        return True


def _measure(mine: ItemSet, theirs: ItemSet, rng: random.Random) -> Part:
    """One session that asks for none of the blocks. `told_bytes`: what telling the other side its part takes besides."""
    started = perf_counter()
    session = SyncSession(COLLECTION, lambda _: (), 0.0, mine.view(rng.randbytes(16)), need_max=len(theirs) + 1)
    responder = SyncResponder(_Served(theirs))
    counts = {"trips": 0, "bytes": 0, "told_bytes": 0}
    compared_s = 0.0
    while (request := session.generate(0.0)) is not None:
        frame = MESSAGES.pack(request)
        answer = responder.receive(MESSAGES.unpack(frame))
        told = isinstance(answer, Heard)
        if isinstance(answer, Heard):
            answer = Told()
        assert isinstance(answer, Record)
        back = MESSAGES.pack(answer)
        session.receive(MESSAGES.unpack(back), 0.0)
        size = len(frame) + len(back) + 2 * FRAME_HEAD_BYTES
        if told:
            counts["told_bytes"] += size
        else:
            counts["trips"] += 1
            counts["bytes"] += size
            compared_s = perf_counter() - started
    outcome = session.outcome()
    assert outcome.ok
    assert outcome.complete
    assert outcome.needed == len(theirs) - len(mine) + outcome.have
    return {**counts, "need": outcome.needed, "have": outcome.have, "ms": round(compared_s * 1e3, 1)}


def _set_costs(count: int, quick: bool) -> Part:
    """Of one node's set, in milliseconds."""
    rng = random.Random(9)
    part: Part = {}
    for size in (count,) if quick else (count, 10 * count):
        packed = b"".join((2**40 + at).to_bytes(8, "big") + rng.randbytes(ID_BYTES) for at in rng.sample(range(size), size))
        new = [Item(2**40 + rng.randrange(size), rng.randbytes(ID_BYTES)) for _ in range(100)]
        times = [perf_counter()]
        known = ItemSet()
        known.add_packed(packed)
        times.append(perf_counter())
        known.view(bytes(16))
        times.append(perf_counter())
        known.add(new)
        assert len(known) == size + 100
        times.append(perf_counter())
        names = ("build_ms", "view_ms", "add_100_ms")
        part[str(size)] = {name: round((times[at + 1] - times[at]) * 1e3, 1) for at, name in enumerate(names)}
    return part


def _middle(values: list[float]) -> float:
    middle = median(values)
    return int(middle) if middle == int(middle) else middle
