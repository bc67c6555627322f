"""What a session commits to does not depend on how it is computed, and is what nexus.proof.trace says of the values themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.errors import LocalError, NexusError, NotFoundError, UsageError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.manifest import Manifest
from nexus.engine.exact import check, gemm
from nexus.engine.exact.commit import UNSEALED_STEPS_MAX, Commitments, StepRoots, Trees, committed_step, sealed
from nexus.engine.exact.native import Committed
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.torch_step import TorchModel, WrongSumsError
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage, load_stage
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, trace_shape, value_widths
from nexus.proof.receipts import tokens_to_bytes
from nexus.proof.trace import LOGITS, OPS, Sealed, TraceShape, WindowTrace, op_root_of
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS, Models, chain, kernels

CASES = 25
REFERENCE = "torch:float32 blocks"
# More than two pages of keys and values.
CONTEXT = 128
SHAPE = TraceShape(3, 2, logits=True)

Text = tuple[int, ...]


# ---- trees


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 3))
@settings(deadline=None)
def test_trees_that_grow_have_the_roots_of_those_made_at_once(parts: list[int], count: int) -> None:
    trees = Trees(count)
    leaves = [[leaf_hash(bytes([tree, n])) for n in range(sum(parts))] for tree in range(count)]
    end = 0
    for part in parts:
        added = [leaves[tree][end : end + part] for tree in range(count)]
        trees.append(np.frombuffer(b"".join(map(b"".join, added)), np.uint8).reshape(count, part, 32))
        end += part
        assert trees.size == end
        assert [root.tobytes() for root in trees.roots()] == [merkle_root(of_tree[:end]) for of_tree in leaves]


def rows_of(seed: int, rows: int) -> Committed:
    """Hashes that are none of anything, as a step hands them out."""
    random = np.random.default_rng(seed)
    return Committed(
        random.integers(0, 256, (SHAPE.layers, len(OPS), rows, 32), np.uint8),
        random.integers(0, 256, (1, 32), np.uint8),
        random.integers(0, 256, (SHAPE.layers, SHAPE.kv_heads, rows, 32), np.uint8),
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_whenever_windows_are_sealed_their_traces_are_the_same(steps: list[int], data: st.DataObject) -> None:
    """Steps of the windows that follow may have been computed, or begun."""
    windows: list[int] = []
    while sum(windows) < len(steps):
        windows.append(data.draw(st.integers(1, len(steps) - sum(windows))))
    prompt, late = Commitments(SHAPE), Commitments(SHAPE)
    expected: list[WindowTrace] = []
    done = 0
    for window in windows:
        for step in range(done, done + window):
            prompt.offer(rows_of(step, steps[step]))
            prompt.accept(complete=True)
        done += window
        expected.append(prompt.seal(window))
    found: list[WindowTrace] = []
    for step, rows in enumerate(steps):
        whole = rows_of(step, rows)
        cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
        for begin, end in pairwise([0, *cuts, rows]):
            late.offer(Committed(whole.cells[:, :, begin:end], whole.logits, whole.records[:, :, begin:end]))
            late.accept(complete=end == rows)
            if len(found) < len(windows) and late.unsealed >= windows[len(found)] and data.draw(st.booleans()):
                found.append(late.seal(windows[len(found)]))
    found += [late.seal(window) for window in windows[len(found) :]]
    assert found == expected
    assert late.unsealed == 0
    for trace, window in zip(found, windows, strict=True):
        assert sealed(trace, SHAPE, window) == Sealed.of(trace, SHAPE, window)


def test_only_what_was_computed_can_be_sealed() -> None:
    commitments = Commitments(SHAPE)
    for steps in (-1, 0, 1):
        with pytest.raises(UsageError):
            commitments.seal(steps)
    commitments.offer(rows_of(0, 2))
    commitments.accept(complete=False)
    with pytest.raises(UsageError):
        commitments.seal(1)


def test_steps_that_nobody_seals_are_bounded() -> None:
    commitments = Commitments(SHAPE)
    for step in range(UNSEALED_STEPS_MAX):
        commitments.check_room()
        commitments.offer(rows_of(step, 1))
        commitments.accept(complete=True)
    with pytest.raises(LocalError):
        commitments.check_room()
    commitments.seal(1)
    commitments.check_room()


# ---- stages


def exact(stage: Stage) -> ExactStage:
    assert isinstance(stage, ExactStage)
    return stage


def reference(stage: ExactStage, steps: Sequence[bytes]) -> WindowTrace:
    """The trace of a whole session, by the definition: from values and records of every step, alone and at once, with nothing of
    what the stage uses but its arithmetic."""
    shape, cache_, cells, position = trace_shape(stage.plan, stage.start, stage.end), stage.model.new_cache(), b"", 0
    logs: list[list[bytes]] = [[] for _ in range(shape.layers * shape.kv_heads)]
    for payload in steps:
        x = stage._decoded(payload, position)
        runs = [stage.model.run(cache_, position, len(x))]
        out, (committed,) = committed_step(stage.model, runs, torch.from_numpy(x.copy()), [0], values=True)
        assert committed is not None
        check_form(stage.plan, committed, len(x))
        cells += b"".join(op_root_of([row.tobytes() for row in value]) for layer in committed.values for value in layer)
        if shape.logits:
            cells += leaf_hash(out[-1].numpy().tobytes())
        for layer, by_head in enumerate(committed.record_bytes):
            for head, records in enumerate(by_head):
                logs[layer * shape.kv_heads + head] += [record.tobytes() for record in records]
        position += len(x) if stage.causal else 0
    return WindowTrace(cells, b"".join(merkle_root(map(leaf_hash, log)) for log in logs))


def check_form(plan: ExactPlan, committed: Committed, rows: int) -> None:
    widths = value_widths(plan)
    for layer in committed.values:
        assert [value.shape for value in layer] == [(rows, widths[op]) for op in OPS]
        assert all(value.dtype == np.dtype("<f4") for value in layer)


def run(
    stages: Sequence[Stage],
    text: Text,
    parts: Sequence[int],
    beside: Sequence[Text],
    windows: Sequence[int],
    together: bool,
) -> tuple[list[list[bytes]], list[list[WindowTrace]]]:
    """Reads a prompt in parts and goes on with one token for each window but the first; of every stage its inputs by step, and its
    traces. `beside`: other sessions, every second of which commits too. `together`: seal all windows at the end."""
    for stage in stages:
        stage.open(b"s", commit=True)
        for number in range(len(beside)):
            stage.open(b"%d" % number, commit=number % 2 == 0)
    inputs: list[list[bytes]] = [[] for _ in stages]
    traces: list[list[WindowTrace]] = [[] for _ in stages]
    steps = [list(pairwise(np.cumsum([0, *parts]).tolist())), *([[(0, 1)]] * (sum(windows) - 1))]
    due = list(np.cumsum(windows))
    payload = b""
    for number, cuts in enumerate(steps):
        whole = [b"" for _ in stages]
        for begin, end in cuts:
            more = not number and end < len(text)
            answers = tokens_to_bytes(text[begin:end]) if not number else payload
            others = [(b"%d" % n, tokens_to_bytes(one)) for n, one in enumerate(beside)] if not begin and number < 3 else []
            batch = [(b"s", answers), *others]
            for index, stage in enumerate(stages):
                whole[index] += batch[0][1]
                done = stage.step_many(batch, [more] + [False] * len(others))
                assert all(isinstance(answer, bytes) for answer in done), done
                batch = [(name, answer) for (name, _), answer in zip(batch, done, strict=True) if isinstance(answer, bytes)]
            answers = batch[0][1]
        payload = answers
        for index, stage in enumerate(stages):
            inputs[index].append(whole[index])
            if number + 1 in due and not together:
                traces[index].append(stage.seal(b"s", windows[due.index(number + 1)]))
    if together:
        traces = [[stage.seal(b"s", window) for window in windows] for stage in stages]
    for stage in stages:
        for name in (b"s", *(b"%d" % number for number in range(len(beside)))):
            stage.close(name)
    return inputs, traces


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Text, list[int], list[Text], list[int]]:
    """A prompt, the parts to read it in, other sessions' prompts, and the windows to seal."""
    token = st.integers(0, 130)
    text = tuple(draw(st.lists(token, min_size=1, max_size=90)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)) - {len(text)})
    edges = [0, *cuts, len(text)]
    others = draw(st.lists(st.lists(token, min_size=1, max_size=4).map(tuple), max_size=3))
    return text, [b - a for a, b in pairwise(edges)], others, draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_commits_to_the_same(name: str, exact_model: Models) -> None:
    model = exact_model(name)

    @cache
    def stages(count: int, kernel: str) -> list[Stage]:
        return chain(model, count, kernel)

    @given(sessions(), st.integers(1, LAYERS), st.sampled_from(kernels()), st.sampled_from([1, 2]), st.booleans())
    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    def holds(given: tuple[Text, list[int], list[Text], list[int]], count: int, kernel: str, threads: int, together: bool) -> None:
        text, parts, beside, windows = given
        torch.set_num_threads(threads)
        inputs, traces = run(stages(count, kernel), text, parts, beside, windows, together)
        for stage, given_steps, found in zip(stages(count, REFERENCE), inputs, traces, strict=True):
            expected = reference(exact(stage), given_steps)
            shape, done = trace_shape(exact(stage).plan, stage.start, stage.end), 0
            for window, trace in zip(windows, found, strict=True):
                trace.check(shape, window)
                assert trace.cells == b"".join(expected.step_cells(shape, step) for step in range(done, done + window))
                done += window
            assert found[-1].logs == expected.logs

    try:
        holds()
    finally:
        torch.set_num_threads(1)


def test_an_encoder_commits_to_the_same_by_every_kernel(minilm: Manifest, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Folder(tmp_path_factory.mktemp("minilm-exact"))
    manifest = import_model(minilm, folder, lambda *_: None, profile="exact")  # type: ignore[arg-type]
    texts = [tokens_to_bytes(text) for text in ((101, 102), (101, 7592, 2088, 102), tuple(range(1000, 1009)))]
    found = set()
    for kernel in kernels():
        stage = exact(load_stage(manifest, 0, 2, folder.stage_files(manifest, 0, 2), kernel=kernel))
        stage.open(b"s", commit=True)
        for text in texts:
            stage.step(b"s", text)
        trace = stage.seal(b"s", len(texts))
        trace.check(trace_shape(stage.plan, 0, 2), len(texts))
        assert sealed(trace, stage.trace_shape, len(texts)) == Sealed.of(trace, stage.trace_shape, len(texts))
        assert trace.logs == b""
        if kernel == REFERENCE:
            assert trace == reference(stage, texts)
        found.add(trace)
    assert len(found) == 1


def test_a_step_that_fails_leaves_the_commitments_as_they_were(exact_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = chain(exact_model("llama"), 1, REFERENCE)
    for name in (b"failing", b"other"):
        stage.open(name, commit=True)
        stage.step(name, tokens_to_bytes([5, 17, 99]))

    def fail(*_: object) -> int:
        raise NexusError("the sampler failed")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_choose", fail)
        with pytest.raises(NexusError, match="sampler"):
            stage.step(b"failing", tokens_to_bytes([3]))
    with pytest.raises(NexusError):
        stage.step(b"failing", tokens_to_bytes([3] * CONTEXT))
    for name in (b"failing", b"other"):
        stage.step(name, tokens_to_bytes([4]))
    assert stage.seal(b"failing", 2) == stage.seal(b"other", 2)


def test_a_machine_that_computes_wrongly_seals_nothing(exact_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus.engine.exact import stage as module

    (stage,) = chain(exact_model("llama"), 1, None)
    stage.open(b"s", commit=True)
    stage.open(b"none")

    def wrong(*_: object, **__: object) -> None:
        raise LocalError("this machine computed wrongly")

    monkeypatch.setattr(module, "committed_step", wrong)
    failed, fine = stage.step_many([(b"s", tokens_to_bytes([5])), (b"none", tokens_to_bytes([5]))])
    assert isinstance(failed, LocalError)
    assert isinstance(fine, bytes), "a session that commits to nothing has nothing to do with it"
    with pytest.raises(UsageError):
        stage.seal(b"s", 1)


def test_a_session_that_commits_to_nothing_costs_nothing(exact_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus.engine.exact import stage as module

    (stage,) = chain(exact_model("llama"), 1, None)
    monkeypatch.setattr(module, "committed_step", None)  # whoever calls it fails
    stage.open(b"s")
    stage.step(b"s", tokens_to_bytes([5, 6]))
    with pytest.raises(UsageError, match="commits to nothing"):
        stage.seal(b"s", 1)
    with pytest.raises(NotFoundError):
        stage.seal(b"another", 1)


def test_a_stage_stops_before_its_commitments_outgrow_it(exact_model: Models) -> None:
    (stage,) = chain(exact_model("llama"), 1, None)
    stage.open(b"s", commit=True)
    commitments = exact(stage)._sessions[b"s"].commitments
    assert isinstance(commitments, Commitments)
    commitments._steps.extend([rows_of(0, 1)] * UNSEALED_STEPS_MAX)
    with pytest.raises(LocalError, match="await a receipt"):
        stage.step(b"s", tokens_to_bytes([5]))


def test_the_float_profile_commits_to_nothing(make_model: object, tmp_path: object) -> None:
    assert callable(make_model)
    folder = Folder(tmp_path)  # type: ignore[arg-type]
    manifest = import_model(make_model("llama", num_hidden_layers=1), folder, lambda *_: None, profile="float")
    stage = load_stage(manifest, 0, 1, folder.stage_files(manifest, 0, 1))
    with pytest.raises(UsageError, match="float"):
        stage.open(b"s", commit=True)
    stage.open(b"s")  # nothing was left behind


def test_logits_are_committed_to_by_the_last_stage_alone(exact_model: Models) -> None:
    first, last = chain(exact_model("llama"), 2, REFERENCE)
    payload = tokens_to_bytes([7, 8, 9])
    for stage in (first, last):
        stage.open(b"s", commit=True)
        payload = stage.step(b"s", payload)
        shape = trace_shape(exact(stage).plan, stage.start, stage.end)
        trace = stage.seal(b"s", 1)
        if stage is last:
            assert trace.op_root(shape, 0, 0, LOGITS) == leaf_hash(stage.logits(b"s").astype("<f4").tobytes())
        else:
            assert not shape.logits


def test_one_row_is_its_own_tree() -> None:
    rows = rows_of(1, 3)
    parts, whole = StepRoots(SHAPE), StepRoots(SHAPE)
    whole.add(rows.cells)
    for row in range(3):
        parts.add(rows.cells[:, :, row : row + 1])
    assert parts.cells(b"") == whole.cells(b"")
    only = StepRoots(SHAPE)
    only.add(rows.cells[:, :, :1])
    assert only.cells(b"l") == rows.cells[:, :, 0].tobytes() + b"l"


def test_wide_operations_norms_and_caps_commit_to_the_same_by_every_kernel() -> None:
    """The models that kernels are checked with have every feature there is; here down to the values and records themselves."""
    for plan in (check._DECODER, check._ENCODER):
        found = set()
        for kernel in kernels():
            model = check._build(plan, check._pieces(plan, extreme=False), kernel)
            one, other = model.new_cache(), model.new_cache()
            digest = blake3()
            for position, counts in ((0, (7, 3)), (7, (1, 1))) if plan.causal else ((0, (9,)),):
                runs = [model.run(one, position, counts[0])]
                if plan.causal:
                    runs.append(model.run(other, position and 3, counts[1]))
                x = (torch.arange(sum(counts)) * 37 + position) % plan.vocab
                out, committed = committed_step(model, runs, x, range(len(runs)), values=True)
                digest.update(out.numpy().tobytes())
                for rows, count in zip(committed, counts, strict=True):
                    assert rows is not None
                    check_form(plan, rows, count)
                    for layer, (values, hashes) in enumerate(zip(rows.values, rows.cells, strict=True)):
                        assert [[leaf_hash(row.tobytes()) for row in value] for value in values] == [
                            [leaf.tobytes() for leaf in leaves] for leaves in hashes
                        ]
                        for log, leaves in zip(rows.record_bytes[layer] if plan.causal else (), rows.records[layer], strict=True):
                            size = plan.head_dim * (3 if ATTENTION in plan.layers[layer].wide else 2) + 8
                            assert log.shape == (count, size)
                            assert [leaf_hash(record.tobytes()) for record in log] == [leaf.tobytes() for leaf in leaves]
                        for value in values:
                            digest.update(value.tobytes())
                    for log in rows.record_bytes:
                        digest.update(log.tobytes())
                    digest.update(rows.logits.tobytes())
            found.add(digest.hexdigest())
        assert len(found) == 1


@pytest.mark.parametrize("kernel", [kernel.name for kernel in gemm.KERNELS])
def test_the_reference_checks_its_own_products_where_it_commits(kernel: str) -> None:
    """Of every linear operation, narrow and wide: a single sum that is off by the least is found. Nobody is told where nothing is
    committed to: known answers are what finds it there."""
    plan = check._DECODER
    model = check._build(plan, check._pieces(plan, extreme=False), f"torch:{kernel}")
    assert isinstance(model, TorchModel)
    assert model.head is not None
    x = torch.arange(5)

    def step(commit: bool) -> None:
        runs = [model.run(model.new_cache(), 0, 5)]
        committed_step(model, runs, x, [0]) if commit else model.step(runs, x)

    step(commit=True)
    for linear in (*model.layers[0].linear.values(), *model.layers[1].linear.values(), model.head):
        right = linear.product
        linear.product = OffByOne(right)
        with pytest.raises(WrongSumsError, match="computed wrongly"):
            step(commit=True)
        step(commit=False)
        linear.product = right
    step(commit=True)


class OffByOne:
    """A product whose last sum is one too large."""

    def __init__(self, product: gemm.Product) -> None:
        self._product, self.nbytes = product, product.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._changed(self._product(x))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        return self._changed(self._product.sums(x))

    def _changed(self, sums: torch.Tensor) -> torch.Tensor:
        sums = sums.clone()
        sums[-1, -1] += 1
        return sums
