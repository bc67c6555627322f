"""What this node alone knows of a model: where it was added from, and how close its exact form came to float when it was measured.

JSON beside the manifest. Nothing depends on it but what a user asks for, and a damaged file counts as none.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

from nexus.core.errors import MalformedError
from nexus.core.fidelity import Fidelity, LayerFidelity
from nexus.core.manifest import LAYERS_MAX

NOTES_BYTES_MAX = 1 << 20
_FIELDS = {field.name: field.type for field in fields(Fidelity) if field.name != "layers"}
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float | None": (float, int, type(None))}


@dataclass(frozen=True, slots=True)
class ModelNotes:
    """`source`: the directory that the model was added from, or the name of a built-in; "" where that is not known."""

    source: str = ""
    fidelity: Fidelity | None = None

    def to_bytes(self) -> bytes:
        return json.dumps({"spec": 1, **asdict(self)}, allow_nan=False, indent=1).encode("ascii") + b"\n"

    @classmethod
    def from_bytes(cls, raw: bytes) -> ModelNotes:
        """Raises MalformedError."""
        if len(raw) > NOTES_BYTES_MAX:
            raise MalformedError("notes of more than a mebibyte")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise MalformedError("not JSON") from error
        source = value.get("source") if isinstance(value, dict) and value.get("spec") == 1 else None
        if not isinstance(source, str):
            raise MalformedError("not notes of a model")
        return cls(source, None if value.get("fidelity") is None else _fidelity(value["fidelity"]))


def _fidelity(value: object) -> Fidelity:
    if not isinstance(value, dict) or value.keys() != _FIELDS.keys() | {"layers"}:
        raise MalformedError("not a fidelity report")
    for name, kind in _FIELDS.items():
        entry = value[name]
        if type(entry) not in _KINDS[str(kind)] or (isinstance(entry, float) and not math.isfinite(entry)):
            raise MalformedError(f"{name} of a fidelity report is {entry!r:.40}")
    layers = value["layers"]
    if not isinstance(layers, list) or not 0 < len(layers) <= LAYERS_MAX + 2 or not all(map(_is_layer, layers)):
        raise MalformedError("layers of a fidelity report are no list of names and errors")
    return Fidelity(**{**value, "layers": tuple(LayerFidelity(layer["name"], layer["error"]) for layer in layers)})


def _is_layer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "error"}
        and isinstance(value["name"], str)
        and isinstance(value["error"], float)
        and math.isfinite(value["error"])
    )
