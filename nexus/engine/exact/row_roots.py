"""The roots over the rows of pieces on disk, as they stand in the manifest: what a node serves is what a proof would show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import Manifest
from nexus.engine.exact import native
from nexus.engine.exact.pieces import Piece
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import TABLES, RowLayout, linear_leaves, piece_names, row_layout, rows_root, tensor_leaves

Tables = Mapping[str, NDArray[np.float64]]


def model_rows(plan: ExactPlan, piece_path: Callable[[str], Path], tables: Tables) -> tuple[bytes, ...]:
    """A manifest's `rows`. `piece_path`: where the piece of a name is. Reads every piece once."""
    names = [name for name in piece_names(plan) if name != TABLES]
    roots = [piece_root(plan, name, Piece(piece_path(name), plan.piece_tensors(name))) for name in names]
    return (*roots, tables_root(plan, tables))


def check_rows(manifest: Manifest, plan: ExactPlan, pieces: Mapping[str, Piece], tables: Tables) -> None:
    """That the rows of these pieces and tables are those of the manifest. Raises ModelFormatError.

    Without it an honest node could be convicted with the manifest's rows of serving the manifest's pieces.
    """
    expected = dict(zip(piece_names(plan), manifest.rows, strict=True))
    found = {name: piece_root(plan, name, piece) for name, piece in pieces.items()} | {TABLES: tables_root(plan, tables)}
    for name, root in found.items():
        if root != expected[name]:
            raise ModelFormatError(
                f"the rows of {name} are not those that the model's manifest names",
                "Whoever made this model made it wrong: use another copy, or add the model yourself",
            )


def piece_root(plan: ExactPlan, name: str, piece: Piece) -> bytes:
    layout = row_layout(plan, name)
    return _root(leaves for section in layout.sections for leaves in _section_leaves(piece, section.name, layout))


def tables_root(plan: ExactPlan, tables: Tables) -> bytes:
    return _root(tensor_leaves(tables[section.name]) for section in row_layout(plan, TABLES).sections)


def _section_leaves(piece: Piece, name: str, layout: RowLayout) -> Iterator[NDArray[np.uint8]]:
    """The leaves [n, leaf bytes] of a section, by blocks of rows."""
    section = layout.section(name)
    if section.linear:
        scale = piece.tensor(f"{name}.scale")
        bias = piece.tensor(f"{name}.bias") if section.biased else None
        for first, rows in piece.blocks(f"{name}.weight"):
            here = slice(first, first + len(rows))
            yield linear_leaves(rows, scale[here], None if bias is None else bias[here])
    elif len(piece.shape(name)) == 1:
        yield tensor_leaves(piece.tensor(name))
    else:
        for _, rows in piece.blocks(name):
            yield tensor_leaves(rows)


def _root(blocks: Iterator[NDArray[np.uint8]]) -> bytes:
    hashes = [native.hash_rows(leaves) for leaves in blocks]
    if not hashes:
        return rows_root([])
    root: bytes = native.merkle_roots(np.concatenate(hashes)[None])[0].tobytes()
    return root
