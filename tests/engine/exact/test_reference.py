"""The verifier's arithmetic against the engine's: every value that a stage commits to, every record, every token, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nexus.core.errors import MalformedError, OutOfBoundsError
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, Manifest
from nexus.engine.exact import calibrate
from nexus.engine.exact.commit import committed_step
from nexus.engine.exact.stage import pooled
from nexus.engine.importer import import_model
from nexus.engine.pooling import Pooling
from nexus.engine.stage import load_stage
from nexus.proof.arithmetic.plan import ExactPlan, plan_from_json, value_widths
from nexus.proof.arithmetic.reference import ReferenceStage, SessionValues
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.receipts import tokens_to_bytes
from nexus.proof.trace import LOGITS, OPS, check_trace
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS, Models
from tests.engine.exact.test_native import reference
from tests.proof.arithmetic.made import decoder_plans, encoder_plan, encoder_plans, random_pieces, tables_of

Arrays = Mapping[str, NDArray[Any]]
PROMPT = tokens_to_bytes([5, 17, 99, 3, 42, 64, 7, *range(100, 118)])
SAMPLING = Sampling(temperature=0.9, top_p=0.95, seed=11, top_k=40, min_p=0.01, repetition_penalty=1.2)


def bits(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def check_against_torch(plan: ExactPlan, pieces: Mapping[str, Arrays], steps: Sequence[bytes], start: int, end: int) -> None:
    """Every step of a session, through torch operations and through the reference."""
    given = ReferenceStage(plan, start, end, pieces, tables_of(plan.ropes, plan.rotated, plan.context)).run(steps)
    model = reference(plan, pieces, start, end)
    cache, position = model.new_cache(), 0
    for number, payload in enumerate(steps):
        x = torch.from_numpy(np.frombuffer(payload, "<u4").astype(np.int64) if start == 0 else np.frombuffer(payload, "<f4").copy())
        x = x if start == 0 else x.view(-1, plan.hidden)
        out, (committed,) = committed_step(model, [model.run(cache, position, len(x))], x, [0], values=True)
        assert committed is not None
        for layer in range(end - start):
            for op, values in zip(OPS, committed.values[layer], strict=True):
                assert bits(given.values(number, layer, op)) == bits(values), (number, layer, op)
                assert values.shape == (len(x), value_widths(plan)[op])
        if not plan.causal:
            pooling = Pooling(plan.pooling, plan.normalized)
            assert given.outputs[number] == (pooled(out, pooling) if end == len(plan.layers) else out).numpy().tobytes()
            continue
        position += len(x)
        for layer, records in enumerate(committed.record_bytes):
            for head, tokens in enumerate(records):
                assert given.records(layer, head, position)[-len(x) :] == [record.tobytes() for record in tokens]
        if end == len(plan.layers):
            assert bits(given.values(number, 0, LOGITS)) == bits(out.numpy())
        else:
            assert given.outputs[number] == out.numpy().tobytes()


@settings(max_examples=120, deadline=None)
@given(decoder_plans(), st.integers(0, 1 << 30), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.data())
def test_a_decoder_of_any_shape(plan: ExactPlan, seed: int, sizes: list[int], data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    start = data.draw(st.integers(0, len(plan.layers) - 1))
    if start == 0:
        steps = [random.integers(0, plan.vocab, size).astype("<u4").tobytes() for size in sizes]
    else:
        steps = [random.normal(0, 3, (size, plan.hidden)).astype("<f4").tobytes() for size in sizes]
    check_against_torch(plan, random_pieces(plan, seed), steps, start, len(plan.layers))


@settings(max_examples=60, deadline=None)
@given(encoder_plans(), st.integers(0, 1 << 30))
def test_an_encoder_of_any_shape(plan: ExactPlan, seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = [random.integers(0, plan.vocab, size).astype("<u4").tobytes() for size in (9, 1)]
    check_against_torch(plan, random_pieces(plan, seed), steps, 0, len(plan.layers))


def test_the_largest_sums() -> None:
    plan = replace(encoder_plan(hidden=96, ffn=3000), context=20)
    pieces = random_pieces(plan, 3, extreme=True)
    check_against_torch(plan, pieces, [np.arange(20, dtype="<u4").tobytes()], 0, len(plan.layers))


# --- whole models ---------------------------------------------------------------------------------------------------------------


def opened(manifest: Manifest, folder: Folder, start: int, end: int) -> ReferenceStage:
    plan = plan_from_json(folder.paths[EXACT_PLAN].read_bytes())
    pieces = {piece.name: load_file(folder.paths[piece.name]) for piece in manifest.pieces}
    return ReferenceStage(plan, start, end, pieces, load_file(folder.paths[EXACT_TABLES]))


def check_session(manifest: Manifest, folder: Folder, edges: Sequence[int], steps: int, sampling: Sampling) -> None:
    """A session through stages of the engine, window by window, and through the reference: outputs, traces, roots."""
    payloads: list[bytes] = [PROMPT]
    stages = [load_stage(manifest, a, b, folder.stage_files(manifest, a, b)) for a, b in pairwise(edges)]
    inputs: list[list[bytes]] = [[] for _ in stages]
    outputs: list[list[bytes]] = [[] for _ in stages]
    for stage in stages:
        stage.open(b"s", sampling, commit=True)
    for number in range(steps):
        payload = payloads[-1] if manifest.kind == "causal" else PROMPT[: 4 * (number + 3)]
        for stage, taken, gave in zip(stages, inputs, outputs, strict=True):
            taken.append(payload)
            payload = stage.step(b"s", payload)
            gave.append(payload)
        payloads.append(payload)
    for stage, taken, gave in zip(stages, inputs, outputs, strict=True):
        session: SessionValues = opened(manifest, folder, stage.start, stage.end).run(taken, sampling)
        assert session.outputs == gave
        for step0, n in ((0, 3), (3, steps - 3)):
            trace = stage.seal(b"s", n)
            assert session.trace(step0, n) == trace
            length = sum(len(step.x) for step in session.steps[: step0 + n])
            check_trace(trace, session.shape, n, trace.trace_root(session.shape, n), session.kv_root(length))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_session_of_every_architecture(name: str, exact_model: Models) -> None:
    check_session(*exact_model(name), [0, 2, LAYERS], 6, SAMPLING)


def test_a_session_with_every_operation_wide(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ERROR_MAX", 0.0)
    folder = Folder(tmp_path)
    manifest = import_model(make_model("gemma3", num_hidden_layers=LAYERS), folder, lambda *_: None, profile="exact")
    check_session(manifest, folder, [0, 1, LAYERS], 4, Sampling())


def test_an_encoder_of_several_stages(minilm: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    manifest = import_model(minilm, folder, lambda *_: None, profile="exact")
    check_session(manifest, folder, [0, 2, 6], 4, Sampling())


# --- what no session has ----------------------------------------------------------------------------------------------------------


def test_payloads_that_no_session_has_are_refused() -> None:
    plan = replace(encoder_plan(pooling="mean"), context=4)
    pieces = random_pieces(plan, 0)
    first, second = ReferenceStage(plan, 0, 1, pieces, {}), ReferenceStage(plan, 1, 2, pieces, {})
    for payload in (b"", b"\0\0\0", tokens_to_bytes([50]), tokens_to_bytes([1] * 5)):
        with pytest.raises(MalformedError):
            first.run([payload])
    for payload in (b"", bytes(4 * plan.hidden + 4)):
        with pytest.raises(MalformedError):
            second.run([payload])
    for value in (np.nan, np.inf, 2.0**41):
        with pytest.raises(OutOfBoundsError):
            second.run([np.full(plan.hidden, value, "<f4").tobytes()])
