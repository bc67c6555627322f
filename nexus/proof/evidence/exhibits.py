"""What a proof shows of what the accused committed to, and the check that it did: rows of values, payloads, keys and values.

Everything that can be asked of `Exhibits` is under a root of a receipt that the accused signed, at the place where it is asked for.
Trees have the shape that the receipt, the plan and the session's length give them, so no inner node passes for a leaf and no row
for another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import HASH_BYTES, leaf_hash, merkle_range_root, verify_merkle_range
from nexus.core.manifest import LAYERS_MAX
from nexus.core.record import Record, digest, many, raw, text, uint
from nexus.proof.arithmetic.plan import ATTENTION
from nexus.proof.evidence.case import CheckedCase
from nexus.proof.evidence.record import EVIDENCE_BYTES_MAX
from nexus.proof.receipts import STEPS_MAX, Receipt
from nexus.proof.trace import CELL_BYTES, LOGITS, OPS

# Leaves that a proof may open, of all kinds together: hashing so many small ones takes about a second.
LEAVES_MAX = 1 << 18
POSITION_MAX = 2**24
# Two per level of a tree of so many leaves.
SIBLINGS_MAX = 48

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cell(Record):
    """The op roots of one layer in one step, or for the layer behind the last one the hash of the logits. Paths here and in what
    follows are those of `nexus.core.hashing.verify_merkle_range`.

    `layer`: of the whole model. `layer_path`: to the step root; `step_path`: from there to `trace_root`.
    """

    step: int = uint(STEPS_MAX)
    layer: int = uint(LAYERS_MAX)
    data: bytes = raw(HASH_BYTES, CELL_BYTES)
    layer_path: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)
    step_path: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


@dataclass(frozen=True, slots=True)
class Rows(Record):
    """Rows of one value from number `row` on, float32 little-endian, under the op root in a cell. Siblings are those of
    `verify_merkle_range`: all rows together need none."""

    step: int = uint(STEPS_MAX)
    layer: int = uint(LAYERS_MAX)
    op: str = text(16)
    row: int = uint(POSITION_MAX)
    data: bytes = raw(most=EVIDENCE_BYTES_MAX)
    siblings: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


@dataclass(frozen=True, slots=True)
class Payload(Record):
    """What went into or came out of one step, under `in_root` or `out_root`."""

    step: int = uint(STEPS_MAX)
    data: bytes = raw(most=EVIDENCE_BYTES_MAX)
    path: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


@dataclass(frozen=True, slots=True)
class LogRecords(Record):
    """Keys and values of one key-value head from position `position` on, one record after the other. `before`: 0 for the log of
    the case's receipt, 1 for that of the receipt before. `siblings`: to the log root; `path`: from there to `kv_root`."""

    before: int = uint(1)
    layer: int = uint(LAYERS_MAX)
    head: int = uint(2**16)
    position: int = uint(POSITION_MAX)
    data: bytes = raw(most=EVIDENCE_BYTES_MAX)
    siblings: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)
    path: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


@dataclass(frozen=True, slots=True)
class LogRoot(Record):
    """The root of one log under `kv_root` of the case's receipt, and with `before` of the receipt before. `peaks`: of the log as it
    was then (`nexus.core.hashing.merkle_peaks`), none at the first window."""

    layer: int = uint(LAYERS_MAX)
    head: int = uint(2**16)
    root: bytes = digest()
    path: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)
    peaks: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)
    path_before: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


class Exhibits:
    """Checked openings of one case. What is asked for and was not shown raises MalformedError."""

    def __init__(self, case: CheckedCase, previous: Sequence[Receipt]) -> None:
        """`previous`: the accused's receipts before the case's, the newest first, each named by the one after it."""
        self.case = case
        self._roots: dict[tuple[int, int, str], bytes] = {}
        self._rows: dict[tuple[int, int, str], dict[int, bytes]] = {}
        self._inputs: dict[int, bytes] = {}
        self._outputs: dict[int, bytes] = {}
        self._records: dict[tuple[int, int, int], dict[int, bytes]] = {}
        self._leaves = 0
        self.receipts = [case.receipt, *previous]
        for receipt, before in zip(self.receipts, previous, strict=False):
            if receipt.prev != before.id:
                raise VerificationError("the receipts before the case's are not the ones that it names")
            # What an honest node names goes before without a gap; what does not is a matter of evidence of kind CHAIN.
            if before.step0 + before.n != receipt.step0 or (case.causal and before.kv_len + receipt.n != receipt.kv_len):
                raise VerificationError("the receipts before the case's do not go before it")

    @property
    def before(self) -> Receipt | None:
        """The accused's receipt of the window before, None at the session's first window."""
        if not self.case.receipt.prev:
            return None
        if len(self.receipts) < 2:
            raise MalformedError("the proof lacks the receipt of the window before")
        return self.receipts[1]

    # --- showing ------------------------------------------------------------------------------------------------------------

    def _count(self, leaves: int) -> None:
        self._leaves += leaves
        if self._leaves > LEAVES_MAX:
            raise MalformedError(f"a proof opens at most {LEAVES_MAX} leaves")

    def _require_step(self, step: int) -> None:
        if not self.case.has_step(step):
            raise VerificationError(f"the receipt is not for step {step}")

    def add_cell(self, cell: Cell) -> None:
        case, shape = self.case, self.case.shape
        self._require_step(cell.step)
        index = cell.layer - case.start
        if not 0 <= index < shape.layers + shape.logits or len(cell.data) != (CELL_BYTES if index < shape.layers else HASH_BYTES):
            raise VerificationError(f"the receipt's stage commits to nothing of this form for layer {cell.layer}")
        step_root = merkle_range_root(shape.layers + shape.logits, index, [leaf_hash(cell.data)], cell.layer_path)
        at = cell.step - case.receipt.step0
        verify_merkle_range(case.receipt.trace_root, case.receipt.n, at, [step_root], cell.step_path)
        for number, op in enumerate(OPS if index < shape.layers else (LOGITS,)):
            self._roots[cell.step, cell.layer, op] = cell.data[number * HASH_BYTES : (number + 1) * HASH_BYTES]

    def add_rows(self, rows: Rows) -> None:
        root = self.root(rows.step, rows.layer, rows.op)
        size = self.rows_committed(rows.step, rows.op)
        leaves = self._split(rows.data, 4 * self.case.widths[rows.op])
        verify_merkle_range(root, size, rows.row, [leaf_hash(leaf) for leaf in leaves], rows.siblings)
        shown = self._rows.setdefault((rows.step, rows.layer, rows.op), {})
        shown.update(enumerate(leaves, rows.row))

    def add_input(self, payload: Payload) -> None:
        case = self.case
        self._add_payload(payload, case.receipt.in_root)
        count, rest = divmod(len(payload.data), case.input_bytes)
        # Of a causal session the receipt says how long every step is; an honest one does not lie about it.
        if rest or not 1 <= count <= case.model.context or (case.causal and count != case.rows(payload.step)):
            raise VerificationError(f"the input of step {payload.step} is not one that the receipt is for")
        self._inputs[payload.step] = payload.data

    def add_output(self, payload: Payload) -> None:
        self._add_payload(payload, self.case.receipt.out_root)
        self._outputs[payload.step] = payload.data

    def _add_payload(self, payload: Payload, root: bytes) -> None:
        self._require_step(payload.step)
        self._count(1)
        receipt = self.case.receipt
        verify_merkle_range(root, receipt.n, payload.step - receipt.step0, [leaf_hash(payload.data)], payload.path)

    def add_records(self, records: LogRecords) -> None:
        receipt, log = self._log(records.before, records.layer, records.head)
        leaves = self._split(records.data, self.record_bytes(records.layer))
        root = merkle_range_root(receipt.kv_len, records.position, [leaf_hash(leaf) for leaf in leaves], records.siblings)
        verify_merkle_range(receipt.kv_root, self._logs, log, [root], records.path)
        self._records.setdefault((records.before, records.layer, records.head), {}).update(enumerate(leaves, records.position))

    def _log(self, before: int, layer: int, head: int) -> tuple[Receipt, int]:
        case, shape = self.case, self.case.shape
        if not (case.start <= layer < case.end and 0 <= head < shape.kv_heads):
            raise VerificationError("the receipt's stage keeps no such log")
        receipt = case.receipt if not before else self.before
        if receipt is None:
            raise VerificationError("there is no window before the first one")
        return receipt, (layer - case.start) * shape.kv_heads + head

    @property
    def _logs(self) -> int:
        return self.case.shape.layers * self.case.shape.kv_heads

    def check_log_root(self, log: LogRoot) -> None:
        """That the log has this root at the end of the window."""
        receipt, number = self._log(0, log.layer, log.head)
        verify_merkle_range(receipt.kv_root, self._logs, number, [log.root], log.path)

    def check_log_before(self, log: LogRoot, root: bytes) -> None:
        """That the log had `root` at the end of the window before."""
        receipt, number = self._log(1, log.layer, log.head)
        verify_merkle_range(receipt.kv_root, self._logs, number, [root], log.path_before)

    def record_bytes(self, layer: int) -> int:
        wide = ATTENTION in self.case.exact.layers[layer].wide
        return self.case.exact.head_dim * (3 if wide else 2) + 8

    def _split(self, data: bytes, size: int) -> list[bytes]:
        count, rest = divmod(len(data), size)
        if rest or not count:
            raise MalformedError(f"{len(data)} bytes are no rows of {size}")
        self._count(count)
        return [data[at : at + size] for at in range(0, len(data), size)]

    # --- asking -------------------------------------------------------------------------------------------------------------

    def root(self, step: int, layer: int, op: str) -> bytes:
        """The op root that the accused committed to."""
        try:
            return self._roots[step, layer, op]
        except KeyError:
            raise MalformedError(f"the proof does not show the op root of {op!r} of layer {layer} in step {step}") from None

    def tokens(self, step: int) -> int:
        """Of a step: known of a causal session from its receipt, of an encoder's from the text itself."""
        self._require_step(step)
        return self.case.rows(step) if self.case.causal else len(self.input(step)) // self.case.input_bytes

    def rows_committed(self, step: int, op: str) -> int:
        return 1 if op == LOGITS else self.tokens(step)

    def input(self, step: int) -> bytes:
        try:
            return self._inputs[step]
        except KeyError:
            raise MalformedError(f"the proof does not show the input of step {step}") from None

    def output(self, step: int) -> bytes:
        try:
            return self._outputs[step]
        except KeyError:
            raise MalformedError(f"the proof does not show the output of step {step}") from None

    def values(self, step: int, layer: int, op: str, row: int, count: int) -> Array:
        """Rows of a value as committed to: float32 [count, width]. They are finite: an honest stage signs for no others."""
        shown = self._rows.get((step, layer, op), {})
        try:
            data = b"".join(shown[number] for number in range(row, row + count))
        except KeyError:
            raise MalformedError(f"the proof does not show rows of {op!r} of layer {layer} in step {step}") from None
        values = np.frombuffer(data, "<f4").astype(np.float32, copy=False).reshape(count, self.case.widths[op])
        if not np.isfinite(values).all():
            raise VerificationError(f"rows of {op!r} that a later fault is said to follow from are not numbers")
        return values

    def committed(self, step: int, layer: int, op: str, row: int) -> bytes:
        """One row, byte by byte."""
        shown = self._rows.get((step, layer, op), {})
        if row not in shown:
            raise MalformedError(f"the proof does not show row {row} of {op!r} of layer {layer} in step {step}")
        return shown[row]

    def record(self, before: int, layer: int, head: int, position: int) -> bytes:
        shown = self._records.get((before, layer, head), {})
        if position not in shown:
            raise MalformedError(f"the proof does not show the record of position {position} in layer {layer}, head {head}")
        return shown[position]

    def shows_log(self, layer: int, head: int) -> bool:
        """Whether the accused's log at the end of the window was opened."""
        return (0, layer, head) in self._records

    def records(self, before: int, layer: int, head: int, start: int, end: int) -> list[bytes]:
        """Those of positions [start, end)."""
        return [self.record(before, layer, head, position) for position in range(start, end)]
