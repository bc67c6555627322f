"""Bodies of control requests: JSON of a user, checked for size, form and meaning before the node sees it. Raises UsageError."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from nexus.core.audits import MODES, SESSION_MODES
from nexus.core.errors import UsageError
from nexus.core.manifest import DEFAULT_PROFILE, PROFILES_ASKED
from nexus.gateway.wire import Json
from nexus.models import BUILTIN_NAMES
from nexus.node.api import EmbedRequest, FidelityRequest, GenerateRequest
from nexus.proof.receipts import REPETITION_PENALTY_MAX, REPETITION_PENALTY_MIN, STEPS_MAX, TEMPERATURE_MAX, TOP_K_MAX

BODY_BYTES_MAX = 4 * 1024 * 1024
NAME_CHARS_MAX = 128
TEXTS_MAX = 1024
STOPS_MAX = 16
STOP_CHARS_MAX = 256
STAGES_MAX = 256
NODES_MAX = 256


@dataclass(frozen=True, slots=True)
class AddModelRequest:
    """`source`: a directory, or the name of a built-in model. `profile`: "exact", "float" or "auto"."""

    source: Path | str
    name: str | None
    profile: str


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


def parse_generate(body: bytes) -> GenerateRequest:
    value = parse_object(body, *(option.name for option in fields(GenerateRequest)))
    given = {key: entry for key, entry in value.items() if entry is not None}
    default = GenerateRequest(_name(given, "model"), _prompt(given))
    return GenerateRequest(
        model=default.model,
        prompt=default.prompt,
        max_tokens=_integer(given, "max_tokens", 1, STEPS_MAX, default.max_tokens),
        temperature=_number(given, "temperature", 0.0, TEMPERATURE_MAX, default.temperature),
        top_k=_integer(given, "top_k", 0, TOP_K_MAX, default.top_k),
        top_p=_number(given, "top_p", 0.0, 1.0, default.top_p, above_least=True),
        min_p=_number(given, "min_p", 0.0, 1.0, default.min_p),
        repetition_penalty=_number(
            given, "repetition_penalty", REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX, default.repetition_penalty
        ),
        seed=_optional_integer(given, "seed", 0, 2**64 - 1),
        stop=_texts(given, "stop", STOPS_MAX, STOP_CHARS_MAX) if "stop" in given else default.stop,
        stages=_optional_integer(given, "stages", 1, STAGES_MAX),
        receipts=_boolean(given, "receipts", default.receipts),
        verify=_mode(given, "verify"),
    )


def parse_embed(body: bytes) -> EmbedRequest:
    value = parse_object(body, "texts", "model", "stages", "verify")
    given = {key: entry for key, entry in value.items() if entry is not None}
    texts = _texts(given, "texts", TEXTS_MAX, BODY_BYTES_MAX)
    if not texts:
        raise UsageError("there is no text to embed", 'Send {"texts": ["..."]}')
    stages = _optional_integer(given, "stages", 1, STAGES_MAX)
    model = _name(given, "model") if "model" in given else EmbedRequest(texts).model
    return EmbedRequest(texts, model, stages, _mode(given, "verify"))


def parse_add_model(body: bytes) -> AddModelRequest:
    value = parse_object(body, "source", "name", "profile")
    source = value.get("source")
    if not isinstance(source, str) or not source or "\0" in source:
        raise UsageError("source is missing", f"Give a model directory, or one of: {', '.join(BUILTIN_NAMES)}")
    name = _name(value, "name") if value.get("name") is not None else None
    profile = value.get("profile")
    profile = DEFAULT_PROFILE if profile is None else profile
    if profile not in PROFILES_ASKED:
        raise UsageError(f"profile is {_shown(profile)}", f"Give one of {', '.join(PROFILES_ASKED)}")
    if source in BUILTIN_NAMES:
        return AddModelRequest(source, name, str(profile))
    path = Path(source)
    if not path.is_absolute():
        raise UsageError(
            f"{source!r} is neither a built-in model nor an absolute path", "The daemon has a working directory of its own"
        )
    return AddModelRequest(path, name, str(profile))


def parse_fidelity(model: str, body: bytes) -> FidelityRequest:
    value = parse_object(body, "text", "text_name", "against")
    given = {key: entry for key, entry in value.items() if entry is not None}
    text = _text(given["text"], "text") if "text" in given else None
    text_name = _name(given, "text_name") if "text_name" in given else ""
    against = _text(given["against"], "against") if "against" in given else None
    if text is not None and not text.strip():
        raise UsageError("the text is empty", "Leave it out to compare on the text that comes with Nexus")
    if against is not None and (not Path(against).is_absolute() or "\0" in against):
        raise UsageError(f"against is {_shown(against)}", "Give the absolute path of a directory")
    return FidelityRequest(model, text, text_name, against)


def parse_audit(body: bytes) -> str:
    """How to audit a kept session."""
    mode = _mode(parse_object(body, "mode"), "mode")
    if mode not in SESSION_MODES:
        raise UsageError(f"mode is {_shown(mode)}", f"Give one of {', '.join(SESSION_MODES)}")
    return mode


def parse_address(body: bytes) -> str:
    address = parse_object(body, "address").get("address")
    if not isinstance(address, str) or not 0 < len(address) <= 1024:
        raise UsageError("address is missing", "Give a multiaddr such as /ip4/192.0.2.1/tcp/4510/p2p/12D3KooW...")
    return address


def parse_ping(body: bytes) -> str:
    return _name(parse_object(body, "peer"), "peer")


def parse_peer(given: str | None) -> str | None:
    """A peer in a query, as a user names it; None where none is given."""
    return None if given is None else _name({"peer": given}, "peer")


def _prompt(value: Mapping[str, Json]) -> str:
    prompt = _text(value.get("prompt"), "prompt")
    if not prompt:
        raise UsageError("the prompt is empty", "Give it as an argument, or pipe it in with -")
    return prompt


def _name(value: Mapping[str, Json], key: str) -> str:
    name = _text(value.get(key), key)
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        raise UsageError(f"{key} is {_shown(name)}", f"Give 1 to {NAME_CHARS_MAX} printable characters")
    return name


def _text(value: Json, key: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key} is missing or not text", f"Give {key} as text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{key} is not valid UTF-8 text", "It holds half a surrogate pair: send text in UTF-8") from error
    return value


def _texts(value: Mapping[str, Json], key: str, count_max: int, chars_max: int) -> tuple[str, ...]:
    entries = value.get(key)
    if not isinstance(entries, list) or len(entries) > count_max:
        raise UsageError(f"{key} is not a list of at most {count_max} texts", f"Give {key} as a list, or fewer at a time")
    texts = tuple(_text(entry, key) for entry in entries)
    if not all(texts):
        raise UsageError(f"one of {key} is empty", "Leave it out, or give it at least one character")
    if any(len(text) > chars_max for text in texts):
        raise UsageError(f"one of {key} has more than {chars_max} characters", "Give a shorter one")
    return texts


def _mode(value: Mapping[str, Json], key: str) -> str | None:
    mode = value.get(key)
    if mode is None or mode in MODES:
        return mode if isinstance(mode, str) else None
    raise UsageError(f"{key} is {_shown(mode)}", f"Give one of {', '.join(MODES)}")


def _boolean(value: Mapping[str, Json], key: str, default: bool) -> bool:
    given = value.get(key, default)
    if not isinstance(given, bool):
        raise UsageError(f"{key} is {_shown(given)}", "Give true or false")
    return given


def _optional_integer(value: Mapping[str, Json], key: str, least: int, most: int) -> int | None:
    return _integer(value, key, least, most, least) if key in value else None


def _integer(value: Mapping[str, Json], key: str, least: int, most: int, default: int) -> int:
    number = value.get(key, default)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise UsageError(f"{key} is {_shown(number)}", f"Give a whole number from {least} to {most}")
    return number


def _number(value: Mapping[str, Json], key: str, least: float, most: float, default: float, *, above_least: bool = False) -> float:
    number = value.get(key, default)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or not least <= number <= most:
        raise UsageError(f"{key} is {_shown(number)}", f"Give a number from {least:g} to {most:g}")
    if above_least and number <= least:
        raise UsageError(f"{key} is {_shown(number)}", f"Give a number above {least:g}, at most {most:g}")
    return float(number)


def _shown(value: Json) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."
