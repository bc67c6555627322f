"""The KV cache of one session in one stage: preallocated buffers that grow by half, behind transformers' cache interface.

transformers' DynamicCache concatenates a new tensor per layer and step. Here a step writes into place and hands out views; the
values, their order and what each layer sees are the same, and so are the results, bit for bit (tested on every architecture).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nexus.core.errors import ModelFormatError

_CAPACITY_MIN = 64


class KVLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in one buffer, [1, 2 * heads, capacity, head size], keys first; `length` positions are filled.

    `window`: how many positions a sliding layer looks back, itself included. Older ones stay in the buffer and are not shown.
    """

    def __init__(self, window: int | None, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.sliding_window = window
        self.length = 0
        self._context = context
        self._buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def _room(self, length: int, like: torch.Tensor, heads: int) -> torch.Tensor:
        """The buffer, with space for at least `length` positions of `heads` keys and values together, of the form of `like`."""
        old = self._buffer
        capacity = 0 if old is None else old.shape[2]
        if old is None or length > capacity:
            # Beyond the context nothing is ever needed; growing by half keeps the cost of copying per token constant.
            wanted = max(length, min(self._context, max(_CAPACITY_MIN, capacity + capacity // 2)))
            self._buffer = like.new_empty((1, heads, wanted, like.shape[3]))
            if old is not None:
                self._buffer[:, :, : self.length] = old[:, :, : self.length]
            return self._buffer
        return old

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[2]
        heads = key_states.shape[1]
        buffer = self._room(end, key_states, 2 * heads)
        buffer[:, :heads, self.length : end] = key_states
        buffer[:, heads:, self.length : end] = value_states
        start = self._first_seen()
        self.length = end
        return buffer[:, :heads, start:end], buffer[:, heads:, start:end]

    def buffer(self, length: int) -> torch.Tensor:
        """The buffer, with space for `length` positions. The layer must have been filled before, so that its form is known."""
        if self._buffer is None:
            raise RuntimeError("an empty cache layer has no form yet")
        return self._room(length, self._buffer, self._buffer.shape[1])

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

    def buffers(self, length: int) -> list[torch.Tensor]:
        """The buffer of each layer (see `KVLayer`), with space for `length` positions."""
        return [layer.buffer(length) for layer in self._kv]


class StepCache(Cache):
    """A cache over buffers from `KVCache.buffers`, of which each layer fills one position: what a decode step is traced with."""

    def __init__(self, buffers: Sequence[torch.Tensor], position: torch.Tensor, length: int) -> None:
        """`position` []: the one to fill, which is data, as opposed to `length`, which a recording takes for a constant."""
        super().__init__(layers=[KVLayer(None, length) for _ in buffers])
        self.length = length
        self._buffers = buffers
        self._position = position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._buffers[layer_idx].chunk(2, 1)
        # In a recording a tensor as an index is data, a number would be a constant.
        at, seen = cast(int, self._position), cast(int, self._position + 1)
        keys.select(2, at).copy_(key_states[:, :, 0])
        values.select(2, at).copy_(value_states[:, :, 0])
        return keys.narrow(2, 0, seen), values.narrow(2, 0, seen)

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
