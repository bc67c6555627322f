"""The decode step of one token through layers of the Llama form, in as few operations as give the same bits.

Llama form: RMSNorm, rotary positions, grouped-query attention, SwiGLU, two residual sums. In small models a step costs what its
operations cost to start, hardly what they compute. So there is one product for queries, keys and values, and one for gate and up;
queries and keys are rotated together, by a table of the positions; keys and values are written at once. Each product is over the
same rows, each sum over the same terms in the same order: the results are the same, bit for bit. `Fragment` records the step, and
takes the recording only after comparing it with transformers' own forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

# Types whose layers have this form, the parts named as in Llama.
LLAMA_FORM = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
_ROTARY_ROWS_MIN = 256


class DecoderStep:
    """Uses the parameters of `model` where they are: those of each layer must lie in one block, as `read_piece` reads them."""

    def __init__(self, model: Any, first: bool, last: bool, context: int) -> None:
        """`context`: positions there can be. Raises ValueError where the layers have another form than Llama's."""
        base = model.base_model
        settings = base.config
        if settings.model_type not in LLAMA_FORM or getattr(settings, "hidden_act", None) != "silu":
            raise ValueError(f"layers of {settings.model_type} have another form")
        if model.config._attn_implementation != "sdpa":
            raise ValueError("the attention is not torch's")
        self._layers = [_Layer(layer) for layer in base.layers]
        self._embedding = base.embed_tokens.weight if first else None
        self._norm = _Norm(base.norm) if last else None
        self._head = _Linear(model.lm_head) if last else None
        self._rotary = base.rotary_emb
        self._like = torch.empty(0, dtype=base.layers[0].self_attn.q_proj.weight.dtype)
        self._context = context
        self._table = self._rotations(min(context, _ROTARY_ROWS_MIN))

    def table(self, position: int) -> torch.Tensor:
        """Rotations of all positions up to this one at least: [positions, 2, head size], the cosines and the signed sines."""
        table = self._table
        if position >= table.shape[0]:
            self._table = table = self._rotations(min(self._context, max(position + 1, 2 * table.shape[0])))
        return table

    def _rotations(self, count: int) -> torch.Tensor:
        cos, sin = self._rotary(self._like, torch.arange(count).unsqueeze(0))
        if cos.shape[-1] != self._layers[0].head_size:
            raise ValueError("only a part of each head is rotated")
        # transformers negates the second half of the vector before it swaps the halves; (-a) * b is a * (-b), bit for bit.
        half = cos.shape[-1] // 2
        return torch.stack((cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)), 1)

    def forward(self, x: torch.Tensor, position: torch.Tensor, table: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
        """One token at `position` [] through all layers: token id int64 [1, 1] or hidden state [1, 1, width] -> the same or logits.

        `table`: from `table(position)`. `buffers`: of each layer, [1, 2 * heads, capacity, head size], keys first.
        """
        # In a recording a tensor as an index is data, a number would be a constant.
        at, length = cast(int, position), cast(int, position + 1)
        cos, sin = table.select(0, at).unbind(0)
        x = functional.embedding(x[0], self._embedding) if self._embedding is not None else x[0]
        for layer, buffer in zip(self._layers, buffers, strict=True):
            x = layer(x, cos, sin, buffer, at, length)
        if self._norm is not None and self._head is not None:
            x = self._head(self._norm(x))
        return x.unsqueeze(0)


class _Norm:
    def __init__(self, module: Any) -> None:
        self._weight = module.weight
        self._eps = module.variance_epsilon
        self._width = int(module.weight.shape[0])
        self._wide = module.weight.dtype == torch.float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension of [n, width] (Zhang and Sennrich, 2019)."""
        if not self._wide:
            return torch.rms_norm(x, (self._width,), self._weight, self._eps)
        scale = (x * x).sum(-1, keepdim=True).div_(self._width).add_(self._eps).rsqrt_()
        return (x * scale).mul_(self._weight)


class _Linear:
    """Linear modules with the same input as one: [1, in] -> [1, sum of their outs]."""

    def __init__(self, *modules: nn.Linear) -> None:
        self._weight = _adjacent([module.weight for module in modules]).t()
        biases = [module.bias for module in modules]
        self._bias = None if biases[0] is None else torch.cat(tuple(biases))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self._weight) if self._bias is None else torch.addmm(self._bias, x, self._weight)


def _adjacent(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Matrices that follow one another in memory as one, without a copy. Raises ValueError where they do not."""
    start = end = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            raise ValueError("matrices that are to be one do not follow one another in memory")
        end += tensor.nbytes
    rows, width = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
    assert end - start == rows * width * tensors[0].itemsize
    return tensors[0].as_strided((rows, width), (width, 1))


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = int(attention.head_dim)
        self._kv_heads = attention.k_proj.out_features // self.head_size
        self._heads = attention.q_proj.out_features // self.head_size
        self._inner = int(mlp.gate_proj.out_features)
        self._rotates = bool(getattr(attention, "use_rope", True))
        self._scaling = attention.scaling
        self._before, self._between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._qkv = _Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _Linear(attention.o_proj)
        self._gate_up = _Linear(mlp.gate_proj, mlp.up_proj)
        self._down = _Linear(mlp.down_proj)
        self._q_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._k_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        buffer: torch.Tensor,
        position: int,
        length: int,
    ) -> torch.Tensor:
        size, heads, kv_heads = self.head_size, self._heads, self._kv_heads
        qkv = self._qkv(self._before(x)).view(heads + 2 * kv_heads, size)
        rotated = qkv[: heads + kv_heads]
        if self._q_norm is not None and self._k_norm is not None:
            rotated[:heads].copy_(self._q_norm(qkv[:heads]))
            rotated[heads:].copy_(self._k_norm(qkv[heads : heads + kv_heads]))
        if self._rotates:
            swapped = rotated.view(heads + kv_heads, 2, size // 2).flip(1).view(heads + kv_heads, size)
            rotated.mul_(cos).add_(swapped.mul_(sin))
        buffer[0].select(1, position).copy_(qkv[heads:])
        seen = buffer.narrow(2, 0, length)
        attended = functional.scaled_dot_product_attention(
            qkv[:heads].view(1, heads, 1, size),
            seen[:, :kv_heads],
            seen[:, kv_heads:],
            scale=self._scaling,
            enable_gqa=heads != kv_heads,
        )
        x = x + self._out(attended.view(1, heads * size))
        gate_up = self._gate_up(self._between(x))
        return x + self._down(functional.silu(gate_up[:, : self._inner]).mul_(gate_up[:, self._inner :]))
