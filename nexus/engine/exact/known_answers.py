"""What an exact model brings to be checked with, known answers and tables, read without torch: so an encoder is there at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError
from nexus.engine.exact.pieces import Piece
from nexus.proof.arithmetic.plan import ExactPlan, Shapes
from nexus.proof.arithmetic.tables import PHI_MAX, PHI_PER_UNIT, ROPE_FINE

VECTOR_TOKENS = 8


class KnownAnswers:
    """A short text, the hidden state before every layer, and what comes out at the end."""

    def __init__(self, tokens: NDArray[np.int64], states: NDArray[np.float32], answer: NDArray[np.float32]) -> None:
        """`tokens` [n]; `states` [layers + 1, n, hidden]; `answer`: the last token's logits, or an encoder's vector."""
        self.tokens, self.states, self.answer = tokens, states, answer

    @classmethod
    def read(cls, path: Path, plan: ExactPlan) -> KnownAnswers:
        try:
            shapes = vector_shapes(plan)
            piece = Piece(path, shapes)
        except ModelFormatError:
            raise ModelFormatError(
                f"{path.name} does not hold the known answers of this model", "Fetch or add the model again"
            ) from None
        tokens = piece.tensor("tokens").astype(np.int64)
        if int(tokens.min()) < 0 or int(tokens.max()) >= plan.vocab:
            raise ModelFormatError("the known answers are for tokens that the model does not have", "Add the model again")
        return cls(tokens, piece.tensor("states").astype(np.float32), piece.tensor(answer_name(plan)).astype(np.float32))


def vector_shapes(plan: ExactPlan) -> Shapes:
    n = min(VECTOR_TOKENS, plan.context)
    return {
        "tokens": ("I64", (n,)),
        "states": ("F32", (len(plan.layers) + 1, n, plan.hidden)),
        answer_name(plan): ("F32", (plan.vocab if plan.causal else plan.hidden,)),
    }


def answer_name(plan: ExactPlan) -> str:
    return "logits" if plan.causal else "vector"


def vector_tokens(plan: ExactPlan) -> NDArray[np.int64]:
    """The text of the known answers: tokens spread over the vocabulary."""
    return np.array([(7 + 2654435761 * i) % plan.vocab for i in range(min(VECTOR_TOKENS, plan.context))], np.int64)


def table_shapes(plan: ExactPlan) -> Shapes:
    shapes: Shapes = {"exp_hi": ("F64", (256,)), "exp_lo": ("F64", (4096,)), "phi": ("F64", (PHI_PER_UNIT * PHI_MAX + 2,))}
    for number in range(len(plan.ropes)):
        shapes[f"rope.{number}.coarse"] = ("F64", (-(-plan.context // ROPE_FINE), plan.rotated // 2, 2))
        shapes[f"rope.{number}.fine"] = ("F64", (ROPE_FINE, plan.rotated // 2, 2))
    return shapes
