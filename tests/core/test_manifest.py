"""What a model is: the root binds every byte and every name, and a manifest from outside is checked whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, NotFoundError
from nexus.core.manifest import (
    CHUNK_BYTES,
    EMBEDDING,
    EXACT_PLAN,
    EXACT_TABLES,
    EXACT_VECTORS,
    HEAD,
    Blob,
    Manifest,
    blob_root,
    chunk_count,
    layer_name,
    stage_pieces,
)


def manifest_of(layers: int = 4, tied: int = 0) -> Manifest:
    names = [EMBEDDING, *(layer_name(index) for index in range(layers)), HEAD]
    pieces = tuple(Blob(name, 100 + index, bytes([index]) * 32) for index, name in enumerate(names))
    files = (Blob("config.json", 10, b"c" * 32), Blob("tokenizer/vocab.txt", 20, b"t" * 32))
    return Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", layers, 8, 16, 64, 32, tied, pieces, files, ())


def test_it_comes_back_from_its_bytes() -> None:
    manifest = manifest_of()
    assert Manifest.from_bytes(manifest.to_bytes()).check() == manifest
    assert manifest.weight_bytes == sum(range(100, 106))


def test_the_root_binds_every_field() -> None:
    manifest = manifest_of()
    changed = [
        replace(manifest, kind="encoder"),
        replace(manifest, architecture="other"),
        replace(manifest, profile="exact"),
        replace(manifest, dtype="bfloat16"),
        replace(manifest, hidden_size=9),
        replace(manifest, vocab_size=17),
        replace(manifest, context=65),
        replace(manifest, kv_bytes=33),
        replace(manifest, tied=1),
        replace(manifest, files=manifest.files[:1]),
        replace(manifest, files=manifest.files[::-1]),
        replace(manifest, pieces=manifest.pieces[::-1]),
        # The border between pieces and files moves: same leaves, other model.
        replace(manifest, pieces=(*manifest.pieces, manifest.files[0]), files=manifest.files[1:]),
        *(
            replace(manifest, pieces=(*manifest.pieces[:index], replace(piece, **change), *manifest.pieces[index + 1 :]))
            for index, piece in enumerate(manifest.pieces)
            for change in ({"size": 1}, {"root": b"x" * 32}, {"name": "x"})
        ),
    ]
    roots = [one.root for one in (manifest, *changed)]
    assert len(set(roots)) == len(roots)


def exact_manifest() -> Manifest:
    extra = tuple(Blob(name, 5, bytes(32)) for name in (EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS))
    manifest = manifest_of()
    rows = tuple(bytes([index]) * 32 for index in range(len(manifest.pieces) + 1))
    return replace(manifest, profile="exact", dtype="int8", files=manifest.files + extra, rows=rows)


def test_an_exact_model_has_its_plan_tables_and_known_answers() -> None:
    manifest = exact_manifest().check()
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    for number in range(2, 5):
        with pytest.raises(MalformedError, match="lacks its plan, tables or known answers"):
            replace(manifest, files=manifest.files[:number] + manifest.files[number + 1 :]).check()
    with pytest.raises(MalformedError, match="unknown arithmetic"):
        replace(manifest, dtype="float32").check()
    for rows in ((), manifest.rows[:-1], (*manifest.rows, bytes(32))):
        with pytest.raises(MalformedError, match="root over the rows"):
            replace(manifest, rows=rows).check()
    with pytest.raises(MalformedError, match="root over the rows"):
        replace(manifest_of(), rows=manifest.rows).check()


def test_the_root_binds_every_row_root() -> None:
    manifest = exact_manifest()
    changed = [
        replace(manifest, rows=(*manifest.rows[:index], b"x" * 32, *manifest.rows[index + 1 :]))
        for index in range(len(manifest.rows))
    ]
    changed += [replace(manifest, rows=manifest.rows[:-1]), replace(manifest, rows=manifest.rows[::-1])]
    roots = [one.root for one in (manifest, *changed)]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize("name", ["/etc/passwd", "../config", "a/../b", "a//b", "a/./b", "", "a\\b", "a\0b", ".", "a/"])
def test_file_names_that_lead_out_of_the_directory_are_refused(name: str) -> None:
    manifest = manifest_of()
    with pytest.raises(MalformedError):
        replace(manifest, files=(manifest.files[0], Blob(name, 1, bytes(32)))).check()


@pytest.mark.parametrize(
    "change",
    [
        {"spec": 0},
        {"kind": "diffusion"},
        {"profile": ""},
        {"profile": "exact"},
        {"dtype": "int8"},
        {"dtype": "F31"},
        {"layers": 3},
        {"layers": 0},
        {"hidden_size": 0},
        {"context": 0},
        {"files": ()},
        {"files": (Blob("config.json", 1, bytes(32)),) * 2},
        {"pieces": ()},
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        replace(manifest_of(), **change).check()  # type: ignore[arg-type]


def test_a_stage_needs_its_own_pieces_and_no_others() -> None:
    manifest = manifest_of(4)
    assert [piece.name for piece in stage_pieces(manifest, 0, 2)] == [EMBEDDING, "layer.0", "layer.1"]
    assert [piece.name for piece in stage_pieces(manifest, 1, 3)] == ["layer.1", "layer.2"]
    assert [piece.name for piece in stage_pieces(manifest, 3, 4)] == ["layer.3", HEAD]
    assert [piece.name for piece in stage_pieces(manifest_of(4, tied=1), 3, 4)] == [EMBEDDING, "layer.3", HEAD]
    assert [piece.name for piece in stage_pieces(manifest_of(4, tied=1), 0, 4)].count(EMBEDDING) == 1
    for start, end in ((0, 0), (2, 1), (-1, 2), (0, 5)):
        with pytest.raises(MalformedError):
            stage_pieces(manifest, start, end)


@given(layers=st.integers(1, 12), cuts=st.sets(st.integers(1, 11)))
def test_any_split_needs_every_piece(layers: int, cuts: set[int]) -> None:
    manifest = manifest_of(layers)
    borders = [0, *sorted(cut for cut in cuts if cut < layers), layers]
    named = [piece for start, end in pairwise(borders) for piece in stage_pieces(manifest, start, end)]
    assert named == list(manifest.pieces)


def test_pieces_and_files_are_found_by_name() -> None:
    manifest = manifest_of()
    assert manifest.piece("layer.2").size == 103
    with pytest.raises(NotFoundError):
        manifest.piece("layer.9")
    assert manifest.file("config.json") == manifest.files[0]
    assert manifest.file("nothing") is None


def test_a_blob_root_binds_the_size() -> None:
    hashes = [bytes(32)]
    assert blob_root(5, hashes) != blob_root(6, hashes)
    assert [chunk_count(size) for size in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1)] == [1, 1, 1, 2]
