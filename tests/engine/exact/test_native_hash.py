"""BLAKE3 of the compiled kernel against the blake3 package: every variant, any number of inputs of any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.hashing import leaf_hash, merkle_root
from nexus.engine.exact import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernel was not built here")

VARIANTS = native.available()
NOISE = np.random.default_rng(11).integers(0, 256, 3 << 20, np.uint8).tobytes()
# Around the borders of blocks, chunks and the 512 chunks that are hashed together.
EDGES = [edge + d for edge in (0, 64, 128, 1024, 2048, 3072, 16384, 524288, 1048576) for d in (-2, -1, 0, 1, 2) if edge + d >= 0]


def expected(leaves: list[bytes]) -> bytes:
    return b"".join(leaf_hash(leaf) for leaf in leaves)


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_of_every_length(variant: str) -> None:
    leaves = [NOISE[n : 2 * n] for n in range(5001)]
    assert native.hash_leaves(leaves, variant).tobytes() == expected(leaves)
    assert native.hash_leaves([], variant).shape == (0, 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_of_more_chunks_than_fit_at_once(variant: str) -> None:
    leaves = [NOISE[:n] for n in [*EDGES, 3 << 20, 2_000_003]]
    assert native.hash_leaves(leaves, variant).tobytes() == expected(leaves)


@given(st.lists(st.tuples(st.integers(0, 100000), st.one_of(st.integers(0, 5000), st.sampled_from(EDGES))), max_size=70))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_leaves_together(parts: list[tuple[int, int]]) -> None:
    leaves = [NOISE[start : start + size] for start, size in parts]
    right = expected(leaves)
    for variant in VARIANTS:
        assert native.hash_leaves(leaves, variant).tobytes() == right


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_nodes(variant: str) -> None:
    rows = np.random.default_rng(1).normal(size=(37, 5, 31)).astype(np.float32)
    assert native.hash_rows(rows, variant).tobytes() == expected([row.tobytes() for row in rows])
    assert native.hash_rows(rows[::2, 1:, ::3], variant).tobytes() == expected([row.tobytes() for row in rows[::2, 1:, ::3]])
    pairs = np.frombuffer(NOISE[: 64 * 53], np.uint8).reshape(-1, 64)
    assert native.hash_nodes(pairs, variant).tobytes() == b"".join(blake3(b"\1" + pair.tobytes()).digest() for pair in pairs)
    with pytest.raises(ValueError, match="pairs"):
        native.hash_nodes(pairs[:, :63], variant)


def test_roots_are_those_of_the_trees() -> None:
    for count in (*range(1, 20), 64, 100):
        leaves = np.frombuffer(NOISE[: 3 * count * 32], np.uint8).reshape(3, count, 32)
        roots = native.merkle_roots(leaves)
        assert [root.tobytes() for root in roots] == [merkle_root(leaf.tobytes() for leaf in tree) for tree in leaves]


def test_without_a_library_the_hashes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [NOISE[:n] for n in (0, 1, 1023, 5000)]
    pairs = np.frombuffer(NOISE[: 64 * 5], np.uint8).reshape(-1, 64)
    right = native.hash_leaves(leaves).tobytes(), native.hash_rows(pairs).tobytes(), native.hash_nodes(pairs).tobytes()
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(native, "_built", dict)
    assert right == (native.hash_leaves(leaves).tobytes(), native.hash_rows(pairs).tobytes(), native.hash_nodes(pairs).tobytes())
