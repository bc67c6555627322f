"""Local names of models, and which of their layers are here."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import LocalError, MalformedError, NotFoundError, UsageError
from nexus.core.fidelity import Fidelity, LayerFidelity
from nexus.core.manifest import EMBEDDING, HEAD, Blob, Manifest, layer_name
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog, check_name, held_bytes, held_layers, parse_manifest
from nexus.storage.notes import ModelNotes


def model_in(store: BlobStore, layers: int = 4, tied: int = 0, salt: bytes = b"") -> Manifest:
    def put(name: str) -> Blob:
        data = name.encode() + salt
        return store.put(name, len(data), [data])

    pieces = tuple(put(name) for name in (EMBEDDING, *(layer_name(index) for index in range(layers)), HEAD))
    return Manifest(
        1, "causal", "LlamaForCausalLM", "float", "float32", layers, 8, 16, 64, 32, tied, pieces, (put("config.json"),), ()
    )


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore.open(tmp_path / "models")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.open(tmp_path / "models")


class TestNames:
    def test_a_model_is_found_by_name_and_by_root_also_after_a_restart(
        self, store: BlobStore, catalog: Catalog, tmp_path: Path
    ) -> None:
        manifest = model_in(store)
        catalog.add("nano", manifest)
        for one in (catalog, Catalog.open(tmp_path / "models")):
            assert one.find("nano") == manifest.root
            assert one.find(manifest.root.hex()[:6]) == manifest.root
            assert one.manifest(manifest.root) == manifest
            assert one.names() == {"nano": manifest.root}
            assert one.name_of(manifest.root) == "nano"
            assert one.roots() == [manifest.root]
            assert one.has(manifest.root)
            assert not one.warning

    def test_a_name_stands_for_one_model(self, store: BlobStore, catalog: Catalog) -> None:
        catalog.add("nano", model_in(store))
        catalog.add("nano", model_in(store))
        with pytest.raises(UsageError, match="another model"):
            catalog.add("nano", model_in(store, salt=b"2"))

    def test_an_unknown_name_lists_the_known_ones(self, store: BlobStore, catalog: Catalog) -> None:
        with pytest.raises(NotFoundError, match="none yet"):
            catalog.find("nano")
        catalog.add("nano", model_in(store))
        with pytest.raises(NotFoundError, match="nano"):
            catalog.find("mano")

    def test_an_ambiguous_prefix_lists_what_it_fits(self, store: BlobStore, catalog: Catalog, tmp_path: Path) -> None:
        manifest = model_in(store)
        catalog.add("nano", manifest)
        other = manifest.root[:2] + bytes(30)
        (tmp_path / "models" / f"{other.hex()}.manifest").write_bytes(b"")
        with pytest.raises(UsageError, match=r"\(nano\)"):
            catalog.find(manifest.root.hex()[:4])
        assert catalog.find(manifest.root.hex()[:10]) == manifest.root

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-x", "a b", "a\n", "ü", "x" * 65, "a\0b"])
    def test_bad_names_are_refused_with_the_allowed_form(self, name: str, store: BlobStore, catalog: Catalog) -> None:
        with pytest.raises(UsageError, match="64 letters"):
            catalog.add(name, model_in(store))
        assert catalog.names() == {}

    @settings(max_examples=30)
    @given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
    def test_good_names_are_taken(self, name: str) -> None:
        assert check_name(name) == name

    def test_a_removed_model_is_gone_with_all_its_names(self, store: BlobStore, catalog: Catalog, tmp_path: Path) -> None:
        manifest = model_in(store)
        catalog.add("one", manifest)
        catalog.add("two", manifest)
        assert catalog.name_of(manifest.root) == "one"
        catalog.remove(manifest.root)
        catalog.remove(manifest.root)
        assert Catalog.open(tmp_path / "models").names() == {}
        with pytest.raises(NotFoundError):
            catalog.manifest(manifest.root)

    def test_a_model_without_a_name_is_known_by_its_root(self, store: BlobStore, catalog: Catalog) -> None:
        manifest = model_in(store)
        catalog.keep(manifest)
        assert catalog.name_of(manifest.root) == manifest.root.hex()[:12]
        assert catalog.find(manifest.root.hex()[:12]) == manifest.root


class TestDamage:
    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b'{"spec":1,"names":{"a/b":"00"}}', b'{"spec":1,"names":{"a":7}}', b"[" * 100_000]
    )
    def test_damaged_names_are_moved_aside_and_the_models_stay(
        self, content: bytes, store: BlobStore, catalog: Catalog, tmp_path: Path
    ) -> None:
        manifest = model_in(store)
        catalog.add("nano", manifest)
        (tmp_path / "models" / "names.json").write_bytes(content)
        again = Catalog.open(tmp_path / "models")
        assert "names.json.damaged" in again.warning
        assert (tmp_path / "models" / "names.json.damaged").read_bytes() == content
        assert again.find(manifest.root.hex()[:8]) == manifest.root

    def test_a_damaged_manifest_is_told_apart_from_an_unknown_one(self, store: BlobStore, catalog: Catalog, tmp_path: Path) -> None:
        manifest = model_in(store)
        catalog.add("nano", manifest)
        raw = manifest.to_bytes()
        for wrong in (raw[:-1], raw.replace(b"Llama", b"Lyama"), b"", bytes(2 << 20)):
            (tmp_path / "models" / f"{manifest.root.hex()}.manifest").write_bytes(wrong)
            with pytest.raises(LocalError, match="damaged"):
                catalog.manifest(manifest.root)
        catalog.add("nano", manifest)
        assert catalog.manifest(manifest.root) == manifest

    @pytest.mark.parametrize("raw", [b"", b"not a manifest", None])
    def test_a_name_without_a_readable_manifest_is_free(
        self, raw: bytes | None, store: BlobStore, catalog: Catalog, tmp_path: Path
    ) -> None:
        """A damaged manifest, one of an older version, and one that is gone: adding the model again mends it."""
        old, new = model_in(store), model_in(store, salt=b"2")
        catalog.add("nano", old)
        path = tmp_path / "models" / f"{old.root.hex()}.manifest"
        path.unlink() if raw is None else path.write_bytes(raw)
        catalog.add("nano", new)
        assert Catalog.open(tmp_path / "models").find("nano") == new.root

    def test_a_manifest_is_checked_against_the_root_that_was_asked_for(self, store: BlobStore) -> None:
        manifest = model_in(store)
        assert parse_manifest(manifest.to_bytes(), manifest.root) == manifest
        with pytest.raises(MalformedError, match="another model"):
            parse_manifest(manifest.to_bytes(), bytes(32))


class Holding(BlobStore):
    """A store of which only `here` matters: no file is written for each example."""

    def __init__(self, here: set[bytes]) -> None:
        super().__init__(Path("nowhere"))
        self.here = here

    def has(self, root: bytes) -> bool:
        return root in self.here


def bare_model(layers: int, tied: int) -> Manifest:
    names = (EMBEDDING, *(layer_name(index) for index in range(layers)), HEAD)
    pieces = tuple(Blob(name, 100 + index, bytes([index]) * 32) for index, name in enumerate(names))
    files = (Blob("config.json", 10, b"c" * 32),)
    return Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", layers, 8, 16, 64, 32, tied, pieces, files, ())


@given(missing=st.sets(st.integers(0, 7)), tied=st.booleans())
def test_a_range_is_held_when_a_stage_could_serve_it(missing: set[int], tied: bool) -> None:
    """Checked against the definition, layer by layer: pieces are embedding, six layers, head."""
    manifest = bare_model(6, int(tied))
    blobs = [piece for index, piece in enumerate(manifest.pieces) if index not in missing] + list(manifest.files)
    store = Holding({blob.root for blob in blobs})
    held = {layer for layer in range(6) if layer + 1 not in missing}
    if 0 in missing:
        held.discard(0)
    if 7 in missing or (tied and 0 in missing):
        held.discard(5)
    ranges = held_layers(manifest, store)
    assert {layer for start, end in ranges for layer in range(start, end)} == held
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    assert held_bytes(manifest, store) == sum(blob.size for blob in blobs)


REPORT = Fidelity(
    "text",
    "/models/nano",
    1,
    2,
    3,
    "native (avx2)",
    (LayerFidelity("embedding", 0.5), LayerFidelity("head", 0.25)),
    top1_agreement=0.9,
)


class TestNotes:
    def test_notes_are_kept_beside_the_manifest_and_go_with_it(self, store: BlobStore, catalog: Catalog, tmp_path: Path) -> None:
        manifest = model_in(store)
        assert catalog.notes(manifest.root) == ModelNotes()
        catalog.add("nano", manifest)
        notes = ModelNotes("/models/ü", REPORT)
        catalog.note(manifest.root, notes)
        again = Catalog.open(tmp_path / "models")
        assert again.notes(manifest.root) == notes
        assert again.roots() == [manifest.root]
        assert again.manifest(manifest.root) == manifest
        again.remove(manifest.root)
        assert catalog.notes(manifest.root) == ModelNotes()
        assert not list((tmp_path / "models").glob("*.notes"))

    @given(
        change=st.sampled_from(["texts", "top1_agreement", "layers", "kernel", "more"]),
        value=st.sampled_from([None, [], {}, "x", True, -1, [{"name": "x", "error": float("nan")}], [{"name": 5, "error": 0.5}]]),
    )
    def test_a_damaged_report_is_refused_or_whole(self, change: str, value: object) -> None:
        fields = json.loads(ModelNotes("x", REPORT).to_bytes())
        fields["fidelity"][change] = value
        try:
            report = ModelNotes.from_bytes(json.dumps(fields).encode()).fidelity
        except MalformedError:
            return
        assert (change, report) in [
            ("texts", replace(REPORT, texts=-1)),
            ("kernel", replace(REPORT, kernel="x")),
            ("top1_agreement", replace(REPORT, top1_agreement=None)),
            ("top1_agreement", replace(REPORT, top1_agreement=-1)),
        ]

    @pytest.mark.parametrize(
        "raw", [b"", b"[]", b"{", b'{"spec":2,"source":"x"}', b'{"spec":1}', b"[" * 100_000, b"\xff", b" " * (1 << 21)]
    )
    def test_damaged_notes_count_as_none(self, store: BlobStore, catalog: Catalog, tmp_path: Path, raw: bytes) -> None:
        root = model_in(store).root
        (tmp_path / "models" / f"{root.hex()}.notes").write_bytes(raw)
        assert catalog.notes(root) == ModelNotes()
