"""The KV cache of one session in one stage: preallocated buffers that grow by half, behind transformers' cache interface.

transformers' DynamicCache concatenates a new tensor per layer and step. Here a step writes into place and hands out views; the
values, their order and what each layer sees are the same, and so are the results, bit for bit (tested on every architecture).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nexus.core.errors import ModelFormatError

_CAPACITY_MIN = 64


class KVLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each [1, heads, capacity, head size]; the first `length` positions are filled.

    `window`: how many positions a sliding layer looks back, itself included. Older ones stay in the buffer and are not shown.
    """

    def __init__(self, window: int | None, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.sliding_window = window
        self.length = 0
        self._context = context
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def _room(self, length: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for at least `length` positions of the form of these keys and values."""
        capacity = self._buffers[0].shape[-2] if self._buffers else 0
        if self._buffers is None or length > capacity:
            # Beyond the context nothing is ever needed; growing by half keeps the cost of copying per token constant.
            wanted = max(length, min(self._context, max(_CAPACITY_MIN, capacity + capacity // 2)))
            old = self._buffers or (None, None)
            self._buffers = self._grown(old[0], keys, wanted), self._grown(old[1], values, wanted)
        return self._buffers

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor, capacity: int) -> torch.Tensor:
        new = like.new_empty((*like.shape[:-2], capacity, like.shape[-1]))
        if old is not None:
            new[..., : self.length, :] = old[..., : self.length, :]
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[-2]
        keys, values = self._room(end, key_states, value_states)
        keys[..., self.length : end, :] = key_states
        values[..., self.length : end, :] = value_states
        start = self._first_seen()
        self.length = end
        return keys[..., start:end, :], values[..., start:end, :]

    def views(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [0, length). The layer must have been filled before, so that their form is known."""
        if self._buffers is None:
            raise RuntimeError("an empty cache layer has no form yet")
        keys, values = self._room(length, *self._buffers)
        return keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def _first_seen(self) -> int:
        return 0 if self.sliding_window is None else max(0, self.length - self.sliding_window + 1)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        start = self._first_seen()
        return self.length - start + query_length, start


class KVCache(Cache):
    """The layers of one session in one stage. All of them are always filled to the same length."""

    def __init__(self, windows: Sequence[int | None], context: int) -> None:
        self._kv = [KVLayer(window, context) for window in windows]
        super().__init__(layers=list(self._kv))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._kv)

    def set_length(self, length: int) -> None:
        """Fill level of every layer. A step that failed half-way is undone by setting the old length."""
        for layer in self._kv:
            layer.length = length

    def views(self, length: int) -> list[torch.Tensor]:
        """Keys and values of each layer, one after the other, for positions [0, length)."""
        return [view for layer in self._kv for view in layer.views(length)]


class ViewCache(Cache):
    """A cache over views from `KVCache.views`, whose last position each layer fills: what a decode step is traced with."""

    def __init__(self, views: Sequence[torch.Tensor], length: int) -> None:
        super().__init__(layers=[KVLayer(None, length) for _ in range(len(views) // 2)])
        self.views = views
        self.length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.views[2 * layer_idx], self.views[2 * layer_idx + 1]
        keys[:, :, -1:].copy_(key_states)
        values[:, :, -1:].copy_(value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0


def windows_of(settings: Any) -> list[int | None]:
    """How far back each layer looks, None for all the way, as transformers' own cache reads it from the config."""
    windows: list[int | None] = []
    for layer in DynamicCache(config=settings).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelFormatError(f"layers with a {type(layer).__name__} are not supported", "Use a model with plain attention")
        windows.append(getattr(layer, "sliding_window", None))
    return windows
