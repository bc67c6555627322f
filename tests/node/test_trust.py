"""What a node shows of convictions and accounts, and whom it works with: the parts put together, over the simulated network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from nexus.core.errors import NexusError, NotAllowedError, NotFoundError, UsageError
from nexus.core.keys import Identity
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.node.environment import SYSTEM
from nexus.node.options import LedgerOptions
from nexus.node.trust import Trust, open_trust
from nexus.proof.evidence import OP, Evidence, Verdict, verify_evidence
from nexus.storage.home import Home, create_home
from nexus.swarm.ledger import session_cost
from nexus.swarm.membership import NodeRecord
from nexus.swarm.standing import GOOD, PROBATION, SLASHED, SUSPENDED
from tests.node.test_evidence import CHEATERS, fork, identity_of
from tests.node.test_ledger import Node, bundle
from tests.swarm.node_records import node_record

OPTIONS = LedgerOptions(price_per_token=10, credit_max=1000, burn_max=2, burn_window_s=3600.0, price_max=1000)
ENVIRONMENT = replace(SYSTEM, now_ms=lambda: 1_700_000_000_000)
ONE, TWO = identity_of(1), identity_of(2)


def verify(evidence: Evidence) -> Verdict:
    if evidence.kind == OP:
        raise NotFoundError("the weights are not here")
    return verify_evidence(evidence)


@asynccontextmanager
async def opened(network: SimulatedNetwork, home: Home, identity: Identity) -> AsyncIterator[tuple[Trust, SimulatedTransport]]:
    async with (
        network.open(identity) as transport,
        open_trust(home, identity, transport, OPTIONS, 2, verify, dict, ENVIRONMENT) as trust,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(trust.run)
        yield trust, transport
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.02)


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Home, Home]:
    return create_home(tmp_path / "one"), create_home(tmp_path / "two")


async def test_a_convicted_node_is_shown_and_gets_no_work(homes: tuple[Home, Home]) -> None:
    network, cheater = SimulatedNetwork(1), CHEATERS[0]
    async with opened(network, homes[0], ONE) as (one, transport), opened(network, homes[1], TWO) as (two, other):
        verdict = await one.evidence.submit(fork(cheater))
        await transport.connect(other.addresses[0])
        await until(lambda: two.standings.is_slashed(cheater.public_key))
        (view,) = await two.evidence_views()
        assert (view.accused, view.sender, view.state) == (cheater.peer_id, ONE.peer_id, "believed")
        assert view.summary == verdict.summary
        assert (await one.evidence_views())[0].sender == ""
        (slashed,) = await two.slashed_views()
        assert (slashed.peer_id, slashed.state, slashed.evidence) == (cheater.peer_id, SLASHED, verdict.evidence)
        file = await two.evidence_file(view.id.hex()[:8])
        assert Evidence.from_file(file.content) == fork(cheater)
        with pytest.raises(NotAllowedError, match="slashed: convicted by evidence"):
            two.may_open(cheater.public_key)
        two.may_open(ONE.public_key)
        two.may_open(TWO.public_key)
        for prefix, error in (("abc", NotFoundError), ("ffffffff", NotFoundError)):
            with pytest.raises(error):
                await two.evidence_view(prefix)


async def test_convictions_and_accounts_survive_a_restart(homes: tuple[Home, Home]) -> None:
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE) as (one, _):
        await one.evidence.submit(fork(CHEATERS[0]))
        one.standings.note_audit(TWO.public_key, True)
        one.ledger.note_served(TWO.public_key, 1, 10)
    async with opened(network, homes[0], ONE) as (one, _):
        assert one.standings.is_slashed(CHEATERS[0].public_key)
        assert one.standings.tally(TWO.public_key).audits_ok == 1
        assert one.ledger.owed(TWO.public_key) == 90
        assert (await one.evidence_views())[0].state == "believed"


async def test_evidence_that_no_longer_holds_is_shown_and_not_believed(homes: tuple[Home, Home]) -> None:
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE) as (one, _):
        await one.evidence.submit(fork(CHEATERS[0]))
        with one._store._database.transaction() as connection:
            connection.execute("UPDATE evidence SET kind = 'OP'")
    async with opened(network, homes[0], ONE) as (one, _):
        (view,) = await one.evidence_views()
        assert view.state == "not believed"
        assert await one.slashed_views() == []
        one.may_open(CHEATERS[0].public_key)


async def test_the_fuse_is_shown_and_lifted(homes: tuple[Home, Home]) -> None:
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE) as (one, _):
        for cheater in CHEATERS[:3]:
            await one.evidence.submit(fork(cheater))
        assert {view.state for view in await one.slashed_views()} == {SUSPENDED}
        with pytest.raises(NotAllowedError, match="burning is paused"):
            one.may_open(CHEATERS[0].public_key)
        assert await one.resume_burning() == 3
        assert {view.state for view in await one.slashed_views()} == {SLASHED}


async def test_an_account_is_shown_with_what_is_thought_of_its_owner(homes: tuple[Home, Home]) -> None:
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE) as (one, transport), opened(network, homes[1], TWO) as (two, other):
        await transport.connect(other.addresses[0])
        payer, stage = (cast(Node, SimpleNamespace(key=identity.public_key)) for identity in (ONE, TWO))
        two.ledger.note_served(ONE.public_key, 1, 200)
        with pytest.raises(NotAllowedError, match="owes this node"):
            two.may_open(ONE.public_key)
        await one.ledger.pay_for(bundle(b"s" * 32, payer, stage, tokens=100), {TWO.public_key: 10})
        await until(lambda: two.ledger.account.entries == 1)
        two.may_open(ONE.public_key)
        view = await one.ledger_view(TWO.peer_id, 10)
        assert (view.standing, view.bond, view.earned, view.checked, view.entries) == (PROBATION, 900, 900, 1, 1)
        assert [entry.kind for entry in view.chain] == ["EARN"]
        own = await one.ledger_view(ONE.peer_id, 10)
        assert (own.standing, own.balance, own.chain[0].payees) == (GOOD, -1000, (TWO.peer_id,))
        await one.evidence.submit(fork(TWO))
        burned = await one.ledger_view(TWO.peer_id, 10)
        assert (burned.standing, burned.bond, burned.earned) == (SLASHED, 0, 900)
        with pytest.raises(NexusError):
            await one.ledger_view(CHEATERS[0].peer_id, 0)


async def test_a_session_is_settled(homes: tuple[Home, Home]) -> None:
    network, three = SimulatedNetwork(1), identity_of(3)
    async with opened(network, homes[0], ONE) as (one, _):
        nodes = [cast(Node, SimpleNamespace(key=identity.public_key)) for identity in (ONE, TWO, three)]
        prices = {TWO.public_key: 10, three.public_key: 10}
        for number, (forfeited, paid) in enumerate((((), 2), ((TWO.public_key,), 1))):
            await one.settle(bundle(bytes([number]) * 32, *nodes), prices, forfeited)
            chain = await one.ledger.own_chain()
            assert (len(chain.latest), len(chain.latest[-1].entry.shares)) == (number + 1, paid)
        # A ledger that does not work spoils no answer.
        one.ledger.frozen = "broken"
        await one.settle(bundle(b"x" * 32, *nodes), prices, ())
        assert [one.standings.tally(identity.public_key).runs for identity in (ONE, TWO)] == [0, 3]


async def test_who_is_planned_with(homes: tuple[Home, Home]) -> None:
    async with opened(SimulatedNetwork(1), homes[0], ONE) as (one, _):
        records = [node_record(identity_of(n).public_key, speed=1600) for n in (2, 3, 1000)]
        for _ in range(20):
            one.standings.note_run(records[1].node, flaky=True)
        await one.evidence.submit(fork(CHEATERS[0]))
        assert [(record.node, record.exact_speed) for record in one.workers(records)] == [
            (records[0].node, 1600),
            (records[1].node, 100),
        ]


async def test_a_foreign_ledger_freezes_payments_and_nothing_else(homes: tuple[Home, Home]) -> None:
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE):
        pass
    async with opened(network, homes[0], TWO) as (two, _):
        assert "another node" in two.ledger.frozen
        await two.evidence.submit(fork(CHEATERS[0]))
        with pytest.raises(NexusError, match="another node"):
            await two.ledger_view(TWO.peer_id, 0)


async def test_two_that_fit_are_ambiguous(homes: tuple[Home, Home], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.node.trust.PREFIX_MIN", 0)
    async with opened(SimulatedNetwork(1), homes[0], ONE) as (one, _):
        for cheater in CHEATERS[:2]:
            await one.evidence.submit(fork(cheater))
        with pytest.raises(UsageError, match="fits 2"):
            await one.evidence_view("")


async def test_nobody_is_paid_more_than_this_node_pays(homes: tuple[Home, Home]) -> None:
    """One session at the highest price there is would use up all the credit that its payer has with anybody."""
    network = SimulatedNetwork(1)
    async with opened(network, homes[0], ONE) as (one, _):
        records = [
            cast(NodeRecord, SimpleNamespace(node=identity.public_key, price=price))
            for identity, price in ((ONE, 10**9), (TWO, 1000), (CHEATERS[0], 1001))
        ]
        assert [record.node for record in one.workers(records)] == [ONE.public_key, TWO.public_key]
        payer, stage = (cast(Node, SimpleNamespace(key=identity.public_key)) for identity in (ONE, TWO))
        paid = bundle(b"s" * 32, payer, stage, tokens=100)
        await one.settle(paid, {TWO.public_key: 10**9}, ())
        assert one.ledger.account.paid == session_cost(paid.plan, 100, {TWO.public_key: 1000}, ONE.public_key).amount  # type: ignore[union-attr]
