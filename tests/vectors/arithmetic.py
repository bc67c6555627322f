"""Golden vectors of the exact arithmetic: three tiny models, and a session of each with all that is committed to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.hashing import leaf_hash
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan, Rope, plan_to_json
from nexus.proof.arithmetic.reference import ReferenceStage
from nexus.proof.arithmetic.rows import TABLES, linear_leaves, piece_names, prove_weights, row_layout, rows_root, tensor_leaves
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.arithmetic.tables import rope_tables
from nexus.proof.receipts import tokens_to_bytes
from tests.proof.arithmetic.made import OPS, Arrays, encoder_plan, make_plan

STEPS = ([3, 14, 15, 9, 2, 6], [5], [11])
SAMPLING = Sampling(0.8, 0.95, 7, 8, 0.05, 1.1)
_TINY = {"hidden": 8, "ffn": 12, "head_dim": 4, "rotated": 4, "vocab": 16, "context": 32}
_SHORT_WINDOW = LayerPlan(window=3, rope=1, wide=frozenset(OPS))
PLANS = {
    "a plain decoder": make_plan(**_TINY),
    "a decoder with everything": make_plan(
        **_TINY | {"rotated": 2},
        layers=(LayerPlan(), _SHORT_WINDOW),
        activation="gelu_tanh",
        tied=False,
        qk_norm=True,
        post_norms=True,
        attention_cap=2.5,
        logit_cap=30.0,
        embed_scale=float(np.float32(np.sqrt(np.float32(8)))),
        ropes=(Rope((("rope_theta", 10000.0),)), Rope((("factor", 8.0), ("rope_theta", 1e6), ("rope_type", "linear")))),
        wide_head=True,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    ),
    "an encoder": encoder_plan(**_TINY | {"rotated": 0}, normalized=True),
}


def tensors_of(plan: ExactPlan) -> dict[str, Arrays]:
    """Weights by a rule that needs no generator of random numbers: the n-th value of all is a hash's byte."""
    pieces = {name: plan.piece_tensors(name) for name in piece_names(plan) if name != TABLES}
    return {
        piece: {name: _tensor(f"{piece}/{name}", dtype, shape) for name, (dtype, shape) in shapes.items()}
        for piece, shapes in pieces.items()
    }


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    count = int(np.prod(shape))
    stream = b"".join(leaf_hash(f"{name}/{block}".encode()) for block in range(-(-count // 32)))
    numbers = np.frombuffer(stream, np.uint8)[:count].astype(np.int64).reshape(shape)  # 0 to 255
    if dtype == "I8":
        return (numbers % 255 - 127).astype(np.int8)
    if name.endswith(".scale"):
        return ((1 + numbers) / 65536).astype(np.float32)
    return (numbers / 128 if name.endswith("norm.weight") else (numbers - 128) / 512).astype(np.float32)


def model_vectors(plan: ExactPlan) -> dict[str, object]:
    pieces = tensors_of(plan)
    tables: Arrays = {}
    for number, rope in enumerate(plan.ropes):
        coarse, fine = rope_tables(rope, plan.rotated, plan.context)
        tables |= {f"rope.{number}.coarse": coarse, f"rope.{number}.fine": fine}
    leaves = {name: leaves_of(plan, name, pieces[name] if name != TABLES else tables) for name in piece_names(plan)}
    hashes = {name: [leaf_hash(leaf) for leaf in each] for name, each in leaves.items()}
    stage = ReferenceStage(plan, 0, len(plan.layers), pieces, tables)
    inputs = [tokens_to_bytes(tokens) for tokens in STEPS]
    session = stage.run(inputs, SAMPLING)
    trace = session.trace(0, len(inputs))
    length = sum(map(len, STEPS))
    return {
        "exact.json": plan_to_json(plan).decode("ascii"),
        "tensors": {
            piece: {name: values.tobytes().hex() for name, values in sorted(each.items())} for piece, each in pieces.items()
        },
        "tables, leaf hash of float64": {name: leaf_hash(values.astype("<f8").tobytes()).hex() for name, values in tables.items()},
        "rows": {name: rows_root(each).hex() for name, each in hashes.items()},
        "proof of rows 3 to 7 of layer.1": prove_weights(2, 3, leaves["layer.1"][3:7], hashes["layer.1"]).to_bytes().hex(),
        "inputs": [payload.hex() for payload in inputs],
        "outputs": [payload.hex() for payload in session.outputs],
        "values of layer 1 in the last step": {op: values.tobytes().hex() for op, values in session.steps[-1].layers[1].items()},
        "record of layer 1, head 0, the last token": session.records(1, 0, length)[-1].hex() if plan.causal else "",
        "trace": trace.to_bytes().hex(),
        "trace_root": trace.trace_root(session.shape, len(inputs)).hex(),
        "kv_root": session.kv_root(length).hex(),
    }


def leaves_of(plan: ExactPlan, name: str, arrays: Arrays) -> list[bytes]:
    leaves: list[bytes] = []
    for section in row_layout(plan, name).sections:
        part = section.name
        if section.linear:
            block = linear_leaves(arrays[f"{part}.weight"], arrays[f"{part}.scale"], arrays.get(f"{part}.bias"))
        else:
            block = tensor_leaves(arrays[part])
        leaves += [row.tobytes() for row in block]
    return leaves


def arithmetic_vectors() -> dict[str, object]:
    return {name: model_vectors(plan) for name, plan in PLANS.items()}
