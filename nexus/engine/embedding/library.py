"""Any encoder that the sentence-transformers library runs, in float32 on the processor, from files that are on this machine.

The library is imported when the first such model is opened (some seconds). Before it sees a directory this module makes sure that
nothing in it can run code: safetensors alone, the library's own modules alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from blake3 import blake3

from nexus.core.encoding import encode
from nexus.core.errors import LocalError, ModelFormatError, NexusError, NotFoundError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.engine.architecture import read_json
from nexus.engine.embedding.embedder import TokenEmbedder, Vectors, check_texts
from nexus.engine.pooling import MODULES_FILE, read_modules
from nexus.engine.safetensors_check import check_safetensors
from nexus.memory.block import DIMENSION_MAX

BACKEND = "sentence-transformers/torch/float32"
# Modules of the library that hold nothing but tensors and numbers.
MODULES = frozenset({"Transformer", "Pooling", "Normalize", "Dense"})
_PACKAGE = "sentence_transformers."
_PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
# What decides a vector. A card, a licence or another backend's copy of the weights does not.
_DECIDES = frozenset({".safetensors", ".json", ".txt", ".model"})
_DECIDES_NOT = frozenset(
    {"config_sentence_transformers.json", "data_config.json", "train_script.json", "README.txt", "requirements.txt"}
)
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_FILES_MAX = 256
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
# Two that mean the same and one that does not: a model for which they are not so is no sentence encoder.
PROBES = ("A cat is sleeping on the sofa.", "The cat sleeps on a couch.", "Interest rates rose by a quarter point in March.")


class LibraryEmbedder(TokenEmbedder):
    """Made by `load_library_embedder`."""

    def __init__(self, name: str, fingerprint: bytes, dimension: int, tokens_max: int, model: Any) -> None:
        super().__init__(name, fingerprint, dimension, tokens_max)
        self._model = model
        # The library changes its tokenizer's settings while it works.
        self._lock = threading.Lock()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        check_texts(texts)
        with self._lock:
            return (
                [len(ids) for ids in self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
                if texts
                else []
            )

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        with self._lock:
            found: list[list[int]] = self._model.tokenizer(list(texts), truncation=True, max_length=self.tokens_max)["input_ids"]
        return found

    def _vectors(self, batch: Sequence[Sequence[int]]) -> Vectors:
        import torch

        with self._lock, torch.inference_mode():
            padded = self._model.tokenizer.pad({"input_ids": [list(ids) for ids in batch]}, return_tensors="pt")
            vectors = self._model(dict(padded))["sentence_embedding"].to(torch.float32).numpy()
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise LocalError(f"the model {self.name!r} gave a vector that is not a number, or zero", "Use another model")
        scaled: Vectors = (vectors / lengths).astype(np.float32)
        return scaled


def load_library_embedder(name: str, directory: Path) -> LibraryEmbedder:
    """The model in a directory as sentence-transformers saves it. Takes some seconds and 500 MB, most of it torch.

    Raises NotFoundError (no such directory), ModelFormatError (pickled weights, code, unknown modules, a model that is no sentence
    encoder), LocalError (the library is not installed).
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory} is not a directory", "Give a directory with config.json and model.safetensors")
    files = check_directory(directory)
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise LocalError("sentence-transformers is not installed", "Install it: pip install 'nexus-swarm[embed]'") from error
    try:
        model = SentenceTransformer(
            str(directory),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        ).eval()
        tokens_max = int(model.max_seq_length or 0)
        dimension = int(model.get_embedding_dimension() or 0)
    # The library raises errors of many classes for files that somebody else wrote; all of them mean the same here.
    except Exception as error:
        raise ModelFormatError(
            f"sentence-transformers cannot load {directory.name}: {error}", "Download the model again"
        ) from error
    if not (1 <= dimension <= DIMENSION_MAX and 1 <= tokens_max <= 1 << 20):
        raise ModelFormatError(
            f"the model gives {dimension} dimensions of {tokens_max} tokens", f"Up to {DIMENSION_MAX} are supported"
        )
    embedder = LibraryEmbedder(name, fingerprint_of(directory, files, tokens_max), dimension, tokens_max, model)
    check_probes(embedder)
    return embedder


def check_directory(directory: Path) -> list[Path]:
    """The files that decide the model's vectors, relative and sorted. Raises ModelFormatError for what could run code."""
    found = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    if len(found) > _FILES_MAX:
        raise ModelFormatError(
            f"{directory.name} has {len(found)} files; a model has at most {_FILES_MAX}", "Give the model's directory"
        )
    for path in found:
        if path.suffix.lower() == ".json" and path.name.endswith("config.json") and path.name not in _DECIDES_NOT:
            settings = read_json(directory / path)
            if key := next((key for key in _CODE_KEYS if settings.get(key)), None):
                raise ModelFormatError(
                    f"{path} asks to run code that comes with the model ({key})",
                    "Nexus never runs a model's own code; use a model that transformers supports by itself",
                )
    folders = [PurePosixPath(".")]
    if (directory / MODULES_FILE).is_file():
        folders = _module_folders(directory)
    for folder in folders:
        _check_weights(directory, folder)
    if not any(path.suffix == ".safetensors" and path.parent.as_posix() in {f.as_posix() for f in folders} for path in found):
        raise ModelFormatError(f"{directory.name} has no weights in safetensors", _PICKLE_FIX)
    inside = {folder.as_posix() for folder in folders} | {"."}
    return [
        path for path in found if path.suffix in _DECIDES and path.name not in _DECIDES_NOT and path.parent.as_posix() in inside
    ]


_PICKLE_FIX = "Nexus reads safetensors alone: save the model again with sentence-transformers, or use a version that has them"


def _module_folders(directory: Path) -> list[PurePosixPath]:
    folders = []
    for kind, folder in read_modules(directory / MODULES_FILE):
        path = PurePosixPath(folder or ".")
        if not kind.startswith(_PACKAGE) or kind.rpartition(".")[2] not in MODULES:
            raise ModelFormatError(f"{MODULES_FILE} names the module {kind!r}", f"Supported: {', '.join(sorted(MODULES))}")
        if path.is_absolute() or ".." in path.parts or "\\" in folder or "\0" in folder:
            raise ModelFormatError(f"{MODULES_FILE} names {folder!r}, outside the model", "Download the model again")
        folders.append(path)
    return folders


def _check_weights(directory: Path, folder: PurePosixPath) -> None:
    """A folder with weights must have them in safetensors: where both are, the library takes these."""
    files = [path for path in (directory / folder).glob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        if path.suffix == ".py":
            raise ModelFormatError(f"{path.name} is code that comes with the model", "Nexus never runs a model's own code")
    pickled = [path for path in files if path.suffix.lower() in _PICKLED and path.name != "training_args.bin"]
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        raise ModelFormatError(f"the weights in {pickled[0].name} are pickled, which can run code when it is read", _PICKLE_FIX)


def fingerprint_of(directory: Path, files: Sequence[Path], tokens_max: int) -> bytes:
    """A hash over everything that decides a vector: weights, tokenizer, modules, the length it cuts at, and what computes it."""
    digests = []
    for path in files:
        hasher = blake3()
        hasher.update_mmap(directory / path)
        digests.append(encode((path.as_posix(), hasher.digest())))
    return tagged_hash("embedding-model", encode((BACKEND, tokens_max)), *digests)


def check_probes(embedder: LibraryEmbedder) -> None:
    """Raises ModelFormatError where the model is plainly no sentence encoder: of another dimension than it says, not finite, or one
    for which everything means the same."""
    try:
        vectors = embedder.embed(PROBES)
    except (NexusError, ValueError, RuntimeError, IndexError) as error:
        raise ModelFormatError(f"{embedder.name!r} cannot embed a sentence: {error}", "Use another model") from error
    same, other = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    if not same > other:
        raise ModelFormatError(
            f"{embedder.name!r} is no sentence encoder: two that mean the same have the cosine {same:.3f}, others {other:.3f}",
            "Use a model that was trained for sentences",
        )


def cached_directory(hub_id: str, *, download: bool = False) -> Path:
    """Where the files of a model of the Hugging Face hub are on this machine. `download`: whether they may be fetched.

    Raises UsageError for what is no id, NotFoundError where it is not here, LocalError where it could not be fetched.
    """
    if not _HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise UsageError(f"{hub_id!r} is not the id of a model", "An id is OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=not download, allow_patterns=list(_HUB_FILES)))
    except LocalEntryNotFoundError as error:
        if not download:
            raise NotFoundError(
                f"the model {hub_id} is not on this machine, and Nexus downloads nothing unasked",
                f"On a machine with a connection: hf download {hub_id}. Or copy its directory here and give the path",
            ) from error
        raise LocalError(f"the model {hub_id} could not be downloaded: {error}", "Check the connection and the id") from error
    # Networks fail in many classes of the library's and of httpx's.
    except Exception as error:
        raise LocalError(f"the model {hub_id} could not be downloaded: {error}", "Check the connection and the id") from error
