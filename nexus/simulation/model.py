"""A tiny language model of the exact profile with random weights: real arithmetic, real commitments, next to no time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nexus.core.manifest import Manifest, stage_pieces
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog

NAME = "tiny"
LAYERS = 6
_VOCABULARY = 131
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


class ModelFiles:
    """The model as a node keeps it, in one directory that all nodes share: `store` links what a node is to hold into its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        catalog = Catalog.open(root)
        self.manifest: Manifest = catalog.manifest(catalog.names()[NAME])
        blobs = BlobStore.open(root)
        self.paths = {blob.name: blobs.path(blob.root) for blob in (*self.manifest.pieces, *self.manifest.files)}

    def store(self, models: Path, layers: Iterable[tuple[int, int]]) -> None:
        """What a node has of it: the manifest and the small files, and the pieces of these ranges of layers."""
        models.mkdir(parents=True)
        wanted = {blob.name for blob in self.manifest.files}
        for start, end in layers:
            wanted |= {blob.name for blob in stage_pieces(self.manifest, start, end)}
        pieces = {path.name for name, path in self.paths.items() if name not in wanted}
        for path in self.root.rglob("*"):
            target = models / path.relative_to(self.root)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            elif path.stem not in {Path(name).stem for name in pieces}:
                target.hardlink_to(path)

    def stage_files(self, start: int, end: int) -> dict[str, Path]:
        names = [blob.name for blob in (*stage_pieces(self.manifest, start, end), *self.manifest.files)]
        return {name: self.paths[name] for name in names}


def make_model(root: Path) -> ModelFiles:
    """Make it, or take the one that is there already. The same bytes on every machine."""
    store = root / "as-a-node-keeps-it"
    if not (root / "done").exists():
        source = root / "source"
        source.mkdir(parents=True)
        _write(source)
        from nexus.engine.importer import import_model

        blobs, catalog = BlobStore.open(store), Catalog.open(store)
        catalog.add(NAME, import_model(source, blobs, lambda *_: None, profile="exact"))
        (root / "done").touch()
    return ModelFiles(store)


def _write(directory: Path) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    (directory / "config.json").write_text(json.dumps(_CONFIG))
    rng = np.random.default_rng(7)
    hidden, inner, head = 16, 24, 8

    def drawn(*shape: int, scale: float = 0.5) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        # Multiples of 2^-10: the same numbers whatever the machine's floating point does.
        return (np.round(rng.normal(0.0, scale, shape) * 1024) / 1024).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": drawn(_VOCABULARY, hidden, scale=0.05),
        "lm_head.weight": drawn(_VOCABULARY, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}.self_attn.q_proj.weight": drawn(2 * head, hidden),
            f"{name}.self_attn.k_proj.weight": drawn(head, hidden),
            f"{name}.self_attn.v_proj.weight": drawn(head, hidden),
            f"{name}.self_attn.o_proj.weight": drawn(hidden, 2 * head),
            f"{name}.mlp.gate_proj.weight": drawn(inner, hidden),
            f"{name}.mlp.up_proj.weight": drawn(inner, hidden),
            f"{name}.mlp.down_proj.weight": drawn(hidden, inner),
        }
    save_file(tensors, directory / "model.safetensors")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:_VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
