"""`nexus run` goes on when its daemon is killed and started again, and takes up an answer that another process began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from nexus.core.errors import CapacityError, DaemonNotRunningError, NotFoundError
from nexus.gateway.wire import Json
from nexus.node.api import Planned, ResumeRequest, StreamItem, Token
from nexus.node.progress import Notice
from nexus_cli import resuming
from nexus_cli.client import Daemon
from nexus_cli.resuming import answer_events
from tests.cli.conftest import Cli
from tests.gateway.fake_node import ANSWER, FakeNode, bundle, plan_view

SESSION = bundle().terms.session
PLANNED = Planned(plan_view(), SESSION, SESSION)
Life = list[StreamItem | Exception]


class Daemons(Daemon):
    """One daemon after another at the same socket: what each of them answers."""

    def __init__(self, *lives: Life) -> None:
        self.lives = list(lives)
        self.asked: list[tuple[str, Mapping[str, Json]]] = []

    def stream(self, path: str, body: Mapping[str, Json]) -> Iterator[StreamItem]:
        self.asked.append((path, body))
        for event in self.lives.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "EVERY_S", 0.0)


def tokens(*steps: int) -> list[StreamItem]:
    return [Token(step, 10 + step, "x") for step in steps]


def test_an_answer_goes_on_with_the_next_daemon() -> None:
    gone, starting = DaemonNotRunningError("it went away"), DaemonNotRunningError("nobody answers")
    daemons = Daemons(
        [PLANNED, *tokens(0, 1), gone], [starting], [CapacityError("nobody serves yet")], [PLANNED, *tokens(2), gone], tokens(3)
    )
    seen = list(answer_events(daemons, "/v0/run", {"prompt": "x"}))
    assert [event.step for event in seen if isinstance(event, Token)] == [0, 1, 2, 3]
    assert len([event for event in seen if isinstance(event, Notice)]) == 2
    first: dict[str, Json] = {"answer": SESSION.hex(), "tokens": [10, 11]}
    again = ("/v0/run/resume", first | {"tokens": [10, 11, 12]})
    assert daemons.asked == [("/v0/run", {"prompt": "x"}), *[("/v0/run/resume", first)] * 3, again]


def test_one_that_never_comes_back_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "WAIT_S", 0.0)
    with pytest.raises(DaemonNotRunningError, match="it went away"):
        list(answer_events(Daemons([PLANNED, DaemonNotRunningError("it went away")]), "/v0/run", {}))


def test_what_failed_before_it_began_is_not_repeated() -> None:
    for error in (DaemonNotRunningError("no daemon"), NotFoundError("no model"), CapacityError("no room")):
        with pytest.raises(type(error)):
            list(answer_events(Daemons([error]), "/v0/run", {}))


def test_run_takes_up_an_answer_by_its_id(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "--resume", SESSION.hex()[:12])
    assert (result.code, result.out) == (0, "".join(ANSWER))
    assert node.requests == [ResumeRequest(SESSION.hex()[:12])]
    assert cli("run", "--resume", "00" * 8).code == NotFoundError.exit_code


@pytest.mark.parametrize(
    "arguments",
    [[], ["nano"], ["nano", "hi", "--resume", "00" * 8], ["--resume", "00" * 8, "--seed", "1"], ["--resume", "xyz"]],
)
def test_half_a_question_is_refused(cli: Cli, node: FakeNode, arguments: list[str]) -> None:
    result = cli("run", *arguments)
    assert (result.code, result.out) == (2, "")
    assert not node.requests
