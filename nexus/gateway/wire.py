"""JSON of the control API: one codec for the dataclasses of `nexus.node.api` and `nexus.node.memory.api`, so that the CLI reads
what the gateway writes.

Bytes are lowercase hex, tuples are arrays, a proof bundle is base64 of its one byte form. A reader ignores keys it does not know
(an older client keeps working with a newer daemon); a manifest also says its root, which the reader recomputes.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

from nexus.core.errors import MalformedError
from nexus.core.fidelity import Fidelity
from nexus.core.manifest import Manifest
from nexus.node.api import AuditView, Embedding, Finished, ModelView, Planned, StreamItem, Token
from nexus.node.fragments_api import DrainView, ServingView, VersionView
from nexus.node.memory.api import AddedView, ExportPart, ReindexView, VerifyView
from nexus.node.progress import Notice, Progress
from nexus.proof.bundle import Bundle

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
T = TypeVar("T")

# The last line of a stream that fails half way.
ERROR_EVENT = "error"
EVENTS: dict[str, type] = {
    "planned": Planned,
    "progress": Progress,
    "notice": Notice,
    "token": Token,
    "embedding": Embedding,
    "finished": Finished,
    "model": ModelView,
    "fidelity": Fidelity,
    "audit": AuditView,
    "added": AddedView,
    "verified": VerifyView,
    "reindexed": ReindexView,
    "exported": ExportPart,
    "serving": ServingView,
    "version": VersionView,
    "drain": DrainView,
}
_EVENT_NAMES = {kind: name for name, kind in EVENTS.items()}


def to_json(value: object) -> Json:
    """What `json.dumps` takes, from a dataclass, tuple, bytes, Bundle or plain value."""
    if isinstance(value, Bundle):
        return base64.b64encode(value.to_bytes()).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return fields | {"root": value.root.hex()} if isinstance(value, Manifest) else fields
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


@cache
def _hints(kind: type) -> dict[str, Any]:
    # Without the names of the class itself: in one with a field that is called "bytes", this word would not mean the type.
    return typing.get_type_hints(kind, localns={})


def from_json(kind: type[T], value: Json) -> T:
    """The `kind` that `to_json` made `value` of. Raises MalformedError that names the field."""
    return typing.cast(T, _read(kind, value, kind.__name__))


def _read(kind: Any, value: Json, place: str) -> object:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), value, place)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (option for option in typing.get_args(kind) if option is not type(None))
        return None if value is None else _read(inner, value, place)
    if kind is Bundle:
        return _read_bundle(value, place)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise MalformedError(f"{place}: expected an object")
        hints = _hints(typing.cast(type, kind))
        missing = [field.name for field in dataclasses.fields(kind) if field.name not in value]
        if missing:
            raise MalformedError(f"{place}: {missing[0]} is missing")
        return typing.cast(Any, kind)(
            **{
                field.name: _read(hints[field.name], value[field.name], f"{place}.{field.name}")
                for field in dataclasses.fields(kind)
            }
        )
    if kind is bytes:
        try:
            return bytes.fromhex(value) if isinstance(value, str) else _refuse("hex", place)
        except ValueError as error:
            raise MalformedError(f"{place}: expected hex") from error
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    # type(), not isinstance: true is not the number 1.
    if type(value) is kind:
        return value
    return _refuse(kind.__name__, place)


def _read_tuple(items: tuple[Any, ...], value: Json, place: str) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _refuse("array", place)
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_read(items[0], entry, f"{place}[{index}]") for index, entry in enumerate(value))
    if len(value) != len(items):
        return _refuse(f"array of {len(items)}", place)
    return tuple(_read(item, entry, f"{place}[{index}]") for index, (item, entry) in enumerate(zip(items, value, strict=True)))


def _read_bundle(value: Json, place: str) -> Bundle:
    if not isinstance(value, str):
        raise MalformedError(f"{place}: expected base64")
    try:
        return Bundle.from_bytes(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError) as error:
        raise MalformedError(f"{place}: expected base64") from error


def _refuse(expected: str, place: str) -> typing.NoReturn:
    raise MalformedError(f"{place}: expected {expected}")


def event_to_json(event: StreamItem) -> dict[str, Json]:
    """One line of a stream: the event's name beside its fields."""
    fields = to_json(event)
    assert isinstance(fields, dict)
    return {"event": _EVENT_NAMES[type(event)], **fields}


def event_from_json(value: Json) -> StreamItem:
    """Raises MalformedError, also for events of a kind not known here."""
    name = value.get("event") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or name not in EVENTS:
        raise MalformedError(f"unknown event {name!r}")
    return typing.cast("StreamItem", from_json(EVENTS[name], value))
