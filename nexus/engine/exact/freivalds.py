"""Freivalds' keys of a model's pieces on disk, block by block: whoever held the weights once can audit without them ever after.

The pieces must be authentic: a key is worth what the weights are that it was made of. A stage that loads (`load_exact_stage`) has
compared them with the model root; so does whoever fetches blobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.engine.exact.pieces import Piece
from nexus.proof.arithmetic.plan import HEAD_OP, LINEARS, ExactPlan
from nexus.proof.arithmetic.rows import EMBED
from nexus.proof.freivalds import SEED_BYTES, Floats, Linear, PieceKeys, make_key


def key_pieces(plan: ExactPlan, start: int, end: int) -> dict[str, tuple[str, ...]]:
    """The pieces that it takes to audit the stage of layers [start, end), and the linear operations in each of them."""
    pieces: dict[str, tuple[str, ...]] = {layer_name(index): LINEARS for index in range(start, end)}
    if start == 0 and not plan.causal:
        pieces[EMBEDDING] = ()
    if end == len(plan.layers) and plan.causal:
        pieces[HEAD] = () if plan.tied else (HEAD_OP,)
        if plan.tied:
            pieces[EMBEDDING] = (EMBED,)
    return pieces


def make_keys(pieces: Mapping[str, Piece], plan: ExactPlan, start: int, end: int, seed: bytes) -> dict[str, PieceKeys]:
    """The keys of the stage of layers [start, end) by piece. `pieces`: at least those that `key_pieces` names. `seed`: 32 random
    bytes that nobody else may ever know, and that make no keys of another model.

    Reads every weight once, a block of 16 MB at a time. Raises ModelFormatError for a piece that is damaged.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed of {len(seed)} bytes, not {SEED_BYTES}")
    return {
        name: piece_keys(pieces[name], linears, blake3(seed + name.encode("ascii")).digest())
        for name, linears in key_pieces(plan, start, end).items()
    }


def piece_keys(piece: Piece, linears: tuple[str, ...], seed: bytes) -> PieceKeys:
    """As `nexus.proof.freivalds.piece_keys`, with no more than a block of a weight in memory. `seed`: of this piece alone."""
    keys = tuple(Linear(name, make_key(_blocks(piece, name), blake3(seed + name.encode("ascii")).digest())) for name in linears)
    floats = []
    for name in sorted(piece.names):
        if len(piece.shape(name)) == 1:
            tensor = piece.tensor(name)
            if tensor.dtype == np.float32:
                floats.append(Floats(name, np.ascontiguousarray(tensor, "<f4").tobytes()))
    return PieceKeys(keys, tuple(floats))


def _blocks(piece: Piece, linear: str) -> Iterator[NDArray[np.int8]]:
    for _, block in piece.blocks(f"{linear}.weight"):
        if block.dtype != np.int8:
            raise ModelFormatError(f"{linear} in {piece.path.name} is not a weight of 8 bits", "Fetch or add the model again")
        yield block
