"""The process that `scripts.benchmarks.search` measures in: `python -m scripts.benchmarks.search_child DIRECTORY ROUNDS`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index, MetricKind, ScalarKind

from nexus.core.keys import Identity
from nexus.memory.batch import open_batch, sign_batch
from nexus.memory.block import CONTENT, INT8, TIME_MIN_MS, Block, Vector, encode_block
from nexus.memory.quantise import quantise
from nexus.memory.versions import same_author
from nexus.storage.memory.records import Arrival, Content, Filters, Query
from nexus.storage.memory.store import MemoryStore

K = 10
QUERIES_PER_ROUND = 100
QUERIES_FOR_RECALL = 600
BATCH = 1000
RECALL_SLACK = 0.001
COLLECTION, MODEL = b"c" * 32, b"m" * 32
NOW_MS = TIME_MIN_MS + 10**9
# Fewer is faster and finds less: the least that finds as much as the store is what it is compared with.
EXPANSIONS = (16, 24, 32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192)
KINDS = {"f32": ScalarKind.F32, "bf16": ScalarKind.BF16, "i8": ScalarKind.I8}

Floats = NDArray[np.float32]
Ask = Callable[[Floats], Sequence[Any]]


class Side(NamedTuple):
    """`ask`: the ids that it finds, in a form of its own, which is what is timed. `row`: which of the vectors such an id is."""

    name: str
    ask: Ask
    notes: dict[str, object]
    row: Callable[[Any], int] = int


def main() -> None:
    root, rounds = Path(sys.argv[1]), int(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    vectors, queries = np.load(root / "vectors.npy"), np.load(root / "queries.npy")
    sentences = json.loads((root / "sentences.json").read_text())
    truth = np.concatenate([np.argsort(-(part @ vectors.T), axis=1)[:, :K] for part in np.array_split(queries, 20)])
    store, ids, stored = _store(root / "nexus", vectors, sentences)
    place = {identifier: at for at, identifier in enumerate(ids)}
    query = Query(K, None, MODEL, filters=Filters((COLLECTION,)), blocks=False)

    def search(asked: Floats) -> list[bytes]:
        asking = Query(K, asked, MODEL, filters=query.filters, blocks=False)
        return [hit.id for hit in store.search(asking, NOW_MS).hits]

    ours = Side("nexus", search, stored, place.__getitem__)
    recall = _recall(ours, queries, truth)
    sides = [ours, *_usearch(vectors, queries, truth, recall), _chroma(root / "chroma", vectors), _lance(root / "lance", vectors)]
    for side in sides:
        side.notes.setdefault("recall_at_10", round(_recall(side, queries, truth), 4))
    rates = _rates(sides, queries, rounds)
    best = max((side.name for side in sides if side.name.startswith("usearch")), key=lambda name: median(rates[name]))
    others = {name: _ratio(rates["nexus"], rates[name]) for name in ("chroma", "lancedb")}
    whole = replace(query, blocks=True)
    extra = {
        "with_blocks": lambda asked: store.search(replace(whole, vector=asked), NOW_MS).hits,
        "hybrid_with_blocks": lambda asked: (
            store.search(
                replace(whole, vector=asked, text=sentences[int(abs(asked[0]) * 1e6) % len(sentences)], hybrid=True), NOW_MS
            ).hits
        ),
        "filter_leaves_1_percent": lambda asked: (
            store.search(replace(query, vector=asked, filters=Filters((COLLECTION,), tags=("rare",))), NOW_MS).hits
        ),
    }
    more = _rates([Side(name, ask, {}) for name, ask in extra.items()], queries, max(1, rounds // 3))  # type: ignore[arg-type]
    parts: dict[str, object] = {
        "beside": best,
        "over_best_of_others": round(min(others.values()), 2),
        "over": {name: round(value, 2) for name, value in others.items()},
        "recall_at_10": round(recall, 4),
        "queries_per_s": {name: round(median(found)) for name, found in {**rates, **more}.items()},
        "sides": {side.name: side.notes for side in sides},
        "rounds": rounds,
        "threads": "one processor (affinity) for the process, one thread by the libraries' settings",
    }
    print(json.dumps({"ratio": _ratio(rates["nexus"], rates[best]), "parts": parts}))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def _rates(sides: Sequence[Side], queries: Floats, rounds: int) -> dict[str, list[float]]:
    """Queries per second of each, round by round; who begins changes."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(-1, rounds):  # the first to warm up
        at = (number + 1) * QUERIES_PER_ROUND % (len(queries) - QUERIES_PER_ROUND)
        turn = (number + 1) % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            began = time.perf_counter()
            for asked in queries[at : at + QUERIES_PER_ROUND]:
                side.ask(asked)
            if number >= 0:
                rates[side.name].append(QUERIES_PER_ROUND / (time.perf_counter() - began))
    return rates


def _recall(side: Side, queries: Floats, truth: NDArray[np.int64]) -> float:
    pairs = zip(queries[:QUERIES_FOR_RECALL], truth, strict=False)
    return float(np.mean([len(set(map(side.row, side.ask(asked))) & set(exact.tolist())) / K for asked, exact in pairs]))


def _store(root: Path, vectors: Floats, sentences: list[str]) -> tuple[MemoryStore, list[bytes], dict[str, object]]:
    identity = Identity(bytes(32))
    codes, scales = quantise(vectors)
    arrivals = []
    for first in range(0, len(vectors), BATCH):
        blocks = [
            Block(
                CONTENT,
                COLLECTION,
                identity.public_key,
                TIME_MIN_MS + at,
                text=sentences[at],
                tags=("rare",) if at % 100 == 0 else (),
                vectors=(Vector("minilm", MODEL, INT8, int(scales[at]), codes[at].tobytes()),),
            )
            for at in range(first, min(first + BATCH, len(vectors)))
        ]
        batch = sign_batch(identity, [encode_block(block) for block in blocks])
        opened = tuple(open_batch(batch))
        arrivals.append(Arrival(batch.proof, opened, tuple(Content.of(each.block) for each in opened), TIME_MIN_MS, b""))
    store = MemoryStore(root, bytes_max=1 << 40, author_bytes_max=1 << 40)
    began = time.perf_counter()
    ids = [identifier for arrival in arrivals for identifier in store.put([arrival], lambda collection: same_author)]
    put_s = time.perf_counter() - began
    began = time.perf_counter()
    while store.maintain():
        pass
    index_s = time.perf_counter() - began
    store.close()
    began = time.perf_counter()
    store = MemoryStore(root, bytes_max=1 << 40, author_bytes_max=1 << 40)
    open_s = time.perf_counter() - began
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    notes: dict[str, object] = {
        "put_blocks_per_s": round(len(ids) / put_s),
        "indexed_per_s": round(len(ids) / index_s),
        "open_s": round(open_s, 2),
        "bytes_per_block": round(size / len(ids)),
    }
    return store, ids, notes


def _usearch(vectors: Floats, queries: Floats, truth: NDArray[np.int64], recall: float) -> list[Side]:
    """One side for each kind of number, with the least expansion that finds as much as the store, or all it has."""
    sides = []
    # usearch's own rounding to bytes takes 1 for the largest number, which no component of such a vector comes near to.
    scale = 127 / float(np.abs(vectors).max())
    for name, kind in KINDS.items():
        index = Index(ndim=vectors.shape[1], metric=MetricKind.IP, dtype=kind, expansion_add=128)
        rows = _as_bytes(vectors, scale) if name == "i8" else vectors
        began = time.perf_counter()
        index.add(np.arange(len(vectors)), rows, threads=1)
        built = len(vectors) / (time.perf_counter() - began)

        def ask(asked: Floats, index: Any = index, in_bytes: bool = name == "i8") -> Sequence[int]:
            found: list[int] = index.search(_as_bytes(asked, scale) if in_bytes else asked, K, threads=1).keys.tolist()
            return found

        reached = 0.0
        for expansion in EXPANSIONS:
            index.expansion_search = expansion
            reached = _recall(Side(name, ask, {}), queries, truth)
            if reached >= recall - RECALL_SLACK:
                break
        notes: dict[str, object] = {"recall_at_10": round(reached, 4), "expansion": expansion, "indexed_per_s": round(built)}
        # One that never finds as much is no match, however fast.
        sides.append(Side(f"usearch {name}" if reached >= recall - RECALL_SLACK else f"{name} by usearch finds less", ask, notes))
    return sides


def _as_bytes(vectors: Floats, scale: float) -> NDArray[np.int8]:
    return np.rint(vectors * scale).clip(-127, 127).astype(np.int8)


def _chroma(root: Path, vectors: Floats) -> Side:
    import chromadb

    client = chromadb.PersistentClient(str(root))
    collection = client.create_collection("sentences", configuration={"hnsw": {"space": "cosine"}})
    began = time.perf_counter()
    for at in range(0, len(vectors), 4000):
        part = vectors[at : at + 4000]
        collection.add(ids=[str(at + number) for number in range(len(part))], embeddings=part)
    notes: dict[str, object] = {
        "indexed_per_s": round(len(vectors) / (time.perf_counter() - began)),
        "version": chromadb.__version__,
    }

    def ask(asked: Floats) -> Sequence[str]:
        found = collection.query(query_embeddings=asked[None, :], n_results=K, include=[])
        identifiers: list[str] = found["ids"][0]
        return identifiers

    return Side("chroma", ask, notes)


def _lance(root: Path, vectors: Floats) -> Side:
    import lancedb
    import pyarrow

    flat = pyarrow.array(vectors.reshape(-1))
    columns = {"id": np.arange(len(vectors)), "vector": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    table = lancedb.connect(str(root)).create_table("sentences", pyarrow.table(columns))
    began = time.perf_counter()
    table.create_index("vector", config=lancedb.index.HnswSq(distance_type="cosine", num_partitions=1))
    notes: dict[str, object] = {
        "indexed_per_s": round(len(vectors) / (time.perf_counter() - began)),
        "version": lancedb.__version__,
    }

    def ask(asked: Floats) -> Sequence[int]:
        found = table.search(asked).distance_type("cosine").limit(K).ef(64).refine_factor(2).select(["id", "_distance"]).to_arrow()
        identifiers: list[int] = found["id"].to_pylist()
        return identifiers

    return Side("lancedb", ask, notes)


if __name__ == "__main__":
    main()
