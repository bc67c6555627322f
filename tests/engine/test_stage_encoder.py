"""Sharded sentence vectors are those of sentence-transformers, or where it is not installed, of the same steps in transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import MalformedError, UsageError
from nexus.core.manifest import ENCODER, Manifest
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage
from nexus.engine.tokenizer import Tokenizer
from nexus.proof.receipts import tokens_to_bytes

from .conftest import Folder

TEXTS = ["hello world", "", "Ünïcödé, 漢字 and 🙂", "The river remembers every stone it ever carried. " * 60]


@pytest.fixture(scope="module")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:
    folder = Folder(tmp_path_factory.mktemp("minilm"))
    return import_model(minilm, folder, lambda *_: None, profile="float"), folder


@pytest.fixture(scope="module")
def reference(minilm: Path) -> Callable[[str], np.ndarray]:
    """Text -> vector, without any of our code."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()

        def encode(text: str) -> np.ndarray:
            with torch.inference_mode():
                hidden = encoder(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()

        return encode
    sentence = SentenceTransformer(str(minilm), device="cpu")
    return lambda text: sentence.encode([text])[0]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_sharded_minilm(count: int, model: tuple[Manifest, Folder], reference: Callable[[str], np.ndarray]) -> None:
    manifest, folder = model
    assert (manifest.kind, manifest.context, manifest.kv_bytes, manifest.tied) == (ENCODER, 256, 0, 0)
    tokenizer = Tokenizer.load(folder.paths, manifest.context)
    edges = [6 * i // count for i in range(count + 1)]
    chain = [load_stage(manifest, start, end, folder.stage_files(manifest, start, end)) for start, end in pairwise(edges)]
    for stage in chain:
        stage.open(b"s", None)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        payload = tokens_to_bytes(ids)
        for stage in chain:
            assert len(payload) == stage.input_size(len(ids))
            payload = stage.step(b"s", payload)
            assert len(payload) == stage.output_size(len(ids))
        vector = np.frombuffer(payload, "<f4")
        assert vector @ reference(text) > 0.99999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert all(stage.kv_bytes(b"s") == 0 for stage in chain)


def test_a_text_beyond_the_context_is_refused(model: tuple[Manifest, Folder]) -> None:
    manifest, folder = model
    stage = load_stage(manifest, 0, 1, folder.stage_files(manifest, 0, 1))
    stage.open(b"s")
    with pytest.raises(UsageError, match="context"):
        stage.step(b"s", tokens_to_bytes([101] * 257))
    with pytest.raises(MalformedError):
        stage.step(b"s", tokens_to_bytes([manifest.vocab_size]))
    with pytest.raises(UsageError, match="logits"):
        stage.logits(b"s")
