"""Audits from both ends: provers that lie or say nothing, and auditors that choose, keep quiet, or accuse falsely."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from nexus.core.errors import LocalError, NexusError, RefusedError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.plan import Plan, PlanStage
from nexus.engine.importer import import_model
from nexus.node.attacks import Means, conduct_of
from nexus.node.audit.messages import AUDIT, AUDIT_MESSAGES, Ask, Declined
from nexus.node.environment import SYSTEM
from nexus.node.evidence import INVALID_MAX
from nexus.proof.accounts import Fork
from nexus.proof.audit import CELLS, AuditRequest, SignedAuditRequest, chain_of
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import FALSE_RESPONSE, FORK, KINDS, KV, OP, Evidence
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import Terms
from nexus.storage.evidence import StoredEvidence
from nexus.swarm.standing import SILENT, SUSPENSION_MS, SignedStatement, Statement, SuspensionCase
from tests.attacks.arena import Arena, Model, identities, open_arena
from tests.attacks.catalogue import Row
from tests.engine.conftest import Folder
from tests.node.test_evidence import fork, identity_of


async def test_a_wrong_answer(tiny: Model, tmp_path: Path, row: Row) -> None:
    """It computed what it should, and is convicted by what it showed of it."""
    async with open_arena(tiny, tmp_path, {1: "wrong-answer"}) as arena:
        await arena.punishes(row, verify=None)


async def test_a_silent_prover_is_demoted(tiny: Model, tmp_path: Path, row: Row) -> None:
    """A replica finds that it did its work, and it is paid; but whoever is silent again and again gets little to do."""
    async with open_arena(tiny, tmp_path, {1: "silent"}) as arena:
        asked = 0
        while await arena.is_planned(1):
            done = await arena.ask(steps=2)
            assert list(done.bundle.outputs) == arena.right_tokens(done)
            asked += 1
            assert asked < 10
        assert asked > 1
        assert await arena.outcome(1) == row.outcome
        assert arena.trusts[0].standings.may_work(arena.key(1))


async def test_a_silent_prover_is_suspended_by_a_quorum(make_model: Callable[..., Path], tmp_path: Path, row: Row) -> None:
    """In a chain of five stages: the other four put the auditor's question to the fifth themselves, and hear nothing either."""
    folder = Folder(tmp_path)
    manifest = import_model(make_model("llama", num_hidden_layers=5), folder, lambda *_: None, profile="exact")
    async with open_arena((manifest, folder), tmp_path / "nodes", {1: "silent"}, others=6) as arena:
        trust, now_ms = arena.trusts[0], SYSTEM.now_ms()
        for witness in range(2, 6):
            for _ in range(20):
                trust.standings.note_audit(arena.key(witness), True)
        terms = (await arena.ask("off", steps=2, stages=5)).bundle.terms
        # Whoever says so without having asked suspends nobody: too few, and the accused, strangers and newcomers do not count.
        for liars in ((2,), (2, 3), (1, 2, 6)):
            with pytest.raises(VerificationError):
                trust.standings.suspend(suspension_case(arena, terms, liars, now_ms))
        assert await arena.is_planned(1)
        await arena.ask("light", steps=2, stages=5)
        assert await arena.outcome(1) == row.outcome
        standing = trust.standings.of(arena.key(1))
        assert "did not answer an audit" in standing.cause
        assert 0 < standing.until_ms - now_ms <= SUSPENSION_MS + 60_000
        assert not trust.standings.is_slashed(arena.key(1))


def suspension_case(arena: Arena, terms: Terms, witnesses: tuple[int, ...], now_ms: int) -> SuspensionCase:
    """What these nodes say of node 1 in a session of nodes 1 to 5."""
    stages = tuple(PlanStage(arena.key(number), number - 1, number) for number in range(1, 6))
    plan = Plan(1, arena.manifest.root, "exact", "exact", stages)
    terms = replace(terms, plan_root=plan.root)
    said = (Statement(1, arena.key(n), arena.key(1), terms.session, SILENT, now_ms) for n in witnesses)
    signed = tuple(SignedStatement.sign(one, arena.identity(n)) for one, n in zip(said, witnesses, strict=True))
    return SuspensionCase(1, terms, plan, signed)


def shows_nothing(*_: Any) -> Any:
    raise LocalError("this node does not show its work")


async def test_silence_does_not_hide_what_was_computed(tiny: Model, tmp_path: Path, row: Row) -> None:
    conduct = conduct_of("swapped-weights", Means(identities(5)[1], tiny[1].stage_files))
    conduct.show = shows_nothing  # type: ignore[method-assign]
    async with open_arena(tiny, tmp_path, {1: conduct}) as arena:
        await arena.punishes(row, verify=None)


def audit_request(bundle: Bundle, index: int, reveal: bytes) -> AuditRequest:
    last = [one.receipt for one in bundle.receipts if one.receipt.stage == 0][-1]
    terms = bundle.terms
    return AuditRequest(1, terms.coordinator, terms.session, 0, last.id, index, reveal, CELLS, 1, ())


async def ask(arena: Arena, number: int, request: AuditRequest) -> None:
    """Raises RefusedError with the stage's reason."""
    stream = await arena.transports[0].open_stream(arena.transports[number].peer_id, AUDIT)
    await stream.send(AUDIT_MESSAGES.pack(Ask(SignedAuditRequest.sign(request, arena.identity(0)))))
    try:
        with suppress(trio.EndOfChannel):
            while True:
                message = AUDIT_MESSAGES.unpack(await stream.receive())
                if isinstance(message, Declined):
                    raise RefusedError(message.refusal.verify().cause)
    finally:
        await stream.reset()


async def test_a_ground_challenge(tiny: Model, tmp_path: Path, row: Row) -> None:
    """A coordinator cannot look for a challenge that spares its friend, or asks for what it wants to see of a prompt."""
    async with open_arena(tiny, tmp_path) as arena:
        bundle = (await arena.ask("off")).bundle
        number = next(n for n in range(1, 5) if arena.key(n) == bundle.plan.stages[0].node)
        chain = chain_of(arena.identity(0), bundle.terms.nonce)
        for nonce in range(4):
            with pytest.raises(RefusedError, match="not of the chain"):
                await ask(arena, number, audit_request(bundle, 0, leaf_hash(bytes([nonce]))))
        with pytest.raises(RefusedError, match="not of the chain"):
            await ask(arena, number, audit_request(bundle, 0, chain_of(arena.identity(0), bytes(16)).reveal(0)))
        await ask(arena, number, audit_request(bundle, 0, chain.reveal(0)))
        with pytest.raises(RefusedError, match="answered before"):
            await ask(arena, number, audit_request(bundle, 0, chain.reveal(0)))
        assert arena.nodes[number]._audit_answers.answered == 1
        assert [await arena.outcome(n) for n in (0, number)] == [row.outcome] * 2


async def test_an_auditor_that_withholds(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Node 0 says nothing of what it saw. Node 3 finds it the next time that it asks."""
    async with open_arena(tiny, tmp_path, {1: "swapped-weights"}) as arena:
        await arena.ask("off")
        assert not await arena.evidence(0)
        await arena.meet(3)
        await arena.ask(asker=3)
        assert await arena.outcome(1, observer=3) == row.outcome


async def test_an_auditor_in_league(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Node 0 found the cheater to be right thirty times. That counts for node 0 alone, and not once a proof is there."""
    async with open_arena(tiny, tmp_path, {1: "swapped-weights"}) as arena:
        for _ in range(30):
            arena.trusts[0].standings.note_audit(arena.key(1), True)
        await arena.meet(3)
        await arena.ask(asker=3)
        assert await arena.outcome(1, observer=3) == row.outcome
        (proof,) = await arena.evidence(3)
        await arena.trusts[0].evidence.submit(proof)
        assert await arena.outcome(1) == row.outcome


async def test_false_accusations(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Of every kind, made of what an honest node signed and of proofs against others, told to a node that looks at each itself."""
    async with open_arena(tiny, tmp_path, {1: "flipped-bit"}) as arena:
        await arena.ask("replica")
        (true,) = await arena.evidence()
        bundle = (await arena.ask("off")).bundle
        stage = next(n for n, stage in enumerate(bundle.plan.stages))
        honest = next(n for n in range(2, 5) if arena.key(n) == bundle.plan.stages[stage].node)
        mine = [one for one in bundle.receipts if one.receipt.node == arena.key(honest)]
        altered = replace(mine[0], receipt=replace(mine[0].receipt, trace_root=leaf_hash(b"")))
        forged = fork(arena.identity(4))
        story = Fork.from_bytes(forged.body)
        lies = [
            replace(true, accused=arena.key(honest)),
            replace(true, accused=arena.key(honest), body=true.body[:-1] + bytes([true.body[-1] ^ 1])),
            Equivocation.of(mine[0], altered).evidence(),
            Equivocation.of(mine[0], mine[1]).evidence(),
            *(BrokenChain(mine[1], (one.receipt,), (), (), ()).evidence() for one in bundle.receipts),
            *(Evidence(1, kind, arena.key(honest), true.body) for kind in KINDS),
            *(Evidence(1, kind, arena.key(honest), b"") for kind in (OP, KV, FALSE_RESPONSE)),
            replace(forged, accused=arena.key(honest)),
            Evidence(1, FORK, arena.key(honest), replace(story, one=replace(story.one, signature=bytes(64))).to_bytes()),
        ]
        for lie in lies:
            with pytest.raises(NexusError):
                await arena.trusts[0].evidence.submit(lie)
        # And from a liar over the network: it is not listened to for long.
        liar, store = arena.trusts[4], arena.trusts[4]._store
        peer = arena.trusts[0].evidence._peer(arena.transports[4].peer_id)
        for turn, lie in enumerate(lies):
            if peer.refused_until_s:
                break
            about = identity_of(5000 + turn).public_key
            told = replace(lie, accused=about)
            content = told.to_bytes()
            store.put(StoredEvidence(about, told.id, told.kind, 1, b"", len(content)), content)
            liar.standings.convict(about, told.id, told.kind, 1)
            await arena.trusts[0].evidence._pull(arena.transports[4].peer_id, None)
            assert not arena.trusts[0].standings.is_slashed(about)
        assert INVALID_MAX <= turn < len(lies) - 1
        assert [await arena.outcome(n) for n in (0, 2, 3, 4)] == [row.outcome] * 4
