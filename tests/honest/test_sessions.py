"""A thousand sessions of honest stages, drawn at random: whatever happens to them, every audit passes and nobody is convicted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from nexus.core.audits import LIGHT, OK, REPLICA
from nexus.core.errors import NotFoundError, VerificationError
from nexus.engine.exact import gemm, native
from nexus.proof.bundle import make_requests
from nexus.proof.receipts import SignedReceipt
from nexus.storage.sessions import KeptSession
from nexus.swarm.session import StageSession
from tests.honest.accusers import (
    Keys,
    Subject,
    accuse_of_openings,
    accuse_of_receipts,
    accuse_of_rewriting,
    accuse_of_values,
    audit,
    replicate,
)
from tests.honest.conftest import ENCODER, MODELS, WIDE
from tests.honest.swarm import (
    COORDINATOR,
    Asked,
    CrashError,
    Model,
    Node,
    Ran,
    Served,
    Swarm,
    draw_plan,
    draw_session,
    draw_texts,
    hostile,
    threads,
)
from tests.node.audited_swarm import AuditedSwarm, audited_swarm

SESSIONS = {name: 8 if name == ENCODER else 124 for name in MODELS}
NODES = 4
# Receipts of earlier sessions that are thrown at every new one.
REMEMBERED = 12
# The reference is slow, and takes part now and then.
NATIVE, TORCH = native.available(), [f"torch:{kernel.name}" for kernel in gemm.KERNELS]
KEYS = Keys()


def draw_kernel(chance: random.Random) -> str:
    return chance.choice(TORCH) if chance.random() < 0.04 or not NATIVE else chance.choice(NATIVE)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    made = [Node(number, tmp_path / f"{number}.db", "") for number in range(NODES)]
    yield made
    for node in made:
        node.store.close()


def served_of(asked: Asked, hostile_stages: frozenset[int]) -> dict[int, Served]:
    return {number: Served() for number in range(len(asked.plan.stages)) if number not in hostile_stages}


def run(chance: random.Random, nodes: Sequence[Node], sessions: Sequence[Ran]) -> None:
    """Until they end, whatever comes between: nodes that lose power, and coordinators that ask again."""
    lie = hostile(chance, sessions[0].asked) if sessions[0].hostile else None
    stages = len(sessions[0].asked.plan.stages)
    for _ in range(chance.choice([0, 0, 0, 0, 1, 2])):
        crash = (chance.randrange(stages), chance.randrange(1, 5)) if chance.random() < 0.7 else None
        try:
            Swarm(chance, nodes, sessions, lie=lie, crash_after=crash).run()
        except CrashError:
            assert crash is not None
            nodes[crash[0]].restart(draw_kernel(chance))
        for number, ran in enumerate(sessions):
            ran.failed = ran.bundle = None
            if ran.asked.model.causal or chance.random() < 0.5:
                continue
            # An encoder's coordinator may send other texts, as many, behind the first one.
            texts = (ran.asked.inputs[0], *(draw_texts(chance, ran.asked.model)[0] for _ in ran.asked.inputs[1:]))
            sessions[number].asked = replace(ran.asked, inputs=texts)
    Swarm(chance, nodes, sessions, lie=lie).run()


def look_at(chance: random.Random, ran: Ran, nodes: Sequence[Node], others: Sequence[SignedReceipt]) -> None:
    """All that can be asked about one session, and all that can be said against its honest stages."""
    model = ran.asked.model
    if not ran.hostile:
        assert ran.bundle is not None
        assert ran.traces == tuple(tuple(ran.served[number].traces) for number in range(len(ran.asked.plan.stages)))
    accuse_of_receipts(chance, ran, others, model, 4)
    for number, served in ran.served.items():
        if not served.chain:
            continue
        subject = Subject(ran, number, nodes[number].identity)
        replayed = replicate(subject, draw_kernel(chance))
        accuse_of_values(chance, subject, replayed, 2)
        accuse_of_rewriting(chance, subject, replayed)
        try:
            work = nodes[number].store.served(ran.asked.terms.session, number)
        except NotFoundError:
            continue  # it was asked more than one question: it shows nothing of that
        assert list(work.inputs[: len(subject.inputs)]) == subject.inputs
        if work.receipts[-1] != subject.signed[-1].receipt:
            continue  # an earlier attempt went further, and audits are of the last receipt
        signed, openings = audit(subject, draw_kernel(chance), KEYS, chance.randrange(256), chance.choice([1, 1, 2, 5]))
        if chance.random() < 0.4:
            accuse_of_openings(chance, subject, signed, openings, 1)


@pytest.mark.parametrize("name", MODELS)
def test_no_honest_session_convicts_anybody(name: str, nodes: list[Node], honest_model: Callable[[str], Model]) -> None:
    model = honest_model(name)
    done, group, remembered = 0, 0, list[SignedReceipt]()
    while done < SESSIONS[name]:
        chance = random.Random(f"{name} {group}")
        try:
            ran = one_group(chance, model, nodes, min(SESSIONS[name] - done, chance.choice([1, 2, 3, 5])), remembered)
        except BaseException as error:
            error.add_note(f"group {group} of {name}")
            raise
        done, group = done + len(ran), group + 1
        signed = [each for one in ran for served in one.served.values() for each in served.signed.values()]
        remembered = chance.sample(signed, min(REMEMBERED, len(signed)))


def test_no_hostile_model_makes_an_honest_session_convict_anybody(nodes: list[Node], extreme_models: list[Model]) -> None:
    for model in extreme_models:
        for group in range(3):
            one_group(random.Random(f"{model.name} {group}"), model, nodes, 3, [])


def one_group(chance: random.Random, model: Model, nodes: Sequence[Node], count: int, others: Sequence[SignedReceipt]) -> list[Ran]:
    """Some sessions at once over the same stages."""
    for node in nodes:
        node.kernel = draw_kernel(chance)
    plan = draw_plan(chance, model, nodes)
    stages = len(plan.stages)
    bad = (
        frozenset(chance.sample(range(stages), chance.randrange(1, stages)))
        if stages > 1 and chance.random() < 0.2
        else frozenset()
    )
    sessions = []
    for _ in range(count):
        asked = draw_session(chance, model, plan)
        sessions.append(Ran(asked, served_of(asked, bad), bad))
    with ExitStack() as stack:
        if chance.random() < 0.1:
            stack.enter_context(threads(chance.choice([2, 3])))
        run(chance, nodes, sessions)
        for ran in sessions:
            look_at(chance, ran, nodes, others)
    return sessions


def test_a_stage_takes_no_prompt_but_the_session_s(nodes: list[Node], honest_model: Callable[[str], Model]) -> None:
    """A coordinator that sends another one has nothing signed that it could hold against the stage."""
    model, chance = honest_model("llama"), random.Random(0)
    plan = draw_plan(chance, model, nodes)
    asked = draw_session(chance, model, plan)
    request = make_requests(COORDINATOR, asked.terms, plan)[0]
    machine = StageSession(nodes[0].identity.public_key, model.manifest, plan, asked.terms, request, 0)
    with pytest.raises(VerificationError, match="not the one that the session's terms name"):
        machine.feed(0, asked.inputs[0] + bytes(4))
    assert machine.receipts_signed == 0


async def test_no_session_between_real_nodes_convicts_anybody(honest_model: Callable[[str], Model], tmp_path: Path) -> None:
    """Several at once over a network in memory, each audited by every mode; the nodes answer for themselves."""
    for name in ("llama", "gemma3", WIDE):
        model, chance = honest_model(name), random.Random(name)
        async with audited_swarm((model.manifest, model.folder), tmp_path / name) as nodes:
            kept: list[KeptSession] = []

            async def one(nonce: bytes, chance: random.Random, nodes: AuditedSwarm = nodes, kept: list[KeptSession] = kept) -> None:
                prompt = [chance.randrange(131) for _ in range(chance.randrange(1, 61))]
                kept.append(await nodes.run(chance.randrange(1, 41), nonce, prompt))

            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(one, chance.randbytes(16), random.Random(chance.randrange(2**32)))
            for session in kept:
                assert session.bundle is not None
                for mode in (LIGHT, REPLICA):
                    report = await nodes.audit(session, mode, nodes.auditor(cells=chance.randrange(1, 6)))
                    assert [(stage.mode, stage.verdict) for stage in report.stages] == [(mode, OK)] * 2
                    session = replace(session, audits=(*session.audits, report))
            assert not nodes.heard.evidence
            assert not nodes.heard.silent
