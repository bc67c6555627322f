"""Encoders through sentence-transformers: the same vectors as the library's own, and nothing in a directory that runs code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import LocalError, ModelFormatError, NexusError, NotFoundError, UsageError
from nexus.engine.embedding import library
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.exact_encoder import ExactEmbedder
from nexus.engine.embedding.library import LibraryEmbedder, cached_directory, check_directory, load_library_embedder
from nexus.engine.embedding.opening import open_embedder
from nexus.engine.pooling import MODULES_FILE
from tests.engine.embedding.conftest import Stored

TEXTS = ["hello world", "Ünïcödé, 漢字 and 🙂", "", "The river remembers every stone it ever carried. " * 60]


def nothing_stored(name: str) -> Stored:
    raise NotFoundError(f"no model {name!r}", "")


@pytest.fixture(scope="module")
def loaded(minilm: Path) -> LibraryEmbedder:
    pytest.importorskip("sentence_transformers")
    return load_library_embedder("minilm-float", minilm)


@pytest.fixture
def copied(minilm: Path, tmp_path: Path) -> Path:
    """The model's directory, to be spoiled: small files copied, the weights linked."""
    directory = tmp_path / "model"
    shutil.copytree(minilm, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    (directory / "model.safetensors").symlink_to(minilm / "model.safetensors")
    return directory


def test_its_vectors_are_the_librarys(loaded: LibraryEmbedder) -> None:
    vectors = loaded.embed(TEXTS)
    expected = loaded._model.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    assert (vectors * expected).sum(1).min() > 0.99999
    assert (loaded.dimension, loaded.tokens_max, loaded.exact) == (384, 256, False)


def test_it_agrees_with_the_exact_profile(loaded: LibraryEmbedder, embedder: ExactEmbedder, sentences: list[str]) -> None:
    texts = sentences[:48]
    assert (loaded.embed(texts) * embedder.embed(texts)).sum(1).mean() >= 0.999
    assert loaded.fingerprint != embedder.fingerprint
    assert loaded.count_tokens(TEXTS) == embedder.count_tokens(TEXTS)


def test_a_text_has_one_vector_whatever_the_batch(loaded: LibraryEmbedder) -> None:
    together, alone = loaded.embed(TEXTS), np.concatenate([loaded.embed([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5


def test_the_fingerprint_is_over_what_decides(loaded: LibraryEmbedder, copied: Path) -> None:
    def fingerprint() -> bytes:
        return library.fingerprint_of(copied, check_directory(copied), 256)

    assert fingerprint() == loaded.fingerprint
    (copied / "README.md").write_text("another card")
    (copied / "data_config.json").write_text("{}")
    assert fingerprint() == loaded.fingerprint
    assert library.fingerprint_of(copied, check_directory(copied), 128) != loaded.fingerprint
    (copied / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert fingerprint() != loaded.fingerprint


def test_a_directory_is_opened_by_its_path(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, Path]] = []
    monkeypatch.setattr(library, "load_library_embedder", lambda name, path: opened.append((name, path)))
    open_embedder(str(minilm), nothing_stored)
    assert opened == [("model", minilm.resolve())]


def add_modules(kind: str, folder: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        modules = json.loads((directory / MODULES_FILE).read_text())
        modules.append({"idx": 9, "name": "9", "path": folder, "type": kind})
        (directory / MODULES_FILE).write_text(json.dumps(modules))

    return spoil


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def pickled_part(directory: Path) -> None:
    add_modules("sentence_transformers.models.Dense", "2_Dense")(directory)
    (directory / "2_Dense").mkdir()
    (directory / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def remote_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))


def cut_short(directory: Path) -> None:
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(raw[:-4])


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (pickled, "pickled"),
        (pickled_part, "pickled"),
        (remote_code, "asks to run code"),
        (cut_short, "safetensors"),
        (lambda directory: (directory / "modeling.py").write_text("raise SystemExit"), "code that comes with"),
        (add_modules("subprocess.Popen", "."), "names the module"),
        (add_modules("sentence_transformers.models.CLIPModel", "."), "names the module"),
        (add_modules("sentence_transformers.models.Dense", "../elsewhere"), "outside the model"),
        (lambda directory: (directory / MODULES_FILE).write_text("[1]"), "not a list of modules"),
        (lambda directory: (directory / "config.json").write_text("[" * 100_000), "not JSON"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no weights"),
    ],
)
def test_what_could_run_code_is_refused_before_the_library_sees_it(
    spoil: Callable[[Path], object], cause: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda *_, **__: pytest.fail("the library saw it"))
    spoil(copied)
    with pytest.raises(ModelFormatError, match=cause):
        load_library_embedder("spoilt", copied)


def test_what_the_library_cannot_load_is_a_bad_model(copied: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (copied / "tokenizer.json").write_text("{}")
    (copied / "vocab.txt").unlink()
    with pytest.raises(ModelFormatError, match="cannot load"):
        load_library_embedder("spoilt", copied)


def test_a_model_for_which_all_is_one_is_no_encoder(loaded: LibraryEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = np.ones((3, 384), np.float32) / np.sqrt(np.float32(384))
    monkeypatch.setattr(LibraryEmbedder, "_vectors", lambda self, batch: constant[: len(batch)])
    with pytest.raises(ModelFormatError, match="no sentence encoder"):
        library.check_probes(loaded)


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/here", "a/b/c", "~/nothing"])
def test_a_name_that_is_nothing_says_what_to_do(name: str) -> None:
    with pytest.raises(NotFoundError) as raised:
        open_embedder(name, nothing_stored)
    assert "nexus model list" in raised.value.fix


def test_a_hub_id_that_is_not_here_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError) as raised:
        open_embedder("nobody/no-such-model", nothing_stored)
    assert "hf download nobody/no-such-model" in raised.value.fix


@pytest.mark.parametrize("download", [False, True])
def test_nothing_is_downloaded_unasked(download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def snapshot(hub_id: str, **settings: object) -> str:
        asked.append(settings)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert cached_directory("owner/name", download=download) == tmp_path
    assert asked[0]["local_files_only"] is not download
    assert "*.safetensors" in asked[0]["allow_patterns"]  # type: ignore[operator]
    assert not any("bin" in pattern for pattern in asked[0]["allow_patterns"])  # type: ignore[attr-defined]


def test_a_failed_download_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hub_id: str, **settings: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(LocalError, match="no route"):
        cached_directory("owner/name", download=True)


@pytest.mark.parametrize("name", ["../etc", "a/..", "owner/", "o wner/name", "owner/na\0me"])
def test_what_is_no_id_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UsageError):
        cached_directory(name, download=True)


def test_all_are_embedders(loaded: LibraryEmbedder, embedder: ExactEmbedder) -> None:
    both: list[Embedder] = [loaded, embedder]
    assert len({one.fingerprint for one in both}) == 2
    assert issubclass(ModelFormatError, NexusError)
