"""The default embedder: same bits whatever the batch, near to float, and refused where anything is damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import LocalError, ModelFormatError, NotFoundError, UsageError
from nexus.core.manifest import EXACT_VECTORS
from nexus.engine.embedding import exact_encoder
from nexus.engine.embedding.embedder import TEXT_BYTES_MAX
from nexus.engine.embedding.exact_encoder import ExactEmbedder, load_exact_embedder
from nexus.engine.embedding.opening import open_embedder
from nexus.engine.exact import native
from nexus.engine.stage import load_stage
from nexus.engine.tokenizer import Tokenizer
from nexus.proof.receipts import tokens_to_bytes
from tests.engine.conftest import Folder
from tests.engine.embedding.conftest import Stored

TEXTS = ["hello world", "", "Ünïcödé, 漢字 and 🙂", "שלום עולם", "a\0b", "The river remembers every stone it ever carried. " * 60]


def test_it_is_the_models_name_everywhere(embedder: ExactEmbedder, stored: Stored) -> None:
    assert embedder.fingerprint == stored[0].root
    assert (embedder.name, embedder.dimension, embedder.tokens_max, embedder.exact) == ("minilm", 384, 256, True)


def test_the_bits_are_those_of_a_stage(embedder: ExactEmbedder, stored: Stored) -> None:
    """What `nexus embed` gives, and so what any node can check."""
    manifest, files = stored
    stage = load_stage(manifest, 0, manifest.layers, files)
    tokenizer = Tokenizer.load(files, manifest.context)
    stage.open(b"s")
    expected = [np.frombuffer(stage.step(b"s", tokens_to_bytes(tokenizer.encode(text))), "<f4") for text in TEXTS]
    assert np.array_equal(embedder.embed(TEXTS).view(np.uint32), np.stack(expected).view(np.uint32))


def test_every_batch_gives_the_same_bits(embedder: ExactEmbedder, sentences: list[str]) -> None:
    texts = sentences[:90] + TEXTS
    together = embedder.embed(texts)
    assert np.array_equal(together[::-1], embedder.embed(texts[::-1]))
    alone = np.concatenate([embedder.embed([text]) for text in texts[-12:]])
    assert np.array_equal(together[-12:], alone)


def test_vectors_are_unit_and_near_to_float(embedder: ExactEmbedder, sentences: list[str], minilm: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = sentences[:64]
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    with torch.inference_mode():
        given = tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt")
        hidden, mask = encoder(**given).last_hidden_state, given["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    vectors = embedder.embed(texts)
    cosines = (vectors * expected).sum(1)
    assert cosines.mean() >= 0.999
    assert cosines.min() >= 0.998
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert vectors.dtype == np.float32


def test_a_long_text_is_cut_and_says_so(embedder: ExactEmbedder) -> None:
    long = "word " * 1000
    assert embedder.count_tokens(["word " * 10, long, "", "word " * 254]) == [12, 1002, 2, 256]
    assert np.array_equal(embedder.embed([long]), embedder.embed(["word " * 254]))


@pytest.mark.parametrize("variant", [*native.available()[-2:], "torch"])
def test_every_kernel_gives_the_same_bits(variant: str, embedder: ExactEmbedder, stored: Stored) -> None:
    other = load_exact_embedder("minilm", *stored, kernel=variant)
    assert variant in other.kernel
    assert np.array_equal(embedder.embed(TEXTS[:3]), other.embed(TEXTS[:3]))


def test_a_wrong_kernel_is_passed_over(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    right, first = exact_encoder._build, native.available()[0]

    def build(plan: object, pieces: object, tables: object, variant: str) -> tuple[str, exact_encoder.Compute]:
        name, compute = right(plan, pieces, tables, variant)  # type: ignore[arg-type]
        return name, (lambda lengths, ids: compute(lengths, ids) + np.float32(1e-7)) if variant == first else compute

    monkeypatch.setattr(exact_encoder, "_build", build)
    assert first not in load_exact_embedder("minilm", *stored).kernel
    with pytest.raises(LocalError, match="known answers"):
        load_exact_embedder("minilm", *stored, kernel=first)


def test_progress_is_told_and_ends_the_work(embedder: ExactEmbedder, sentences: list[str]) -> None:
    told: list[tuple[int, int]] = []
    embedder.embed(sentences[:200], lambda done, total: told.append((done, total)))
    assert told[0] == (0, 200)
    assert told[-1] == (200, 200)
    assert told == sorted(told)
    assert len(told) > 2

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done:
            raise StopError

    threads = threading.active_count()
    with pytest.raises(StopError):
        embedder.embed(sentences, stop)
    assert threading.active_count() == threads


@pytest.mark.parametrize("text", [7, "\ud800", "x" * (TEXT_BYTES_MAX + 1)])
def test_what_is_no_text_is_refused(text: str, embedder: ExactEmbedder) -> None:
    with pytest.raises(UsageError, match="text 1"):
        embedder.embed(["good", text])


def test_nothing_gives_no_vectors(embedder: ExactEmbedder) -> None:
    assert embedder.embed([]).shape == (0, 384)
    assert embedder.count_tokens([]) == []


def test_several_threads_at_once(embedder: ExactEmbedder, sentences: list[str]) -> None:
    expected = embedder.embed(sentences[:40])
    got: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: got.append(embedder.embed(sentences[:40]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(np.array_equal(one, expected) for one in got)


@pytest.mark.parametrize("name", ["layer.3", "embedding", "tokenizer.json", "1_Pooling/config.json", EXACT_VECTORS])
def test_a_damaged_file_is_refused(name: str, stored: Stored, tmp_path: Path) -> None:
    manifest, files = stored
    damaged = tmp_path / "damaged"
    shutil.copy(files[name], damaged)
    raw = bytearray(damaged.read_bytes())
    raw[-40] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(ModelFormatError):
        load_exact_embedder("minilm", manifest, {**files, name: damaged})


def test_what_is_missing_is_named(stored: Stored, tmp_path: Path) -> None:
    manifest, files = stored
    with pytest.raises(NotFoundError, match=r"layer\.3"):
        load_exact_embedder("minilm", manifest, {name: path for name, path in files.items() if name != "layer.3"})


def test_other_kinds_of_model_are_refused(make_model: object, imported: object, tmp_path: Path) -> None:
    _, manifest, folder = imported("llama")  # type: ignore[operator]
    assert isinstance(folder, Folder)
    with pytest.raises(UsageError, match="language model"):
        load_exact_embedder("llama", manifest, folder.paths)


def test_a_model_that_was_added_is_found_by_name(stored: Stored) -> None:
    assert open_embedder("minilm", lambda name: stored, workers=1).fingerprint == stored[0].root


def test_it_loads_without_torch(stored: Stored, tmp_path: Path) -> None:
    """The reason why it is there at once."""
    manifest, files = stored
    (tmp_path / "manifest").write_bytes(manifest.to_bytes())
    for name, path in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(path)
    program = (
        "import sys; from pathlib import Path; root = Path(sys.argv[1])\n"
        "from nexus.core.manifest import Manifest; from nexus.engine.embedding.opening import open_embedder\n"
        "manifest = Manifest.from_bytes((root / 'manifest').read_bytes())\n"
        "files = {blob.name: root / blob.name for blob in (*manifest.files, *manifest.pieces)}\n"
        "print(open_embedder('minilm', lambda name: (manifest, files)).embed(['a']).shape)\n"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers', 'trio', 'z3') if name in sys.modules])\n"
    )
    if not native.available():
        pytest.skip("without the compiled step torch computes")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(1, 384)", "[]"]
