"""Models to measure: nano without its end token, so that every run is equally long, and random ones of real shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nexus.models import builtin_path

PROMPT = "What is the largest planet?"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SEED = 0
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama. `hidden`, `feed_forward`, `vocabulary`: dimensions. `tied`: the head shares the embedding's weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool
    rope_theta: float = 10000.0
    context: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Numbers in the model."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def stored_bytes(self) -> int:
        """On disk, in bfloat16."""
        return 2 * self.weights


SHAPES = {
    # For trying out the benchmarks themselves.
    "tiny": Shape(4, 256, 4, 2, 512, 8192, tied=True),
    # SmolLM2-135M
    "135m": Shape(30, 576, 9, 3, 1536, 49152, tied=True),
    # Llama-3.2-1B
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, tied=True, rope_theta=500000.0),
    # Llama-3.2-3B
    "3b": Shape(28, 3072, 24, 8, 8192, 128256, tied=True, rope_theta=500000.0),
    # Llama-2-7B
    "7b": Shape(32, 4096, 32, 32, 11008, 32000, tied=False),
}


def endless_nano(directory: Path) -> Path:
    """The shipped weights; only the config forgets which token ends an answer."""
    shutil.copytree(builtin_path("nano"), directory)
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    return directory


def random_135m(directory: Path) -> Path:
    """The shape of SmolLM2-135M, random weights, nano's tokenizer."""
    return random_llama(directory, SHAPES["135m"])


def random_llama(directory: Path, shape: Shape) -> Path:
    """A Llama with random weights in bfloat16 and nano's tokenizer; the same bytes every time.

    One file per layer, as large models come, so that no more than one layer is ever in memory.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(_SEED)

    def random(name: str, dimensions: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(dimensions, generator=generator)
        if name.endswith("norm.weight"):
            # Around one: a norm that is left out would otherwise not show.
            values.mul_(0.1).add_(1)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            # Attention that is far from even: a mistake in positions or in the order of a head would otherwise not show.
            values.div_(shape.hidden**0.5)
        else:
            # What transformers begins training with.
            values.mul_(0.02)
        return values.bfloat16()

    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(_parts(shape)):
        file = f"model-{number + 1:05}-of-{shape.layers + 1:05}.safetensors"
        tensors = {name: random(name, dimensions) for name, dimensions in part.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (directory / _INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    for name in TOKENIZER_FILES:
        source = builtin_path("nano") / name
        if source.exists():
            shutil.copy(source, directory / name)
    return directory


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file: those around the layers, then layer by layer."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    around: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    yield around | ({} if shape.tied else {"lm_head.weight": (shape.vocabulary, hidden)})
    for index in range(shape.layers):
        yield {
            f"model.layers.{index}.{name}.weight": dimensions
            for name, dimensions in (
                ("input_layernorm", (hidden,)),
                ("self_attn.q_proj", (hidden, hidden)),
                ("self_attn.k_proj", (kv, hidden)),
                ("self_attn.v_proj", (kv, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("post_attention_layernorm", (hidden,)),
                ("mlp.gate_proj", (shape.feed_forward, hidden)),
                ("mlp.up_proj", (shape.feed_forward, hidden)),
                ("mlp.down_proj", (hidden, shape.feed_forward)),
            )
        }


def prompt_ids(directory: Path) -> list[int]:
    from nexus.engine.tokenizer import Tokenizer

    files = {path.name: path for path in directory.iterdir() if path.suffix == ".json"}
    return Tokenizer.load(files).encode(PROMPT)
