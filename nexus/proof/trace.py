"""What a stage of the exact profile commits to beside its inputs and outputs: every operation, and its keys and values.

Per step and layer there are five *values* (`OPS`), float32 rows, one row per token of the step (docs/evidence.md). A row is
a leaf; the op root of a step of one token is that leaf's hash, of more tokens the Merkle root over the rows in order. The step root
is the Merkle root over one leaf per layer, its five op roots one after the other; at the last stage of a causal model one more leaf
follows: the hash of the logits of the step's last token. `trace_root` is the Merkle root over the step roots of a window.

Keys and values are kept in logs that only grow: one per layer and key-value head, a leaf per token (`docs/evidence.md`, "Logs").
`kv_root` is the Merkle root over the log roots, layer by layer, and `kv_len` of the receipt is the size of every log.

All trees are trees of fixed shape for one who knows the receipt and the model's plan, so that a node can never pass for a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import HASH_BYTES, leaf_hash, merkle_root
from nexus.core.record import Record, raw

QKV, ATTENTION, ATTENTION_OUT, GATE_UP, DOWN, LOGITS = "qkv", "attention", "o", "gate_up", "down", "logits"
# In the order in which they are computed and committed to.
OPS = (QKV, ATTENTION, ATTENTION_OUT, GATE_UP, DOWN)
CELL_BYTES = len(OPS) * HASH_BYTES
TRACE_BYTES_MAX = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TraceShape:
    """What of a stage decides the form of its traces. `kv_heads` is 0 for an encoder, which keeps no keys and values; `logits`
    whether the stage is the last one of a causal model."""

    layers: int
    kv_heads: int
    logits: bool

    @property
    def step_bytes(self) -> int:
        """Of one step's op roots."""
        return self.layers * CELL_BYTES + (HASH_BYTES if self.logits else 0)

    @property
    def logs_bytes(self) -> int:
        return self.layers * self.kv_heads * HASH_BYTES


@dataclass(frozen=True, slots=True)
class WindowTrace(Record):
    """The hashes behind `trace_root` and `kv_root` of one receipt, which a stage gives to the coordinator with it: with them an
    operation can be proven wrong without the help of whoever computed it.

    `cells`: of every step the op roots, layer by layer in the order of `OPS`, then the hash of the logits where there are any.
    `logs`: the log roots at the end of the window, by layer and head.
    """

    cells: bytes = raw(most=TRACE_BYTES_MAX)
    logs: bytes = raw(most=TRACE_BYTES_MAX)

    def check(self, shape: TraceShape, steps: int) -> None:
        """That it has the form of a trace of so many steps. Raises MalformedError."""
        if len(self.cells) != steps * shape.step_bytes or len(self.logs) != shape.logs_bytes:
            raise MalformedError(f"a trace of {len(self.cells)} and {len(self.logs)} bytes is not one of {steps} steps")

    def step_cells(self, shape: TraceShape, step: int) -> bytes:
        """Of step number `step` of the window."""
        return self.cells[step * shape.step_bytes : (step + 1) * shape.step_bytes]

    def op_root(self, shape: TraceShape, step: int, layer: int, op: str) -> bytes:
        """`layer`: counted from the stage's first, any for LOGITS."""
        return op_root_in(self.step_cells(shape, step), shape, layer, op)

    def log_root(self, shape: TraceShape, layer: int, head: int) -> bytes:
        at = (layer * shape.kv_heads + head) * HASH_BYTES
        return self.logs[at : at + HASH_BYTES]

    def trace_root(self, shape: TraceShape, steps: int) -> bytes:
        return trace_root_of([step_root_of(self.step_cells(shape, step), shape) for step in range(steps)])

    def kv_root(self, shape: TraceShape) -> bytes:
        return kv_root_of(self.logs) if shape.kv_heads else b""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What an engine gives for a window of steps that it computed: the hashes, and the two roots over them that are signed.

    `kv_root` is empty for an encoder. The roots come with the trace so that whoever has to sign need not hash again.
    """

    trace: WindowTrace
    trace_root: bytes
    kv_root: bytes

    @classmethod
    def of(cls, trace: WindowTrace, shape: TraceShape, steps: int) -> Sealed:
        return cls(trace, trace.trace_root(shape, steps), trace.kv_root(shape))


def op_root_in(cells: bytes, shape: TraceShape, layer: int, op: str) -> bytes:
    """One op root out of a step's."""
    if op == LOGITS:
        if not shape.logits:
            raise MalformedError("only the last stage of a language model has logits")
        return cells[shape.layers * CELL_BYTES :]
    at = layer * CELL_BYTES + OPS.index(op) * HASH_BYTES
    return cells[at : at + HASH_BYTES]


def op_root_of(rows: Sequence[bytes]) -> bytes:
    """The op root over a value's rows, float32 little-endian each."""
    return merkle_root(leaf_hash(row) for row in rows)


def step_root_of(cells: bytes, shape: TraceShape) -> bytes:
    """The step root over the op roots of a step."""
    if len(cells) != shape.step_bytes:
        raise MalformedError(f"{len(cells)} bytes of op roots where {shape.step_bytes} are due")
    leaves = [leaf_hash(cells[layer * CELL_BYTES : (layer + 1) * CELL_BYTES]) for layer in range(shape.layers)]
    if shape.logits:
        leaves.append(leaf_hash(cells[shape.layers * CELL_BYTES :]))
    return merkle_root(leaves)


def trace_root_of(step_roots: Sequence[bytes]) -> bytes:
    return merkle_root(step_roots)


def kv_root_of(logs: bytes) -> bytes:
    """The root over log roots, 32 bytes each, layer by layer."""
    return merkle_root(logs[at : at + HASH_BYTES] for at in range(0, len(logs), HASH_BYTES))


def check_trace(trace: WindowTrace, shape: TraceShape, steps: int, trace_root: bytes, kv_root: bytes) -> None:
    """That these are the hashes behind the roots of a receipt. Raises MalformedError, VerificationError."""
    trace.check(shape, steps)
    if trace.trace_root(shape, steps) != trace_root:
        raise VerificationError("the op roots do not lead to the receipt's trace_root")
    if trace.kv_root(shape) != kv_root:
        raise VerificationError("the log roots do not lead to the receipt's kv_root")
