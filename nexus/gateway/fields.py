"""Fields of a JSON request, checked for type, length and range as they are read. Raises UsageError that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping

from nexus.core.errors import UsageError
from nexus.gateway.wire import Json

BODY_BYTES_MAX = 4 * 1024 * 1024
NAME_CHARS_MAX = 128


def parse_object(body: bytes, *known: str) -> Mapping[str, Json]:
    """A JSON object with no keys but `known`."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError("the request body is not valid UTF-8", "Send JSON in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request body is not JSON: {error}", "Send one JSON object") from error
    if not isinstance(value, dict):
        raise UsageError("the request body is not a JSON object", 'Send an object such as {"model": "nano"}')
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}", f"Known: {', '.join(known)}")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def read_name(value: Mapping[str, Json], key: str, chars_max: int = NAME_CHARS_MAX) -> str:
    name = read_text(value.get(key), key)
    if not 0 < len(name) <= chars_max or not name.isprintable():
        raise UsageError(f"{key} is {shown(name)}", f"Give 1 to {chars_max} printable characters")
    return name


def read_text(value: Json, key: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key} is missing or not text", f"Give {key} as text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{key} is not valid UTF-8 text", "It holds half a surrogate pair: send text in UTF-8") from error
    return value


def read_texts(value: Mapping[str, Json], key: str, count_max: int, chars_max: int) -> tuple[str, ...]:
    entries = value.get(key)
    if not isinstance(entries, list) or len(entries) > count_max:
        raise UsageError(f"{key} is not a list of at most {count_max} texts", f"Give {key} as a list, or fewer at a time")
    texts = tuple(read_text(entry, key) for entry in entries)
    if not all(texts):
        raise UsageError(f"one of {key} is empty", "Leave it out, or give it at least one character")
    if any(len(text) > chars_max for text in texts):
        raise UsageError(f"one of {key} has more than {chars_max} characters", "Give a shorter one")
    return texts


def read_boolean(value: Mapping[str, Json], key: str, default: bool) -> bool:
    given = value.get(key, default)
    if not isinstance(given, bool):
        raise UsageError(f"{key} is {shown(given)}", "Give true or false")
    return given


def read_optional_integer(value: Mapping[str, Json], key: str, least: int, most: int) -> int | None:
    return read_integer(value, key, least, most, least) if key in value else None


def read_integer(value: Mapping[str, Json], key: str, least: int, most: int, default: int) -> int:
    number = value.get(key, default)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise UsageError(f"{key} is {shown(number)}", f"Give a whole number from {least} to {most}")
    return number


def read_number(
    value: Mapping[str, Json], key: str, least: float, most: float, default: float, *, above_least: bool = False
) -> float:
    number = value.get(key, default)
    # Out of range is also what is no number, or infinite.
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
        raise UsageError(f"{key} is {shown(number)}", f"Give a number from {least:g} to {most:g}")
    if above_least and number <= least:
        raise UsageError(f"{key} is {shown(number)}", f"Give a number above {least:g}, at most {most:g}")
    return float(number)


def shown(value: object) -> str:
    """A value in a message, cut."""
    whole = repr(value)
    return whole if len(whole) <= 40 else whole[:40] + "..."
