"""The memory store keeps blocks with what proves them, all of an arrival or nothing; ids stay when bodies go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.errors import LocalError, UsageError
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import SEALED, Block, block_id, encode_block, id_text
from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import SKY_MODEL
from nexus.storage.memory.records import Content, Filters, Near, Query, QuotaError, State
from nexus.storage.memory.store import MemoryStore
from tests.storage.memory.making import (
    AUTHORS,
    COLLECTION,
    T0,
    arrival,
    open_store,
    plain,
    put,
    rules,
    signed,
    tombstone,
    vector,
)

OTHER = b"o" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_store(tmp_path) as store:
        yield store


def again(store: MemoryStore) -> MemoryStore:
    store.close()
    return open_store(store.root)


def id_of(block: Block) -> bytes:
    return block_id(encode_block(block))


def test_blocks_come_back_as_they_were(store: MemoryStore) -> None:
    blocks = [plain(number, tags=("a", "b"), title="T", lang="en") for number in range(5)]
    batch = signed(blocks)
    ids = store.put([arrival(batch, received_ms=T0 + 9, sender=b"s" * 32)], rules)
    assert ids == [id_of(block) for block in blocks]
    store = again(store)
    stored = store.get(ids[2])
    assert stored is not None
    assert (stored.data, stored.block, stored.content) == (batch.blocks[2], blocks[2], Content.of(blocks[2]))
    assert (stored.state, stored.received_ms, stored.sender, stored.pinned) == (State.LIVE, T0 + 9, b"s" * 32, False)
    assert (stored.collection, stored.author, stored.versions) == (COLLECTION, AUTHORS[0].public_key, None)
    assert store.get(b"x" * 32) is None
    assert store.notices == []
    store.close()


def test_known_blocks_are_passed_over_in_whatever_arrival(store: MemoryStore) -> None:
    blocks = [plain(number) for number in range(6)]
    first = arrival(signed(blocks[:4]))
    assert len(store.put([first, first], rules)) == 4
    assert store.put([first], rules) == []
    # Another batch with two known blocks: what is new of it can be served by itself all the same.
    assert store.put([arrival(signed(blocks[2:]))], rules) == [id_of(block) for block in blocks[4:]]
    ids = [id_of(block) for block in blocks]
    assert store.known([*ids, b"x" * 32]) == set(ids)
    served = store.batches(ids, 1 << 20)
    assert sorted(opened.id for batch in served for opened in open_batch(batch)) == sorted(ids)
    assert [item.id for item in store.items(COLLECTION)] == ids
    assert [item.id for item in store.items(COLLECTION, after=4)] == ids[4:]
    assert list(store.items(OTHER)) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(wanted=st.sets(st.integers(0, 11), min_size=1), came=st.sets(st.integers(0, 11), min_size=1))
def test_any_part_of_a_batch_is_proven(tmp_path_factory: pytest.TempPathFactory, wanted: set[int], came: set[int]) -> None:
    batch = signed([plain(number) for number in range(12)])
    ids = {place: opened.id for place, opened in enumerate(open_batch(batch))}
    part = SignedBatch(batch.proof.narrow(ids, sorted(came)), tuple(batch.blocks[place] for place in sorted(came)))
    with open_store(tmp_path_factory.mktemp("store")) as store:
        store.put([arrival(part)], rules)
        served = store.batches([ids[place] for place in wanted], 1 << 20)
        opened = [each.id for batch in served for each in open_batch(batch)]
    assert sorted(opened) == sorted(ids[place] for place in wanted & came)


def test_a_message_is_filled_in_the_order_of_the_wish(store: MemoryStore) -> None:
    ids = put(store, *[plain(number, text="x" * 1000) for number in range(9)])
    (batch,) = store.batches([ids[7], ids[0], b"x" * 32, ids[3], ids[1]], 3800)
    assert {opened.id for opened in open_batch(batch)} == {ids[7], ids[0], ids[3]}
    assert store.batches(ids, 100) == []


def test_a_prefix_finds_the_ids_that_begin_so(store: MemoryStore) -> None:
    ids = put(store, *[plain(number) for number in range(50)])
    for identifier in ids[:10]:
        text = id_text(identifier)
        for length in (10, 11, 20, 58, 59):
            assert store.find(text[:length]) == sorted(each for each in ids if id_text(each).startswith(text[:length]))
    for wrong in ("bafkrei", "bafkreiAAAA", "x" * 12, "", "bafkrei" + "a" * 53, "bafkrei189a"):
        with pytest.raises(UsageError):
            store.find(wrong)


def test_the_newest_come_first_and_pages_follow_one_another(store: MemoryStore) -> None:
    blocks = [plain(number % 7, text=f"block {number}") for number in range(20)]
    put(store, *blocks)
    expected = sorted(((block.created_ms, id_of(block)) for block in blocks), reverse=True)
    listed, before = [], None
    while page := store.listing(Filters((COLLECTION,)), 6, T0, before):
        before = (page[-1].created_ms, page[-1].id)
        listed.extend((each.created_ms, each.id) for each in page)
    assert listed == expected
    assert store.heads(COLLECTION, 3) == [identifier for _, identifier in expected[:3]]
    assert store.heads(COLLECTION, 100) == [identifier for _, identifier in expected]
    assert store.heads(OTHER, 3) == []


def test_filters(store: MemoryStore) -> None:
    def sky(latitude: float, longitude: float) -> bytes:
        return SKY_MODEL + Cell.of(latitude, longitude).to_bytes() + bytes(84)

    blocks = {
        "berlin": plain(1, sky=sky(52.5, 13.4), tags=("city", "north"), lang="de"),
        "sydney": plain(2, sky=sky(-33.9, 151.2), tags=("city",), lang="en"),
        "dateline": plain(3, sky=sky(0.2, -179.8)),
        "nowhere": plain(4, author=1),
        "other": plain(5, collection=OTHER, tags=("north",)),
    }
    for block in blocks.values():
        put(store, block)
    names = {id_of(block): name for name, block in blocks.items()}

    def found(filters: Filters) -> set[str]:
        searched = store.search(Query(10, text="text", filters=filters), T0)
        listed = {names[each.id] for each in store.listing(filters, 10, T0)}
        assert {names[hit.id] for hit in searched.hits} == listed
        return listed

    assert found(Filters()) == set(blocks)
    assert found(Filters((COLLECTION,))) == set(blocks) - {"other"}
    assert found(Filters((COLLECTION, OTHER), tags=("north",))) == {"berlin", "other"}
    assert found(Filters(tags=("north", "city"))) == {"berlin"}
    assert found(Filters(tags=("south",))) == set()
    assert found(Filters(authors=(AUTHORS[1].public_key, b"?" * 32))) == {"nowhere"}
    assert found(Filters(authors=(b"?" * 32,))) == set()
    assert found(Filters(langs=("de", "fr"))) == {"berlin"}
    assert found(Filters(since_ms=T0 + 2, until_ms=T0 + 4)) == {"sydney", "dateline", "nowhere"}
    assert found(Filters(near=Near(52.0, 13.0, 50))) == {"berlin"}
    assert found(Filters(near=Near(0.0, 179.9, 60))) == {"dateline"}
    assert found(Filters(near=Near(0.0, 0.0, 21_000))) == {"berlin", "sydney", "dateline"}
    assert found(Filters(near=Near(-20.0, 13.0, 500))) == set()
    assert found(Filters(kinds=(SEALED,))) == set()


def test_a_later_version_takes_the_place_of_an_earlier_one_in_any_order(tmp_path: Path) -> None:
    first = plain(1)
    second = plain(2, parents=id_of(first))
    beside = plain(3, parents=id_of(first))
    foreign = plain(4, author=1, parents=id_of(first))
    blocks = [first, second, beside, foreign]
    results = set()
    for number, order in enumerate(itertools.permutations(range(4))):
        with open_store(tmp_path / str(number)) as store:
            for place in order:
                put(store, blocks[place])
            got = [store.get(id_of(block)) for block in blocks]
            results.add(tuple((each.state, each.versions) for each in got if each is not None))
            shown = store.search(Query(9, vector=None, text="text"), T0).hits
            assert {hit.id for hit in shown} == {id_of(beside), id_of(foreign)}
    ((one, two, three, four),) = results
    assert one[0] == State.SUPERSEDED
    assert (two[0], three[0]) == (State.SUPERSEDED, State.LIVE)  # of versions in conflict one is shown
    assert four == (State.LIVE, None)  # it replaces nothing that is not its author's
    assert one[1] == two[1] == three[1]
    assert one[1] is not None
    assert one[1].winner == id_of(beside)
    assert one[1].heads == (id_of(beside), id_of(second))


@pytest.mark.parametrize("tombstone_first", [True, False])
def test_what_its_author_takes_away_is_erased_and_its_id_stays(tmp_path: Path, tombstone_first: bool) -> None:
    secret = "unmistakableword"
    block = plain(1, text=f"here is an {secret} to find", title="titleword", tags=("tagword",), vectors=(vector(77, 64),))
    other = plain(2, text="another text that stays here")
    gone = tombstone(3, id_of(block))
    with open_store(tmp_path) as store:
        put(store, other)
        if tombstone_first:
            put(store, gone)
            put(store, block)
        else:
            put(store, other, block)
            assert [hit.id for hit in store.search(Query(text=secret), T0).hits] == [id_of(block)]
            put(store, gone)
        assert store.search(Query(text=secret), T0).hits == ()
        assert store.search(Query(9, text="text", filters=Filters(tags=("tagword",))), T0).hits == ()
        stored = store.get(id_of(block))
        assert stored is not None
        assert (stored.state, stored.data, stored.content) == (State.REMOVED, b"", None)
        assert store.batches([id_of(block)], 1 << 20) == []
        assert len(store.batches([id_of(other), id_of(gone)], 1 << 20)) == 2
        assert put(store, block) == []  # nobody brings it back
        while store.maintain():
            pass
        assert store.verify().repaired == ()
        for path in tmp_path.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                for trace in (secret.encode(), b"titleword", b"tagword", block.vectors[0].codes):
                    assert trace not in data, path
    with open_store(tmp_path) as store:
        assert store.notices == []
        assert store.get(id_of(block)) == stored
        assert store.get(id_of(other)) is not None


def test_a_foreign_tombstone_takes_nothing_away(store: MemoryStore) -> None:
    (identifier,) = put(store, plain(1))
    put(store, tombstone(2, identifier, author=1))
    stored = store.get(identifier)
    assert stored is not None
    assert stored.state == State.LIVE


def test_rules_that_change_decide_anew(store: MemoryStore) -> None:
    first = plain(1)
    second = plain(2, author=1, parents=id_of(first))
    put(store, first)
    put(store, second)
    assert store.resolve(COLLECTION, rules) == 0
    assert store.resolve(COLLECTION, lambda collection: lambda child, parent: True) == 1
    got = store.get(id_of(first))
    assert got is not None
    assert got.state == State.SUPERSEDED
    assert got.versions is not None
    assert got.versions.winner == id_of(second)


def test_sealed_blocks_are_found_once_they_can_be_read(store: MemoryStore) -> None:
    def sealed(number: int) -> Block:
        return Block(SEALED, COLLECTION, AUTHORS[0].public_key, T0 + number, data=b"ciphertext%d" % number)

    content = Content("a hidden sentence", "title", "de", ("t",), vectors=(vector(5),))
    readable, closed = sealed(1), sealed(2)
    store.put([arrival(signed([readable, closed]), [content, None])], rules)
    assert store.unread(COLLECTION, 10) == [id_of(closed)]
    assert [hit.id for hit in store.search(Query(text="hidden"), T0).hits] == [id_of(readable)]
    assert store.missing_vectors(COLLECTION, b"f" * 32, 9) == []
    assert store.read_sealed([(id_of(closed), content), (id_of(readable), content)]) == 1
    store = again(store)
    assert store.unread(COLLECTION, 10) == []
    stored = store.get(id_of(closed))
    assert stored is not None
    assert stored.content == content
    assert {hit.id for hit in store.search(Query(text="hidden"), T0).hits} == {id_of(readable), id_of(closed)}
    assert store.verify().repaired == ()
    store.close()


def test_what_is_over_goes_unless_it_is_pinned(store: MemoryStore) -> None:
    blocks = [plain(number, expires_ms=T0 + 100 * (number + 1)) for number in range(3)] + [plain(4)]
    ids = put(store, *blocks)
    assert store.pin(ids[1])
    assert not store.pin(b"x" * 32)
    found = store.search(Query(9, text="text"), T0 + 150).hits
    assert {hit.id for hit in found} == {ids[1], ids[2], ids[3]}
    assert store.expire(T0 + 250) == [ids[0]]
    assert [item.state for item in store.items(COLLECTION)] == [State.EXPIRED, State.LIVE, State.LIVE, State.LIVE]
    assert store.batches([ids[0]], 1 << 20) == []
    assert store.known(ids) == set(ids)
    assert len(open_batch(store.batches(ids, 1 << 20)[0])) == 3


def test_room_is_made_from_the_oldest_on(store: MemoryStore) -> None:
    ids = []
    for number in range(10):
        ids += put(store, plain(number), received_ms=T0 + number)
    store.pin(ids[0])
    used = store.stats().size
    assert store.prune(5, None, T0 + 10, dry_run=True).ids == tuple(ids[1:5])
    assert store.stats().size == used
    report = store.prune(None, used * 6 // 10, T0)
    assert report.ids == tuple(ids[1:5])
    assert store.stats().size == used - report.size
    assert store.stats().blocks[State.PRUNED] == 4
    assert put(store, plain(1)) == []
    assert store.verify().repaired == ()
    assert again(store).stats().size == used - report.size


def test_quotas_hold_for_all_and_for_each_author(tmp_path: Path) -> None:
    with open_store(tmp_path, bytes_max=60_000, author_bytes_max=20_000) as store:
        many = [plain(number, text="y" * 1000) for number in range(30)]
        with pytest.raises(QuotaError) as refused:
            put(store, *many)
        assert (refused.value.whose, refused.value.author, refused.value.collection) == (
            "author",
            AUTHORS[0].public_key,
            COLLECTION,
        )
        assert store.known([id_of(many[0])]) == set()
        assert store.stats().size == 0
        for author in range(4):
            blocks = [plain(number, author=author, text="y" * 1000) for number in range(10)]
            if author < 3:
                put(store, *blocks)
            else:
                put(store, *[plain(number, author=author, text="z" * 1000, collection=OTHER) for number in range(5)])
                with pytest.raises(QuotaError) as refused:
                    put(store, *blocks)
                assert refused.value.whose == "total"
        store.prune(None, 30_000, T0)
        assert len(put(store, *blocks)) == 10
        assert store.verify().damaged == ()


def test_two_processes_do_not_share_a_store(store: MemoryStore) -> None:
    put(store, plain(1))
    with pytest.raises(LocalError, match="in use"):
        open_store(store.root)


def test_receipts_and_documents_survive(store: MemoryStore) -> None:
    block = b"b" * 32
    assert store.put_receipts([(block, bytes([number]) * 32, b"r%d" % number) for number in range(12)]) == 8
    assert store.put_receipts([(block, bytes(32), b"another")]) == 0
    store.put_document("charter", b"k2", b"second")
    store.put_document("charter", b"k1", b"first")
    store.put_document("charter", b"k2", b"changed")
    store.put_document("key", b"k3", b"")
    store = again(store)
    assert store.receipts(block) == {bytes([number]) * 32: b"r%d" % number for number in range(8)}
    assert store.documents("charter") == {b"k1": b"first", b"k2": b"changed"}
    assert (store.document("key", b"k3"), store.document("key", b"k4")) == (b"", None)
    store.remove_document("charter", b"k1")
    assert store.documents("charter") == {b"k2": b"changed"}
    store.close()
