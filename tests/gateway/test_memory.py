"""The memory's part of the control API: over a real socket, and field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.gateway import memory_requests as requests
from nexus.gateway.fields import BODY_BYTES_MAX
from nexus.gateway.wire import event_from_json, event_to_json, from_json, to_json
from nexus.node.memory import api
from nexus.node.memory.api import LIST_MAX, AddedView, AddRequest, ExportPart, Filters, PruneRequest, SearchRequest
from tests.gateway.fake_memory import DANUBE, OTHER, block_view, collection_view, identifier
from tests.gateway.fake_node import FakeNode
from tests.gateway.test_control import serving

BLOCK = identifier(DANUBE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


async def test_everything_that_can_be_read(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):

        async def answer(url: str) -> Any:
            got = await client.get(url)
            assert (got.status_code, got.headers["content-type"]) == (200, "application/json"), url
            return got.json()

        assert from_json(api.BlockView, await answer(f"/v0/memory/blocks/{BLOCK[:16]}")) == block_view()
        await answer(f"/v0/memory/blocks/{BLOCK}?network=true")
        assert [call for call in node.memory.calls if call[0] == "get"] == [("get", False), ("get", True)]
        assert (await answer("/v0/memory/blocks"))["blocks"][0]["id"] == BLOCK
        assert from_json(api.StatsView, await answer("/v0/memory/stats")).collections[0].vectors == (("minilm", 12),)
        assert from_json(api.WitnessView, await answer("/v0/witness")).blocks == 120
        assert [one["mode"] for one in (await answer("/v0/collections"))["collections"]] == ["open", "private"]
        assert (await answer("/v0/collections/sync"))["sync"][1]["state"] == "demoted"


async def test_everything_that_can_be_done(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):

        async def answer(url: str, body: object, status: int = 200) -> Any:
            got = await client.post(url, json=body)
            assert got.status_code == status, got.text
            return got.json()

        async def events(url: str, body: object) -> list[Any]:
            got = await client.post(url, json=body)
            assert got.headers["content-type"] == "application/x-ndjson"
            return [event_from_json(json.loads(line)) for line in got.text.splitlines()]

        added = (await events("/v0/memory/blocks", {"text": "a\n\nb", "title": "t"}))[-1]
        assert added == AddedView("main", (identifier("a"), identifier("b")), 0)
        assert (await answer("/v0/memory/search", {"text": "river", "k": 2, "network": True}))["hits"][0]["block"]["id"] == BLOCK
        assert (await answer("/v0/memory/pin", {"block": BLOCK}))["pinned"] is True
        assert (await answer("/v0/memory/pin", {"block": BLOCK, "pinned": False}))["pinned"] is False
        assert await answer("/v0/memory/remove", {"block": BLOCK}) == {"removed": [BLOCK]}
        assert (await answer("/v0/memory/prune", {"bytes_max": 5, "dry_run": True}))["dry_run"] is True
        assert node.memory.calls[-1] == ("prune", PruneRequest(None, 5, True))
        parts = await events("/v0/memory/export", {"collections": ["notes"]})
        assert parts == [ExportPart(content, 2) for content in node.memory.content]
        imported = await client.post("/v0/memory/import", content=b"\x00\xff raw")
        assert (imported.json()["new"], node.memory.imported) == (2, [b"\x00\xff raw"])
        assert (await events("/v0/memory/verify", {}))[-1].checked == 12
        assert (await events("/v0/memory/verify", {"block": BLOCK}))[-1].damaged == 0
        assert [call[1] for call in node.memory.calls if call[0] == "verify"] == [None, BLOCK]
        assert (await events("/v0/memory/reindex", {"model": "other", "collection": "main"}))[-1].embedded == 11
        assert (await answer("/v0/collections", {"name": "n", "mode": "private", "writers": ["bob"]}, 201))["mode"] == "private"
        await answer("/v0/collections/notes@12D3/grant", {"peer": "bob", "write": True})
        await answer("/v0/collections/notes/grant", {"peer": "bob", "revoke": True})
        await answer("/v0/collections/my%20notes/subscribe", {"peer": "bob"})
        await answer("/v0/collections/sync/subscribe", {})
        assert (await answer("/v0/collections/notes/unsubscribe", {}))["subscribed"] is False
        assert len((await answer("/v0/collections/sync", {}))["sync"]) == 2
        await answer("/v0/collections/sync", {"collection": "notes"})
        assert node.memory.calls[-9:] == [
            ("reindex", ("other", "main")),
            ("create", ("n", "private", ("bob",))),
            ("grant", ("notes@12D3", "bob", True, False)),
            ("grant", ("notes", "bob", False, True)),
            ("subscribe", ("my notes", "bob")),
            ("subscribe", ("sync", None)),
            ("unsubscribe", "notes"),
            ("sync", None),
            ("sync", "notes"),
        ]


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "code"),
    [
        ("GET", "/v0/memory/blocks/bafkreia", None, 404, "not-found"),
        ("GET", "/v0/memory/blocks/..", None, 404, "usage"),
        ("GET", "/v0/memory/blocks/xyz", None, 400, "usage"),
        ("GET", f"/v0/memory/blocks/{BLOCK}?network=yes", None, 400, "usage"),
        ("GET", f"/v0/memory/blocks/{BLOCK}?network=true&network=true", None, 400, "usage"),
        ("GET", "/v0/memory/blocks?limit=0", None, 400, "usage"),
        ("GET", "/v0/memory/blocks?limit=%D9%A1", None, 400, "usage"),
        ("GET", "/v0/memory/blocks?color=red", None, 400, "usage"),
        ("POST", "/v0/memory/blocks", b"{", 400, "usage"),
        ("POST", "/v0/memory/blocks", b'{"text": "' + b"x" * BODY_BYTES_MAX + b'"}', 400, "usage"),
        ("POST", "/v0/memory/blocks", b'{"text": "fail at once"}', 403, "not-allowed"),
        ("POST", "/v0/memory/import", b"", 400, "usage"),
        ("POST", "/v0/memory/import", b"x" * (BODY_BYTES_MAX + 1), 400, "usage"),
        ("POST", "/v0/memory/export", b'{"collections": ["missing"]}', 404, "not-found"),
        ("POST", "/v0/memory/prune", b"{}", 400, "usage"),
        ("POST", "/v0/collections", b'{"name": "a/b", "mode": "public"}', 400, "usage"),
        ("POST", "/v0/collections/a@/grant", b'{"peer": "bob"}', 400, "usage"),
        ("POST", "/v0/collections/missing/subscribe", b"{}", 404, "not-found"),
        ("POST", "/v0/collections/notes/unsubscribe", b'{"peer": "bob"}', 400, "usage"),
    ],
)
async def test_an_error_is_a_problem(
    path: Path, node: FakeNode, method: str, url: str, body: bytes | None, status: int, code: str
) -> None:
    async with serving(path, node) as (client, _, _):
        answer = await client.request(method, url, content=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert answer.headers["content-type"] == "application/problem+json"


async def test_what_fails_half_way_is_the_last_line(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        for text, code in (("fail half way", "capacity"), ("crash", "internal")):
            lines = (await client.post("/v0/memory/blocks", json={"text": text})).text.splitlines()
            assert json.loads(lines[-1])["problem"]["code"] == code
            assert "secret" not in lines[-1]


async def test_a_client_that_goes_away_cancels_what_it_added(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        async with client.stream("POST", "/v0/memory/blocks", json={"text": "wait"}) as response:
            await anext(response.aiter_lines())
        await node.memory.idle.wait()
        assert node.memory.cancelled == 1


async def test_a_slow_reader_of_an_export_holds_it_up(path: Path, node: FakeNode) -> None:
    """Nothing piles up in the daemon: it makes about as many parts as were read."""
    made = 0

    async def export(collections: object) -> Any:
        nonlocal made
        for _ in range(64):
            made += 1
            yield ExportPart(bytes(1 << 20), 1)

    node.memory.export = export  # type: ignore[method-assign, assignment]
    async with serving(path, node) as (client, _, _), client.stream("POST", "/v0/memory/export", json={}) as response:
        await anext(response.aiter_raw())
        before = -1
        while made != before:  # until it stands still
            before = made
            await trio.sleep(0.2)
        assert made < 16


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v0/memory/blocks", {"text": "a"}),
        ("/v0/memory/search", {"text": "a"}),
        ("/v0/memory/remove", {"block": BLOCK}),
        ("/v0/memory/prune", {"bytes_max": 0}),
        ("/v0/memory/export", {}),
        ("/v0/memory/verify", {}),
        ("/v0/memory/reindex", {"model": "x"}),
        ("/v0/collections", {"name": "a", "mode": "public"}),
        ("/v0/collections/a/grant", {"peer": "x"}),
        ("/v0/collections/a/subscribe", {}),
        ("/v0/collections/sync", {}),
    ],
)
async def test_a_stopping_daemon_takes_no_new_work(path: Path, node: FakeNode, url: str, body: object) -> None:
    async with serving(path, node) as (client, control, _):
        control.stopping = True
        answer = await client.post(url, json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "capacity")
    assert node.memory.calls == []


# --- fields -----------------------------------------------------------------------------------------------------------------


def add(**given: object) -> AddRequest:
    return requests.parse_add(json.dumps({"text": "hi"} | given).encode())


def search(**given: object) -> SearchRequest:
    return requests.parse_search(json.dumps({"text": "hi"} | given).encode())


VECTOR = {"vector": [0.5, -1], "vector_model": "mine", "vector_fingerprint": "ab" * 32}


def test_defaults_are_those_of_the_request() -> None:
    assert add() == AddRequest("hi")
    assert add(**{field.name: None for field in fields(AddRequest) if field.name != "text"}) == AddRequest("hi")
    assert search() == SearchRequest("hi")
    assert search(filters={field.name: None for field in fields(Filters)}, k=None) == SearchRequest("hi")
    assert requests.parse_list_query([]) == (Filters(), requests.LIST_DEFAULT)
    assert requests.parse_network_query([]) is False


def test_everything_given_arrives() -> None:
    given = {"title": "t", "collection": "notes@12D3", "tags": ("a", "b"), "lang": "de", "ttl_s": 5.5}
    given |= {"links": (BLOCK,), "replaces": BLOCK[:16], **VECTOR, "vector": (0.5, -1.0)}
    assert add(**given) == AddRequest("hi", **given)  # type: ignore[arg-type]
    assert add(text="", **VECTOR).vector == (0.5, -1.0)
    filters = {"collections": ("main", "a b"), "tags": ("x",), "authors": ("bob",), "lang": "en", "since_ms": 5, "until_ms": 6}
    filters |= {"near": (48.5, -16.25), "near_km": 10.0}
    options = {"k": 3, "hybrid": True, "model": "/models/x", "network": True, "deadline_s": 0.5}
    wanted = Filters(**filters)  # type: ignore[arg-type]
    assert search(filters=filters, **options) == SearchRequest("hi", wanted, **options)  # type: ignore[arg-type]
    query = [("collections", "main"), ("collections", "a b"), ("tags", "x"), ("authors", "bob"), ("lang", "en")]
    query += [("since_ms", "5"), ("until_ms", "6"), ("near", "48.5,-16.25"), ("near_km", "10"), ("limit", "7")]
    assert requests.parse_list_query(query) == (wanted, 7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"text": ""}, "the text is empty"),
        ({"text": " \n"}, "the text is empty"),
        ({"text": 5}, "text"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": "\ud800"}, "not valid UTF-8"),
        ({"title": "a\nb"}, "title"),
        ({"title": "x" * 257}, "title is .* at most 256 bytes"),
        ({"title": "ä" * 129}, "title"),
        ({"collection": ""}, "no name of a collection"),
        ({"collection": "a/b"}, "no name of a collection"),
        ({"collection": " a"}, "no name of a collection"),
        ({"collection": "a@b-c"}, "names no owner"),
        ({"collection": "a@" + "b" * 300}, "too long"),
        ({"tags": "a"}, "tags is not a list"),
        ({"tags": [""]}, "one of tags is empty"),
        ({"tags": ["a\x1b"]}, "one of tags"),
        ({"tags": ["ä" * 33]}, "one of tags"),
        ({"tags": ["x"] * 17}, "tags is not a list of at most 16"),
        ({"lang": "x" * 33}, "lang"),
        ({"ttl_s": 0}, "ttl_s is 0. Give a number above 0"),
        ({"ttl_s": -1}, "ttl_s"),
        ({"ttl_s": True}, "ttl_s"),
        ({"ttl_s": 10**400}, "ttl_s"),
        ({"links": ["x"]}, "not the id of a block"),
        ({"links": ["bafkrej"]}, "not the id of a block"),
        ({"links": [BLOCK + "a"]}, "more than 59"),
        ({"links": [BLOCK.upper()]}, "not the id of a block"),
        ({"links": [BLOCK] * 33}, "links"),
        ({"replaces": ""}, "not the id of a block"),
        ({"replaces": "a"}, "not the id of a block"),
        ({"vector": [1]}, "without its model"),
        ({"vector_model": "x"}, "without its model"),
        (VECTOR | {"vector": []}, "vector is not a list of numbers"),
        (VECTOR | {"vector": [1] * 4097}, "vector is not a list of numbers"),
        (VECTOR | {"vector": ["1"]}, "one of vector"),
        (VECTOR | {"vector": [True]}, "one of vector"),
        (VECTOR | {"vector": [10**400]}, "one of vector"),
        (VECTOR | {"vector": [0, 0.0]}, "the vector is zero"),
        (VECTOR | {"vector_model": ""}, "vector_model is empty"),
        (VECTOR | {"vector_fingerprint": "AB" * 32}, "64 hex digits"),
        ({"author": "x"}, "unknown key 'author'"),
    ],
)
def test_a_bad_field_of_a_document_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        add(**given)


def test_numbers_that_are_none_are_refused() -> None:
    for number in (b"NaN", b"Infinity", b"1e999", b"-1e999"):
        body = b'{"text": "x", "vector": [1, %b], "vector_model": "m", "vector_fingerprint": "%b"}' % (number, b"ab" * 32)
        with pytest.raises(UsageError):
            requests.parse_add(body)
        with pytest.raises(UsageError):
            requests.parse_search(b'{"text": "x", "filters": {"near": [1, %b]}}' % number)
        with pytest.raises(UsageError):
            requests.parse_search(b'{"text": "x", "deadline_s": %b}' % number)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"text": " "}, "the question is empty"),
        ({"text": "x" * 32769}, "the question has 32769 characters"),
        ({"k": 0}, "k is 0. Give a whole number from 1 to 1000"),
        ({"k": 1001}, "k"),
        ({"hybrid": 1}, "hybrid"),
        ({"model": ""}, "model"),
        ({"network": "yes"}, "network"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": 601}, "deadline_s"),
        ({"filters": []}, "filters"),
        ({"filters": {"tag": ["x"]}}, "unknown filter 'tag'"),
        ({"filters": {"since_ms": 6, "until_ms": 6}}, "since_ms is not before until_ms"),
        ({"filters": {"since_ms": -1}}, "since_ms"),
        ({"filters": {"since_ms": 1.5}}, "since_ms"),
        ({"filters": {"until_ms": 2**53}}, "until_ms"),
        ({"filters": {"near": [91, 0]}}, "near is 91. Give a number from -90 to 90"),
        ({"filters": {"near": [0, 181]}}, "near"),
        ({"filters": {"near": [0]}}, "Give latitude and longitude"),
        ({"filters": {"near": "1,2"}}, "near"),
        ({"filters": {"near_km": 0}}, "near_km"),
        ({"filters": {"near_km": 1e9}}, "near_km"),
        ({"filters": {"authors": [""]}}, "authors"),
        ({"filters": {"authors": ["a\nb"]}}, "authors"),
        ({"filters": {"collections": ["x"] * 65}}, "collections"),
    ],
)
def test_a_bad_field_of_a_search_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        search(**given)


@pytest.mark.parametrize(
    "query",
    [
        [("limit", "10001")],
        [("limit", "5"), ("limit", "5")],
        [("limit", " 5")],
        [("since_ms", "1.5")],
        [("near", "48.5")],
        [("near", "48.5,x")],
        [("near", "48.5,1,2")],
        [("near", "nan,1")],
        [("near_km", "inf")],
        [("tags", "")],
        [("tag", "x")],
        [("near_km", "1" * 400)],
    ],
)
def test_a_bad_query_is_refused(query: list[tuple[str, str]]) -> None:
    with pytest.raises(UsageError):
        requests.parse_list_query(query)


@given(
    st.lists(st.tuples(st.sampled_from([*(field.name for field in fields(Filters)), "limit"]), st.text(max_size=12)), max_size=4)
)
def test_no_query_does_anything_but_usage_errors(query: list[tuple[str, str]]) -> None:
    try:
        _, limit = requests.parse_list_query(query)
    except UsageError:
        return
    assert 1 <= limit <= LIST_MAX


PARSERS: list[Callable[[bytes], object]] = [
    requests.parse_add,
    requests.parse_search,
    requests.parse_block,
    requests.parse_pin,
    requests.parse_verify,
    requests.parse_prune,
    requests.parse_export,
    requests.parse_reindex,
    requests.parse_new_collection,
    requests.parse_grant,
    requests.parse_subscribe,
    requests.parse_sync,
    requests.parse_nothing,
]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
_KEYS = st.sampled_from([field.name for kind in (AddRequest, SearchRequest, PruneRequest) for field in fields(kind)] + ["block"])


@pytest.mark.parametrize("parse", PARSERS)
@given(body=st.binary(max_size=40) | st.dictionaries(_KEYS, _VALUES, max_size=4).map(lambda value: json.dumps(value).encode()))
def test_no_body_does_anything_but_usage_errors(parse: Callable[[bytes], object], body: bytes) -> None:
    with suppress(UsageError):
        parse(body)


@pytest.mark.parametrize(
    "body",
    [
        {"mode": "public"},
        {"name": "a"},
        {"name": "a", "mode": "open"},
        {"name": "a", "mode": 1},
        {"name": "a", "mode": []},
        {"name": "a", "mode": "public", "writers": ["bob"]},
        {"name": "a@b", "mode": "public"},
        {"name": "x" * 65, "mode": "public"},
        {"name": "a", "mode": "private", "writers": ["bob"] * 257},
    ],
)
def test_a_collection_that_cannot_be_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        requests.parse_new_collection(json.dumps(body).encode())


# --- the codec --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [block_view(), collection_view("a", "private"), block_view(not_after_ms=5, heads=())])
def test_views_come_back(view: api.BlockView | api.CollectionView) -> None:
    assert from_json(type(view), json.loads(json.dumps(to_json(view)))) == view


@given(st.binary(max_size=100), st.integers(0, 2**40))
def test_a_part_of_an_export_comes_back(content: bytes, blocks: int) -> None:
    part = ExportPart(content, blocks)
    assert event_from_json(json.loads(json.dumps(event_to_json(part)))) == part


def test_a_peer_is_named_as_users_name_it() -> None:
    body = json.dumps({"peer": OTHER.peer_id, "write": True}).encode()
    assert requests.parse_grant(body) == requests.Grant(OTHER.peer_id, True, False)
    with pytest.raises(UsageError):
        requests.parse_grant(b'{"write": true}')
