"""Other models than the one that was asked for, and processors that compute wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nexus.core.errors import NexusError
from nexus.engine.exact import check, gemm
from tests.attacks.arena import Model, open_arena
from tests.attacks.catalogue import Row


async def test_swapped_weights(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "swapped-weights"}) as arena:
        await arena.punishes(row, verify=None)


async def test_requantised_weights(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "requantised-weights"}) as arena:
        await arena.punishes(row, verify=None)


async def test_pruned_weights(tiny: Model, tmp_path: Path, row: Row) -> None:
    """At the last stage, whose neighbours see nothing but tokens."""
    async with open_arena(tiny, tmp_path, {2: "pruned-weights"}) as arena:
        await arena.punishes(row, 2, verify=None)


async def test_one_flipped_weight_bit(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "flipped-bit"}) as arena:
        await arena.punishes(row)


async def test_a_skipped_layer(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "skipped-layer"}) as arena:
        await arena.punishes(row)


async def test_wrong_tables(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "wrong-tables"}) as arena:
        await arena.punishes(row)


class Saturating(gemm.Float32Blocks):
    """What vpmaddubsw makes of signed bytes: sums of two products stop at the ends of int16."""

    name = "saturating"

    def __init__(self, weight: torch.Tensor, wide: bool) -> None:
        super().__init__(weight, wide)
        self._weight = weight.int()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = self.sums(x)
        return total if self._wide else total.float()

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        shifted, pad = x.int() + 128, x.shape[1] % 2
        products = torch.nn.functional.pad(shifted[:, None, :] * self._weight[None], (0, pad))
        pairs = products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(2) - 128 * self._weight.sum(1)).to(torch.int32)


async def test_a_saturating_kernel_serves_nothing(tiny: Model, tmp_path: Path, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_arena(tiny, tmp_path) as arena:
        with monkeypatch.context() as broken:
            broken.setattr(check, "compiled_kernel", lambda: None)
            broken.setattr(gemm, "KERNELS", (Saturating,))
            broken.setattr(gemm, "_verdict", lambda number, depth: gemm.known_answer(Saturating, depth))
            with pytest.raises(NexusError, match="this node failed inside"):
                await arena.ask()
        assert [await arena.outcome(number) for number in range(5)] == [row.outcome] * 5
        assert not any(node._infer.totals.receipts for node in arena.nodes)
        done = await arena.ask()
        assert list(done.bundle.outputs) == arena.right_tokens(done)
