"""Bodies of control requests: JSON of a user, checked for size, form and meaning before the node sees it. Raises UsageError."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from nexus.core.audits import MODES, SESSION_MODES
from nexus.core.errors import UsageError
from nexus.core.manifest import DEFAULT_PROFILE, PROFILES_ASKED
from nexus.gateway.fields import (
    BODY_BYTES_MAX,
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
from nexus.models import BUILTIN_NAMES
from nexus.node.api import EmbedRequest, FidelityRequest, GenerateRequest, ResumeRequest
from nexus.proof.receipts import REPETITION_PENALTY_MAX, REPETITION_PENALTY_MIN, STEPS_MAX, TEMPERATURE_MAX, TOP_K_MAX

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


def parse_generate(body: bytes) -> GenerateRequest:
    value = parse_object(body, *(option.name for option in fields(GenerateRequest)))
    given = {key: entry for key, entry in value.items() if entry is not None}
    default = GenerateRequest(read_name(given, "model"), _prompt(given))
    return GenerateRequest(
        model=default.model,
        prompt=default.prompt,
        max_tokens=read_integer(given, "max_tokens", 1, STEPS_MAX, default.max_tokens),
        temperature=read_number(given, "temperature", 0.0, TEMPERATURE_MAX, default.temperature),
        top_k=read_integer(given, "top_k", 0, TOP_K_MAX, default.top_k),
        top_p=read_number(given, "top_p", 0.0, 1.0, default.top_p, above_least=True),
        min_p=read_number(given, "min_p", 0.0, 1.0, default.min_p),
        repetition_penalty=read_number(
            given, "repetition_penalty", REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX, default.repetition_penalty
        ),
        seed=read_optional_integer(given, "seed", 0, 2**64 - 1),
        stop=read_texts(given, "stop", STOPS_MAX, STOP_CHARS_MAX) if "stop" in given else default.stop,
        stages=read_optional_integer(given, "stages", 1, STAGES_MAX),
        receipts=read_boolean(given, "receipts", default.receipts),
        verify=_mode(given, "verify"),
    )


def parse_resume(body: bytes) -> ResumeRequest:
    value = parse_object(body, "answer", "tokens")
    answer = value.get("answer")
    if not isinstance(answer, str) or re.fullmatch("[0-9a-fA-F]{8,64}", answer) is None:
        raise UsageError(f"answer is {shown(answer)}", "Give at least 8 hex digits of the id that the answer began with")
    tokens = value.get("tokens", [])
    if not isinstance(tokens, list) or len(tokens) > STEPS_MAX:
        raise UsageError("tokens is not a list of token ids", "Send those that came, in order")
    if any(type(token) is not int or not 0 <= token < 2**32 for token in tokens):
        raise UsageError("tokens has an entry that is no token id", "Send those that came, in order")
    return ResumeRequest(answer, tuple(tokens))


def parse_embed(body: bytes) -> EmbedRequest:
    value = parse_object(body, "texts", "model", "stages", "verify")
    given = {key: entry for key, entry in value.items() if entry is not None}
    texts = read_texts(given, "texts", TEXTS_MAX, BODY_BYTES_MAX)
    if not texts:
        raise UsageError("there is no text to embed", 'Send {"texts": ["..."]}')
    stages = read_optional_integer(given, "stages", 1, STAGES_MAX)
    model = read_name(given, "model") if "model" in given else EmbedRequest(texts).model
    return EmbedRequest(texts, model, stages, _mode(given, "verify"))


def parse_add_model(body: bytes) -> AddModelRequest:
    value = parse_object(body, "source", "name", "profile")
    source = value.get("source")
    if not isinstance(source, str) or not source or "\0" in source:
        raise UsageError("source is missing", f"Give a model directory, or one of: {', '.join(BUILTIN_NAMES)}")
    name = read_name(value, "name") if value.get("name") is not None else None
    profile = value.get("profile")
    profile = DEFAULT_PROFILE if profile is None else profile
    if profile not in PROFILES_ASKED:
        raise UsageError(f"profile is {shown(profile)}", f"Give one of {', '.join(PROFILES_ASKED)}")
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
    text = read_text(given["text"], "text") if "text" in given else None
    text_name = read_name(given, "text_name") if "text_name" in given else ""
    against = read_text(given["against"], "against") if "against" in given else None
    if text is not None and not text.strip():
        raise UsageError("the text is empty", "Leave it out to compare on the text that comes with Nexus")
    if against is not None and (not Path(against).is_absolute() or "\0" in against):
        raise UsageError(f"against is {shown(against)}", "Give the absolute path of a directory")
    return FidelityRequest(model, text, text_name, against)


def parse_audit(body: bytes) -> str:
    """How to audit a kept session."""
    mode = _mode(parse_object(body, "mode"), "mode")
    if mode not in SESSION_MODES:
        raise UsageError(f"mode is {shown(mode)}", f"Give one of {', '.join(SESSION_MODES)}")
    return mode


def parse_address(body: bytes) -> str:
    address = parse_object(body, "address").get("address")
    if not isinstance(address, str) or not 0 < len(address) <= 1024:
        raise UsageError("address is missing", "Give a multiaddr such as /ip4/192.0.2.1/tcp/4510/p2p/12D3KooW...")
    return address


def parse_ping(body: bytes) -> str:
    return read_name(parse_object(body, "peer"), "peer")


def parse_peer(given: str | None) -> str | None:
    """A peer in a query, as a user names it; None where none is given."""
    return None if given is None else read_name({"peer": given}, "peer")


def _prompt(value: Mapping[str, Json]) -> str:
    prompt = read_text(value.get("prompt"), "prompt")
    if not prompt:
        raise UsageError("the prompt is empty", "Give it as an argument, or pipe it in with -")
    return prompt


def _mode(value: Mapping[str, Json], key: str) -> str | None:
    mode = value.get(key)
    if mode is None or mode in MODES:
        return mode if isinstance(mode, str) else None
    raise UsageError(f"{key} is {shown(mode)}", f"Give one of {', '.join(MODES)}")
