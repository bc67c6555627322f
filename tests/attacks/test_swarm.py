"""Attacks on what a swarm agrees on: who is convicted, what a bond is worth, and what float results may lead to."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import trio

from nexus.core.errors import NexusError, VerificationError
from nexus.core.manifest import FLOAT
from nexus.node.ledger import LEDGER, MESSAGES, Declined, Pay
from nexus.proof.accounts import Share, SignedEntry
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import SignedReceipt
from nexus.swarm.ledger import Account, Cost, pay_entry
from nexus.swarm.standing import DEMOTED, PROBATION, SLASHED
from tests.attacks.arena import Arena, Model, open_arena
from tests.attacks.catalogue import Row
from tests.node.test_evidence import CHEATERS, fork


async def until_same(arena: Arena, *numbers: int) -> None:
    """Until all of these nodes know of the same convictions, by the same evidence. Exchanges as they happen now and then."""
    with trio.fail_after(20):
        while any(arena.trusts[n].standings.slashed != arena.trusts[numbers[0]].standings.slashed for n in numbers):
            for one, other in permutations(numbers, 2):
                arena.trusts[one].evidence._replaced_s.clear()  # those that are replaced take turns of a minute
                await arena.trusts[one].evidence._pull(arena.transports[other].peer_id, None)
            await trio.lowlevel.checkpoint()


async def test_the_mass_conviction_fuse(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Three bonds within the hour, where two may fall: all are kept from work, none burns until an operator has looked."""
    async with open_arena(tiny, tmp_path, burn_max=2) as arena:
        trust = arena.trusts[0]
        for number in (1, 2):
            await trust.evidence.submit(fork(arena.identity(number)))
        assert [arena.state(number) for number in (1, 2)] == [SLASHED] * 2
        arena.cheats = {1, 2, 3}
        await trust.evidence.submit(fork(arena.identity(3)))
        with pytest.raises(NexusError):
            await arena.ask()  # two stages are asked for, and one node is left
        for number in (1, 2, 3):
            assert arena.state(number) == row.consequence
            assert not trust.standings.burned
            with pytest.raises(NexusError, match="burning is paused"):
                trust.may_open(arena.key(number))
        (proof, *_) = await arena.evidence()
        assert verify_evidence(proof).kind == row.proof
        assert await trust.resume_burning() == 3
        assert [arena.state(number) for number in (1, 2, 3)] == [SLASHED] * 3


async def test_evidence_reordered_and_partitioned(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Two halves convict different nodes, and one node by different evidence, in different order. Together they agree."""
    async with open_arena(tiny, tmp_path, others=5) as arena:
        halves = (0, 1), (2, 3)
        arena.network.partition([[arena.transports[n].peer_id for n in half] for half in halves])
        arena.cheats = {4, 5}
        both, ours, theirs = arena.identity(5), CHEATERS[0], CHEATERS[1]
        for number, order in ((0, (200, 300)), (2, (400, 300)), (3, (300, 200))):
            for amount in order:
                await arena.trusts[number].evidence.submit(fork(both, amount))
        await arena.trusts[0].evidence.submit(fork(ours))
        await arena.trusts[3].evidence.submit(fork(theirs))
        arena.network.heal()
        await until_same(arena, 0, 1, 2, 3)
        least = min(fork(both, amount).id for amount in (200, 300, 400))
        expected = {both.public_key: least, ours.public_key: fork(ours).id, theirs.public_key: fork(theirs).id}
        for number in range(4):
            assert dict(arena.trusts[number].standings.slashed.entries()) == expected
            for key in expected:
                assert arena.trusts[number].standings.of(key).state == row.consequence
        assert {evidence.kind for evidence in await arena.evidence(1)} == {row.proof}


async def test_a_bond_spent_twice(tiny: Model, tmp_path: Path, row: Row) -> None:
    """A node pays two others with one entry each, which both have the same number. The second one sees the first."""
    async with open_arena(tiny, tmp_path) as arena:
        spender = arena.identity(1)

        def pays(number: int, session: bytes) -> SignedEntry:
            entry = pay_entry(Account(spender.public_key), session, Cost(1000, (Share(arena.key(number), 900),)))
            return SignedEntry.sign(entry, spender)

        arena.cheats = {1}
        await offer(arena, 1, 2, pays(2, b"a" * 32))
        await offer(arena, 1, 2, pays(2, b"b" * 32))
        await until_convicted(arena, 1, observer=2)
        await arena.meet(2)
        assert await arena.outcome(1, observer=2) == row.outcome
        (proof,) = await arena.evidence(2)
        assert Evidence.from_file(proof.to_file()).accused == arena.key(1)
        await until_same(arena, 0, 2)
        assert await arena.outcome(1) == row.outcome


async def offer(arena: Arena, payer: int, payee: int, entry: SignedEntry) -> None:
    stream = await arena.transports[payer].open_stream(arena.transports[payee].peer_id, LEDGER)
    try:
        await stream.send(MESSAGES.pack(Pay(entry)))
        while True:
            if isinstance(MESSAGES.unpack(await stream.receive()), Declined):
                return
    except (NexusError, trio.EndOfChannel):
        return
    finally:
        await stream.reset()


async def until_convicted(arena: Arena, number: int, observer: int) -> None:
    with trio.fail_after(10):
        while not arena.trusts[observer].standings.is_slashed(arena.key(number)):
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_deviation_in_the_float_profile(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Whatever float receipts say, nobody is convicted: honest machines differ as well. Statistics alone speak."""
    async with open_arena(tiny, tmp_path) as arena:
        done = await arena.ask("off")
        signed = [one for one in done.bundle.receipts if one.receipt.node == arena.key(1)]

        def as_float(one: SignedReceipt, **changes: object) -> SignedReceipt:
            receipt = replace(one.receipt, profile=FLOAT, kv_root=b"", trace_root=b"", **changes)  # type: ignore[arg-type]
            return SignedReceipt.sign(receipt, arena.identity(1))

        one, other = as_float(signed[0]), as_float(signed[0], out_root=bytes(32))
        broken = as_float(signed[1], prev=one.receipt.id, step0=17)
        for evidence in (Equivocation.of(one, other).evidence(), BrokenChain(broken, (one.receipt,), (), (), ()).evidence()):
            with pytest.raises(VerificationError):
                await arena.trusts[0].evidence.submit(evidence)
        standings = arena.trusts[0].standings
        for _ in range(3):
            standings.note_run(arena.key(1), mismatched=True)
        assert arena.state(1) == PROBATION
        for _ in range(6):
            standings.note_run(arena.key(1), mismatched=True)
        assert arena.state(1) == DEMOTED
        assert await arena.outcome(1) == row.outcome
        assert standings.may_work(arena.key(1))
        assert not await arena.is_planned(1)
