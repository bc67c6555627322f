"""Reading keys and values out of the pages of the compiled kernel (native/layout.h), as the records of a session's logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.engine.exact.native import PAGE_TOKENS
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, LayerPlan

_GROUP, _QUAD = 16, 4
_SCALE_BYTES = 4


def page_records(
    plan: ExactPlan, layers: Sequence[LayerPlan], pages: Sequence[NDArray[Any]], layer: int, start: int, end: int
) -> NDArray[np.uint8]:
    """The records of tokens [start, end) in a layer's logs, uint8 [key-value heads, tokens, bytes of a record].

    `layers`: of the stage; `layer`: which of them.
    """
    first, last = start // PAGE_TOKENS, -(-end // PAGE_TOKENS)
    at = sum(_layer_bytes(plan, one) for one in layers[:layer])
    parts = np.stack([page[at : at + _layer_bytes(plan, layers[layer])] for page in pages[first:last]])
    records = _records(plan, ATTENTION in layers[layer].wide, parts)
    begin = first * PAGE_TOKENS
    return np.ascontiguousarray(records[:, start - begin : end - begin])


def _layer_bytes(plan: ExactPlan, layer: LayerPlan) -> int:
    return sum(_sizes(plan, ATTENTION in layer.wide))


def _sizes(plan: ExactPlan, wide: bool) -> tuple[int, int, int, int]:
    """Bytes of keys, values and the scales of each, of one layer in a page."""
    keys = plan.kv_heads * (2 if wide else 1) * _padded(plan.head_dim, _QUAD) * PAGE_TOKENS
    values = plan.kv_heads * _padded(plan.head_dim, _GROUP) * PAGE_TOKENS
    scales = plan.kv_heads * PAGE_TOKENS * _SCALE_BYTES
    return keys, values, scales, scales


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _records(plan: ExactPlan, wide: bool, parts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`parts`: [pages, bytes of one layer]; gives [heads, 64 * pages, bytes]."""
    pages, heads, size = len(parts), plan.kv_heads, plan.head_dim
    packed = np.split(parts, np.cumsum(_sizes(plan, wide))[:-1], 1)
    # Keys: positions are the outputs of a packed matrix, dimensions its inputs, each byte plus 128. Wide ones are two: high, low.
    keys = packed[0].reshape(pages, heads, 2 if wide else 1, PAGE_TOKENS // _GROUP, -1, _GROUP, _QUAD) ^ 0x80
    keys = keys.transpose(1, 0, 3, 5, 2, 4, 6).reshape(heads, pages * PAGE_TOKENS, 2 if wide else 1, -1)[..., :size]
    if wide:
        high, low = keys.view(np.int8).astype("<i2").transpose(2, 0, 1, 3)
        keys = (high * 256 + low).astype("<i2").view(np.uint8)
    else:
        keys = keys[:, :, 0]
    # Values: the other way round, as they are.
    values = packed[1].reshape(pages, heads, -1, PAGE_TOKENS // _QUAD, _GROUP, _QUAD).transpose(1, 0, 3, 5, 2, 4)
    values = values.reshape(heads, pages * PAGE_TOKENS, -1)[..., :size]
    scales = [
        part.reshape(pages, heads, PAGE_TOKENS, _SCALE_BYTES).transpose(1, 0, 2, 3).reshape(heads, -1, _SCALE_BYTES)
        for part in packed[2:]
    ]
    return np.concatenate([keys, values, *scales], -1)
