"""Which models Nexus runs, and reading their config.json, which is as untrusted as anything else that comes with a model.

Importing this module is cheap; reading a config imports transformers, which takes a second or two once per process.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nexus.core.errors import ModelFormatError
from nexus.core.manifest import CAUSAL, ENCODER, LAYERS_MAX

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_BYTES_MAX = 1 << 20

# transformers' model_type -> kind. A type is listed once its shards were tested to be the whole model, bit for bit.
KINDS = {
    "bert": ENCODER,
    "gemma": CAUSAL,
    "gemma2": CAUSAL,
    "gemma3_text": CAUSAL,
    "gpt2": CAUSAL,
    "gpt_neox": CAUSAL,
    "llama": CAUSAL,
    "mistral": CAUSAL,
    "olmo2": CAUSAL,
    "phi3": CAUSAL,
    "qwen2": CAUSAL,
    "qwen3": CAUSAL,
    "smollm3": CAUSAL,
}
# Settings that make transformers load code or kernels from elsewhere.
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
# Settings of how to run, not of what the model is: this node decides them, not the model's author.
_RUNTIME_KEYS = ("attn_implementation", "experts_implementation", "dtype", "torch_dtype", "use_cache", "gradient_checkpointing")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
# Those whose values depend on the position alone, and "dynamic". "longrope" is missing: past its first length it wants the
# whole session computed again.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "dynamic"})

# While it loads a model, transformers puts empty functions in place of its own (`no_tie_weights`), and then puts back what it
# found: two threads at once can leave the process with the empty ones, and no head is tied to its embedding any more.
ONE_AT_A_TIME = threading.Lock()


def read_json(path: Path, size_max: int = CONFIG_BYTES_MAX) -> dict[str, object]:
    """The JSON object in a small file. Raises ModelFormatError."""
    try:
        with path.open("rb") as file:
            raw = file.read(size_max + 1)
    except OSError as error:
        raise ModelFormatError(f"{path.name} cannot be read: {error.strerror}", "Check the file and its permissions") from error
    if len(raw) > size_max:
        raise ModelFormatError(f"{path.name} is larger than {size_max} bytes", "Is this the right file?")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path.name} is not JSON", "Download the model again") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path.name} is not a JSON object", "Download the model again")
    return value


@dataclass(frozen=True, slots=True)
class Config:
    """A checked config.json. `settings` is transformers' own object, made without any code of the model's."""

    kind: str
    settings: PreTrainedConfig

    @property
    def layers(self) -> int:
        return int(self.settings.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.settings.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.settings.vocab_size)

    @property
    def context(self) -> int:
        """Positions that the model was made for."""
        return int(self.settings.max_position_embeddings)

    @property
    def tied(self) -> bool:
        return self.kind == CAUSAL and bool(self.settings.tie_word_embeddings)

    @property
    def rope_types(self) -> frozenset[str]:
        """The kinds of rotary embedding in use; a model may have one per type of layer."""
        parameters = getattr(self.settings, "rope_parameters", None) or {}
        per_type = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
        return frozenset(str(entry["rope_type"]) for entry in per_type if entry.get("rope_type"))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache per token and layer in float32."""
        if self.kind == ENCODER:
            return 0
        heads = int(self.settings.num_attention_heads)
        kv_heads = int(getattr(self.settings, "num_key_value_heads", None) or heads)
        head_size = int(getattr(self.settings, "head_dim", None) or self.hidden_size // heads)
        return 2 * 4 * kv_heads * head_size


def read_config(path: Path) -> Config:
    """Check and read config.json. Raises ModelFormatError for code of the model's own, unknown types and impossible shapes."""
    raw = read_json(path)
    for key in _CODE_KEYS:
        if raw.get(key):
            raise ModelFormatError(
                f"config.json asks to run code that comes with the model ({key})",
                "Nexus never runs a model's own code; use a model that transformers supports by itself",
            )
    if raw.get("quantization_config"):
        raise ModelFormatError("the weights are quantised", "Use the model's float16, bfloat16 or float32 version")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in KINDS:
        raise ModelFormatError(f"models of type {model_type!r} are not supported", f"Supported types: {', '.join(KINDS)}")
    if (raw.get("is_decoder") and KINDS[model_type] == ENCODER) or raw.get("add_cross_attention") or raw.get("is_encoder_decoder"):
        raise ModelFormatError("the model is half of an encoder-decoder pair", "Use a decoder-only model or a sentence encoder")
    return _build(model_type, {key: value for key, value in raw.items() if not key.startswith("_") and key not in _RUNTIME_KEYS})


def _build(model_type: str, raw: dict[str, object]) -> Config:
    from transformers import CONFIG_MAPPING

    for key in _LAYER_COUNT_KEYS:
        # Before transformers makes lists of that length.
        if isinstance(count := raw.get(key), int) and count > LAYERS_MAX:
            raise _impossible_shape(f"{count} layers")
    try:
        settings = CONFIG_MAPPING[model_type].from_dict(raw)
        config = Config(KINDS[model_type], settings)
        shape = (config.layers, config.hidden_size, config.vocab_size, config.context, int(settings.num_attention_heads))
        config.rope_types  # noqa: B018
    # transformers validates with errors of many classes, some of them not exported; all of them mean the same here.
    except Exception as error:
        raise ModelFormatError(
            f"config.json does not describe a {model_type} model: {error}", "Download the model again"
        ) from error
    if not all(0 < value <= limit for value, limit in zip(shape, (LAYERS_MAX, 2**20, 2**24, 2**32, 2**16), strict=True)):
        raise _impossible_shape(shape)
    if unknown := config.rope_types - _ROPE_TYPES:
        raise ModelFormatError(f"rotary embeddings of type {', '.join(sorted(unknown))} are not supported", "Use another model")
    return config


def _impossible_shape(shape: object) -> ModelFormatError:
    return ModelFormatError(
        f"config.json gives an impossible shape (layers, width, vocabulary, context, heads: {shape})", "Download the model again"
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a model's parts are. `layers`: dotted name of the list of layers in the whole model, e.g. "model.layers".

    What a model registers before its layers runs before them and belongs to the embedding piece; what follows, to the head.
    `shapes`: of every stored tensor. `tied_names`: weights that are not stored, being the same as one of `tied_sources`.
    """

    layers: str
    before: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    tied_names: frozenset[str]
    tied_sources: frozenset[str]

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors, by their names inside the layer."""
        prefix = f"{self.layers}.{index}."
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._outside().items() if self._is_before(name)}

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._outside().items() if not self._is_before(name)}

    def _outside(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if not name.startswith(f"{self.layers}.")}

    def _is_before(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self.before)


def model_class(config: Config) -> type[PreTrainedModel]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if config.kind == CAUSAL else MODEL_MAPPING
    return cast("type[PreTrainedModel]", mapping[type(config.settings)])


def model_arguments(config: Config) -> dict[str, bool]:
    """Arguments of the class beside the config: sentence encoders pool the last layer themselves."""
    return {} if config.kind == CAUSAL else {"add_pooling_layer": False}


def find_layers(model: PreTrainedModel, count: int) -> tuple[nn.Module, str]:
    """The module that holds the list of `count` layers, and the list's name in it."""
    from torch import nn

    for module in model.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ModelFormatError(f"{type(model).__name__} has no list of {count} layers")


def layout_of(config: Config) -> Layout:
    """The layout of the whole model, from a skeleton without memory. Raises ModelFormatError."""
    import copy

    import torch

    cls = model_class(config)
    try:
        with ONE_AT_A_TIME, torch.device("meta"):
            model = cls(copy.deepcopy(config.settings), **model_arguments(config))
    # The config is the model author's: whatever its values break in transformers' constructors is a bad model.
    except Exception as error:
        raise ModelFormatError(f"transformers cannot build this {cls.__name__}: {error}", "Check config.json") from error
    holder, attribute = find_layers(model, config.layers)
    layers = holder.get_submodule(attribute)
    path = next(name for name, module in model.named_modules() if module is layers)
    base_path = next(name for name, module in model.named_modules() if module is model.base_model)
    before = []
    for name, child in model.base_model.named_children():
        if child is layers or child is holder:
            break
        before.append(f"{base_path}.{name}".lstrip("."))
    # A tied head is the embedding under a second name: it is stored once.
    tied = dict(model.all_tied_weights_keys) if config.tied else {}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    return Layout(path, frozenset(before), shapes, frozenset(tied), frozenset(tied.values()))
