"""Keys made of pieces on disk are those made of tensors in memory, and see what a kernel gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nexus.core.manifest import EMBEDDING, HEAD
from nexus.engine.exact import pieces as pieces_module
from nexus.engine.exact.freivalds import key_pieces, make_keys, piece_keys
from nexus.engine.exact.stage import ExactStage, open_pieces
from nexus.engine.exact.torch_step import TorchModel
from nexus.proof import freivalds
from nexus.proof.arithmetic.plan import LINEARS
from nexus.proof.arithmetic.rows import EMBED
from tests.engine.exact.conftest import Models, chain

SEED = bytes(range(32))


def test_keys_are_made_block_by_block(exact_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, folder = exact_model("llama-tied-biased")
    (stage,) = chain((manifest, folder), 1, None)
    assert isinstance(stage, ExactStage)
    opened = open_pieces(stage.plan, 0, 2, folder.stage_files(manifest, 0, 2))
    monkeypatch.setattr(pieces_module, "_BLOCK_BYTES", 500)
    for name, linears in ((EMBEDDING, (EMBED,)), ("layer.1", LINEARS)):
        tensors = load_file(folder.paths[name])
        assert piece_keys(opened[name], linears, SEED) == freivalds.piece_keys(tensors, linears, SEED)


@pytest.mark.parametrize(("name", "tied"), [("llama-tied-biased", True), ("qwen3", False)])
def test_a_stage_has_keys_of_every_piece_that_its_audit_takes(name: str, tied: bool, exact_model: Models) -> None:
    manifest, folder = exact_model(name)
    (stage,) = chain((manifest, folder), 1, None)
    assert isinstance(stage, ExactStage)
    opened = open_pieces(stage.plan, 0, 3, folder.stage_files(manifest, 0, 3))
    keys = make_keys(opened, stage.plan, 0, 3, SEED)
    assert keys.keys() == key_pieces(stage.plan, 0, 3).keys() == {"layer.0", "layer.1", "layer.2", HEAD, *([EMBEDDING] * tied)}
    assert key_pieces(stage.plan, 1, 2) == {"layer.1": LINEARS}
    # No two matrices share their randomness, not even those of one form.
    seeds = [entry.key.seed for piece in keys.values() for entry in piece.linears]
    assert len(set(seeds)) == len(seeds)
    again = make_keys(opened, stage.plan, 0, 3, SEED[::-1])
    assert all(keys[piece].linears != again[piece].linears for piece in keys if keys[piece].linears)


def test_a_key_passes_what_a_stage_computes_and_nothing_else(exact_model: Models) -> None:
    manifest, folder = exact_model("qwen3")
    (stage,) = chain((manifest, folder), 1, "torch")
    assert isinstance(stage, ExactStage)
    keys = make_keys(open_pieces(stage.plan, 0, 3, folder.stage_files(manifest, 0, 3)), stage.plan, 0, 3, SEED)
    model = stage.model
    assert isinstance(model, TorchModel)
    x = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (3, stage.plan.hidden), np.int8))
    sums = model.layers[1].linear["qkv"].product.sums(x).numpy()
    key = keys["layer.1"].key("qkv")
    assert freivalds.check(key, x.numpy(), sums)
    for at in ((0, 0), (2, sums.shape[1] - 1)):
        wrong = sums.copy()
        wrong[at] += 1
        assert not freivalds.check(key, x.numpy(), wrong)
    assert not freivalds.check(keys["layer.0"].key("qkv"), x.numpy(), sums)


def test_a_seed_that_is_short_makes_no_keys(exact_model: Models) -> None:
    manifest, folder = exact_model("qwen3")
    (stage,) = chain((manifest, folder), 1, None)
    assert isinstance(stage, ExactStage)
    with pytest.raises(ValueError, match="seed"):
        make_keys(open_pieces(stage.plan, 0, 1, folder.stage_files(manifest, 0, 1)), stage.plan, 0, 1, b"short")
