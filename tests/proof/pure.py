"""Small sessions in numpy, honest and not, that proofs are made of where no engine is needed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan
from nexus.proof.arithmetic.rows import TABLES, piece_names
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.receipts import tokens_to_bytes
from scripts.benchmarks.pure_session import Arrays, PureModel, PureSession, run_pure
from tests.proof.arithmetic.made import encoder_plan, make_plan

PROMPT = [3, 14, 15, 9, 26, 5, 35]
TEXTS = ([1, 2, 3], [4, 5, 6, 7, 8], [9])
PLANS: dict[str, ExactPlan] = {
    "plain": make_plan(context=64),
    "windows": make_plan(
        layers=(LayerPlan(window=3), LayerPlan(wide=frozenset({"attention", "down"}))), context=64, tied=False, qk_norm=True
    ),
    "norms": make_plan(post_norms=True, layers=(LayerPlan(), LayerPlan(window=5)), context=64, logit_cap=30.0, qkv_bias=True),
    "encoder": encoder_plan(kv_heads=4, context=32),
}


def seeded_pieces(plan: ExactPlan) -> dict[str, Arrays]:
    """Weights out of whole numbers, so that no library's exponential decides on their last bits."""
    random = np.random.default_rng(5)

    def values(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if dtype == "I8":
            return random.integers(-127, 128, shape, np.int8)
        low, high = (40, 400) if name.endswith(".scale") else (8000, 24000) if name.endswith("norm.weight") else (-8000, 8000)
        return (random.integers(low, high, shape) / 16384).astype(np.float32)

    names = [name for name in piece_names(plan) if name != TABLES]
    return {piece: {name: values(name, *form) for name, form in plan.piece_tensors(piece).items()} for piece in names}


@cache
def model(name: str) -> PureModel:
    return PureModel(PLANS[name], seeded_pieces(PLANS[name]))


def session(name: str, nonce: int = 0, penalty: float = 1.0) -> PureSession:
    """Two stages of one layer each; windows of three steps."""
    plan = PLANS[name]
    if not plan.causal:
        return run_pure(model(name), [tokens_to_bytes(text) for text in TEXTS], edges=(0, 1, 2), window=2, nonce=nonce)
    sampling = Sampling(temperature=0.9, seed=7, repetition_penalty=penalty)
    return run_pure(model(name), [tokens_to_bytes(PROMPT)], steps=7, edges=(0, 1, 2), window=3, nonce=nonce, sampling=sampling)


def one_bit(values: NDArray[np.float32]) -> None:
    values.view(np.uint32)[-1, -1] ^= 1
