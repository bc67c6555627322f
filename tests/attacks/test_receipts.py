"""Receipts that are forged, contradict each other, or belong elsewhere; and who is blamed for bytes that changed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.core.errors import NexusError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import verify_digest
from nexus.core.manifest import Manifest
from nexus.core.record import Record
from nexus.node.attacks import Means, conduct_of
from nexus.node.cheating import Honest
from nexus.node.infer.messages import (
    INFER,
    INFER_MESSAGES,
    Accepted,
    Failed,
    FeedInput,
    KnownPeer,
    Open,
    OwnReceipt,
    ParentReceipt,
)
from nexus.node.signing import DurableSigner
from nexus.proof.evidence import verify_evidence
from nexus.proof.evidence.statements import Equivocation
from nexus.proof.receipts import SignedReceipt
from nexus.storage.sessions import SessionStore, Window
from nexus.swarm.session import StageSession
from tests.attacks.arena import Model, identities, open_arena
from tests.attacks.catalogue import Row
from tests.engine.exact.conftest import Models


async def test_a_withheld_trace(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "withheld-trace"}) as arena:
        await arena.avoids(row)


async def test_a_forged_signature(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {2: "forged-signature"}) as arena:
        await arena.avoids(row, 2)


# Points of small order: under them a signature of zeros holds for many messages, if a library lets them pass.
SMALL_ORDER = (
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
)


async def test_a_small_order_key(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path) as arena:
        done = await arena.ask("off")
        signed = done.bundle.receipts[0]
        for key in map(bytes.fromhex, SMALL_ORDER):
            forged = SignedReceipt(replace(signed.receipt, node=key), key + bytes(32))
            for signature in (key + bytes(32), bytes(64), bytes.fromhex(SMALL_ORDER[0]) + bytes(32)):
                with pytest.raises(VerificationError):
                    verify_digest(key, "receipt", forged.receipt.id, signature)
            other = replace(forged, receipt=replace(forged.receipt, trace_root=leaf_hash(b"")))
            with pytest.raises(VerificationError):
                await arena.trusts[0].evidence.submit(Equivocation.of(forged, other).evidence())
        assert await arena.outcome(1) == row.outcome


async def test_equivocation(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "equivocation"}) as arena:
        done = await arena.ask()
        assert any("signed two receipts" in notice for notice in arena.notices)
        assert list(done.bundle.outputs) == arena.right_tokens(done)
        assert await arena.outcome() == row.outcome
        after = await arena.ask()
        assert list(after.bundle.outputs) == arena.right_tokens(after)


async def test_an_honest_retry_is_no_equivocation(tiny: Model, tmp_path: Path, row: Row) -> None:
    """A stage that is asked for the same work again, by a new process over the same files, signs the same bytes; and it signs no
    others, whoever asks."""
    async with open_arena(tiny, tmp_path) as arena:
        done = await arena.ask()
        number = next(n for n in range(1, 5) if arena.key(n) == done.bundle.plan.stages[0].node)
        path = arena.homes[number].sessions_file
        old = arena.nodes[number]._sessions
        work = old.served(done.bundle.terms.session, 0)
        old.close()
        again = SessionStore(path, keep_max_bytes=1 << 30, keep_s=1e6, now_ms=lambda: 1)
        signer = DurableSigner(arena.identity(number), again)
        for receipt in work.receipts:
            inputs = work.inputs[receipt.step0 : receipt.step0 + receipt.n]
            retried = await signer.sign(Window(work.served, receipt, inputs))
            (first,) = [one for one in done.bundle.receipts if one.receipt.id == receipt.id]
            assert retried == first
            with pytest.raises(VerificationError):
                verify_evidence(Equivocation.of(first, retried).evidence())
            with pytest.raises(NexusError, match="signed"):
                await signer.sign(Window(work.served, replace(receipt, trace_root=leaf_hash(b"")), inputs))
        again.close()
        assert await arena.outcome(number) == row.outcome


async def test_a_broken_chain(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {2: "broken-chain"}) as arena:
        done = await arena.ask()
        assert any("not the output of the receipt that it names" in notice for notice in arena.notices)
        assert list(done.bundle.outputs) == arena.right_tokens(done)
        assert await arena.outcome(2) == row.outcome
        after = await arena.ask()
        assert list(after.bundle.outputs) == arena.right_tokens(after)


async def test_a_replay_across_sessions(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "replayed-receipts"}) as arena:
        first = await arena.ask()
        assert list(first.bundle.outputs) == arena.right_tokens(first)
        await arena.avoids(row)


async def test_a_replay_across_models(tiny: Model, exact_model: Models, tmp_path: Path, row: Row) -> None:
    conduct = conduct_of("replayed-receipts", Means(identities(5)[1], tiny[1].stage_files))
    async with open_arena(exact_model("qwen2"), tmp_path / "qwen2", {1: conduct}) as arena:
        await arena.ask()
    async with open_arena(tiny, tmp_path / "llama", {1: conduct}) as arena:
        await arena.avoids(row)


class ShowsAnothersReceipt(Honest):
    """Gives the receipt of the stage before it for its own."""

    def __init__(self) -> None:
        self._parent: SignedReceipt | None = None

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        if isinstance(message, ParentReceipt):
            self._parent = message.receipt
        if isinstance(message, OwnReceipt) and to_coordinator and self._parent is not None:
            return (OwnReceipt(self._parent),)
        return (message,)


async def test_a_replay_across_stages(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {2: ShowsAnothersReceipt()}) as arena:
        await arena.avoids(row, 2)


async def test_a_tampering_relay(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Nobody can show what went over a link: the stage that complains may be the one that lies, and both are avoided."""
    async with open_arena(tiny, tmp_path, {1: "tampering-relay"}) as arena:
        await arena.avoids(row, names=2)


class Covering(Honest):
    """Takes what the stage before gives it, and signs that it was what that stage signed for."""

    def machine(self, opened: Open, manifest: Manifest, node: bytes) -> StageSession:
        return _Blind(node, manifest, opened.plan, opened.terms, opened.request, opened.stage)


class _Blind(StageSession):
    def _check_parent(self, signed: SignedReceipt) -> None:
        self._parent, self._parent_signed = signed, True


async def test_adjacent_stages_in_league(tiny: Model, tmp_path: Path, row: Row) -> None:
    """What the first one signed for is right. The second one signed for what it made of other bytes, and pays for both."""
    async with open_arena(tiny, tmp_path, {1: "tampering-relay", 2: Covering()}) as arena:
        await arena.ask("replica")
        assert await arena.outcome(2) == row.outcome
        assert await arena.is_planned(1)


async def test_a_coordinator_with_two_inputs(tiny: Model, tmp_path: Path, row: Row) -> None:
    """The same session, opened again by its coordinator, with another prompt: the stage takes none but the one of the terms."""
    async with open_arena(tiny, tmp_path) as arena:
        bundle = (await arena.ask("off")).bundle
        first, second = bundle.plan.stages[0].node, bundle.plan.stages[1].node
        number = next(n for n in range(1, 5) if arena.key(n) == first)
        opened = Open(0, "tiny", bundle.plan, bundle.terms, bundle.requests[0], KnownPeer(second, ()), ())
        stream = await arena.transports[0].open_stream(arena.transports[number].peer_id, INFER)
        await stream.send(INFER_MESSAGES.pack(opened))
        refusal = None
        while refusal is None:
            match INFER_MESSAGES.unpack(await stream.receive()):
                case Accepted():
                    await stream.send(INFER_MESSAGES.pack(FeedInput(0, bundle.inputs[0][4:] + bundle.inputs[0][:4])))
                case Failed(signed):
                    refusal = signed.verify()
        assert "not the one that the session's terms name" in refusal.cause
        work = arena.nodes[number]._sessions.served(bundle.terms.session, 0)
        assert [one.receipt for one in bundle.receipts if one.receipt.stage == 0] == list(work.receipts)
        assert [await arena.outcome(n) for n in range(5)] == [row.outcome] * 5
