"""The same weights as a GGUF file in Q8_0, for llama.cpp: what its own converter and quantiser make of a Llama.

Needs the `bench` extra (`gguf`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from scripts.benchmarks.models import Shape

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_RMS_EPSILON = 1e-6


def write_q8_0(directory: Path, shape: Shape, path: Path) -> Path:
    """Convert the model of `models.random_llama` in `directory`; matrices become Q8_0, norms stay float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(_RMS_EPSILON)
    writer.add_vocab_size(shape.vocabulary)
    # Token ids go in and logits come out: no text, no vocabulary.
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                values = _rotated(name, tensors.get_tensor(name).float(), shape).numpy()
                if values.ndim == 1:
                    writer.add_tensor(_gguf_name(name), values)
                else:
                    kind = gguf.GGMLQuantizationType.Q8_0
                    writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    if name in _AROUND:
        return _AROUND[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _rotated(name: str, values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of a head, transformers its first half with its second: q and k are re-ordered."""
    heads = {"q_proj.weight": shape.heads, "k_proj.weight": shape.kv_heads}.get(name.rpartition("self_attn.")[2])
    if heads is None:
        return values
    return values.view(heads, 2, shape.head_dim // 2, -1).transpose(1, 2).reshape(values.shape)
