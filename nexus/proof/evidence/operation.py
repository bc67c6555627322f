"""One operation done again on what the accused committed to: evidence of kinds OP and KV.

A claim names rows of a step and elements of them. They are computed from the values committed to before them and from the weights
under the model's root, and compared byte by byte with what was committed to. Where the accused did not open its rows, the whole
value is computed and its root compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import appended_roots, leaf_hash
from nexus.core.keys import peer_id_of
from nexus.core.manifest import EMBEDDING, HEAD, LAYERS_MAX, layer_name
from nexus.core.record import Record, many, nested, raw, text, uint
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import ATTENTION as WIDE_ATTENTION
from nexus.proof.arithmetic.plan import HEAD_OP
from nexus.proof.arithmetic.rows import EMBED, WeightProof, rope_table
from nexus.proof.arithmetic.sampler import Sampling, sample_exact
from nexus.proof.arithmetic.tables import ROPE_FINE
from nexus.proof.evidence.case import Case, CheckedCase, check_case
from nexus.proof.evidence.exhibits import POSITION_MAX, Cell, Exhibits, LogRecords, LogRoot, Payload, Rows
from nexus.proof.evidence.record import KV, OP, Evidence, Verdict
from nexus.proof.evidence.weights import Weights, WeightSource
from nexus.proof.receipts import MICRO, STEPS_MAX, Receipt, payload_root, tokens_from_bytes, tokens_to_bytes
from nexus.proof.trace import ATTENTION, ATTENTION_OUT, DOWN, GATE_UP, LOGITS, QKV, op_root_of

# Claims beside those about a value (`nexus.proof.trace`): what leaves the stage, and the logs of keys and values.
SAMPLE, OUTPUT, LOG, APPEND = "sample", "output", "log", "append"
KV_CLAIMS = (LOG, APPEND)
# Of one verdict, in multiplications of a matrix product: some six seconds of one core (docs/evidence.md, "Bounds").
WORK_MAX = 1 << 37
# What else takes time, in the same unit: a weight that is read, a query of one head and each position that it sees, a record of
# keys and values, a token's embedding.
_WEIGHT_WORK, _HEAD_WORK, _SEEN_WORK, _RECORD_WORK, _TOKEN_WORK = 32, 1 << 21, 1 << 10, 1 << 17, 1 << 20
# Of a value that is computed whole, in numbers.
NUMBERS_MAX = 1 << 25
PREVIOUS_MAX = 4096
# Of the steps of a window and two layers; of each some values; of two logs per head; of a prompt's tokens in the embedding.
CELLS_MAX, ROWS_MAX, RECORDS_MAX, WEIGHTS_MAX = 256, 256, 1024, 4096

Array = NDArray[np.float32]
# Keys [positions, head size], their scales, values and theirs.
Keys = tuple[NDArray[np.integer[Any]], Array, NDArray[np.integer[Any]], Array]


@dataclass(frozen=True, slots=True)
class Claim(Record):
    """What is said to be wrong: of value `op` of a layer in a step the elements [element, element + elements) of the rows
    [row, row + rows). No `elements` are all of a row; no `rows` are all of a step, which were not opened: then their root is wrong.

    `layer`: of the whole model. SAMPLE and OUTPUT: the payload of the step; of OUTPUT these rows of it, or with no `rows` that of
    some step of the window. LOG: the record of row `row` for key-value head `element`; with no `rows` the root of that log.
    APPEND: the record of position `row` is not what it was a window before.
    """

    op: str = text(16)
    step: int = uint(STEPS_MAX)
    layer: int = uint(LAYERS_MAX)
    row: int = uint(POSITION_MAX)
    rows: int = uint(POSITION_MAX)
    element: int = uint(2**26)
    elements: int = uint(2**26)


@dataclass(frozen=True, slots=True)
class Proof(Record):
    """The body of evidence of kinds OP and KV.

    `previous`: the accused's receipts before the case's, the newest first. `answers`: the tokens of all steps before the window,
    where the sampler's choice depends on them. The rest are openings (`nexus.proof.evidence.exhibits`) and weights.
    """

    case: Case = nested(Case)
    claim: Claim = nested(Claim)
    previous: tuple[Receipt, ...] = many(nested(Receipt), PREVIOUS_MAX)
    answers: bytes = raw(most=4 * STEPS_MAX)
    cells: tuple[Cell, ...] = many(nested(Cell), CELLS_MAX)
    rows: tuple[Rows, ...] = many(nested(Rows), ROWS_MAX)
    inputs: tuple[Payload, ...] = many(nested(Payload), 64)
    outputs: tuple[Payload, ...] = many(nested(Payload), 64)
    records: tuple[LogRecords, ...] = many(nested(LogRecords), RECORDS_MAX)
    logs: tuple[LogRoot, ...] = many(nested(LogRoot), 1)
    weights: tuple[WeightProof, ...] = many(nested(WeightProof), WEIGHTS_MAX)

    @property
    def kind(self) -> str:
        return KV if self.claim.op in KV_CLAIMS else OP

    def evidence(self) -> Evidence:
        return Evidence(1, self.kind, self.case.receipt.receipt.node, self.to_bytes())


def operation_verdict(evidence: Evidence, source: WeightSource | None) -> Verdict:
    """Raises NexusError: NotFoundError where weights are missing, anything else for what does not convict."""
    proof = Proof.from_bytes(evidence.body)
    if proof.kind != evidence.kind:
        raise MalformedError(f"a proof of {proof.claim.op!r} is not of kind {evidence.kind}")
    case = check_case(proof.case)
    exhibits = show(case, proof)
    weights = Weights(case, proof.weights, source)
    with np.errstate(all="ignore"):  # what is not a number is refused where it comes up
        fault = Recomputation(case, exhibits, weights).fault(proof)
    if fault is None:
        raise VerificationError(f"{proof.claim.op!r} is right, where the proof says that it is not")
    receipt, claim = case.receipt, proof.claim
    return Verdict(
        accused=receipt.node,
        kind=evidence.kind,
        evidence=evidence.id,
        summary=f"{peer_id_of(receipt.node)} {fault.text}",
        session=receipt.session,
        model_root=receipt.model_root,
        stage=receipt.stage,
        step=claim.step,
        layer=None if claim.op in (SAMPLE, OUTPUT, LOGITS) else claim.layer,
        op=claim.op,
        element=fault.element,
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """What the accused did, in words. `element`: of the row that was opened, the first wrong one."""

    text: str
    element: int | None = None


def show(case: CheckedCase, proof: Proof) -> Exhibits:
    """All openings of a proof, checked."""
    exhibits = Exhibits(case, proof.previous)
    for payload in proof.inputs:
        exhibits.add_input(payload)
    for payload in proof.outputs:
        exhibits.add_output(payload)
    for cell in proof.cells:
        exhibits.add_cell(cell)
    for rows in proof.rows:
        exhibits.add_rows(rows)
    for records in proof.records:
        exhibits.add_records(records)
    return exhibits


class Recomputation:
    """What an honest stage would have committed to, given what the accused committed to before."""

    def __init__(self, case: CheckedCase, exhibits: Exhibits, weights: Weights) -> None:
        self._case, self._exhibits, self._weights = case, exhibits, weights
        self._plan = case.exact
        self._tables = ops.Tables()
        self._work = 0
        self._computed: dict[tuple[int, int, int], ops.Heads] = {}

    def fault(self, proof: Proof) -> Fault | None:
        """What the accused did; None where it did right."""
        claim = proof.claim
        match claim.op:
            case "sample":
                return self._sample_fault(claim.step, proof.answers)
            case "output":
                return self._output_fault(claim)
            case "log":
                return self._log_fault(claim, proof.logs)
            case "append":
                return self._append_fault(claim)
            case _:
                return self._value_fault(claim)

    # --- values -------------------------------------------------------------------------------------------------------------

    def _value_fault(self, claim: Claim) -> Fault | None:
        case, exhibits = self._case, self._exhibits
        layers = range(case.end, case.end + 1) if claim.op == LOGITS else range(case.start, case.end)
        if claim.op not in case.widths or claim.layer not in layers or not case.has_step(claim.step):
            raise VerificationError("the receipt commits to no such value")
        size, width = exhibits.rows_committed(claim.step, claim.op), case.widths[claim.op]
        rows, elements = claim.rows or size, claim.elements or width
        if claim.row + rows > size or claim.element + elements > width or (not claim.rows and (claim.row or claim.elements)):
            raise VerificationError(f"{claim.op!r} has {size} rows of {width}")
        part = _Part(claim.step, claim.layer, claim.row, rows, claim.element, elements)
        self._bound(rows, elements)
        right = self._right(claim.op, part)
        if not np.isfinite(right).all():
            raise VerificationError("an honest node stops at values that are not numbers, and so does this proof")
        where = f"in step {claim.step}" if claim.op == LOGITS else f"in layer {claim.layer}, step {claim.step}"
        lines = [line.tobytes() for line in right.astype("<f4", copy=False)]
        if not claim.rows:
            wrong = op_root_of(lines) != exhibits.root(claim.step, claim.layer, claim.op)
            return Fault(f"computed {claim.op!r} wrongly {where}") if wrong else None
        for row, line in enumerate(lines, claim.row):
            said = exhibits.committed(claim.step, claim.layer, claim.op, row)[4 * part.element : 4 * (part.element + elements)]
            if said != line:
                at = next(at for at in range(elements) if said[4 * at : 4 * at + 4] != line[4 * at : 4 * at + 4])
                got, due = (np.frombuffer(each, "<f4")[at] for each in (said, line))
                element = part.element + at
                return Fault(f"computed element {element} of {claim.op!r} wrongly {where}: {got!s} where {due!s} is right", element)
        return None

    def _right(self, op: str, part: _Part) -> Array:
        """What an honest stage commits to: float32 [rows, elements]."""
        match op:
            case "qkv":
                return self._qkv(part)
            case "attention":
                return self._attention(part)
            case "o":
                return self._attention_out(part)
            case "gate_up":
                return self._gate_up(part)
            case "down":
                return self._down(part)
            case _:
                return self._logits(part)

    def _bound(self, rows: int, elements: int) -> None:
        if rows * elements > NUMBERS_MAX:
            raise VerificationError(f"{rows} rows of {elements} are more than one proof may be about")

    def _spend(self, multiplications: int) -> None:
        """Before the work is done."""
        self._work += multiplications
        if self._work > WORK_MAX:
            raise VerificationError(f"the proof asks for more than {WORK_MAX} multiplications, which no verdict may cost")

    def _qkv(self, part: _Part) -> Array:
        x = self._before(part.step, part.layer, part.row, part.rows)
        if self._case.causal:
            x = self._norm(part.layer, "attention_norm", x)
        return self._layer_product(part, QKV, x)

    def _attention(self, part: _Part) -> Array:
        """Of whole heads."""
        size = self._plan.head_dim
        if part.element % size or part.elements % size:
            raise VerificationError("attention is done again by whole heads")
        heads = range(part.element // size, part.end // size)
        return self._attended(part, heads)

    def _attention_out(self, part: _Part) -> Array:
        attended = self._exhibits.values(part.step, part.layer, ATTENTION, part.row, part.rows)
        return self._block_end(part, ATTENTION_OUT, attended, lambda: self._before(part.step, part.layer, part.row, part.rows))

    def _gate_up(self, part: _Part) -> Array:
        x = self._middle(part)
        if self._case.causal:
            x = self._norm(part.layer, "mlp_norm", x)
        up = self._layer_product(part, GATE_UP, x, self._plan.ffn if self._plan.gated else 0)
        gate = self._layer_product(part, GATE_UP, x) if self._plan.gated else None
        return ops.activation(self._plan, gate, up, self._tables)

    def _down(self, part: _Part) -> Array:
        hidden = self._exhibits.values(part.step, part.layer, GATE_UP, part.row, part.rows)
        return self._block_end(part, DOWN, hidden, lambda: self._middle(part))

    def _block_end(self, part: _Part, op: str, inner: Array, residual: Callable[[], Array]) -> Array:
        """What ends a half of a layer: the linear, and where a norm follows it, the linear's result and then x."""
        plan, width = self._plan, self._plan.hidden
        if not plan.norm_after_linear:
            return residual()[:, part.element : part.end] + self._layer_product(part, op, inner)
        if part.end <= width:
            return self._layer_product(part, op, inner)
        if part.element >= width:
            y = self._exhibits.values(part.step, part.layer, op, part.row, part.rows)[:, :width]
            return self._after(part.layer, op, residual(), y)[:, part.element - width : part.end - width]
        if part.elements < 2 * width:
            raise VerificationError("a range of elements is of what the linear gives or of x, or is all")
        y = self._layer_product(_Part(part.step, part.layer, part.row, part.rows, 0, width), op, inner)
        return np.concatenate((y, self._after(part.layer, op, residual(), y)), 1)

    def _after(self, layer: int, op: str, x: Array, y: Array) -> Array:
        half = "attention" if op == ATTENTION_OUT else "mlp"
        name = f"post_{half}_norm" if self._plan.causal else f"{half}_norm"
        return ops.after_linear(self._plan, x, y, self._norm_weights(layer_name(layer), name))

    def _logits(self, part: _Part) -> Array:
        plan, end = self._plan, self._case.end
        x = self._exhibits.values(part.step, end - 1, DOWN, self._exhibits.tokens(part.step) - 1, 1)[:, -plan.hidden :]
        x = ops.norm(plan, x, *self._norm_weights(HEAD, "norm"))
        piece, name = (EMBEDDING, EMBED) if plan.tied else (HEAD, HEAD_OP)
        return ops.cap_logits(plan, self._product(piece, name, x, part.element, part.elements, plan.wide_head), self._tables)

    def _before(self, step: int, layer: int, row: int, count: int) -> Array:
        """x before a layer: as the layer before committed to it, or as it came into the stage."""
        case, exhibits, width = self._case, self._exhibits, self._plan.hidden
        if layer > case.start:
            return exhibits.values(step, layer - 1, DOWN, row, count)[:, -width:]
        payload = exhibits.input(step)[row * case.input_bytes : (row + count) * case.input_bytes]
        if case.first:
            return self._embedded(tokens_from_bytes(payload), row)
        x = np.frombuffer(payload, "<f4").astype(np.float32, copy=False).reshape(count, width)
        if not np.isfinite(x).all():
            raise VerificationError("an honest node takes no input that is not all numbers")
        return x

    def _middle(self, part: _Part) -> Array:
        """x between a layer's attention and its MLP."""
        values = self._exhibits.values(part.step, part.layer, ATTENTION_OUT, part.row, part.rows)
        return values[:, -self._plan.hidden :]

    def _norm(self, layer: int, name: str, x: Array) -> Array:
        return ops.norm(self._plan, x, *self._norm_weights(layer_name(layer), name))

    def _norm_weights(self, piece: str, name: str) -> tuple[Array, Array | None]:
        weight = self._weights.vector(piece, f"{name}.weight")
        return weight, None if self._plan.causal else self._weights.vector(piece, f"{name}.bias")

    def _layer_product(self, part: _Part, op: str, x: Array, offset: int = 0) -> Array:
        wide = op in self._plan.layers[part.layer].wide
        return self._product(layer_name(part.layer), op, x, offset + part.element, part.elements, wide)

    def _product(self, piece: str, name: str, x: Array, first: int, count: int, wide: bool) -> Array:
        """Rows [first, first + count) of a linear part, applied to x."""
        depth = self._weights.section(piece, name).depth
        self._spend(count * depth * (len(x) * (2 if wide else 1) + _WEIGHT_WORK))
        self._bound(len(x), count)
        out = np.empty((len(x), count), np.float32)
        for at, rows in self._weights.linear(piece, name, first, count):
            out[:, at - first : at - first + len(rows.scale)] = ops.linear(x, rows.weight, rows.scale, rows.bias, wide)
        return out

    def _embedded(self, ids: Sequence[int], first: int) -> Array:
        """Token ids at positions from `first` on, at the first stage."""
        plan, weights = self._plan, self._weights
        # Four bytes of a prompt become a whole row: of a model wide enough some kilobytes of evidence would take all memory.
        self._bound(len(ids), plan.hidden)
        if max(ids) >= plan.vocab:
            raise VerificationError("an honest node reads no token that the model does not know")
        self._spend(len(ids) * _TOKEN_WORK)
        rows = {}
        for token in set(ids):
            ((_, rows[token]),) = weights.linear(EMBEDDING, EMBED, token, 1)
        weight = np.concatenate([rows[token].weight for token in ids])
        scale = np.concatenate([rows[token].scale for token in ids])
        if self._case.causal:
            return ops.embed(plan, weight, scale)
        positions = np.stack([weights.row(EMBEDDING, "position.weight", first + at) for at in range(len(ids))])
        kind = weights.vector(EMBEDDING, "type.weight")
        return ops.embed(plan, weight, scale, positions, kind, self._norm_weights(EMBEDDING, "embed_norm"))

    # --- attention ----------------------------------------------------------------------------------------------------------

    def _attended(self, part: _Part, heads: range) -> Array:
        plan, layer = self._plan, self._plan.layers[part.layer]
        first = self._case.position(part.step) + part.row
        size, each = plan.head_dim, plan.heads // plan.kv_heads
        out = np.empty((part.rows, len(heads) * size), np.float32)
        own = self._heads(part.step, part.layer, part.row, part.rows)
        end = first + part.rows if self._case.causal else self._exhibits.tokens(part.step)
        start = max(0, first + 1 - layer.window) if layer.window else 0
        self._spend(part.rows * len(heads) * (_HEAD_WORK + (end - start) * (2 * size + _SEEN_WORK)))
        for group in sorted({head // each for head in heads}):
            k, sk, v, sv = self._keys(part, group, start, end)
            for row in range(part.rows):
                upto = (first + row + 1 if self._case.causal else end) - start
                since = max(0, upto - layer.window) if layer.window else 0
                seen = slice(since, upto)
                for head in (head for head in heads if head // each == group):
                    at, q, sq = (head - heads.start) * size, own.q[row, head], own.sq[row, head]
                    out[row, at : at + size] = ops.attend_head(
                        plan, layer, q, sq, k[seen], sk[seen], v[seen], sv[seen], self._tables
                    )
        return out

    def _heads(self, step: int, layer: int, row: int, count: int) -> ops.Heads:
        """Queries, keys and values of rows of a step, from the value "qkv" that was committed to."""
        plan, weights, piece = self._plan, self._weights, layer_name(layer)
        y = self._exhibits.values(step, layer, QKV, row, count)
        norms = [weights.vector(piece, f"{name}.weight") if plan.qk_norm else None for name in ("q_norm", "k_norm")]
        first = self._case.position(step) + row
        positions = range(first, first + count)
        rope = None
        if plan.ropes:
            number = plan.layers[layer].rope
            coarse = weights.table(rope_table(number, "coarse"), [position // ROPE_FINE for position in positions])
            fine = weights.table(rope_table(number, "fine"), [position % ROPE_FINE for position in positions])
            rope = (coarse, fine)
        return ops.qkv_heads(plan, plan.layers[layer], y, norms[0], norms[1], rope)

    def _keys(self, part: _Part, group: int, start: int, end: int) -> Keys:
        """Keys, their scales, values and theirs of positions [start, end) of one key-value head."""
        wide = WIDE_ATTENTION in self._plan.layers[part.layer].wide
        exhibits = self._exhibits
        if not self._case.causal:
            records = self._own_records(part.step, part.layer, group, end)
        elif exhibits.shows_log(part.layer, group):
            records = exhibits.records(0, part.layer, group, start, end)
        else:
            # Without the accused's help: what it signed for a window before, and what follows from its values since.
            opened = self._case.position(self._case.receipt.step0)
            records = exhibits.records(1, part.layer, group, start, opened) if start < opened else []
            since = [
                record
                for step in range(self._case.receipt.step0, part.step + 1)
                for record in self._step_records(step, part, group)
            ]
            records += since[max(0, start - opened) : end - opened]
        return ops.parse_records(b"".join(records), self._plan, wide)

    def _step_records(self, step: int, part: _Part, group: int) -> list[bytes]:
        return self._own_records(step, part.layer, group, self._exhibits.tokens(step))

    def _own_records(self, step: int, layer: int, group: int, count: int) -> list[bytes]:
        """What the first `count` tokens of a step add to a log."""
        self._spend(count * _RECORD_WORK)
        key = step, layer, count
        if key not in self._computed:
            self._computed[key] = self._heads(step, layer, 0, count)
        wide = WIDE_ATTENTION in self._plan.layers[layer].wide
        return [ops.kv_record(self._computed[key], row, group, wide) for row in range(count)]

    # --- keys and values ----------------------------------------------------------------------------------------------------

    def _log_fault(self, claim: Claim, logs: Sequence[LogRoot]) -> Fault | None:
        case, exhibits = self._case, self._exhibits
        if not case.causal or not case.start <= claim.layer < case.end or claim.element >= case.shape.kv_heads:
            raise VerificationError("the receipt's stage keeps no such log")
        what = f"of layer {claim.layer}, key-value head {claim.element}"
        if claim.rows:
            position = case.position(claim.step) + claim.row
            if claim.rows > 1 or not case.has_step(claim.step) or claim.row >= case.rows(claim.step):
                raise VerificationError("the receipt is not for this token")
            heads = self._heads(claim.step, claim.layer, claim.row, 1)
            wide = WIDE_ATTENTION in self._plan.layers[claim.layer].wide
            right = ops.kv_record(heads, 0, claim.element, wide) == exhibits.record(0, claim.layer, claim.element, position)
            return None if right else Fault(f"keeps other keys and values {what} at position {position} than it computed")
        if len(logs) != 1 or (logs[0].layer, logs[0].head) != (claim.layer, claim.element):
            raise MalformedError("the proof does not show the root of the log")
        exhibits.check_log_root(logs[0])
        before = exhibits.before
        part = _Part(claim.step, claim.layer, 0, 1, 0, 0)
        steps = range(case.receipt.step0, case.receipt.step0 + case.receipt.n)
        leaves = [leaf_hash(record) for step in steps for record in self._step_records(step, part, claim.element)]
        size = before.kv_len if before else 0
        root_before, root = appended_roots(size, logs[0].peaks, leaves)
        if before:
            exhibits.check_log_before(logs[0], root_before)
        if root == logs[0].root:
            return None
        return Fault(f"signed for a log {what} that is not the one before with what it computed since")

    def _append_fault(self, claim: Claim) -> Fault | None:
        now, before = (self._exhibits.record(when, claim.layer, claim.element, claim.row) for when in (0, 1))
        if now == before:
            return None
        return Fault(f"changed the keys and values of layer {claim.layer}, key-value head {claim.element} at position {claim.row}")

    # --- what leaves the stage ----------------------------------------------------------------------------------------------

    def _sample_fault(self, step: int, answers: bytes) -> Fault | None:
        case, exhibits = self._case, self._exhibits
        if not (case.last and case.causal) or not case.has_step(step):
            raise VerificationError("the receipt's stage draws no tokens")
        logits = exhibits.values(step, case.end, LOGITS, 0, 1)[0]
        sampling = Sampling.of(case.terms)
        seen = self._answers_before(step, answers) if case.terms.repetition_penalty != MICRO else []
        tables = self._tables.exp_hi, self._tables.exp_lo
        token = sample_exact(np.ascontiguousarray(logits), sampling, step, tables, seen)
        said = exhibits.output(step)
        if said == tokens_to_bytes([token]):
            return None
        return Fault(f"gave another token in step {step} than the {token} that its logits and the session's terms make")

    def _answers_before(self, step: int, answers: bytes) -> list[int]:
        """The tokens of all steps before: of the windows before under their receipts' roots, of this one as they were opened."""
        case, exhibits = self._case, self._exhibits
        if len(answers) != 4 * case.receipt.step0 or (answers and exhibits.receipts[-1].step0):
            raise MalformedError("the proof does not show the tokens of all steps before the window")
        for receipt in exhibits.receipts[1:]:
            window = answers[4 * receipt.step0 : 4 * (receipt.step0 + receipt.n)]
            if payload_root(window[at : at + 4] for at in range(0, len(window), 4)) != receipt.out_root:
                raise VerificationError("the tokens before the window are not the ones that were signed for")
        tokens = tokens_from_bytes(answers + b"".join(exhibits.output(earlier) for earlier in range(case.receipt.step0, step)))
        if tokens and max(tokens) >= self._plan.vocab:
            raise VerificationError("a token before is none that the model knows: that is the fault to show")
        return tokens

    def _output_fault(self, claim: Claim) -> Fault | None:
        """What leaves the stage is the last layer's x, or an encoder's vector made of it."""
        case, exhibits = self._case, self._exhibits
        if case.last and case.causal:
            raise VerificationError("tokens that leave the last stage are a matter of the sampler")
        if claim.rows:
            right, start = self._payload(claim.step, claim.row, claim.rows), claim.row * 4 * self._plan.hidden
            if exhibits.output(claim.step)[start : start + len(right)] == right:
                return None
            return Fault(f"sent on something else in step {claim.step} than it computed")
        steps = range(case.receipt.step0, case.receipt.step0 + case.receipt.n)
        if payload_root(self._payload(step, 0, exhibits.tokens(step)) for step in steps) == case.receipt.out_root:
            return None
        return Fault(f"sent on something else in steps {steps[0]} to {steps[-1]} than it computed")

    def _payload(self, step: int, row: int, rows: int) -> bytes:
        """What these rows of a step are sent on as. Of an encoder's last stage all rows make one vector."""
        exhibits, end = self._exhibits, self._case.end
        tokens = exhibits.tokens(step)
        if row + rows > tokens or (self._case.last and rows != tokens):
            raise VerificationError(f"step {step} has {tokens} rows")
        x = exhibits.values(step, end - 1, DOWN, row, rows)[:, -self._plan.hidden :]
        if self._case.last:
            x = ops.pooled(self._plan, x)
            if not np.isfinite(x).all():
                raise VerificationError("an honest node stops at values that are not numbers, and so does this proof")
        return x.astype("<f4", copy=False).tobytes()


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements of rows of one layer's value in one step."""

    step: int
    layer: int
    row: int
    rows: int
    element: int
    elements: int

    @property
    def end(self) -> int:
        return self.element + self.elements
