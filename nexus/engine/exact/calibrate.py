"""The last part of a conversion: which operations need wide activations, and the model's known answers.

Both come from the reference arithmetic itself, one layer in memory at a time, so that they are the same on every machine and with
them the model's root. A calibration text runs through the layers with every operation wide. At each layer each operation is then
made narrow alone: what that changes in the layer's output, relative to what the layer adds, is its error (docs/exact.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError, OutOfBoundsError
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.engine.exact import gemm, torch_step
from nexus.engine.exact.convert import WEIGHTS_FIX
from nexus.engine.exact.known_answers import KnownAnswers, vector_tokens
from nexus.engine.exact.pieces import Piece
from nexus.engine.exact.stage import pooled
from nexus.engine.pooling import Pooling
from nexus.proof.arithmetic.plan import ATTENTION, HEAD_OP, LINEARS, ExactPlan, LayerPlan

# An operation whose error is above this, in the mean over the calibration's tokens, is made wide.
ERROR_MAX = 0.03
CALIBRATION_TOKENS = 64
# Prose, a list, code, numbers and other scripts: what activates the odd channels of a model.
CALIBRATION_TEXT = (
    "The lighthouse keeper wrote in his diary on 14 March 1893: wind from the north-west, two ships sighted, none in distress.\n"
    "1. Boil 250 ml of water.  2. Add salt; stir.\n"
    'def area(r: float) -> float:\n    return 3.14159 * r**2\n{"name": "Zoë", "ok": true}\n'
    "Быстрая лиса прыгает. 機械は夢を見るか? She asked why, and nobody answered."
)
_OPS = (*LINEARS, ATTENTION)
_ALL = frozenset(_OPS)

Tables = Mapping[str, NDArray[np.float64]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """`plan`: with its wide operations. `errors`: of every operation, by layer, as measured; empty for an encoder, which is wide
    throughout."""

    plan: ExactPlan
    answers: KnownAnswers
    errors: dict[str, list[float]]


def calibrate(
    plan: ExactPlan,
    path: Callable[[str], Path],
    tables: Tables,
    tokens: Sequence[int],
    pooling: Pooling,
    progress: Callable[[int], None],
) -> Calibrated:
    """`path`: of a piece by name. `tokens`: of the calibration text. `progress`: told the layers that are done.

    Raises LocalError where no integer product is right on this processor, ModelFormatError for weights that compute nonsense.
    """
    if max(tokens, default=0) >= plan.vocab:
        raise ModelFormatError(
            f"the tokenizer gives token {max(tokens)}, the model has {plan.vocab}", "Is the tokenizer that of this model?"
        )
    try:
        with torch.inference_mode():
            return _calibrate(plan, path, tables, tokens, pooling, progress)
    except OutOfBoundsError as error:
        raise ModelFormatError(
            "with these weights the model computes values that are not numbers or beyond 2^40", WEIGHTS_FIX
        ) from error


def _calibrate(
    plan: ExactPlan,
    path: Callable[[str], Path],
    tables: Tables,
    tokens: Sequence[int],
    pooling: Pooling,
    progress: Callable[[int], None],
) -> Calibrated:
    kernel = _kernel(plan)
    known = vector_tokens(plan)
    embedded = _Embedding(plan, Piece(path(EMBEDDING), plan.embedding_tensors()), tables, kernel)
    sample = embedded(np.array(tokens[: min(CALIBRATION_TOKENS, plan.context)], np.int64)) if plan.causal else None
    x = embedded(known)
    states, layers = [x], []
    errors: dict[str, list[float]] = {op: [] for op in _OPS} if plan.causal else {}
    for index, layer in enumerate(plan.layers):
        tensors = _tensors(Piece(path(layer_name(index)), plan.layer_tensors()))
        wide = _ALL
        if sample is not None:
            found, sample = _errors(plan, layer, tensors, tables, kernel, sample)
            wide = frozenset(op for op, error in found.items() if error > ERROR_MAX)
            for op, error in found.items():
                errors[op].append(error)
        layers.append(replace(layer, wide=wide))
        x = _layer(plan, layers[-1], tensors, tables, kernel, x)
        states.append(x)
        progress(index + 1)
    plan = replace(plan, layers=tuple(layers))
    if sample is None:
        answer = pooled(x, pooling)
    else:
        head = _Head(plan, path, tables, kernel)
        errors[HEAD_OP] = [head.error(sample)]
        plan = replace(plan, wide_head=errors[HEAD_OP][0] > ERROR_MAX)
        answer = head.logits(x[-1:], wide=plan.wide_head)
    return Calibrated(plan, KnownAnswers(known, torch.stack(states).numpy(), answer.numpy()), errors)


def _kernel(plan: ExactPlan) -> gemm.Kernel:
    """A product that is right here and takes the weights as they are: each weight is used for few rows and then dropped."""
    depths = {depth for _, depth in plan.linear_shapes().values()}
    right = {verdict.name for verdict in gemm.verdicts(depths) if verdict.right}
    return gemm.IntMM if gemm.IntMM.name in right else gemm.choose(depths)


def _tensors(piece: Piece) -> Tensors:
    return {name: torch.from_numpy(piece.tensor(name)) for name in piece.names}


def _layer(
    plan: ExactPlan, layer: LayerPlan, tensors: Tensors, tables: Tables, kernel: gemm.Kernel, x: torch.Tensor
) -> torch.Tensor:
    """One layer over a whole text, float32 [tokens, hidden] to the same."""
    # Between two others, so that it is neither the first of the model nor the last.
    alone = replace(plan, layers=(layer, layer, layer))
    model = torch_step.build(alone, 1, 2, {layer_name(1): tensors}, tables, kernel, checks=False)
    return model.hidden([model.run(model.new_cache(), 0, len(x))], x)


def _errors(
    plan: ExactPlan, layer: LayerPlan, tensors: Tensors, tables: Tables, kernel: gemm.Kernel, x: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor]:
    """The error of every operation with narrow activations, and the layer's output with wide ones."""
    reference = _layer(plan, replace(layer, wide=_ALL), tensors, tables, kernel, x)
    found = {}
    for op in _OPS:
        narrow = _layer(plan, replace(layer, wide=_ALL - {op}), tensors, tables, kernel, x)
        found[op] = relative_error(narrow.numpy(), reference.numpy(), x.numpy())
    return found, reference


def relative_error(got: NDArray[np.float32], reference: NDArray[np.float32], start: NDArray[np.float32]) -> float:
    """|got - reference| / |reference - start| of each row [rows, n], in the mean over the rows.

    Sums go from left to right: the same value on every machine. Infinite where only `got` differs from `start`.
    """
    error, whole = _squares(got, reference), _squares(reference, start)
    with np.errstate(divide="ignore"):
        return math.fsum(np.sqrt(np.divide(error, whole, out=np.zeros_like(error), where=error > 0))) / len(got)


def _squares(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """|one - other|^2 of each row."""
    difference = one.astype(np.float64) - other
    sums: NDArray[np.float64] = np.add.accumulate(difference * difference, axis=1)[:, -1]
    return sums


class _Embedding:
    """Looks up few tokens, and has no more of the table in memory than a block of it."""

    def __init__(self, plan: ExactPlan, piece: Piece, tables: Tables, kernel: gemm.Kernel) -> None:
        self._plan, self._piece, self._tables, self._kernel = plan, piece, tables, kernel
        self._extras = {name: piece.tensor(name) for name in piece.names if name != "embed.weight"}

    def __call__(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        rows = np.empty((len(tokens), self._plan.hidden), np.int8)
        for first, block in self._piece.blocks("embed.weight"):
            here = (tokens >= first) & (tokens < first + len(block))
            rows[here] = block[tokens[here] - first]
        chosen = {**self._extras, "embed.weight": rows, "embed.scale": self._extras["embed.scale"][tokens]}
        tensors = {name: torch.from_numpy(values) for name, values in chosen.items()}
        # A stage of no layers: the embedding alone, with a vocabulary of just these tokens.
        model = torch_step.build(self._plan, 0, 0, {EMBEDDING: tensors}, self._tables, self._kernel)
        return model.embedded([model.run(None, 0, len(tokens))], torch.arange(len(tokens)))


class _Head:
    """The logits, from blocks of the vocabulary."""

    def __init__(self, plan: ExactPlan, path: Callable[[str], Path], tables: Tables, kernel: gemm.Kernel) -> None:
        self._plan, self._tables, self._kernel = replace(plan, tied=False), tables, kernel
        piece = Piece(path(HEAD), plan.head_tensors())
        self._norm = torch.from_numpy(piece.tensor("norm.weight"))
        self._table, self._name = (Piece(path(EMBEDDING), plan.embedding_tensors()), "embed") if plan.tied else (piece, HEAD_OP)

    def logits(self, x: torch.Tensor, *, wide: bool) -> torch.Tensor:
        """float32 [rows, hidden] to [rows, vocab], or [vocab] of a single row."""
        scale = torch.from_numpy(self._table.tensor(f"{self._name}.scale"))
        plan = replace(self._plan, wide_head=wide)
        parts = []
        for first, block in self._table.blocks(f"{self._name}.weight"):
            tensors = {
                "head.weight": torch.from_numpy(block),
                "head.scale": scale[first : first + len(block)],
                "norm.weight": self._norm,
            }
            count = len(plan.layers)
            model = torch_step.build(plan, count, count, {HEAD: tensors}, self._tables, self._kernel, checks=False)
            # Every row is a run of its own: of each the logits are wanted.
            parts.append(model.logits([model.run(None, 0, 1) for _ in x], x))
        logits = torch.cat(parts, 1)
        return logits[0] if len(x) == 1 else logits

    def error(self, x: torch.Tensor) -> float:
        narrow, wide = (self.logits(x, wide=wide).reshape(len(x), -1).numpy() for wide in (False, True))
        return relative_error(narrow, wide, np.zeros_like(wide))
