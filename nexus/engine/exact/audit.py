"""Both ends of an audit over a model's files: a stage's answer, and what an auditor reads of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError, NexusError
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, Manifest
from nexus.engine.exact.pieces import Piece, read_tables
from nexus.engine.exact.replay import replay
from nexus.engine.exact.stage import ExactStage, table_shapes
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.stage import path_of
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.audit import Cell, Opening
from nexus.proof.audit_check import AuditedStage
from nexus.proof.audit_open import open_cell
from nexus.proof.evidence.case import checked_plan
from nexus.proof.receipts import payload_root
from nexus.proof.trace import check_trace

# The tables that are not the same in every model.
_ANGLES = "rope."


def read_exact_plan(manifest: Manifest, files: Mapping[str, Path]) -> ExactPlan:
    """Raises MalformedError, VerificationError, LocalError."""
    try:
        return checked_plan(manifest, path_of(files, EXACT_PLAN).read_bytes())
    except OSError as error:
        raise LocalError(f"the model's files cannot be read: {error.strerror}", "Check the disk") from error


def read_angles(plan: ExactPlan, files: Mapping[str, Path]) -> dict[str, NDArray[np.float64]]:
    """The tables of rotary embeddings by name. Raises ModelFormatError."""
    tables = read_tables(path_of(files, EXACT_TABLES), table_shapes(plan))
    return {name: table for name, table in tables.items() if name.startswith(_ANGLES)}


class _Tensors(Mapping[str, NDArray[Any]]):
    """A piece's tensors, read when they are asked for."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._piece:
            raise KeyError(name)
        return self._piece.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._piece.names)

    def __len__(self) -> int:
        return len(self._piece.names)


class StageWeights:
    """`nexus.proof.audit_open.Weights` over a model's files."""

    def __init__(self, manifest: Manifest, plan: ExactPlan, files: Mapping[str, Path]) -> None:
        self._root = manifest.root
        self._plan = plan
        self._files = files
        self._stored = StoredWeights(lambda _: (manifest, files))

    def tensors(self, piece: str) -> Mapping[str, NDArray[Any]]:
        return _Tensors(Piece(path_of(self._files, piece), self._plan.piece_tensors(piece)))

    def row(self, piece: int, index: int) -> WeightProof:
        return self._stored.range(self._root, piece, index, 1)


def answer(loaded: ExactStage, stage: AuditedStage, cells: Sequence[Cell], files: Mapping[str, Path]) -> list[Opening]:
    """The openings of these cells of a session that this stage served: it is computed again from its inputs.

    Raises LocalError where what comes out is not what was signed for: then this machine computed wrongly, now or then, and
    whatever it showed would be used against it.
    """
    done = replay(loaded, stage.inputs, Sampling.of(stage.terms) if stage.is_last else None)
    for number in sorted({stage.window(cell.step) for cell in cells}):
        receipt = stage.receipts[number]
        outputs = done.outputs[receipt.step0 : receipt.step0 + receipt.n]
        try:
            check_trace(done.trace(receipt.step0, receipt.n), stage.shape, receipt.n, receipt.trace_root, receipt.kv_root)
            right = payload_root(outputs) == receipt.out_root
        except NexusError:
            right = False
        if not right:
            raise LocalError(
                "this machine computes something else now than what it signed for",
                "Check its memory, and `nexus engine check`; nothing is shown of this session",
            )
    weights = StageWeights(stage.manifest, stage.exact, files)
    return [open_cell(stage, done, weights, cell) for cell in cells]
