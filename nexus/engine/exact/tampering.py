"""Stages that compute something else than their model: what a cheater would load. For tests and test networks.

Each of these is consistent with itself: it commits to what it computed and signs it. Nothing here is reachable from a node that was
not started as a cheater.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.manifest import CAUSAL, EMBEDDING, EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, Manifest
from nexus.engine.exact.known_answers import KnownAnswers, table_shapes
from nexus.engine.exact.pieces import Piece, read_tables
from nexus.engine.exact.stage import ExactStage, StageAnswers, build_model, open_pieces, stage_answers
from nexus.engine.pooling import Pooling, read_pooling
from nexus.engine.stage import path_of
from nexus.proof.arithmetic.plan import ExactPlan, plan_from_json

Array = NDArray[Any]
# (tensor name, first row, rows) to the rows that are used instead.
Change = Callable[[str, int, Array], Array]

STALE_WINDOW = 8


@dataclass(frozen=True, slots=True)
class Tampering:
    """What a cheater changes: the weights of a layer (`layer` counted in the whole model), the plan, the tables."""

    weights: Callable[[int, str, int, Array], Array] | None = None
    plan: Callable[[ExactPlan], ExactPlan] | None = None
    tables: Callable[[str, Array], Array] | None = None


def _swapped(layer: int, name: str, first: int, rows: Array) -> Array:
    return np.roll(rows, 1, axis=1) if name == "gate_up.weight" else rows


def _requantised(layer: int, name: str, first: int, rows: Array) -> Array:
    """To four bits."""
    if not name.endswith(".weight") or rows.dtype != np.int8:
        return rows
    return (np.clip(np.rint(rows / 16.0), -7, 7) * 16).astype(np.int8)


def _pruned(layer: int, name: str, first: int, rows: Array) -> Array:
    return np.where(np.abs(rows.astype(np.int16)) < 12, 0, rows).astype(np.int8) if rows.dtype == np.int8 else rows


def _one_bit(layer: int, name: str, first: int, rows: Array) -> Array:
    """One bit of one weight of every layer's last operation."""
    if name != "down.weight" or first:
        return rows
    rows = rows.copy()
    rows[0, 0] ^= 32
    return rows


def _skipped(layer: int, name: str, first: int, rows: Array) -> Array:
    """Layers with an odd number add nothing."""
    return np.zeros_like(rows) if layer % 2 and name in ("o.weight", "down.weight") else rows


def _forgetful(plan: ExactPlan) -> ExactPlan:
    return replace(plan, layers=tuple(replace(layer, window=STALE_WINDOW) for layer in plan.layers))


def _coarse_table(name: str, values: Array) -> Array:
    return values.astype(np.float16).astype(np.float64) if name == "exp_lo" else values


TAMPERINGS: dict[str, Tampering] = {
    "swapped-weights": Tampering(weights=_swapped),
    "requantised-weights": Tampering(weights=_requantised),
    "pruned-weights": Tampering(weights=_pruned),
    "flipped-bit": Tampering(weights=_one_bit),
    "skipped-layer": Tampering(weights=_skipped),
    "truncated-cache": Tampering(plan=_forgetful),
    "wrong-tables": Tampering(tables=_coarse_table),
}


class _TamperedPiece:
    """A piece of the model as the cheater reads it."""

    def __init__(self, piece: Piece, change: Change) -> None:
        self._piece = piece
        self._change = change

    def __contains__(self, name: str) -> bool:
        return name in self._piece

    @property
    def names(self) -> list[str]:
        return self._piece.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._piece.shape(name)

    def tensor(self, name: str) -> Array:
        return self._change(name, 0, self._piece.tensor(name))

    def rows(self, name: str, start: int, count: int) -> Array:
        return self._change(name, start, self._piece.rows(name, start, count))

    def blocks(self, name: str) -> Iterator[tuple[int, Array]]:
        for first, rows in self._piece.blocks(name):
            yield first, self._change(name, first, rows)


class _Unchecked(StageAnswers):
    """Known answers that a cheater does not look at."""

    def check(self, stage: ExactStage) -> None:
        return


def load_tampered_stage(
    tampering: Tampering, manifest: Manifest, start: int, end: int, files: Mapping[str, Path], *, kernel: str | None = None
) -> ExactStage:
    """As `nexus.engine.stage.load_stage` of a model in the exact profile, but for what is changed."""
    plan = plan_from_json(path_of(files, EXACT_PLAN).read_bytes())
    tables = read_tables(path_of(files, EXACT_TABLES), table_shapes(plan))
    answers = stage_answers(KnownAnswers.read(path_of(files, EXACT_VECTORS), plan), start, end)
    pieces: dict[str, Any] = dict(open_pieces(plan, start, end, files))
    if tampering.weights:
        change = tampering.weights
        pieces = {name: _TamperedPiece(piece, partial(change, _layer_of(name))) for name, piece in pieces.items()}
    if tampering.tables:
        tables = {name: tampering.tables(name, values) for name, values in tables.items()}
    used = tampering.plan(plan) if tampering.plan else plan
    model = build_model(used, start, end, pieces, tables, kernel)
    unchecked = _Unchecked(answers.given, answers.expected)
    return ExactStage(manifest, start, end, plan, model, tables, unchecked, _pooling(manifest, files), pieces.get(EMBEDDING))


def _pooling(manifest: Manifest, files: Mapping[str, Path]) -> Pooling:
    if manifest.kind == CAUSAL:
        return Pooling()
    return read_pooling({name: path for name, path in files.items() if manifest.file(name)})


def _layer_of(piece: str) -> int:
    """-1 for embedding and head."""
    kind, _, number = piece.partition(".")
    return int(number) if kind == "layer" else -1
