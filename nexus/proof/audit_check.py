"""Openings of cells: made by whoever is audited, checked by whoever audits, without a single weight matrix (docs/audits.md).

The products of a layer are checked by Freivalds' keys, everything else is computed anew: norms, integers and their scales,
rotation, attention of one head over its whole log, activation. All of it hangs on the op roots that the stage signed for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, NexusError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root, verify_merkle_proof
from nexus.core.manifest import EMBEDDING, HEAD, Manifest, layer_name
from nexus.core.plan import Plan, PlanStage
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import HEAD_OP, LINEARS, ExactPlan, LayerPlan, trace_shape, value_widths
from nexus.proof.arithmetic.rows import EMBED, WeightProof, check_weights, float_rows, linear_rows, rope_table, row_layout
from nexus.proof.arithmetic.sampler import Sampling, sample_exact
from nexus.proof.audit import Cell, OpenedRow, Opening, Sums
from nexus.proof.freivalds import PieceKeys, check
from nexus.proof.receipts import Receipt, Terms, tokens_from_bytes
from nexus.proof.trace import ATTENTION, ATTENTION_OUT, DOWN, GATE_UP, LOGITS, OPS, QKV, TraceShape, WindowTrace

Floats = NDArray[np.float32]
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class AuditedStage:
    """A stage's part in a session, as everybody knows it who was there.

    `receipts`, `traces`: the stage's, from its first on. `inputs`: what the coordinator fed to the first stage, step by step,
    and the tokens that came back to it. `results`: what came out of the last stage. Whoever answers an audit has no traces and
    no results, and `inputs` are those of its own stage. `rows`: of every step.
    """

    manifest: Manifest
    exact: ExactPlan
    plan: Plan
    terms: Terms
    stage: int
    receipts: Sequence[Receipt]
    traces: Sequence[WindowTrace]
    inputs: Sequence[bytes]
    results: Sequence[bytes]
    rows: Sequence[int]

    @property
    def layers(self) -> PlanStage:
        return self.plan.stages[self.stage]

    @cached_property
    def shape(self) -> TraceShape:
        return trace_shape(self.exact, self.layers.start, self.layers.end)

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.plan.stages) - 1

    def window(self, step: int) -> int:
        return next(number for number, receipt in enumerate(self.receipts) if step < receipt.step0 + receipt.n)

    def layer_plan(self, layer: int) -> LayerPlan:
        """`layer`: counted from the stage's first."""
        return self.exact.layers[self.layers.start + layer]

    def position(self, cell: Cell) -> int:
        """Of the cell's row in its session, of an encoder in its text."""
        return cell.row + (sum(self.rows[: cell.step]) if self.exact.causal else 0)

    def shown_bytes(self, cell: Cell) -> int:
        """What an opening of a cell takes at most."""
        exact, rows = self.exact, self.rows[cell.step]
        if cell.layer == self.shape.layers:
            return 16 * exact.vocab + 8 * exact.hidden if exact.causal else 8 * exact.hidden * rows
        per_row = 16 * (exact.qkv_size + exact.q_size + exact.hidden + exact.gate_up_size)  # values, and sums of two halves
        log = self.receipts[self.window(cell.step)].kv_len * ops.record_bytes(exact, wide=True)
        context = 0 if exact.causal else 4 * exact.qkv_size * rows
        ends = (not cell.layer) + (cell.layer == self.shape.layers - 1)
        return per_row + log + context + ends * 4 * exact.hidden * rows

    def pieces(self, cells: Sequence[Cell]) -> dict[str, tuple[str, ...]]:
        """The pieces of the model whose keys it takes to check these cells, and the linear operations in each."""
        needed: dict[str, tuple[str, ...]] = {}
        for cell in cells:
            if cell.layer < self.shape.layers:
                needed[layer_name(self.layers.start + cell.layer)] = LINEARS
                if self.stage == cell.layer == 0 and not self.exact.causal:
                    needed[EMBEDDING] = ()
            elif self.exact.causal:
                needed[HEAD] = () if self.exact.tied else (HEAD_OP,)
                if self.exact.tied:
                    needed[EMBEDDING] = (EMBED,)
        return needed


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an opening. `kind` "opening": it does not lead to what the stage signed for, which convicts by
    itself. "value": what it leads to is not what the model computes. `op`: where, one of `nexus.proof.trace.OPS`, "logits",
    "log" or "output"."""

    kind: str
    op: str
    cell: Cell
    text: str


LOG, OUTPUT, INPUT = "log", "output", "input"
OPENING, VALUE = "opening", "value"


class _FaultFound(Exception):
    def __init__(self, kind: str, op: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.op, self.text = kind, op, text


@dataclass(frozen=True)
class AuditorKeys:
    """What an auditor works with. `pieces`: by name, those that `AuditedStage.pieces` names. `angles`: the model's tables of rotary
    embeddings by name (`nexus.proof.arithmetic.rows.rope_table`)."""

    pieces: Mapping[str, PieceKeys]
    angles: Mapping[str, NDArray[np.float64]]
    tables: ops.Tables


def check_cell(stage: AuditedStage, keys: AuditorKeys, opening: Opening) -> None:
    """That an opening is what the model computes. Raises VerificationError that names the operation."""
    fault = find_fault(stage, keys, opening)
    if fault is not None:
        raise VerificationError(fault.text)


def find_fault(stage: AuditedStage, keys: AuditorKeys, opening: Opening) -> Fault | None:
    """The first thing wrong with an opening of the cell that it names, None where all is right."""
    check = _Check(stage, keys, opening)
    try:
        if opening.cell.layer < stage.shape.layers:
            check.layer()
        elif stage.exact.causal:
            check.token()
        else:
            check.vector()
    except _FaultFound as fault:
        return Fault(fault.kind, fault.op, opening.cell, fault.text)
    except NexusError as error:
        # The arithmetic refuses values that no honest stage opens: not numbers, or beyond all bounds.
        return Fault(VALUE, INPUT, opening.cell, f"{check.place}: {error.cause}")
    return None


class _Check:
    """Of one opening. Every step ends with the bytes that the stage opened, so that the next one begins with them."""

    def __init__(self, stage: AuditedStage, keys: AuditorKeys, opening: Opening) -> None:
        self.stage, self.exact, self.opening = stage, stage.exact, opening
        self.keys, self.angles, self.tables = keys.pieces, keys.angles, keys.tables
        self.cell = opening.cell
        self.number = stage.window(self.cell.step)
        self.receipt, self.trace = stage.receipts[self.number], stage.traces[self.number]
        self.widths = value_widths(stage.exact)
        self.place = f"step {self.cell.step}, layer {stage.layers.start + self.cell.layer}"

    def fail(self, kind: str, op: str, why: str) -> _FaultFound:
        return _FaultFound(kind, op, f"{self.place}, {op}: {why}")

    # ---- that what is shown is what was signed for

    def root(self, op: str, layer: int) -> bytes:
        return self.trace.op_root(self.stage.shape, self.cell.step - self.receipt.step0, layer, op)

    def opened(self, op: str, row: OpenedRow, layer: int) -> Floats:
        """A row of a value."""
        if len(row.data) != 4 * self.widths[op]:
            raise self.fail(OPENING, op, f"a row of {len(row.data)} bytes where {4 * self.widths[op]} are due")
        self.leads(op, self.root(op, layer), self.stage.rows[self.cell.step], self.cell.row, row)
        return _floats(row.data)

    def leads(self, op: str, root: bytes, size: int, index: int, row: OpenedRow) -> None:
        try:
            verify_merkle_proof(root, size, index, leaf_hash(row.data), row.siblings)
        except VerificationError as error:
            raise self.fail(OPENING, op, "what is shown is not what was signed for") from error

    def all_rows(self, op: str, layer: int) -> Floats:
        """All rows of a value of a step, of an encoder."""
        context, rows = self.opening.context, self.stage.rows[self.cell.step]
        if len(context) != rows or any(len(row) != 4 * self.widths[op] for row in context):
            raise self.fail(OPENING, op, f"{len(context)} rows are shown where {rows} of {4 * self.widths[op]} bytes are due")
        if merkle_root([leaf_hash(row) for row in context]) != self.root(op, layer):
            raise self.fail(OPENING, op, "what is shown is not what was signed for")
        return _floats(b"".join(context)).reshape(rows, -1)

    def payload(self, op: str, row: OpenedRow, root: bytes) -> bytes:
        """Of a step, what came in or went out."""
        self.leads(op, root, self.receipt.n, self.cell.step - self.receipt.step0, row)
        return row.data

    # ---- a row of a layer

    def layer(self) -> None:
        exact, plan, opening = self.exact, self.stage.layer_plan(self.cell.layer), self.opening
        if len(opening.values) != len(OPS) or len(opening.sums) != len(LINEARS):
            raise self.fail(OPENING, QKV, "not every value of the layer is shown")
        piece = self.keys[layer_name(self.stage.layers.start + self.cell.layer)]
        shown = dict(zip(OPS, opening.values, strict=True))
        sums = dict(zip(LINEARS, opening.sums, strict=True))
        value = {op: self.opened(op, shown[op], self.cell.layer) for op in OPS if exact.causal or op != QKV}
        context = None if exact.causal else self.all_rows(QKV, self.cell.layer)
        value[QKV] = value[QKV] if context is None else context[self.cell.row]
        x = self.layer_input()

        def product(op: str, given: Floats) -> Floats:
            return self.product(piece, op, given, op in plan.wide, sums[op])

        def norm(name: str, given: Floats) -> Floats:
            return first_row(ops.norm(exact, given[None], _need(piece, f"{name}.weight"), piece.tensor(f"{name}.bias")))

        y = product(QKV, norm("attention_norm", x) if exact.causal else x)
        self.same(QKV, value[QKV], y)
        self.attention(plan, piece, value, context)
        y = product(ATTENTION_OUT, value[ATTENTION])
        x = self.after(ATTENTION_OUT, x, y, piece, "post_attention_norm" if exact.causal else "attention_norm", value)
        h = product(GATE_UP, norm("mlp_norm", x) if exact.causal else x)
        gate, up = (h[: exact.ffn], h[exact.ffn :]) if exact.gated else (None, h)
        self.same(GATE_UP, value[GATE_UP], ops.activation(exact, gate, up, self.tables))
        y = product(DOWN, value[GATE_UP])
        x = self.after(DOWN, x, y, piece, "post_mlp_norm" if exact.causal else "mlp_norm", value)
        if self.cell.layer == self.stage.shape.layers - 1 and not self.stage.is_last:
            self.output(x)

    def after(self, op: str, x: Floats, y: Floats, piece: PieceKeys, norm: str, value: Mapping[str, Floats]) -> Floats:
        """x behind "o" or "down", as it is shown."""
        weights = None
        if self.exact.norm_after_linear:
            weights = _need(piece, f"{norm}.weight"), piece.tensor(f"{norm}.bias")
        new = first_row(ops.after_linear(self.exact, x[None], y[None], weights))
        self.same(op, value[op], np.concatenate((y, new)) if self.exact.norm_after_linear else new)
        return new

    def product(self, piece: PieceKeys, op: str, x: Floats, wide: bool, shown: Sums) -> Floats:
        """y of a linear operation from its sums, which the keys vouch for."""
        key = piece.key(op)
        q, s = ops.quantised(x[None], wide=wide)
        integers = ops.bytes_of(q, wide=wide)
        if len(shown.data) != 4 * len(integers) * key.rows:
            raise self.fail(OPENING, op, f"{len(shown.data)} bytes of sums where {4 * len(integers) * key.rows} are due")
        sums = np.frombuffer(shown.data, np.dtype("<i4")).reshape(len(integers), key.rows)
        if not check(key, integers, sums):
            raise self.fail(VALUE, op, "the sums are not those of the model's weights")
        return first_row(ops.from_sums(sums, s, _need(piece, f"{op}.scale"), piece.tensor(f"{op}.bias"), wide=wide))

    def same(self, op: str, shown: Floats, right: Floats) -> None:
        if shown.tobytes() != right.astype(_FLOAT32, copy=False).tobytes():
            raise self.fail(VALUE, op, "what was signed for is not what the model computes")

    def layer_input(self) -> Floats:
        """x before the layer."""
        hidden = self.exact.hidden
        if self.cell.layer:
            before: Floats = self.opened(DOWN, self.opening.x, self.cell.layer - 1)[-hidden:]
            return before
        if self.stage.stage:
            payload = self.payload(INPUT, self.opening.x, self.receipt.in_root)
            if len(payload) != 4 * hidden * self.stage.rows[self.cell.step]:
                raise self.fail(OPENING, INPUT, f"an input of {len(payload)} bytes")
            given: Floats = _floats(payload).reshape(-1, hidden)[self.cell.row]
            return given
        return self.embedded()

    def embedded(self) -> Floats:
        token = tokens_from_bytes(self.stage.inputs[self.cell.step])[self.cell.row]
        layout = row_layout(self.exact, EMBEDDING)
        embed = layout.section(EMBED)
        row = linear_rows(embed, self.weights(0, embed.first + token))
        if self.exact.causal:
            return first_row(ops.embed(self.exact, row.weight, row.scale))
        piece = self.keys[EMBEDDING]
        places = layout.section("position.weight")
        position = float_rows(places, self.weights(1, places.first + self.cell.row))
        norm = _need(piece, "embed_norm.weight"), _need(piece, "embed_norm.bias")
        return first_row(ops.embed(self.exact, row.weight, row.scale, position, _need(piece, "type.weight"), norm))

    def weights(self, number: int, index: int) -> list[bytes]:
        """One row of the embedding's piece, which the stage proves to be the model's."""
        try:
            proof = WeightProof.from_bytes(self.opening.weights[number])
            leaves = check_weights(proof, self.stage.manifest, self.exact)
        except (IndexError, MalformedError, VerificationError) as error:
            raise self.fail(OPENING, INPUT, "the embedding's row is not shown to be the model's") from error
        if (proof.piece, proof.index, proof.count) != (0, index, 1):
            raise self.fail(OPENING, INPUT, "another row of the embedding is shown")
        return leaves

    # ---- attention of one key-value head

    def attention(self, plan: LayerPlan, piece: PieceKeys, value: Mapping[str, Floats], context: Floats | None) -> None:
        exact, head = self.exact, self.cell.head
        place = self.stage.position(self.cell)
        wide = ATTENTION in plan.wide
        rows = value[QKV][None] if context is None else context
        positions = np.array([place]) if context is None else np.arange(len(context))
        rope = None
        if exact.ropes:
            coarse, fine = (self.angles[rope_table(plan.rope, kind)] for kind in ("coarse", "fine"))
            rope = ops.rope_rows(coarse, fine, positions)
        heads = ops.qkv_heads(exact, plan, rows, piece.tensor("q_norm.weight"), piece.tensor("k_norm.weight"), rope)
        if context is None:
            k, sk, v, sv = self.log(head, place, ops.kv_record(heads, 0, head, wide), wide)
            own = 0
        else:
            k, sk, v, sv = heads.k[:, head], heads.sk[:, head], heads.v[:, head], heads.sv[:, head]
            own = self.cell.row
        group = exact.heads // exact.kv_heads
        for query in range(head * group, (head + 1) * group):
            out = ops.attend_head(exact, plan, heads.q[own, query], heads.sq[own, query], k, sk, v, sv, self.tables)
            part = slice(query * exact.head_dim, (query + 1) * exact.head_dim)
            self.same(ATTENTION, value[ATTENTION][part], out)

    def log(self, head: int, place: int, own: bytes, wide: bool) -> tuple[ops.Ints, Floats, ops.Ints, Floats]:
        """The head's keys and values to this row's. The log goes on to the end of the window."""
        raw, count = self.opening.records, self.receipt.kv_len
        if len(raw) != count * len(own):
            raise self.fail(OPENING, LOG, f"a log of {len(raw)} bytes where {count} records of {len(own)} are due")
        leaves = [leaf_hash(raw[at : at + len(own)]) for at in range(0, len(raw), len(own))]
        if merkle_root(leaves) != self.trace.log_root(self.stage.shape, self.cell.layer, head):
            raise self.fail(OPENING, LOG, "what is shown is not what was signed for")
        if raw[place * len(own) : (place + 1) * len(own)] != own:
            raise self.fail(VALUE, LOG, "the keys and values kept are not those that were computed")
        return ops.parse_records(raw[: (place + 1) * len(own)], self.exact, wide)

    # ---- what comes out

    def output(self, x: Floats) -> None:
        payload = self.payload(OUTPUT, self.opening.output, self.receipt.out_root)
        size = 4 * self.exact.hidden
        if len(payload) != size * self.stage.rows[self.cell.step]:
            raise self.fail(OPENING, OUTPUT, f"an output of {len(payload)} bytes")
        if payload[self.cell.row * size : (self.cell.row + 1) * size] != x.tobytes():
            raise self.fail(VALUE, OUTPUT, "another output was sent on than was computed")

    def token(self) -> None:
        """Logits of a step's last token, and what was drawn from them."""
        exact, opening, step = self.exact, self.opening, self.cell.step
        if len(opening.values) != 1 or len(opening.sums) != 1:
            raise self.fail(OPENING, LOGITS, "the logits are not shown")
        rows = self.stage.rows[step]
        self.leads(DOWN, self.root(DOWN, self.stage.shape.layers - 1), rows, rows - 1, opening.x)
        if len(opening.x.data) != 4 * self.widths[DOWN]:
            raise self.fail(OPENING, DOWN, f"a row of {len(opening.x.data)} bytes")
        x = _floats(opening.x.data)[-exact.hidden :]
        logits = opening.values[0].data
        if len(logits) != 4 * exact.vocab or leaf_hash(logits) != self.root(LOGITS, 0):
            raise self.fail(OPENING, LOGITS, "what is shown is not what was signed for")
        head = self.keys[HEAD]
        linear, piece = (EMBED, self.keys[EMBEDDING]) if exact.tied else (HEAD_OP, head)
        normed = ops.norm(exact, x[None], _need(head, "norm.weight"))[0]
        y = self.product(piece, linear, normed, exact.wide_head, opening.sums[0])
        self.same(LOGITS, _floats(logits), ops.cap_logits(exact, y, self.tables))
        seen = [token for payload in self.stage.results[:step] for token in tokens_from_bytes(payload)]
        token = sample_exact(_floats(logits), Sampling.of(self.stage.terms), step, (self.tables.exp_hi, self.tables.exp_lo), seen)
        if self.stage.results[step] != token.to_bytes(4, "little"):
            raise self.fail(VALUE, OUTPUT, "another token was given than the one that the logits lead to")

    def vector(self) -> None:
        """An encoder's vector."""
        rows = self.all_rows(DOWN, self.stage.shape.layers - 1)[:, -self.exact.hidden :]
        vector = ops.pooled(self.exact, np.ascontiguousarray(rows))
        if self.stage.results[self.cell.step] != vector.astype(_FLOAT32, copy=False).tobytes():
            raise self.fail(VALUE, OUTPUT, "another vector was given than the one that was computed")


def first_row(rows: Floats) -> Floats:
    row: Floats = rows[0]
    return row


def _floats(data: bytes) -> Floats:
    return np.frombuffer(data, _FLOAT32).astype(np.float32)


def _need(piece: PieceKeys, name: str) -> Floats:
    tensor = piece.tensor(name)
    if tensor is None:
        raise MalformedError(f"the keys lack {name}")
    return tensor
