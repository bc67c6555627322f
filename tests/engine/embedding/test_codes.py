"""What one byte per dimension costs in neighbours, on real sentences."""

from __future__ import annotations

import numpy as np

from nexus.engine.embedding.exact_encoder import ExactEmbedder
from nexus.memory.quantise import quantise, restore


def test_recall_of_codes(embedder: ExactEmbedder, sentences: list[str]) -> None:
    vectors = embedder.embed(sentences)
    queries, stored = vectors[::10], np.delete(vectors, slice(None, None, 10), axis=0)
    found = np.argsort(-(queries @ restore(*quantise(stored)).T), axis=1)[:, :10]
    right = np.argsort(-(queries @ stored.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, right, strict=True)]) / 10 >= 0.99
