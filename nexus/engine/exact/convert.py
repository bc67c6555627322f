"""From a model's float weights to the pieces of the exact profile: int8 rows with one float32 scale each (docs/exact.md).

Only the largest magnitude of a row, divisions and roundings of single float32 values: the same weights give the same bytes on every
machine. Weights are read and converted by blocks of rows; of a whole tensor no more is ever in memory than its int8 form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL, EMBEDDING, HEAD, layer_name
from nexus.engine.architecture import Config, Layout
from nexus.engine.exact.pieces import SCALE_MAX, SCALE_MIN, VALUE_MAX
from nexus.engine.safetensors_check import encode_header
from nexus.engine.source import TensorSource
from nexus.proof.arithmetic.bounds import FLOAT_FIX, WEIGHT_MAX
from nexus.proof.arithmetic.plan import ExactPlan, Shapes

# The version of what is done here: another one may give other bytes for the same weights.
CONVERTER = 1
# Float32 values at work at once. They pass through the processor's caches several times, so few are faster than many.
BLOCK_VALUES = 1 << 20
WEIGHTS_FIX = (
    f"The weights themselves are at fault, not this machine: use another version of the model. {FLOAT_FIX} to run it as it is"
)

Float32 = NDArray[np.float32]
Read = Callable[[int], None]

# The parts of a layer in transformers' models, by the names of docs/exact.md. Those of one line are put one after the other.
_DECODER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
_NORMS = {"mlp_norm": ("post_attention_layernorm",)}
_NORMS_WITH_POST = {
    "post_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
_ENCODER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "o": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "gate_up": ("intermediate.dense",),
    "down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_DECODER_ENDS = {"embed": ("model.embed_tokens",), "norm": ("model.norm",), "head": ("lm_head",)}
_ENCODER_ENDS = {
    "embed": ("embeddings.word_embeddings",),
    "position": ("embeddings.position_embeddings",),
    "type": ("embeddings.token_type_embeddings",),
    "embed_norm": ("embeddings.LayerNorm",),
}
# Of an encoder's kinds of token the first alone is used.
_FIRST_ROW = "type.weight"
# Tables of one row per token: rows of tokens that were never trained may be zero.
_VOCABULARY = ("embed", "head")


@dataclass(frozen=True, slots=True)
class PieceSources:
    """One piece to be made. `shapes`: its tensors. `sources`: of each but the scales, what it is made of, by names in the model."""

    name: str
    shapes: Shapes
    sources: Mapping[str, tuple[str, ...]]

    @property
    def header(self) -> bytes:
        return encode_header((name, dtype, shape) for name, (dtype, shape) in self.shapes.items())

    @property
    def size(self) -> int:
        widths = {"I8": 1, "F32": 4}
        return len(self.header) + sum(widths[dtype] * prod(shape) for dtype, shape in self.shapes.values())


def piece_sources(config: Config, plan: ExactPlan, layout: Layout) -> list[PieceSources]:
    """What every piece is made of. Raises ModelFormatError unless exactly the tensors of the model are used, each in full."""
    causal = config.kind == CAUSAL
    ends = _DECODER_ENDS if causal else _ENCODER_ENDS
    parts = _DECODER | (_NORMS_WITH_POST if plan.post_norms else _NORMS) if causal else _ENCODER
    layers = [
        _piece(layer_name(index), plan.layer_tensors(), parts, f"{layout.layers}.{index}.", layout)
        for index in range(config.layers)
    ]
    embedding = _piece(EMBEDDING, plan.embedding_tensors(), ends, "", layout)
    pieces = [embedding, *layers, _piece(HEAD, plan.head_tensors(), ends, "", layout)]
    used = {name for piece in pieces for names in piece.sources.values() for name in names}
    if unused := sorted(layout.shapes.keys() - used):
        raise ModelFormatError(f"the exact profile does not cover models with {unused[0]}", FLOAT_FIX)
    return pieces


def _piece(name: str, shapes: Shapes, parts: Mapping[str, tuple[str, ...]], prefix: str, layout: Layout) -> PieceSources:
    sources = {}
    for tensor, (_, shape) in shapes.items():
        part, _, kind = tensor.rpartition(".")
        if kind != "scale":
            sources[tensor] = names = tuple(f"{prefix}{module}.{kind}" for module in parts[part])
            found = _stacked([layout.shapes.get(source, ()) for source in names], first_row=tensor == _FIRST_ROW)
            if found != shape or not all(shape):
                raise ModelFormatError(f"the exact profile does not cover {tensor} of shape {found or shape} in {name}", FLOAT_FIX)
    return PieceSources(name, shapes, sources)


def _stacked(shapes: Sequence[tuple[int, ...]], *, first_row: bool) -> tuple[int, ...]:
    """The shape of tensors put one after the other, () where they do not fit together or there is none."""
    if first_row:
        return shapes[0][1:]
    if not all(shapes) or len({shape[1:] for shape in shapes}) != 1:
        return ()
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def piece_chunks(piece: PieceSources, plan: ExactPlan, tensors: Mapping[str, TensorSource], read: Read) -> Iterator[bytes]:
    """The piece's bytes. `read` is told how many bytes of the model were read. Raises ModelFormatError for weights that have no
    sound exact form."""
    yield piece.header
    quantised: dict[str, list[NDArray[np.int8]]] = {}
    for tensor in sorted(piece.shapes):
        part, _, kind = tensor.rpartition(".")
        if kind == "scale":
            # It comes before the weight, in the order of names: both are made now.
            sources = [tensors[name] for name in piece.sources[f"{part}.weight"]]
            quantised[part], scales = quantise_rows(sources, vocabulary=part in _VOCABULARY, read=read)
            yield scales.astype("<f4").tobytes()
        elif part in quantised:
            for rows in quantised.pop(part):
                yield rows.tobytes()
        else:
            offset = plan.norm_offset and part.endswith("norm")
            for name in piece.sources[tensor]:
                yield from _plain(tensors[name], offset=offset, first_row=tensor == _FIRST_ROW, read=read)


def quantise_rows(
    sources: Iterable[TensorSource], *, vocabulary: bool, read: Read
) -> tuple[list[NDArray[np.int8]], NDArray[np.float32]]:
    """All rows of the tensors, one after the other: int8 [block, depth] each, and their scales [rows]."""
    blocks, scales = [], []
    for source in sources:
        first = 0
        for rows in float_rows(source, read):
            q, scale = quantise(rows, source.name, first, vocabulary=vocabulary)
            blocks.append(q)
            scales.append(scale)
            first += len(rows)
    return blocks, np.concatenate(scales)


def quantise(rows: Float32, name: str, first: int, *, vocabulary: bool) -> tuple[NDArray[np.int8], Float32]:
    """float32 [rows, depth] to int8 and a scale per row. `name`, `first`: which tensor's rows they are, counted from 0."""
    largest = np.abs(rows).max(axis=1)
    scale = largest / np.float32(WEIGHT_MAX)
    if vocabulary:
        # What is smaller belongs to tokens that were never trained, and becomes zero.
        scale = np.maximum(scale, np.float32(SCALE_MIN))
    sound = (scale >= SCALE_MIN) & (scale <= SCALE_MAX)  # NaN is not
    if not sound.all():
        row = int(np.argmin(sound))
        raise ModelFormatError(f"{name} {_ailment(float(largest[row]))} in row {first + row}", WEIGHTS_FIX)
    return np.rint(rows / scale[:, None]).astype(np.int8), scale


def _ailment(largest: float) -> str:
    if not np.isfinite(largest):
        return "has values that are not numbers or infinite"
    if not largest:
        return "is all zero"
    return f"has no value larger than {largest:.3g}" if largest < 1 else f"has values as large as {largest:.3g}"


def float_rows(source: TensorSource, read: Read) -> Iterator[Float32]:
    """A stored tensor as float32 [rows, depth], by blocks of whole rows. One dimension is a column of rows of one value."""
    depth = prod(source.spec.shape[1:])
    width = source.spec.size // max(1, prod(source.spec.shape))
    step = max(1, BLOCK_VALUES // max(1, depth))
    for chunk in source.chunks(step * depth * width):
        yield _to_float32(chunk, source.spec.dtype).reshape(-1, depth)
        read(len(chunk))


def _to_float32(raw: bytes, dtype: str) -> Float32:
    match dtype:
        case "F32":
            return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
        case "F16":
            return np.frombuffer(raw, "<f2").astype(np.float32)
        case "BF16":
            # The upper half of a float32.
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise ModelFormatError(f"weights in {dtype} are not supported", "Use a float32, float16 or bfloat16 version of the model")


def _plain(source: TensorSource, *, offset: bool, first_row: bool, read: Read) -> Iterator[bytes]:
    """A tensor that stays float32, or the first row of one."""
    first = 0
    for rows in float_rows(source, read):
        sound = (np.abs(rows) <= VALUE_MAX).all(axis=1)  # NaN is not
        if not sound.all():
            row = first + int(np.argmin(sound))
            raise ModelFormatError(f"{source.name} has values that are not numbers or beyond 2^20 in row {row}", WEIGHTS_FIX)
        first += len(rows)
        values = np.float32(1) + rows if offset else rows
        yield (values[:1] if first_row else values).astype("<f4", copy=False).tobytes()
        if first_row:
            return
