"""A whole stage of the exact profile in numpy: slow, short, and independent of every kernel.

It says what any implementation must commit to, value by value; tests, golden vectors and simulations go by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, UsageError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, trace_shape
from nexus.proof.arithmetic.rows import EMBED, rope_table
from nexus.proof.arithmetic.sampler import GREEDY, Sampling, sample_exact
from nexus.proof.receipts import tokens_from_bytes, tokens_to_bytes
from nexus.proof.trace import ATTENTION_OUT, DOWN, GATE_UP, LOGITS, OPS, QKV, TraceShape, WindowTrace, kv_root_of, op_root_of

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StepValues:
    """One step: `x` before the first layer, what is committed to by layer (from the stage's first) and operation, the output."""

    x: ops.Float32
    layers: tuple[Mapping[str, ops.Float32], ...]
    logits: ops.Float32 | None
    output: bytes


@dataclass(frozen=True, slots=True)
class SessionValues:
    """All steps of a session, and its logs: of every layer and key-value head the records of all tokens."""

    shape: TraceShape
    steps: tuple[StepValues, ...]
    logs: Mapping[tuple[int, int], Sequence[bytes]]

    @property
    def outputs(self) -> list[bytes]:
        return [step.output for step in self.steps]

    def stage_input(self, step: int) -> ops.Float32:
        return self.steps[step].x

    def values(self, step: int, layer: int, op: str) -> ops.Float32:
        """What the stage commits to, [rows, width]. `layer`: any for LOGITS."""
        one = self.steps[step]
        if op != LOGITS:
            return one.layers[layer][op]
        if one.logits is None:
            raise UsageError("only the last stage of a language model has logits")
        return one.logits

    def records(self, layer: int, head: int, length: int) -> list[bytes]:
        return list(self.logs[layer, head][:length])

    def log_root(self, layer: int, head: int, length: int) -> bytes:
        return merkle_root(leaf_hash(record) for record in self.logs[layer, head][:length])

    def kv_root(self, length: int) -> bytes:
        """Empty for an encoder."""
        return kv_root_of(self._log_roots(length)) if self.shape.kv_heads else b""

    def trace(self, step0: int, n: int) -> WindowTrace:
        """Of steps [step0, step0 + n)."""
        cells = b"".join(self._cells(step) for step in self.steps[step0 : step0 + n])
        length = sum(len(step.x) for step in self.steps[: step0 + n])
        return WindowTrace(cells, self._log_roots(length))

    def _cells(self, step: StepValues) -> bytes:
        values = [layer[op] for layer in step.layers for op in OPS] + ([] if step.logits is None else [step.logits])
        return b"".join(op_root_of([row.astype("<f4").tobytes() for row in value]) for value in values)

    def _log_roots(self, length: int) -> bytes:
        heads = [(layer, head) for layer in range(self.shape.layers) for head in range(self.shape.kv_heads)]
        return b"".join(self.log_root(layer, head, length) for layer, head in heads)


class ReferenceStage:
    """Layers [start, end) of a model."""

    def __init__(self, plan: ExactPlan, start: int, end: int, pieces: Mapping[str, Tensors], tables: Tensors) -> None:
        """`pieces`: the tensors of the stage's pieces by name, as docs/fragments.md lists them. `tables`: the rotary angles."""
        self.plan, self.start, self.end = plan, start, end
        self._first, self._last = start == 0, end == len(plan.layers)
        self._pieces = pieces
        self._ropes = [(tables[rope_table(n, "coarse")], tables[rope_table(n, "fine")]) for n in range(len(plan.ropes))]
        self._tables = ops.Tables()

    def run(self, steps: Sequence[bytes], sampling: Sampling = GREEDY) -> SessionValues:
        """A session of these payloads. Raises MalformedError for payloads that no session has, OutOfBoundsError."""
        logs: dict[tuple[int, int], list[bytes]] = {}
        done: list[StepValues] = []
        position = 0
        for number, payload in enumerate(steps):
            x = self._entered(payload, position)
            if position + len(x) > self.plan.context:
                raise MalformedError(f"{position + len(x)} tokens do not fit a context of {self.plan.context}")
            done.append(self._step(x, position, logs, sampling, number, [step.output for step in done]))
            position += len(x) if self.plan.causal else 0
        return SessionValues(trace_shape(self.plan, self.start, self.end), tuple(done), logs)

    def _entered(self, payload: bytes, position: int) -> ops.Float32:
        plan = self.plan
        if not self._first:
            if not payload or len(payload) % (4 * plan.hidden):
                raise MalformedError(f"{len(payload)} bytes are no states of {plan.hidden} values")
            return np.frombuffer(payload, "<f4").astype(np.float32).reshape(-1, plan.hidden)
        tokens = np.array(tokens_from_bytes(payload), np.int64)
        if not len(tokens) or int(tokens.max()) >= plan.vocab:
            raise MalformedError("a step has tokens, of the model's vocabulary")
        piece = self._pieces[EMBEDDING]
        rows = piece[f"{EMBED}.weight"][tokens], piece[f"{EMBED}.scale"][tokens]
        if plan.causal:
            return ops.embed(plan, *rows)
        positions = piece["position.weight"][position : position + len(tokens)]
        return ops.embed(plan, *rows, positions, piece["type.weight"], self._norm(piece, "embed_norm"))

    def _step(
        self,
        x: ops.Float32,
        position: int,
        logs: dict[tuple[int, int], list[bytes]],
        sampling: Sampling,
        number: int,
        before: Sequence[bytes],
    ) -> StepValues:
        entered, layers = x, []
        for layer in range(self.end - self.start):
            values = self._layer(x, layer, position, logs)
            layers.append(values)
            x = values[DOWN][:, -self.plan.hidden :]
        ops.largest(x)
        if not self._last:
            return StepValues(entered, tuple(layers), None, x.astype("<f4").tobytes())
        if not self.plan.causal:
            return StepValues(entered, tuple(layers), None, ops.pooled(self.plan, x).astype("<f4").tobytes())
        logits = self._logits(x[-1:])
        seen = [token for output in before for token in tokens_from_bytes(output)]
        token = sample_exact(logits[0], sampling, number, (self._tables.exp_hi, self._tables.exp_lo), seen)
        return StepValues(entered, tuple(layers), logits, tokens_to_bytes([token]))

    def _logits(self, x: ops.Float32) -> ops.Float32:
        plan, head = self.plan, self._pieces[HEAD]
        piece, name = (self._pieces[EMBEDDING], EMBED) if plan.tied else (head, "head")
        return ops.logits(plan, x, head["norm.weight"], piece[f"{name}.weight"], piece[f"{name}.scale"], self._tables)

    def _layer(self, x: ops.Float32, layer: int, position: int, logs: dict[tuple[int, int], list[bytes]]) -> dict[str, ops.Float32]:
        plan = self.plan
        piece = self._pieces[layer_name(self.start + layer)]
        wide = plan.layers[self.start + layer].wide

        def linear(name: str, value: ops.Float32) -> ops.Float32:
            parts = piece[f"{name}.weight"], piece[f"{name}.scale"], piece.get(f"{name}.bias")
            return ops.linear(value, *parts, name in wide)

        def ended(name: str, half: str, inner: ops.Float32) -> ops.Float32:
            """What is committed to of a half of the layer: x, and before it y where a norm follows."""
            y = linear(name, inner)
            if not plan.norm_after_linear:
                return ops.after_linear(plan, x, y, None)
            following = self._norm(piece, f"post_{half}_norm" if plan.causal else f"{half}_norm")
            return np.concatenate((y, ops.after_linear(plan, x, y, following)), axis=1)

        values = {QKV: linear(QKV, ops.norm(plan, x, *self._norm(piece, "attention_norm")) if plan.causal else x)}
        values[ATTENTION] = self._attention(values[QKV], layer, position, piece, logs)
        values[ATTENTION_OUT] = ended(ATTENTION_OUT, "attention", values[ATTENTION])
        x = values[ATTENTION_OUT][:, -plan.hidden :]
        inner = linear(GATE_UP, ops.norm(plan, x, *self._norm(piece, "mlp_norm")) if plan.causal else x)
        gate, up = (inner[:, : plan.ffn], inner[:, plan.ffn :]) if plan.gated else (None, inner)
        values[GATE_UP] = ops.activation(plan, gate, up, self._tables)
        values[DOWN] = ended(DOWN, "mlp", values[GATE_UP])
        return values

    def _attention(
        self, y: ops.Float32, layer: int, position: int, piece: Tensors, logs: dict[tuple[int, int], list[bytes]]
    ) -> ops.Float32:
        plan, layer_plan = self.plan, self.plan.layers[self.start + layer]
        wide = ATTENTION in layer_plan.wide
        positions = np.arange(position, position + len(y))
        rope = ops.rope_rows(*self._ropes[layer_plan.rope], positions) if plan.ropes else None
        heads = ops.qkv_heads(plan, layer_plan, y, piece.get("q_norm.weight"), piece.get("k_norm.weight"), rope)
        out = np.empty((len(y), plan.heads, plan.head_dim), np.float32)
        for group in range(plan.kv_heads):
            records = [ops.kv_record(heads, row, group, wide) for row in range(len(y))]
            if plan.causal:
                log = logs.setdefault((layer, group), [])
                log += records
                records = log
            k, sk, v, sv = ops.parse_records(b"".join(records), plan, wide)
            each = plan.heads // plan.kv_heads
            for row in range(len(y)):
                end = position + row + 1 if plan.causal else len(y)
                for head in range(group * each, (group + 1) * each):
                    query = heads.q[row, head], heads.sq[row, head]
                    stored = k[:end], sk[:end], v[:end], sv[:end]
                    out[row, head] = ops.attend_head(plan, layer_plan, *query, *stored, self._tables)
        return out.reshape(len(y), plan.q_size)

    def _norm(self, piece: Tensors, name: str) -> ops.Norm:
        return piece[f"{name}.weight"], piece.get(f"{name}.bias")
