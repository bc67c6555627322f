"""Taking a Hugging Face model directory apart into a manifest and blobs.

Everything that can be wrong with the directory is found before the first weight is read. The same weights give the same pieces, and
so the same root, on every machine: whether they come in one file or in shards, with whatever metadata and in whatever order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL, CHUNK_BYTES, EMBEDDING, FLOAT, HEAD, Blob, Manifest, layer_name
from nexus.engine.architecture import Config, Layout, layout_of, model_class, read_config
from nexus.engine.pooling import MODULES_FILE, pooling_config_name, read_pooling
from nexus.engine.safetensors_check import TensorSpec, check_safetensors, encode_header
from nexus.engine.tokenizer import TOKENIZER_FILE, Tokenizer

CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_INDEX_BYTES_MAX = 64 << 20
_FILE_BYTES_MAX = 256 << 20
_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    MODULES_FILE,
    "sentence_bert_config.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Constant buffers and training heads that older checkpoints carry; transformers computes the former itself.
_IGNORED = re.compile(
    r"(\.(attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.position_ids)$|^(pooler|cls)\.|^bert\.pooler\."
)
# Older names of the same thing, as transformers renames them: (pattern, replacement).
_RENAMED = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"), (r"^embed_out\.", "lm_head."))


class BlobSink(Protocol):
    """Where pieces and files go. `nexus.storage.blobs.BlobStore` is one."""

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob: ...


@dataclass(frozen=True, slots=True)
class _Source:
    """One tensor of the directory."""

    path: Path
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    tensors: Mapping[str, _Source]

    @property
    def header(self) -> bytes:
        return encode_header((name, source.spec.dtype, source.spec.shape) for name, source in self.tensors.items())

    @property
    def size(self) -> int:
        return len(self.header) + sum(source.spec.size for source in self.tensors.values())


def import_model(source: Path, sink: BlobSink, progress: Callable[[str, int, int], None]) -> Manifest:
    """Put the model in directory `source` into `sink`, piece by piece, and return its manifest.

    `progress`: called with the blob at work, bytes done and bytes in all. Never holds more than one chunk of a weight in memory.
    Raises ModelFormatError with cause and fix for anything that is not a whole, sound and supported model.
    """
    root = _directory(source)
    weights = _weight_files(root)
    config = read_config(_inside(root, CONFIG_FILE))
    files = _files(root)
    pooling = read_pooling(files) if config.kind != CAUSAL else None
    if TOKENIZER_FILE not in files:
        raise ModelFormatError(
            f"{source} has no {TOKENIZER_FILE}",
            "Convert its tokenizer: transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)",
        )
    Tokenizer.load(files)
    layout = layout_of(config)
    tensors = _canonical(_tensors(root, weights), layout)
    pieces = _pieces(config, layout, tensors)
    dtype = _common_dtype(pieces)
    _check_tied(layout, tensors)

    total = sum(piece.size for piece in pieces) + sum(path.stat().st_size for path in files.values())
    done = 0

    def counted(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            progress(name, done, total)

    piece_blobs = tuple(sink.put(piece.name, piece.size, counted(piece.name, _piece_chunks(piece))) for piece in pieces)
    file_blobs = []
    for name, path in files.items():
        size = path.stat().st_size
        file_blobs.append(sink.put(name, size, counted(name, _chunks(path, 0, size))))
    return Manifest(
        spec=1,
        kind=config.kind,
        architecture=model_class(config).__name__,
        profile=FLOAT,
        dtype=dtype,
        layers=config.layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=min(config.context, pooling.tokens_max or config.context) if pooling else config.context,
        kv_bytes=config.kv_bytes,
        tied=int(config.tied),
        pieces=piece_blobs,
        files=tuple(file_blobs),
    ).check()


def _directory(source: Path) -> Path:
    if not source.is_dir():
        raise ModelFormatError(f"{source} is not a directory", "Give the directory that holds config.json and the weights")
    if not (source / CONFIG_FILE).exists():
        raise ModelFormatError(f"{source} has no {CONFIG_FILE}", "Give a model directory in Hugging Face form")
    return source.resolve()


def _inside(root: Path, name: str) -> Path:
    """The file `name` of the directory. Raises ModelFormatError where the name or a link leads out of it."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise ModelFormatError(f"the model names a file outside its directory: {name!r}", "Do not use this model")
    path = root / name
    if not path.exists():
        raise ModelFormatError(f"{name} is missing", "Download the model again, with all its files")
    if not path.resolve().is_relative_to(root):
        raise ModelFormatError(f"{name} is a link that leads out of the directory", "Copy the files themselves, e.g. with cp -rL")
    if not path.is_file():
        raise ModelFormatError(f"{name} is not a file", "Download the model again")
    return path


def _weight_files(root: Path) -> dict[str, frozenset[str] | None]:
    """Weight files by name, with the tensors that the index expects in each, None where there is no index."""
    if (root / _INDEX_FILE).exists():
        path = _inside(root, _INDEX_FILE)
        if path.stat().st_size > _INDEX_BYTES_MAX:
            raise ModelFormatError(f"{_INDEX_FILE} is larger than {_INDEX_BYTES_MAX} bytes", "Download the model again")
        try:
            listed = json.loads(path.read_bytes().decode("utf-8"))["weight_map"]
            expected: dict[str, set[str]] = {}
            for tensor, name in listed.items():
                if not isinstance(name, str) or not name.endswith(".safetensors"):
                    raise ModelFormatError(f"{_INDEX_FILE} names weights that are not safetensors: {name!r}", _PICKLE_FIX)
                expected.setdefault(name, set()).add(tensor)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(f"{_INDEX_FILE} is not an index of weights", "Download the model again") from error
        for name in expected:
            _inside(root, name)
        if not expected:
            raise ModelFormatError(f"{_INDEX_FILE} names no weights", "Download the model again")
        return {name: frozenset(tensors) for name, tensors in sorted(expected.items())}
    if (root / _WEIGHTS_FILE).exists():
        _inside(root, _WEIGHTS_FILE)
        return {_WEIGHTS_FILE: None}
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelFormatError(f"the weights are pickle files ({pickles[0]}), which can run code when read", _PICKLE_FIX)
    raise ModelFormatError(f"there is neither {_WEIGHTS_FILE} nor {_INDEX_FILE}", "Download the model's safetensors files")


_PICKLE_FIX = "Use the model's safetensors version, or convert it on a machine that you can afford to lose"


def _files(root: Path) -> dict[str, Path]:
    names = [name for name in _FILES if (root / name).exists() or (root / name).is_symlink()]
    files = {name: _inside(root, name) for name in names}
    if MODULES_FILE in files and (pooling := pooling_config_name(files[MODULES_FILE])):
        files[pooling] = _inside(root, pooling)
    for name, path in files.items():
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ModelFormatError(f"{name} is larger than {_FILE_BYTES_MAX} bytes", "Is this the right file?")
    return files


def _tensors(root: Path, files: Mapping[str, frozenset[str] | None]) -> dict[str, _Source]:
    tensors: dict[str, _Source] = {}
    for name, expected in files.items():
        path = _inside(root, name)
        specs = check_safetensors(path)
        if expected is not None and (absent := sorted(expected - specs.keys())):
            raise ModelFormatError(f"{name} lacks {_some(absent)}, which the index says are in it", "Download the model again")
        if twice := sorted(specs.keys() & tensors.keys()):
            raise ModelFormatError(f"{_some(twice)} are in more than one file", "Download the model again")
        tensors |= {tensor: _Source(path, spec) for tensor, spec in specs.items()}
    return tensors


def _canonical(tensors: Mapping[str, _Source], layout: Layout) -> dict[str, _Source]:
    """The tensors under the names that transformers gives them now, each of the shape that the config asks for."""
    known = layout.shapes.keys() | layout.tied_names
    # A checkpoint of the bare model lacks the first part of the names; one of a model with heads has one more.
    prefix = layout.layers.split(".")[0] + "."
    found: dict[str, _Source] = {}
    superfluous = []
    for name, source in tensors.items():
        renamed = name
        for old, new in _RENAMED:
            if name not in known:
                renamed = re.sub(old, new, renamed)
        candidates = (renamed, prefix + renamed, renamed.partition(".")[2])
        canonical = next((candidate for candidate in candidates if candidate in known), None)
        if canonical is None:
            if not _IGNORED.search(name):
                superfluous.append(name)
        elif canonical in found:
            raise ModelFormatError(f"two tensors mean {canonical}", "Download the model again")
        else:
            found[canonical] = source
    if absent := sorted(layout.shapes.keys() - found.keys()):
        raise ModelFormatError(f"the weights lack {_some(absent)}", "Download the model again, with all its files")
    if superfluous:
        raise ModelFormatError(
            f"the weights have tensors that this type of model does not use: {_some(superfluous)}",
            "Is config.json that of these weights? Adapters must be merged into the model first",
        )
    for name, shape in layout.shapes.items():
        if found[name].spec.shape != shape:
            raise ModelFormatError(
                f"{name} has the shape {found[name].spec.shape}, config.json asks for {shape}",
                "Is config.json that of these weights?",
            )
        if found[name].spec.dtype not in _DTYPES:
            raise ModelFormatError(
                f"{name} is stored as {found[name].spec.dtype}", "Use the model's float16, bfloat16 or float32 version"
            )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pieces(config: Config, layout: Layout, tensors: Mapping[str, _Source]) -> list[_Piece]:
    pieces = [_Piece(EMBEDDING, {name: tensors[name] for name in layout.embedding_tensors()})]
    for index in range(config.layers):
        names = layout.layer_tensors(index)
        pieces.append(_Piece(layer_name(index), {name: tensors[f"{layout.layers}.{index}.{name}"] for name in names}))
    pieces.append(_Piece(HEAD, {name: tensors[name] for name in layout.head_tensors()}))
    return pieces


def _common_dtype(pieces: Iterable[_Piece]) -> str:
    """The dtype that most bytes are stored in."""
    sizes = dict.fromkeys(_DTYPES, 0)
    for piece in pieces:
        for source in piece.tensors.values():
            sizes[source.spec.dtype] += source.spec.size
    return _DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def _check_tied(layout: Layout, tensors: Mapping[str, _Source]) -> None:
    """A tied head that is stored as well must be what it is tied to: it is dropped."""
    for name in layout.tied_names & tensors.keys():
        head = tensors[name]
        same = any(_same_bytes(head, tensors[original]) for original in layout.tied_sources & tensors.keys())
        if not same:
            raise ModelFormatError(
                f"config.json says that {name} is the embedding, but the file holds other weights for it",
                'Set "tie_word_embeddings": false in config.json if the weights are right',
            )


def _same_bytes(one: _Source, other: _Source) -> bool:
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    pairs = zip(_source_chunks(one), _source_chunks(other), strict=True)
    return all(left == right for left, right in pairs)


def _piece_chunks(piece: _Piece) -> Iterator[bytes]:
    yield piece.header
    for name in sorted(piece.tensors):
        yield from _source_chunks(piece.tensors[name])


def _source_chunks(source: _Source) -> Iterator[bytes]:
    return _chunks(source.path, source.spec.start, source.spec.size)


def _chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while size:
            chunk = file.read(min(size, CHUNK_BYTES))
            if not chunk:
                raise ModelFormatError(
                    f"{path.name} became shorter while it was read", "Leave the directory alone while it is added"
                )
            size -= len(chunk)
            yield chunk
