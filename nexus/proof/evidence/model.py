"""The parts of a model that a proof is about, under its root: its shape, its plan, and the roots over the rows of few pieces.

A manifest names every piece and file of a model, which is kilobytes; of these a proof needs some hundred bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import MalformedError, ModelFormatError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_joint_proof, merkle_joint_root, tagged_hash
from nexus.core.manifest import CAUSAL, CHUNK_BYTES, EXACT, EXACT_PLAN, LAYERS_MAX, Blob, Manifest, blob_root
from nexus.core.record import Record, digest, many, nested, raw, uint
from nexus.proof.arithmetic.plan import ExactPlan, plan_from_json

# One chunk of a blob: it bounds what is parsed, and its hash is that of one leaf.
EXACT_PLAN_BYTES_MAX = CHUNK_BYTES
SHAPE_BYTES_MAX = 512
FILES_MAX = 64
# A layer, the embedding, the head and the tables.
PIECES_SHOWN_MAX = 8
SIBLINGS_MAX = 128
# The fields of a manifest in front of its lists (`nexus.core.manifest.Manifest.root`).
_SHAPE_FIELDS = 11


@dataclass(frozen=True, slots=True)
class RowsRoot(Record):
    """The root over the rows of piece number `piece`, the one behind the last for the tables."""

    piece: int = uint(LAYERS_MAX + 2)
    root: bytes = digest()


@dataclass(frozen=True, slots=True)
class ModelParts(Record):
    """`shape`: the first leaf of the model's tree. `files`: how many there are; `exact_plan`: the file exact.json, `exact_blob` its
    leaf, number `exact_index` of the files. `rows`: of some pieces, in order. `siblings`: `nexus.core.hashing.merkle_joint_proof`
    of all these leaves."""

    shape: bytes = raw(most=SHAPE_BYTES_MAX)
    files: int = uint(FILES_MAX)
    exact_index: int = uint(FILES_MAX)
    exact_blob: Blob = nested(Blob)
    exact_plan: bytes = raw(most=EXACT_PLAN_BYTES_MAX)
    rows: tuple[RowsRoot, ...] = many(nested(RowsRoot), PIECES_SHOWN_MAX)
    siblings: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)

    @classmethod
    def of(cls, manifest: Manifest, exact_plan: bytes, pieces: Collection[int]) -> ModelParts:
        """`pieces`: whose rows are shown, by number."""
        leaves = [leaf_hash(leaf) for leaf in manifest.leaves]
        index = next(index for index, blob in enumerate(manifest.files) if blob.name == EXACT_PLAN)
        first_row = 1 + len(manifest.pieces) + len(manifest.files)
        shown = {0, 1 + len(manifest.pieces) + index, *(first_row + piece for piece in pieces)}
        return cls(
            shape=manifest.leaves[0],
            files=len(manifest.files),
            exact_index=index,
            exact_blob=manifest.files[index],
            exact_plan=exact_plan,
            rows=tuple(RowsRoot(piece, manifest.rows[piece]) for piece in sorted(pieces)),
            siblings=tuple(merkle_joint_proof(leaves, shown)),
        )


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """What of a model is known to be under its root. `rows`: roots over the rows of pieces by number."""

    root: bytes
    plan: ExactPlan
    context: int
    rows: dict[int, bytes]


def check_model(parts: ModelParts) -> CheckedModel:
    """The model that these are parts of. Raises MalformedError, VerificationError."""
    shape = _shape(parts.shape)
    pieces = shape.layers + 2
    if not 1 <= shape.layers <= LAYERS_MAX or parts.exact_index >= parts.files or parts.exact_blob.name != EXACT_PLAN:
        raise MalformedError("the parts are not those of a model")
    numbers = [each.piece for each in parts.rows]
    if numbers != sorted(set(numbers)) or (numbers and numbers[-1] > pieces):
        raise MalformedError("the roots over rows are not in order, or of pieces that the model does not have")
    # The tree of `Manifest.root`: the shape, the pieces, the files, and a root over the rows of each piece and the tables.
    leaves = {0: leaf_hash(parts.shape), 1 + pieces + parts.exact_index: leaf_hash(parts.exact_blob.to_bytes())}
    leaves |= {1 + pieces + parts.files + each.piece: leaf_hash(each.root) for each in parts.rows}
    tree = merkle_joint_root(1 + pieces + parts.files + pieces + 1, leaves, parts.siblings)
    root = tagged_hash("model", tree, encode((pieces, parts.files, pieces + 1)))
    plan = _plan_in(parts.exact_blob, shape, parts.exact_plan)
    return CheckedModel(root, plan, shape.context, {each.piece: each.root for each in parts.rows})


def _shape(content: bytes) -> Manifest:
    """A manifest without pieces, files and rows."""
    fields = decode(content, _SHAPE_FIELDS)
    if type(fields) is not tuple or len(fields) != _SHAPE_FIELDS:
        raise MalformedError("the first leaf of a model is its shape")
    shape = Manifest.from_value(cast(Value, (*fields, (), (), ())))
    if shape.profile != EXACT:
        raise VerificationError("only the exact profile's arithmetic can be done again elsewhere")
    return shape


def checked_plan(manifest: Manifest, content: bytes) -> ExactPlan:
    """The plan in a model's exact.json, if it is the one of this manifest. Raises MalformedError, VerificationError."""
    blob = manifest.file(EXACT_PLAN)
    if blob is None:
        raise VerificationError("the model has no exact.json")
    return _plan_in(blob, manifest, content)


def _plan_in(blob: Blob, shape: Manifest, content: bytes) -> ExactPlan:
    if (blob.size, blob.root) != (len(content), blob_root(len(content), [leaf_hash(content)])) or len(content) > CHUNK_BYTES:
        raise VerificationError("exact.json is not the one of the model")
    try:
        plan = plan_from_json(content)
    except ModelFormatError as error:
        raise MalformedError(f"exact.json is no plan of a model: {error.cause}") from error
    said = (plan.causal, len(plan.layers), plan.hidden, plan.vocab, plan.tied)
    due = (shape.kind == CAUSAL, shape.layers, shape.hidden_size, shape.vocab_size, bool(shape.tied))
    if said != due or shape.context > plan.context:
        raise VerificationError("exact.json and the manifest describe different models")
    return plan
