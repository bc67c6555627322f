from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.core.manifest import DEFAULT_PROFILE
from nexus.gateway import requests
from nexus.node.api import EmbedRequest, FidelityRequest, GenerateRequest


def generate(**fields: Any) -> GenerateRequest:
    return requests.parse_generate(json.dumps({"model": "nano", "prompt": "hi"} | fields).encode())


def test_defaults_are_those_of_the_request() -> None:
    assert generate() == GenerateRequest("nano", "hi")
    assert generate(max_tokens=None, stop=None, seed=None) == GenerateRequest("nano", "hi")


def test_everything_given_arrives() -> None:
    given = {"max_tokens": 7, "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    given |= {"seed": 2**64 - 1, "stages": 3, "receipts": False}
    assert generate(**given, stop=["a", "b"]) == GenerateRequest("nano", "hi", **given, stop=("a", "b"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. Give a whole number from 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature is -0.1. Give a number from 0"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p is 0. Give a number above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k is -1. Give a whole number from 0"),
        ({"top_k": 2**24 + 1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p is -0.1. Give a number from 0 to 1"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0. Give a number from 0.01 to 100"),
        ({"repetition_penalty": 1e9}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": "text"}, "stop is not a list"),
        ({"stop": [""]}, "one of stop is empty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stages": 0}, "stages"),
        ({"receipts": 1}, "receipts is 1. Give true or false"),
        ({"verify": "all"}, "verify is 'all'. Give one of light, replica, dual, off"),
        ({"verify": 1}, "verify is 1. Give one of"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "not valid UTF-8"),
        ({"model": ""}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"model": "x" * 200}, "model"),
        ({"prompts": "x"}, "unknown key 'prompts'"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        generate(**fields)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b"1" * 5000]
)
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    for parse in (
        requests.parse_generate,
        requests.parse_embed,
        requests.parse_add_model,
        requests.parse_ping,
        requests.parse_address,
    ):
        with pytest.raises(UsageError):
            parse(body)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_usage_errors(body: bytes) -> None:
    with pytest.raises(UsageError):
        requests.parse_generate(body)


def test_embedding_requests() -> None:
    assert requests.parse_embed(b'{"texts": ["a", "b"]}') == EmbedRequest(("a", "b"))
    assert requests.parse_embed(b'{"texts": ["a"], "model": "other", "stages": 2}') == EmbedRequest(("a",), "other", 2)
    for body in (b'{"texts": []}', b'{"texts": "a"}', b'{"texts": [1]}', b'{"texts": [""]}'):
        with pytest.raises(UsageError):
            requests.parse_embed(body)


def test_a_model_comes_from_a_directory_or_is_built_in() -> None:
    assert requests.parse_add_model(b'{"source": "nano"}') == requests.AddModelRequest("nano", None, DEFAULT_PROFILE)
    assert requests.parse_add_model(b'{"source": "nano", "profile": "exact"}').profile == "exact"
    for profile in (b'"exakt"', b"1", b'["exact"]', b"true", b'""'):
        with pytest.raises(UsageError, match="profile"):
            requests.parse_add_model(b'{"source": "nano", "profile": ' + profile + b"}")
    assert str(requests.parse_add_model(b'{"source": "/models/x", "name": "y"}').source) == "/models/x"
    for body in (b'{"source": "relative/path"}', b'{"source": ""}', b"{}", b'{"source": "/a\\u0000b"}'):
        with pytest.raises(UsageError):
            requests.parse_add_model(body)


def test_a_fidelity_request() -> None:
    assert requests.parse_fidelity("nano", b"{}") == FidelityRequest("nano")
    body = {"text": "a\n\nb", "text_name": "mine.txt", "against": "/models/nano"}
    assert requests.parse_fidelity("nano", json.dumps(body).encode()) == FidelityRequest("nano", **body)
    for bad in ({"text": " "}, {"text": 5}, {"text_name": "a\nb"}, {"against": "models"}, {"against": "/a\0b"}, {"kernel": "x"}):
        with pytest.raises(UsageError):
            requests.parse_fidelity("nano", json.dumps(bad).encode())
