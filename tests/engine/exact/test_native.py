"""Every variant of the compiled kernel against the reference in torch operations: the same bits, however the tokens come."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
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

from nexus.core.errors import LocalError, OutOfBoundsError
from nexus.engine.exact import native, native_build, torch_step
from nexus.engine.exact.gemm import Float32Blocks
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan
from tests.proof.arithmetic.made import OPS, Arrays, decoder_plans, encoder_plan, make_plan, random_pieces, tables_of

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernel was not built here")

VARIANTS = native.available()


class Piece:
    """A piece in memory, read in blocks of an awkward size."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def tensor(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, len(self.arrays[name]), 37):
            yield start, self.arrays[name][start : start + 37]


def reference(plan: ExactPlan, pieces: Mapping[str, Arrays], start: int = 0, end: int | None = None) -> torch_step.TorchModel:
    tensors = {piece: {name: torch.from_numpy(value) for name, value in arrays.items()} for piece, arrays in pieces.items()}
    tables = tables_of(plan.ropes, plan.rotated, plan.context)
    return torch_step.build(plan, start, len(plan.layers) if end is None else end, tensors, tables, Float32Blocks)


def compiled(
    plan: ExactPlan, pieces: Mapping[str, Arrays], variant: str, start: int = 0, end: int | None = None
) -> native.NativeModel:
    tables = tables_of(plan.ropes, plan.rotated, plan.context)
    wrapped = {piece: Piece(arrays) for piece, arrays in pieces.items()}
    return native.build(plan, start, len(plan.layers) if end is None else end, wrapped, tables, variant)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool((one.view(torch.int32) == other.view(torch.int32)).all())


class Record:
    """A trace that keeps everything."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, layer: int, op: str, values: torch.Tensor) -> None:
        self.values[layer, op] = values.clone()


def cut(total: int, cuts: Sequence[int]) -> list[int]:
    """Lengths of the chunks of `total` tokens cut at `cuts`."""
    edges = sorted({0, total, *(c % total for c in cuts)})
    return [b - a for a, b in pairwise(edges)]


@settings(max_examples=150, deadline=None)
@given(
    plan=decoder_plans(),
    seed=st.integers(0, 1 << 30),
    tokens=st.integers(1, 150),
    cuts=st.lists(st.integers(1, 149), max_size=3),
    singles=st.integers(0, 3),
)
def test_every_variant_gives_the_bits_of_the_reference_however_the_prompt_is_cut(
    plan: ExactPlan, seed: int, tokens: int, cuts: list[int], singles: int
) -> None:
    pieces = random_pieces(plan, seed)
    total = tokens + singles
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, plan.vocab, total))
    model = reference(plan, pieces)
    cache, record = model.new_cache(), Record()
    expected = [model.step([model.run(cache, 0, tokens)], ids[:tokens], record)]
    expected += [model.step([model.run(cache, at, 1)], ids[at : at + 1]) for at in range(tokens, total)]
    for variant in VARIANTS:
        kernel = compiled(plan, pieces, variant)
        own = Record()
        whole = kernel.new_cache()
        got = [kernel.step([kernel.run(whole, 0, tokens)], ids[:tokens], own, threads=2)]
        assert same(got[0], expected[0]), variant
        assert own.values.keys() == record.values.keys()
        for key, values in record.values.items():
            assert same(own.values[key], values), (variant, key)
        got += [kernel.step([kernel.run(whole, at, 1)], ids[at : at + 1], threads=1) for at in range(tokens, total)]
        parts, at = kernel.new_cache(), 0
        for count in cut(total, cuts):
            last = kernel.step([kernel.run(parts, at, count)], ids[at : at + count])
            at += count
        assert all(same(a, b) for a, b in zip(got, expected, strict=True)), variant
        assert same(last, expected[-1]), variant
        everything = kernel.step([kernel.run(kernel.new_cache(), 0, total, "all")], ids)
        assert same(everything[tokens - 1 :], torch.cat(expected)), variant


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    counts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    heads=st.sampled_from([1, 3, 12]),
    head_dim=st.sampled_from([4, 32, 48]),
    wide=st.sets(st.sampled_from(OPS)),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
)
def test_encoders(seed: int, counts: list[int], heads: int, head_dim: int, wide: set[str], activation: str) -> None:
    plan = encoder_plan(
        layers=(LayerPlan(wide=frozenset(wide)), LayerPlan()), heads=heads, kv_heads=heads, head_dim=head_dim, activation=activation
    )
    pieces = random_pieces(plan, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, plan.vocab, sum(counts)))
    model, record = reference(plan, pieces), Record()
    runs = [model.run(None, 0, count) for count in counts]
    expected = model.step(runs, ids, record)
    for variant in VARIANTS:
        kernel, own = compiled(plan, pieces, variant), Record()
        assert same(kernel.step([kernel.run(None, 0, count) for count in counts], ids, own), expected), variant
        assert all(same(own.values[key], values) for key, values in record.values.items()), variant


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wide", [frozenset(), frozenset(OPS)])
def test_a_batch_of_sessions_gives_the_bits_of_each_alone(variant: str, wide: frozenset[str]) -> None:
    plan = make_plan(
        layers=(LayerPlan(window=20, wide=wide), LayerPlan(wide=wide)), hidden=64, heads=6, kv_heads=2, head_dim=32, rotated=32
    )
    kernel = compiled(plan, random_pieces(plan, 3), variant)
    random = np.random.default_rng(4)
    prompts = [torch.from_numpy(random.integers(0, plan.vocab, int(n))) for n in random.integers(1, 90, 33)]
    alone = []
    for prompt in prompts:
        cache = kernel.new_cache()
        first = kernel.step([kernel.run(cache, 0, len(prompt))], prompt, threads=1)
        alone.append(torch.cat([first, kernel.step([kernel.run(cache, len(prompt), 1)], prompt[:1], threads=1)]))
    for threads in (1, 2):
        caches = [kernel.new_cache() for _ in prompts]
        runs = [kernel.run(cache, 0, len(prompt)) for cache, prompt in zip(caches, prompts, strict=True)]
        together = kernel.step(runs, torch.cat(prompts), threads=threads)
        runs = [kernel.run(cache, len(prompt), 1) for cache, prompt in zip(caches, prompts, strict=True)]
        then = kernel.step(runs, torch.stack([prompt[0] for prompt in prompts]), threads=threads)
        for index, expected in enumerate(alone):
            assert same(torch.stack([together[index], then[index]]), expected), index


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_one_after_the_other_give_the_bits_of_the_whole(variant: str) -> None:
    plan = make_plan(layers=tuple(LayerPlan(window=window) for window in (0, 3, 0)), post_norms=True, tied=True)
    pieces = random_pieces(plan, 11)
    ids = torch.arange(30) % plan.vocab
    whole = compiled(plan, pieces, variant)
    expected = whole.step([whole.run(whole.new_cache(), 0, 30)], ids)
    x = ids
    for start, end in ((0, 1), (1, 2), (2, 3)):
        stage = compiled(plan, pieces, variant, start, end)
        x = stage.step([stage.run(stage.new_cache(), 0, 30)], x)
    assert same(x, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("depth", "wide"), [(28672, False), (28672, True), (9000, True)])
def test_the_largest_sums_do_not_overflow(variant: str, depth: int, wide: bool) -> None:
    """Inputs of `down` all of one sign and nearly one size, weights all but a few +127: sums near depth * 127 * 127."""
    layer = LayerPlan(wide=frozenset(OPS) if wide else frozenset())
    plan = make_plan(layers=(layer,), hidden=32, ffn=depth, heads=1, kv_heads=1, head_dim=256, rotated=0, ropes=(), mlp_bias=True)
    pieces = random_pieces(plan, 5, extreme=True)
    pieces["layer.0"]["gate_up.bias"] = np.full(2 * depth, 1000, np.float32)
    ids = torch.tensor([1, 2, 3, 1, 1, 2, 9, 8, 7, 1, 3])
    model, kernel = reference(plan, pieces), compiled(plan, pieces, variant)
    record, own = Record(), Record()
    for rows in (len(ids), 1):
        expected = model.step([model.run(model.new_cache(), 0, rows)], ids[:rows], record)
        assert same(kernel.step([kernel.run(kernel.new_cache(), 0, rows)], ids[:rows], own), expected)
        assert all(same(own.values[key], values) for key, values in record.values.items())
    assert int(record.values[0, "down"].abs().max()) > depth * 127 * 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_over_the_borders_of_pages(variant: str) -> None:
    plan = make_plan(layers=(LayerPlan(window=63), LayerPlan(window=64), LayerPlan(window=65), LayerPlan(window=130)), heads=2)
    pieces = random_pieces(plan, 6)
    ids = torch.from_numpy(np.random.default_rng(6).integers(0, plan.vocab, 300))
    model, kernel = reference(plan, pieces), compiled(plan, pieces, variant)
    expected = model.step([model.run(model.new_cache(), 0, 300)], ids)
    cache, at = kernel.new_cache(), 0
    for count in (1, 62, 1, 1, 63, 64, 65, 1, 42):
        got = kernel.step([kernel.run(cache, at, count)], ids[at : at + count])
        at += count
    assert same(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_out_of_bounds_is_named_and_leaves_the_others_alone(variant: str) -> None:
    plan = make_plan(layers=(LayerPlan(), LayerPlan()))
    kernel = compiled(plan, random_pieces(plan, 7), variant, 1, 2)
    x = torch.randn(6, plan.hidden)
    for bad in (float("nan"), float("inf"), -(2.0**41)):
        spoilt = x.clone()
        spoilt[3, 5] = bad
        caches = [kernel.new_cache() for _ in range(3)]
        with pytest.raises(OutOfBoundsError) as caught:
            kernel.step([kernel.run(cache, 0, 2) for cache in caches], spoilt)
        assert caught.value.run == 1
        # The sessions of the other runs go on as if nothing had been.
        fresh = kernel.new_cache()
        kernel.step([kernel.run(fresh, 0, 2)], x[4:])
        expected = kernel.step([kernel.run(fresh, 2, 1)], x[:1])
        assert same(kernel.step([kernel.run(caches[2], 2, 1)], x[:1]), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_and_huge_values_within_bounds(variant: str) -> None:
    plan = make_plan(layers=(LayerPlan(wide=frozenset({"qkv", "attention"})), LayerPlan()), hidden=40)
    pieces = random_pieces(plan, 8)
    model, kernel = reference(plan, pieces, 1, 2), compiled(plan, pieces, variant, 1, 2)
    x = torch.randn(9, 40)
    x[0] = 0.0
    x[1] = 1e-42  # subnormal: must not be flushed
    x[2] *= 2.0**37
    x[3] *= 2.0**-39
    x[4, 1:] = 0.0
    x[5] = -0.0
    x[6] *= 2.0**-120
    x[7, 0] = 2.0**40
    expected = model.step([model.run(model.new_cache(), 0, 9)], x)
    torch.set_flush_denormal(True)  # the kernel sets its own floating point environment
    try:
        got = kernel.step([kernel.run(kernel.new_cache(), 0, 9)], x)
    finally:
        torch.set_flush_denormal(False)
    assert same(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_threads_of_one_process_at_once(variant: str) -> None:
    plan = make_plan(hidden=512, ffn=2048, head_dim=64, rotated=64)  # large enough for a team of threads
    kernel = compiled(plan, random_pieces(plan, 9), variant)
    ids = torch.arange(20) % plan.vocab
    expected = kernel.step([kernel.run(kernel.new_cache(), 0, 20)], ids, threads=1)
    got: list[bool] = []

    def work() -> None:
        for _ in range(5):
            got.append(same(kernel.step([kernel.run(kernel.new_cache(), 0, 20)], ids, threads=2), expected))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [True] * 15


def test_a_cancelled_step_puts_nothing_out() -> None:
    plan = make_plan()
    kernel = compiled(plan, random_pieces(plan, 1), VARIANTS[0])
    flag = native.CancelFlag()
    flag.set()
    with pytest.raises(native.CancelledError):
        kernel.step([kernel.run(kernel.new_cache(), 0, 1)], torch.tensor([1]), cancel=flag)


def test_bad_batches_are_refused() -> None:
    plan = make_plan(context=256)
    kernel = compiled(plan, random_pieces(plan, 1), VARIANTS[0])
    one = torch.tensor([1])
    for runs, x in (
        ([], torch.tensor([], dtype=torch.int64)),
        ([kernel.run(kernel.new_cache(), 0, 2)], one),
        ([kernel.run(kernel.new_cache(), 0, 1)], torch.tensor([plan.vocab])),
        ([kernel.run(kernel.new_cache(), 0, 1)], torch.tensor([-1])),
        ([kernel.run(kernel.new_cache(), 256, 1)], one),  # beyond the rotary table
        ([kernel.run(None, 0, 1)], one),
    ):
        with pytest.raises(ValueError, match=r"rows for runs|token ids|refused"):
            kernel.step(runs, x)
    with pytest.raises(ValueError, match="limits"):
        kernel.step([kernel.run(kernel.new_cache(), 0, 1)], one, threads=0)


def test_shapes_beyond_the_kernel_are_refused() -> None:
    plan = make_plan(layers=(LayerPlan(),), head_dim=8)
    pieces = random_pieces(plan, 1)
    with pytest.raises(LocalError, match="does not run here"):
        compiled(plan, pieces, "abacus")
    with pytest.raises(LocalError, match="shape"):
        compiled(replace(plan, kv_heads=4, heads=2), pieces, VARIANTS[0])


def test_weights_take_a_byte_each() -> None:
    plan = make_plan(hidden=128, ffn=256, head_dim=32, rotated=32, vocab=320)
    kernel = compiled(plan, random_pieces(plan, 1), VARIANTS[0])
    weights = sum(rows * depth for rows, depth in plan.linear_shapes().values()) * len(plan.layers) + plan.vocab * plan.hidden
    assert weights <= kernel.weight_bytes < 1.1 * weights
    cache = kernel.new_cache()
    assert cache is not None
    cache.reserve(100)
    assert cache.nbytes == 128 * len(plan.layers) * plan.kv_bytes


def test_a_failing_compiler_is_told_apart_and_leaves_the_library_alone(tmp_path: Path) -> None:
    target = tmp_path / "kernel.so"
    target.write_bytes(b"the old one")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'step.c: out of ink' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(native_build.BuildError, match="out of ink"):
        native_build.build(target, cc=[str(compiler)])
    with pytest.raises(native_build.BuildError, match="No such file"):
        native_build.build(target, cc=[str(tmp_path / "nothing")])
    assert target.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc", "kernel.so"]


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (32, 64), (33, 65), (131, 48), (1 << 24, 1), (4096, 11008)])
def test_what_a_weight_takes_is_known_before_it_is_loaded(rows: int, depth: int) -> None:
    library = native._library()
    assert library is not None
    assert native.packed_bytes(rows, depth) == library.nx_packed_bytes(rows, depth)
