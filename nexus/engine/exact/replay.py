"""A session of a stage computed again from its recorded inputs, as a few large prefills: what a replica audit is made of.

All inputs are known, so rows of many steps are read at once, and give the bits that they gave one by one. Of what the session
commits to only the keys and values stay in memory, and the op roots of the windows that were named beforehand; those of another
window, or a step's values, are computed when they are asked for, by the rows of those steps once more over the same keys and
values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import UsageError
from nexus.core.hashing import HASH_BYTES
from nexus.engine.exact.commit import StepRoots, Trees, committed_step
from nexus.engine.exact.native import Committed, NativeCache, hash_rows
from nexus.engine.exact.pages import page_records
from nexus.engine.exact.stage import ExactStage, tensor_of
from nexus.engine.exact.torch_step import TorchCache
from nexus.engine.float_stage import use_threads
from nexus.engine.stage import Session
from nexus.proof.arithmetic.plan import trace_shape, value_widths
from nexus.proof.arithmetic.sampler import GREEDY, Sampling
from nexus.proof.trace import LOGITS, OPS, WindowTrace, kv_root_of

# More go no faster: the activations of so many fit the caches.
ROWS_PER_PASS = 128
# Memory of the logits, and of what is committed to, of one pass.
PASS_BYTES_MAX = 64 << 20
# Tokens whose records are hashed at once.
_RECORDS_AT_ONCE = 1024
_ENDS_MAX = 256

Inputs = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Span:
    """Where a step's rows are: `position` of the first in the session (of an encoder: in its text), and how many."""

    step: int
    position: int
    rows: int


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a pass: some of one step's, or several whole steps of one row each, `steps` of them from `step` on.
    `skip`: rows of the step before these. `logits`: of which rows they are needed, as a run names it. `commits`: whether what they
    commit to is wanted."""

    step: int
    steps: int
    skip: int
    position: int
    rows: int
    logits: str
    commits: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pass: rows, those of them that need logits, and those that commit."""

    rows: int
    logits: int
    commits: int


def passes_of(spans: Sequence[Span], committing: Collection[int], most: Limits) -> Iterator[list[Part]]:
    """The rows of these steps, in order, as passes within the limits. `committing`: the steps that do."""
    parts: list[Part] = []
    rows = logits = commits = 0
    for span in spans:
        done, does = 0, span.step in committing
        while done < span.rows:
            take = min(span.rows - done, most.rows - rows, most.commits - commits if does else span.rows)
            ends = done + take == span.rows
            if not take or (ends and logits == most.logits):
                yield parts
                parts, rows, logits, commits = [], 0, 0, 0
                continue
            last = parts[-1] if parts else None
            if span.rows == 1 and last and (last.logits, last.step + last.steps, last.commits) == ("all", span.step, does):
                parts[-1] = replace(last, steps=last.steps + 1, rows=last.rows + 1)
            else:
                wanted = "all" if span.rows == 1 else "last" if ends else "none"
                parts.append(Part(span.step, 1, done, span.position + done, take, wanted, does))
            done += take
            rows += take
            logits += ends
            commits += take if does else 0
    if parts:
        yield parts


class Replay:
    """Made by `replay`. Steps, tokens and positions are counted from the session's first, layers from the stage's first.

    `outputs`: the payload that the stage answers every step with. Whatever computes here may raise LocalError (the machine computed
    wrongly) and OutOfBoundsError (nothing honest is computed from these inputs).
    """

    def __init__(self, stage: ExactStage, inputs: Sequence[bytes], sampling: Sampling) -> None:
        """Checks the inputs; `_run` computes."""
        self.stage = stage
        self.outputs: list[bytes] = []
        self.shape = trace_shape(stage.plan, stage.start, stage.end)
        self._sampling = sampling
        self._layers = stage.plan.layers[stage.start : stage.end]
        self._inputs: list[Inputs] = []
        self._spans: list[Span] = []
        position = 0
        for step, payload in enumerate(inputs):
            self._inputs.append(stage._decoded(payload, position))
            rows = len(self._inputs[-1])
            self._spans.append(Span(step, position, rows))
            if stage.causal:
                position += rows
        self._length = position
        self._cache: TorchCache | NativeCache | None = stage.model.new_cache()
        if self._cache is not None and position:
            # At once: addresses of pages that a run was given must not change while the pass's other runs are made.
            self._cache.reserve(position)
        self._cells: dict[int, bytes] = {}
        self._trees = self._no_trees()
        self._logs: dict[int, bytes] = {}
        # Leaves of the logs from a token on that is a multiple of their number, uint8 [logs, tokens, 32].
        self._leaves: tuple[int, NDArray[np.uint8]] | None = None
        self._recent: tuple[int, Committed] | None = None

    # ---- what an auditor asks

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def kv_len(self, step0: int, n: int) -> int:
        """Tokens in the cache after step `step0 + n - 1`, 0 of an encoder."""
        self._check_steps(step0, n)
        last = self._spans[step0 + n - 1]
        return last.position + last.rows if self.stage.causal else 0

    def trace(self, step0: int, n: int) -> WindowTrace:
        """Of steps [step0, step0 + n). Raises UsageError where the session has them not."""
        return self.traces([(step0, n)])[0]

    def traces(self, windows: Sequence[tuple[int, int]]) -> list[WindowTrace]:
        """Of several windows (step0, n), in one go: that takes fewer passes than one by one."""
        for step0, n in windows:
            self._check_steps(step0, n)
        self._compute_cells(sorted({step for step0, n in windows for step in range(step0, step0 + n)}))
        # Logs grow, so in order of their ends.
        for length in sorted({self.kv_len(step0, n) for step0, n in windows}):
            self._logs_at(length)
        return [
            WindowTrace(b"".join(self._cells[step] for step in range(step0, step0 + n)), self._logs_at(self.kv_len(step0, n)))
            for step0, n in windows
        ]

    def kv_root(self, length: int) -> bytes:
        """After `length` tokens; empty of an encoder."""
        return kv_root_of(self._logs_at(length)) if self.shape.kv_heads else b""

    def log_root(self, layer: int, head: int, length: int) -> bytes:
        at = (layer * self.shape.kv_heads + head) * HASH_BYTES
        return self._logs_at(length)[at : at + HASH_BYTES]

    def records(self, layer: int, head: int, length: int) -> list[bytes]:
        """The first `length` records of one log."""
        self._check_length(length)
        return [record.tobytes() for record in self._records(layer, 0, length)[head]]

    def values(self, step: int, layer: int, op: str) -> NDArray[np.float32]:
        """What the stage commits to of a step, [rows, width]; LOGITS: of its last row, for any `layer`."""
        self._check_steps(step, 1)
        span = self._spans[step]
        if op == LOGITS:
            if not self.shape.logits:
                raise UsageError("there are no logits here", "Only the last stage of a language model has them")
            return self._logits(span)
        if self._recent is not None and self._recent[0] == step:
            return self._recent[1].values[layer][OPS.index(op)]
        parts = []
        for pass_ in self._passes([span], (step,)):
            _, (committed,) = self._step(pass_, values=True)
            assert committed is not None
            parts.append(committed.values[layer][OPS.index(op)].copy())
            if committed.cells.shape[2] == span.rows:
                self._recent = step, committed
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def stage_input(self, step: int) -> NDArray[np.float32]:
        """x before the stage's first layer, [rows, hidden]."""
        self._check_steps(step, 1)
        given = self._inputs[step]
        if not self.stage.first:
            return np.asarray(given, np.float32)
        return self.stage.embedded(np.asarray(given, np.int64), self._spans[step].position)

    # ---- computing

    def _run(self, committing: Collection[int]) -> None:
        """All steps, for their outputs, for keys and values, and for what some of them commit to."""
        stage, session = self.stage, Session(None, self._sampling)
        states: list[NDArray[np.float32]] = []
        roots = StepRoots(self.shape)
        for pass_ in self._passes(self._spans, committing):
            tensor, committed = self._step(pass_)
            out, at = tensor.numpy(), 0
            for part, rows_committed in zip(pass_, committed, strict=True):
                if rows_committed is not None:
                    roots = self._keep_cells(part, rows_committed, roots)
                if self.shape.logits:
                    for _ in range(part.steps if part.logits != "none" else 0):
                        session.logits = out[at]
                        session.tokens.append(stage._choose(session))
                        session.steps += 1
                        self.outputs.append(session.tokens[-1].to_bytes(4, "little"))
                        at += 1
                    continue
                rows, at = out[at : at + part.rows], at + part.rows
                if part.logits == "all":
                    self.outputs += [row.astype("<f4", copy=False).tobytes() for row in rows]
                    continue
                states.append(rows)
                if part.logits == "last":
                    whole = states[0] if len(states) == 1 else np.concatenate(states)
                    values = whole if stage.causal else stage._encoded(torch.from_numpy(whole))
                    self.outputs.append(values.astype("<f4", copy=False).tobytes())
                    states = []

    def _passes(self, spans: Sequence[Span], committing: Collection[int]) -> Iterator[list[Part]]:
        if not self.stage.causal:
            # An encoder sees the whole of a text, and texts go one by one.
            return ([Part(span.step, 1, 0, 0, span.rows, "last", span.step in committing)] for span in spans)
        widths = value_widths(self.stage.plan)
        logits = PASS_BYTES_MAX // (4 * widths[LOGITS]) if self.shape.logits else ROWS_PER_PASS
        commits = PASS_BYTES_MAX // (4 * self.shape.layers * sum(widths[op] for op in OPS))
        return passes_of(spans, committing, Limits(ROWS_PER_PASS, max(1, logits), max(1, commits)))

    @torch.inference_mode()
    def _step(self, parts: Sequence[Part], *, values: bool = False) -> tuple[torch.Tensor, Sequence[Committed | None]]:
        """One pass: hidden states or logits, and of each part what it commits to if it does."""
        use_threads(self.stage.weight_bytes)
        which = [index for index, part in enumerate(parts) if part.commits]
        if which:
            return committed_step(self.stage.model, *self._batch(parts), which, values=values)
        return self.stage.model.step(*self._batch(parts)), [None] * len(parts)

    def _batch(self, parts: Sequence[Part]) -> tuple[list[object], torch.Tensor]:
        model = self.stage.model
        runs = [model.run(self._cache, part.position, part.rows, part.logits) for part in parts]
        inputs: list[Inputs] = [
            self._inputs[step][part.skip : part.skip + part.rows]
            for part in parts
            for step in range(part.step, part.step + part.steps)
        ]
        whole: Inputs = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)  # type: ignore[assignment]  # of one type
        return runs, tensor_of(whole)

    def _compute_cells(self, steps: Sequence[int]) -> None:
        missing = [step for step in steps if step not in self._cells]
        roots = StepRoots(self.shape)
        for pass_ in self._passes([self._spans[step] for step in missing], missing):
            _, committed = self._step(pass_)
            for part, rows in zip(pass_, committed, strict=True):
                assert rows is not None
                roots = self._keep_cells(part, rows, roots)

    def _keep_cells(self, part: Part, rows: Committed, roots: StepRoots) -> StepRoots:
        """Takes in the op roots of the steps that end with this part. `roots`: of the step whose rows came before; gives those for
        the part that follows."""
        if part.logits == "all":
            for row in range(part.rows):
                only = StepRoots(self.shape)
                only.add(rows.cells[:, :, row : row + 1])
                self._cells[part.step + row] = only.cells(rows.logits[row].tobytes() if self.shape.logits else b"")
            return roots
        roots.add(rows.cells)
        if part.logits != "last":
            return roots
        self._cells[part.step] = roots.cells(rows.logits.tobytes())
        return StepRoots(self.shape)

    def _logits(self, span: Span) -> NDArray[np.float32]:
        """The last row alone: all before it is in the cache."""
        last = Part(span.step, 1, span.rows - 1, span.position + span.rows - 1, 1, "last", commits=False)
        values: NDArray[np.float32] = self._step([last])[0].numpy()
        return values

    # ---- logs

    def _no_trees(self) -> Trees:
        return Trees(self.shape.layers * self.shape.kv_heads)

    def _logs_at(self, length: int) -> bytes:
        """The roots of all logs after `length` tokens."""
        self._check_length(length)
        if not self.shape.kv_heads:
            return b""
        if length not in self._logs:
            if length < self._trees.size:
                self._trees = self._no_trees()
            while self._trees.size < length:
                self._trees.append(self._next_leaves(self._trees.size, length))
            if len(self._logs) >= _ENDS_MAX:
                del self._logs[next(iter(self._logs))]
            self._logs[length] = self._trees.roots().tobytes()
        return self._logs[length]

    def _next_leaves(self, start: int, end: int) -> NDArray[np.uint8]:
        """Leaves of all logs, uint8 [logs, tokens, 32], from token `start` on and not beyond `end`."""
        first = start - start % _RECORDS_AT_ONCE
        if self._leaves is None or self._leaves[0] != first:
            last = min(self._length, first + _RECORDS_AT_ONCE)
            hashes = []
            for layer in range(self.shape.layers):
                records = self._records(layer, first, last)
                hashes.append(hash_rows(records.reshape(-1, records.shape[2])).reshape(len(records), last - first, HASH_BYTES))
            self._leaves = first, np.concatenate(hashes)
        return self._leaves[1][:, start - first : end - first]

    def _records(self, layer: int, start: int, end: int) -> NDArray[np.uint8]:
        """uint8 [key-value heads, tokens, bytes]."""
        if isinstance(self._cache, TorchCache):
            return self._cache.records(layer, start, end)
        assert isinstance(self._cache, NativeCache)
        return page_records(self.stage.plan, self._layers, self._cache.pages, layer, start, end)

    # ---- checks

    def _check_steps(self, step0: int, n: int) -> None:
        if step0 < 0 or n < 1 or step0 + n > len(self._spans):
            raise UsageError(f"steps {step0} to {step0 + n - 1} are not in a session of {len(self._spans)}", "Ask for fewer")

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise UsageError(f"{length} tokens are not in a session of {self._length}", "Ask for fewer")


def replay(
    stage: ExactStage, inputs: Sequence[bytes], sampling: Sampling | None = None, traces: Sequence[tuple[int, int]] = ()
) -> Replay:
    """Computes a whole session of `stage` again from the payloads of its steps. `sampling`: as the session was opened with.

    `traces`: windows (step0, n) whose traces will be asked for; those of others take passes of their own. Takes the memory of the
    session's keys and values, of its inputs and outputs, and of one pass. Raises MalformedError and UsageError for payloads that
    are none.
    """
    done = Replay(stage, inputs, sampling or GREEDY)
    for step0, n in traces:
        done._check_steps(step0, n)
    done._run({step for step0, n in traces for step in range(step0, step0 + n)})
    return done
