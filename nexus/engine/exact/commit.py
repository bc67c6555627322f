"""What a session of the exact profile commits to while it is computed: op roots of every step, logs of keys and values.

A step gives the leaf hashes of its rows (`Committed`); a session's `Commitments` turn them into the hashes of nexus.proof.trace.
Parts of a prompt come one by one, and nothing of a row is kept but its place in a tree: of a tree that grows only the *frontier* is
in memory, the roots of its largest complete subtrees (RFC 6962, section 2.1: a power of two of leaves each, the largest first).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import LocalError, UsageError
from nexus.core.hashing import HASH_BYTES
from nexus.engine.exact.native import Commit, Committed, NativeModel, hash_nodes, hash_rows, merkle_roots
from nexus.engine.exact.torch_step import TorchModel
from nexus.proof.receipts import WINDOW_MAX
from nexus.proof.trace import CELL_BYTES, OPS, Sealed, TraceShape, WindowTrace

# Windows are sealed as they fill up; steps of the next ones may have been computed before the first is.
UNSEALED_STEPS_MAX = 4 * WINDOW_MAX

Hashes = NDArray[np.uint8]


class Kernel(Protocol):
    """Layers in memory that compute: `torch_step.TorchModel` and `native.NativeModel`."""

    kernel: str
    weight_bytes: int

    def new_cache(self) -> Any: ...

    def run(self, cache: Any, position: int, count: int, logits: str = "last") -> Any: ...

    def step(self, runs: Sequence[Any], x: torch.Tensor) -> torch.Tensor: ...


def committed_step(
    model: Kernel, runs: Sequence[Any], x: torch.Tensor, which: Sequence[int], *, values: bool = False
) -> tuple[torch.Tensor, list[Committed | None]]:
    """A step of a model, and what it commits to of the runs that `which` names by index. `values`: with the values and records
    themselves. Raises what `model.step` raises, and LocalError where the step finds that it computed wrongly."""
    if isinstance(model, NativeModel):
        commit = Commit(which, values)
        return model.step(runs, x, commit=commit), commit.committed
    assert isinstance(model, TorchModel)
    sink = _Sink(len(model.layers), model.plan.kv_heads if model.plan.causal else 0, len(x), values)
    out = model.step(runs, x, commit=sink)
    has_logits = model.last and model.plan.causal
    committed: list[Committed | None] = []
    row = logit = 0
    for index, run in enumerate(runs):
        logits = {"none": 0, "last": 1, "all": run.count}[run.logits] if has_logits else 0
        hashes = hash_rows(out[logit : logit + logits].numpy()) if index in which else None
        committed.append(None if hashes is None else sink.of(slice(row, row + run.count), hashes))
        row += run.count
        logit += logits
    return out, committed


class _Sink:
    """Hashes what a torch step commits to as it comes, layer by layer."""

    def __init__(self, layers: int, heads: int, rows: int, keep: bool) -> None:
        self._cells = np.empty((layers, len(OPS), rows, HASH_BYTES), np.uint8)
        self._records = np.empty((layers, heads, rows, HASH_BYTES), np.uint8)
        self._keep = keep
        self._values: list[list[NDArray[np.float32]]] = [[] for _ in range(layers)]
        self._record_bytes: list[Hashes] = []

    def value(self, layer: int, op: str, rows: torch.Tensor) -> None:
        values = rows.contiguous().numpy()
        self._cells[layer, OPS.index(op)] = hash_rows(values)
        if self._keep:
            self._values[layer].append(values)

    def records(self, layer: int, records: torch.Tensor) -> None:
        by_head = records.transpose(0, 1).contiguous().numpy()
        heads, rows, size = by_head.shape
        self._records[layer] = hash_rows(by_head.reshape(-1, size)).reshape(heads, rows, HASH_BYTES)
        if self._keep:
            self._record_bytes.append(by_head)

    def of(self, rows: slice, logits: Hashes) -> Committed:
        return Committed(
            self._cells[:, :, rows],
            logits,
            self._records[:, :, rows],
            tuple(tuple(values[rows] for values in layer) for layer in self._values) if self._keep else (),
            tuple(records[:, rows] for records in self._record_bytes),
        )


class Trees:
    """`count` Merkle trees of one size that grow together, as `nexus.core.hashing.merkle_root` builds them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.size = 0
        # peaks[k], uint8 [count, 32]: the roots of the complete subtrees of 2^k leaves, where `size` has that bit.
        self._peaks: list[Hashes | None] = []

    def append(self, leaves: Hashes) -> None:
        """`leaves`: leaf hashes, uint8 [count, n, 32], of the next n leaves of each tree."""
        level = 0
        self.size += leaves.shape[1]
        nodes = leaves
        while nodes.size:
            if level == len(self._peaks):
                self._peaks.append(None)
            peak = self._peaks[level]
            if peak is not None:
                nodes = np.concatenate((peak[:, None], nodes), 1)
            pairs = nodes.shape[1] // 2
            # A copy: a view would keep all the nodes alive.
            self._peaks[level] = nodes[:, -1].copy() if nodes.shape[1] % 2 else None
            paired = np.ascontiguousarray(nodes[:, : 2 * pairs]).reshape(-1, 2 * HASH_BYTES)
            nodes = hash_nodes(paired).reshape(self.count, pairs, HASH_BYTES) if pairs else nodes[:, :0]
            level += 1

    def roots(self) -> Hashes:
        """uint8 [count, 32]; the root of no leaves is the hash of nothing."""
        root: Hashes | None = None
        for peak in self._peaks:
            if peak is not None:
                root = peak if root is None else hash_nodes(np.concatenate((peak, root), 1))
        if root is None:
            return np.broadcast_to(np.frombuffer(blake3(b"").digest(), np.uint8), (self.count, HASH_BYTES))
        return root


class StepRoots:
    """The op roots of one step, whose rows may come in parts."""

    def __init__(self, shape: TraceShape) -> None:
        self._shape = shape
        self._trees: Trees | None = None
        self._only: Hashes | None = None

    def add(self, values: Hashes) -> None:
        """`values`: leaf hashes, uint8 [layers, len(OPS), rows, 32]."""
        if self._trees is None and self._only is None and values.shape[2] == 1:
            self._only = values  # nearly every step: one row, whose hashes are the roots
            return
        if self._trees is None:
            self._trees = Trees(self._shape.layers * len(OPS))
            if self._only is not None:
                self._trees.append(self._only.reshape(self._trees.count, -1, HASH_BYTES))
        self._trees.append(values.reshape(self._trees.count, -1, HASH_BYTES))

    def cells(self, logits: bytes) -> bytes:
        """As `WindowTrace.cells` holds them. `logits`: their leaf hash, empty where the stage has none."""
        roots = self._only if self._trees is None else self._trees.roots()
        assert roots is not None
        return roots.tobytes() + logits


@dataclass(frozen=True, slots=True)
class _Step:
    """A complete step of several rows: its op roots, and the leaves of its records that are not in the logs yet."""

    cells: bytes
    records: list[Hashes]


class Commitments:
    """What one session of one stage has committed to and no receipt covers yet.

    A step is offered when it is computed and accepted when it is answered: one that fails in between leaves nothing behind. Steps
    of one row, nearly all there are, wait as they came: a window's hashes together take a fraction of the time of each alone.
    """

    def __init__(self, shape: TraceShape) -> None:
        self.shape = shape
        self._logs = Trees(shape.layers * shape.kv_heads)
        self._steps: deque[_Step | Committed] = deque()
        # Of a step whose rows are not all there yet.
        self._roots: StepRoots | None = None
        self._records: list[Hashes] = []
        self._offered: Committed | None = None

    @property
    def unsealed(self) -> int:
        """Complete steps that await `seal`."""
        return len(self._steps)

    def check_room(self) -> None:
        """Raises LocalError where so many steps await a seal that no more may be computed."""
        if len(self._steps) >= UNSEALED_STEPS_MAX:
            raise LocalError(f"{len(self._steps)} steps of the session await a receipt", "This is a bug: please report it")

    def offer(self, committed: Committed) -> None:
        """The session's next rows, in place of any that were offered and not accepted."""
        self._offered = committed

    def accept(self, complete: bool) -> None:
        """Takes in what was offered. `complete`: whether the step ends with it, and is not a part of a prompt with more to come."""
        committed, self._offered = self._offered, None
        assert committed is not None
        if complete and self._roots is None and committed.cells.shape[2] == 1:
            self._steps.append(_own(committed))
            return
        if self._roots is None:
            self._roots = StepRoots(self.shape)
        self._roots.add(committed.cells)
        self._records.append(self._leaves([committed]).copy())
        if not self._steps:
            # The oldest step is in the next window that is sealed: its records, a whole prompt's perhaps, need not wait.
            self._append(self._records)
            self._records = []
        if complete:
            self._steps.append(_Step(self._roots.cells(committed.logits[-1:].tobytes()), self._records))
            self._roots, self._records = None, []

    def seal(self, steps: int) -> WindowTrace:
        """The trace of the oldest `steps` unsealed steps. Raises UsageError where there are not so many."""
        if not 0 < steps <= len(self._steps):
            raise UsageError(f"{steps} steps cannot be sealed of {len(self._steps)}", "Seal steps after they are computed")
        sealed = [self._steps.popleft() for _ in range(steps)]
        for kind, group in groupby(sealed, type):
            if kind is Committed:
                self._append([self._leaves([step for step in group if isinstance(step, Committed)])])
            else:
                self._append([part for step in group if isinstance(step, _Step) for part in step.records])
        cells = b"".join(step.cells if isinstance(step, _Step) else step.cells.tobytes() + step.logits.tobytes() for step in sealed)
        return WindowTrace(cells, self._logs.roots().tobytes())

    def _leaves(self, rows: Sequence[Committed]) -> Hashes:
        """Of all logs, [logs, rows, 32]."""
        records = rows[0].records if len(rows) == 1 else np.concatenate([one.records for one in rows], 2)
        return records.reshape(self._logs.count, records.shape[2], HASH_BYTES)

    def _append(self, parts: Sequence[Hashes]) -> None:
        for part in parts:
            self._logs.append(part)


def _own(committed: Committed) -> Committed:
    """Without the memory of the batch that it was computed in."""
    if committed.cells.flags.c_contiguous:
        return committed
    return Committed(committed.cells.copy(), committed.logits.copy(), committed.records.copy())


def sealed(trace: WindowTrace, shape: TraceShape, steps: int) -> Sealed:
    """`Sealed.of`, many hashes at a time."""
    cells = np.frombuffer(trace.cells, np.uint8).reshape(steps, -1)
    leaves = hash_rows(cells[:, : shape.layers * CELL_BYTES].reshape(-1, CELL_BYTES)).reshape(steps, -1, HASH_BYTES)
    if shape.logits:
        leaves = np.concatenate((leaves, hash_rows(cells[:, -HASH_BYTES:])[:, None]), 1)
    trace_root = merkle_roots(merkle_roots(leaves)[None]).tobytes()
    logs = np.frombuffer(trace.logs, np.uint8).reshape(1, -1, HASH_BYTES)
    return Sealed(trace, trace_root, merkle_roots(logs).tobytes() if shape.kv_heads else b"")
