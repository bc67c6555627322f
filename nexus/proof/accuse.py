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

from nexus.core.errors import NotFoundError
from nexus.core.hashing import HASH_BYTES, leaf_hash, merkle_peaks, merkle_range_proof, merkle_root
from nexus.core.manifest import Manifest
from nexus.core.plan import Plan
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.audit import Opening
from nexus.proof.evidence.case import Case, CheckedCase, check_case
from nexus.proof.evidence.exhibits import Cell, LogRecords, LogRoot, Payload, Rows
from nexus.proof.evidence.operation import LOG, OUTPUT, PREVIOUS_MAX, SAMPLE, Claim, Proof, operation_verdict
from nexus.proof.evidence.record import GOSSIP_BYTES_MAX, Evidence
from nexus.proof.evidence.weights import WeightSource
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

    `opened`: the accused's own values at the first difference, which make the proof small; those that do not hold are not used.
    Weights are carried where the evidence then still can be passed on (GOSSIP_BYTES_MAX). Raises NotFoundError where `weights` lacks
    what the proof is about, MalformedError and VerificationError where the receipts or traces are not ones of this session.
    """
    shape = _case_of(accused, 0)[1].shape
    roots = [signed.receipt.out_root for signed in accused.receipts]
    difference = first_difference(shape, accused.traces, recomputed, roots)
    if difference is None:
        return None
    build = _Builder(accused, recomputed, difference)
    if opened is not None and difference.op in OPS:
        small = build.from_opened(opened)
        if small is not None:
            return with_weights(small, weights)
    return with_weights(build.without_help(), weights)


def with_weights(proof: Proof, weights: WeightSource) -> Evidence:
    """Evidence with the weights that a verdict on it takes, if it is small enough. Raises what the verdict raises."""
    recorder = _Recorder(weights)
    bare = proof.evidence()
    operation_verdict(bare, recorder)
    whole = replace(proof, weights=tuple(recorder.proofs.values())).evidence()
    return whole if len(whole.to_file()) <= GOSSIP_BYTES_MAX else bare


class _Recorder:
    """Passes on weights and keeps them, so that a proof carries what its verdict asked for and nothing else."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.proofs: dict[tuple[int, int, int], WeightProof] = {}

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        proof = self._source.range(model_root, piece, start, count)
        self.proofs[piece, start, count] = proof
        return proof


def _case_of(accused: AccusedStage, window: int) -> tuple[Case, CheckedCase]:
    if window >= len(accused.receipts):
        raise NotFoundError("the stage signed no receipt for this window", "Accuse with all its receipts")
    case = Case(accused.manifest, accused.exact_plan, accused.plan, accused.terms, accused.receipts[window])
    return case, check_case(case)


class _Builder:
    """Collects what a proof has to show."""

    def __init__(self, accused: AccusedStage, recomputed: Recomputed, difference: Difference) -> None:
        self._accused, self._recomputed, self._at = accused, recomputed, difference
        self._case, self._checked = _case_of(accused, difference.window)
        self._trace = accused.traces[difference.window]
        self._receipt = self._checked.receipt
        self._layer = self._checked.start + difference.layer
        self._reset()

    def _reset(self) -> None:
        self._cells: dict[tuple[int, int], Cell] = {}
        self._rows: dict[tuple[int, int, str, int], Rows] = {}
        self._inputs: dict[int, Payload] = {}
        self._outputs: dict[int, Payload] = {}
        self._records: list[LogRecords] = []
        self._logs: list[LogRoot] = []
        self._previous = 0
        self._answers = b""

    def without_help(self) -> Proof:
        """The whole value, whose root is wrong."""
        self._reset()
        at = self._at
        match at.op:
            case "log":
                self._show_log()
                return self._proof(Claim(LOG, at.step, self._layer, 0, 0, at.head, 0))
            case "output":
                return self._output()
            case _:
                self._cell(at.step, self._layer)
                self._show_inputs(0, self._size(at.step), range(self._checked.shape.kv_heads))
                return self._proof(Claim(at.op, at.step, self._layer, 0, 0, 0, 0))

    def from_opened(self, opened: Opening) -> Proof | None:
        """One element of one row, or one head; None where the row that was opened is not the wrong one."""
        at, exact = self._at, self._checked.exact
        if (opened.cell.step, opened.cell.layer) != (at.step, at.layer) or len(opened.values) != len(OPS):
            return None
        row, shown = opened.cell.row, opened.values[OPS.index(at.op)]
        right = self._recomputed.values(at.step, at.layer, at.op)
        if row >= len(right) or len(shown.data) != right[row].nbytes:
            return None
        said, due = (np.frombuffer(data, "<u4") for data in (shown.data, _bytes(right[row])))
        wrong = np.flatnonzero(said != due)
        if not len(wrong):
            return None
        self._reset()
        element, count = int(wrong[0]), 1
        heads = range(0)
        if at.op == ATTENTION:
            head = element // exact.head_dim
            element, count = head * exact.head_dim, exact.head_dim
            group = head * exact.kv_heads // exact.heads
            heads = range(group, group + 1)
        self._cell(at.step, self._layer)
        siblings = tuple(_left_to_right(len(right), row, shown.siblings))
        self._rows[at.step, self._layer, at.op, row] = Rows(at.step, self._layer, at.op, row, shown.data, siblings)
        self._show_inputs(row, 1, heads)
        return self._proof(Claim(at.op, at.step, self._layer, row, 1, element, count))

    # --- what an operation works on ---------------------------------------------------------------------------------------------

    def _show_inputs(self, row: int, count: int, heads: range) -> None:
        """Of the wrong operation, for rows [row, row + count). `heads`: the key-value heads that attention reads."""
        step, layer = self._at.step, self._layer
        if not self._checked.causal:
            self._input(step)
        match self._at.op:
            case "qkv":
                self._show_x(row, count)
            case "attention":
                self._show_keys(row, count, heads)
            case "o":
                self._value(step, layer, ATTENTION, row, count)
                self._show_x(row, count)
            case "gate_up":
                self._value(step, layer, ATTENTION_OUT, row, count)
            case "down":
                self._value(step, layer, GATE_UP, row, count)
                self._value(step, layer, ATTENTION_OUT, row, count)
            case "logits":
                self._value(step, layer - 1, DOWN, self._size(step) - 1, 1)

    def _show_x(self, row: int, count: int) -> None:
        if self._at.layer:
            self._value(self._at.step, self._layer - 1, DOWN, row, count)
        else:
            self._input(self._at.step)

    def _show_keys(self, row: int, count: int, heads: range) -> None:
        """The logs as they were a window before, as far as they are seen, and what the steps since then add to them."""
        checked, step0 = self._checked, self._receipt.step0
        if not checked.causal:
            self._value(self._at.step, self._layer, QKV, 0, self._size(self._at.step))
            return
        for step in range(step0, self._at.step + 1):
            self._value(step, self._layer, QKV, 0, self._size(step))
        seen = checked.exact.layers[self._layer].window
        first = checked.position(self._at.step) + row
        start, end = max(0, first + 1 - seen) if seen else 0, checked.position(step0)
        if step0 and start < end:
            self._previous = 1
            for head in heads:
                self._log_records(head, start, end)

    def _show_log(self) -> None:
        receipt, at = self._receipt, self._at
        for step in range(receipt.step0, receipt.step0 + receipt.n):
            self._value(step, self._layer, QKV, 0, self._size(step))
        shape = self._checked.shape
        peaks: list[bytes] = []
        path_before: tuple[bytes, ...] = ()
        if receipt.step0:
            self._previous = 1
            length = self._accused.receipts[at.window - 1].receipt.kv_len
            peaks = merkle_peaks([leaf_hash(record) for record in self._recomputed.records(at.layer, at.head, length)])
            path_before = self._log_path(at.window - 1, at.head)
        root = self._trace.log_root(shape, at.layer, at.head)
        self._logs.append(LogRoot(self._layer, at.head, root, self._log_path(at.window, at.head), tuple(peaks), path_before))

    def _output(self) -> Proof:
        """The token of one step, or what left the stage in one step where it is known, or else in the whole window."""
        at, receipt, checked = self._at, self._receipt, self._checked
        steps = range(receipt.step0, receipt.step0 + receipt.n)
        known = self._accused.outputs[steps.start : steps.stop]
        wrong = None
        if payload_root(known) == receipt.out_root:
            wrong = next(step for step in steps if self._accused.outputs[step] != self._recomputed.outputs[step])
            self._output_payload(wrong)
        if checked.last and checked.causal:
            if wrong is None:
                raise NotFoundError("the tokens that the stage gave are not known", "Accuse with the session's outputs")
            self._value(wrong, checked.end, LOGITS, 0, 1)
            if self._accused.terms.repetition_penalty != MICRO:
                self._previous = at.window
                self._answers = b"".join(self._accused.outputs[: receipt.step0])
                for step in range(receipt.step0, wrong):
                    self._output_payload(step)
            return self._proof(Claim(SAMPLE, wrong, checked.end, 0, 0, 0, 0))
        for step in steps if wrong is None else (wrong,):
            if not checked.causal:
                self._input(step)
            self._value(step, checked.end - 1, DOWN, 0, self._size(step))
        return self._proof(Claim(OUTPUT, at.step if wrong is None else wrong, checked.end - 1, 0, int(wrong is not None), 0, 0))

    # --- openings -----------------------------------------------------------------------------------------------------------------

    def _proof(self, claim: Claim) -> Proof:
        before = [signed.receipt for signed in self._accused.receipts[: self._at.window]][::-1]
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

    def _size(self, step: int) -> int:
        return len(self._accused.inputs[step]) // self._checked.input_bytes

    def _cell(self, step: int, layer: int) -> None:
        shape, receipt = self._checked.shape, self._receipt
        cells = [self._trace.step_cells(shape, at) for at in range(receipt.n)]
        leaves = [_layer_leaves(each, shape) for each in cells]
        roots = [merkle_root(each) for each in leaves]
        at, index = step - receipt.step0, layer - self._checked.start
        data = cells[at][index * CELL_BYTES : (index + 1) * CELL_BYTES]
        self._cells[step, layer] = Cell(
            step,
            layer,
            data,
            tuple(merkle_range_proof(leaves[at], index, index + 1)),
            tuple(merkle_range_proof(roots, at, at + 1)),
        )

    def _value(self, step: int, layer: int, op: str, row: int, count: int) -> None:
        """Rows of a value that is right, under the accused's own op root."""
        if (step, layer) not in self._cells:
            self._cell(step, layer)
        values = self._recomputed.values(step, min(layer, self._checked.end - 1) - self._checked.start, op)
        rows = [_bytes(line) for line in values]
        siblings = merkle_range_proof([leaf_hash(each) for each in rows], row, row + count)
        self._rows[step, layer, op, row] = Rows(step, layer, op, row, b"".join(rows[row : row + count]), tuple(siblings))

    def _input(self, step: int) -> None:
        self._inputs[step] = self._payload(self._accused.inputs, step)

    def _output_payload(self, step: int) -> None:
        self._outputs[step] = self._payload(self._accused.outputs, step)

    def _payload(self, payloads: Sequence[bytes], step: int) -> Payload:
        step0, n = self._receipt.step0, self._receipt.n
        leaves = [leaf_hash(payload) for payload in payloads[step0 : step0 + n]]
        return Payload(step, payloads[step], tuple(merkle_range_proof(leaves, step - step0, step - step0 + 1)))

    def _log_records(self, head: int, start: int, end: int) -> None:
        """Records of the window before, under its log root."""
        layer = self._at.layer
        records = self._recomputed.records(layer, head, end)
        siblings = merkle_range_proof([leaf_hash(record) for record in records], start, end)
        path = self._log_path(self._at.window - 1, head)
        data = b"".join(records[start:end])
        self._records.append(LogRecords(1, self._layer, head, start, data, tuple(siblings), path))

    def _log_path(self, window: int, head: int) -> tuple[bytes, ...]:
        logs = self._accused.traces[window].logs
        roots = [logs[at : at + HASH_BYTES] for at in range(0, len(logs), HASH_BYTES)]
        number = self._at.layer * self._checked.shape.kv_heads + head
        return tuple(merkle_range_proof(roots, number, number + 1))


def _bytes(values: NDArray[np.float32]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _layer_leaves(cells: bytes, shape: TraceShape) -> list[bytes]:
    """The leaves of a step's tree."""
    return [leaf_hash(cells[at : at + CELL_BYTES]) for at in range(0, len(cells), CELL_BYTES)]


def _left_to_right(size: int, index: int, path: Sequence[bytes]) -> list[bytes]:
    """Siblings as `nexus.core.hashing.verify_merkle_proof` takes them, from the leaf up, in the order of a range."""
    sides, low, high = [], 0, size
    while high - low > 1:
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        sides.append(index >= middle)
        low, high = (middle, high) if index >= middle else (low, middle)
    lefts = [sibling for sibling, left in zip(path, reversed(sides), strict=False) if left]
    rights = [sibling for sibling, left in zip(path, reversed(sides), strict=False) if not left]
    return [*reversed(lefts), *rights]
