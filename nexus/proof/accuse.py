"""From a difference between what a stage committed to and what it should have, to evidence that convicts it.

Everything that the wrong operation worked on is right up to there, so whoever computed the session again knows it, and the
stage's own op roots prove that it worked on nothing else: no help of the accused is needed. With a row that it opened the proof
gets small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import HASH_BYTES, leaf_hash, merkle_peaks, merkle_range_proof, merkle_root, sibling_sides
from nexus.core.manifest import Manifest
from nexus.core.plan import Plan
from nexus.proof.arithmetic.ops import record_bytes
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.audit import Cell as AuditedCell
from nexus.proof.audit import OpenedRow, Opening, SignedAuditAnswer
from nexus.proof.evidence.answer import FalseResponse, ShownRow, answer_verdict, show_roots
from nexus.proof.evidence.case import Case, CheckedCase, check_case
from nexus.proof.evidence.exhibits import Cell, LogRecords, LogRoot, Payload, Rows
from nexus.proof.evidence.model import ModelParts
from nexus.proof.evidence.operation import LOG, OUTPUT, PREVIOUS_MAX, SAMPLE, WEIGHTS_MAX, Claim, Proof, operation_verdict
from nexus.proof.evidence.record import GOSSIP_BYTES_MAX, Evidence
from nexus.proof.evidence.weights import Weights, WeightSource
from nexus.proof.receipts import MICRO, SignedReceipt, Terms, payload_root
from nexus.proof.trace import ATTENTION, ATTENTION_OUT, CELL_BYTES, DOWN, GATE_UP, LOGITS, OPS, QKV, TraceShape, WindowTrace


class Recomputed(Protocol):
    """A stage's whole session computed again, honestly, from the inputs that it signed for. Layers are counted from the stage's
    first, steps and positions from the session's."""

    @property
    def outputs(self) -> Sequence[bytes]:
        """The payload of every step."""
        ...

    def trace(self, step0: int, n: int) -> WindowTrace:
        """Of steps [step0, step0 + n)."""
        ...

    def values(self, step: int, layer: int, op: str) -> NDArray[np.float32]:
        """What the stage commits to: [rows, width]."""
        ...

    def records(self, layer: int, head: int, length: int) -> list[bytes]:
        """The log's first `length` records."""
        ...


@dataclass(frozen=True, slots=True)
class AccusedStage:
    """What an accuser holds of a stage's part in a session.

    `exact_plan`: the model's exact.json. `receipts`, `traces`: the stage's, from its first on. `inputs`: every step's payload.
    `outputs`: the payloads that it gave where they are known, as at the last stage; else none.
    """

    manifest: Manifest
    exact_plan: bytes
    plan: Plan
    terms: Terms
    receipts: Sequence[SignedReceipt]
    traces: Sequence[WindowTrace]
    inputs: Sequence[bytes]
    outputs: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that a stage committed to and should not have. `window`: which receipt. `op`: a value of step `step` of the
    session; LOG where the log of `head` is wrong at the window's end, OUTPUT where what left the stage in the window is. `layer`:
    from the stage's first on."""

    window: int
    step: int
    layer: int
    op: str
    head: int = 0


def first_difference(
    shape: TraceShape, claimed: Sequence[WindowTrace], recomputed: Recomputed, out_roots: Sequence[bytes] = ()
) -> Difference | None:
    """Windows in order; in each the operations in the order in which they are computed, then what left the stage, where the
    receipts' `out_roots` are given, then the logs. None where all is right."""
    step0 = 0
    for window, theirs in enumerate(claimed):
        steps = len(theirs.cells) // shape.step_bytes
        theirs.check(shape, steps)
        ours = recomputed.trace(step0, steps)
        if ours.cells != theirs.cells:
            at = _first_byte(theirs.cells, ours.cells)
            step, rest = divmod(at, shape.step_bytes)
            layer, op = divmod(rest // HASH_BYTES, len(OPS))
            return Difference(window, step0 + step, layer, LOGITS if layer == shape.layers else OPS[op])
        if out_roots and payload_root(recomputed.outputs[step0 : step0 + steps]) != out_roots[window]:
            return Difference(window, step0, shape.layers - 1, OUTPUT)
        if ours.logs != theirs.logs:
            at = _first_byte(theirs.logs, ours.logs) // HASH_BYTES
            return Difference(window, step0, at // shape.kv_heads, LOG, at % shape.kv_heads)
        step0 += steps
    return None


def _first_byte(one: bytes, other: bytes) -> int:
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def accuse(accused: AccusedStage, recomputed: Recomputed, weights: WeightSource, opened: Opening | None = None) -> Evidence | None:
    """Evidence of the first thing that the stage did wrong, and None where it did nothing wrong.

    `opened`: the accused's own opening of the row with the first difference, which makes the proof small; one that does not hold,
    or is of another row, is not used. Weights are carried where the evidence then still can be passed on (GOSSIP_BYTES_MAX).
    Raises NotFoundError where `weights` lacks what the proof is about, MalformedError and VerificationError where the receipts or
    traces are not ones of this session.
    """
    shape = _case_of(accused, 0)[1].shape
    roots = [signed.receipt.out_root for signed in accused.receipts]
    difference = first_difference(shape, accused.traces, recomputed, roots)
    if difference is None:
        return None
    if opened is not None and (opened.cell.step, opened.cell.layer) == (difference.step, difference.layer):
        try:
            return accuse_opening(accused, opened, difference.op, weights)
        except (MalformedError, VerificationError):
            pass
    return with_weights(prove_difference(accused, recomputed, difference), accused.manifest, weights)


def prove_difference(accused: AccusedStage, recomputed: Recomputed, difference: Difference) -> Proof:
    """The proof of a first difference without the accused's help and without weights."""
    return _Recomputing(accused, recomputed, difference).proof()


def accuse_opening(accused: AccusedStage, opened: Opening, op: str, weights: WeightSource) -> Evidence:
    """Evidence from what the accused opened of one cell alone: value `op` of the row does not follow from the values before it.

    `op`: one of OPS, LOGITS, LOG (what the row adds to the log of the cell's head), OUTPUT. `accused.traces` lead to the roots.
    The proof is about the first element that is wrong, so that it carries one row of weights, or about one head.
    Raises VerificationError where `op` is right or the opening does not lead to what was signed for, MalformedError where it lacks
    something, NotFoundError where `weights` does.
    """
    proof = _Opened(accused, opened, op).proof()
    element = operation_verdict(proof.evidence(), weights).element
    if element is not None:
        exact = check_case(proof.case).exact
        claim = replace(proof.claim, element=element, elements=1)
        if op == ATTENTION:
            claim = replace(claim, element=element // exact.head_dim * exact.head_dim, elements=exact.head_dim)
        proof = replace(proof, claim=claim)
    return with_weights(proof, accused.manifest, weights)


def accuse_answer(
    accused: AccusedStage, answer: SignedAuditAnswer, opened: Opening, part: str, weights: WeightSource, *, sums: bool = False
) -> Evidence:
    """Evidence that an opening which the accused signed for does not lead to what its receipts say, or shows wrong sums.

    `part`: one of OPS, "x", LOG or OUTPUT; with `sums` the linear operation (one of OPS) whose sums are wrong. Raises as
    `accuse_opening` does.
    """
    body = show_answer(accused, answer, opened, part)
    if sums:
        case = check_case(body.case)
        rows = case.exact.linear_shapes().get(part, (0, 0))[0]
        element = ShownRow(case, show_roots(case, body), opened).first_wrong_sum(part, 0, rows, Weights(case, (), weights))
        body = replace(body, is_sum=1, element=element or 0)
    recorder = _Recorder(weights)
    answer_verdict(body.evidence(), recorder)
    shown = _with_rows(body.case, accused.manifest, recorder)
    return replace(body, case=shown, weights=tuple(recorder.proofs.values())).evidence()


def show_answer(accused: AccusedStage, answer: SignedAuditAnswer, opened: Opening, part: str) -> FalseResponse:
    """What shows that a part of an answer does not lead to its root, without weights."""
    return _Answered(accused, opened).body(answer, part)


def with_weights(proof: Proof, manifest: Manifest, weights: WeightSource) -> Evidence:
    """Evidence with the weights that a verdict on it takes, if it is small enough, and with the roots over their rows. Raises what
    the verdict raises."""
    recorder = _Recorder(weights)
    operation_verdict(proof.evidence(), recorder)
    bare = replace(proof, case=_with_rows(proof.case, manifest, recorder))
    whole = replace(bare, weights=tuple(recorder.proofs.values())).evidence()
    fits = len(whole.to_file()) <= GOSSIP_BYTES_MAX and len(recorder.proofs) <= WEIGHTS_MAX
    return whole if fits else bare.evidence()


def _with_rows(case: Case, manifest: Manifest, recorder: _Recorder) -> Case:
    """The case with the roots over the rows of those pieces alone that were asked for."""
    pieces = {piece for piece, _, _ in recorder.proofs}
    return replace(case, model=ModelParts.of(manifest, case.model.exact_plan, pieces))


class _Recorder:
    """Passes on weights and keeps them, so that a proof carries what its verdict asked for and nothing else."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.proofs: dict[tuple[int, int, int], WeightProof] = {}

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        proof = self._source.range(model_root, piece, start, count)
        self.proofs[piece, start, count] = proof
        return proof


def _case_of(accused: AccusedStage, window: int, layer: int = 0) -> tuple[Case, CheckedCase]:
    if window >= len(accused.receipts):
        raise NotFoundError("the stage signed no receipt for this window", "Accuse with all its receipts")
    signed = accused.receipts[window]
    # All pieces that the stage can work with, until it is known which ones the proof is about.
    stage = accused.plan.stages[signed.receipt.stage]
    pieces = {0, 1 + min(stage.start + layer, stage.end - 1), accused.manifest.layers + 1, accused.manifest.layers + 2}
    model = ModelParts.of(accused.manifest, accused.exact_plan, pieces)
    case = Case(model, accused.plan, accused.terms, signed)
    return case, check_case(case)


class _Showing:
    """Collects what a proof has to show of one window. Layers are counted in the whole model here."""

    def __init__(self, accused: AccusedStage, window: int, layer: int) -> None:
        """`layer`: of the stage, that the proof is about."""
        self._accused, self._window = accused, window
        self._case, self._checked = _case_of(accused, window, layer)
        self._trace = accused.traces[window]
        self._receipt = self._checked.receipt
        self._steps = range(self._receipt.step0, self._receipt.step0 + self._receipt.n)
        self._cells: dict[tuple[int, int], Cell] = {}
        self._rows: dict[tuple[int, int, str], Rows] = {}
        self._inputs: dict[int, Payload] = {}
        self._outputs: dict[int, Payload] = {}
        self._records: list[LogRecords] = []
        self._logs: list[LogRoot] = []
        self._previous = 0
        self._answers = b""

    def _proof(self, claim: Claim) -> Proof:
        before = [signed.receipt for signed in self._accused.receipts[: self._window]][::-1]
        return Proof(
            case=self._case,
            claim=claim,
            previous=tuple(before[: min(self._previous, PREVIOUS_MAX)]),
            answers=self._answers,
            cells=tuple(self._cells.values()),
            rows=tuple(self._rows.values()),
            inputs=tuple(self._inputs.values()),
            outputs=tuple(self._outputs.values()),
            records=tuple(self._records),
            logs=tuple(self._logs),
            weights=(),
        )

    def _show_cell(self, step: int, layer: int) -> None:
        if (step, layer) in self._cells:
            return
        shape = self._checked.shape
        leaves = [_layer_leaves(self._trace.step_cells(shape, at), shape) for at in range(self._receipt.n)]
        roots = [merkle_root(each) for each in leaves]
        at, index = step - self._receipt.step0, layer - self._checked.start
        data = self._trace.step_cells(shape, at)[index * CELL_BYTES : (index + 1) * CELL_BYTES]
        layer_path, step_path = merkle_range_proof(leaves[at], index, index + 1), merkle_range_proof(roots, at, at + 1)
        self._cells[step, layer] = Cell(step, layer, data, tuple(layer_path), tuple(step_path))

    def _show_input(self, step: int) -> None:
        self._inputs[step] = self._payload(self._accused.inputs, step)

    def _show_output(self, step: int) -> None:
        self._outputs[step] = self._payload(self._accused.outputs, step)

    def _payload(self, payloads: Sequence[bytes], step: int) -> Payload:
        leaves = [leaf_hash(payload) for payload in payloads[self._steps.start : self._steps.stop]]
        at = step - self._steps.start
        return Payload(step, payloads[step], tuple(merkle_range_proof(leaves, at, at + 1)))

    def _show_answers(self, step: int) -> None:
        """The tokens before a step, where the sampler's choice depends on them."""
        if self._accused.terms.repetition_penalty != MICRO:
            self._previous = self._window
            self._answers = b"".join(self._accused.outputs[: self._steps.start])
            for earlier in range(self._steps.start, step):
                self._show_output(earlier)

    def _log_path(self, window: int, layer: int, head: int) -> tuple[bytes, ...]:
        logs = self._accused.traces[window].logs
        roots = [logs[at : at + HASH_BYTES] for at in range(0, len(logs), HASH_BYTES)]
        number = (layer - self._checked.start) * self._checked.shape.kv_heads + head
        return tuple(merkle_range_proof(roots, number, number + 1))

    def _tokens(self, step: int) -> int:
        # What came into a later stage is not known to whoever did not compute the session again.
        if self._checked.causal:
            return self._checked.rows(step)
        return len(self._accused.inputs[step]) // self._checked.input_bytes


class _Recomputing(_Showing):
    """A whole value, whose root is wrong: what it was computed from is known, and what it should be follows from that."""

    def __init__(self, accused: AccusedStage, recomputed: Recomputed, difference: Difference) -> None:
        super().__init__(accused, difference.window, difference.layer)
        self._recomputed, self._at = recomputed, difference
        self._layer = self._checked.start + difference.layer

    def proof(self) -> Proof:
        at, step = self._at, self._at.step
        if at.op == LOG:
            self._show_log()
            return self._proof(Claim(LOG, step, self._layer, 0, 0, at.head, 0))
        if at.op == OUTPUT:
            return self._output_proof()
        self._show_cell(step, self._layer)
        if not self._checked.causal:
            self._show_input(step)
        match at.op:
            case "qkv":
                self._show_x()
            case "attention":
                self._show_keys()
            case "o":
                self._show_value(step, self._layer, ATTENTION)
                self._show_x()
            case "gate_up":
                self._show_value(step, self._layer, ATTENTION_OUT)
            case "down":
                self._show_value(step, self._layer, GATE_UP)
                self._show_value(step, self._layer, ATTENTION_OUT)
            case "logits":
                self._show_value(step, self._layer - 1, DOWN, self._tokens(step) - 1)
        return self._proof(Claim(at.op, step, self._layer, 0, 0, 0, 0))

    def _show_x(self) -> None:
        if self._at.layer:
            self._show_value(self._at.step, self._layer - 1, DOWN)
        else:
            self._show_input(self._at.step)

    def _show_value(self, step: int, layer: int, op: str, row: int = 0) -> None:
        """Rows of a value from `row` on: they are right, so they are under the accused's own op root."""
        self._show_cell(step, layer)
        index = min(layer, self._checked.end - 1) - self._checked.start
        rows = [_bytes(line) for line in self._recomputed.values(step, index, op).reshape(-1, self._checked.widths[op])]
        siblings = merkle_range_proof([leaf_hash(each) for each in rows], row, len(rows))
        self._rows[step, layer, op] = Rows(step, layer, op, row, b"".join(rows[row:]), tuple(siblings))

    def _show_keys(self) -> None:
        """The logs as they were a window before, as far as they are seen, and what the steps since then add to them."""
        checked, at, step0 = self._checked, self._at, self._steps.start
        if not checked.causal:
            self._show_value(at.step, self._layer, QKV)
            return
        for step in range(step0, at.step + 1):
            self._show_value(step, self._layer, QKV)
        seen, end = checked.exact.layers[self._layer].window, checked.position(step0)
        start = max(0, checked.position(at.step) + 1 - seen) if seen else 0
        if start < end:
            self._previous = 1
            for head in range(checked.shape.kv_heads):
                records = self._recomputed.records(at.layer, head, end)
                siblings = merkle_range_proof([leaf_hash(record) for record in records], start, end)
                path = self._log_path(self._window - 1, self._layer, head)
                data = b"".join(records[start:end])
                self._records.append(LogRecords(1, self._layer, head, start, data, tuple(siblings), path))

    def _show_log(self) -> None:
        at = self._at
        for step in self._steps:
            self._show_value(step, self._layer, QKV)
        root = self._trace.log_root(self._checked.shape, at.layer, at.head)
        log = LogRoot(self._layer, at.head, root, self._log_path(self._window, self._layer, at.head), (), ())
        if self._window:
            self._previous = 1
            length = self._accused.receipts[self._window - 1].receipt.kv_len
            peaks = merkle_peaks([leaf_hash(record) for record in self._recomputed.records(at.layer, at.head, length)])
            log = replace(log, peaks=tuple(peaks), path_before=self._log_path(self._window - 1, self._layer, at.head))
        self._logs.append(log)

    def _output_proof(self) -> Proof:
        """The token of one step, or what left the stage in one step where it is known, or else in the whole window."""
        checked, outputs, right = self._checked, self._accused.outputs, self._recomputed.outputs
        wrong = None
        if payload_root(outputs[self._steps.start : self._steps.stop]) == self._receipt.out_root:
            wrong = next(step for step in self._steps if outputs[step] != right[step])
            self._show_output(wrong)
        if checked.last and checked.causal:
            if wrong is None:
                raise NotFoundError("the tokens that the stage gave are not known", "Accuse it with the session's outputs")
            self._show_value(wrong, checked.end, LOGITS)
            self._show_answers(wrong)
            return self._proof(Claim(SAMPLE, wrong, checked.end, 0, 0, 0, 0))
        for step in self._steps if wrong is None else (wrong,):
            if not checked.causal:
                self._show_input(step)
            self._show_value(step, checked.end - 1, DOWN)
        if wrong is None:
            return self._proof(Claim(OUTPUT, self._steps.start, checked.end - 1, 0, 0, 0, 0))
        return self._proof(Claim(OUTPUT, wrong, checked.end - 1, 0, self._tokens(wrong), 0, 0))


class _Opened(_Showing):
    """One row, all of which the accused opened."""

    def __init__(self, accused: AccusedStage, opened: Opening, op: str) -> None:
        super().__init__(accused, _window_of(accused, opened.cell.step), opened.cell.layer)
        self._opened, self._op, self._step = opened, op, opened.cell.step
        self._layer = self._checked.start + opened.cell.layer
        self._is_result = opened.cell.layer >= self._checked.shape.layers
        self._row = self._tokens(self._step) - 1 if self._is_result else opened.cell.row
        _check_cell(opened.cell, self._checked, self._tokens(self._step))

    def proof(self) -> Proof:
        checked, step, layer, row = self._checked, self._step, self._layer, self._row
        if not checked.causal:
            self._show_input(step)
        if self._is_result:
            return self._result_proof()
        if len(self._opened.values) != len(OPS):
            raise MalformedError("the opening does not show every value of the row")
        if self._op == OUTPUT:
            self._outputs[step] = self._opened_payload(self._opened.output)
            self._show_row(DOWN)
            return self._proof(Claim(OUTPUT, step, layer, row, 1, 0, 0))
        if self._op == LOG:
            if not checked.causal:
                raise MalformedError("an encoder keeps no logs")
            self._show_row(QKV)
            self._show_records(checked.position(step) + row, checked.position(step) + row + 1)
            return self._proof(Claim(LOG, step, layer, row, 1, self._opened.cell.head, 0))
        element = elements = 0
        self._show_row(self._op)
        match self._op:
            case "qkv":
                self._show_x()
            case "attention":
                exact, head = checked.exact, self._opened.cell.head
                elements = exact.heads // exact.kv_heads * exact.head_dim
                element = head * elements
                self._show_row(QKV)
                if checked.causal:
                    seen, end = exact.layers[layer].window, checked.position(step) + row + 1
                    self._show_records(max(0, end - seen) if seen else 0, end)
            case "o":
                self._show_row(ATTENTION)
                self._show_x()
            case "gate_up":
                self._show_row(ATTENTION_OUT)
            case "down":
                self._show_row(GATE_UP)
                self._show_row(ATTENTION_OUT)
            case _:
                raise MalformedError(f"an opening of a row does not show {self._op!r}")
        return self._proof(Claim(self._op, step, layer, row, 1, element, elements))

    def _result_proof(self) -> Proof:
        checked, step, end = self._checked, self._step, self._checked.end
        if not checked.causal:
            self._show_context(end - 1, DOWN)
            self._show_output(step)
            return self._proof(Claim(OUTPUT, step, end - 1, 0, self._tokens(step), 0, 0))
        if len(self._opened.values) != 1:
            raise MalformedError("the opening does not show the logits")
        self._show_cell(step, end)
        self._rows[step, end, LOGITS] = Rows(step, end, LOGITS, 0, self._opened.values[0].data, ())
        if self._op == OUTPUT:
            self._show_output(step)
            self._show_answers(step)
            return self._proof(Claim(SAMPLE, step, end, 0, 0, 0, 0))
        self._show_opened(end - 1, DOWN, self._opened.x)
        return self._proof(Claim(LOGITS, step, end, 0, 1, 0, 0))

    def _show_x(self) -> None:
        if self._opened.cell.layer:
            self._show_opened(self._layer - 1, DOWN, self._opened.x)
        elif self._checked.first:
            self._show_input(self._step)
        else:
            self._inputs[self._step] = self._opened_payload(self._opened.x)

    def _show_row(self, op: str) -> None:
        if op == QKV and not self._checked.causal:
            self._show_context(self._layer, QKV)
        else:
            self._show_opened(self._layer, op, self._opened.values[OPS.index(op)])

    def _show_opened(self, layer: int, op: str, row: OpenedRow) -> None:
        self._show_cell(self._step, layer)
        siblings = _left_to_right(self._tokens(self._step), self._row, row.siblings)
        self._rows[self._step, layer, op] = Rows(self._step, layer, op, self._row, row.data, siblings)

    def _show_context(self, layer: int, op: str) -> None:
        """All rows of an encoder's text."""
        self._show_cell(self._step, layer)
        self._rows[self._step, layer, op] = Rows(self._step, layer, op, 0, b"".join(self._opened.context), ())

    def _opened_payload(self, row: OpenedRow) -> Payload:
        return Payload(self._step, row.data, _left_to_right(self._receipt.n, self._step - self._steps.start, row.siblings))

    def _show_records(self, start: int, end: int) -> None:
        """Of the cell's head, out of its log to the end of the window."""
        raw, head = self._opened.records, self._opened.cell.head
        size = record_bytes(self._checked.exact, ATTENTION in self._checked.exact.layers[self._layer].wide)
        records = [raw[at : at + size] for at in range(0, len(raw), size)]
        if len(records) != self._receipt.kv_len:
            raise MalformedError(f"the opening shows {len(records)} records of {self._receipt.kv_len}")
        siblings = merkle_range_proof([leaf_hash(record) for record in records], start, end)
        path = self._log_path(self._window, self._layer, head)
        self._records.append(LogRecords(0, self._layer, head, start, b"".join(records[start:end]), tuple(siblings), path))


class _Answered(_Showing):
    """An opening that is wrong in itself."""

    def __init__(self, accused: AccusedStage, opened: Opening) -> None:
        super().__init__(accused, _window_of(accused, opened.cell.step), opened.cell.layer)
        cell, shape = opened.cell, self._checked.shape
        layer = self._checked.start + cell.layer
        self._opened = opened
        _check_cell(cell, self._checked, self._tokens(cell.step))
        if cell.layer == shape.layers:
            raise MalformedError("the opening is not of a row of a layer")
        if not self._checked.causal:
            self._show_input(cell.step)
        for each in {max(layer - 1, self._checked.start), layer}:
            self._show_cell(cell.step, each)
        if self._checked.causal:
            root = self._trace.log_root(shape, cell.layer, cell.head)
            self._logs.append(LogRoot(layer, cell.head, root, self._log_path(self._window, layer, cell.head), (), ()))

    def body(self, answer: SignedAuditAnswer, part: str) -> FalseResponse:
        following = [signed.receipt for signed in self._accused.receipts[self._window + 1 :]]
        last = next((at for at, receipt in enumerate(following, 1) if receipt.id == answer.answer.receipt), 0)
        return FalseResponse(
            case=self._case,
            answer=answer,
            opening=self._opened.to_bytes(),
            following=tuple(following[:last]),
            part=part,
            is_sum=0,
            element=0,
            cells=tuple(self._cells.values()),
            inputs=tuple(self._inputs.values()),
            logs=tuple(self._logs),
            weights=(),
        )


def _check_cell(cell: AuditedCell, checked: CheckedCase, tokens: int) -> None:
    """That the stage has it: an opening comes from the accused."""
    if cell.row >= tokens or cell.layer > checked.shape.layers or cell.head >= checked.exact.kv_heads:
        raise MalformedError("the opening is of a cell that the stage does not have")


def _window_of(accused: AccusedStage, step: int) -> int:
    for number, signed in enumerate(accused.receipts):
        if signed.receipt.step0 <= step < signed.receipt.step0 + signed.receipt.n:
            return number
    raise NotFoundError(f"the stage signed no receipt for step {step}", "Accuse it with all its receipts")


def _bytes(values: NDArray[np.float32]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _layer_leaves(cells: bytes, shape: TraceShape) -> list[bytes]:
    """The leaves of a step's tree: a layer's op roots each, then the hash of the logits where there are any."""
    return [leaf_hash(cells[at : at + CELL_BYTES]) for at in range(0, len(cells), CELL_BYTES)]


def _left_to_right(size: int, index: int, path: Sequence[bytes]) -> tuple[bytes, ...]:
    """Siblings as `nexus.core.hashing.verify_merkle_proof` takes them, from the leaf up, in the order of a range."""
    lefts: list[bytes] = []
    rights: list[bytes] = []
    for sibling, left in zip(path, sibling_sides(size, index), strict=False):
        (lefts if left else rights).append(sibling)
    return (*reversed(lefts), *rights)
