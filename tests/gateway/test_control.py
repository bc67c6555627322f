"""The control API over a real Unix socket, with a real client."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from nexus.core.errors import LocalError
from nexus.gateway.control import Control, control_app
from nexus.gateway.requests import BODY_BYTES_MAX
from nexus.gateway.unix_socket import bound_socket, serve_on
from nexus.gateway.wire import event_from_json
from nexus.node.api import Finished, Token
from nexus.proof.bundle import verify_bundle
from tests.gateway.fake_node import ANSWER, FIRST, FakeNode


@asynccontextmanager
async def serving(path: Path, node: FakeNode) -> AsyncIterator[tuple[httpx.AsyncClient, Control, trio.Event]]:
    stop, shutdown = trio.Event(), trio.Event()
    control = Control(node, stop.set)
    with bound_socket(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_on, listener, control_app(control), shutdown)
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://nexusd", timeout=20) as client:
                with trio.fail_after(30):
                    yield client, control, stop
            shutdown.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


async def test_everything_that_can_be_read(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        for url in (
            "/v0/status",
            "/v0/id",
            "/v0/peers",
            "/v0/swarm?limit=1",
            "/v0/models",
            "/v0/models/nano",
            "/v0/models/nano/plan",
            "/livez",
            "/readyz",
            "/version",
        ):
            answer = await client.get(url)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), url
        assert (await client.get("/version")).json() == {"name": "nexus", "version": "0.1.0", "api": "v0"}
        assert (await client.get("/v0/models/nano/plan?stages=2")).json()["stages"][1]["start"] == 1


async def test_everything_that_can_be_done(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, stop):
        added = await client.post("/v0/peers", json={"address": "/ip4/192.0.2.1/tcp/1/p2p/x"})
        assert (added.status_code, added.json()["peer_id"]) == (201, FIRST.peer_id)
        assert (await client.post("/v0/ping", json={"peer": FIRST.peer_id})).json()["rtt_s"] == 0.0123
        assert (await client.post("/v0/netcheck")).json()["network"]["verdict"] == "unreachable"
        model = await client.post("/v0/models", json={"source": "nano"})
        assert [json.loads(line)["event"] for line in model.text.splitlines()] == ["progress", "notice", "model"]
        for profile, status in (("float", 200), ("exact", 200), ("fast", 400)):
            answer = await client.post("/v0/models", json={"source": "nano", "profile": profile})
            assert (answer.status_code, f"profile {profile}" in answer.text) == (status, status == 200)
        assert (await client.post("/v0/stop")).status_code == 202
        assert stop.is_set()


async def test_a_run_streams_its_events_and_ends_with_the_proof(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        answer = await client.post("/v0/run", json={"model": "nano", "prompt": "hi"})
        assert answer.headers["content-type"] == "application/x-ndjson"
        events = [event_from_json(json.loads(line)) for line in answer.text.splitlines()]
        assert "".join(event.text for event in events if isinstance(event, Token)) == "".join(ANSWER)
        assert isinstance(events[-1], Finished)
        assert verify_bundle(events[-1].bundle).receipts == 2
        embedded = await client.post("/v0/embed", json={"texts": ["a", "b"]})
        assert [json.loads(line)["event"] for line in embedded.text.splitlines()] == [
            "planned",
            "embedding",
            "embedding",
            "finished",
        ]


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "code", "exit_code"),
    [
        ("GET", "/v0/models/missing", None, 404, "not-found", 5),
        ("GET", "/v0/models/nano/plan?stages=9", None, 503, "capacity", 1),
        ("GET", "/v0/models/nano/plan?stages=0", None, 400, "usage", 2),
        ("GET", "/v0/models/nano/plan?stages=-1", None, 400, "usage", 2),
        ("GET", "/v0/models/nano/plan?stages=%D9%A1", None, 400, "usage", 2),
        ("POST", "/v0/run", b"{", 400, "usage", 2),
        ("POST", "/v0/run", b'{"model": "nano", "prompt": "fail at once"}', 404, "not-found", 5),
        ("POST", "/v0/run", b'{"model": "nano", "prompt": "x", "max_tokens": 0}', 400, "usage", 2),
        ("POST", "/v0/run", b'{"prompt": "' + b"x" * BODY_BYTES_MAX + b'"}', 400, "usage", 2),
        ("POST", "/v0/peers", b'{"address": "/ip4/192.0.2.9/tcp/1/p2p/x"}', 502, "unreachable", 1),
        ("GET", "/nowhere", None, 404, "usage", 2),
        ("DELETE", "/v0/status", None, 405, "usage", 2),
        ("GET", "/v0/models/bug", None, 500, "internal", 1),
    ],
)
async def test_an_error_is_a_problem(
    path: Path, node: FakeNode, method: str, url: str, body: bytes | None, status: int, code: str, exit_code: int
) -> None:
    async with serving(path, node) as (client, _, _):
        answer = await client.request(method, url, content=body)
        problem = answer.json()
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert (problem["status"], problem["code"], problem["exit_code"]) == (status, code, exit_code)
        assert problem["detail"]
        assert "secret" not in answer.text
        assert (await client.get("/livez")).status_code == 200


@pytest.mark.parametrize(("prompt", "code"), [("fail half way", "unreachable"), ("crash", "internal")])
async def test_a_stream_that_fails_half_way_says_so_on_its_last_line(path: Path, node: FakeNode, prompt: str, code: str) -> None:
    async with serving(path, node) as (client, _, _):
        answer = await client.post("/v0/run", json={"model": "nano", "prompt": prompt})
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert answer.status_code == 200
        assert [line["event"] for line in lines[-3:]] == ["token", "token", "error"]
        assert lines[-1]["problem"]["code"] == code
        assert "secret" not in answer.text
        assert (await client.get("/livez")).status_code == 200


async def test_a_client_that_goes_away_cancels_its_work(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        async with client.stream("POST", "/v0/run", json={"model": "nano", "prompt": "wait"}) as answer:
            lines = answer.aiter_lines()
            while json.loads(await anext(lines))["event"] != "token":
                pass
            assert node.running == 1
        await node.idle.wait()
        assert node.cancelled == 1


async def test_while_it_stops_it_takes_no_new_work(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, control, _):
        control.stopping = True
        for url, body in (
            ("/v0/run", {"model": "a", "prompt": "b"}),
            ("/v0/embed", {"texts": ["a"]}),
            ("/v0/models", {"source": "nano"}),
        ):
            answer = await client.post(url, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "capacity")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 200


async def test_a_node_that_is_not_ready_says_why(path: Path, node: FakeNode) -> None:
    node.ready = False
    async with serving(path, node) as (client, _, _):
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "no speed measured yet" in answer.json()["detail"]


async def test_many_clients_at_once(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        texts: list[str] = []

        async def ask() -> None:
            texts.append((await client.post("/v0/run", json={"model": "nano", "prompt": "hi"})).text)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(texts) == 20
        assert len(set(texts)) == 1


async def test_garbage_on_the_socket_does_no_harm(path: Path, node: FakeNode) -> None:
    async with serving(path, node) as (client, _, _):
        for garbage in (
            b"\0" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v0/run HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"A" * 100_000,
        ):
            stream = await trio.open_unix_socket(path)
            with trio.move_on_after(5):
                try:
                    await stream.send_all(garbage)
                    await stream.send_eof()
                    while await stream.receive_some(4096):
                        pass
                except trio.BrokenResourceError:
                    pass
            await stream.aclose()
        assert (await client.get("/livez")).status_code == 200


def test_the_socket_is_for_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        with bound_socket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_refused(path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with bound_socket(path), pytest.raises(LocalError, match="answers on"), bound_socket(path):
        pass
    assert not path.exists()


def test_a_file_in_the_way_is_not_touched(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(LocalError, match="in the way"), bound_socket(path):
        pass
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_an_error_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"Set control\.socket"), bound_socket(tmp_path / "no" / "control.sock"):
        pass
