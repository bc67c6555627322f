"""Bodies and queries of requests about the memory, checked for size, form and meaning before the node sees them. Raises UsageError.

What a request leaves out, or gives as null, has the default of its dataclass in `nexus.node.memory.api`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from nexus.core.errors import UsageError
from nexus.gateway.fields import (
    parse_object,
    read_boolean,
    read_integer,
    read_name,
    read_number,
    read_optional_integer,
    read_text,
    read_texts,
    shown,
)
from nexus.gateway.wire import Json
from nexus.memory.block import (
    DIMENSION_MAX,
    LANG_BYTES_MAX,
    LINKS_MAX,
    MODEL_BYTES_MAX,
    TAG_BYTES_MAX,
    TAGS_MAX,
    TIME_MAX_MS,
    TITLE_BYTES_MAX,
)
from nexus.memory.collection import MODE_NAMES, WRITERS_MAX, check_name, split_reference
from nexus.node.memory.api import LIST_MAX, AddRequest, Filters, PruneRequest, SearchRequest

K_MAX = 1000
LIST_DEFAULT = 50
QUESTION_CHARS_MAX = 32 * 1024
DEADLINE_MIN_S, DEADLINE_MAX_S = 0.05, 600.0
# A hundred years.
SPAN_MAX_S = 100 * 366 * 86_400.0
# Half way around the Earth.
NEAR_MAX_KM = 20_040.0
COLLECTIONS_MAX = AUTHORS_MAX = 64
# A directory may be a model's name.
MODEL_CHARS_MAX = 4096
REFERENCE_CHARS_MAX = 192
COMPONENT_MAX = 1e30
_BLOCK = re.compile("[a-z2-7]{1,59}")
_FINGERPRINT = re.compile("[0-9a-f]{64}")
_MODES = tuple(MODE_NAMES.values())


@dataclass(frozen=True, slots=True)
class Grant:
    """`write`: to write, otherwise only to read. `revoke`: take it away."""

    peer: str
    write: bool
    revoke: bool


@dataclass(frozen=True, slots=True)
class NewCollection:
    name: str
    mode: str
    writers: tuple[str, ...]


def parse_add(body: bytes) -> AddRequest:
    given = _given(body, *(option.name for option in fields(AddRequest)))
    default = AddRequest("")
    text = read_text(given.get("text", ""), "text")
    vector = _vector(given)
    if "\0" in text:
        raise UsageError("the text has a NUL character in it", "That is no text; convert it first")
    if not text.strip() and not vector:
        raise UsageError("the text is empty", "Send at least one word, or a vector")
    return AddRequest(
        text=text,
        title=_label(given, "title", TITLE_BYTES_MAX),
        collection=_collection(given["collection"], "collection") if "collection" in given else default.collection,
        tags=_tags(given),
        lang=_label(given, "lang", LANG_BYTES_MAX),
        ttl_s=_optional_span(given, "ttl_s"),
        links=tuple(check_block(link) for link in _texts(given, "links", LINKS_MAX, 59)),
        replaces=check_block(read_text(given["replaces"], "replaces")) if "replaces" in given else None,
        vector=vector,
        vector_model=_label(given, "vector_model", MODEL_BYTES_MAX),
        vector_fingerprint=read_text(given.get("vector_fingerprint", ""), "vector_fingerprint"),
    )


def parse_search(body: bytes) -> SearchRequest:
    given = _given(body, *(option.name for option in fields(SearchRequest)))
    text = read_text(given.get("text", ""), "text")
    vector = _vector(given)
    if not (text.strip() or vector) or len(text) > QUESTION_CHARS_MAX:
        raise UsageError(
            f"the question has {len(text)} characters" if text.strip() else "the question is empty",
            f"Send 1 to {QUESTION_CHARS_MAX} characters",
        )
    filters = given.get("filters", {})
    if not isinstance(filters, Mapping):
        raise UsageError(f"filters is {shown(filters)}", 'Give an object such as {"tags": ["draft"]}')
    default = SearchRequest(text)
    return SearchRequest(
        text=text,
        filters=read_filters(filters),
        k=read_integer(given, "k", 1, K_MAX, default.k),
        hybrid=read_boolean(given, "hybrid", default.hybrid),
        model=read_name(given, "model", MODEL_CHARS_MAX) if "model" in given else default.model,
        network=read_boolean(given, "network", default.network),
        deadline_s=read_number(given, "deadline_s", DEADLINE_MIN_S, DEADLINE_MAX_S, default.deadline_s),
        vector=vector,
        vector_model=_label(given, "vector_model", MODEL_BYTES_MAX),
        vector_fingerprint=read_text(given.get("vector_fingerprint", ""), "vector_fingerprint"),
    )


def read_filters(value: Mapping[str, Json]) -> Filters:
    known = [option.name for option in fields(Filters)]
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise UsageError(f"unknown filter {shown(unknown[0])}", f"Known: {', '.join(known)}")
    given = {key: entry for key, entry in value.items() if entry is not None}
    since_ms, until_ms = (read_optional_integer(given, key, 0, TIME_MAX_MS) for key in ("since_ms", "until_ms"))
    if since_ms is not None and until_ms is not None and since_ms >= until_ms:
        raise UsageError("since_ms is not before until_ms", "Nothing was made in no time: give the earlier one as since_ms")
    collections = _texts(given, "collections", COLLECTIONS_MAX, REFERENCE_CHARS_MAX)
    return Filters(
        collections=tuple(_collection(name, "one of collections") for name in collections),
        tags=_tags(given),
        authors=_names(given, "authors", AUTHORS_MAX),
        lang=_label(given, "lang", LANG_BYTES_MAX),
        since_ms=since_ms,
        until_ms=until_ms,
        near=_place(given["near"]) if "near" in given else None,
        near_km=read_number(given, "near_km", 0.0, NEAR_MAX_KM, Filters().near_km, above_least=True),
    )


def parse_list_query(query: Iterable[tuple[str, str]]) -> tuple[Filters, int]:
    """Filters and a limit. `collections`, `tags` and `authors` may be given several times; `near` is LATITUDE,LONGITUDE."""
    value: dict[str, Json] = {}
    several: dict[str, list[str]] = {}
    for key, entry in query:
        if key in ("collections", "tags", "authors"):
            several.setdefault(key, []).append(entry)
            continue
        if key in value:
            raise UsageError(f"{shown(key)} is given twice", "Give it once")
        if key in ("since_ms", "until_ms", "limit"):
            value[key] = _number_in_query(key, entry, whole=True)
        elif key == "near_km":
            value[key] = _number_in_query(key, entry)
        elif key == "near":
            value[key] = [_number_in_query(key, part) for part in entry.split(",")]
        else:
            value[key] = entry
    limit = read_integer(value, "limit", 1, LIST_MAX, LIST_DEFAULT)
    return read_filters({key: entry for key, entry in value.items() if key != "limit"} | several), limit


def parse_network_query(query: Iterable[tuple[str, str]]) -> bool:
    """Whether to look at peers too: `network=true`; not by default."""
    entries = list(query)
    if not entries:
        return False
    if len(entries) > 1 or entries[0][0] != "network" or entries[0][1] not in ("true", "false"):
        raise UsageError(f"the query is {shown(entries[0])}", "Give network=true or network=false, or nothing")
    return entries[0][1] == "true"


def parse_block(body: bytes) -> str:
    return check_block(read_text(parse_object(body, "block").get("block"), "block"))


def parse_pin(body: bytes) -> tuple[str, bool]:
    value = parse_object(body, "block", "pinned")
    return check_block(read_text(value.get("block"), "block")), read_boolean(value, "pinned", True)


def parse_verify(body: bytes) -> str | None:
    """The block to verify, or None for all."""
    given = _given(body, "block")
    return check_block(read_text(given["block"], "block")) if "block" in given else None


def parse_prune(body: bytes) -> PruneRequest:
    given = _given(body, *(option.name for option in fields(PruneRequest)))
    older_than_s = read_number(given, "older_than_s", 0.0, SPAN_MAX_S, 0.0) if "older_than_s" in given else None
    bytes_max = read_optional_integer(given, "bytes_max", 0, 2**60)
    if older_than_s is None and bytes_max is None:
        raise UsageError("nothing says what to prune", "Give older_than_s, bytes_max, or both")
    return PruneRequest(older_than_s, bytes_max, read_boolean(given, "dry_run", PruneRequest().dry_run))


def parse_export(body: bytes) -> tuple[str, ...]:
    """The collections to export; none for all."""
    names = _texts(_given(body, "collections"), "collections", COLLECTIONS_MAX, REFERENCE_CHARS_MAX)
    return tuple(_collection(name, "one of collections") for name in names)


def parse_reindex(body: bytes) -> tuple[str, str | None]:
    """The model, and the collection or None for all."""
    given = _given(body, "model", "collection")
    collection = _collection(given["collection"], "collection") if "collection" in given else None
    return read_name(given, "model", MODEL_CHARS_MAX), collection


def parse_new_collection(body: bytes) -> NewCollection:
    given = _given(body, "name", "mode", "writers")
    mode, writers = given.get("mode"), _names(given, "writers", WRITERS_MAX)
    if not isinstance(mode, str) or mode not in _MODES:
        raise UsageError(f"mode is {shown(mode)}", f"Give one of {', '.join(_MODES)}")
    if writers and mode == "public":
        raise UsageError("everybody writes in a public collection", "Leave writers out, or give the mode writers")
    return NewCollection(check_name(read_text(given.get("name"), "name")), mode, writers)


def parse_grant(body: bytes) -> Grant:
    given = _given(body, "peer", "write", "revoke")
    return Grant(read_name(given, "peer"), read_boolean(given, "write", False), read_boolean(given, "revoke", False))


def parse_subscribe(body: bytes) -> str | None:
    """The peer to get the collection from, or None for any."""
    given = _given(body, "peer")
    return read_name(given, "peer") if "peer" in given else None


def parse_sync(body: bytes) -> str | None:
    """The collection to exchange, or None for all."""
    given = _given(body, "collection")
    return _collection(given["collection"], "collection") if "collection" in given else None


def parse_nothing(body: bytes) -> None:
    """An empty object."""
    parse_object(body)


def check_block(name: str) -> str:
    """A block as a user names it: its id, or a start of one."""
    if _BLOCK.fullmatch(name) is None or not "bafkrei".startswith(name[: len("bafkrei")]):
        raise UsageError(
            f"{shown(name)} is not the id of a block, or the start of one", "It looks like bafkrei...: `nexus memory ls`"
        )
    return name


def check_collection(name: str) -> str:
    """A collection as a user names it: NAME or NAME@PEER."""
    split_reference(name[: REFERENCE_CHARS_MAX + 1])
    if len(name) > REFERENCE_CHARS_MAX:
        raise UsageError(f"{shown(name)} is too long for a collection", "Write NAME, or NAME@ and the peer id of its owner")
    return name


def _given(body: bytes, *known: str) -> dict[str, Json]:
    return {key: entry for key, entry in parse_object(body, *known).items() if entry is not None}


def _collection(value: Json, key: str) -> str:
    return check_collection(read_text(value, key))


def _texts(given: Mapping[str, Json], key: str, count_max: int, chars_max: int) -> tuple[str, ...]:
    return read_texts(given, key, count_max, chars_max) if key in given else ()


def _names(given: Mapping[str, Json], key: str, count_max: int) -> tuple[str, ...]:
    return tuple(read_name({key: name}, key) for name in _texts(given, key, count_max, 1024))


def _label(given: Mapping[str, Json], key: str, bytes_max: int) -> str:
    """A short text that may be empty."""
    label = read_text(given.get(key, ""), key)
    if len(label.encode("utf-8")) > bytes_max or not label.isprintable():
        raise UsageError(f"{key} is {shown(label)}", f"Give printable characters, at most {bytes_max} bytes of them in UTF-8")
    return label


def _tags(given: Mapping[str, Json]) -> tuple[str, ...]:
    return tuple(_label({"one of tags": tag}, "one of tags", TAG_BYTES_MAX) for tag in _texts(given, "tags", TAGS_MAX, 1024))


def _optional_span(given: Mapping[str, Json], key: str) -> float | None:
    return read_number(given, key, 0.0, SPAN_MAX_S, 1.0, above_least=True) if key in given else None


def _place(value: Json) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UsageError(f"near is {shown(value)}", "Give latitude and longitude in degrees")
    latitude, longitude = (
        read_number({"near": degrees}, "near", -most, most, 0.0) for degrees, most in zip(value, (90.0, 180.0), strict=True)
    )
    return latitude, longitude


def _vector(given: Mapping[str, Json]) -> tuple[float, ...]:
    together = [key in given for key in ("vector", "vector_model", "vector_fingerprint")]
    if any(together) != all(together):
        raise UsageError(
            "a vector is given without its model or fingerprint, or these without a vector",
            "Give vector, vector_model and vector_fingerprint together",
        )
    if not any(together):
        return ()
    entries = given["vector"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= DIMENSION_MAX:
        raise UsageError("vector is not a list of numbers", f"Give 1 to {DIMENSION_MAX} of them")
    vector = tuple(read_number({"one of vector": entry}, "one of vector", -COMPONENT_MAX, COMPONENT_MAX, 0.0) for entry in entries)
    if not any(vector):
        raise UsageError("the vector is zero", "It has no direction, so nothing can be near it")
    if not given["vector_model"]:
        raise UsageError("vector_model is empty", "Say which model made the vector")
    if _FINGERPRINT.fullmatch(read_text(given["vector_fingerprint"], "vector_fingerprint")) is None:
        raise UsageError(
            f"vector_fingerprint is {shown(given['vector_fingerprint'])}", "Give 64 hex digits, the same for all vectors of a model"
        )
    return vector


def _number_in_query(key: str, entry: str, *, whole: bool = False) -> int | float:
    if re.fullmatch(r"-?[0-9]{1,17}" if whole else r"-?[0-9]{1,9}(\.[0-9]{1,15})?", entry) is None:
        raise UsageError(f"{key} is {shown(entry)}", f"Give a {'whole ' if whole else ''}number, in digits")
    return int(entry) if whole else float(entry)
