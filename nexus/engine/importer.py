"""Taking a Hugging Face model directory apart into a manifest and blobs.

Everything that can be wrong with the directory is found before the first weight is read. The same weights give the same pieces, and
so the same root, on every machine: whether they come in one file or in shards, with whatever metadata and in whatever order. In the
exact profile the weights become int8 on the way (`nexus.engine.exact.convert`); what is in a sink already is not made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.encoding import encode
from nexus.core.errors import ModelFormatError, UsageError
from nexus.core.hashing import leaf_hash, tagged_hash
from nexus.core.manifest import (
    AUTO,
    CAUSAL,
    EMBEDDING,
    EXACT,
    EXACT_PLAN,
    EXACT_TABLES,
    EXACT_VECTORS,
    FLOAT,
    HEAD,
    PROFILES_ASKED,
    STORED,
    Blob,
    Manifest,
    layer_name,
)
from nexus.engine.architecture import Config, Layout, layout_of, model_class, read_config
from nexus.engine.exact.convert import CONVERTER, PieceSources, piece_chunks, piece_sources
from nexus.engine.exact.plan import plan_of
from nexus.engine.pooling import MODULES_FILE, Pooling, pooling_config_name, read_pooling
from nexus.engine.safetensors_check import check_safetensors, encode_header, encode_safetensors
from nexus.engine.source import TensorSource, file_chunks
from nexus.engine.tokenizer import TOKENIZER_FILE, Tokenizer
from nexus.proof.arithmetic.bounds import check_bounds
from nexus.proof.arithmetic.plan import ExactPlan, plan_to_json

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

    def path(self, root: bytes) -> Path: ...


class Journal(Protocol):
    """Which pieces an import has put already, for the next one if this one is interrupted. `nexus.storage.journal` has one."""

    def begin(self, key: bytes) -> None:
        """What follows is about the import `key`: of the same bytes into the same form."""

    def recall(self, name: str) -> Blob | None:
        """The piece `name`, if it is whole in the sink."""

    def note(self, blob: Blob) -> None: ...


class NoJournal:
    """Every import starts at the beginning."""

    def begin(self, key: bytes) -> None:
        pass

    def recall(self, name: str) -> Blob | None:
        return None

    def note(self, blob: Blob) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece to be stored. `source_bytes`: of the tensors that it is made of. `chunks`: its bytes, given whom to tell of what was
    read of those."""

    name: str
    size: int
    source_bytes: int
    chunks: Callable[[Callable[[int], None]], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A directory that was found to be sound. `tensors`: every weight, by the name that transformers gives it."""

    root: Path
    config: Config
    layout: Layout
    files: Mapping[str, Path]
    pooling: Pooling
    tokenizer: Tokenizer
    tensors: Mapping[str, TensorSource]

    def identity(self, profile: str) -> bytes:
        """The same for the same files, as far as can be told without reading them, and the same form."""
        paths = sorted({source.path for source in self.tensors.values()} | set(self.files.values()))
        stats = [(str(path), path.stat().st_size, str(path.stat().st_mtime_ns)) for path in paths]
        config = leaf_hash(self.files[CONFIG_FILE].read_bytes())
        return tagged_hash("import", encode((str(self.root), profile, CONVERTER, config, tuple(stats))))


def import_model(
    source: Path,
    sink: BlobSink,
    progress: Callable[[str, int, int], None],
    *,
    profile: str = AUTO,
    journal: Journal | None = None,
    notice: Callable[[str], None] | None = None,
) -> Manifest:
    """Put the model in directory `source` into `sink`, piece by piece, and return its manifest.

    `progress`: called with the blob at work, bytes read and bytes in all. `profile`: "exact", "float", or "auto": exact where the
    model can be, else float, and `notice` is told why. `journal`: pieces that it recalls are not made again. Never holds more than
    the int8 form of one tensor in memory, and one layer for the known answers. Raises ModelFormatError with cause and fix for
    anything that is not a whole, sound and supported model.
    """
    if profile not in PROFILES_ASKED:
        raise UsageError(f"there is no profile {profile!r}", f"Use one of {', '.join(PROFILES_ASKED)}")
    model = read_source(source)
    exact: tuple[ExactPlan, list[PieceSources]] | None = None
    if profile != FLOAT:
        try:
            plan = plan_of(model.config, model.pooling)
            check_bounds(plan)
            exact = plan, piece_sources(model.config, plan, model.layout)
        except ModelFormatError as error:
            if profile == EXACT:
                raise
            if notice:
                notice(f"added in the float profile, whose answers cannot be checked by others: {error.cause}")
    chosen = FLOAT if exact is None else EXACT
    journal = journal or NoJournal()
    identity = model.identity(chosen)
    journal.begin(identity)
    pieces = _float_pieces(model) if exact is None else _exact_pieces(model, *exact)
    stored = _Stored(sink, journal, progress, sum(piece.source_bytes for piece in pieces) + _size(model.files.values()))
    piece_blobs = tuple(stored.piece(piece) for piece in pieces)
    file_blobs = [stored.file(name, path) for name, path in model.files.items()]
    kv_bytes = model.config.kv_bytes
    rows: tuple[bytes, ...] = ()
    if exact is not None:
        kv_bytes, made, rows = _finish_exact(model, exact[0], sink, piece_blobs, progress)
        file_blobs += made
    if model.identity(chosen) != identity:
        raise ModelFormatError(
            f"{source} changed while it was read", "Leave the directory alone while it is added, and add it again"
        )
    config, pooling = model.config, model.pooling
    return Manifest(
        spec=1,
        kind=config.kind,
        architecture=model_class(config).__name__,
        profile=chosen,
        dtype=_common_dtype(model.tensors.values()) if exact is None else STORED[EXACT][0],
        layers=config.layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=min(config.context, pooling.tokens_max or config.context),
        kv_bytes=kv_bytes,
        tied=int(config.tied),
        pieces=piece_blobs,
        files=tuple(file_blobs),
        rows=rows,
    ).check()


def read_source(source: Path) -> SourceModel:
    """The model in a directory in Hugging Face form, no weight read yet. Raises ModelFormatError."""
    root = _directory(source)
    weights = _weight_files(root)
    config = read_config(_inside(root, CONFIG_FILE))
    files = _files(root)
    pooling = read_pooling(files) if config.kind != CAUSAL else Pooling()
    if TOKENIZER_FILE not in files:
        raise ModelFormatError(
            f"{source} has no {TOKENIZER_FILE}",
            "Convert its tokenizer: transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)",
        )
    tokenizer = Tokenizer.load(files)
    layout = layout_of(config)
    tensors = _canonical(_tensors(root, weights), layout)
    _check_tied(layout, tensors)
    return SourceModel(root, config, layout, files, pooling, tokenizer, {name: tensors[name] for name in layout.shapes})


class _Stored:
    """Puts pieces and files into the sink, and says how far it is."""

    def __init__(self, sink: BlobSink, journal: Journal, progress: Callable[[str, int, int], None], total: int) -> None:
        self._sink, self._journal, self._progress, self._total = sink, journal, progress, total
        self._done = 0

    def piece(self, piece: _Piece) -> Blob:
        begun = self._done
        blob = self._journal.recall(piece.name)
        if blob is None:
            blob = self._sink.put(piece.name, piece.size, piece.chunks(lambda count: self._advance(piece.name, count)))
            self._journal.note(blob)
        # Of some tensors not all is needed.
        self._advance(piece.name, begun + piece.source_bytes - self._done)
        return blob

    def file(self, name: str, path: Path) -> Blob:
        size = path.stat().st_size
        return self._sink.put(name, size, _counted(file_chunks(path, 0, size), lambda count: self._advance(name, count)))

    def _advance(self, name: str, count: int) -> None:
        if count:
            self._done += count
            self._progress(name, self._done, self._total)


def _counted(chunks: Iterable[bytes], read: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        read(len(chunk))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _exact_pieces(model: SourceModel, plan: ExactPlan, pieces: Iterable[PieceSources]) -> list[_Piece]:
    def made(piece: PieceSources) -> _Piece:
        names = {name for names in piece.sources.values() for name in names}
        return _Piece(
            piece.name,
            piece.size,
            sum(model.tensors[name].spec.size for name in names),
            lambda read: piece_chunks(piece, plan, model.tensors, read),
        )

    return [made(piece) for piece in pieces]


def _finish_exact(
    model: SourceModel, plan: ExactPlan, sink: BlobSink, pieces: Iterable[Blob], progress: Callable[[str, int, int], None]
) -> tuple[int, list[Blob], tuple[bytes, ...]]:
    """What an exact model has beside its pieces, computed from them: bytes of KV cache per token and layer, the files, and the
    roots over its rows."""
    from nexus.engine.exact.calibrate import CALIBRATION_TEXT, calibrate
    from nexus.engine.exact.row_roots import model_rows
    from nexus.proof.arithmetic.tables import tables_of

    blobs = {piece.name: piece for piece in pieces}

    def piece_path(name: str) -> Path:
        return sink.path(blobs[name].root)

    sizes = [blobs[layer_name(index)].size for index in range(len(plan.layers))]
    tables = tables_of(plan)
    found = calibrate(
        plan,
        piece_path,
        tables,
        model.tokenizer.encode(CALIBRATION_TEXT),
        model.pooling,
        lambda done: progress("known answers", sum(sizes[:done]), sum(sizes)),
    )
    answers = found.answers
    vectors: dict[str, NDArray[np.generic]] = {
        "tokens": answers.tokens,
        "states": answers.states,
        "logits" if plan.causal else "vector": answers.answer,
    }
    contents = {
        EXACT_PLAN: plan_to_json(found.plan),
        EXACT_TABLES: encode_safetensors(tables),
        EXACT_VECTORS: encode_safetensors(vectors),
    }
    files = [sink.put(name, len(content), [content]) for name, content in contents.items()]
    return found.plan.kv_bytes, files, model_rows(plan, piece_path, tables)


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


def _tensors(root: Path, files: Mapping[str, frozenset[str] | None]) -> dict[str, TensorSource]:
    tensors: dict[str, TensorSource] = {}
    for name, expected in files.items():
        path = _inside(root, name)
        specs = check_safetensors(path)
        if expected is not None and (absent := sorted(expected - specs.keys())):
            raise ModelFormatError(f"{name} lacks {_some(absent)}, which the index says are in it", "Download the model again")
        if twice := sorted(specs.keys() & tensors.keys()):
            raise ModelFormatError(f"{_some(twice)} are in more than one file", "Download the model again")
        tensors |= {tensor: TensorSource(tensor, path, spec) for tensor, spec in specs.items()}
    return tensors


def _canonical(tensors: Mapping[str, TensorSource], layout: Layout) -> dict[str, TensorSource]:
    """The tensors under the names that transformers gives them now, each of the shape that the config asks for."""
    known = layout.shapes.keys() | layout.tied_names
    # A checkpoint of the bare model lacks the first part of the names; one of a model with heads has one more.
    prefix = layout.layers.split(".")[0] + "."
    found: dict[str, TensorSource] = {}
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


def _float_pieces(model: SourceModel) -> list[_Piece]:
    """The tensors as they are, under their names inside the piece."""
    layout = model.layout
    pieces = [_float_piece(EMBEDDING, {name: model.tensors[name] for name in layout.embedding_tensors()})]
    for index in range(model.config.layers):
        names = layout.layer_tensors(index)
        tensors = {name: model.tensors[f"{layout.layers}.{index}.{name}"] for name in names}
        pieces.append(_float_piece(layer_name(index), tensors))
    pieces.append(_float_piece(HEAD, {name: model.tensors[name] for name in layout.head_tensors()}))
    return pieces


def _float_piece(name: str, tensors: Mapping[str, TensorSource]) -> _Piece:
    header = encode_header((tensor, source.spec.dtype, source.spec.shape) for tensor, source in tensors.items())
    size = sum(source.spec.size for source in tensors.values())

    def chunks(read: Callable[[int], None]) -> Iterator[bytes]:
        yield header
        for tensor in sorted(tensors):
            yield from _counted(tensors[tensor].chunks(), read)

    return _Piece(name, len(header) + size, size, chunks)


def _common_dtype(tensors: Iterable[TensorSource]) -> str:
    """The dtype that most bytes are stored in."""
    sizes = dict.fromkeys(_DTYPES, 0)
    for source in tensors:
        sizes[source.spec.dtype] += source.spec.size
    return _DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def _check_tied(layout: Layout, tensors: Mapping[str, TensorSource]) -> None:
    """A tied head that is stored as well must be what it is tied to: it is dropped."""
    for name in layout.tied_names & tensors.keys():
        head = tensors[name]
        same = any(_same_bytes(head, tensors[original]) for original in layout.tied_sources & tensors.keys())
        if not same:
            raise ModelFormatError(
                f"config.json says that {name} is the embedding, but the file holds other weights for it",
                'Set "tie_word_embeddings": false in config.json if the weights are right',
            )


def _same_bytes(one: TensorSource, other: TensorSource) -> bool:
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    return all(left == right for left, right in zip(one.chunks(), other.chunks(), strict=True))
