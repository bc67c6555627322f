"""Evidence spreads, every node believes only what it verified itself, and hostile peers cost no more than their share."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from nexus.core.errors import CapacityError, LocalError, NotFoundError, UnreachableError, VerificationError
from nexus.core.keys import Identity
from nexus.core.record import Record
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import Stream
from nexus.node import evidence as evidence_module
from nexus.node.environment import SYSTEM
from nexus.node.evidence import (
    EVIDENCE,
    INVALID_MAX,
    MESSAGES,
    PENDING_MAX,
    PULL_AGAIN_S,
    REFUSED_S,
    TOPIC,
    EvidenceAsk,
    EvidenceFound,
    EvidenceService,
    ListAsk,
    Listed,
    ListPage,
    Offload,
)
from nexus.node.standing import Standings
from nexus.proof.accounts import Fork, Share, SignedEntry
from nexus.proof.evidence import FORK, OP, Evidence, Verdict, verify_evidence
from nexus.storage.evidence import EvidenceStore
from nexus.swarm.ledger import Account, Cost, pay_entry
from nexus.swarm.standing import PROBATION, SLASHED, SUSPENDED, Fuse
from tests.swarm.test_standing import NOW_MS, WITNESSES, case

EPOCH_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
T = TypeVar("T")
Clock = trio.testing.MockClock


def identity_of(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def fork(cheater: Identity, amount: int = 200) -> Evidence:
    """Real evidence, by a cheater of our own."""

    def pay(cost: int) -> SignedEntry:
        entry = pay_entry(Account(cheater.public_key), b"s" * 32, Cost(cost, (Share(b"e" * 32, cost * 90 // 100),)))
        return SignedEntry.sign(entry, cheater)

    return Evidence(1, FORK, cheater.public_key, Fork.of(pay(100), pay(amount)).to_bytes())


CHEATERS = [identity_of(1000 + number) for number in range(40)]


async def inline(work: Callable[[], T], /) -> T:
    """Virtual time must not leap while a thread works."""
    await trio.lowlevel.checkpoint()
    return work()


class Node:
    """A running service on the simulated network."""

    def __init__(self, transport: SimulatedTransport, identity: Identity, path: Path, offload: Offload = inline) -> None:
        self.transport = transport
        self.identity = identity
        self.store = EvidenceStore(path)
        self.known_models = False
        self.verified: list[Evidence] = []
        self.standings = Standings(self.store, Fuse(8, HOUR_MS), 2, self.now_ms)
        self.service = EvidenceService(
            transport, identity.public_key, self.store, self.standings, self._verify, replace(SYSTEM, now_ms=self.now_ms), offload
        )
        self.slashed: list[bytes] = []
        self.service.on_slashed.append(self.slashed.append)

    def now_ms(self) -> int:
        return EPOCH_MS + int(trio.current_time() * 1000)

    def _verify(self, evidence: Evidence) -> Verdict:
        self.verified.append(evidence)
        if evidence.kind == OP:
            if not self.known_models:
                raise NotFoundError("the weights of this model are not here")
            return Verdict(evidence.accused, OP, evidence.id, "wrong")
        return verify_evidence(evidence)

    def convicted(self) -> set[bytes]:
        return set(dict(self.standings.slashed.entries()))


class Swarm:
    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self.network = SimulatedNetwork(7)
        self.nodes: list[Node] = []
        self._count = 0

    async def transport(self) -> tuple[SimulatedTransport, Identity]:
        self._count += 1
        identity = identity_of(self._count)
        return await self._nursery.start(self._hold, identity), identity

    async def node(self) -> Node:
        transport, identity = await self.transport()
        node = Node(transport, identity, self._directory / f"{self._count}.db")
        self.nodes.append(node)
        await node.service.load()
        await self._nursery.start(node.service.run)
        return node

    async def hostile(self, handler: Callable[[Stream], Awaitable[None]]) -> SimulatedTransport:
        transport, _ = await self.transport()
        transport.serve(EVIDENCE, handler)
        return transport

    async def _hold(self, identity: Identity, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()


@pytest.fixture
def swarm(nursery: trio.Nursery, tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(nursery, tmp_path)
    yield swarm
    for node in swarm.nodes:
        node.store.close()


async def until(condition: Callable[[], bool], within_s: float) -> None:
    """In virtual time, so looking again and again costs nothing."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.05)


def keys(*cheaters: Identity) -> set[bytes]:
    return {cheater.public_key for cheater in cheaters}


class TestSpreading:
    async def test_everyone_verifies_and_acts_once(self, swarm: Swarm, autojump_clock: Clock) -> None:
        nodes = [await swarm.node() for _ in range(4)]
        for one, other in zip(nodes[1:], nodes, strict=False):
            await one.transport.connect(other.transport.addresses[0])
        await trio.sleep(1)
        cheater = CHEATERS[0]
        verdict = await nodes[0].service.submit(fork(cheater))
        assert verdict.accused == cheater.public_key
        await until(lambda: all(node.convicted() == keys(cheater) for node in nodes), 30)
        for node in nodes:
            assert node.slashed == [cheater.public_key]
            assert [evidence.id for evidence in node.verified] == [verdict.evidence]
            assert node.service.is_slashed(cheater.public_key)
            assert not node.standings.may_work(cheater.public_key)
            assert node.standings.of(cheater.public_key).state == SLASHED
            assert node.store.content(verdict.evidence) == fork(cheater).to_bytes()
        assert {stored.sender for stored in nodes[3].store} == {nodes[2].identity.public_key}

    async def test_partitions_end_in_the_same_set(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """Other evidence on each side, also of the same cheater: the one with the least id is kept everywhere in the end."""
        one, two = await swarm.node(), await swarm.node()
        first, second, both = CHEATERS[:3]
        for cheater in (first, both):
            await one.service.submit(fork(cheater))
        for evidence in (fork(second), fork(both, 300), fork(both, 400)):
            await two.service.submit(evidence)
        await one.transport.connect(two.transport.addresses[0])
        await until(lambda: one.convicted() == two.convicted() == keys(first, second, both), 30)
        await until(lambda: one.standings.slashed == two.standings.slashed, 1000)
        least = min(fork(both, amount).id for amount in (200, 300, 400))
        assert one.standings.slashed.evidence_of(both.public_key) == least
        assert [len(node.slashed) for node in (one, two)] == [3, 3]

    async def test_a_long_list_is_fetched_bit_by_bit(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        for cheater in CHEATERS:
            await one.service.submit(fork(cheater))
        await two.transport.connect(one.transport.addresses[0])
        await trio.sleep(PULL_AGAIN_S / 2)
        assert 0 < len(two.convicted()) < len(CHEATERS)
        await until(lambda: two.convicted() == keys(*CHEATERS), 600)
        assert len(two.verified) == len(CHEATERS)

    async def test_evidence_about_oneself_is_kept_and_passed_on(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two, three = [await swarm.node() for _ in range(3)]
        await one.service.submit(fork(two.identity))
        await two.transport.connect(one.transport.addresses[0])
        await until(lambda: two.service.against_self is not None, 30)
        assert two.slashed == []
        assert len(list(two.store)) == 1
        await three.transport.connect(two.transport.addresses[0])
        await until(lambda: three.convicted() == keys(two.identity), 30)


class TestBelieving:
    async def test_what_does_not_convict_is_neither_kept_nor_told(self, swarm: Swarm, autojump_clock: Clock) -> None:
        node = await swarm.node()
        good = fork(CHEATERS[0])
        for bad in (
            replace(good, accused=CHEATERS[1].public_key),
            replace(good, kind="RUMOUR"),
            replace(good, body=good.body[:-1] + b"?"),
        ):
            with pytest.raises(VerificationError):
                await node.service.submit(bad)
        assert not node.convicted()
        assert not list(node.store)

    async def test_it_is_verified_again_at_start(self, swarm: Swarm, autojump_clock: Clock, tmp_path: Path) -> None:
        node = await swarm.node()
        for cheater in CHEATERS[:3]:
            await node.service.submit(fork(cheater))
        node.known_models = True
        model = replace(fork(CHEATERS[3]), kind=OP)
        await node.service.submit(model)
        path = tmp_path / "1.db"
        node.store.close()
        connection = sqlite3.connect(path)
        connection.execute("UPDATE evidence SET content = ? WHERE offender = ?", (b"x", CHEATERS[0].public_key))
        connection.commit()
        connection.close()
        transport, identity = await swarm.transport()
        again = Node(transport, identity, path)
        swarm.nodes = [again]
        await again.service.load()
        # The damaged one is not believed; the one whose model is gone was verified before it was kept.
        assert again.convicted() == keys(*CHEATERS[1:4])
        assert {evidence.id for evidence in again.verified} == {*(fork(one).id for one in CHEATERS[1:3]), model.id}
        assert again.service.verdict(model.id) is None
        assert again.service.verdict(fork(CHEATERS[1]).id) is not None

    async def test_a_start_takes_no_longer_than_it_may(self, swarm: Swarm, autojump_clock: Clock, tmp_path: Path) -> None:
        """Others decide how much evidence there is and what it takes to verify it. All of it was verified before it was kept."""
        node = await swarm.node()
        for cheater in CHEATERS:
            await node.service.submit(fork(cheater))
        node.store.close()
        transport, identity = await swarm.transport()
        again = Node(transport, identity, tmp_path / "1.db")
        swarm.nodes = [again]
        clock_s = iter(range(10**6))
        again.service._perf_counter = lambda: float(next(clock_s))
        await again.service.load()
        assert again.convicted() == keys(*CHEATERS)
        assert 0 < len(again.verified) <= evidence_module.LOAD_WORK_S

    async def test_evidence_for_an_unknown_model_waits_and_is_not_believed(self, swarm: Swarm, autojump_clock: Clock) -> None:
        one, two = await swarm.node(), await swarm.node()
        one.known_models = True
        for cheater in CHEATERS[: PENDING_MAX + 2]:
            await one.service.submit(replace(fork(cheater), kind=OP))
        await two.transport.connect(one.transport.addresses[0])
        await until(lambda: len(two.verified) > PENDING_MAX, 600)
        assert len(two.service.pending) == PENDING_MAX
        assert not two.convicted()
        assert not list(two.store)
        two.known_models = True
        await until(lambda: two.convicted() == one.convicted(), 3600)
        assert not two.service.pending

    async def test_a_full_disk_does_not_hide_a_cheater(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = await swarm.node(), await swarm.node()
        await one.service.submit(fork(CHEATERS[0]))

        def put(*_: object, **__: object) -> bool:
            raise LocalError("the disk is full")

        monkeypatch.setattr(two.store, "put", put)
        with pytest.raises(LocalError):
            await two.service.submit(fork(CHEATERS[1]))
        await two.transport.connect(one.transport.addresses[0])
        await until(lambda: two.convicted() == keys(*CHEATERS[:2]), 30)
        # It does not list what it cannot show: others would take it for a liar.
        three = await swarm.node()
        await three.transport.connect(two.transport.addresses[0])
        await trio.sleep(60)
        assert three.service._peer(two.transport.peer_id).invalid == 0

    async def test_many_at_once_are_suspended_and_not_burned(self, swarm: Swarm, autojump_clock: Clock) -> None:
        node = await swarm.node()
        await trio.sleep(1)
        for cheater in CHEATERS[:9]:
            await node.service.submit(fork(cheater))
        key = CHEATERS[0].public_key
        assert (node.standings.of(key).state, node.standings.burned) == (SUSPENDED, frozenset())
        assert not node.standings.may_work(key)
        assert node.standings.resume() == 9
        assert (node.standings.of(key).state, node.standings.burned) == (SLASHED, keys(*CHEATERS[:9]))
        assert Standings(node.store, Fuse(8, HOUR_MS), 2, node.now_ms).held == frozenset()


class Liar:
    """Answers questions as it is told, and counts them."""

    def __init__(self, answer: Callable[[Record], Record | bytes]) -> None:
        self.answer = answer
        self.asked: list[Record] = []

    async def handle(self, stream: Stream) -> None:
        while True:
            message = MESSAGES.unpack(await stream.receive())
            self.asked.append(message)
            answer = self.answer(message)
            await stream.send(answer if isinstance(answer, bytes) else MESSAGES.pack(answer))


def listing(*entries: tuple[bytes, bytes], content: bytes = b"") -> Callable[[Record], Record | bytes]:
    """A liar that lists these and hands out the same content for all."""

    def answer(message: Record) -> Record:
        if isinstance(message, ListAsk):
            return ListPage(tuple(Listed(*entry) for entry in entries), 0)
        return EvidenceFound(content)

    return answer


GOOD = fork(CHEATERS[0])
FALSE = replace(GOOD, accused=CHEATERS[1].public_key)


class TestHostilePeers:
    @pytest.mark.parametrize(
        "answer",
        [
            lambda message: b"\x00garbage",
            lambda message: message,
            lambda message: ListPage((Listed(b"b" * 32, b"1" * 32), Listed(b"a" * 32, b"1" * 32)), 0),
            lambda message: ListPage((Listed(b"b" * 32, b"1" * 32),), 1),
            lambda message: ListPage((Listed(b"b" * 32, b"1" * 32),), 0),
            listing((b"b" * 32, b"1" * 32)),
            listing((b"b" * 32, b"1" * 32), content=b"garbage"),
            listing((b"b" * 32, b"1" * 32), content=GOOD.to_bytes()),
            listing((FALSE.accused, FALSE.id), content=FALSE.to_bytes()),
            listing(*((bytes([n]) * 32, b"1" * 32) for n in range(200)), content=b"x" * 10**6),
        ],
        ids=["garbage", "echo", "unsorted", "endless", "no-evidence", "empty", "junk", "another", "false", "many"],
    )
    async def test_a_liar_convicts_nobody_and_is_not_asked_again_for_a_time(
        self, swarm: Swarm, autojump_clock: Clock, answer: Callable[[Record], Record]
    ) -> None:
        node, liar = await swarm.node(), Liar(answer)
        hostile = await swarm.hostile(liar.handle)
        await hostile.connect(node.transport.addresses[0])
        await trio.sleep(INVALID_MAX * 2 * PULL_AGAIN_S)
        asked = len(liar.asked)
        assert 0 < asked <= 3 * INVALID_MAX
        await trio.sleep(REFUSED_S - INVALID_MAX * 2 * PULL_AGAIN_S - 10)
        assert len(liar.asked) <= max(asked, INVALID_MAX * 3)
        assert not node.convicted()
        assert not node.slashed
        assert not list(node.store)

    async def test_true_evidence_counts_whoever_brings_it(self, swarm: Swarm, autojump_clock: Clock) -> None:
        node, liar = await swarm.node(), Liar(listing((GOOD.accused, GOOD.id), content=GOOD.to_bytes()))
        hostile = await swarm.hostile(liar.handle)
        await hostile.connect(node.transport.addresses[0])
        await until(lambda: node.convicted() == {GOOD.accused}, 30)

    async def test_a_flood_of_gossip_costs_a_bounded_number_of_questions(self, swarm: Swarm, autojump_clock: Clock) -> None:
        node, liar = await swarm.node(), Liar(listing())
        hostile = await swarm.hostile(liar.handle)
        await hostile.connect(node.transport.addresses[0])
        for number in range(300):
            await hostile.publish(TOPIC, Listed(number.to_bytes(32, "big"), b"1" * 32).to_bytes())
            await hostile.publish(TOPIC, b"garbage")
            await trio.sleep(0.2)
        assert sum(isinstance(message, EvidenceAsk) for message in liar.asked) <= INVALID_MAX

    async def test_endless_true_evidence_is_judged_at_a_bounded_rate(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evidence_module, "CHECKS_BURST", 4.0)
        monkeypatch.setattr(evidence_module, "CHECKS_PER_S", 0.05)
        one, two = await swarm.node(), await swarm.node()
        for cheater in CHEATERS:
            await one.service.submit(fork(cheater))
        await two.transport.connect(one.transport.addresses[0])
        await trio.sleep(100)
        assert 4 <= len(two.verified) <= 4 + 100 * 0.05 + 2

    @pytest.mark.parametrize("content", [b"", b"garbage", fork(CHEATERS[1]).to_bytes()], ids=["nothing", "junk", "another"])
    async def test_a_liar_does_not_make_true_evidence_worthless(self, swarm: Swarm, autojump_clock: Clock, content: bytes) -> None:
        """A cheater's friend lists the very evidence against it, and hands out something else."""
        node, liar = await swarm.node(), Liar(listing((GOOD.accused, GOOD.id), content=content))
        hostile = await swarm.hostile(liar.handle)
        await hostile.connect(node.transport.addresses[0])
        await until(lambda: EvidenceAsk(GOOD.id) in liar.asked, 30)
        honest = await swarm.node()
        await honest.service.submit(GOOD)
        await honest.transport.connect(node.transport.addresses[0])
        await until(lambda: node.convicted() == {GOOD.accused}, 60)

    async def test_peers_that_never_answer_do_not_keep_others_from_being_asked(self, swarm: Swarm, autojump_clock: Clock) -> None:
        async def silent(stream: Stream) -> None:
            await trio.sleep_forever()

        node, honest = await swarm.node(), await swarm.node()
        await honest.service.submit(GOOD)
        hostile = [await swarm.hostile(silent) for _ in range(96)]
        first = [one for one in hostile if one.peer_id < honest.transport.peer_id][:32]
        assert len(first) == 32
        for one in first:
            await one.connect(node.transport.addresses[0])
        await trio.sleep(60)
        await honest.transport.connect(node.transport.addresses[0])
        await until(lambda: node.convicted() == {GOOD.accused}, 600)

    async def test_cheaters_made_to_fill_the_budget_do_not_hide_one_that_is_known(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evidence_module, "CHECKS_BURST", 4.0)
        monkeypatch.setattr(evidence_module, "CHECKS_PER_S", 0.001)
        one, two = await swarm.node(), await swarm.node()
        for cheater in CHEATERS:
            await one.service.submit(fork(cheater))
        await two.transport.connect(one.transport.addresses[0])
        await trio.sleep(60)
        known = identity_of(5000)
        assert 0 < len(two.convicted()) < len(CHEATERS)
        two.service._is_known = lambda public_key: public_key == known.public_key
        await one.service.submit(fork(known))
        await until(lambda: known.public_key in two.convicted(), 60)

    async def test_dear_evidence_is_judged_seldom(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """Who brings evidence pays for the time that it takes to verify, not for the number of pieces."""
        clock_s = iter(range(0, 10**6, 6))
        one, two = await swarm.node(), await swarm.node()
        one.service._perf_counter = two.service._perf_counter = lambda: float(next(clock_s))
        for cheater in CHEATERS:
            await one.service.submit(fork(cheater))
        await two.transport.connect(one.transport.addresses[0])
        await trio.sleep(600)
        assert len(two.verified) * 6 <= 600 / 20 + 6

    async def test_whoever_asks_too_much_is_cut_off(self, swarm: Swarm, autojump_clock: Clock) -> None:
        node = await swarm.node()
        transport, _ = await swarm.transport()
        await transport.connect(node.transport.addresses[0])
        stream = await transport.open_stream(node.transport.peer_id, EVIDENCE)
        await stream.send(MESSAGES.pack(EvidenceFound(b"")))
        with pytest.raises((trio.EndOfChannel, UnreachableError)):
            await stream.receive()
        stream = await transport.open_stream(node.transport.peer_id, EVIDENCE)
        await stream.send(MESSAGES.pack(EvidenceAsk(b"x" * 32)))
        assert MESSAGES.unpack(await stream.receive()) == EvidenceFound(b"")
        await stream.close()

    async def test_lesser_ids_without_end_are_taken_slowly(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """A convicted cheater can make as much evidence against itself as it likes."""
        node = await swarm.node()
        ordered = sorted((fork(CHEATERS[0], 200 + 10 * n) for n in range(30)), key=lambda one: one.id, reverse=True)
        await node.service.submit(ordered[0])
        current = [ordered[0]]

        def answer(message: Record) -> Record:
            if isinstance(message, ListAsk):
                current[0] = ordered[min(ordered.index(current[0]) + 1, 29)]
                return ListPage((Listed(current[0].accused, current[0].id),), 0)
            return EvidenceFound(current[0].to_bytes())

        hostile = await swarm.hostile(Liar(answer).handle)
        await hostile.connect(node.transport.addresses[0])
        for _ in range(96):
            current[0] = ordered[min(ordered.index(current[0]) + 1, 29)]
            await hostile.publish(TOPIC, Listed(current[0].accused, current[0].id).to_bytes())
            await trio.sleep(1)
        assert len(node.verified) <= 1 + 3
        assert node.slashed == [CHEATERS[0].public_key]


async def test_standings_are_kept(tmp_path: Path, autojump_clock: Clock) -> None:
    store = EvidenceStore(tmp_path / "e.db")
    standings = Standings(store, Fuse(8, HOUR_MS), 2, lambda: EPOCH_MS)
    key = CHEATERS[0].public_key
    assert standings.of(key).state == PROBATION
    standings.note_audit(key, True)
    standings.note_run(key, slow=True)
    standings.save()
    again = Standings(store, Fuse(8, HOUR_MS), 2, lambda: EPOCH_MS)
    assert again.tally(key) == standings.tally(key)
    assert (again.tally(key).audits_ok, again.tally(key).slow) == (1, 1)
    store.close()


async def test_a_set_that_is_full_says_so(tmp_path: Path, autojump_clock: Clock) -> None:
    store = EvidenceStore(tmp_path / "e.db")
    standings = Standings(store, Fuse(8, HOUR_MS), 2, lambda: EPOCH_MS)
    standings.slashed._most = 0
    with pytest.raises(CapacityError):
        standings.convict(b"a" * 32, b"e" * 32, FORK, 5)
    assert standings.known_ms(b"a" * 32) == 0
    store.close()


async def test_witnesses_in_good_standing_suspend_for_a_time(tmp_path: Path, autojump_clock: Clock) -> None:
    store = EvidenceStore(tmp_path / "e.db")
    now_ms, said = [NOW_MS], case(WITNESSES[1:4])
    standings = Standings(store, Fuse(8, HOUR_MS), 2, lambda: now_ms[0])
    with pytest.raises(VerificationError, match="suspend nobody"):
        standings.suspend(said)  # on probation nobody's word counts
    for witness in WITNESSES[1:]:
        for _ in range(2):
            standings.note_audit(witness.public_key, True)
    standings.suspend(said)
    key = WITNESSES[0].public_key
    assert (standings.of(key).state, standings.may_work(key)) == (SUSPENDED, False)
    assert not Standings(store, Fuse(8, HOUR_MS), 2, lambda: now_ms[0]).may_work(key)
    now_ms[0] += HOUR_MS
    assert standings.may_work(key)
    assert standings.of(key).state == PROBATION
    store.close()
