"""Tiny random models in the exact profile, with every odd feature that it covers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nexus.core.manifest import Manifest
from nexus.engine.exact import gemm, native
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage, load_stage
from tests.engine.conftest import LLAMA3_ROPE, Folder

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# Three layers, each different where the architecture has kinds of layers; windows shorter than the texts.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3-one-kv-head": ("llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "gemma": ("gemma", {"num_key_value_heads": 4}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 12, "sliding_window": 24}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 12, "sliding_window": 11}),
}
LAYERS = 3

Models = Callable[[str], tuple[Manifest, Folder]]


@pytest.fixture(scope="session")
def exact_model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """exact_model(name of a variant) -> manifest and blobs."""
    done: dict[str, tuple[Manifest, Folder]] = {}

    def take(name: str) -> tuple[Manifest, Folder]:
        if name not in done:
            architecture, options = VARIANTS[name]
            directory = make_model(architecture, num_hidden_layers=LAYERS, **options)
            folder = Folder(tmp_path_factory.mktemp(f"{name}-exact"))
            done[name] = import_model(directory, folder, lambda *_: None, profile="exact"), folder
        return done[name]

    return take


def kernels() -> list[str]:
    """Everything that may compute on this processor."""
    return [*native.available(), *(f"torch:{kernel.name}" for kernel in gemm.KERNELS)]


def chain(model: tuple[Manifest, Folder], stages: int, kernel: str | None) -> list[Stage]:
    manifest, folder = model
    edges = [round(manifest.layers * i / stages) for i in range(stages + 1)]
    return [
        load_stage(manifest, start, end, folder.stage_files(manifest, start, end), kernel=kernel) for start, end in pairwise(edges)
    ]
