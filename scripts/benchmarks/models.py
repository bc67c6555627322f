"""Models to measure: nano without its end token, so that every run is equally long, and a random one of a real shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nexus.models import builtin_path

PROMPT = "What is the largest planet?"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def endless_nano(directory: Path) -> Path:
    """The shipped weights; only the config forgets which token ends an answer."""
    shutil.copytree(builtin_path("nano"), directory)
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    return directory


def random_135m(directory: Path) -> Path:
    """The shape of SmolLM2-135M (30 layers, 576 wide, tied), random weights, nano's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        source = builtin_path("nano") / name
        if source.exists():
            shutil.copy(source, directory / name)
    return directory


def prompt_ids(directory: Path) -> list[int]:
    from nexus.engine.tokenizer import Tokenizer

    files = {path.name: path for path in directory.iterdir() if path.suffix == ".json"}
    return Tokenizer.load(files).encode(PROMPT)
