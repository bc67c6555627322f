"""A replay gives what the live session gave, bit for bit: outputs, traces, logs, and every value behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, NotFoundError, UsageError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.manifest import EMBEDDING
from nexus.engine.exact import check, native
from nexus.engine.exact import replay as module
from nexus.engine.exact.pages import page_records
from nexus.engine.exact.replay import Limits, Replay, Span, passes_of, replay
from nexus.engine.exact.stage import ExactStage
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage, load_stage
from nexus.proof.accuse import Recomputed
from nexus.proof.arithmetic.sampler import GREEDY, Sampling
from nexus.proof.receipts import tokens_to_bytes
from nexus.proof.trace import DOWN, LOGITS, OPS, WindowTrace, check_trace, op_root_of
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS, Models, chain, kernels

CASES = 30
REFERENCE = "torch:float32 blocks"
WINDOW = 4


@given(
    st.lists(st.one_of(st.just(1), st.integers(1, 20)), min_size=1, max_size=30),
    st.builds(Limits, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.sets(st.integers(0, 29)),
    st.data(),
)
@settings(deadline=None)
def test_passes_cover_every_row_once_within_their_bounds(
    sizes: list[int], most: Limits, committing: set[int], data: st.DataObject
) -> None:
    """Also of some steps of a session only, as windows are asked for."""
    position, spans = 0, []
    for step, rows in enumerate(sizes):
        if data.draw(st.booleans()):
            spans.append(Span(step, position, rows))
        position += rows
    covered: list[tuple[int, int]] = []
    ended: list[int] = []
    for parts in passes_of(spans, committing, most):
        assert 0 < sum(part.rows for part in parts) <= most.rows
        assert sum({"none": 0, "last": 1, "all": part.rows}[part.logits] for part in parts) <= most.logits
        assert sum(part.rows for part in parts if part.commits) <= most.commits
        for part in parts:
            assert part.rows == part.steps or part.steps == 1
            assert all((step in committing) == part.commits for step in range(part.step, part.step + part.steps))
            covered += [(part.position, row) for row in range(part.rows)]
            ended += range(part.step, part.step + part.steps) if part.logits != "none" else []
            (span,) = (span for span in spans if span.step == part.step)
            assert part.position == span.position + part.skip
    positions = [position + row for position, row in covered]
    assert positions == [span.position + row for span in spans for row in range(span.rows)]
    assert ended == [span.step for span in spans]


def exact(stage: Stage) -> ExactStage:
    assert isinstance(stage, ExactStage)
    return stage


def live(
    stages: Sequence[Stage], prompt: bytes, steps: int, sampling: Sampling, following: Sequence[int] = ()
) -> tuple[list[list[bytes]], list[list[WindowTrace]]]:
    """A session as it is served: the payloads into every stage and out of the last, and every stage's traces. `following`: sizes of
    later steps, one token where none is given."""
    payloads: list[list[bytes]] = [[] for _ in range(len(stages) + 1)]
    traces: list[list[WindowTrace]] = [[] for _ in stages]
    for stage in stages:
        stage.open(b"s", sampling, commit=True)
    payload = prompt
    for step in range(steps):
        for index, stage in enumerate(stages):
            payloads[index].append(payload)
            payload = stage.step(b"s", payload)
            if (step + 1) % WINDOW == 0 or step + 1 == steps:
                traces[index].append(stage.seal(b"s", (step % WINDOW) + 1))
        payloads[-1].append(payload)
        payload *= following[step] if step < len(following) else 1
    for stage in stages:
        stage.close(b"s")
    return payloads, traces


def windows_of(steps: int) -> list[tuple[int, int]]:
    return [(step, min(WINDOW, steps - step)) for step in range(0, steps, WINDOW)]


def check_against(done: Replay, outputs: Sequence[bytes], traces: Sequence[WindowTrace], order: Sequence[int]) -> None:
    """`order`: in which windows are asked for."""
    windows = windows_of(len(outputs))
    assert done.outputs == outputs
    for number in order:
        assert done.trace(*windows[number]) == traces[number]
        kv_len = done.kv_len(*windows[number])
        trace, shape = traces[number], done.shape
        check_trace(trace, shape, windows[number][1], trace.trace_root(shape, windows[number][1]), done.kv_root(kv_len))
    assert done.traces(windows) == list(traces)


@st.composite
def sessions(draw: st.DrawFn) -> tuple[bytes, int, Sampling, list[int]]:
    prompt = draw(st.lists(st.integers(0, 130), min_size=1, max_size=70))
    sampling = draw(st.sampled_from([GREEDY, Sampling(0.9, 0.95, 7), Sampling(1.1, seed=3, top_k=20, repetition_penalty=1.3)]))
    # Nothing in the protocol says that later steps bring one token only.
    following = draw(st.lists(st.integers(1, 3), max_size=4))
    return tokens_to_bytes(prompt), draw(st.integers(1, 14)), sampling, following


@pytest.mark.parametrize("name", VARIANTS)
def test_a_replay_gives_what_the_live_session_gave(name: str, exact_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model(name)

    @cache
    def stages(count: int, kernel: str) -> list[Stage]:
        return chain(model, count, kernel)

    @given(
        sessions(),
        st.integers(1, LAYERS),
        st.sampled_from(kernels()),
        st.sampled_from(kernels()),
        st.sampled_from([5, 16, 256]),
        st.randoms(use_true_random=False),
    )
    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    def holds(
        session: tuple[bytes, int, Sampling, list[int]], count: int, ours: str, theirs: str, rows: int, order: object
    ) -> None:
        prompt, steps, sampling, following = session
        payloads, traces = live(stages(count, theirs), prompt, steps, sampling, following)
        monkeypatch.setattr(module, "ROWS_PER_PASS", rows)
        for index, stage in enumerate(stages(count, ours)):
            numbers = list(range(len(traces[index])))
            order.shuffle(numbers)  # type: ignore[attr-defined]
            named = windows_of(steps)[:: order.choice([1, 2, len(numbers) + 1])]  # type: ignore[attr-defined]
            done = replay(exact(stage), payloads[index], sampling, named)
            check_against(done, payloads[index + 1], traces[index], numbers)

    holds()


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_every_value_behind_a_trace_can_be_had(
    name: str, kernel: str, exact_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = map(exact, chain(exact_model(name), 2, kernel))
    # Two pages of keys and values, and prompts in several passes.
    prompt = tokens_to_bytes([(7 * n) % 131 for n in range(70)])
    payloads, traces = live((first, last), prompt, 6, GREEDY)
    for stage, inputs, given_traces in ((first, payloads[0], traces[0]), (last, payloads[1], traces[1])):
        for bytes_max in (module.PASS_BYTES_MAX, 1 << 18):
            monkeypatch.setattr(module, "PASS_BYTES_MAX", bytes_max)
            done = replay(stage, inputs, traces=[(4, 2)])
            shape = done.shape
            for step in (0, 1, 5):
                trace, at = given_traces[step // WINDOW], step % WINDOW
                for layer in range(shape.layers):
                    for op in OPS:
                        rows = done.values(step, layer, op)
                        assert op_root_of([row.tobytes() for row in rows]) == trace.op_root(shape, at, layer, op)
                if shape.logits:
                    (row,) = done.values(step, 0, LOGITS)
                    assert leaf_hash(row.tobytes()) == trace.op_root(shape, at, 0, LOGITS)
            for length in (1, 64, 65, 75):
                for layer in range(shape.layers):
                    for head in range(shape.kv_heads):
                        records = done.records(layer, head, length)
                        assert len(records) == length
                        assert merkle_root(map(leaf_hash, records)) == done.log_root(layer, head, length)
            assert given_traces[-1].log_root(shape, shape.layers - 1, 1) == done.log_root(shape.layers - 1, 1, done.length)
            assert len(done.stage_input(0)) == 70
            if stage is last:
                assert done.stage_input(2).tobytes() == inputs[2]
            else:
                assert np.array_equal(done.stage_input(1), embedded(stage, inputs[1]))
            # The new x stands at the end of a row, behind the linear's own output where that is committed to as well.
            x = np.ascontiguousarray(done.values(1, shape.layers - 1, DOWN)[:, -stage.plan.hidden :])
            assert stage.last or x.tobytes() == done.outputs[1]


def embedded(stage: ExactStage, payload: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """By docs/exact.md."""
    piece = stage._embedding
    assert piece is not None
    ids = np.frombuffer(payload, "<u4").astype(np.int64)
    weight, scale = piece.tensor("embed.weight")[ids], piece.tensor("embed.scale")[ids]
    x = weight.astype(np.float32) * scale[:, None]
    return x * np.float32(stage.plan.embed_scale) if stage.plan.embed_scale else x


@pytest.mark.parametrize("kernel", kernels())
def test_an_encoder_is_replayed_text_by_text(kernel: str, minilm: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    manifest = import_model(minilm, folder, lambda *_: None, profile="exact")
    stages = [
        exact(load_stage(manifest, start, end, folder.stage_files(manifest, start, end), kernel=kernel))
        for start, end in ((0, 1), (1, manifest.layers))
    ]
    texts = [tokens_to_bytes(text) for text in ((101, 102), (101,), (101, 7592, 2088, 102))]
    payloads: list[list[bytes]] = [texts, [], []]
    for index, stage in enumerate(stages):
        stage.open(b"s", commit=True)
        payloads[index + 1] = [stage.step(b"s", text) for text in payloads[index]]
        done = replay(stage, payloads[index])
        assert done.outputs == payloads[index + 1]
        trace = stage.seal(b"s", len(texts))
        assert done.trace(0, 3) == trace
        assert done.kv_root(0) == b""
        for step, given_payload in enumerate(payloads[index]):
            for layer in (0, done.shape.layers - 1):
                for op in OPS:
                    rows = done.values(step, layer, op)
                    assert op_root_of([row.tobytes() for row in rows]) == trace.op_root(done.shape, step, layer, op)
            if index:
                assert done.stage_input(step).tobytes() == given_payload
        if not index:
            # A text's tokens count from 0 in every step.
            tokens = torch.from_numpy(np.frombuffer(texts[2], "<u4").astype(np.int64))
            model = exact(load_stage(manifest, 0, 1, folder.stage_files(manifest, 0, 1), kernel=REFERENCE)).model
            x = model.embedded([model.run(None, 0, 4)], tokens)  # type: ignore[attr-defined]
            assert np.array_equal(done.stage_input(2), x.numpy())


def test_what_is_not_in_the_session_is_refused(exact_model: Models) -> None:
    (stage,) = chain(exact_model("llama"), 1, None)
    done = replay(exact(stage), [tokens_to_bytes([5, 6]), tokens_to_bytes([7])])
    for step0, n in ((-1, 1), (0, 0), (0, 3), (2, 1)):
        with pytest.raises(UsageError):
            done.trace(step0, n)
    with pytest.raises(UsageError):
        done.values(2, 0, DOWN)
    with pytest.raises(UsageError):
        done.records(0, 0, 4)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ([b""], MalformedError),
        ([b"abc"], MalformedError),
        ([tokens_to_bytes([131])], MalformedError),
        ([b"\0\0\0\0" * 129], UsageError),
    ],
    ids=["nothing", "half", "beyond", "long"],
)
def test_inputs_that_no_stage_takes_are_refused(inputs: list[bytes], error: type[Exception], exact_model: Models) -> None:
    (stage,) = chain(exact_model("llama"), 1, None)
    with pytest.raises(error):
        replay(exact(stage), inputs)


def test_a_session_of_no_steps_is_replayed(exact_model: Models) -> None:
    (stage,) = chain(exact_model("llama"), 1, None)
    done: Recomputed = replay(exact(stage), [])  # what an accuser needs of one
    assert done.outputs == []


def test_an_embedding_that_is_gone_from_disk_is_said_so(
    exact_model: Models, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    manifest = import_model(make_model("llama", num_hidden_layers=1), folder, lambda *_: None, profile="exact")
    stage = exact(load_stage(manifest, 0, 1, folder.stage_files(manifest, 0, 1)))
    done = replay(stage, [tokens_to_bytes([5])])
    folder.paths[EMBEDDING].unlink()
    with pytest.raises(NotFoundError):
        done.stage_input(0)


@pytest.mark.parametrize("kernel", native.available())
def test_records_are_read_from_pages_as_the_reference_keeps_them(kernel: str) -> None:
    """Over three pages, with keys of 8 and of 16 bits and heads that fill no block."""
    plan, length = check._DECODER, 150
    pieces = check._pieces(plan, extreme=False)
    caches = []
    for name in (kernel, REFERENCE):
        model = check._build(plan, pieces, name)
        cache = model.new_cache()
        model.step([model.run(cache, 0, length)], torch.arange(length) % plan.vocab)
        caches.append(cache)
    compiled, reference = caches
    for layer in range(len(plan.layers)):
        for start, end in ((0, length), (63, 65), (64, 128), (149, 150)):
            found = page_records(plan, plan.layers, compiled.pages, layer, start, end)
            assert np.array_equal(found, reference.records(layer, start, end))
