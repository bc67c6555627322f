from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, NexusError, NotFoundError, VerificationError
from nexus.gateway.problems import error_of, problem_of
from nexus.gateway.wire import EVENTS, event_from_json, event_to_json, from_json, to_json
from nexus.node import api
from tests.gateway.fake_node import FIRST, finished, manifest, plan_view

names = st.text(max_size=20)
views = st.one_of(
    st.builds(api.Token, st.integers(0, 2**40), st.integers(0, 2**32), names),
    st.builds(api.Progress, names, names, st.integers(0, 2**60), st.integers(0, 2**60)),
    st.builds(api.Notice, names),
    st.builds(api.Embedding, st.integers(0, 1000), st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple)),
    st.builds(api.Planned, st.just(plan_view()), st.binary(min_size=32, max_size=32)),
    st.just(finished()),
    st.builds(
        api.ModelView,
        names,
        st.just(manifest()),
        st.lists(st.tuples(st.integers(), st.integers())).map(tuple),
        st.integers(),
        st.just(()),
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(views)
def test_an_event_comes_back_through_json_text(event: api.Event) -> None:
    line = json.dumps(event_to_json(event), allow_nan=False)
    assert event_from_json(json.loads(line)) == event


def test_every_event_of_the_node_has_a_name() -> None:
    assert set(api.StreamItem.__args__) == set(EVENTS.values())  # type: ignore[attr-defined]


@given(names, st.none() | st.floats(0, 10), st.lists(names).map(tuple))
def test_a_peer_comes_back(name: str, rtt_s: float | None, models: tuple[str, ...]) -> None:
    peer = api.PeerView(FIRST.peer_id, name, "a", ("x",), "in", rtt_s, 5, models)
    assert from_json(api.PeerView, json.loads(json.dumps(to_json(peer)))) == peer


def test_a_manifest_says_its_root() -> None:
    shown = to_json(manifest())
    assert isinstance(shown, dict)
    assert shown["root"] == manifest().root.hex()
    assert from_json(type(manifest()), shown).root == manifest().root


@given(json_values, st.sampled_from([api.PeerView, api.NodeStatus, api.ModelView, api.PlanView, api.Finished]))
def test_anything_else_is_malformed_and_nothing_worse(value: object, kind: type) -> None:
    with pytest.raises(MalformedError):
        from_json(kind, value)  # type: ignore[arg-type]


@given(json_values, st.sampled_from(sorted(EVENTS)), st.data())
def test_a_damaged_event_is_malformed_or_still_an_event(value: object, name: str, data: st.DataObject) -> None:
    line = dict(event_to_json(finished())) | {"event": name}
    line[data.draw(st.sampled_from(sorted(line)))] = value  # type: ignore[assignment]
    with contextlib.suppress(MalformedError):
        event_from_json(line)


def test_a_number_is_not_a_boolean() -> None:
    line = dict(event_to_json(api.Token(1, 2, "x"))) | {"step": True}
    with pytest.raises(MalformedError, match="step"):
        event_from_json(line)


def test_unknown_keys_of_a_newer_daemon_are_ignored() -> None:
    line = dict(event_to_json(api.Token(1, 2, "x"))) | {"news": 1}
    assert event_from_json(line) == api.Token(1, 2, "x")


@pytest.mark.parametrize("error", [NotFoundError("a", "b"), VerificationError("c"), NexusError("d", "e")])
def test_an_error_survives_http(error: NexusError) -> None:
    back = error_of(json.loads(json.dumps(problem_of(error))))
    assert type(back) is type(error)
    assert (back.cause, back.fix, back.code, back.exit_code) == (error.cause, error.fix, error.code, error.exit_code)


def test_an_error_of_a_newer_daemon_keeps_its_exit_code() -> None:
    back = error_of({"code": "new-kind", "exit_code": 7, "detail": "x", "fix": "y"})
    assert (back.code, back.exit_code, back.cause) == ("new-kind", 7, "x")
    assert NexusError.exit_code == 1


@given(st.dictionaries(st.sampled_from(["code", "exit_code", "detail", "fix"]), json_values))
def test_no_problem_text_can_hurt_the_client(problem: dict[str, object]) -> None:
    assert isinstance(error_of(problem), NexusError)  # type: ignore[arg-type]


def test_status_fields_are_all_json() -> None:
    assert {field.name for field in dataclasses.fields(api.Finished)} < set(event_to_json(finished()))
