"""From a difference between what a stage committed to and what it should have, to evidence that convicts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.manifest import Manifest
from nexus.core.plan import Plan
from nexus.proof.receipts import SignedReceipt, Terms
from nexus.proof.trace import OPS, TraceShape, WindowTrace


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

    `exact_plan`: the model's exact.json. `receipts`: the stage's, from its first on. `inputs`: the payload of every step.
    `outputs`: the payloads that it gave where they are known, as at the last stage; else none.
    """

    manifest: Manifest
    exact_plan: bytes
    plan: Plan
    terms: Terms
    receipts: Sequence[SignedReceipt]
    inputs: Sequence[bytes]
    outputs: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that a stage committed to and should not have. `window`: which receipt. `op`: what was computed wrongly in
    step `step` of the session, and LOG where the log of `head` is wrong at the window's end; `layer` from the stage's first on."""

    window: int
    step: int
    layer: int
    op: str
    head: int = 0


LOG = "log"


def first_difference(shape: TraceShape, claimed: Sequence[WindowTrace], recomputed: Recomputed) -> Difference | None:
    """Windows in order; in each the operations in the order in which they are computed, then the logs. None where all is right.

    Everything before the difference is as it should be, so what the wrong operation worked on is known to whoever recomputed it.
    """
    step0 = 0
    for window, theirs in enumerate(claimed):
        steps = len(theirs.cells) // shape.step_bytes
        theirs.check(shape, steps)
        ours = recomputed.trace(step0, steps)
        if ours.cells != theirs.cells:
            return _first_cell(shape, window, step0, steps, theirs.cells, ours.cells)
        if ours.logs != theirs.logs:
            at = _first_byte(theirs.logs, ours.logs) // 32
            return Difference(window, step0 + steps - 1, at // shape.kv_heads, LOG, at % shape.kv_heads)
        step0 += steps
    return None


def _first_byte(one: bytes, other: bytes) -> int:
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def _first_cell(shape: TraceShape, window: int, step0: int, steps: int, theirs: bytes, ours: bytes) -> Difference:
    at = _first_byte(theirs, ours)
    step, rest = divmod(at, shape.step_bytes)
    layer, op = divmod(rest // 32, len(OPS))
    return Difference(window, step0 + step, layer, "logits" if layer == shape.layers else OPS[op])
