"""What a model is: its pieces (one per layer, plus embedding and head), its files, and the root that names all of it.

A model directory is taken apart once, when it is added: every decoder layer becomes one safetensors piece, so that a node reads,
stores and fetches exactly the layers it serves. Pieces and files are blobs: content-addressed by the Merkle root of their chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.encoding import encode
from nexus.core.errors import MalformedError, NotFoundError
from nexus.core.hashing import leaf_hash, merkle_root, tagged_hash
from nexus.core.record import Record, digest, many, nested, text, uint

CHUNK_BYTES = 1 << 20
# The deepest models have a quarter of that; the search for the best split takes time with the square of it.
LAYERS_MAX = 512
EMBEDDING, HEAD = "embedding", "head"
CAUSAL, ENCODER = "causal", "encoder"
EXACT, FLOAT = "exact", "float"
# How a model may be added; auto is exact where the model can be, else float.
AUTO = "auto"
PROFILES_ASKED = (AUTO, EXACT, FLOAT)
DEFAULT_PROFILE = AUTO
# What weights may be stored in, by profile.
STORED = {EXACT: ("int8",), FLOAT: ("float32", "bfloat16", "float16")}
# What an exact model brings beside its pieces: what is computed how, the tables, and known answers (docs/exact.md).
EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS = "exact.json", "exact.safetensors", "vectors.safetensors"


@dataclass(frozen=True, slots=True)
class Blob(Record):
    """A named run of bytes. `root`: Merkle root over its chunks of 1 MiB (the last may be shorter); see `blob_root`."""

    name: str = text(128)
    size: int = uint(2**48)
    root: bytes = digest()


@dataclass(frozen=True, slots=True)
class Manifest(Record):
    """Everything that decides what a model computes.

    `kind`: "causal" (tokens in, tokens out) or "encoder" (tokens in, one vector out). `architecture`: the transformers class.
    `profile`: the arithmetic, "exact" (the same bits everywhere) or "float". `dtype`: of the stored weights. `kv_bytes`: bytes of
    KV cache per token and layer, in profile "float" as float32; 0 for an encoder.
    `tied`: 1 where the head shares the embedding's weights, so that the last stage needs the embedding piece too.
    `rows`: of an exact model the roots over the rows of every piece, and behind them of its tables (`nexus.proof.arithmetic.rows`),
    so that a proof of wrong arithmetic carries the few rows that it is about; of a float model none.
    """

    spec: int = uint(1, least=1)
    kind: str = text(16)
    architecture: str = text(64)
    profile: str = text(16)
    dtype: str = text(16)
    layers: int = uint(LAYERS_MAX)
    hidden_size: int = uint(2**20)
    vocab_size: int = uint(2**24)
    context: int = uint(2**32)
    kv_bytes: int = uint(2**32)
    tied: int = uint(1)
    pieces: tuple[Blob, ...] = many(nested(Blob), LAYERS_MAX + 2)
    files: tuple[Blob, ...] = many(nested(Blob), 64)
    rows: tuple[bytes, ...] = many(digest(), LAYERS_MAX + 3)

    @property
    def root(self) -> bytes:
        """The model's name everywhere: a Merkle root over the shape, every piece, every file and every rows root."""
        counts = encode((len(self.pieces), len(self.files), len(self.rows)))
        return tagged_hash("model", merkle_root(leaf_hash(leaf) for leaf in self.leaves), counts)

    @property
    def leaves(self) -> list[bytes]:
        """What the root is over."""
        shape = self.to_value()[:-3]  # type: ignore[index]
        return [encode(shape), *(blob.to_bytes() for blob in (*self.pieces, *self.files)), *self.rows]

    @property
    def weight_bytes(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def piece(self, name: str) -> Blob:
        for piece in self.pieces:
            if piece.name == name:
                return piece
        raise NotFoundError(f"the model has no piece {name!r}")

    def file(self, name: str) -> Blob | None:
        return next((blob for blob in self.files if blob.name == name), None)

    def check(self) -> Manifest:
        """This manifest, if its parts fit together. Raises MalformedError. Call it on every manifest from outside."""
        expected = [EMBEDDING, *(layer_name(index) for index in range(self.layers)), HEAD]
        if [piece.name for piece in self.pieces] != expected:
            raise MalformedError("the manifest's pieces are not embedding, every layer in order, head")
        if self.kind not in (CAUSAL, ENCODER) or self.spec != 1:
            raise MalformedError(f"unknown kind {self.kind!r} or spec {self.spec} of model")
        if self.dtype not in STORED.get(self.profile, ()):
            raise MalformedError(f"unknown arithmetic of a model: profile {self.profile!r}, weights in {self.dtype!r}")
        if not self.layers or not self.hidden_size or not self.context:
            raise MalformedError("a model has at least one layer, one hidden dimension and one position")
        names = [blob.name for blob in self.files]
        if len(set(names)) != len(names) or "config.json" not in names:
            raise MalformedError("the manifest's files are not unique, or config.json is missing")
        if self.profile == EXACT and not {EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS}.issubset(names):
            raise MalformedError("the manifest of an exact model lacks its plan, tables or known answers")
        if len(self.rows) != (len(self.pieces) + 1 if self.profile == EXACT else 0):
            raise MalformedError(
                "the manifest of an exact model has a root over the rows of every piece and the tables, others none"
            )
        for name in names:
            if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise MalformedError(f"the file name {name!r} leads out of the model's directory")
        return self


def layer_name(index: int) -> str:
    return f"layer.{index}"


def stage_pieces(manifest: Manifest, start: int, end: int) -> tuple[Blob, ...]:
    """The pieces that the stage of layers [start, end) needs, and no others. The manifest must be a checked one."""
    if not 0 <= start < end <= manifest.layers:
        raise MalformedError(f"layers {start} to {end} are not in a model of {manifest.layers}")
    last = end == manifest.layers
    # The order of the pieces is fixed: looking each up by name would take time with the square of the layers.
    embedding, *layers, head = manifest.pieces
    first = [embedding] if start == 0 or (last and manifest.tied) else []
    return (*first, *layers[start:end], *([head] if last else []))


def chunk_count(size: int) -> int:
    """Chunks in a blob of `size` bytes; an empty blob has one empty chunk."""
    return max(1, -(-size // CHUNK_BYTES))


def blob_root(size: int, chunk_hashes: list[bytes]) -> bytes:
    """The content address of a blob from the leaf hashes of its chunks."""
    return tagged_hash("blob", size.to_bytes(8, "little"), merkle_root(chunk_hashes))
