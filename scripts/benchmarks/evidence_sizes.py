"""How large proofs of fraud are, and what a verdict on them costs. Run: python -m scripts.benchmarks.evidence_sizes

A stage of a real shape with random weights computes a short session in numpy and lies about one number; the proof is built with and
without what the stage opens, written as a file and verified from nothing but that. Random weights do not matter: sizes and work
follow from the shape alone. Times are CPU seconds of one process, the least of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.proof.accuse import accuse, accuse_opening
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan, Rope
from nexus.proof.audit import Cell
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.proof.receipts import tokens_to_bytes
from nexus.proof.trace import LOGITS, OPS
from scripts.benchmarks import models
from scripts.benchmarks.pure_session import Arrays, PureModel, PureSession, run_pure

PROMPT_TOKENS = 16
STEPS = 4
ROUNDS = 7
ROW_BYTES_TARGET = 16 * 1024
ROW_MS_TARGET = 5.0
# As nexus/models/nano/config.json.
NANO = models.Shape(12, 192, 6, 2, 512, 2048, tied=True, context=512)


def plan_of(shape: models.Shape) -> ExactPlan:
    return ExactPlan(
        causal=True,
        layers=(LayerPlan(),) * shape.layers,
        hidden=shape.hidden,
        ffn=shape.feed_forward,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotated=shape.head_dim,
        vocab=shape.vocabulary,
        context=shape.context,
        eps=1e-5,
        activation="silu",
        gated=True,
        tied=shape.tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        post_norms=False,
        norm_offset=False,
        attention_scale=float(np.float32(shape.head_dim**-0.5)),
        attention_cap=0.0,
        logit_cap=0.0,
        embed_scale=0.0,
        ropes=(Rope((("rope_theta", shape.rope_theta),)),),
    )


def random_pieces(plan: ExactPlan, names: list[str]) -> dict[str, Arrays]:
    random = np.random.default_rng(0)
    pieces: dict[str, Arrays] = {}
    for name in names:
        tensors: Arrays = {}
        for key, (dtype, shape) in plan.piece_tensors(name).items():
            if dtype == "I8":
                tensors[key] = random.integers(-127, 128, shape, np.int8)
            elif key.endswith(".scale"):
                tensors[key] = np.full(shape, 2.0**-12, np.float32)
            else:
                tensors[key] = random.normal(1, 0.1, shape).astype(np.float32)
        pieces[name] = tensors
    return pieces


def one_bit(values: NDArray[np.float32]) -> None:
    """Of the first number of the last row: the smallest lie there is."""
    values.view(np.uint32)[-1, 0] ^= 1


def measure(shapes: dict[str, models.Shape] | None = None) -> list[dict[str, object]]:
    """One entry per proof: shape, kind of proof, bytes, milliseconds of CPU of a verdict, whether the targets for a row are met."""
    found: list[dict[str, object]] = []
    for name, shape in (shapes or {"nano": NANO, "135m": models.SHAPES["135m"]}).items():
        plan = plan_of(shape)
        last = shape.layers - 1
        model = PureModel(plan, random_pieces(plan, [EMBEDDING, layer_name(last - 1), layer_name(last), HEAD]))
        # Only the last stage is computed: it has two layers, and states that nobody computed come in.
        states = np.random.default_rng(1).normal(0, 1, (PROMPT_TOKENS + STEPS - 1, plan.hidden)).astype("<f4")
        inputs = [states[:PROMPT_TOKENS].tobytes(), *(row.tobytes() for row in states[PROMPT_TOKENS:])]
        session = LastStage(model, inputs)
        for op in (*OPS, LOGITS):
            for proof, evidence in session.proofs(op):
                size, cost_ms = len(evidence.to_file()), cpu_ms(evidence)
                is_row = proof.startswith("row")
                met = size <= ROW_BYTES_TARGET and cost_ms <= ROW_MS_TARGET
                entry: dict[str, object] = {"shape": name, "op": op, "proof": proof, "bytes": size, "check_ms": round(cost_ms, 2)}
                found.append(entry | ({"target_met": met} if is_row and op in OPS else {}))
    return found


class LastStage:
    """The stage of the last two layers, which lies about one number."""

    def __init__(self, model: PureModel, inputs: list[bytes]) -> None:
        self._model, self._inputs = model, inputs
        layers = len(model.plan.layers)
        self._session: PureSession = run_pure(
            model, inputs, edges=(0, layers - 2, layers), window=STEPS, prompt=tokens_to_bytes(range(PROMPT_TOKENS)), only=1
        )

    def proofs(self, op: str) -> list[tuple[str, Evidence]]:
        """With the row of a decoded token opened; without, of that token; without, of the whole prompt."""
        session, stage = self._session, 1
        found = []
        for step, opens in ((STEPS - 1, True), (STEPS - 1, False), (0, False)):
            layer = 2 if op == LOGITS else 1
            claimed = session.cheat(stage, (step, layer, op, one_bit))
            accused = session.accused(stage)
            if opens:
                opened = session.opening(stage, Cell(step, 0, layer, 0), claimed)
                found.append(("row, opened", accuse_opening(accused, opened, op, self._model)))
                continue
            evidence = accuse(accused, session.values[stage], self._model)
            assert evidence is not None
            if op != LOGITS:
                found.append((f"whole, {'one token' if step else f'{PROMPT_TOKENS} tokens'}", evidence))
        return found


def cpu_ms(evidence: Evidence) -> float:
    content = evidence.to_file()

    def once() -> float:
        start_s = time.process_time()
        verify_evidence(Evidence.from_file(content))
        return time.process_time() - start_s

    return least(once) * 1000


def least(once: Callable[[], float]) -> float:
    return min(once() for _ in range(ROUNDS))


def main() -> None:
    for entry in measure():
        print(
            f"{entry['shape']:>5} {entry['op']:>10} {entry['proof']:>18} {entry['bytes']:>9} bytes {entry['check_ms']:>8} ms "
            f"{'' if entry.get('target_met', True) else 'over the target'}"
        )


if __name__ == "__main__":
    main()
