"""From an encoder's last hidden states to one vector, as the sentence-transformers files beside the model say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from nexus.core.errors import ModelFormatError
from nexus.engine.architecture import CONFIG_BYTES_MAX, read_json

if TYPE_CHECKING:
    import torch

MODULES_FILE = "modules.json"
_LIMITS_FILE = "sentence_bert_config.json"
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FIX = "Supported: a Transformer module, then Pooling by mean or cls, then optionally Normalize"


@dataclass(frozen=True, slots=True)
class Pooling:
    """`mode`: "mean" over all tokens, or "cls", the first. `normalize`: to length 1. `tokens_max`: cut there, 0: not said."""

    mode: str = "mean"
    normalize: bool = False
    tokens_max: int = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [1, tokens, width] -> [width] in float32."""
        import torch

        hidden = hidden[0].float()
        vector = hidden[0] if self.mode == "cls" else hidden.sum(dim=0) / hidden.shape[0]
        return torch.nn.functional.normalize(vector, p=2, dim=0) if self.normalize else vector


def read_modules(path: Path) -> list[tuple[str, str]]:
    """(class, directory) of each module that modules.json lists, in order. Raises ModelFormatError."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(CONFIG_BYTES_MAX).decode("utf-8"))
        return [(str(entry["type"]), str(entry["path"])) for entry in value]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelFormatError(f"{MODULES_FILE} is not a list of modules", "Download the model again") from error


def _modules(path: Path) -> list[tuple[str, str]]:
    """(last part of the class name, directory) of each module, in order."""
    return [(kind.rsplit(".", 1)[-1], directory) for kind, directory in read_modules(path)]


def pooling_config_name(modules: Path) -> str | None:
    """Name of the pooling module's config file, relative to the model, e.g. "1_Pooling/config.json"."""
    for kind, directory in _modules(modules):
        if kind == "Pooling":
            path = PurePosixPath(directory) / "config.json"
            if path.is_absolute() or ".." in path.parts or "\\" in directory or "\0" in directory:
                raise ModelFormatError(f"{MODULES_FILE} names {directory!r}, outside the model", "Download the model again")
            return str(path)
    return None


def read_pooling(files: Mapping[str, Path]) -> Pooling:
    """The pooling of an encoder, from its files by name. Without modules.json: the mean of all tokens. Raises ModelFormatError."""
    modules = files.get(MODULES_FILE)
    if modules is None:
        return Pooling()
    kinds = [kind for kind, _ in _modules(modules)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelFormatError(f"{MODULES_FILE} lists {' -> '.join(kinds)}", _FIX)
    name = pooling_config_name(modules)
    config = read_json(files[name]) if name is not None and name in files else {}
    mode = config.get("pooling_mode")
    if mode is None:
        active = [mode for key, mode in _LEGACY_MODES.items() if config.get(key)]
        mode = " and ".join(active) or "mean"
    if mode not in ("mean", "cls"):
        raise ModelFormatError(f"pooling by {mode!r} is not supported", _FIX)
    limits = read_json(files[_LIMITS_FILE]) if _LIMITS_FILE in files else {}
    tokens_max = limits.get("max_seq_length")
    return Pooling(str(mode), "Normalize" in kinds, tokens_max if type(tokens_max) is int and tokens_max > 0 else 0)
