"""An answer to an audit as it comes in, checked frame by frame: by whoever audits, and by witnesses on the way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from nexus.core.errors import CapacityError, MalformedError, RefusedError, TimedOutError, UnreachableError, VerificationError
from nexus.core.keys import peer_id_of
from nexus.core.plan import Plan
from nexus.core.record import Record
from nexus.network.transport import Stream, Transport
from nexus.node.audit.messages import AUDIT, AUDIT_MESSAGES, Answer, Ask, Declined, Shown, Working
from nexus.proof.audit import AuditRequest, Cell, Opening, SignedAuditAnswer, SignedAuditRequest, check_answer
from nexus.proof.receipts import SignedReceipt, Terms

OPEN_TIMEOUT_S = 15.0
# A stage that computes a long session again says every other second that it is still at it.
SILENCE_MAX_S = 10.0


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request that a stage did not answer. `receipt`: the stage's, which the request names. `cells`: what it has to show."""

    terms: Terms
    plan: Plan
    request: SignedAuditRequest
    receipt: SignedReceipt
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Answered:
    """What a stage signed for, and what it showed."""

    answer: SignedAuditAnswer
    openings: Sequence[Opening]


async def ask(transport: Transport, peer_id: str, signed: SignedAuditRequest) -> Stream:
    """Put a request to a stage. Raises PeerError, TimedOutError, CapacityError."""
    with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
        stream = await transport.open_stream(peer_id, AUDIT)
        await stream.send(AUDIT_MESSAGES.pack(Ask(signed)))
    if scope.cancelled_caught:
        raise TimedOutError(f"{peer_id} did not take the request for an audit within {OPEN_TIMEOUT_S:.0f} s")
    return stream


async def receive(stream: Stream) -> Record:
    """The next message about an audit. Raises PeerError, TimedOutError."""
    with trio.move_on_after(SILENCE_MAX_S):
        try:
            return AUDIT_MESSAGES.unpack(await stream.receive())
        except trio.EndOfChannel:
            raise UnreachableError("it ended the audit without an answer", peer=stream.peer_id) from None
    raise TimedOutError(f"not a sign of life for {SILENCE_MAX_S:.0f} s")


async def checked(
    receive: Callable[[], Awaitable[Record]], request: AuditRequest, node: bytes, cells: Sequence[Cell]
) -> AsyncGenerator[Answer | Shown, None]:
    """The stage's Answer, then one Shown for each of `cells`; what they show is for the auditor to check. `node`: the stage's.

    Raises PeerError where something else comes, RefusedError where the stage declines, CapacityError where it is busy.
    """
    peer_id = peer_id_of(node)
    due: tuple[bytes, ...] | None = None
    shown = 0
    while due is None or shown < len(due):
        message = await receive()
        match message:
            case Working() if due is None:
                continue
            case Answer(signed) if due is None:
                due = check_answer(signed, request, node, len(cells)).openings
                yield message
            case Shown(opening) if due is not None:
                if opening.id != due[shown] or opening.cell != cells[shown]:
                    raise VerificationError("it shows something else than it signed for", peer=peer_id)
                shown += 1
                yield message
            case Declined(signed_refusal):
                refusal = signed_refusal.verify()
                if refusal.node != node:
                    raise VerificationError("a refusal came that is not this stage's", peer=peer_id)
                cause = f"it declined: {refusal.cause}"
                raise (
                    CapacityError(cause, refusal.fix)
                    if refusal.code == CapacityError.code
                    else RefusedError(cause, refusal.fix, peer_id)
                )
            case _:
                raise MalformedError(f"{type(message).__name__} is no answer to an audit", peer=peer_id)


async def collected(messages: AsyncGenerator[Answer | Shown, None]) -> Answered:
    """All of an answer."""
    answer: SignedAuditAnswer | None = None
    openings: list[Opening] = []
    async for message in messages:
        if isinstance(message, Answer):
            answer = message.answer
        else:
            openings.append(message.opening)
    assert answer is not None
    return Answered(answer, openings)
