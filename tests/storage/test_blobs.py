"""Content-addressed blobs: whole or not there, whatever happens while they are written or fetched."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, LocalError, MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.manifest import CHUNK_BYTES, Blob, blob_root, chunk_count
from nexus.storage.blobs import BLOB_BYTES_MAX, BlobStore, chunk_length

BIG = b"1" * CHUNK_BYTES + b"2" * CHUNK_BYTES + b"the last chunk is short"


def cut(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, max(len(data), 1), CHUNK_BYTES)]


def blob_of(data: bytes, name: str = "piece") -> Blob:
    return Blob(name, len(data), blob_root(len(data), [leaf_hash(chunk) for chunk in cut(data)]))


def hashes_of(data: bytes) -> list[bytes]:
    return [leaf_hash(chunk) for chunk in cut(data)]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore.open(tmp_path / "models")


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes((byte[0] ^ 1,)))


class TestPut:
    @settings(max_examples=40, deadline=None)
    @given(pieces=st.lists(st.binary(max_size=200), max_size=8), scale=st.sampled_from([1, 9001]))
    def test_what_goes_in_comes_out_however_it_is_cut(
        self, pieces: list[bytes], scale: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        store = BlobStore.open(tmp_path_factory.mktemp("store"))
        pieces = [piece * scale for piece in pieces]
        data = b"".join(pieces)
        blob = store.put("x", len(data), iter(pieces))
        assert blob == blob_of(data, "x")
        assert store.path(blob.root).read_bytes() == data
        assert store.chunk_hashes(blob.root) == hashes_of(data)
        assert b"".join(store.read_chunk(blob.root, index) for index in range(chunk_count(len(data)))) == data
        store.verify(blob.root)
        assert store.roots() == [blob.root]
        assert store.used_bytes() == len(data)

    def test_an_empty_blob_has_one_empty_chunk(self, store: BlobStore) -> None:
        blob = store.put("empty", 0, [])
        assert store.read_chunk(blob.root, 0) == b""
        assert store.has(blob.root)

    @pytest.mark.parametrize("size", [len(BIG) - 1, len(BIG) + 1])
    def test_a_source_that_changes_while_it_is_read_leaves_nothing(self, store: BlobStore, tmp_path: Path, size: int) -> None:
        with pytest.raises(LocalError, match="changed while it was read"):
            store.put("x", size, [BIG])
        assert list((tmp_path / "models").iterdir()) == []

    def test_a_source_that_cannot_be_read_is_blamed_itself(self, store: BlobStore, tmp_path: Path) -> None:
        def failing() -> Iterator[bytes]:
            yield b"abc"
            raise OSError(errno.EIO, "Input/output error")

        with pytest.raises(LocalError, match=r"layer\.1 cannot be read"):
            store.put("layer.1", 6, failing())
        assert list((tmp_path / "models").iterdir()) == []

    def test_a_full_disk_loses_nothing_and_says_what_to_do(
        self, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = store.put("kept", 3, [b"abc"])
        real = os.pwrite

        def full(handle: int, data: bytes, offset: int) -> int:
            if offset >= CHUNK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(handle, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(LocalError, match="full") as caught:
            store.put("big", len(BIG), [BIG])
        assert "Free some space" in caught.value.fix
        assert sorted(path.suffix for path in (tmp_path / "models").iterdir()) == [".blob", ".hashes"]
        store.verify(kept.root)
        monkeypatch.undo()
        store.verify(store.put("big", len(BIG), [BIG]).root)

    def test_the_quota_counts_what_is_on_its_way(self, tmp_path: Path) -> None:
        store = BlobStore.open(tmp_path, quota_bytes=len(BIG) + 10)
        with store.begin(blob_of(BIG)):
            store.put("fits", 10, [b"0123456789"])
            with pytest.raises(CapacityError, match="do not fit") as caught:
                store.put("x", 1, [b"x"])
            assert "disk_max_bytes" in caught.value.fix
        assert store.used_bytes() == len(BIG) + 10

    def test_more_than_the_disk_holds_is_refused_before_it_starts(self, store: BlobStore) -> None:
        with pytest.raises(LocalError, match="full"):
            store.require_space(2**60)

    def test_a_size_that_no_blob_has_is_refused_before_its_hashes_are_counted(self, store: BlobStore) -> None:
        with pytest.raises(MalformedError):
            store.begin(Blob("x", BLOB_BYTES_MAX + 1, bytes(32)))
        with pytest.raises(CapacityError):
            store.put("x", BLOB_BYTES_MAX + 1, [])

    def test_putting_it_again_mends_a_damaged_copy(self, store: BlobStore) -> None:
        blob = store.put("x", len(BIG), [BIG])
        damage(store.path(blob.root), 5)
        with pytest.raises(LocalError, match="damaged"):
            store.verify(blob.root)
        store.put("x", len(BIG), [BIG])
        store.verify(blob.root)


class TestDamage:
    def test_a_changed_byte_is_never_handed_out(self, store: BlobStore) -> None:
        blob = store.put("x", len(BIG), [BIG])
        damage(store.path(blob.root), CHUNK_BYTES + 7)
        assert store.read_chunk(blob.root, 0) == BIG[:CHUNK_BYTES]
        with pytest.raises(LocalError, match="damaged"):
            store.read_chunk(blob.root, 1)

    def test_a_cut_file_is_not_there(self, store: BlobStore) -> None:
        blob = store.put("x", len(BIG), [BIG])
        os.truncate(store.path(blob.root), 100)
        assert not store.has(blob.root)
        with pytest.raises(NotFoundError):
            store.read_chunk(blob.root, 0)

    def test_damaged_hashes_are_noticed(self, store: BlobStore, tmp_path: Path) -> None:
        blob = store.put("x", len(BIG), [BIG])
        damage(tmp_path / "models" / f"{blob.root.hex()}.hashes", 40)
        with pytest.raises(LocalError, match="damaged"):
            store.chunk_hashes(blob.root)
        with pytest.raises(LocalError, match="damaged"):
            store.read_chunk(blob.root, 1)

    def test_a_chunk_that_it_does_not_have_is_refused(self, store: BlobStore) -> None:
        blob = store.put("x", 3, [b"abc"])
        for index in (-1, 1, 2**40):
            with pytest.raises(MalformedError):
                store.read_chunk(blob.root, index)


class TestSweep:
    def test_leftovers_go_and_the_rest_stays(self, store: BlobStore, tmp_path: Path) -> None:
        blob = store.put("x", 3, [b"abc"])
        with store.begin(blob_of(BIG)) as partial:
            partial.accept_hashes(hashes_of(BIG))
        models = tmp_path / "models"
        (models / "abcdef.tmp").write_bytes(b"half")
        (models / f"{bytes(32).hex()}.hashes").write_bytes(b"alone")
        (models / f"{blob.root.hex()}.part").write_bytes(b"superseded")
        (models / "notes.txt").write_text("not ours")
        again = BlobStore.open(models)
        assert again.roots() == [blob.root]
        half = blob_of(BIG).root.hex()
        expected = [f"{blob.root.hex()}.blob", f"{blob.root.hex()}.hashes", f"{half}.part", f"{half}.hashes", "notes.txt"]
        assert sorted(path.name for path in models.iterdir()) == sorted(expected)

    def test_lost_hashes_are_made_again_from_the_only_copy(self, store: BlobStore, tmp_path: Path) -> None:
        blob = store.put("x", len(BIG), [BIG])
        (tmp_path / "models" / f"{blob.root.hex()}.hashes").unlink()
        assert not store.has(blob.root)
        BlobStore.open(tmp_path / "models").verify(blob.root)

    def test_collect_frees_what_no_model_names(self, store: BlobStore) -> None:
        kept = store.put("kept", 3, [b"abc"])
        store.put("gone", 4, [b"abcd"])
        with store.begin(blob_of(BIG)):
            assert store.collect({kept.root}) == 4
        assert store.collect({kept.root}) == len(BIG)
        assert store.roots() == [kept.root]

    def test_remove_takes_all_of_it(self, store: BlobStore, tmp_path: Path) -> None:
        blob = store.put("x", 3, [b"abc"])
        store.remove(blob.root)
        store.remove(blob.root)
        assert list((tmp_path / "models").iterdir()) == []

    def test_a_store_whose_directory_is_a_file_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "models").write_text("")
        with pytest.raises(LocalError, match="models"):
            BlobStore.open(tmp_path / "models")


class TestPartial:
    def test_chunks_in_any_order_make_the_blob(self, store: BlobStore) -> None:
        blob = blob_of(BIG)
        with store.begin(blob) as partial:
            assert not partial.hashes_known
            assert partial.missing() == [0, 1, 2]
            partial.accept_hashes(hashes_of(BIG))
            for index in (2, 0, 1):
                assert not store.has(blob.root)
                partial.write_chunk(index, cut(BIG)[index])
            partial.commit()
        store.verify(blob.root)

    def test_wrong_hashes_are_refused(self, store: BlobStore) -> None:
        right = hashes_of(BIG)
        with store.begin(blob_of(BIG)) as partial:
            for wrong in ([], right[:-1], [*right, right[0]], [right[1], right[0], right[2]], [*right[:2], b"short"]):
                with pytest.raises(VerificationError):
                    partial.accept_hashes(wrong)
            assert not partial.hashes_known

    def test_hashes_of_another_size_are_refused(self, store: BlobStore) -> None:
        honest = blob_of(BIG)
        with store.begin(Blob("x", len(BIG) + 1, honest.root)) as partial, pytest.raises(VerificationError):
            partial.accept_hashes(hashes_of(BIG))

    def test_a_wrong_chunk_is_never_kept(self, store: BlobStore) -> None:
        chunks = cut(BIG)
        with store.begin(blob_of(BIG)) as partial:
            partial.accept_hashes(hashes_of(BIG))
            for index, data in ((0, chunks[2]), (2, chunks[0]), (2, chunks[2][:-1]), (2, chunks[2] + b"x"), (0, b"")):
                with pytest.raises(VerificationError):
                    partial.write_chunk(index, data)
            with pytest.raises(MalformedError):
                partial.write_chunk(3, b"")
            assert partial.missing() == [0, 1, 2]

    def test_a_fetch_goes_on_after_a_crash_with_what_is_right_on_disk(self, store: BlobStore, tmp_path: Path) -> None:
        blob = blob_of(BIG)
        with store.begin(blob) as partial:
            partial.accept_hashes(hashes_of(BIG))
            partial.write_chunk(0, cut(BIG)[0])
            partial.write_chunk(2, cut(BIG)[2])
        # A power loss may leave any bytes in what was not synced.
        damage(tmp_path / "models" / f"{blob.root.hex()}.part", 2 * CHUNK_BYTES + 3)
        again = BlobStore.open(tmp_path / "models")
        with again.begin(blob) as partial:
            assert partial.hashes_known
            assert partial.missing() == [1, 2]
            assert partial.verified_bytes == CHUNK_BYTES
            for index in (1, 2):
                partial.write_chunk(index, cut(BIG)[index])
            partial.commit()
        again.verify(blob.root)

    def test_damaged_hashes_are_asked_for_again(self, store: BlobStore, tmp_path: Path) -> None:
        blob = blob_of(BIG)
        with store.begin(blob) as partial:
            partial.accept_hashes(hashes_of(BIG))
            partial.write_chunk(1, cut(BIG)[1])
        damage(tmp_path / "models" / f"{blob.root.hex()}.hashes", 20)
        with store.begin(blob) as partial:
            assert not partial.hashes_known
            partial.accept_hashes(hashes_of(BIG))
            assert partial.missing() == [0, 2]

    def test_a_full_disk_keeps_what_is_verified(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        blob = blob_of(BIG)
        with store.begin(blob) as partial:
            partial.accept_hashes(hashes_of(BIG))
            partial.write_chunk(0, cut(BIG)[0])

            def full(*_: object) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(LocalError, match="full"):
                partial.write_chunk(1, cut(BIG)[1])
            monkeypatch.undo()
            assert partial.missing() == [1, 2]
        with store.begin(blob) as partial:
            assert partial.missing() == [1, 2]

    def test_a_blob_is_fetched_once_at_a_time(self, store: BlobStore) -> None:
        blob = blob_of(BIG)
        with store.begin(blob):
            with pytest.raises(LocalError, match="already"):
                store.begin(blob)
            with pytest.raises(LocalError, match="fetched"):
                store.remove(blob.root)
        store.begin(blob).close()

    def test_an_unfinished_blob_cannot_be_committed(self, store: BlobStore) -> None:
        with store.begin(blob_of(BIG)) as partial, pytest.raises(RuntimeError):
            partial.commit()

    def test_an_almost_empty_download_is_not_read_through(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """16 GiB of holes would take many seconds."""
        size = 1 << 34
        hashes = [bytes(32)] * chunk_count(size)
        blob = Blob("x", size, blob_root(size, hashes))
        monkeypatch.setattr(BlobStore, "require_space", lambda self, size: None)
        read: list[int] = []
        real = os.pread

        def counting(handle: int, length: int, offset: int) -> bytes:
            read.append(offset)
            return real(handle, length, offset)

        monkeypatch.setattr(os, "pread", counting)
        with store.begin(blob) as partial:
            partial.accept_hashes(hashes)
        assert len(read) < 4
        store.remove(blob.root)


def test_chunk_lengths_add_up() -> None:
    for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES):
        assert sum(chunk_length(size, index) for index in range(chunk_count(size))) == size


class TestEviction:
    """A cache with a quota: what nobody protects makes room, the longest unused first."""

    SIZE = 1000

    def filled(self, tmp_path: Path, count: int = 4) -> tuple[BlobStore, list[Blob]]:
        """So many blobs fill the store; an earlier process put them there, each used a minute after the one before."""
        path = tmp_path / "cache"
        first = BlobStore.open(path)
        blobs = [first.put(str(number), self.SIZE, [bytes([number]) * self.SIZE]) for number in range(count)]
        for number, blob in enumerate(blobs):
            used_s = time.time() - 3600 + 60 * number
            os.utime(first.path(blob.root), (used_s, used_s))
        return BlobStore.open(path, count * self.SIZE), blobs

    def roots(self, blobs: list[Blob]) -> list[bytes]:
        return sorted(blob.root for blob in blobs)

    def test_the_longest_unused_goes_first_and_no_more_than_needed(self, tmp_path: Path) -> None:
        store, blobs = self.filled(tmp_path)
        new = store.put("new", self.SIZE + 1, [b"n" * (self.SIZE + 1)])
        assert store.roots() == self.roots([*blobs[2:], new])
        assert store.evicted == 2

    def test_use_counts_and_survives_a_restart(self, tmp_path: Path) -> None:
        store, blobs = self.filled(tmp_path)
        store.read_chunk(blobs[0].root, 0)
        store.path(blobs[1].root)
        again = BlobStore.open(tmp_path / "cache", 4 * self.SIZE)
        again.put("new", self.SIZE, [b"n" * self.SIZE])
        assert not again.has(blobs[2].root)
        assert again.has(blobs[0].root)
        assert again.has(blobs[1].root)

    def test_what_is_protected_held_or_just_used_stays_and_then_nothing_is_evicted_in_vain(self, tmp_path: Path) -> None:
        store, blobs = self.filled(tmp_path)
        store.protect(lambda: [blobs[0].root])
        store.path(blobs[2].root)
        with store.hold([blobs[1].root]):
            with pytest.raises(CapacityError, match="named, served or in use"):
                store.put("new", 2 * self.SIZE, [b"n" * (2 * self.SIZE)])
            assert store.roots() == self.roots(blobs)
            store.put("new", self.SIZE, [b"n" * self.SIZE])
            assert not store.has(blobs[3].root)
        store.put("more", self.SIZE, [b"m" * self.SIZE])
        assert not store.has(blobs[1].root)
        assert store.has(blobs[0].root)

    def test_pieces_of_an_import_stay_until_they_were_named_once(self, tmp_path: Path) -> None:
        store = BlobStore.open(tmp_path / "cache", 2 * self.SIZE)
        pieces = [store.put(str(number), self.SIZE, [bytes([number]) * self.SIZE]) for number in range(2)]
        for piece in pieces:
            os.utime(store.path(piece.root), (1, 1))
        with pytest.raises(CapacityError):
            store.require_space(1)
        named = [piece.root for piece in pieces]
        store.protect(lambda: named)
        with pytest.raises(CapacityError):
            store.require_space(1)
        named.pop()
        store.require_space(1)
        assert store.roots() == [pieces[0].root]

    def test_a_download_that_was_given_up_goes_too_and_one_under_way_does_not(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        store = BlobStore.open(path, 3 * len(BIG))
        given_up, under_way = blob_of(BIG, "a"), blob_of(b"x" + BIG[1:], "b")
        store.begin(given_up).close()
        partial = store.begin(under_way)
        for blob in (given_up, under_way):
            os.utime(path / f"{blob.root.hex()}.part", (1, 1))
        store.require_space(2 * len(BIG))
        assert not (path / f"{given_up.root.hex()}.part").exists()
        assert (path / f"{under_way.root.hex()}.part").exists()
        with pytest.raises(CapacityError):
            store.require_space(3 * len(BIG))
        partial.close()

    def test_room_for_several_counts_what_is_here_of_them(self, tmp_path: Path) -> None:
        store = BlobStore.open(tmp_path / "cache", 2 * len(BIG))
        one, other = blob_of(BIG, "a"), blob_of(b"x" + BIG[1:], "b")
        with store.begin(one):
            store.require_room_for([one, other])
            with pytest.raises(CapacityError):
                store.require_room_for([one, other, blob_of(b"y")])

    @settings(max_examples=30, deadline=None)
    @given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3000)), max_size=12), protected=st.sets(st.integers(0, 5)))
    def test_the_quota_holds_and_what_is_protected_stays(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], protected: set[int]
    ) -> None:
        store = BlobStore.open(tmp_path_factory.mktemp("quota"), 6000)
        roots: dict[int, bytes] = {}
        store.protect(lambda: [root for number, root in roots.items() if number in protected])
        for number, size in steps:
            try:
                roots[number] = store.put("x", size, [bytes([number]) * size]).root
            except CapacityError:
                continue
            os.utime(store.path(roots[number]), (number + 1, number + 1))
            store._stored.clear()
            assert store.used_bytes() <= 6000
            assert all(store.has(root) for key, root in roots.items() if key in protected)
