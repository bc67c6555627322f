"""What one byte per dimension costs in neighbours, on real sentences."""

from __future__ import annotations

import numpy as np
import pytest

from nexus.core.errors import UsageError
from nexus.engine.embedding.embedder import made_by
from nexus.engine.embedding.exact_encoder import ExactEmbedder
from nexus.memory.quantise import quantise, restore


def test_recall_of_codes(vectors: np.ndarray) -> None:
    queries, stored = vectors[::10], np.delete(vectors, slice(None, None, 10), axis=0)
    found = np.argsort(-(queries @ restore(*quantise(stored)).T), axis=1)[:, :10]
    right = np.argsort(-(queries @ stored.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, right, strict=True)]) / 10 >= 0.99


def test_whose_vector_it_is(embedder: ExactEmbedder, sentences: list[str], vectors: np.ndarray) -> None:
    codes, scales = quantise(vectors[:5])
    assert made_by(embedder, sentences[:5], codes, scales) == [True] * 5
    codes, scales = codes.copy(), scales.copy()
    codes[1, np.argmin(np.abs(codes[1]))] += 1  # one step in one dimension: a cosine of 0.9999
    scales[3] += 1
    texts = [*sentences[:4], sentences[4] + "!"]
    assert made_by(embedder, texts, codes, scales) == [True, False, True, False, False]


def test_a_model_that_is_not_exact_is_allowed_some_room(
    embedder: ExactEmbedder, sentences: list[str], vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExactEmbedder, "exact", False)
    codes, scales = quantise(vectors[:3])
    codes = codes.copy()
    codes[1, np.argmin(np.abs(codes[1]))] += 1
    assert made_by(embedder, [*sentences[:2], sentences[3]], codes, scales) == [True, True, False]


def test_vectors_of_another_shape_are_refused(embedder: ExactEmbedder, sentences: list[str], vectors: np.ndarray) -> None:
    codes, scales = quantise(vectors[:2])
    for bad in ((codes[:, :-1], scales), (codes[:1], scales), (codes, scales[:1])):
        with pytest.raises(UsageError):
            made_by(embedder, sentences[:2], *bad)
