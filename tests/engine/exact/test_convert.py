"""Converting a model: the right numbers under the right names, the same bytes everywhere, and nothing from unsound weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy._core._multiarray_umath import __cpu_dispatch__  # type: ignore[attr-defined]
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from nexus.core.errors import LocalError, ModelFormatError
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, Blob, Manifest
from nexus.engine.exact import calibrate, convert
from nexus.engine.exact.calibrate import ERROR_MAX, relative_error
from nexus.engine.exact.convert import quantise
from nexus.engine.exact.known_answers import VECTOR_TOKENS
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage
from nexus.proof.arithmetic.plan import ExactPlan, plan_from_json
from nexus.storage.blobs import BlobStore
from nexus.storage.journal import JOURNALS_MAX, ImportJournal
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS, Models

MakeModel = Callable[..., Path]
Edit = Callable[[dict[str, torch.Tensor]], object]
Take = Callable[..., Path]
SMALL, LARGE = 2.0**-60, 2.0**20
values = st.floats(-(2.0**20), 2.0**20, width=32)
rows = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=values)


@pytest.fixture
def copy(make_model: MakeModel, tmp_path: Path) -> Take:
    """copy(name of an architecture, edit=..., config=..., **overrides) -> a model to spoil."""

    def take(name: str, edit: Edit | None = None, config: dict[str, object] | None = None, **overrides: object) -> Path:
        directory = Path(shutil.copytree(make_model(name, num_hidden_layers=LAYERS, **overrides), tmp_path / name))
        if edit is not None:
            tensors = load_file(directory / "model.safetensors")
            edit(tensors)
            save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
        if config is not None:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return directory

    return take


def take_in(directory: Path, folder: Path, profile: str = "exact") -> tuple[Manifest, Folder]:
    folder.mkdir(exist_ok=True)
    sink = Folder(folder)
    return import_model(directory, sink, lambda *_: None, profile=profile), sink


# --- numbers ----------------------------------------------------------------------------------------------------------------


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@given(rows)
def test_a_row_becomes_the_nearest_integers_to_it_over_its_scale(block: np.ndarray) -> None:  # type: ignore[type-arg]
    q, scale = quantise(block, "x", 0, vocabulary=True)
    assert (q.dtype, scale.dtype) == (np.int8, np.float32)
    for row, integers, one in zip(block.tolist(), q.tolist(), scale.tolist(), strict=True):
        # Python's floats have 53 bits: their quotient, rounded once more, is that of float32 (53 >= 2 * 24 + 2).
        assert one == max(f32(max(map(abs, row)) / 127), SMALL)
        assert integers == [round(f32(value / one)) for value in row]
        assert all(abs(value - one * integer) <= one * 0.5001 for value, integer in zip(row, integers, strict=True))


@given(rows)
def test_no_integer_is_larger_than_127(block: np.ndarray) -> None:  # type: ignore[type-arg]
    q, _ = quantise(block, "x", 0, vocabulary=True)
    assert int(np.abs(q.astype(int)).max()) <= 127


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (0.0, "all zero"),
        (float("nan"), "not numbers"),
        (float("inf"), "infinite"),
        (-float("inf"), "infinite"),
        (1e-30, "no value larger than 1e-30"),
        (1e-45, "no value larger than"),
        (2.0**28, "as large as"),
        (3e38, "as large as"),
    ],
)
def test_rows_without_a_sound_form_are_named(bad: float, says: str) -> None:
    block = np.ones((5, 3), np.float32)
    block[3] = bad
    with pytest.raises(ModelFormatError, match=says) as caught:
        quantise(block, "model.layers.0.mlp.up_proj.weight", 100, vocabulary=False)
    assert caught.value.cause.startswith("model.layers.0.mlp.up_proj.weight ")
    assert caught.value.cause.endswith(" in row 103")
    assert "weights themselves are at fault" in caught.value.fix
    assert "--profile float" in caught.value.fix


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-30])
def test_tokens_that_were_never_trained_become_zero(tiny: float) -> None:
    block = np.ones((3, 4), np.float32)
    block[1] = tiny
    q, scale = quantise(block, "embed", 0, vocabulary=True)
    assert scale[1] == SMALL
    assert not q[1].any()
    assert q[0].all()


def test_the_limits_of_scales_are_inside() -> None:
    block = np.array([[127 * SMALL], [127 * LARGE]], np.float32)
    q, scale = quantise(block, "x", 0, vocabulary=False)
    assert (q.tolist(), scale.tolist()) == ([[127], [127]], [SMALL, LARGE])


# --- the pieces -------------------------------------------------------------------------------------------------------------


def dequantised(path: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """The tensors of a piece as floats, scales multiplied in."""
    tensors = load_numpy(path)
    scaled = {
        name: value * tensors[name.replace(".weight", ".scale")][:, None]
        for name, value in tensors.items()
        if value.dtype == np.int8
    }
    return {name: value for name, value in {**tensors, **scaled}.items() if not name.endswith(".scale")}


def expected_pieces(plan: ExactPlan, model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """What the pieces should hold by the names of docs/exact.md, found in transformers' modules by their attributes."""
    offset = 1.0 if plan.norm_offset else 0.0
    pieces: dict[str, dict[str, torch.Tensor]] = {}

    def put(piece: str, name: str, *modules: torch.nn.Module, plus: float = 0.0) -> None:
        pieces.setdefault(piece, {})[f"{name}.weight"] = torch.cat([module.weight for module in modules]) + plus  # type: ignore[misc]
        if all(getattr(module, "bias", None) is not None for module in modules):
            pieces[piece][f"{name}.bias"] = torch.cat([module.bias for module in modules])  # type: ignore[misc]

    base = model.base_model
    if not plan.causal:
        embeddings = base.embeddings
        put("embedding", "embed", embeddings.word_embeddings)
        put("embedding", "position", embeddings.position_embeddings)
        put("embedding", "embed_norm", embeddings.LayerNorm)
        pieces["embedding"]["type.weight"] = embeddings.token_type_embeddings.weight[0]
        for index, layer in enumerate(base.encoder.layer):
            attention, piece = layer.attention, f"layer.{index}"
            put(piece, "qkv", attention.self.query, attention.self.key, attention.self.value)
            put(piece, "o", attention.output.dense)
            put(piece, "attention_norm", attention.output.LayerNorm)
            put(piece, "gate_up", layer.intermediate.dense)
            put(piece, "down", layer.output.dense)
            put(piece, "mlp_norm", layer.output.LayerNorm)
        return {**pieces, "head": {}}
    put("embedding", "embed", base.embed_tokens)
    for index, layer in enumerate(base.layers):
        attention, mlp, piece = layer.self_attn, layer.mlp, f"layer.{index}"
        put(piece, "qkv", attention.q_proj, attention.k_proj, attention.v_proj)
        put(piece, "o", attention.o_proj)
        put(piece, "gate_up", mlp.gate_proj, mlp.up_proj)
        put(piece, "down", mlp.down_proj)
        put(piece, "attention_norm", layer.input_layernorm, plus=offset)
        if plan.post_norms:
            put(piece, "post_attention_norm", layer.post_attention_layernorm, plus=offset)
            put(piece, "mlp_norm", layer.pre_feedforward_layernorm, plus=offset)
            put(piece, "post_mlp_norm", layer.post_feedforward_layernorm, plus=offset)
        else:
            put(piece, "mlp_norm", layer.post_attention_layernorm, plus=offset)
        if plan.qk_norm:
            put(piece, "q_norm", attention.q_norm, plus=offset)
            put(piece, "k_norm", attention.k_norm, plus=offset)
    put("head", "norm", base.norm, plus=offset)
    if not plan.tied:
        put("head", "head", model.lm_head)
    return pieces


def check_pieces(manifest: Manifest, folder: Folder, model: torch.nn.Module) -> None:
    plan = plan_from_json(folder.paths[EXACT_PLAN].read_bytes())
    expected = expected_pieces(plan, model)
    assert [piece.name for piece in manifest.pieces] == list({"embedding": 0, **expected, "head": 0})
    for piece in manifest.pieces:
        found = dequantised(folder.paths[piece.name])
        assert found.keys() == expected[piece.name].keys()
        stored = load_numpy(folder.paths[piece.name])
        for name, tensor in expected[piece.name].items():
            right = tensor.detach().float().numpy()
            if stored[name].dtype == np.int8:
                scale = stored[name.replace(".weight", ".scale")]
                assert (np.abs(found[name] - right) <= scale[:, None] * 0.501).all(), name
            else:
                np.testing.assert_array_equal(found[name], right, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_where_it_belongs(name: str, exact_model: Models, make_model: MakeModel) -> None:
    manifest, folder = exact_model(name)
    architecture, options = VARIANTS[name]
    check_pieces(
        manifest, folder, AutoModelForCausalLM.from_pretrained(make_model(architecture, num_hidden_layers=LAYERS, **options))
    )


def test_every_tensor_of_an_encoder_is_where_it_belongs(minilm: Path, tmp_path: Path) -> None:
    manifest, folder = take_in(minilm, tmp_path / "blobs")
    check_pieces(manifest, folder, AutoModel.from_pretrained(minilm, add_pooling_layer=False))
    assert (manifest.profile, manifest.dtype, manifest.kv_bytes, manifest.context) == ("exact", "int8", 0, 256)
    wide = plan_from_json(folder.paths[EXACT_PLAN].read_bytes()).wide_ops()
    assert wide == {op: list(range(6)) for op in ("qkv", "o", "gate_up", "down", "attention")} | {"head": []}
    load_stage(manifest, 0, 6, folder.paths, kernel="torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_read_as_the_numbers_that_they_are(dtype: torch.dtype, copy: Take, tmp_path: Path) -> None:
    directory = copy("qwen2", lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    manifest, folder = take_in(directory, tmp_path / "blobs")
    check_pieces(manifest, folder, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def test_an_exact_model_is_whole(exact_model: Models) -> None:
    manifest, folder = exact_model("llama")
    assert Manifest.from_bytes(manifest.to_bytes()).check() == manifest
    assert (manifest.profile, manifest.dtype, manifest.architecture) == ("exact", "int8", "LlamaForCausalLM")
    assert manifest.kv_bytes == 2 * 2 * 12 + 8 * 2  # two int8 per key-value head and dimension, two float32 scales per head
    plan = plan_from_json(folder.paths[EXACT_PLAN].read_bytes())
    assert (plan.hidden, plan.ffn, plan.vocab, len(plan.layers), plan.causal) == (48, 80, 131, LAYERS, True)
    vectors = load_numpy(folder.paths[EXACT_VECTORS])
    assert {name: value.shape for name, value in vectors.items()} == {
        "tokens": (VECTOR_TOKENS,),
        "states": (LAYERS + 1, VECTOR_TOKENS, 48),
        "logits": (131,),
    }
    assert load_numpy(folder.paths[EXACT_TABLES]).keys() == {"exp_hi", "exp_lo", "phi", "rope.0.coarse", "rope.0.fine"}


# --- the same bytes everywhere ----------------------------------------------------------------------------------------------


def test_blocks_of_any_size_give_the_same_model(
    exact_model: Models, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = exact_model("llama")
    monkeypatch.setattr(convert, "BLOCK_VALUES", 100)
    again, _ = take_in(make_model("llama", num_hidden_layers=LAYERS), tmp_path / "blobs")
    assert again == manifest


PROGRAM = """
import sys
from pathlib import Path
from nexus.engine.importer import import_model
from nexus.storage.blobs import BlobStore
print(import_model(Path(sys.argv[1]), BlobStore.open(Path(sys.argv[2])), lambda *_: None, profile="exact").root.hex())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__), "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
    ],
    ids=["oldest", "avx2"],
)
def test_every_processor_gives_the_same_root(settings: dict[str, str], copy: Take, tmp_path: Path) -> None:
    directory = copy("gemma2", lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))
    manifest, _ = take_in(directory, tmp_path / "blobs")
    command = [sys.executable, "-c", PROGRAM, directory, tmp_path / "store"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == manifest.root.hex(), done.stderr


# --- what is refused, and what is float instead -----------------------------------------------------------------------------


def spoil(name: str, row: int, value: float) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][row] = value

    return edit


REFUSED: dict[str, tuple[Edit, str]] = {
    "NaN": (spoil("model.layers.1.mlp.up_proj.weight", 7, float("nan")), r"layers\.1\.mlp\.up_proj\.weight has .* in row 7$"),
    "Inf": (spoil("model.layers.0.self_attn.v_proj.weight", 3, float("inf")), r"v_proj\.weight has .*infinite in row 3$"),
    "zero row": (spoil("model.layers.2.mlp.down_proj.weight", 11, 0.0), r"down_proj\.weight is all zero in row 11$"),
    "large scale": (
        spoil("model.layers.0.self_attn.o_proj.weight", 0, 1e30),
        r"o_proj\.weight has values as large as 1e\+30 in row 0$",
    ),
    "small scale": (spoil("model.layers.0.self_attn.o_proj.weight", 0, 1e-30), r"no value larger than 1e-30 in row 0$"),
    "NaN in a norm": (spoil("model.norm.weight", 5, float("nan")), r"norm\.weight has values that are not numbers .* in row 5$"),
    "a norm too large": (
        spoil("model.layers.2.input_layernorm.weight", 1, 2e6),
        r"input_layernorm\.weight .*beyond 2\^20 in row 1$",
    ),
    "NaN token": (spoil("model.embed_tokens.weight", 130, float("nan")), r"embed_tokens\.weight has .* in row 130$"),
    "Inf in the head": (spoil("lm_head.weight", 2, float("-inf")), r"lm_head\.weight has .* in row 2$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_without_an_exact_form_are_refused(name: str, copy: Take, tmp_path: Path) -> None:
    edit, cause = REFUSED[name]
    with pytest.raises(ModelFormatError) as caught:
        take_in(copy("llama", edit), tmp_path / "blobs", profile="auto")
    assert re.search(cause, caught.value.cause), caught.value.cause
    assert "--profile float" in caught.value.fix


def test_tokens_of_zeros_are_kept(copy: Take, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][0] = 0
        tensors["lm_head.weight"][128:] = 0

    manifest, folder = take_in(copy("llama", edit), tmp_path / "blobs")
    assert load_numpy(folder.paths["embedding"])["embed.scale"][0] == SMALL
    assert (load_numpy(folder.paths["head"])["head.scale"][128:] == SMALL).all()
    load_stage(manifest, 0, LAYERS, folder.paths, kernel="torch")


UNSUPPORTED: dict[str, tuple[str, dict[str, object], str]] = {
    "architecture": ("gpt2", {}, "'gpt2'"),
    "fused": ("phi3", {}, "'phi3'"),
    "rope": ("llama-dynamic", {}, "rotary embeddings of type 'dynamic'"),
    "activation": ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
    "head size": ("llama", {"head_dim": 258}, "heads of 258"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_covered_is_float_or_says_so(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    architecture, overrides, says = UNSUPPORTED[name]
    directory = make_model(architecture, num_hidden_layers=LAYERS, **overrides)
    with pytest.raises(ModelFormatError, match=says) as caught:
        take_in(directory, tmp_path / "exact")
    assert "--profile float" in caught.value.fix
    notices: list[str] = []
    folder = tmp_path / "auto"
    folder.mkdir()
    manifest = import_model(directory, Folder(folder), lambda *_: None, notice=notices.append)
    assert manifest == take_in(directory, tmp_path / "float", "float")[0]
    assert manifest.profile == "float"
    assert len(notices) == 1
    assert says in notices[0]


@pytest.mark.parametrize(("factor", "says"), [(1e6, "beyond 2\\^40")])
def test_weights_that_compute_nonsense_are_refused(factor: float, says: str, copy: Take, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "mlp" in name or "o_proj" in name:
                tensor *= factor

    with pytest.raises(ModelFormatError, match=says) as caught:
        take_in(copy("llama", edit), tmp_path / "blobs")
    assert "--profile float" in caught.value.fix


def test_a_context_without_tables_is_float(copy: Take, tmp_path: Path) -> None:
    directory = copy("llama", config={"max_position_embeddings": 2**30})
    with pytest.raises(ModelFormatError, match="contexts of 1073741824"):
        take_in(directory, tmp_path / "exact")
    assert take_in(directory, tmp_path / "auto", "auto")[0].profile == "float"


def test_auto_is_exact_where_it_can_be(exact_model: Models, make_model: MakeModel, tmp_path: Path) -> None:
    notices: list[str] = []
    folder = Folder(tmp_path)
    manifest = import_model(make_model("llama", num_hidden_layers=LAYERS), folder, lambda *_: None, notice=notices.append)
    assert (manifest, notices) == (exact_model("llama")[0], [])


# --- wide operations --------------------------------------------------------------------------------------------------------


def amplified(tensors: dict[str, torch.Tensor]) -> None:
    """Layer 1 gets a channel before `down` that outweighs all others; what it adds to the residual is as before."""
    tensors["model.layers.1.mlp.up_proj.weight"][17] *= 3000
    tensors["model.layers.1.mlp.down_proj.weight"][:, 17] /= 3000


def test_an_outlier_makes_its_operation_wide(copy: Take, tmp_path: Path) -> None:
    manifest, folder = take_in(copy("llama", amplified), tmp_path / "blobs")
    wide = plan_from_json(folder.paths[EXACT_PLAN].read_bytes()).wide_ops()
    assert wide["down"] == [1]
    assert all(not layers for op, layers in wide.items() if op != "down")
    load_stage(manifest, 0, LAYERS, folder.paths, kernel="torch")


def test_wide_attention_counts_in_the_cache(copy: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ERROR_MAX", 0.0)
    manifest, folder = take_in(copy("llama"), tmp_path / "blobs")
    wide = plan_from_json(folder.paths[EXACT_PLAN].read_bytes()).wide_ops()
    assert wide == {op: list(range(LAYERS)) for op in ("qkv", "o", "gate_up", "down", "attention")} | {"head": [0]}
    assert manifest.kv_bytes == 3 * 2 * 12 + 8 * 2
    load_stage(manifest, 0, LAYERS, folder.paths, kernel="torch")


def test_the_error_is_relative_to_what_is_added() -> None:
    start = np.full((2, 3), 100, np.float32)
    reference = start + np.array([[3, 0, 4], [0, 0, 2]], np.float32)
    got = reference + np.array([[0, 1, 0], [0, 0, 0]], np.float32)
    assert relative_error(got, reference, start) == (1 / 5 + 0) / 2
    assert relative_error(start, start, start) == 0
    assert relative_error(reference, start, start) > ERROR_MAX


# --- interrupted imports ----------------------------------------------------------------------------------------------------


class CrashError(Exception):
    pass


class CrashingStore:
    """A blob store that dies in the middle of its n-th blob, counted from 0; never with None. `made`: what it was given."""

    def __init__(self, store: BlobStore, crash_at: int | None) -> None:
        self._store, self._crash_at = store, crash_at
        self.made: list[str] = []

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
        self.made.append(name)

        def cut() -> Iterable[bytes]:
            for number, chunk in enumerate(chunks):
                if self._crash_at == len(self.made) - 1 and number:
                    raise CrashError
                yield chunk
            if self._crash_at == len(self.made) - 1:
                raise CrashError

        return self._store.put(name, size, cut())

    def path(self, root: bytes) -> Path:
        return self._store.path(root)


def attempt(directory: Path, home: Path, crash_at: int | None = None, profile: str = "exact") -> tuple[Manifest | None, list[str]]:
    """One try, of a process of its own: what it gave, and what it made."""
    store = BlobStore.open(home)
    sink = CrashingStore(store, crash_at)
    journal = ImportJournal(home, store)
    try:
        manifest = import_model(directory, sink, lambda *_: None, profile=profile, journal=journal)
    except CrashError:
        return None, sink.made
    journal.end()
    return manifest, sink.made


@pytest.mark.parametrize("profile", ["exact", "float"])
def test_an_import_goes_on_after_a_crash_at_any_point(profile: str, make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    whole, order = attempt(directory, tmp_path / "whole", profile=profile)
    assert whole is not None
    pieces = [piece.name for piece in whole.pieces]
    assert order[: len(pieces)] == pieces
    for crash_at in range(len(order)):
        home = tmp_path / f"crash-{crash_at}"
        died, made = attempt(directory, home, crash_at, profile)
        assert (died, made) == (None, order[: crash_at + 1])
        again, made = attempt(directory, home, profile=profile)
        assert again == whole
        # No piece that was whole is made again; the few small files are.
        assert made == [*pieces[crash_at:], *order[len(pieces) :]]
        assert not list(home.glob("*.import")) + list(home.glob("*.tmp"))


def test_a_crash_at_every_piece_in_turn(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    count = LAYERS + 2
    for number in range(count):
        # The first piece of each try is stored, the second is where it dies.
        assert (
            attempt(directory, tmp_path / "home", crash_at=1)[1][0]
            == ["embedding", "layer.0", "layer.1", "layer.2", "head"][number]
        )
    assert attempt(directory, tmp_path / "home")[0] == attempt(directory, tmp_path / "other")[0]


def test_a_piece_that_the_disk_damaged_is_made_again(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    attempt(directory, tmp_path, crash_at=3)
    blob = max(tmp_path.glob("*.blob"), key=lambda path: path.stat().st_size)
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    manifest, made = attempt(directory, tmp_path)
    assert manifest is not None
    assert len([name for name in made if name in ("embedding", "layer.0", "layer.1")]) == 1
    for piece in manifest.pieces:
        BlobStore(tmp_path).verify(piece.root)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"spec": 1, "pieces": [["embedding", -1, "00"]]}', b'{"spec": 2}', b"\xff"]
)
def test_a_damaged_journal_counts_as_none(content: bytes, make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    attempt(directory, tmp_path, crash_at=2)
    (journal,) = tmp_path.glob("*.import")
    journal.write_bytes(content)
    manifest, made = attempt(directory, tmp_path)
    assert manifest is not None
    assert made[0] == "embedding"


def test_other_weights_or_another_config_start_over(copy: Take, tmp_path: Path) -> None:
    directory = copy("llama")
    home = tmp_path / "home"
    attempt(directory, home, crash_at=3)
    weights = directory / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert attempt(directory, home, crash_at=3)[1][0] == "embedding"
    config = directory / "config.json"
    stat = config.stat()
    config.write_bytes(config.read_bytes().replace(b"10000.0", b"20000.0"))
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert attempt(directory, home, crash_at=3)[1][0] == "embedding"
    assert attempt(directory, home, crash_at=3, profile="float")[1][0] == "embedding"
    assert attempt(directory, home)[1][0] == "layer.2"


def test_journals_do_not_pile_up(tmp_path: Path) -> None:
    store = BlobStore.open(tmp_path)
    blob = store.put("a", 1, [b"x"])
    for number in range(JOURNALS_MAX + 5):
        journal = ImportJournal(tmp_path, store)
        journal.begin(bytes([number]) * 32)
        journal.note(blob)
    assert len(list(tmp_path.glob("*.import"))) <= JOURNALS_MAX
    assert journal.recall("a") == blob
    assert journal.recall("b") is None
    store.remove(blob.root)
    assert journal.recall("a") is None
    store.put("c", 1, [b"y"])
    journal.end()
    journal.end()


def test_a_journal_that_cannot_be_written_is_the_disks_fault(tmp_path: Path) -> None:
    store = BlobStore.open(tmp_path / "store")
    (tmp_path / "file").write_bytes(b"")
    journal = ImportJournal(tmp_path / "file", store)
    blob = store.put("a", 1, [b"x"])
    with pytest.raises(LocalError):
        journal.begin(bytes(32))
    with pytest.raises(LocalError):
        journal.note(blob)


def test_a_directory_that_changes_meanwhile_is_refused(copy: Take, tmp_path: Path) -> None:
    directory = copy("llama")

    class Touching(Folder):
        def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
            if name == "layer.1":
                os.utime(directory / "model.safetensors", ns=(5, 5))
            return super().put(name, size, chunks)

    with pytest.raises(ModelFormatError, match="changed while it was read"):
        import_model(directory, Touching(tmp_path), lambda *_: None, profile="exact")


def test_progress_reaches_the_end(make_model: MakeModel, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    import_model(make_model("llama", num_hidden_layers=LAYERS), Folder(tmp_path), lambda *call: calls.append(call), profile="exact")
    for phase in (lambda name: name == "known answers", lambda name: name != "known answers"):
        of_phase = [(done, total) for name, done, total in calls if phase(name)]
        assert [done for done, _ in of_phase] == sorted(done for done, _ in of_phase)
        assert of_phase[-1][0] == of_phase[-1][1] > 0
