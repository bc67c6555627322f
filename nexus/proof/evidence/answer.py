"""Answers to audits that are wrong in themselves: evidence of kind FALSE-RESPONSE.

A stage signs what it opens. Rows that do not lead to the roots in its own receipts, and integer sums that are not those of the
model's weights, are the work of no honest stage, whatever it computed in the session.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root, verify_merkle_proof
from nexus.core.keys import peer_id_of
from nexus.core.manifest import layer_name
from nexus.core.record import Record, many, nested, raw, text, uint
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import LINEARS
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.audit import OPENING_BYTES_MAX, OpenedRow, Opening, SignedAuditAnswer
from nexus.proof.evidence.case import Case, CheckedCase, check_case
from nexus.proof.evidence.exhibits import Cell, Exhibits, LogRoot, Payload
from nexus.proof.evidence.operation import PREVIOUS_MAX
from nexus.proof.evidence.record import FALSE_RESPONSE, Evidence, Verdict
from nexus.proof.evidence.weights import Weights, WeightSource
from nexus.proof.receipts import Receipt
from nexus.proof.trace import ATTENTION, ATTENTION_OUT, DOWN, GATE_UP, OPS, QKV

# What of an opening may be wrong beside the values and their sums.
X, LOG, OUTPUT = "x", "log", "output"
_OPENING_MAX = 2 * OPENING_BYTES_MAX


@dataclass(frozen=True, slots=True)
class FalseResponse(Record):
    """The body of evidence of kind FALSE-RESPONSE: one opening of a cell that the accused signed for, and what is wrong with it.

    `case`: with the receipt of the cell's window. `following`: the accused's receipts after it, in order, to the one that the
    answer is to. `part`: one of OPS, X, LOG or OUTPUT for what does not lead to its root; with `is_sum` 1 one of LINEARS, whose
    sum number `element` is wrong. `cells`, `inputs`, `logs`: the roots, and of an encoder the text, as far as they are needed.
    """

    case: Case = nested(Case)
    answer: SignedAuditAnswer = nested(SignedAuditAnswer)
    opening: bytes = raw(most=_OPENING_MAX)
    following: tuple[Receipt, ...] = many(nested(Receipt), PREVIOUS_MAX)
    part: str = text(16)
    is_sum: int = uint(1)
    element: int = uint(2**26)
    cells: tuple[Cell, ...] = many(nested(Cell), 2)
    inputs: tuple[Payload, ...] = many(nested(Payload), 1)
    logs: tuple[LogRoot, ...] = many(nested(LogRoot), 1)
    weights: tuple[WeightProof, ...] = many(nested(WeightProof), 8)

    def evidence(self) -> Evidence:
        return Evidence(1, FALSE_RESPONSE, self.case.receipt.receipt.node, self.to_bytes())


def answer_verdict(evidence: Evidence, source: WeightSource | None) -> Verdict:
    """Raises NexusError: NotFoundError where weights are missing, anything else for what does not convict."""
    body = FalseResponse.from_bytes(evidence.body)
    case, opening = check_case(body.case), Opening.from_bytes(body.opening)
    _check_answer(case, body, opening)
    cell = opening.cell
    exhibits = show_roots(case, body)
    if not case.has_step(cell.step) or cell.layer >= case.shape.layers or cell.row >= exhibits.tokens(cell.step):
        raise VerificationError("the opening is not of a row that the receipt is for")
    shown = ShownRow(case, exhibits, opening)
    if body.is_sum:
        right = shown.sum_is_right(body.part, body.element, Weights(case, body.weights, source))
        fault = f"wrong integer sums of {body.part!r}"
    else:
        right = shown.leads(body.part, body.logs)
        fault = f"other bytes for {body.part!r} than it signed for"
    if right:
        raise VerificationError(f"what the answer shows of {body.part!r} is right")
    layer = case.start + cell.layer
    return Verdict(
        accused=case.receipt.node,
        kind=FALSE_RESPONSE,
        evidence=evidence.id,
        summary=f"{peer_id_of(case.receipt.node)} answered an audit with {fault} in layer {layer}, step {cell.step}",
        session=case.receipt.session,
        model_root=case.receipt.model_root,
        stage=case.receipt.stage,
        step=cell.step,
        layer=layer,
        op=body.part,
        element=body.element if body.is_sum else None,
    )


def show_roots(case: CheckedCase, body: FalseResponse) -> Exhibits:
    exhibits = Exhibits(case, ())
    for payload in body.inputs:
        exhibits.add_input(payload)
    for cell in body.cells:
        exhibits.add_cell(cell)
    return exhibits


def _check_answer(case: CheckedCase, body: FalseResponse, opening: Opening) -> None:
    """That the accused signed for this opening, in answer to an audit of the chain of receipts that the case's is in."""
    answer, receipt = body.answer.verify(), case.receipt
    last = receipt
    for following in body.following:
        if following.prev != last.id:
            raise VerificationError("the receipts do not follow one another")
        last = following
    asked = (receipt.node, receipt.session, receipt.stage, last.id)
    if (answer.node, answer.session, answer.stage, answer.receipt) != asked or opening.id not in answer.openings:
        raise VerificationError("the answer is not to an audit of this receipt, or the opening is not in it")


class ShownRow:
    """One opening of a row, against the roots that the accused signed for."""

    def __init__(self, case: CheckedCase, exhibits: Exhibits, opening: Opening) -> None:
        self._case, self._exhibits, self._opening = case, exhibits, opening
        self._cell = opening.cell
        self._layer = case.start + opening.cell.layer
        self._rows = exhibits.tokens(opening.cell.step)

    def leads(self, part: str, logs: tuple[LogRoot, ...]) -> bool:
        """Whether a part of the opening is what was signed for."""
        case, cell, opening = self._case, self._cell, self._opening
        if part in OPS:
            # The rows of an encoder's "qkv" are shown all together.
            return (
                self._context_leads()
                if part == QKV and not case.causal
                else self._value_leads(self._layer, part, self._value(part))
            )
        if part == X and cell.layer:
            return self._value_leads(self._layer - 1, DOWN, opening.x)
        if part == X and not case.first:
            return self._payload_leads(case.receipt.in_root, opening.x)
        if part == OUTPUT and cell.layer == case.shape.layers - 1 and not case.last:
            return self._payload_leads(case.receipt.out_root, opening.output)
        if part == LOG and case.causal and len(logs) == 1 and (logs[0].layer, logs[0].head) == (self._layer, cell.head):
            return self._log_leads(logs[0])
        raise MalformedError(f"an opening of this cell shows nothing of {part!r}")

    def _value(self, op: str) -> OpenedRow:
        values = self._opening.values
        return values[OPS.index(op)] if len(values) == len(OPS) else OpenedRow(b"", ())

    def _value_leads(self, layer: int, op: str, row: OpenedRow) -> bool:
        root = self._exhibits.root(self._cell.step, layer, op)
        return len(row.data) == 4 * self._case.widths[op] and _leads(root, self._rows, self._cell.row, row)

    def _payload_leads(self, root: bytes, row: OpenedRow) -> bool:
        receipt = self._case.receipt
        return _leads(root, receipt.n, self._cell.step - receipt.step0, row)

    def _context_leads(self) -> bool:
        context = self._opening.context
        root = self._exhibits.root(self._cell.step, self._layer, QKV)
        return len(context) == self._rows and merkle_root([leaf_hash(row) for row in context]) == root

    def _log_leads(self, log: LogRoot) -> bool:
        self._exhibits.check_log_root(log)
        raw_log, size = self._opening.records, self._exhibits.record_bytes(self._layer)
        if len(raw_log) != self._case.receipt.kv_len * size:
            return False
        return merkle_root([leaf_hash(raw_log[at : at + size]) for at in range(0, len(raw_log), size)]) == log.root

    def sum_is_right(self, op: str, element: int, weights: Weights) -> bool:
        """Whether one integer sum is that of the input that the opening shows and the model's weights."""
        return self.first_wrong_sum(op, element, 1, weights) is None

    def first_wrong_sum(self, op: str, first: int, count: int, weights: Weights) -> int | None:
        """Of the sums [first, first + count) of a linear operation; None where all are right."""
        opening, plan = self._opening, self._case.exact
        if op not in LINEARS or len(opening.sums) != len(LINEARS):
            raise MalformedError(f"the opening shows no sums of {op!r}")
        wide = op in plan.layers[self._layer].wide
        rows, total = 2 if wide else 1, plan.linear_shapes()[op][0]
        shown = opening.sums[LINEARS.index(op)].data
        if first + count > total:
            raise VerificationError(f"{op!r} has {total} sums")
        if len(shown) != 4 * rows * total:
            return first
        given, said = self._given(op, weights), np.frombuffer(shown, "<i4").reshape(rows, total)
        for at, block in weights.linear(layer_name(self._layer), op, first, count):
            _, right, _ = ops.linear_sums(given, block.weight, wide=wide)
            wrong = np.flatnonzero((said[:, at : at + len(block.scale)] != right).any(0))
            if len(wrong):
                return at + int(wrong[0])
        return None

    def _given(self, op: str, weights: Weights) -> NDArray[np.float32]:
        """What goes into a linear operation, [1, depth], out of what the opening shows, which must lead to the roots."""
        plan, source = self._case.exact, {ATTENTION_OUT: ATTENTION, DOWN: GATE_UP, GATE_UP: ATTENTION_OUT}.get(op)
        if source is None and not self._cell.layer:
            raise VerificationError("sums of the first operation of a stage are shown wrong by the values themselves")
        layer, value, row = (
            (self._layer - 1, DOWN, self._opening.x) if source is None else (self._layer, source, self._value(source))
        )
        if not self._value_leads(layer, value, row):
            raise VerificationError("what the sums are of is not what was signed for: that is the fault to show")
        given = np.frombuffer(row.data, "<f4").astype(np.float32)[None]
        if op in (ATTENTION_OUT, DOWN):
            return given
        x = np.ascontiguousarray(given[:, -plan.hidden :])
        if not self._case.causal:
            return x
        name = "attention_norm" if op == QKV else "mlp_norm"
        return ops.norm(plan, x, weights.vector(layer_name(self._layer), f"{name}.weight"))


def _leads(root: bytes, size: int, index: int, row: OpenedRow) -> bool:
    try:
        verify_merkle_proof(root, size, index, leaf_hash(row.data), row.siblings)
    except VerificationError:
        return False
    return True
