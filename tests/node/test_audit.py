"""Audits by real node code over a simulated network: honest stages always pass, cheaters are convicted, strangers get nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import trio

from nexus.core.audits import CONVICTED, LIGHT, OFF, OK, REPLICA, UNANSWERED, UNAUDITED
from nexus.core.errors import LocalError, NotFoundError, RefusedError, UsageError
from nexus.core.manifest import Manifest
from nexus.engine.exact.audit import answer
from nexus.engine.exact.tampering import TAMPERINGS
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.stage import Stage
from nexus.network.transport import Transport
from nexus.node.audit.messages import AUDIT, AUDIT_MESSAGES, Answer, Ask, Declined, Shown, Working
from nexus.node.audit.reading import Unanswered
from nexus.proof.audit import (
    CELLS,
    ROW,
    AuditReport,
    AuditRequest,
    Cell,
    Opening,
    SignedAuditRequest,
    Sums,
    chain_of,
)
from nexus.proof.audit_check import AuditedStage
from nexus.proof.evidence import FALSE_RESPONSE, verify_evidence
from nexus.proof.freivalds import piece_keys
from nexus.storage.sessions import KeptSession
from tests.engine.conftest import Folder
from tests.node.audited_swarm import AuditedSwarm, Tampered, audited_swarm
from tests.swarm.ring import identity

Models = Callable[[str], tuple[Manifest, Folder]]


def verdicts(report: AuditReport) -> list[tuple[str, str]]:
    return [(stage.mode, stage.verdict) for stage in report.stages]


@pytest.fixture
def tiny(exact_model: Models) -> tuple[Manifest, Folder]:
    return exact_model("llama")


@pytest.mark.parametrize("probation", [0, 2000])
async def test_honest_stages_pass_every_audit(tiny: tuple[Manifest, Folder], tmp_path: Path, probation: int) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run()
        light = await nodes.audit(kept, None, nodes.auditor(LIGHT, probation=probation))
        assert verdicts(light) == [(LIGHT, OK)] * 2
        assert [stage.cells for stage in light.stages] == [3, 4]
        assert all(stage.cost_us > 0 for stage in light.stages)
        assert light.index == 1
        kept = replace(kept, audits=(light,))
        replica = await nodes.audit(kept, REPLICA, nodes.auditor(OFF, probation=probation))
        assert verdicts(replica) == [(REPLICA, OK)] * 2
        assert [stage.steps for stage in replica.stages] == [20, 20]
        assert AuditReport.from_bytes(replica.to_bytes()) == replica
        assert not nodes.heard.evidence
        assert not nodes.heard.silent


async def test_what_is_not_drawn_or_not_wanted_is_not_audited(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run()
        report = await nodes.audit(kept, None, nodes.auditor(LIGHT, rate=0.0))
        assert verdicts(report) == [(OFF, UNAUDITED)] * 2
        assert "not drawn" in report.stages[0].detail
        assert verdicts(await nodes.audit(kept, OFF)) == [(OFF, UNAUDITED)] * 2
        assert [answers.answered for answers in nodes.answers] == [0, 0]


async def test_an_auditor_needs_no_weights_of_its_own(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    """They are fetched piece by piece for the keys, and let go again; the second audit needs none."""
    async with audited_swarm(tiny, tmp_path, holds_weights=False) as nodes:
        kept = await nodes.run()
        assert verdicts(await nodes.audit(kept)) == [(LIGHT, OK)] * 2
        assert not any(nodes.models.blobs.has(piece.root) for piece in nodes.manifest.pieces)
        assert any(nodes.keys.get(piece.root) for piece in nodes.manifest.pieces)


@pytest.mark.parametrize("name", sorted(set(TAMPERINGS) - {"wrong-tables"}))
@pytest.mark.parametrize("mode", [LIGHT, REPLICA])
async def test_a_cheater_is_convicted_and_nobody_else(tiny: tuple[Manifest, Folder], tmp_path: Path, name: str, mode: str) -> None:
    cheat = Tampered(name, tiny[1])
    async with audited_swarm(tiny, tmp_path, cheats={0: cheat}) as nodes:
        kept = await nodes.run()
        report = await nodes.audit(kept, mode, nodes.auditor(cells=16))
        assert report.stages[0].verdict == CONVICTED, report.stages[0].detail
        assert report.stages[1].verdict in (OK, UNAUDITED)
        (evidence,) = nodes.heard.evidence
        assert evidence.id == report.stages[0].evidence
        assert evidence.accused == nodes.plan.stages[0].node
        verdict = verify_evidence(evidence, StoredWeights(lambda _: (nodes.manifest, tiny[1].paths)))
        assert verdict.accused == evidence.accused


async def test_silence_does_not_help_where_the_auditor_has_the_weights(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    def refuse(stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        raise LocalError("my dog ate it")

    cheat = Tampered("swapped-weights", tiny[1])
    async with audited_swarm(tiny, tmp_path, cheats={0: cheat}, shows={0: refuse}) as nodes:
        report = await nodes.audit(await nodes.run())
        assert report.stages[0].verdict == CONVICTED
        assert nodes.heard.silent == [nodes.plan.stages[0].node]
        assert len(nodes.heard.evidence) == 1


async def test_silence_is_told_where_nothing_can_be_proven(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path, holds_weights=False) as nodes:
        kept = await nodes.run()
        nodes.network.crash(nodes.transports[1].peer_id)
        report = await nodes.audit(kept)
        assert report.stages[0].verdict == OK
        assert report.stages[1].verdict == UNANSWERED
        assert nodes.heard.silent == [nodes.plan.stages[1].node]
        assert not nodes.heard.evidence


@pytest.mark.parametrize("holds_weights", [True, False])
async def test_a_false_answer_of_a_right_computation_convicts(
    tiny: tuple[Manifest, Folder], tmp_path: Path, holds_weights: bool
) -> None:
    """What a stage signs for in an audit is as binding as what it signs for in a session."""

    def lie(stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        openings = answer(stage, subject, cells, files)  # type: ignore[arg-type]
        changed = [replace(one.values[-1], data=one.values[-1].data[:-1] + b"\x7f") for one in openings]
        return [replace(one, values=(*one.values[:-1], last)) for one, last in zip(openings, changed, strict=True)]

    async with audited_swarm(tiny, tmp_path, shows={0: lie}, holds_weights=holds_weights) as nodes:
        report = await nodes.audit(await nodes.run())
        assert report.stages[1].verdict == OK
        assert (report.stages[0].mode, report.stages[0].verdict) == (LIGHT, CONVICTED)
        (evidence,) = nodes.heard.evidence
        assert evidence.kind == FALSE_RESPONSE


async def test_false_sums_of_a_right_computation_convict(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    def lie(stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        openings = answer(stage, subject, cells, files)  # type: ignore[arg-type]
        return [replace(one, sums=(*one.sums[:-1], Sums(bytes(len(one.sums[-1].data))))) for one in openings]

    async with audited_swarm(tiny, tmp_path, shows={0: lie}) as nodes:
        report = await nodes.audit(await nodes.run())
        assert report.stages[1].verdict == OK
        assert report.stages[0].verdict == CONVICTED, report.stages[0].detail
        assert [evidence.kind for evidence in nodes.heard.evidence] == [FALSE_RESPONSE]


async def test_an_auditor_with_broken_keys_accuses_nobody(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    """The keys are of other weights: everything looks wrong, and the replica says that it is not."""
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run()
        assert verdicts(await nodes.audit(kept)) == [(LIGHT, OK)] * 2
        for piece in nodes.manifest.pieces:
            found = nodes.keys.get(piece.root)
            if found:
                keys = tuple(replace(one, key=replace(one.key, seed=bytes(32))) for one in found.linears)
                nodes.keys.put(piece.root, replace(found, linears=keys))
        report = await nodes.audit(kept, None, nodes.auditor())
        assert {stage.verdict for stage in report.stages} == {OK} or not nodes.heard.evidence
        assert not nodes.heard.evidence
        assert [stage.verdict for stage in report.stages] == [OK, OK]


@pytest.mark.parametrize("holds_weights", [True, False])
async def test_a_stage_that_is_for_ever_still_at_it_did_not_answer(
    tiny: tuple[Manifest, Folder], tmp_path: Path, holds_weights: bool
) -> None:
    """Signs of life keep a connection open. They must not keep an audit from coming to a verdict."""
    over = Event()

    def stall(stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        over.wait()
        raise LocalError("nothing came of it")

    hostile = Tampered("swapped-weights", tiny[1])
    async with audited_swarm(tiny, tmp_path, cheats={0: hostile}, shows={0: stall}, holds_weights=holds_weights) as nodes:
        try:
            report = await nodes.audit(await nodes.run(), None, nodes.auditor(timeout_s=20.0))
        finally:
            over.set()
        assert report.stages[0].verdict == (CONVICTED if holds_weights else UNANSWERED)
        assert nodes.heard.silent == [nodes.plan.stages[0].node]
        assert not nodes.heard.unanswered


async def test_an_audit_that_takes_too_long_says_so(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        report = await nodes.audit(await nodes.run(), None, nodes.auditor(timeout_s=0.0))
        assert verdicts(report) == [(LIGHT, UNAUDITED)] * 2
        assert "longer than 0 s" in report.stages[0].detail


# --- who may ask ------------------------------------------------------------------------------------------------------------


def request_for(nodes: AuditedSwarm, kept: KeptSession, **changes: object) -> AuditRequest:
    terms = kept.bundle.terms
    last = [one.receipt for one in kept.bundle.receipts if one.receipt.stage == 0][-1]
    chain = chain_of(identity(0), terms.nonce)
    index = int(changes.pop("index", 0))  # type: ignore[call-overload]
    request = AuditRequest(
        spec=1,
        coordinator=identity(0).public_key,
        session=terms.session,
        stage=0,
        receipt=last.id,
        index=index,
        reveal=chain.reveal(index),
        kind=CELLS,
        count=1,
        cells=(),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


async def ask(
    nodes: AuditedSwarm, request: AuditRequest, signer: int = 0, frame: bytes | None = None, asker: Transport | None = None
) -> list[Opening]:
    """What stage 0 answers. Raises RefusedError with its reason."""
    stream = await (asker or nodes.transport).open_stream(nodes.transports[0].peer_id, AUDIT)
    await stream.send(frame or AUDIT_MESSAGES.pack(Ask(SignedAuditRequest.sign(request, identity(signer)))))
    openings: list[Opening] = []
    try:
        with trio.fail_after(30):
            while True:
                try:
                    message = AUDIT_MESSAGES.unpack(await stream.receive())
                except trio.EndOfChannel:
                    return openings
                match message:
                    case Declined(signed):
                        raise RefusedError(signed.verify().cause)
                    case Shown(opening):
                        openings.append(opening)
                    case Answer() | Working():
                        pass
    finally:
        await stream.reset()


async def test_only_the_coordinator_of_a_session_is_answered(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run()
        right = request_for(nodes, kept)
        for request, signer, says in (
            (replace(right, coordinator=identity(7).public_key), 7, "only the coordinator"),
            (replace(right, session=bytes(32)), 0, "not kept here"),
            (replace(right, stage=1), 0, "not kept here"),
            (replace(right, receipt=bytes(32)), 0, "last receipt"),
            (replace(right, reveal=bytes(32)), 0, "not of the chain"),
            (replace(right, index=1), 0, "not of the chain"),
            (right, 3, "not signed"),
            (replace(right, kind=ROW, count=0, cells=(Cell(99, 0, 0, 0),)), 0, "does not have"),
            (
                replace(
                    right, kind=ROW, count=0, cells=(Cell(0, 0, 2, 0),), index=1, reveal=chain_of(identity(0), bytes(16)).reveal(1)
                ),
                0,
                "does not have",
            ),
        ):
            with pytest.raises(RefusedError, match=says):
                await ask(nodes, request, signer)
        with pytest.raises(RefusedError, match="left over"):
            await ask(nodes, right, frame=b"\x01garbage")
        assert nodes.answers[0].answered == 0


async def test_a_challenge_is_answered_once_and_a_session_not_for_ever(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run(4)
        assert len(await ask(nodes, request_for(nodes, kept))) == 1
        with pytest.raises(RefusedError, match="answered before"):
            await ask(nodes, request_for(nodes, kept))
        for index in range(1, 14):
            await ask(nodes, request_for(nodes, kept, index=index))
        refused: list[str] = []
        for index in range(14, 20):
            try:
                await ask(nodes, request_for(nodes, kept, index=index))
            except RefusedError as error:
                refused.append(error.cause)
        assert any("faster than this node answers" in cause for cause in refused)
        assert nodes.answers[0].answered <= 16


async def test_participants_may_ask_in_the_coordinators_place_and_strangers_may_not(
    tiny: tuple[Manifest, Folder], tmp_path: Path
) -> None:
    """One request each, also one that was answered before: a coordinator that says it was not must not be believed."""
    async with audited_swarm(tiny, tmp_path, stages=3) as nodes:
        kept = await nodes.run(20)
        _, witness, stranger = nodes.transports
        witness.learn(nodes.sources[0])
        stranger.learn(nodes.sources[0])
        request = request_for(nodes, kept)
        (shown,) = await ask(nodes, request)
        for _ in range(3):
            assert await ask(nodes, request, asker=witness) == [shown]
        for again in (request, request_for(nodes, kept, index=1)):
            with pytest.raises(RefusedError, match="relayed an audit of that session before"):
                await ask(nodes, again, asker=witness)
        with pytest.raises(RefusedError, match="only the coordinator"):
            await ask(nodes, request, asker=stranger)
        with pytest.raises(RefusedError, match="only the coordinator"):
            await ask(nodes, replace(request, coordinator=identity(2).public_key), signer=2, asker=witness)


async def test_a_witness_knows_what_is_to_be_shown(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path, stages=3) as nodes:
        kept = await nodes.run(20)
        request, terms, plan = request_for(nodes, kept), kept.bundle.terms, kept.bundle.plan
        receipts = [one for one in kept.bundle.receipts if one.receipt.stage == 0]
        case = Unanswered(terms, plan, SignedAuditRequest.sign(request, identity(0)), receipts[-1], ())
        cells = await nodes.answers[1].cells_of(case)
        assert [one.cell for one in await ask(nodes, request)] == list(cells)
        # An earlier receipt asks for less of the session, and that is answered too.
        first = replace(request_for(nodes, kept, index=1), receipt=receipts[0].receipt.id)
        cells = await nodes.answers[1].cells_of(
            replace(case, request=SignedAuditRequest.sign(first, identity(0)), receipt=receipts[0])
        )
        assert [one.cell for one in await ask(nodes, first)] == list(cells)
        with pytest.raises(NotFoundError):
            await nodes.answers[2].cells_of(case)  # it had no part in it
        beyond = replace(receipts[-1], receipt=replace(receipts[-1].receipt, step0=64))
        with pytest.raises(NotFoundError, match="no part in all"):
            await nodes.answers[1].cells_of(replace(case, receipt=beyond))


async def test_the_challenges_of_a_session_are_used_up_one_day(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    async with audited_swarm(tiny, tmp_path) as nodes:
        kept = await nodes.run(4)
        report = await nodes.audit(kept, LIGHT)
        with pytest.raises(UsageError, match="Audit another session"):
            await nodes.audit(replace(kept, audits=(replace(report, index=256),)), LIGHT)


def test_keys_of_other_weights_would_be_found_out() -> None:
    """The tests above change the seed of a key; a key so changed passes nothing."""
    import numpy as np

    from nexus.proof.freivalds import check

    weights = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    key = piece_keys({"o.weight": weights}, ["o"], bytes(32)).key("o")
    x = np.ones((1, 4), np.int8)
    sums = (x.astype(np.int64) @ weights.T.astype(np.int64)).astype(np.int32)
    assert check(key, x, sums)
    assert not check(replace(key, seed=bytes(31) + b"x"), x, sums)
