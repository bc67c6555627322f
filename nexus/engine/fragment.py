"""A contiguous run of a model's layers, built through transformers' own class for the model, and its forward pass on tensors.

There is no code per architecture: a subclass of the model's class builds the whole skeleton without memory, keeps the layers asked
for, and puts pass-through modules where the embedding, the last norm or the head belong to another stage. The model's own forward
then computes exactly its share of the whole model's operations, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL
from nexus.engine.architecture import ONE_AT_A_TIME, Config, find_layers, model_arguments, model_class
from nexus.engine.decoder_step import DecoderStep
from nexus.engine.kv import KVCache, StepCache, windows_of

# transformers writes progress bars and advice to stderr, which belongs to the daemon's log.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

_CHECK_PROMPT = 5
_CHECK_STEPS = 3


class _Given(nn.Module):
    """Stands for an embedding that an earlier stage has done: hands on what it is given."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return inputs_embeds


class _Nothing(nn.Module):
    """Stands for an added position embedding that an earlier stage has added: x + -0.0 is x for every x, bit for bit."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(-0.0)


def _cut(model: PreTrainedModel, config: Config, start: int, end: int) -> None:
    """Reduce `model`, a whole skeleton, to layers [start, end) and what belongs to them."""
    base = model.base_model
    holder, name = find_layers(model, config.layers)
    first, last = start == 0, end == config.layers
    kept = nn.ModuleList(list(getattr(holder, name))[start:end])
    for module in kept.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            module.layer_idx = index - start  # type: ignore[assignment]
    embedding = model.get_input_embeddings()
    children = list(base.named_children())
    at = next(i for i, (_, child) in enumerate(children) if child is holder or child is getattr(holder, name))
    for child_name, child in children[:at]:
        if first or not list(child.parameters()) or (child is embedding and last and config.tied):
            continue
        setattr(base, child_name, _Nothing() if isinstance(child, nn.Embedding) and child is not embedding else _Given())
    for child_name, child in children[at + 1 :]:
        if not last and list(child.parameters()):
            setattr(base, child_name, nn.Identity())
    setattr(holder, name, kept)
    if not last and base is not model:
        for child_name, child in list(model.named_children()):
            if child is not base:
                setattr(model, child_name, nn.Identity())
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
    for settings in _settings_of(model, base):
        settings.num_hidden_layers = end - start
        if getattr(settings, "layer_types", None):
            settings.layer_types = list(settings.layer_types)[start:end]


def _settings_of(*models: Any) -> list[Any]:
    """Their configs, each object once."""
    return list({id(model.config): model.config for model in models}.values())


def _fragment_class(config: Config, start: int, end: int) -> type[PreTrainedModel]:
    whole = model_class(config)

    def build(self: PreTrainedModel, settings: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, settings, *args, **kwargs)
        _cut(self, config, start, end)

    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})


class Fragment:
    """Layers [start, end) ready to compute. Not bound to sessions: the cache is handed in with every call."""

    def __init__(
        self,
        config: Config,
        start: int,
        end: int,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        decodes: bool = True,
    ) -> None:
        """`tensors`: every weight of the fragment by its name in the whole model, but layers counted from `start`. `decodes`:
        whether it will be given tokens one by one, for which there is a faster way, prepared here.

        Raises ModelFormatError if transformers finds any missing, superfluous or of another shape.
        """
        import copy

        self.first, self.last = start == 0, end == config.layers
        self.causal = config.kind == CAUSAL
        self.context = config.context
        try:
            loader: Any = _fragment_class(config, start, end)
            with ONE_AT_A_TIME:
                model, info = loader.from_pretrained(
                    None,
                    config=copy.deepcopy(config.settings),
                    state_dict=dict(tensors),
                    dtype=dtype,
                    output_loading_info=True,
                    **model_arguments(config),
                )
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(f"transformers cannot load layers {start} to {end}: {error}", "Add the model again") from error
        wrong = {key: value for key, value in info.items() if value}
        if wrong:
            raise ModelFormatError(f"the weights of layers {start} to {end} do not fit the config: {wrong}", "Add the model again")
        self.model: Any = model.eval().requires_grad_(False)
        self.dtype = dtype
        self.windows = windows_of(self.model.base_model.config) if self.causal else []
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        # The mask of one token that sees everything. Eager attention adds a mask, SDPA takes none.
        eager = self.model.config._attn_implementation == "eager"
        self._one_token_mask = torch.zeros(1, 1, 1, 1, dtype=dtype) if eager else None
        self._traced: Callable[..., torch.Tensor] | None = None
        self._step: DecoderStep | None = None
        # A recording has no branches, and these take one at some position.
        if decodes and self.causal and "dynamic" not in config.rope_types:
            self._record()

    @property
    def is_traced(self) -> bool:
        """Whether decode steps run as a recorded graph, without Python between the operations."""
        return self._traced is not None

    @property
    def is_fused(self) -> bool:
        """Whether that graph is the one of `DecoderStep`, with fewer operations."""
        return self._step is not None

    def new_cache(self) -> KVCache:
        return KVCache(self.windows, self.context)

    def forward(self, x: torch.Tensor, cache: KVCache | None, position: int) -> torch.Tensor:
        """x: token ids int64 [1, n] in the first fragment, else hidden states [1, n, hidden].

        Returns hidden states [1, n, hidden], or from the last fragment of a causal model the logits [1, 1, vocabulary] of the last
        token. Fills `cache` from `position`.
        """
        if self._traced is not None and cache is not None and x.shape[1] == 1 and 0 < position < self._untraced_from:
            return self._decode(x, cache, position)
        return self._forward(x, cache, position)

    def _forward(self, x: torch.Tensor, cache: KVCache | None, position: int) -> torch.Tensor:
        inputs = {"input_ids" if self.first else "inputs_embeds": x}
        if cache is None:
            return cast(torch.Tensor, self.model(**inputs).last_hidden_state)
        cache.set_length(position)
        positions = torch.arange(position, position + x.shape[1]).unsqueeze(0)
        return self._call(inputs, positions, cache, None)

    def _call(
        self, inputs: dict[str, torch.Tensor], positions: torch.Tensor, cache: Any, mask: torch.Tensor | None
    ) -> torch.Tensor:
        arguments = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "attention_mask": mask, **inputs}
        if self.last:
            return cast(torch.Tensor, self.model(**arguments, logits_to_keep=1).logits)
        return cast(torch.Tensor, self.model.base_model(**arguments).last_hidden_state)

    @property
    def _untraced_from(self) -> int:
        # Where a sliding window is full, transformers' masks change form: those steps take the general way.
        return min((window - 1 for window in self.windows if window is not None), default=self.context)

    def _decode(self, x: torch.Tensor, cache: KVCache, position: int) -> torch.Tensor:
        assert self._traced is not None
        table = x if self._step is None else self._step.table(position)
        # Without the profiling executor: it would recompile for new shapes in the middle of a session.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            out = self._traced(x, torch.tensor(position), table, *cache.buffers(position + 1))
        cache.set_length(position + 1)
        return out

    def _general_step(self, x: torch.Tensor, position: torch.Tensor, table: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
        """One token as transformers computes it. `table` is for the other kind of step."""
        cache = StepCache(buffers, position, _CHECK_PROMPT)
        inputs = {"input_ids" if self.first else "inputs_embeds": x}
        return self._call(inputs, position.view(1, 1), cache, self._one_token_mask)

    @torch.inference_mode()
    def _record(self) -> None:
        """Record the decode step of one token as a graph, the fastest that gives the bits of the general way, if any does.

        At this size most of a step is Python between the operations, which the recording leaves out.
        """
        if self._untraced_from <= _CHECK_PROMPT + _CHECK_STEPS or self.context < _CHECK_PROMPT + _CHECK_STEPS:
            return
        generator = torch.Generator().manual_seed(0)
        xs = [self._example(n, generator) for n in (_CHECK_PROMPT, *(1 for _ in range(_CHECK_STEPS)))]
        wanted, _ = self._run(xs)
        for fused in (True, False):
            try:
                self._step = DecoderStep(self.model, self.first, self.last, self.context) if fused else None
                self._traced = None
                _, cache = self._run(xs[:1])
                self._traced = self._trace(xs[1], cache)
                got, _ = self._run(xs)
            except (RuntimeError, ValueError):
                continue
            if all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
                return
        self._traced = self._step = None

    def _run(self, xs: list[torch.Tensor]) -> tuple[list[torch.Tensor], KVCache]:
        """The outputs of one pass after the other, then the keys and values, as `forward` computes them now; and the cache."""
        cache, position, outputs = self.new_cache(), 0, []
        for x in xs:
            outputs.append(self.forward(x, cache, position))
            position += x.shape[1]
        return outputs + [buffer[:, :, :position] for buffer in cache.buffers(position)], cache

    def _trace(self, x: torch.Tensor, cache: KVCache) -> Callable[..., torch.Tensor]:
        step = self._general_step if self._step is None else self._step.forward
        table = x if self._step is None else self._step.table(_CHECK_PROMPT)
        example = (x, torch.tensor(_CHECK_PROMPT), table, *cache.buffers(_CHECK_PROMPT + 1))
        with warnings.catch_warnings():
            # Tracing warns of sizes that it takes for constants (the check tells whether they are) and that it is deprecated.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(step, example, check_trace=False)  # type: ignore[no-untyped-call]
        torch._C._jit_pass_cse(traced.graph)
        return cast("Callable[..., torch.Tensor]", traced)

    def _example(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        settings = self.model.base_model.config
        if self.first:
            return torch.randint(0, settings.vocab_size, (1, tokens), generator=generator)
        return torch.randn(1, tokens, settings.hidden_size, generator=generator).to(self.dtype)
