"""Both ends of an audit over a model's files: a stage's answer, and what an auditor reads of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError, NexusError, NotFoundError, VerificationError
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, Manifest
from nexus.engine.exact.freivalds import piece_keys
from nexus.engine.exact.known_answers import table_shapes
from nexus.engine.exact.pieces import Piece, read_tables
from nexus.engine.exact.replay import Replay, replay
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.stage import path_of
from nexus.proof.accuse import AccusedStage, accuse, accuse_answer, accuse_opening, first_difference
from nexus.proof.arithmetic.ops import Tables
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.audit import Cell, Opening, SignedAuditAnswer
from nexus.proof.audit_check import INPUT, OPENING, AuditedStage, AuditorKeys, Fault
from nexus.proof.audit_open import open_cell
from nexus.proof.evidence import Evidence, Verdict, verify_evidence
from nexus.proof.evidence.answer import X
from nexus.proof.evidence.model import checked_plan
from nexus.proof.freivalds import PieceKeys
from nexus.proof.receipts import SignedReceipt, payload_root
from nexus.proof.trace import OPS, check_trace

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


@dataclass(frozen=True)
class Checked:
    """A stage's part in a session computed again. `differs`: whether anything that was compared is not what the stage signed
    for."""

    replay: Replay
    differs: bool


def compare(loaded: ExactStage, stage: AuditedStage, inputs: Sequence[bytes], windows: Collection[int]) -> Checked:
    """Compute a stage's part again from the payloads that came into it, and compare every output, the log's end, and the traces of
    these windows (by number)."""
    done = replay(loaded, inputs, Sampling.of(stage.terms) if stage.is_last else None)
    last = stage.receipts[-1]
    right = all(
        payload_root(done.outputs[receipt.step0 : receipt.step0 + receipt.n]) == receipt.out_root for receipt in stage.receipts
    )
    right = right and (not stage.exact.causal or done.kv_root(last.kv_len) == last.kv_root)
    chosen = [stage.receipts[number] for number in sorted(windows)]
    if right and chosen:
        ours = done.traces([(receipt.step0, receipt.n) for receipt in chosen])
        right = all(trace == stage.traces[number] for trace, number in zip(ours, sorted(windows), strict=True))
    return Checked(done, not right)


def accusation(
    stage: AuditedStage,
    signed: Sequence[SignedReceipt],
    inputs: Sequence[bytes],
    done: Replay,
    weights: StoredWeights,
    files: Mapping[str, Path],
    opened: Opening | None,
) -> tuple[Evidence, Verdict] | None:
    """Evidence of the first thing that the stage did wrong, verified as everybody else will verify it; None where nothing is proven
    wrong. `opened`: what the stage itself shows of it. Raises what `nexus.proof.accuse.accuse` and `verify_evidence` raise."""
    accused = AccusedStage(
        manifest=stage.manifest,
        exact_plan=path_of(files, EXACT_PLAN).read_bytes(),
        plan=stage.plan,
        terms=stage.terms,
        receipts=signed,
        traces=stage.traces,
        inputs=inputs,
        outputs=stage.results if stage.is_last else (),
    )
    evidence = accuse(accused, done, weights, opened)
    return None if evidence is None else (evidence, verify_evidence(evidence, weights))


def cell_of_difference(stage: AuditedStage, done: Replay) -> Cell | None:
    """The cell to ask the accused to open: None where a step has several rows, of which nobody knows yet which one is wrong,
    or where the difference is not in an operation of a layer."""
    difference = first_difference(stage.shape, stage.traces, done, [receipt.out_root for receipt in stage.receipts])
    if difference is None or difference.op not in OPS or stage.rows[difference.step] != 1:
        return None
    return Cell(difference.step, 0, difference.layer, difference.head)


def read_piece_keys(path: Path, plan: ExactPlan, name: str, linears: tuple[str, ...], seed: bytes) -> PieceKeys:
    """Keys of one piece's file. Raises ModelFormatError."""
    return piece_keys(Piece(path, plan.piece_tensors(name)), linears, seed)


def auditor_keys(plan: ExactPlan, files: Mapping[str, Path], pieces: Mapping[str, PieceKeys]) -> AuditorKeys:
    """With the model's tables, out of its files."""
    return AuditorKeys(pieces, read_angles(plan, files), Tables())


def accusation_shown(
    stage: AuditedStage,
    signed: Sequence[SignedReceipt],
    fault: Fault,
    answer: SignedAuditAnswer,
    opening: Opening,
    weights: StoredWeights,
    files: Mapping[str, Path],
) -> tuple[Evidence, Verdict]:
    """Evidence of a fault in what a stage showed in its `answer`, verified. Raises VerificationError, MalformedError,
    NotFoundError where that proves nothing; a replica may still do."""
    first = stage.stage == 0
    if not first and not stage.exact.causal:
        raise NotFoundError("the text that came into a later stage of an encoder is not known", "Compute it again from the first")
    accused = AccusedStage(
        manifest=stage.manifest,
        exact_plan=path_of(files, EXACT_PLAN).read_bytes(),
        plan=stage.plan,
        terms=stage.terms,
        receipts=signed,
        traces=stage.traces,
        inputs=stage.inputs if first else (),
        outputs=stage.results if stage.is_last else (),
    )
    if fault.kind == OPENING:
        evidence = accuse_answer(accused, answer, opening, {INPUT: X}.get(fault.op, fault.op), weights)
        return evidence, verify_evidence(evidence, weights)
    try:
        evidence = accuse_opening(accused, opening, fault.op, weights)
    except VerificationError:
        # What was signed for follows from the model: then it is the sums alone, which nothing but the answer shows.
        evidence = accuse_answer(accused, answer, opening, fault.op, weights, sums=True)
    return evidence, verify_evidence(evidence, weights)
