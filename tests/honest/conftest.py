"""Models with every odd feature, of four layers, so that up to four nodes share one; and models of authors who mean no good."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus.core.errors import ModelFormatError
from nexus.engine.exact import calibrate
from nexus.engine.importer import import_model
from tests.engine.conftest import Folder, make_model, minilm  # noqa: F401
from tests.engine.exact.conftest import VARIANTS
from tests.honest.swarm import Model

LAYERS = 4
ENCODER, WIDE = "encoder", "gemma3-wide"
MODELS = ("llama", "llama-tied-biased", "llama-llama3-one-kv-head", "qwen2-window", "qwen3", "gemma2", "gemma3", WIDE, ENCODER)


@pytest.fixture(scope="session")
def honest_model(
    make_model: Callable[..., Path],  # noqa: F811
    minilm: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Model]:
    """honest_model(one of MODELS)."""
    done: dict[str, Model] = {}

    def directory(name: str) -> Path:
        if name == ENCODER:
            return minilm
        architecture, options = VARIANTS[name.removesuffix("-wide")]
        return make_model(architecture, num_hidden_layers=LAYERS, **options)

    def take(name: str) -> Model:
        if name not in done:
            folder = Folder(tmp_path_factory.mktemp(f"{name}-honest"))
            with pytest.MonkeyPatch.context() as patched:
                if name == WIDE:
                    patched.setattr(calibrate, "ERROR_MAX", 0.0)  # nothing is good enough: every operation gets wide
                manifest = import_model(directory(name), folder, lambda *_: None, profile="exact")
            done[name] = Model(name, manifest, folder)
        return done[name]

    return take


@pytest.fixture
def extreme_models(make_model: Callable[..., Path], tmp_path: Path) -> list[Model]:  # noqa: F811
    """Weights at the ends of what a model may have, which is where implementations differ if they do anywhere."""
    found: list[Model] = []
    for seed, name in enumerate(["llama-tied-biased", "qwen3", "gemma3"] * 3):
        architecture, options = VARIANTS[name]
        directory, chance = tmp_path / f"model-{seed}", random.Random(seed)
        shutil.copytree(make_model(architecture, num_hidden_layers=LAYERS, **options), directory)
        path = directory / "model.safetensors"
        tensors = {key: _extreme(chance, tensor) for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        folder = Folder(tmp_path / f"blobs-{seed}")
        folder.root.mkdir()
        try:
            manifest = import_model(directory, folder, lambda *_: None, profile="exact")
        except ModelFormatError:
            continue  # beyond the ends
        found.append(Model(f"{name}-{seed}", manifest, folder))
    assert len(found) >= 3
    return found[:4]


def _extreme(chance: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(chance.randrange(2**31))
    if tensor.dim() > 1:
        tensor = tensor * 2.0 ** chance.choice([0, 0, 0, chance.randint(-8, 8), chance.randint(-45, 25)])
        if chance.random() < 0.3:
            tensor[chance.randrange(len(tensor))] *= 2.0 ** chance.randint(-20, 15)
        return tensor.clamp(-(2.0**26), 2.0**26)
    values = torch.randn(tensor.shape, generator=drawn)
    match chance.randrange(8):
        case 0:
            tensor = values * 1e-40  # not normal
        case 1:
            tensor = torch.where(values > 0, 0.0, -0.0)
        case 2:
            tensor = values * 2.0**17
        case 3:
            tensor = values * 2.0 ** torch.randint(-140, 10, tensor.shape, generator=drawn)
    return tensor.clamp(-(2.0**20), 2.0**20)
