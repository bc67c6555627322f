"""What a stage of the exact profile refuses: damaged pieces and tables, kernels that go wrong, values that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nexus.core.errors import LocalError, MalformedError, ModelFormatError, NexusError, UsageError
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, Manifest
from nexus.engine.exact import stage as exact_stage
from nexus.engine.exact.known_answers import table_shapes
from nexus.engine.exact.pieces import read_tables
from nexus.engine.exact.row_roots import model_rows
from nexus.engine.exact.stage import ExactStage
from nexus.engine.stage import Stage, load_stage
from nexus.proof.arithmetic.plan import LayerPlan, plan_from_json, plan_to_json
from nexus.proof.receipts import tokens_to_bytes
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import Models, chain, kernels

Tensors = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
PROMPT = tokens_to_bytes([5, 17, 99])


def load(manifest: Manifest, folder: Folder, start: int = 0, end: int | None = None, kernel: str | None = None) -> Stage:
    end = manifest.layers if end is None else end
    return load_stage(manifest, start, end, folder.stage_files(manifest, start, end), kernel=kernel)


@pytest.fixture
def model(exact_model: Models, tmp_path: Path) -> tuple[Manifest, Folder]:
    """A copy that a test may damage."""
    manifest, folder = exact_model("qwen3")
    return manifest, Folder(tmp_path, {name: Path(shutil.copy(path, tmp_path)) for name, path in folder.paths.items()})


def damage(folder: Folder, name: str, change: Callable[[Tensors], None]) -> None:
    """As an author of a manifest could: the file is well-formed, only its values are others."""
    tensors = load_file(folder.paths[name])
    change(tensors)
    save_file(tensors, folder.paths[name])


def signed_for(manifest: Manifest, folder: Folder) -> Manifest:
    """The manifest that the author of a damaged model would sign: with the roots over its rows as they are."""
    plan = plan_from_json(folder.paths[EXACT_PLAN].read_bytes())
    tables = read_tables(folder.paths[EXACT_TABLES], table_shapes(plan))
    return replace(manifest, rows=model_rows(plan, folder.paths.__getitem__, tables))


def test_the_fastest_kernel_is_taken(model: tuple[Manifest, Folder]) -> None:
    stage = load(*model)
    assert isinstance(stage, ExactStage)
    assert kernels()[0].split(":")[-1] in stage.kernel
    assert stage.chunked


@pytest.mark.parametrize("kernel", kernels())
def test_a_changed_weight_is_found_by_every_kernel(kernel: str, model: tuple[Manifest, Folder]) -> None:
    manifest, folder = model

    def change(tensors: Tensors) -> None:
        row = int(np.abs(tensors["down.weight"].astype(int)).sum(1).argmax())
        tensors["down.weight"][row, 3] ^= 64

    damage(folder, "layer.1", change)
    manifest = signed_for(manifest, folder)
    assert load(manifest, folder, 0, 1, kernel)
    with pytest.raises(LocalError, match="known answers"):
        load(manifest, folder, 1, 2, kernel)


def test_a_changed_rotary_table_is_found(model: tuple[Manifest, Folder]) -> None:
    manifest, folder = model
    damage(folder, EXACT_TABLES, lambda tensors: tensors["rope.0.fine"].ravel().__setitem__(slice(1, None, 2), 0.75))
    with pytest.raises(LocalError, match="known answers"):
        load(signed_for(manifest, folder), folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("embedding", "embed.weight"),
        ("layer.1", "qkv.scale"),
        ("layer.1", "down.weight"),
        ("layer.2", "k_norm.weight"),
        ("head", "norm.weight"),
        ("head", "head.weight"),
        (EXACT_TABLES, "rope.0.coarse"),
        (EXACT_TABLES, "rope.0.fine"),
    ],
)
def test_rows_that_the_manifest_does_not_name_are_not_served(name: str, tensor: str, model: tuple[Manifest, Folder]) -> None:
    """A proof carries the manifest's rows: whoever served others would be convicted without a fault of their own."""
    manifest, folder = model

    def change(tensors: Tensors) -> None:
        last = tensors[tensor].reshape(-1)[-1:].view(np.uint8)
        last[0] ^= 1

    damage(folder, name, change)
    with pytest.raises(ModelFormatError, match="are not those that the model's manifest names"):
        load(manifest, folder)


def test_the_rows_are_those_of_the_pieces(model: tuple[Manifest, Folder]) -> None:
    assert signed_for(*model) == model[0]


@pytest.mark.parametrize("table", ["exp_hi", "exp_lo", "phi"])
def test_a_table_of_a_function_is_that_functions_to_the_last_entry(table: str, model: tuple[Manifest, Folder]) -> None:
    """Known answers read only a few entries; sums are bounded for these tables and no others."""
    damage(model[1], EXACT_TABLES, lambda tensors: tensors[table].__setitem__(-1, -1.0))
    with pytest.raises(ModelFormatError, match="all models share"):
        load(*model)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": "1e-6"},
        {"intermediate_size": 0},
        {"intermediate_size": -80},
        {"intermediate_size": 200_000},
        {"intermediate_size": float("inf")},
        {"num_key_value_heads": -2},
        {"num_key_value_heads": 3},
        {"head_dim": -1},
        {"head_dim": 1},
        {"head_dim": 300},
        {"head_dim": "a"},
        {"query_pre_attn_scalar": -1},
        {"query_pre_attn_scalar": 1e-300},
        {"query_pre_attn_scalar": float("nan")},
        {"attn_logit_softcapping": float("nan")},
        {"attn_logit_softcapping": -50.0},
        {"final_logit_softcapping": 1e308},
        {"max_position_embeddings": 2**32},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": -3},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": "24"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "1e1000000000"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e-9}},
        {"rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("a", "b", "c")}},
    ],
    ids=str,
)
def test_settings_that_no_model_has_are_refused(change: dict[str, object], model: tuple[Manifest, Folder]) -> None:
    """Its author signs whatever he likes: what comes of it must be a bad model, never another kind of error."""
    path = model[1].paths["config.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError):
        load(*model)


@pytest.mark.parametrize("window", [2**32 + 3, 2**31 + 1, 128])
def test_a_window_beyond_the_context_is_none(window: int, model: tuple[Manifest, Folder]) -> None:
    """Cut to 32 bits it would be another one in the compiled kernel."""
    path = model[1].paths["config.json"]
    kinds = {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": window}
    path.write_text(json.dumps(json.loads(path.read_text()) | kinds))
    stage = load(*model)
    assert isinstance(stage, ExactStage)
    assert [layer.window for layer in stage.plan.layers] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "tensor", "value", "match"),
    [
        ("layer.0", "qkv.scale", np.inf, "outside"),
        ("layer.0", "qkv.scale", -1.0, "outside"),
        ("layer.0", "qkv.scale", 2.0**21, "outside"),
        ("layer.0", "attention_norm.weight", np.nan, "not numbers"),
        ("layer.0", "o.weight", -128, "-128"),
        ("head", "norm.weight", 2.0**21, "beyond"),
        (EXACT_TABLES, "exp_hi", np.nan, "cannot be"),
        (EXACT_TABLES, "exp_hi", 5.0, "cannot be"),
    ],
)
def test_values_that_no_conversion_writes_are_refused(
    name: str, tensor: str, value: float, match: str, model: tuple[Manifest, Folder]
) -> None:
    damage(model[1], name, lambda tensors: tensors[tensor].ravel().__setitem__(0, value))
    with pytest.raises(ModelFormatError, match=match):
        load(*model)


@pytest.mark.parametrize("name", ["layer.0", EXACT_TABLES, EXACT_VECTORS])
def test_tensors_of_other_shapes_are_refused(name: str, model: tuple[Manifest, Folder]) -> None:
    def change(tensors: Tensors) -> None:
        first = next(key for key in sorted(tensors) if tensors[key].ndim)
        tensors[first] = np.ascontiguousarray(tensors[first][:-1])

    damage(model[1], name, change)
    with pytest.raises(ModelFormatError):
        load(*model)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 64},
        {"eps": 1e-5},
        {"qk_norm": False},
        {"ropes": ()},
        {"layers": (LayerPlan(),)},
        {"attention_scale": 0.25},
    ],
    ids=str,
)
def test_a_plan_that_is_not_the_configs_is_refused(change: dict[str, object], model: tuple[Manifest, Folder]) -> None:
    """A verifier goes by exact.json alone."""
    path = model[1].paths[EXACT_PLAN]
    plan = plan_from_json(path.read_bytes())
    path.write_bytes(plan_to_json(replace(plan, **change)))  # type: ignore[arg-type]
    with pytest.raises(ModelFormatError):
        load(*model)


def test_a_plan_that_is_none_is_refused(model: tuple[Manifest, Folder]) -> None:
    path = model[1].paths[EXACT_PLAN]
    for raw in (b"", b"{}", path.read_bytes() + b"\n", b" " * (1 << 20)):
        path.write_bytes(raw)
        with pytest.raises(ModelFormatError, match="is not a plan"):
            load(*model)


def test_known_answers_of_tokens_beyond_the_vocabulary_are_refused(model: tuple[Manifest, Folder]) -> None:
    damage(model[1], EXACT_VECTORS, lambda tensors: tensors["tokens"].__setitem__(0, 10_000))
    with pytest.raises(ModelFormatError, match="tokens"):
        load(*model)


def test_a_kernel_that_goes_wrong_while_it_serves_is_found(model: tuple[Manifest, Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load(*model)
    assert isinstance(stage, ExactStage)
    stage.open(b"s")
    stage.step(b"s", PROMPT)
    right = stage.model.step

    def wrong(*arguments: object) -> torch.Tensor:
        out = torch.as_tensor(right(*arguments)).clone()  # type: ignore[arg-type]
        out.view(torch.int32).view(-1)[0] ^= 1  # one bit, the least
        return out

    monkeypatch.setattr(stage.model, "step", wrong)
    stage.step(b"s", PROMPT[:4])  # nobody has looked yet
    monkeypatch.setattr(exact_stage, "RECHECK_S", 0.0)
    for _ in range(2):
        with pytest.raises(LocalError, match="known answers"):
            stage.step(b"s", PROMPT[:4])
    monkeypatch.setattr(stage.model, "step", right)
    stage.step(b"s", PROMPT[:4])


def test_states_beyond_the_bounds_are_the_senders_fault(model: tuple[Manifest, Folder]) -> None:
    manifest, folder = model
    stage = load(manifest, folder, 1, 2)
    states = np.ones((2, manifest.hidden_size), "<f4")
    for value in (np.nan, np.inf, -(2.0**41)):
        stage.open(b"s")
        states[1, 3] = value
        with pytest.raises(MalformedError):
            stage.step(b"s", states.tobytes())
        stage.close(b"s")


@pytest.mark.parametrize("kernel", kernels())
def test_one_sessions_bad_values_do_not_touch_the_others(kernel: str, model: tuple[Manifest, Folder]) -> None:
    """2^40 is allowed on the way in; what the layer makes of it may be too much, and that is this session's affair."""
    manifest, folder = model
    stage = load(manifest, folder, 1, 2, kernel)
    good = np.linspace(-1, 1, 2 * manifest.hidden_size, dtype="<f4").reshape(2, -1)
    bad = good.copy()
    bad[1] *= np.float32(2.0**40)
    for name in (b"good", b"bad", b"alone"):
        stage.open(name)
    first, second = stage.step_many([(b"good", good.tobytes()), (b"bad", bad.tobytes())])
    assert first == stage.step(b"alone", good.tobytes())
    assert isinstance(second, bytes | NexusError)


def test_there_are_only_the_kernels_that_there_are(model: tuple[Manifest, Folder]) -> None:
    for name in ("abacus", "torch:abacus"):
        with pytest.raises(UsageError, match="abacus"):
            load(*model, kernel=name)


def test_a_full_context_is_refused_and_the_session_goes_on(exact_model: Models) -> None:
    (stage,) = chain(exact_model("llama"), 1, None)
    context = stage.manifest.context
    stage.open(b"s")
    stage.step(b"s", tokens_to_bytes([3] * (context - 1)))
    with pytest.raises(UsageError, match="context"):
        stage.step(b"s", tokens_to_bytes([3, 3]))
    stage.step(b"s", tokens_to_bytes([3]))


def test_memory_is_known_before_a_stage_is_loaded(exact_model: Models) -> None:
    """Its shapes are the author's: a narrow matrix takes many times its bytes once it is packed."""
    manifest, folder = exact_model("qwen3")
    files = folder.stage_files(manifest, 0, manifest.layers)
    stage = load(manifest, folder)
    assert stage.weight_bytes <= exact_stage.loaded_bytes([files[piece.name] for piece in manifest.pieces])
