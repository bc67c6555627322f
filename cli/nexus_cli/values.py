"""Values that several commands take: text, spans of time, moments, places, sizes. Functions for `type=` of click's parameters; they
raise BadParameter, exit code 2."""

from __future__ import annotations

import re
import time
from typing import NoReturn

import click

_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
SPAN_MAX_S = 100 * 366 * 86_400.0


def text(value: str) -> str:
    """Python keeps bytes of an argument that are not UTF-8 as lone surrogates, which must not go further."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("is not valid UTF-8: convert it first, for example with iconv")
    return value


def span(value: str) -> float:
    """A span of time as seconds, above 0."""
    span_s = _seconds(value)
    if span_s is None or not 0 < span_s <= SPAN_MAX_S:
        _refuse(value, "a span of time such as 30d, 12h or 1.5h (s, m, h, d, w, y), at most a hundred years")
    return span_s


def moment(value: str) -> int:
    """A moment as milliseconds since 1970: an ISO date or time, in UTC unless it says otherwise, or how long ago it was."""
    from datetime import UTC, datetime

    span_s = _seconds(value)
    if span_s is not None and span_s <= SPAN_MAX_S:
        return max(0, int((time.time() - span_s) * 1000))
    try:
        given = datetime.fromisoformat(value)
        moment_ms = round((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        moment_ms = -1
    if moment_ms < 0:
        _refuse(value, "a date such as 2026-11-30 or 2026-11-30T12:00, from 1970 on, or an age such as 7d")
    return moment_ms


def place(value: str) -> tuple[float, float]:
    """Degrees of latitude and longitude."""
    try:
        latitude, longitude = (float(part) for part in value.split(","))
    except ValueError:
        latitude = longitude = float("nan")
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):  # also true of what is no number
        _refuse(value, "a place such as 48.2,16.4: degrees north up to 90, degrees east up to 180")
    return latitude, longitude


def size(value: str) -> int:
    """Bytes."""
    from nexus_config.settings import parse_size

    try:
        return 0 if value == "0" else parse_size(value)
    except ValueError:
        _refuse(value, "0, or a size of at least 1MiB such as 512MiB or 4GiB")


def rate(value: str) -> int:
    """Bytes per second, 0 for no limit."""
    from nexus_config.settings import RATE_MIN, parse_size

    try:
        return 0 if value == "0" else parse_size(value, least=RATE_MIN)
    except ValueError:
        _refuse(value, "0, or at least 64KiB per second, such as 512KiB or 2MiB")


def kilometres(value: str) -> float:
    """A distance on the Earth."""
    return _number(value, 0.001, 20_040, "kilometres")


def deadline(value: str) -> float:
    """How long to wait, in seconds."""
    return _number(value, 0.05, 600, "seconds")


def _number(value: str, least: float, most: float, what: str) -> float:
    """Click's own ranges let pass what is not a number (NaN)."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        _refuse(value, f"a number of {what} from {least:g} to {most:g}")
    return number


def _seconds(value: str) -> float | None:
    """Seconds, or None for what is no span of time."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|min|m|h|d|w|y)", value.strip())
    return float(match.group(1)) * _UNIT_S[match.group(2)] if match else None


def _refuse(value: str, expected: str) -> NoReturn:
    raise click.BadParameter(f"{value[:80]!r} is not {expected}")
