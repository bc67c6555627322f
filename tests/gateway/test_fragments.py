"""Serving, versions and draining over the control API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from nexus.gateway.wire import event_from_json
from nexus.node.fragments_api import DrainView, ServeRequest, ServingView, VersionView
from tests.gateway.fake_node import FakeNode
from tests.gateway.test_control import node, path, serving  # noqa: F401


async def test_a_promise_is_made_with_its_limits_and_ended(path: Path, node: FakeNode) -> None:  # noqa: F811
    body = {"fragment": "0-5", "memory_max_bytes": 1 << 20, "upload_max_bytes": 1 << 16, "publisher": "n2", "preload": True}
    async with serving(path, node) as (client, _, _):
        answer = await client.post("/v0/models/nano/serve", json=body)
        events = [event_from_json(json.loads(line)) for line in answer.text.splitlines()]
        assert isinstance(events[-1], ServingView)
        assert node.fragments.served == [ServeRequest("nano", "0-5", 1 << 20, 0, 1 << 16, "n2", True)]
        listed = (await client.get("/v0/serving")).json()["serving"]
        assert [view["served"] for view in listed] == [[[0, 6]]]
        ended = (await client.post("/v0/models/nano/unserve", json={})).json()
        assert ended["ended"]
        assert "layers 6-11" in ended["notices"][0]
        assert (await client.post("/v0/models/nano/serve", json={})).status_code == 200
        assert node.fragments.served[-1] == ServeRequest("nano")


@pytest.mark.parametrize(
    "bad",
    [
        {"fragment": 5},
        {"fragment": ""},
        {"memory_max_bytes": -1},
        {"disk_max_bytes": 1.5},
        {"upload_max_bytes": True},
        {"publisher": ""},
        {"preload": "yes"},
        {"limit": 1},
        [],
    ],
)
async def test_what_is_no_promise_is_refused(path: Path, node: FakeNode, bad: object) -> None:  # noqa: F811
    async with serving(path, node) as (client, _, _):
        answer = await client.post("/v0/models/nano/serve", json=bad)
        assert (answer.status_code, answer.json()["code"]) == (400, "usage")
        assert answer.json()["fix"]
        assert not node.fragments.served


async def test_what_is_not_there_or_has_no_room_says_so(path: Path, node: FakeNode) -> None:  # noqa: F811
    async with serving(path, node) as (client, _, _):
        assert (await client.post("/v0/models/missing/serve", json={})).status_code == 404
        assert (await client.post("/v0/models/missing/unserve", json={})).status_code == 404
        assert (await client.post("/v0/models/huge/serve", json={})).status_code == 503


async def test_a_version_is_published_and_rolled_back(path: Path, node: FakeNode, tmp_path: Path) -> None:  # noqa: F811
    async with serving(path, node) as (client, _, _):
        answer = await client.post("/v0/models/nano/update", json={"source": str(tmp_path), "profile": "exact"})
        events = [event_from_json(json.loads(line)) for line in answer.text.splitlines()]
        assert [one.version for one in events if isinstance(one, VersionView)] == [2]
        assert node.fragments.updated == [("nano", tmp_path, "exact")]
        for to, version in ((None, 3), (1, 11)):
            answer = await client.post("/v0/models/nano/rollback", json={"to": to})
            assert json.loads(answer.text.splitlines()[0])["version"] == version
        for url, bad in (
            ("update", {"source": "relative"}),
            ("update", {}),
            ("update", {"source": "/x\0"}),
            ("update", {"source": "/x", "profile": "fast"}),
            ("rollback", {"to": 0}),
            ("rollback", {"to": "1"}),
        ):
            answer = await client.post(f"/v0/models/nano/{url}", json=bad)
            assert (answer.status_code, bool(answer.json()["fix"])) == (400, True), bad


async def test_a_drain_ends_the_daemon_when_it_is_done(path: Path, node: FakeNode) -> None:  # noqa: F811
    async with serving(path, node) as (client, _, stop):
        for bad in ({"deadline_s": -1}, {"deadline_s": "5"}, {"deadline_s": 1e9}):
            assert (await client.post("/v0/drain", json=bad)).status_code == 400
        assert not stop.is_set()
        answer = await client.post("/v0/drain", json={"deadline_s": 7})
        views = [event_from_json(json.loads(line)) for line in answer.text.splitlines()]
        assert [isinstance(view, DrainView) and view.done for view in views] == [False, True]
        assert node.fragments.deadlines == [7.0]
        assert stop.is_set()


async def test_a_client_that_goes_away_calls_the_drain_off(path: Path, node: FakeNode) -> None:  # noqa: F811
    node.fragments.waits = True
    node.fragments.off = trio.Event()
    async with serving(path, node) as (client, _, stop):
        async with client.stream("POST", "/v0/drain", json={}) as response:
            async for _ in response.aiter_lines():
                break
        with trio.fail_after(10):
            await node.fragments.off.wait()
        assert node.fragments.deadlines == [300.0]
        assert not stop.is_set()


async def test_nothing_new_is_undertaken_while_the_daemon_stops(path: Path, node: FakeNode, tmp_path: Path) -> None:  # noqa: F811
    async with serving(path, node) as (client, control, _):
        control.stopping = True
        for url, body in (
            ("/v0/models/nano/serve", {}),
            ("/v0/models/nano/update", {"source": str(tmp_path)}),
            ("/v0/models/nano/rollback", {}),
            ("/v0/drain", {}),
        ):
            assert (await client.post(url, json=body)).status_code == 503
        assert not node.fragments.served
