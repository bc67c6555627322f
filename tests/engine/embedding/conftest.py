"""MiniLM in the exact profile, taken in once for all tests here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nexus.core.manifest import Manifest
from nexus.engine.embedding.exact_encoder import ExactEmbedder, load_exact_embedder
from nexus.engine.importer import import_model
from nexus.models import held_out_text
from tests.engine.conftest import Folder

Stored = tuple[Manifest, Mapping[str, Path]]


@pytest.fixture(scope="session")
def stored(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = Folder(tmp_path_factory.mktemp("exact-minilm"))
    return import_model(minilm, folder, lambda *_: None, profile="exact"), folder.paths


@pytest.fixture(scope="session")
def embedder(stored: Stored) -> ExactEmbedder:
    return load_exact_embedder("minilm", *stored, workers=2)


@pytest.fixture(scope="session")
def vectors(embedder: ExactEmbedder, sentences: list[str]) -> np.ndarray:
    """Of all sentences. Not to be changed."""
    return embedder.embed(sentences)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return held_out_text("encoder")[1].splitlines()
