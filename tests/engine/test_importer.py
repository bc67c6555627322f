from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL, Blob, Manifest
from nexus.engine.importer import import_model

from .conftest import Folder

MakeModel = Callable[..., Path]
Edit = Callable[[Path], object]


class Nowhere:
    """A sink that must not be reached: a bad model is refused before its first byte is stored."""

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
        raise AssertionError(f"{name} was stored")

    def path(self, root: bytes) -> Path:
        raise AssertionError("nothing is here to be read")


@pytest.fixture
def copy(make_model: MakeModel, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(make_model(name), tmp_path / name))


def take(directory: Path, folder: Path) -> tuple[Manifest, Folder]:
    folder.mkdir()
    sink = Folder(folder)
    return import_model(directory, sink, lambda *_: None, profile="float"), sink


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def split(directory: Path, names: tuple[str, str] = ("one.safetensors", "two.safetensors")) -> None:
    """From one weight file to two with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for index, (name, value) in enumerate(sorted(tensors.items(), reverse=True)):
        halves[index % 2][name] = value
    for name, half in zip(names, halves, strict=True):
        save_file(half, directory / name, metadata={"part": name})
    index = {"weight_map": {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_model_is_taken_apart(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama")
    calls: list[tuple[str, int, int]] = []
    (tmp_path / "blobs").mkdir()
    folder = Folder(tmp_path / "blobs")
    manifest = import_model(directory, folder, lambda *call: calls.append(call), profile="float")
    assert (manifest.kind, manifest.architecture) == (CAUSAL, "LlamaForCausalLM")
    assert (manifest.profile, manifest.dtype) == ("float", "float32")
    assert (manifest.layers, manifest.hidden_size, manifest.vocab_size, manifest.context) == (8, 48, 131, 128)
    assert (manifest.kv_bytes, manifest.tied) == (2 * 4 * 2 * 12, 0)
    assert Manifest.from_bytes(manifest.to_bytes()).check() == manifest
    tensors = load_file(directory / "model.safetensors")
    seen: set[str] = set()
    for piece in manifest.pieces:
        with safe_open(folder.paths[piece.name], "pt") as file:
            for name in file.keys():  # noqa: SIM118
                full = f"model.layers.{piece.name.split('.')[1]}.{name}" if piece.name.startswith("layer.") else name
                assert torch.equal(file.get_tensor(name), tensors[full])
                seen.add(full)
    assert seen == tensors.keys()
    assert {blob.name for blob in manifest.files} >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert folder.paths["tokenizer.json"].read_bytes() == (directory / "tokenizer.json").read_bytes()
    done = [call[1] for call in calls]
    assert done == sorted(done)
    weights = sum(value.nbytes for value in tensors.values())
    assert done[-1] == calls[-1][2] == weights + sum(blob.size for blob in manifest.files)


def test_the_same_weights_have_the_same_root(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("llama")
    one, _ = take(directory, tmp_path / "a")
    split(directory)
    two, _ = take(directory, tmp_path / "b")
    assert one == two
    assert one.root == two.root


def test_one_changed_bit_has_another_root(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("llama")
    one, _ = take(directory, tmp_path / "a")
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].view(torch.int32)[0].bitwise_xor_(1))
    two, _ = take(directory, tmp_path / "b")
    assert one.root != two.root
    assert one.pieces[:-1] == two.pieces[:-1]


def test_a_tied_head_is_stored_once(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("llama-tied")
    one, _ = take(directory, tmp_path / "a")
    assert one.tied == 1

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(directory, add_head)
    assert take(directory, tmp_path / "b")[0].root == one.root
    edit_tensors(directory, lambda tensors: tensors["lm_head.weight"][0].add_(1))
    with pytest.raises(ModelFormatError, match="other weights"):
        import_model(directory, Nowhere(), lambda *_: None, profile="float")


def test_older_names_mean_the_same(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as first published: names without "transformer.", and the causal mask among the weights."""
    directory = copy("gpt2")
    one, _ = take(directory, tmp_path / "a")

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(8):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128)

    edit_tensors(directory, age)
    assert take(directory, tmp_path / "b")[0].root == one.root


def test_older_names_of_bert(minilm: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bert"
    shutil.copytree(minilm, directory)
    one, _ = take(directory, tmp_path / "a")
    assert one.root == take(minilm, tmp_path / "b")[0].root

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(name)
        tensors["cls.predictions.bias"] = torch.zeros(30522)

    edit_tensors(directory, age)
    assert take(directory, tmp_path / "c")[0].root == one.root


def index_to(name: object) -> Edit:
    def edit(directory: Path) -> None:
        split(directory)
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = name
        path.write_text(json.dumps(index))

    return edit


def damage(position: int, value: bytes) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[position : position + len(value)] = value
        path.write_bytes(raw)

    return edit


def replace_weights_with(name: str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(b"\x80\x04cos\nsystem\n")

    return edit


def link_out(name: str) -> Edit:
    def edit(directory: Path) -> None:
        outside = directory.parent / f"outside-{name}"
        shutil.move(directory / name, outside)
        (directory / name).symlink_to(outside)

    return edit


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def without(name: str) -> Edit:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.pop(name))


def with_tensor(name: str, value: torch.Tensor) -> Edit:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: value}))


def configured(**values: object) -> Edit:
    return lambda directory: set_config(directory, **values)


def shard_missing(directory: Path) -> None:
    split(directory)
    (directory / "two.safetensors").unlink()


def shard_lacks(directory: Path) -> None:
    split(directory)
    save_file({"x": torch.zeros(1)}, directory / "two.safetensors")


def shards_overlap(directory: Path) -> None:
    split(directory)
    one, two = load_file(directory / "one.safetensors"), load_file(directory / "two.safetensors")
    save_file({**two, **dict(list(one.items())[:1])}, directory / "two.safetensors")


def write(name: str, content: bytes) -> Edit:
    return lambda directory: (directory / name).write_bytes(content)


def remove(name: str) -> Edit:
    return lambda directory: (directory / name).unlink()


REFUSED: dict[str, tuple[Edit, str]] = {
    "not a directory": (lambda directory: shutil.rmtree(directory), "not a directory"),
    "no config": (remove("config.json"), r"no config\.json"),
    "config is not JSON": (write("config.json", b"{"), "not JSON"),
    "config is deep": (write("config.json", b"[" * 100_000), "not JSON"),
    "config is a list": (write("config.json", b"[]"), "not a JSON object"),
    "config is huge": (write("config.json", b" " * (2 << 20)), "larger"),
    "remote code": (configured(auto_map={"AutoModelForCausalLM": "evil.Model"}), "run code"),
    "unknown type": (configured(model_type="my_model"), "not supported"),
    "type is a list": (configured(model_type=["llama"]), "not supported"),
    "quantised": (configured(quantization_config={"quant_method": "gptq"}), "quantised"),
    "encoder-decoder": (configured(is_encoder_decoder=True), "encoder-decoder"),
    "zero layers": (configured(num_hidden_layers=0), "config.json"),
    "a billion layers": (configured(num_hidden_layers=10**9), "config.json"),
    "heads that do not divide": (configured(num_attention_heads=-4), "config.json"),
    "longrope": (
        configured(rope_scaling={"rope_type": "longrope", "long_factor": [1.0] * 6, "short_factor": [1.0] * 6}),
        "longrope",
    ),
    "rope without sense": (configured(rope_parameters=[1]), "config.json"),
    "layers as text": (configured(num_hidden_layers="many"), "config.json"),
    "unknown activation": (configured(hidden_act="evil"), "config.json|cannot build"),
    "other layer count": (configured(num_hidden_layers=9), "lack"),
    "fewer layers": (configured(num_hidden_layers=7), "does not use"),
    "other width": (configured(intermediate_size=81), "shape"),
    "pickle .bin": (replace_weights_with("pytorch_model.bin"), "pickle"),
    "pickle .pt": (replace_weights_with("model.pt"), "pickle"),
    "pickle .ckpt": (replace_weights_with("model.ckpt"), "pickle"),
    "no weights": (remove("model.safetensors"), "neither"),
    "cut short": (cut, "sound safetensors"),
    "header length": (damage(0, b"\xff" * 8), "header claims"),
    "header damaged": (damage(8, b"["), "sound safetensors"),
    "missing tensor": (without("model.layers.3.mlp.up_proj.weight"), r"lack model\.layers\.3\.mlp\.up_proj\.weight"),
    "missing norm": (without("model.norm.weight"), "lack"),
    "unused tensor": (with_tensor("adapter.weight", torch.zeros(2)), "does not use"),
    "integer weights": (with_tensor("model.norm.weight", torch.zeros(48, dtype=torch.int64)), "stored as"),
    "same tensor under two names": (with_tensor("norm.weight", torch.zeros(48)), "two tensors mean"),
    "index to the parent": (index_to("../two.safetensors"), "outside"),
    "index to an absolute path": (index_to("/etc/passwd.safetensors"), "outside"),
    "index to a pickle": (index_to("pytorch_model.bin"), "not safetensors"),
    "index to a number": (index_to(3), "not safetensors"),
    "index is not JSON": (write("model.safetensors.index.json", b"{"), "not an index"),
    "index without a map": (write("model.safetensors.index.json", b"{}"), "not an index"),
    "index with an empty map": (write("model.safetensors.index.json", b'{"weight_map": {}}'), "names no weights"),
    "shard missing": (shard_missing, "two.safetensors is missing"),
    "shard lacks a tensor": (shard_lacks, "lacks"),
    "tensor in two shards": (shards_overlap, "more than one file"),
    "weights are a link out": (link_out("model.safetensors"), "leads out"),
    "config is a link out": (link_out("config.json"), "leads out"),
    "tokenizer is a link out": (link_out("tokenizer.json"), "leads out"),
    "no tokenizer": (remove("tokenizer.json"), r"no tokenizer\.json"),
    "bad tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json cannot be read"),
    "weights are a directory": (lambda d: (remove("model.safetensors")(d), (d / "model.safetensors").mkdir()), "not a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_models_are_refused_before_anything_is_stored(name: str, copy: Callable[[str], Path]) -> None:
    edit, cause = REFUSED[name]
    directory = copy("llama")
    edit(directory)
    with pytest.raises(ModelFormatError, match=cause) as caught:
        import_model(directory, Nowhere(), lambda *_: None, profile="float")
    assert caught.value.fix, "say what to do"


REFUSED_ENCODERS: dict[str, tuple[str, object, str]] = {
    "outside": ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../../etc"}], "outside"),
    "dense": (
        "modules.json",
        [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Dense", "path": "2"}],
        "Dense",
    ),
    "no list": ("modules.json", {"a": 1}, "not a list"),
    "max pooling": ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max"),
    "two poolings": ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean"),
    "decoder": ("config.json", {"model_type": "bert", "is_decoder": True}, "encoder-decoder"),
}


@pytest.mark.parametrize("name", REFUSED_ENCODERS)
def test_bad_encoders_are_refused(name: str, minilm: Path, tmp_path: Path) -> None:
    file, content, cause = REFUSED_ENCODERS[name]
    directory = tmp_path / "bert"
    directory.mkdir()
    for path in minilm.rglob("*"):
        if path.is_file() and path.name != file:
            (directory / path.relative_to(minilm).parent).mkdir(exist_ok=True)
            shutil.copy(path, directory / path.relative_to(minilm))
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=cause):
        import_model(directory, Nowhere(), lambda *_: None, profile="float")


def test_weights_that_shrink_while_they_are_read(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("llama")

    class Truncating(Folder):
        def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
            if name == "layer.3":
                (directory / "model.safetensors").write_bytes(b"")
            return super().put(name, size, chunks)

    with pytest.raises(ModelFormatError, match="became shorter"):
        import_model(directory, Truncating(tmp_path), lambda *_: None, profile="float")
