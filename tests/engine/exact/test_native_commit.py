"""What a compiled step commits to, against the reference in torch operations; and that a step which computes wrongly is refused."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.core.errors import LocalError, OutOfBoundsError
from nexus.core.hashing import leaf_hash
from nexus.engine.exact import native, native_build
from nexus.engine.exact.torch_step import WrongSumsError
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, LayerPlan, value_widths
from nexus.proof.trace import OPS
from tests.engine.exact.test_native import (
    Arrays,
    compiled,
    cut,
    decoder_plans,
    encoder_plan,
    make_plan,
    random_pieces,
    reference,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernel was not built here")

VARIANTS = native.available()
Values = list[dict[str, NDArray[np.float32]]]


class _Sink:
    """Keeps what the reference commits to, by layer: values, and records [kv_heads, rows, size]."""

    def __init__(self, plan: ExactPlan) -> None:
        self.values: Values = [{} for _ in plan.layers]
        self.logs: list[NDArray[np.uint8]] = []

    def value(self, layer: int, op: str, rows: torch.Tensor) -> None:
        self.values[layer][op] = rows.numpy()

    def records(self, layer: int, records: torch.Tensor) -> None:
        self.logs.append(records.transpose(0, 1).contiguous().numpy())


def expected_values(plan: ExactPlan, pieces: Mapping[str, Arrays], ids: torch.Tensor) -> tuple[Values, list[NDArray[np.uint8]]]:
    """Of a text read at once: values of every layer, and a decoder's records."""
    model, sink = reference(plan, pieces), _Sink(plan)
    model.step([model.run(model.new_cache(), 0, len(ids))], ids, commit=sink)
    return sink.values, sink.logs


def check_committed(
    committed: native.Committed | None, values: Values, records: list[NDArray[np.uint8]], rows: slice, handed_out: bool
) -> None:
    assert committed is not None
    for layer, expected in enumerate(values):
        for number, op in enumerate(OPS):
            wanted = np.ascontiguousarray(expected[op][rows])
            hashes = [leaf_hash(row.tobytes()) for row in wanted]
            assert committed.cells[layer, number].tobytes() == b"".join(hashes), (layer, op)
            if handed_out:
                assert committed.values[layer][number].tobytes() == wanted.tobytes(), (layer, op)
    for layer, logs in enumerate(records):
        wanted_records = np.ascontiguousarray(logs[:, rows])
        hashes = [leaf_hash(record.tobytes()) for head in wanted_records for record in head]
        assert committed.records[layer].tobytes() == b"".join(hashes), layer
        if handed_out:
            assert committed.record_bytes[layer].tobytes() == wanted_records.tobytes(), layer
    assert committed.records.shape[1] == (len(records[0]) if records else 0)
    assert handed_out == bool(committed.values)


@settings(max_examples=60, deadline=None)
@given(
    plan=decoder_plans(),
    seed=st.integers(0, 1 << 30),
    tokens=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 89), max_size=3),
    values=st.booleans(),
    threads=st.integers(1, 2),
)
def test_every_variant_commits_to_the_values_of_the_reference(
    plan: ExactPlan, seed: int, tokens: int, cuts: list[int], values: bool, threads: int
) -> None:
    pieces = random_pieces(plan, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, plan.vocab, tokens))
    expected, records = expected_values(plan, pieces, ids)
    assert {op: value.shape[1] for op, value in expected[0].items()} == {op: value_widths(plan)[op] for op in OPS}
    for variant in VARIANTS:
        kernel = compiled(plan, pieces, variant)
        cache, at = kernel.new_cache(), 0
        for number, count in enumerate(cut(tokens, cuts)):
            commit, logits = native.Commit(values=values), ("last", "none", "all")[number % 3]
            out = kernel.step([kernel.run(cache, at, count, logits)], ids[at : at + count], threads=threads, commit=commit)
            check_committed(commit.committed[0], expected, records, slice(at, at + count), values)
            assert commit.committed[0] is not None
            assert commit.committed[0].logits.tobytes() == b"".join(leaf_hash(row.numpy().tobytes()) for row in out)
            at += count


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_has_one_sign(variant: str) -> None:
    """Where every product is -1 * 0 a float sum would be -0."""
    plan = make_plan(hidden=20, ffn=1, post_norms=True)
    pieces = random_pieces(plan, 4)
    pieces["layer.0"]["down.weight"][:] = 0
    ids = torch.arange(30) % plan.vocab
    kernel, commit = compiled(plan, pieces, variant), native.Commit(values=True)
    kernel.step([kernel.run(kernel.new_cache(), 0, 30)], ids, commit=commit)
    expected, records = expected_values(plan, pieces, ids)
    assert (expected[0]["gate_up"] < 0).any()
    assert not expected[0]["down"][:, :20].view(np.uint32).any()
    check_committed(commit.committed[0], expected, records, slice(0, 30), True)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    wide=st.sets(st.sampled_from(["qkv", "o", "gate_up", "down", ATTENTION])),
)
def test_encoders_commit_to_outputs_and_what_the_norms_make_of_them(seed: int, counts: list[int], wide: set[str]) -> None:
    plan = encoder_plan(layers=(LayerPlan(wide=frozenset(wide)), LayerPlan()), heads=3, kv_heads=3, head_dim=20)
    pieces = random_pieces(plan, seed)
    texts = [torch.from_numpy(np.random.default_rng(seed + n).integers(0, plan.vocab, n)) for n in counts]
    for variant in VARIANTS:
        kernel, commit = compiled(plan, pieces, variant), native.Commit(values=True)
        kernel.step([kernel.run(None, 0, count) for count in counts], torch.cat(texts), commit=commit)
        for text, committed in zip(texts, commit.committed, strict=True):
            check_committed(committed, *expected_values(plan, pieces, text), slice(0, len(text)), True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_some_runs_of_a_batch(variant: str) -> None:
    """Logits of more than a slice, more layers than are hashed at once, and runs that nobody commits to beside the others."""
    layers = tuple(LayerPlan(wide=frozenset({ATTENTION, "down"}) if number % 2 else frozenset()) for number in range(5))
    plan = make_plan(layers=layers, hidden=96, ffn=1100, heads=6, kv_heads=3, head_dim=32, rotated=32, vocab=40000)
    pieces = random_pieces(plan, 2)
    kernel, counts = compiled(plan, pieces, variant), (70, 1, 64, 33, 1)
    texts = [torch.from_numpy(np.random.default_rng(n).integers(0, plan.vocab, n)) for n in counts]
    expected = [expected_values(plan, pieces, text) for text in texts]
    for threads in (1, 2):
        for chosen in (None, (0, 3, 4), ()):
            commit = native.Commit(chosen)
            runs = [kernel.run(kernel.new_cache(), 0, count) for count in counts]
            logits = kernel.step(runs, torch.cat(texts), threads=threads, commit=commit)
            for index, committed in enumerate(commit.committed):
                if chosen is not None and index not in chosen:
                    assert committed is None
                    continue
                check_committed(committed, *expected[index], slice(0, counts[index]), False)
                assert committed is not None
                assert committed.logits.tobytes() == leaf_hash(logits[index].numpy().tobytes())


def test_a_run_out_of_bounds_commits_to_nothing() -> None:
    plan = make_plan()
    kernel, commit = compiled(plan, random_pieces(plan, 7), VARIANTS[0], 1, 2), native.Commit()
    with pytest.raises(OutOfBoundsError):
        kernel.step([kernel.run(kernel.new_cache(), 0, 2)], torch.full((2, plan.hidden), float("nan")), commit=commit)
    assert commit.committed == []


def packed(linear: Any) -> Any:
    """The packed weights of a linear layer in memory."""
    return (ctypes.c_uint8 * native.packed_bytes(linear.n, linear.k)).from_address(linear.weights)


LINEAR = ["qkv", "o", "gate", "up", "down", "head"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wide", [frozenset(), frozenset({"qkv", "o", "gate_up", "down"})])
def test_one_flipped_bit_of_any_weight_is_found(variant: str, wide: frozenset[str]) -> None:
    plan = make_plan(layers=(LayerPlan(), LayerPlan(wide=wide)), tied=False, vocab=70, wide_head=bool(wide))
    random, pieces = np.random.default_rng(3), random_pieces(plan, 3)
    kernel = compiled(plan, pieces, variant)
    ids = torch.arange(24) % plan.vocab

    def step(rows: int, commit: native.Commit | None) -> torch.Tensor:
        return kernel.step([kernel.run(kernel.new_cache(), 0, rows, "all")], ids[:rows], commit=commit)

    for rows in (1, 24):
        right = step(rows, native.Commit())
        for name in LINEAR:
            linear = kernel._model.head if name == "head" else getattr(kernel._layer_structs[1], name)
            memory = packed(linear)
            for _ in range(3):
                # Column k of row n, as packed_offset of layout.h has it.
                n, k = int(random.integers(linear.n)), int(random.integers(linear.k))
                at = (n // 16) * (-(-linear.k // 64) * 64 * 16) + k // 4 * 64 + n % 16 * 4 + k % 4
                before = memory[at]
                memory[at] = before ^ 1 << int(random.integers(8))
                with pytest.raises(WrongSumsError, match="computed wrongly"):
                    step(rows, native.Commit())
                memory[at] = before
        assert torch.equal(step(rows, native.Commit()), right)


@pytest.fixture(scope="module")
def saturating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose plain kernel saturates, as int8 products do on processors without VNNI."""
    sources = tmp_path_factory.mktemp("saturating") / "native"
    shutil.copytree(native_build.SOURCES, sources)
    dot = sources / "dot_portable.h"
    text = dot.read_text()
    old = "acc[part / 4 + c] += (a[4 * c] + a[4 * c + 1]) + (a[4 * c + 2] + a[4 * c + 3]);"
    assert old in text
    new = "{ const int32_t sum = (a[4 * c] + a[4 * c + 1]) + (a[4 * c + 2] + a[4 * c + 3]); "
    new += "acc[part / 4 + c] += sum > 100000 ? 100000 : sum; }"
    dot.write_text(text.replace(old, new))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "SOURCES", sources)
        native_build.build(sources.parent / "kernel.so", machine="none")
    return sources.parent / "kernel.so"


def test_a_kernel_that_saturates_is_found(saturating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "LIBRARY", saturating)
    native._library.cache_clear()
    native._built.cache_clear()
    try:
        plan = make_plan(hidden=200)
        kernel = compiled(plan, random_pieces(plan, 1), "portable")
        ids = torch.tensor([1, 2, 3])
        kernel.step([kernel.run(kernel.new_cache(), 0, 3)], ids)  # who does not check sees nothing
        with pytest.raises(LocalError, match="computed wrongly"):
            kernel.step([kernel.run(kernel.new_cache(), 0, 3)], ids, commit=native.Commit())
    finally:
        native._library.cache_clear()
        native._built.cache_clear()
