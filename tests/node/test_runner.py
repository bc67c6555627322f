"""A user's request from end to end over real stages on a simulated network: it is run, kept and audited."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from nexus.core.audits import CONVICTED, DUAL, LIGHT, OFF, OK, REPLICA, UNAUDITED
from nexus.core.errors import CapacityError, NotAllowedError, UsageError, VerificationError
from nexus.core.keys import public_key_of
from nexus.core.manifest import Manifest
from nexus.core.plan import Plan
from nexus.node import runner as runner_module
from nexus.node.api import Finished, GenerateRequest, Planned, Token
from nexus.node.attacks import Means, conduct_of
from nexus.node.audit.asking import Auditor
from nexus.node.audit.sessions import SessionAudits
from nexus.node.environment import SYSTEM, Environment
from nexus.node.infer.coordinator import Coordinator
from nexus.node.runner import Runner
from nexus.proof.audit import StageAudit
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import Evidence
from nexus.storage.answers import AnswerStore
from nexus.storage.sessions import SessionStore
from nexus.swarm.membership import NodeRecord
from nexus.swarm.session import Result
from tests.engine.conftest import Folder
from tests.node.audited_swarm import AuditedSwarm, Tampered, audited_swarm
from tests.swarm.node_records import holding, node_record
from tests.swarm.ring import identity

Models = Callable[[str], tuple[Manifest, Folder]]
NOW_MS = 1_700_000_000_000


@dataclass
class Home:
    """A node that runs requests, with the rest of the swarm around it."""

    nodes: AuditedSwarm
    runner: Runner
    audits: SessionAudits
    noted: list[StageAudit]
    judged: list[Plan]
    unpaid: list[set[bytes]]
    proofs: list[Evidence]

    async def run(self, verify: str | None = None, receipts: bool = True, max_tokens: int = 12) -> Finished:
        request = GenerateRequest("tiny", "abc def", max_tokens=max_tokens, stages=2, verify=verify, receipts=receipts)
        with trio.fail_after(60):
            async for event in self.runner.generate(request):
                if isinstance(event, Finished):
                    return event
        raise AssertionError


@asynccontextmanager
async def home(
    model: tuple[Manifest, Folder],
    directory: Path,
    others: int = 2,
    cheats: Mapping[int, Tampered] | None = None,
    auditor: Callable[[AuditedSwarm], Auditor] = AuditedSwarm.auditor,
    answers: AnswerStore | None = None,
) -> AsyncIterator[Home]:
    """`others`: nodes that serve; this one does not. `answers`: where answers are written down."""
    manifest = model[0]
    async with audited_swarm(model, directory, others, cheats) as nodes, trio.open_nursery() as nursery:

        def record(number: int, serves: int) -> NodeRecord:
            addresses = nodes.sources[number - 1].addresses if number else nodes.transport.addresses
            own = identity(number).public_key
            models = (holding("tiny", manifest.root, (0, manifest.layers)),)
            return node_record(own, issued_ms=NOW_MS, name=f"n{number}", addresses=addresses, serves=serves, models=models)

        async def import_builtin(name: str) -> None:
            raise AssertionError

        async def judge(plan: Plan, manifest: Manifest, copies: Sequence[Plan]) -> None:
            judged.append(plan)

        async def settle(bundle: Bundle, prices: Mapping[bytes, int], forfeited: Collection[bytes]) -> None:
            unpaid.append(set(forfeited))

        unpaid: list[set[bytes]] = []
        judged: list[Plan] = []
        noted: list[StageAudit] = []
        proofs: list[Evidence] = []

        async def convicted(evidence: Evidence) -> None:
            proofs.append(evidence)

        store = SessionStore(directory / "own.db", keep_max_bytes=1 << 30, keep_s=1e6, now_ms=lambda: NOW_MS)
        audits = SessionAudits(
            auditor(nodes), store, lambda _: nodes.sources, lambda: {identity(1).peer_id: "n1"}, noted.append, lambda: NOW_MS
        )
        runner = Runner(
            nodes.transport,
            identity(0),
            nodes.models,
            lambda: [record(number + 1, 1) for number in range(others)],
            lambda: record(0, 0),
            nursery,
            4,
            import_builtin,
            judge,
            audits,
            convicted,
            settle,
            answers=answers,
            environment=Environment(lambda: NOW_MS, random.Random(1), SYSTEM.perf_counter),  # the same plans in every run
        )
        try:
            yield Home(nodes, runner, audits, noted, judged, unpaid, proofs)
        finally:
            nursery.cancel_scope.cancel()
            store.close()


@pytest.fixture
def tiny(exact_model: Models) -> tuple[Manifest, Folder]:
    return exact_model("llama")


async def test_an_answer_is_kept_and_audited_by_the_policy(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path) as here:
        done = await here.run()
        assert done.audit
        assert [(stage.mode, stage.verdict) for stage in done.audit.stages] == [(LIGHT, OK)] * 2
        assert len(here.judged) == 1
        (listed,) = await here.audits.listed()
        assert listed.session == done.audit.session == done.bundle.terms.session
        assert listed.audits == 1
        shown = await here.audits.shown(listed.session.hex()[:8])
        assert shown.audits == (done.audit,)
        assert shown.steps == 12

        async def progress(phase: str, done: int, total: int) -> None:
            pass

        again = await here.audits.audit(listed.session.hex()[:8], REPLICA, progress)
        assert [(stage.mode, stage.verdict) for stage in again.stages] == [(REPLICA, OK)] * 2
        assert len((await here.audits.shown(listed.session.hex())).audits) == 2
        assert [(one.node, one.verdict) for one in here.noted] == [(stage.node, OK) for stage in done.bundle.plan.stages] * 2


async def test_an_answer_that_nobody_wants_any_more_breaks_nothing(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    """Its coordinator may be about to hand on a token when the channel closes; an error there would end the node."""

    class Eager:
        evidence = ()

        async def run(self, emit: Callable[[Result], Awaitable[None]]) -> None:
            while True:
                await emit(Result(0, b""))

    async with home(tiny, tmp_path) as here:
        events = here.runner._drive(cast(Coordinator, Eager()))
        await anext(events)
        await trio.testing.wait_all_tasks_blocked()
        await events.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await here.run(OFF)).completion_tokens


async def test_off_is_off_and_said_so(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path) as here:
        done = await here.run(OFF)
        assert done.audit
        assert {stage.verdict for stage in done.audit.stages} == {UNAUDITED}
        assert (await here.run(receipts=False)).audit is None
        with pytest.raises(UsageError, match="without receipts"):
            await here.run(LIGHT, receipts=False)


async def test_a_cheated_answer_is_shown_as_one(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path, cheats={0: Tampered("swapped-weights", tiny[1])}) as here:
        done = await here.run(REPLICA)
        assert done.audit
        convicted = [stage for stage in done.audit.stages if stage.verdict == CONVICTED]
        assert [stage.peer_id for stage in convicted] == [identity(1).peer_id]
        assert convicted[0].name == "n1"
        assert convicted[0].evidence == here.nodes.heard.evidence[0].id
        await trio.testing.wait_all_tasks_blocked()
        assert here.unpaid == [{identity(1).public_key}]


async def test_a_dual_execution_compares_two_sets_of_nodes(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path, others=4) as here:
        done = await here.run(DUAL)
        assert done.audit
        assert [(stage.mode, stage.verdict) for stage in done.audit.stages] == [(DUAL, OK)] * 2
        sessions = await here.audits.listed()
        assert len(sessions) == 2
        nodes = [stage.node for plan in {plan.root: plan for plan in here.judged}.values() for stage in plan.stages]
        assert len(set(nodes)) == len(nodes) == 4


@pytest.mark.parametrize("cheater", range(4))
async def test_of_two_runs_that_differ_the_wrong_one_is_found(tiny: tuple[Manifest, Folder], tmp_path: Path, cheater: int) -> None:
    async with home(tiny, tmp_path, others=4, cheats={cheater: Tampered("swapped-weights", tiny[1])}) as here:
        done = await here.run(DUAL, max_tokens=24)
        assert done.audit
        assert [evidence.accused for evidence in here.nodes.heard.evidence] == [identity(cheater + 1).public_key]
        mine = {stage.peer_id for stage in done.audit.stages}
        wrong = [stage.peer_id for stage in done.audit.stages if stage.verdict == CONVICTED]
        assert wrong == ([identity(cheater + 1).peer_id] if identity(cheater + 1).peer_id in mine else [])


async def test_a_dual_execution_without_enough_nodes_does_not_begin(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path, others=3) as here:
        with pytest.raises(CapacityError, match="two sets of nodes"):
            await here.run(DUAL)
        assert not await here.audits.listed()


async def test_a_canary_is_a_request_like_any_other(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with home(tiny, tmp_path) as here:
        with trio.fail_after(60):
            await here.runner.canary()
        (kept,) = await here.audits.listed()
        assert kept.audits == 1
        assert {one.verdict for one in here.noted} == {OK}


# --- a node is convicted while it works for this one ------------------------------------------------------------------------------


async def cut_off(here: Home, request: GenerateRequest, after: int | None) -> tuple[list[Token], Finished, str]:
    """Run a request, in which the node of stage 0 is convicted after so many tokens; None: never; 0: before any came out."""
    tokens: list[Token] = []
    plans: list[Planned] = []
    reason = NotAllowedError("it was convicted while the session ran", "Run it again")

    def convict() -> None:
        first = plans[0].plan.stages[0].peer_id
        assert here.runner.end_sessions_with(public_key_of(first), reason) == 1

    async def convict_at_once() -> None:
        while not here.runner._running:
            await trio.lowlevel.checkpoint()
        convict()

    with trio.fail_after(60):
        async with aclosing(here.runner.generate(request)) as events:
            async for event in events:
                if isinstance(event, Planned):
                    plans.append(event)
                    if after == 0 and len(plans) == 1:
                        trio.lowlevel.spawn_system_task(convict_at_once)
                elif isinstance(event, Token):
                    tokens.append(event)
                    if len(tokens) == after:
                        convict()
                elif isinstance(event, Finished):
                    return tokens, event, plans[0].plan.stages[0].peer_id
    raise AssertionError


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("after", [0, 20])
async def test_an_answer_goes_on_without_a_node_that_is_convicted_meanwhile(
    tiny: tuple[Manifest, Folder], tmp_path: Path, temperature: float, after: int
) -> None:
    """Nothing is shown twice, nothing changes, and the receipts are for all of it."""
    request = GenerateRequest("tiny", "abc def", max_tokens=100, stages=2, temperature=temperature, seed=1)
    async with home(tiny, tmp_path / "once", others=4) as here:
        expected, undisturbed, _ = await cut_off(here, request, None)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        tokens, done, convicted = await cut_off(here, request, after)
        assert [(one.step, one.token, one.text) for one in tokens] == [(one.step, one.token, one.text) for one in expected]
        assert done.bundle.outputs == undisturbed.bundle.outputs
        assert convicted not in {stage.peer_id for stage in done.stages}
        assert done.completion_tokens == undisturbed.completion_tokens
        assert done.audit
        assert [stage.verdict for stage in done.audit.stages] == [OK, OK]
        assert not here.runner._cut_off
        assert len(await here.audits.listed()) == 1


async def test_an_answer_that_was_wrong_so_far_fails_when_its_node_is_convicted(
    tiny: tuple[Manifest, Folder], tmp_path: Path
) -> None:
    cheats = {1: Tampered("swapped-weights", tiny[1])}  # it gets the first stage
    request = GenerateRequest("tiny", "abc def", max_tokens=100, stages=2)
    async with home(tiny, tmp_path, others=4, cheats=cheats) as here:
        with pytest.raises(VerificationError, match="step 0 comes out another on the new ones"):
            await cut_off(here, request, 20)
        assert not here.runner._cut_off
        assert not here.runner._running


async def test_a_conviction_of_the_last_node_left_ends_the_answer(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def", max_tokens=100, stages=2)
    async with home(tiny, tmp_path, others=2) as here:
        with pytest.raises(NotAllowedError, match="it was convicted while the session ran"):
            await cut_off(here, request, 20)


async def test_who_spoils_a_session_is_avoided_as_long_as_others_suffice(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    """The answer goes on without it, from where nothing rests on its word."""
    forger = conduct_of("forged-signature", Means(identity(1), tiny[1].stage_files))
    async with home(tiny, tmp_path / "honest", others=3) as here:
        expected = await here.run(max_tokens=20)
    async with home(tiny, tmp_path / "forger", others=3, cheats={0: forger}) as here:
        before = await here.runner.place(tiny[0], 2)
        assert identity(1).public_key in {stage.node for stage in before.plan.stages}
        done = await here.run(max_tokens=20)
        assert done.bundle.outputs == expected.bundle.outputs
        assert identity(1).public_key not in {stage.node for stage in done.bundle.plan.stages}
        for stages, avoided in ((2, True), (3, False)):
            plan = (await here.runner.place(tiny[0], stages)).plan
            assert (identity(1).public_key not in {stage.node for stage in plan.stages}) == avoided


class Silence:
    """Health of nodes of which some are believed to be well and do not answer when they are asked, for so many seconds."""

    def __init__(self, silent: set[bytes], for_s: float = float("inf")) -> None:
        self.silent, self.until_s = silent, trio.current_time() + for_s
        self.noticed: set[bytes] = set()

    async def check(self, nodes: Sequence[bytes]) -> frozenset[bytes]:
        await trio.lowlevel.checkpoint()
        self.noticed |= self.silent & set(nodes)
        return frozenset(node for node in nodes if not self.is_usable(node))

    def is_usable(self, node: bytes) -> bool:
        return node not in self.noticed or trio.current_time() >= self.until_s

    def stuck(self) -> frozenset[bytes]:
        return frozenset(node for node in self.noticed if not self.is_usable(node))


async def test_nodes_that_do_not_answer_get_no_part_and_nobody_waits_for_them(
    tiny: tuple[Manifest, Folder], tmp_path: Path
) -> None:
    async with home(tiny, tmp_path, others=4) as here:
        silence = Silence({identity(number).public_key for number in (1, 3)})
        here.runner._health = silence  # type: ignore[assignment]
        with trio.fail_after(5):
            placement = await here.runner.place(tiny[0], 2)
        assert {stage.node for stage in placement.plan.stages} == {identity(number).public_key for number in (2, 4)}


async def test_where_nothing_can_be_planned_without_them_stuck_nodes_are_waited_for_and_then_it_is_said(
    tiny: tuple[Manifest, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {identity(number).public_key for number in (1, 2)}
    monkeypatch.setattr(runner_module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(runner_module, "PATIENCE_STEP_S", 0.1)
    async with home(tiny, tmp_path) as here:
        here.runner._health = Silence(both, for_s=0.5)  # type: ignore[assignment]
        placement = await here.runner.place(tiny[0], 2)
        assert {stage.node for stage in placement.plan.stages} == both
        here.runner._health = Silence(both)  # type: ignore[assignment]
        with trio.fail_after(5), pytest.raises((CapacityError, UsageError)):
            await here.runner.place(tiny[0], 2)
