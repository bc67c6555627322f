"""Coordinators and stages that mean harm, against the two inference protocols of a node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from nexus.core.errors import CapacityError, MalformedError, UnreachableError
from nexus.core.keys import Identity
from nexus.core.record import Record
from nexus.network.limits import STRIKES_MAX
from nexus.network.transport import PeerAddress, Stream
from nexus.node.infer.coordinator import REPORT_TIMEOUT_S
from nexus.node.infer.messages import (
    INFER,
    INFER_MESSAGES,
    LINK,
    Accepted,
    Alive,
    Failed,
    Finish,
    KnownPeer,
    OpenProgress,
    Report,
)
from nexus.proof.bundle import verify_bundle
from nexus.proof.receipts import tokens_to_bytes
from tests.node.test_infer import Swarm, ToySource, swarm
from tests.swarm.ring import terms_for


async def ask(nodes: Swarm, number: int, **changes: object) -> Stream:
    """One more session of the coordinator at node 0, opened and left alone."""
    inputs = [tokens_to_bytes([1, 2])]
    terms = replace(terms_for(nodes.model, nodes.plan, inputs, 20), nonce=number.to_bytes(16, "big"))
    target = nodes.transports[0]
    nodes.transport.learn(PeerAddress(target.peer_id, target.addresses))
    stream = await nodes.transport.open_stream(target.peer_id, INFER)
    await stream.send(INFER_MESSAGES.pack(replace(nodes.coordinator(inputs, terms)._open(0), **changes)))  # type: ignore[arg-type]
    return stream


async def answer(stream: Stream) -> object:
    """The stage's word on an Open."""
    while True:
        message = INFER_MESSAGES.unpack(await stream.receive())
        if not isinstance(message, OpenProgress | Alive):
            return message


def hold_loading(source: ToySource, loading: list[bytes], go_on: trio.Event) -> None:
    inner = source.stage

    @asynccontextmanager
    async def stage(*arguments: object) -> AsyncIterator[object]:
        loading.append(b"")
        await go_on.wait()
        async with inner(*arguments) as loaded:  # type: ignore[arg-type]
            yield loaded

    source.stage = stage  # type: ignore[method-assign, assignment]


async def test_sessions_that_still_load_count_as_well(autojump_clock: MockClock) -> None:
    """Else whoever opens many at once gets them all through, before the first one is there to be counted."""
    async with swarm(1, sessions_max=4) as nodes, trio.open_nursery() as nursery:
        loading: list[bytes] = []
        go_on = trio.Event()
        hold_loading(nodes.sources[0], loading, go_on)
        words: list[object] = []

        async def hear(stream: Stream) -> None:
            words.append(await answer(stream))

        for number in range(12):
            nursery.start_soon(hear, await ask(nodes, number))
        await trio.sleep(1)
        assert len(loading) <= 4
        go_on.set()
        await trio.sleep(1)
        refusals = [word.refusal.verify().code for word in words if isinstance(word, Failed)]
        assert refusals == [CapacityError.code] * (12 - len(loading))
        assert sum(isinstance(word, Accepted) for word in words) == len(loading)


async def test_one_peer_does_not_get_every_session(autojump_clock: MockClock) -> None:
    async with swarm(1, sessions_max=4) as nodes:
        mine = [await ask(nodes, number) for number in range(4)]
        words = [await answer(stream) for stream in mine]
        assert sum(isinstance(word, Accepted) for word in words) == 3
        await mine[0].close()
        await trio.sleep(1)
        assert isinstance(await answer(await ask(nodes, 9)), Accepted)


async def test_the_same_session_twice_at_once_is_one(autojump_clock: MockClock) -> None:
    async with swarm(1) as nodes:
        loading: list[bytes] = []
        go_on = trio.Event()
        hold_loading(nodes.sources[0], loading, go_on)
        first, second = await ask(nodes, 1), await ask(nodes, 1)
        with trio.fail_after(10):
            word = await answer(second)
        assert isinstance(word, Failed)
        assert word.refusal.verify().code == MalformedError.code
        go_on.set()
        assert isinstance(await answer(first), Accepted)


async def test_next_peers_that_are_not_there_leave_nothing_behind(autojump_clock: MockClock) -> None:
    """A stranger's plans may name any number of them."""
    async with swarm(2) as nodes:
        target = nodes.transports[0]
        nodes.transport.learn(PeerAddress(target.peer_id, target.addresses))
        inputs = [tokens_to_bytes([1, 2])]
        for number in range(5):
            ghost = Identity(bytes([100 + number]) * 32).public_key
            plan = replace(nodes.plan, stages=(nodes.plan.stages[0], replace(nodes.plan.stages[1], node=ghost)))
            coordinator = replace(nodes, plan=plan).coordinator(inputs, terms_for(nodes.model, plan, inputs, 20))
            stream = await nodes.transport.open_stream(target.peer_id, INFER)
            opened = replace(coordinator._open(0), next=KnownPeer(ghost, ("/ip4/192.0.2.1/tcp/9",)))
            await stream.send(INFER_MESSAGES.pack(opened))
            word = await answer(stream)
            assert isinstance(word, Failed)
            assert word.refusal.verify().code == UnreachableError.code
        assert not nodes.services[0]._dialling


async def test_garbage_counts_against_who_sent_it() -> None:
    """Each is cheap to make; a peer that sends nothing else is dropped in the end."""
    async with swarm(1) as nodes:
        victim = nodes.transports[0]
        nodes.transport.learn(PeerAddress(victim.peer_id, victim.addresses))
        sent = 0
        while victim.connections() or not sent:
            assert sent < 2 * STRIKES_MAX, "the peer may go on for ever"
            stream = await nodes.transport.open_stream(victim.peer_id, INFER if sent % 2 else LINK)
            await stream.send(b"\xff")
            sent += 1
            with trio.fail_after(10), pytest.raises((UnreachableError, trio.EndOfChannel)):
                await stream.receive()


async def test_only_the_first_stage_is_told_to_finish_by_the_coordinator(autojump_clock: MockClock) -> None:
    async with swarm(2) as nodes:
        inputs = [tokens_to_bytes([1, 2])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 20))
        target = nodes.transports[1]
        for transport in nodes.transports:
            nodes.transport.learn(PeerAddress(transport.peer_id, transport.addresses))
        stream = await nodes.transport.open_stream(target.peer_id, INFER)
        await stream.send(INFER_MESSAGES.pack(coordinator._open(1)))
        assert isinstance(await answer(stream), Accepted)
        await stream.send(INFER_MESSAGES.pack(Finish()))
        word = await answer(stream)
        assert isinstance(word, Failed)
        assert word.refusal.verify().code == MalformedError.code


async def test_reports_without_end_do_not_put_off_the_end() -> None:
    """The answer is verified: a stage that keeps reporting and one that never does must not hold the coordinator for ever."""
    async with swarm(2) as nodes, trio.open_nursery() as nursery:
        inputs = [tokens_to_bytes([1, 2])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 3))
        take = coordinator._take

        async def chatter(message: Report) -> None:
            while True:
                await trio.sleep(REPORT_TIMEOUT_S / 4)
                await take(0, message)

        async def taken(stage: int, message: Record) -> None:
            if isinstance(message, Report) and stage == 1:
                await trio.sleep_forever()  # as if it never came
            if isinstance(message, Report):
                nursery.start_soon(chatter, message)
            await take(stage, message)

        coordinator._take = taken  # type: ignore[method-assign]
        with trio.fail_after(5 * REPORT_TIMEOUT_S):
            await nodes.collect(coordinator)
        nursery.cancel_scope.cancel()


async def test_a_stage_that_closes_without_a_report_does_not_undo_the_answer() -> None:
    async with swarm(2) as nodes:
        inputs = [tokens_to_bytes([1, 2])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 3))
        take = coordinator._take

        async def taken(stage: int, message: Record) -> None:
            if not (isinstance(message, Report) and stage == 1):
                await take(stage, message)

        coordinator._take = taken  # type: ignore[method-assign]
        _, ended = await nodes.collect(coordinator)
        assert verify_bundle(ended.bundle).steps == 3
        assert ended.reports[1] is None
