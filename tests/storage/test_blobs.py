"""Content-addressed blobs: whole or not there, whatever happens while they are written or fetched."""

from __future__ import annotations

import errno
import os
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
