"""What a stage answers an audit with: openings of cells, made from the session computed again (docs/audits.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.hashing import leaf_hash, merkle_proof
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.proof.accuse import Recomputed
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import HEAD_OP, LINEARS
from nexus.proof.arithmetic.rows import EMBED, WeightProof, row_layout
from nexus.proof.audit import Cell, OpenedRow, Opening, Sums
from nexus.proof.audit_check import AuditedStage, first_row
from nexus.proof.receipts import tokens_from_bytes
from nexus.proof.trace import ATTENTION, ATTENTION_OUT, DOWN, GATE_UP, LOGITS, OPS, QKV

Floats = NDArray[np.float32]
NOTHING = OpenedRow(b"", ())


class Shown(Recomputed, Protocol):
    """`Recomputed` with what came into the stage: `nexus.engine.exact.replay.Replay`."""

    def stage_input(self, step: int) -> Floats:
        """x before the stage's first layer, [rows, hidden]."""
        ...


class Weights(Protocol):
    """The model's weights, as far as this stage has them."""

    def tensors(self, piece: str) -> Mapping[str, NDArray[np.generic]]:
        """Of a piece by name: "NAME.weight" int8 [rows, depth] and the rest float32, read when they are asked for."""
        ...

    def row(self, piece: int, index: int) -> WeightProof:
        """One leaf of the tree of a piece's rows."""
        ...


def open_cell(stage: AuditedStage, shown: Shown, weights: Weights, cell: Cell) -> Opening:
    """The opening of one cell of a session that this stage served. `stage.inputs`: the payloads that came into this stage."""
    if cell.layer < stage.shape.layers:
        return _open_layer(stage, shown, weights, cell)
    last = stage.shape.layers - 1
    if not stage.exact.causal:
        context = tuple(_bytes(row) for row in shown.values(cell.step, last, DOWN))
        return Opening(cell, NOTHING, (), (), context, b"", (), NOTHING)
    rows = shown.values(cell.step, last, DOWN)
    x = np.ascontiguousarray(rows[-1][-stage.exact.hidden :])
    linear, piece = (EMBED, EMBEDDING) if stage.exact.tied else (HEAD_OP, HEAD)
    norm = weights.tensors(HEAD)["norm.weight"]
    given = ops.norm(stage.exact, x[None], _float32(norm))[0]
    sums = _sums(weights.tensors(piece), linear, given, stage.exact.wide_head)
    logits = OpenedRow(_bytes(shown.values(cell.step, last, LOGITS).reshape(-1)), ())
    return Opening(cell, _opened(rows, len(rows) - 1), (logits,), (sums,), (), b"", (), NOTHING)


def _open_layer(stage: AuditedStage, shown: Shown, weights: Weights, cell: Cell) -> Opening:
    exact, plan = stage.exact, stage.layer_plan(cell.layer)
    tensors = weights.tensors(layer_name(stage.layers.start + cell.layer))
    values = {op: shown.values(cell.step, cell.layer, op) for op in OPS}
    hidden = exact.hidden
    before = shown.values(cell.step, cell.layer - 1, DOWN) if cell.layer else shown.stage_input(cell.step)
    x = np.ascontiguousarray(before[cell.row][-hidden:])
    middle = np.ascontiguousarray(values[ATTENTION_OUT][cell.row][-hidden:])

    def norm(name: str, given: Floats) -> Floats:
        bias = tensors.get(f"{name}.bias")
        weight = _float32(tensors[f"{name}.weight"])
        return first_row(ops.norm(exact, given[None], weight, None if bias is None else _float32(bias)))

    given = {
        QKV: norm("attention_norm", x) if exact.causal else x,
        ATTENTION_OUT: values[ATTENTION][cell.row],
        GATE_UP: norm("mlp_norm", middle) if exact.causal else middle,
        DOWN: values[GATE_UP][cell.row],
    }
    window = stage.receipts[stage.window(cell.step)]
    at_end = cell.layer == stage.shape.layers - 1 and not stage.is_last
    steps = range(window.step0, window.step0 + window.n)
    return Opening(
        cell=cell,
        x=_opened(before, cell.row)
        if cell.layer
        else _payload([stage.inputs[step] for step in steps], cell.step - window.step0)
        if stage.stage
        else NOTHING,
        values=tuple(NOTHING if op == QKV and not exact.causal else _opened(values[op], cell.row) for op in OPS),
        sums=tuple(_sums(tensors, op, given[op], op in plan.wide) for op in LINEARS),
        context=() if exact.causal else tuple(_bytes(row) for row in values[QKV]),
        records=b"".join(shown.records(cell.layer, cell.head, window.kv_len)) if exact.causal else b"",
        weights=_embedding(stage, weights, cell) if not cell.layer and not stage.stage else (),
        output=_payload([shown.outputs[step] for step in steps], cell.step - window.step0) if at_end else NOTHING,
    )


def _embedding(stage: AuditedStage, weights: Weights, cell: Cell) -> tuple[bytes, ...]:
    layout = row_layout(stage.exact, EMBEDDING)
    token = tokens_from_bytes(stage.inputs[cell.step])[cell.row]
    indices = [layout.section(EMBED).first + token]
    if not stage.exact.causal:
        indices.append(layout.section("position.weight").first + cell.row)
    return tuple(weights.row(0, index).to_bytes() for index in indices)


def _sums(tensors: Mapping[str, NDArray[np.generic]], linear: str, given: Floats, wide: bool) -> Sums:
    weight = tensors[f"{linear}.weight"]
    assert weight.dtype == np.int8
    _, sums, _ = ops.linear_sums(given[None], weight.view(np.int8), wide=wide)
    return Sums(sums.astype("<i4").tobytes())


def _opened(rows: Floats, row: int) -> OpenedRow:
    return _payload([_bytes(one) for one in rows], row)


def _payload(leaves: Sequence[bytes], index: int) -> OpenedRow:
    return OpenedRow(leaves[index], tuple(merkle_proof([leaf_hash(leaf) for leaf in leaves], index)))


def _bytes(row: Floats) -> bytes:
    return row.astype("<f4", copy=False).tobytes()


def _float32(tensor: NDArray[np.generic]) -> Floats:
    assert tensor.dtype == np.float32
    return tensor.view(np.float32)
