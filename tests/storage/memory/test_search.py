"""Search: exact where spaces are small, the same list whatever the order of arrival, and nothing that a user types breaks it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.memory.block import INT8, Block, Vector, block_id, encode_block
from nexus.memory.quantise import quantise, unit_vectors
from nexus.storage.memory import index as index_module
from nexus.storage.memory import words
from nexus.storage.memory.records import Filters, Query, VectorRow
from nexus.storage.memory.store import MemoryStore
from tests.storage.memory.making import COLLECTION, FINGERPRINT, T0, open_store, plain, put, tombstone

DIMENSION = 48
OTHER = b"o" * 32


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Of length 1, in clusters as sentences are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, DIMENSION))
    return unit_vectors(centres[rng.integers(0, 20, count)] + 0.4 * rng.normal(size=(count, DIMENSION)), DIMENSION)


def with_vectors(rows: np.ndarray, first: int = 0, **fields: object) -> list[Block]:
    codes, scales = quantise(rows)
    return [
        plain(first + at, vectors=(Vector("m", FINGERPRINT, INT8, int(scale), code.tobytes()),), **fields)  # type: ignore[arg-type]
        for at, (code, scale) in enumerate(zip(codes, scales, strict=True))
    ]


def exact(rows: np.ndarray, query: np.ndarray, count: int = 10) -> list[int]:
    codes, _ = quantise(rows)
    wide = codes.astype(np.float64)
    scores = wide @ query.astype(np.float64) / np.linalg.norm(wide, axis=1)
    return np.argsort(-scores, kind="stable")[:count].tolist()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_store(tmp_path) as store:
        yield store


def test_small_spaces_are_searched_exactly_and_whatever_was_put_is_found(store: MemoryStore) -> None:
    rows, queries = vectors(700), vectors(20, 1)
    ids: list[bytes] = []
    for at in range(0, 700, 100):
        ids += put(store, *with_vectors(rows[at : at + 100], at))
        for query in queries[:5]:
            result = store.search(Query(10, query, FINGERPRINT), T0)
            assert [hit.id for hit in result.hits] == [ids[place] for place in exact(rows[: at + 100], query)]
    assert (result.explain.paths, result.explain.candidates) == (("flat",), (700,))
    best = result.hits[0]
    assert best.cosine == best.score
    assert best.block is not None
    assert best.block.id == best.id
    assert abs(best.score - float(rows[ids.index(best.id)] @ queries[4])) < 0.01


def test_the_order_of_arrival_does_not_show(tmp_path: Path) -> None:
    rows = vectors(400)
    rows[100:140] = rows[0]  # equal scores
    blocks = with_vectors(rows)
    queries = [rows[0], *vectors(10, 1)]
    results = []
    for number in range(3):
        random.Random(number).shuffle(blocks)
        with open_store(tmp_path / str(number)) as store:
            for at in range(0, 400, 57):
                put(store, *blocks[at : at + 57])
            found = [
                [(hit.id, hit.score) for hit in store.search(Query(20, query, FINGERPRINT, "text number7", hybrid), T0).hits]
                for query in queries
                for hybrid in (False, True)
            ]
        results.append(found)
    assert results[0] == results[1] == results[2]
    assert len({identifier for identifier, _ in results[0][0]}) == 20


def test_an_index_proposes_and_what_is_not_in_it_is_compared(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "INDEX_FROM", 1000)
    rows, queries = vectors(3300), vectors(50, 1)
    ids = put(store, *with_vectors(rows[:3000]))
    while store.maintain():
        pass
    ids += put(store, *with_vectors(rows[3000:], 3000))
    hits = 0
    for query in queries:
        result = store.search(Query(10, query, FINGERPRINT, blocks=False), T0)
        assert result.explain.paths == ("index",)
        assert 300 < result.explain.candidates[0] <= 350
        hits += len({hit.id for hit in result.hits} & {ids[place] for place in exact(rows, query)})
    assert hits >= 0.94 * 10 * len(queries)
    fresh = store.search(Query(1, rows[3299], FINGERPRINT), T0).hits[0]
    assert fresh.id == ids[3299]
    assert fresh.score > 0.999


def test_filters_apply_before_anything_is_cut_off(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "INDEX_FROM", 500)
    rows, queries = vectors(2000), vectors(20, 1)
    put(store, *with_vectors(rows[:1980]))
    rare = put(store, *with_vectors(rows[1980:], 1980, tags=("rare",)))
    while store.maintain():
        pass
    filters = Filters((COLLECTION,), tags=("rare",))
    for query in queries:
        result = store.search(Query(10, query, FINGERPRINT, filters=filters), T0)
        assert [hit.id for hit in result.hits] == [rare[place] for place in exact(rows[1980:], query)]
    monkeypatch.setattr("nexus.storage.memory.search._FLAT_MAX", 100)
    wide = Filters((COLLECTION,), until_ms=T0 + 999)
    hits = 0
    for query in queries:
        result = store.search(Query(10, query, FINGERPRINT, filters=wide), T0)
        assert result.explain.paths == ("index",)
        allowed = {block_id(encode_block(block)) for block in with_vectors(rows[:1000])}
        assert {hit.id for hit in result.hits} <= allowed
        hits += len({hit.id for hit in result.hits} & set(_ids(rows[:1000], query)))
    assert hits >= 0.95 * 10 * len(queries)


def _ids(rows: np.ndarray, query: np.ndarray) -> list[bytes]:
    blocks = with_vectors(rows)
    return [block_id(encode_block(blocks[place])) for place in exact(rows, query)]


def test_collections_are_searched_together_and_apart(store: MemoryStore) -> None:
    rows, queries = vectors(200), vectors(5, 1)
    ids = put(store, *with_vectors(rows[:100])) + put(store, *with_vectors(rows[100:], 100, collection=OTHER))
    for query in queries:
        both = store.search(Query(10, query, FINGERPRINT), T0).hits
        assert [hit.id for hit in both] == [ids[place] for place in exact(rows, query)]
        one = store.search(Query(10, query, FINGERPRINT, filters=Filters((OTHER,))), T0).hits
        assert [hit.id for hit in one] == [ids[100 + place] for place in exact(rows[100:], query)]
    assert store.search(Query(10, query, b"?" * 32), T0).hits == ()
    assert store.search(Query(10, query[:40], FINGERPRINT), T0).hits == ()
    assert store.search(Query(10, query, FINGERPRINT, filters=Filters((b"?" * 32,))), T0).hits == ()


def test_a_longer_vector_is_not_nearer(store: MemoryStore) -> None:
    codes = np.zeros(DIMENSION, np.int8)
    codes[0] = 127
    honest, loud = (
        plain(number, vectors=(Vector("m", FINGERPRINT, INT8, scale, bytes(codes)),))
        for number, scale in ((1, 10**9), (2, 2 * 10**9))
    )
    put(store, honest, loud)
    one, two = store.search(Query(2, np.eye(DIMENSION, dtype=np.float32)[0], FINGERPRINT), T0).hits
    assert one.score == two.score == 1.0


def test_a_second_model_joins(store: MemoryStore) -> None:
    second = b"2" * 32
    rows = vectors(30)
    ids = put(store, *with_vectors(rows))
    put(store, tombstone(100, ids[0]))
    assert store.missing_vectors(COLLECTION, second, 100) == ids[1:]
    codes, scales = quantise(vectors(30, 5)[:, :20] / np.linalg.norm(vectors(30, 5)[:, :20], axis=1, keepdims=True))
    added = [VectorRow(identifier, int(scale), code.tobytes()) for identifier, scale, code in zip(ids, scales, codes, strict=True)]
    assert store.add_vectors(COLLECTION, second, "second", added[:11]) == 10
    assert store.missing_vectors(COLLECTION, second, 100) == ids[11:]
    assert store.add_vectors(COLLECTION, second, "second", added) == 19
    assert store.add_vectors(COLLECTION, second, "second", added) == 0
    assert store.add_vectors(OTHER, second, "second", added) == 0
    for _ in range(2):
        query = codes[7].astype(np.float32)
        assert store.search(Query(1, query, second), T0).hits[0].id == ids[7]
        assert store.search(Query(1, rows[7], FINGERPRINT), T0).hits[0].id == ids[7]
        store.close()
        store = open_store(store.root)
    put(store, tombstone(101, ids[7]))
    assert store.search(Query(1, query, second), T0).hits[0].id != ids[7]
    with pytest.raises(UsageError):
        store.add_vectors(COLLECTION, second, "second", [added[0], replace_codes(added[1])])
    store.close()


def replace_codes(row: VectorRow) -> VectorRow:
    return row._replace(codes=row.codes + b"\0")


def test_words_and_vectors_are_fused_by_rank(store: MemoryStore) -> None:
    rows = vectors(50)
    blocks = with_vectors(rows)
    blocks[3] = blocks[3]._replace(text="zebra crossing")
    blocks[4] = blocks[4]._replace(text="the zebra, a zebra")
    ids = [identifier for block in blocks for identifier in put(store, block)]
    result = store.search(Query(5, rows[4], FINGERPRINT, "Zébra?", hybrid=True), T0)
    assert result.hits[0].id == ids[4]
    assert result.hits[0].text_rank in (1, 2)
    assert result.hits[0].score == pytest.approx(1 / 61 + 1 / (60 + result.hits[0].text_rank))
    third = next(hit for hit in store.search(Query(50, rows[4], FINGERPRINT, "zebra", hybrid=True), T0).hits if hit.id == ids[3])
    assert third.text_rank is not None
    assert third.cosine is not None
    assert store.search(Query(5, rows[4], FINGERPRINT, "zebra"), T0).hits[0].text_rank is None
    by_text = store.search(Query(5, text="zebra"), T0)
    assert {hit.id for hit in by_text.hits} == {ids[3], ids[4]}
    assert by_text.explain.paths == ("words",)
    assert set(result.explain.seconds) == {"vectors", "words"}


def test_common_words_count_only_where_there_is_no_other(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "COMMON_MIN", 3)
    ids = put(store, *[plain(number, text=f"common{' rare' if number in (5, 9) else ''} number{number}") for number in range(30)])
    assert {hit.id for hit in store.search(Query(30, text="common rare"), T0).hits} == {ids[5], ids[9]}
    assert len(store.search(Query(30, text="common"), T0).hits) == 30
    assert store.search(Query(30, text="absent"), T0).hits == ()


ANY_TEXT = st.text(max_size=200) | st.sampled_from(
    [
        '"',
        "'",
        "a OR",
        "NEAR(",
        "title:x",
        "*",
        "^x",
        "-x",
        "a AND NOT b",
        "x'; DROP TABLE block;--",
        "\0",
        "\ud800",
        "(((",
        "col : {a b}",
        "+",
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=ANY_TEXT)
def test_nothing_that_a_user_types_is_an_error(store: MemoryStore, text: str) -> None:
    if not store.stats().size:
        put(store, plain(1, text="a and or not near x title col"))
    try:
        store.search(Query(text=text), T0)
    except UsageError:
        assert not text.strip()
    store.search(Query(vector=np.ones(16, np.float32), fingerprint=FINGERPRINT, text=text, hybrid=True), T0)
    store.search(Query(text="a", filters=Filters(tags=(text,), langs=(text,))), T0)


@pytest.mark.parametrize(
    "query",
    [
        Query(),
        Query(0, text="x"),
        Query(10**6, text="x"),
        Query(text="  "),
        Query(vector=np.zeros(16, np.float32), fingerprint=FINGERPRINT),
        Query(vector=np.full(16, np.nan, np.float32), fingerprint=FINGERPRINT),
        Query(vector=np.full(16, np.inf, np.float32), fingerprint=FINGERPRINT),
        Query(vector=np.ones((2, 8), np.float32), fingerprint=FINGERPRINT),
        Query(vector=np.zeros(0, np.float32), fingerprint=FINGERPRINT),
    ],
)
def test_what_is_no_query_is_the_callers_fault(store: MemoryStore, query: Query) -> None:
    put(store, plain(1))
    with pytest.raises(UsageError):
        store.search(query, T0)
    assert store.search(replace(query, k=1, vector=None, text="text"), T0).hits


def test_models_without_end_make_no_files_without_end(store: MemoryStore) -> None:
    for number in range(70):
        fingerprint = bytes([number]) * 32
        put(store, plain(number, vectors=(Vector("m", fingerprint, INT8, 1, b"\x7f" * 16),)))
    assert len(store.stats().spaces) == 64
    assert len(list((store.root / "codes").iterdir())) == 64
    assert len(store.search(Query(100, text="text"), T0).hits) == 70
