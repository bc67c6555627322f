"""What the benchmarks compute themselves: a wrong ratio or a wrong comparator would be worse than none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nexus.core.manifest import Blob, Manifest
from scripts.benchmarks import engine, memory, models
from scripts.benchmarks.engine_gguf import _gguf_name, _rotated
from scripts.benchmarks.engine_store import balanced_cut

SHAPE = models.SHAPES["tiny"]


def turned(pairs: tuple[torch.Tensor, torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = pairs
    return a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()


@pytest.mark.parametrize(("name", "heads"), [("q_proj", SHAPE.heads), ("k_proj", SHAPE.kv_heads)])
def test_rotating_neighbours_of_the_reordered_rows_is_rotating_halves(name: str, heads: int) -> None:
    torch.manual_seed(0)
    half = SHAPE.head_dim // 2
    weight = torch.randn(heads * SHAPE.head_dim, SHAPE.hidden, dtype=torch.float64)
    x, angles = torch.randn(SHAPE.hidden, dtype=torch.float64), torch.rand(half, dtype=torch.float64)
    ours = (weight @ x).view(heads, 2, half)
    expected = torch.stack(turned((ours[:, 0], ours[:, 1]), angles), 1)
    reordered = _rotated(f"model.layers.0.self_attn.{name}.weight", weight, SHAPE)
    theirs = (reordered @ x).view(heads, half, 2)
    found = torch.stack(turned((theirs[..., 0], theirs[..., 1]), angles), 1)
    torch.testing.assert_close(found, expected)


def test_only_q_and_k_are_reordered() -> None:
    weight = torch.randn(SHAPE.hidden, SHAPE.hidden)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
        assert _rotated(f"model.layers.3.{name}.weight", weight, SHAPE) is weight
    assert _gguf_name("model.layers.3.mlp.down_proj.weight") == "blk.3.ffn_down.weight"


def test_the_number_of_weights_is_that_of_the_tensors() -> None:
    for shape in (SHAPE, replace(SHAPE, tied=False)):
        sizes = (torch.Size(dimensions).numel() for part in models._parts(shape) for dimensions in part.values())
        assert shape.weights == sum(sizes)


def test_a_ratio_is_the_median_of_the_rounds_and_says_whether_its_goal_is_met() -> None:
    rates = {"a": [10.0, 12.0, 90.0], "b": [5.0, 4.0, 10.0]}
    assert engine._over(rates, "a", "b", 3.0) == {"ratio": 3.0, "goal": 3.0, "better": "higher", "met": True}
    assert engine._goal(0.06, 0.05, "lower")["met"] is False
    missing = engine._over(rates, "a", "c", 1.0, "not installed")
    assert missing["ratio"] is None
    assert missing["met"] is None
    assert missing["reason"] == "not installed"


def test_the_cut_weighs_the_head_against_layers() -> None:
    def manifest(head: int, tied: int) -> Manifest:
        blobs = [Blob("embedding", head, bytes(32)), *(Blob(f"layer.{index}", 10, bytes(32)) for index in range(8))]
        return Manifest(
            spec=1,
            profile="float",
            kind="causal",
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            layers=8,
            hidden_size=1,
            vocab_size=1,
            context=1,
            kv_bytes=1,
            tied=tied,
            pieces=(*blobs, Blob("head", 0 if tied else head, bytes(32))),
            files=(Blob("config.json", 1, bytes(32)),),
            rows=(),
        )

    assert balanced_cut(manifest(0, tied=1)) == 4
    assert balanced_cut(manifest(40, tied=1)) == 6
    assert balanced_cut(manifest(40, tied=0)) == 6
    assert balanced_cut(manifest(1000, tied=1)) == 7


def test_the_largest_shape_that_fits_the_disk_is_converted() -> None:
    assert memory._largest_fitting("7b", 10**12) == "7b"
    assert memory._largest_fitting("7b", 20 * 10**9) == "3b"
    assert memory._largest_fitting("1b", 10**12) == "1b"
    assert memory._largest_fitting("7b", 10**9) is None
