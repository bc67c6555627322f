"""Models with every odd feature, of four layers, so that up to four nodes share one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
