"""A stage that falls silent is suspended everywhere by those who saw it, for a time; liars and minorities suspend nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nexus.core.errors import CapacityError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT
from nexus.core.plan import Plan
from nexus.core.record import Record
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import PeerAddress, Stream
from nexus.node.audit.messages import AUDIT, AUDIT_MESSAGES, Answer, Ask, Declined, Shown, Working
from nexus.node.audit.reading import Unanswered
from nexus.node.standing import Standings
from nexus.node.suspensions import (
    CASES_BURST,
    PULL_EVERY_S,
    SUSPENSIONS,
    TOPIC,
    CaseAsk,
    CaseFound,
    Cases,
    CasesAsk,
    ListedCase,
    Suspensions,
)
from nexus.node.suspensions import (
    MESSAGES as CASE_MESSAGES,
)
from nexus.node.witness import LOOKS_BURST, MESSAGES, WITNESS, Heard, NoWitness, Stated, WitnessAsk, Witnesses
from nexus.proof.audit import (
    CELLS,
    ROW,
    AuditAnswer,
    AuditRequest,
    Cell,
    ChallengeChain,
    OpenedRow,
    Opening,
    SignedAuditAnswer,
    SignedAuditRequest,
)
from nexus.proof.receipts import Receipt, Refusal, SignedReceipt, SignedRefusal, Terms
from nexus.storage.evidence import EvidenceStore
from nexus.swarm.standing import (
    GOOD,
    SILENT,
    SUSPENDED,
    SUSPENSION_MS,
    UNANSWERED,
    Fuse,
    SignedStatement,
    Statement,
    SuspensionCase,
)
from tests.node.test_evidence import inline
from tests.swarm.ring import identity, manifest, plan_for, terms_for

EPOCH_MS = 1_700_000_000_000
MODEL = manifest(profile=EXACT)
CHAIN = ChallengeChain(bytes(32))
ASKED_CELLS = (Cell(0, 0, 0, 0), Cell(1, 0, 1, 0))
Clock = trio.testing.MockClock
Behaviour = Callable[[Stream, AuditRequest], Awaitable[None]]
ACCUSED = 2  # stage 1 of every plan here


def opening(cell: Cell) -> Opening:
    nothing = OpenedRow(b"", ())
    return Opening(cell, nothing, (), (), (), b"", (), nothing)


async def say(stream: Stream, message: Record) -> None:
    await stream.send(AUDIT_MESSAGES.pack(message))


async def answers(stream: Stream, request: AuditRequest, cells: Sequence[Cell] = ASKED_CELLS) -> None:
    await say(stream, Working())
    shown = [opening(cell) for cell in cells]
    own = identity(ACCUSED)
    ids = tuple(one.id for one in shown)
    answer = AuditAnswer(1, request.id, request.session, request.receipt, own.public_key, request.stage, ids)
    await say(stream, Answer(SignedAuditAnswer.sign(answer, own)))
    for one in shown:
        await say(stream, Shown(one))


async def hangs(stream: Stream, request: AuditRequest) -> None:
    await trio.sleep_forever()


async def hangs_up(stream: Stream, request: AuditRequest) -> None:
    await stream.reset()


async def works_for_ever(stream: Stream, request: AuditRequest) -> None:
    while True:
        await say(stream, Working())
        await trio.sleep(2)


def declining(code: str) -> Behaviour:
    async def declines(stream: Stream, request: AuditRequest) -> None:
        own = identity(ACCUSED)
        refusal = Refusal(request.session, own.public_key, request.stage, 0, code, "my dog ate it", "")
        await say(stream, Declined(SignedRefusal.sign(refusal, own)))

    return declines


async def shows_other_cells(stream: Stream, request: AuditRequest) -> None:
    await answers(stream, request, ASKED_CELLS[::-1])


async def stops_half_way(stream: Stream, request: AuditRequest) -> None:
    shown = [opening(cell) for cell in ASKED_CELLS]
    ids, own = tuple(one.id for one in shown), identity(ACCUSED)
    answer = AuditAnswer(1, request.id, request.session, request.receipt, own.public_key, request.stage, ids)
    await say(stream, Answer(SignedAuditAnswer.sign(answer, own)))
    await say(stream, Shown(shown[0]))


class Node:
    def __init__(self, swarm: Swarm, number: int, transport: SimulatedTransport, path: Path) -> None:
        self.identity = identity(number)
        self.key = self.identity.public_key
        self.transport = transport
        self.store = EvidenceStore(path)
        self.standings = Standings(self.store, Fuse(8, 1), 0, now_ms)
        self.suspensions = Suspensions(transport, self.key, self.standings, now_ms, inline)
        self.took_part = True
        self.knows_where = True

        async def cells_of(case: Unanswered) -> Sequence[Cell]:
            return ASKED_CELLS

        def find(node: bytes) -> PeerAddress | None:
            return next((one.address for one in swarm.nodes if one.key == node), None) if self.knows_where else None

        self.witnesses = Witnesses(
            transport,
            self.identity,
            self.standings,
            self.suspensions,
            cells_of,
            lambda session: self.took_part,
            find,
            now_ms,
        )

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.transport.peer_id, self.transport.addresses)

    def state_of(self, number: int) -> str:
        return self.standings.of(identity(number).public_key).state


def now_ms() -> int:
    return EPOCH_MS + int(trio.current_time() * 1000)


class Swarm:
    """Node 0 coordinates a plan of four stages on nodes 1 to 4; node 5 looks on."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self.network = SimulatedNetwork(3)
        self.nodes: list[Node] = []
        self.asked: list[str] = []

    async def start(self, behaviour: Behaviour, nodes: int = 6) -> None:
        for number in range(nodes):
            node = await self.node(number)
            if number == ACCUSED:
                node.transport.serve(AUDIT, self._audited(behaviour))
        for node in self.nodes:
            for other in self.nodes[: self.nodes.index(node)]:
                await node.transport.connect(other.transport.addresses[0])

    async def node(self, number: int) -> Node:
        transport = await self._nursery.start(self._hold, number)
        node = Node(self, number, transport, self._directory / f"{number}.db")
        node.witnesses.start()
        await self._nursery.start(node.suspensions.run)
        self.nodes.append(node)
        return node

    async def _hold(self, number: int, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity(number)) as transport:
            task_status.started(transport)
            await trio.sleep_forever()

    def _audited(self, behaviour: Behaviour) -> Callable[[Stream], Awaitable[None]]:
        async def handle(stream: Stream) -> None:
            message = AUDIT_MESSAGES.unpack(await stream.receive())
            assert isinstance(message, Ask)
            self.asked.append(stream.peer_id)
            await behaviour(stream, message.request.verify())

        return handle

    async def settle(self) -> None:
        await trio.sleep(20)

    def states(self, but: Sequence[int] = (ACCUSED,)) -> set[str]:
        """What the others think of the accused."""
        return {node.state_of(ACCUSED) for number, node in enumerate(self.nodes) if number not in but}


@pytest.fixture
def swarm(nursery: trio.Nursery, tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(nursery, tmp_path)
    yield swarm
    for node in swarm.nodes:
        node.store.close()


def session(stages: int = 4, nonce: bytes = bytes(16)) -> tuple[Terms, Plan]:
    plan = plan_for(MODEL, stages)
    return replace(terms_for(MODEL, plan, [b"\0" * 4], 8), challenge=CHAIN.head, nonce=nonce), plan


def receipt_of(terms: Terms, plan: Plan, signer: Identity | None = None) -> SignedReceipt:
    own, some = identity(ACCUSED), leaf_hash(b"some")
    receipt = Receipt(
        spec=1,
        profile=EXACT,
        model_root=MODEL.root,
        session=terms.session,
        node=own.public_key,
        stage=ACCUSED - 1,
        step0=0,
        n=2,
        kv_len=2,
        request=some,
        parent=some,
        prev=b"",
        in_root=some,
        out_root=some,
        kv_root=some,
        trace_root=some,
    )
    return SignedReceipt.sign(receipt, signer or own)


def unanswered(stages: int = 4, nonce: bytes = bytes(16), **changes: object) -> Unanswered:
    terms, plan = session(stages, nonce)
    receipt = receipt_of(terms, plan)
    coordinator = identity(0)
    request = AuditRequest(
        spec=1,
        coordinator=coordinator.public_key,
        session=terms.session,
        stage=ACCUSED - 1,
        receipt=receipt.receipt.id,
        index=0,
        reveal=CHAIN.reveal(0),
        kind=CELLS,
        count=2,
        cells=(),
    )
    request = replace(request, **changes)  # type: ignore[arg-type]
    return Unanswered(terms, plan, SignedAuditRequest.sign(request, coordinator), receipt, ASKED_CELLS)


def question(case: Unanswered) -> WitnessAsk:
    return WitnessAsk(case.terms, case.plan, case.receipt.receipt.node, (case.request,), (case.receipt,))


async def ask(swarm: Swarm, asked: WitnessAsk, witness: int = 1, asker: int = 0) -> Record:
    """What a witness says in the end."""
    stream = await swarm.nodes[asker].transport.open_stream(swarm.nodes[witness].transport.peer_id, WITNESS)
    await stream.send(MESSAGES.pack(asked))
    said: Record = Working()
    while True:
        try:
            said = MESSAGES.unpack(await stream.receive())
        except trio.EndOfChannel:
            return said


def case_by(speakers: Sequence[int], cause: str = UNANSWERED, **changes: object) -> SuspensionCase:
    terms, plan = session(**changes)  # type: ignore[arg-type]
    statements = []
    for speaker in speakers:
        own = identity(speaker)
        said = Statement(1, own.public_key, identity(ACCUSED).public_key, terms.session, cause, now_ms())
        statements.append(SignedStatement.sign(said, own))
    return SuspensionCase(1, terms, plan, tuple(statements))


# --- the silent are suspended ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour",
    [hangs, hangs_up, works_for_ever, declining("local"), declining("capacity"), shows_other_cells, stops_half_way],
    ids=["hangs", "hangs up", "works for ever", "declines", "always busy", "shows other cells", "stops half-way"],
)
async def test_a_silent_cheater_is_suspended_everywhere_and_free_again_after_an_hour(
    swarm: Swarm, autojump_clock: Clock, behaviour: Behaviour
) -> None:
    await swarm.start(behaviour)
    assert swarm.states() == {GOOD}
    assert await swarm.nodes[0].witnesses.unanswered(unanswered()) is None
    assert set(swarm.asked) == {identity(number).peer_id for number in (1, 3, 4)}
    await swarm.settle()
    assert swarm.states() == {SUSPENDED}
    for node in swarm.nodes:
        assert not node.standings.may_work(identity(ACCUSED).public_key)
        assert not node.standings.is_slashed(identity(ACCUSED).public_key)
        assert {node.state_of(number) for number in (0, 1, 3, 4, 5)} == {GOOD}
    await trio.sleep(SUSPENSION_MS / 1000)
    assert swarm.states() == {GOOD}
    assert not any(node.suspensions.cases() for node in swarm.nodes)


async def test_one_witness_that_says_nothing_saves_nobody(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    swarm.network.crash(swarm.nodes[4].transport.peer_id)
    await swarm.nodes[0].witnesses.unanswered(unanswered())
    await swarm.settle()
    assert swarm.states(but=(ACCUSED, 4)) == {SUSPENDED}


async def test_a_stage_that_is_gone_is_suspended_for_silence_and_one_that_is_there_is_not(
    swarm: Swarm, autojump_clock: Clock
) -> None:
    await swarm.start(answers)
    terms, plan = session()
    accused = identity(ACCUSED)
    await swarm.nodes[0].witnesses.silent(terms, plan, accused.public_key)
    await swarm.settle()
    assert swarm.states() == {GOOD}
    swarm.network.crash(accused.peer_id)
    await swarm.nodes[0].witnesses.silent(terms, plan, accused.public_key)
    await swarm.settle()
    assert swarm.states() == {SUSPENDED}
    found = swarm.nodes[5].standings.suspension_of(accused.public_key)
    assert found is not None
    assert found.cause == SILENT


# --- nobody else is -------------------------------------------------------------------------------------------------------------


async def test_a_stage_that_answers_its_witnesses_is_audited_through_them(swarm: Swarm, autojump_clock: Clock) -> None:
    """To the coordinator it said nothing, or the coordinator says so."""
    await swarm.start(answers)
    answered = await swarm.nodes[0].witnesses.unanswered(unanswered())
    assert answered is not None
    assert [one.cell for one in answered.openings] == list(ASKED_CELLS)
    assert answered.answer.verify().node == identity(ACCUSED).public_key
    await swarm.settle()
    assert swarm.states() == {GOOD}


async def test_one_that_is_busy_is_asked_again(swarm: Swarm, autojump_clock: Clock) -> None:
    async def busy_at_first(stream: Stream, request: AuditRequest) -> None:
        await (answers if trio.current_time() > 15 else declining("capacity"))(stream, request)

    await swarm.start(busy_at_first)
    assert await swarm.nodes[0].witnesses.unanswered(unanswered()) is not None
    await swarm.settle()
    assert swarm.states() == {GOOD}


async def test_a_coordinator_that_throws_answers_away_gets_no_statement(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(answers)
    for witness in (1, 3, 4):
        assert isinstance(await ask(swarm, question(unanswered()), witness), Shown)
    with pytest.raises(VerificationError, match="1 of 4 witnesses agree"):
        await swarm.nodes[0].suspensions.submit(case_by([0]))
    assert swarm.states() == {GOOD}


async def test_a_minority_of_liars_suspends_nobody(swarm: Swarm, autojump_clock: Clock) -> None:
    """The coordinator and one witness: what they sign for is counted by everybody, and is not enough."""
    await swarm.start(answers)
    false = case_by([0, 4])
    for node in swarm.nodes:
        with pytest.raises(VerificationError, match="2 of 4 witnesses agree, 3 have to"):
            await node.suspensions.submit(false)
    await swarm.settle()
    assert swarm.states() == {GOOD}


async def test_a_session_of_few_suspends_nobody(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    assert await swarm.nodes[0].witnesses.unanswered(unanswered(stages=2)) is None
    assert not swarm.asked
    await swarm.settle()
    assert swarm.states() == {GOOD}


async def test_the_word_of_those_on_probation_does_not_count(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    swarm.nodes[0].standings._probation_runs = 1
    assert await swarm.nodes[0].witnesses.unanswered(unanswered()) is None
    assert not swarm.asked


async def test_a_request_that_an_honest_stage_could_not_answer_is_not_witnessed(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    right = question(unanswered())
    other_terms, other_plan = session(nonce=b"another session.")
    of_another = receipt_of(other_terms, other_plan)
    false = [
        (question(unanswered(reveal=bytes(32))), "chain"),
        (question(unanswered(receipt=bytes(32))), "that receipt"),
        (question(unanswered(stage=0)), "not for the accused"),
        (question(unanswered(session=bytes(32))), "no audit of that session"),
        (question(unanswered(coordinator=identity(5).public_key)), "not signed"),
        (question(unanswered(kind=ROW, count=0, cells=ASKED_CELLS[:1])), "no audit of that session"),
        (replace(right, receipt=(receipt_of(right.terms, right.plan, identity(5)),)), "not signed"),
        (replace(right, receipt=(of_another,)), "that receipt"),
        (replace(right, receipt=()), "come together"),
        (replace(right, accused=identity(1).public_key), "no witness by that plan"),
        (replace(right, accused=identity(5).public_key), "no witness by that plan"),
        (replace(right, terms=replace(right.terms, plan_root=bytes(32))), "no witness by that plan"),
    ]
    for asked, because in false:
        for node in swarm.nodes:
            node.witnesses._rates.clear()
        said = await ask(swarm, asked)
        assert isinstance(said, NoWitness), because
        assert because in said.cause
    said = await ask(swarm, right, asker=3)
    assert isinstance(said, NoWitness)
    assert "only the coordinator" in said.cause
    assert not swarm.asked


async def test_a_witness_speaks_only_of_what_it_can_know(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    witness = swarm.nodes[1]
    terms, plan = session()
    silent = WitnessAsk(terms, plan, identity(ACCUSED).public_key, (), ())
    assert isinstance(await ask(swarm, silent), Heard)
    witness.took_part = False
    said = await ask(swarm, silent)
    assert isinstance(said, NoWitness)
    assert "did not serve in that session" in said.cause
    witness.took_part, witness.knows_where = True, False
    await witness.transport.disconnect(identity(ACCUSED).peer_id)
    said = await ask(swarm, silent)
    assert isinstance(said, NoWitness)
    assert "does not know where" in said.cause


async def test_a_witness_puts_one_request_of_a_session_to_the_accused_and_is_not_called_for_ever(
    swarm: Swarm, autojump_clock: Clock
) -> None:
    await swarm.start(answers)
    assert isinstance(await ask(swarm, question(unanswered())), Shown)
    assert isinstance(await ask(swarm, question(unanswered())), Shown)
    said = await ask(swarm, question(unanswered(index=1, reveal=CHAIN.reveal(1))))
    assert isinstance(said, NoWitness)
    assert "another request" in said.cause
    assert len(swarm.asked) == 2
    for number in range(LOOKS_BURST):
        said = await ask(swarm, question(unanswered(nonce=bytes([number]) * 16)))
    assert isinstance(said, NoWitness)
    assert "too often" in said.cause


async def test_false_statements_of_a_witness_are_not_counted(
    swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answers with the statement of somebody else, one with one about another session."""
    await swarm.start(hangs)

    def lying(statement: SignedStatement) -> Callable[[Stream, WitnessAsk], Awaitable[None]]:
        async def lie(stream: Stream, asked: WitnessAsk) -> None:
            await stream.send(MESSAGES.pack(Stated(statement)))

        return lie

    copied = case_by([1]).statements[0]
    elsewhere = case_by([4], nonce=b"another session.").statements[0]
    for number, statement in ((3, copied), (4, elsewhere)):
        monkeypatch.setattr(swarm.nodes[number].witnesses, "_look", lying(statement))
    await swarm.nodes[0].witnesses.unanswered(unanswered())
    await swarm.settle()
    assert swarm.states() == {GOOD}


# --- cases travel ---------------------------------------------------------------------------------------------------------------


async def test_a_node_that_comes_later_learns_of_it_at_contact(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    await swarm.nodes[0].suspensions.submit(case_by([0, 1, 3]))
    await swarm.settle()
    late = await swarm.node(6)
    await late.transport.connect(swarm.nodes[5].transport.addresses[0])
    await swarm.settle()
    assert late.state_of(ACCUSED) == SUSPENDED


async def test_a_case_is_published_once_and_repeating_it_prolongs_nothing(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)
    heard: list[bytes] = []

    async def listen() -> None:
        async with swarm.nodes[5].transport.subscribe(TOPIC) as messages:
            async for message in messages:
                heard.append(message.data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        first = await swarm.nodes[0].suspensions.submit(case_by([0, 1, 3]))
        await swarm.settle()
        again = await swarm.nodes[0].suspensions.submit(case_by([0, 1, 3]))  # the same words, said later
        assert again == first
        await trio.sleep(2 * PULL_EVERY_S)
        assert len(set(heard)) == 1
        assert len(heard) <= len(swarm.nodes) - 1  # from every other node once at the most
        for node in swarm.nodes:
            assert node.standings.suspension_of(identity(ACCUSED).public_key) == first
        nursery.cancel_scope.cancel()


async def test_a_flood_of_cases_costs_a_peer_its_turn(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs, nodes=3)
    served: list[bytes] = []

    async def flood(stream: Stream) -> None:
        while True:
            try:
                message = CASE_MESSAGES.unpack(await stream.receive())
            except trio.EndOfChannel:
                return
            if isinstance(message, CasesAsk):
                entries = tuple(ListedCase(bytes([number]) * 32, leaf_hash(bytes([number]))) for number in range(200))
                await stream.send(CASE_MESSAGES.pack(Cases(entries)))
            elif isinstance(message, CaseAsk):
                served.append(message.case)
                await stream.send(CASE_MESSAGES.pack(CaseFound(case_by([0]).to_bytes())))

    hostile = await swarm._nursery.start(swarm._hold, 9)
    hostile.serve(SUSPENSIONS, flood)
    await hostile.connect(swarm.nodes[0].transport.addresses[0])
    await trio.sleep(3600)
    assert 0 < len(served) < CASES_BURST
    assert swarm.states() == {GOOD}


async def test_a_case_is_not_believed_for_being_listed(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs, nodes=3)
    node = swarm.nodes[0]
    for content in (b"garbage", case_by([0, 4]).to_bytes(), case_by([0, 1, 3]).to_bytes()):

        async def serve(stream: Stream, content: bytes = content) -> None:
            while True:
                try:
                    message = CASE_MESSAGES.unpack(await stream.receive())
                except trio.EndOfChannel:
                    return
                wrong = ListedCase(identity(3).public_key, leaf_hash(content))
                await stream.send(CASE_MESSAGES.pack(Cases((wrong,)) if isinstance(message, CasesAsk) else CaseFound(content)))

        number = 10 + len(content) % 50
        hostile = await swarm._nursery.start(swarm._hold, number)
        hostile.serve(SUSPENSIONS, serve)
        await hostile.connect(node.transport.addresses[0])
        await swarm.settle()
    assert swarm.states() == {GOOD}
    assert node.state_of(3) == GOOD


async def test_errors_of_a_full_disk_suspend_nobody_and_break_nothing(
    swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await swarm.start(hangs)

    def full(*args: object) -> None:
        raise CapacityError("too many nodes are suspended at once")

    monkeypatch.setattr(swarm.nodes[0].standings, "suspend", full)
    assert await swarm.nodes[0].witnesses.unanswered(unanswered()) is None
    assert swarm.states() == {GOOD}


async def test_a_witness_without_the_session_in_its_store_says_nothing(swarm: Swarm, autojump_clock: Clock) -> None:
    await swarm.start(hangs)

    async def forgotten(case: Unanswered) -> Sequence[Cell]:
        raise NotFoundError("that session is not kept here any more")

    swarm.nodes[1].witnesses._cells_of = forgotten
    said = await ask(swarm, question(unanswered()))
    assert isinstance(said, NoWitness)
    assert not swarm.asked
