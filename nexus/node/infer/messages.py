"""What is said in the two inference protocols.

`/nexus/infer/1`, coordinator to stage, one stream per session and stage: Open, then OpenProgress* and Accepted, then FeedInput and
Finish one way (to the first stage) and Output and Done the other (from the last), from every stage its receipts, in the exact
profile each with an OwnTrace before it, and at the end a Report. A Failed may come at any time. Closing the stream ends the session
on that stage.

`/nexus/link/1`, stage to the next stage of the ring, one stream per session: Hello, then Push and OwnReceipt, and Finish.

What may follow what, and what is checked before it is used, is decided by the state machines in `nexus.swarm.session`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nexus.core.errors import (
    CapacityError,
    MalformedError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from nexus.core.keys import peer_id_of
from nexus.core.plan import Plan
from nexus.core.record import MessageSet, Record, digest, many, nested, raw, text, uint
from nexus.network.transport import FRAME_MAX, PeerAddress, ProtocolSpec, Stream
from nexus.proof.receipts import STEPS_MAX, SignedReceipt, SignedRefusal, SignedRequest, Terms
from nexus.proof.trace import WindowTrace

# Until a message must be taken by whoever is at the other end, and a stream opened.
LINK_TIMEOUT_S = 15.0
OPEN_TIMEOUT_S = 30.0
PAYLOAD_MAX = FRAME_MAX - 64 * 1024
ADDRESSES_MAX = 16
OPEN_BYTES_MAX = 1 << 20

INFER = ProtocolSpec(
    "/nexus/infer/1", frame_max=FRAME_MAX, first_frame_max=OPEN_BYTES_MAX, read_timeout_s=None, streams_per_peer_max=64
)
LINK = ProtocolSpec("/nexus/link/1", frame_max=FRAME_MAX, first_frame_max=1024, read_timeout_s=None, streams_per_peer_max=64)


@dataclass(frozen=True, slots=True)
class KnownPeer(Record):
    """Where a node of the plan was last seen."""

    node: bytes = raw(32)
    addresses: tuple[str, ...] = many(text(256), ADDRESSES_MAX)


@dataclass(frozen=True, slots=True)
class Open(Record):
    """The coordinator asks for a stage. `next`: the following stage of the ring. `sources`: who may have the weights."""

    stage: int = uint(4095)
    model_name: str = text(64)
    plan: Plan = nested(Plan)
    terms: Terms = nested(Terms)
    request: SignedRequest = nested(SignedRequest)
    next: KnownPeer = nested(KnownPeer)
    sources: tuple[KnownPeer, ...] = many(nested(KnownPeer), 32)


@dataclass(frozen=True, slots=True)
class OpenProgress(Record):
    phase: str = text(64)
    done: int = uint()
    total: int = uint()


@dataclass(frozen=True, slots=True)
class Accepted(Record):
    """The stage is loaded, the session is registered, the next stage is connected."""


@dataclass(frozen=True, slots=True)
class FeedInput(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Finish(Record):
    """No more steps come."""


@dataclass(frozen=True, slots=True)
class Output(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class OwnReceipt(Record):
    """The sender's receipt for one window."""

    receipt: SignedReceipt = nested(SignedReceipt)


@dataclass(frozen=True, slots=True)
class OwnTrace(Record):
    """The hashes behind the receipt that comes next: every operation of its steps, and the logs of keys and values."""

    trace: WindowTrace = nested(WindowTrace)


@dataclass(frozen=True, slots=True)
class ParentReceipt(Record):
    """The receipt that the one that comes next names as its parent, as the sender was given it."""

    receipt: SignedReceipt = nested(SignedReceipt)


@dataclass(frozen=True, slots=True)
class Done(Record):
    """Every step is shown and receipted."""


@dataclass(frozen=True, slots=True)
class Report(Record):
    """What the stage says it did; for the user's eyes, nothing rests on it."""

    steps: int = uint(STEPS_MAX)
    receipts: int = uint(STEPS_MAX)
    compute_us: int = uint()


@dataclass(frozen=True, slots=True)
class Failed(Record):
    refusal: SignedRefusal = nested(SignedRefusal)


@dataclass(frozen=True, slots=True)
class Hello(Record):
    session: bytes = digest()
    stage: int = uint(4095)


@dataclass(frozen=True, slots=True)
class Push(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Alive(Record):
    """The stage is still at it: sent every ALIVE_EVERY_S, whatever else is, so that a stopped process is told from a slow one."""


INFER_MESSAGES = MessageSet(
    Open, OpenProgress, Accepted, FeedInput, Finish, Output, OwnReceipt, Done, Report, Failed, Alive, OwnTrace, ParentReceipt
)
LINK_MESSAGES = MessageSet(Hello, Push, OwnReceipt, Finish)


# What a stage's refusal is here; by its code, so that the exit code still says what kind of failure it was.
REFUSALS: dict[str, type[NexusError]] = {
    error.code: error
    for error in (CapacityError, NotAllowedError, NotFoundError, TimedOutError, UnreachableError, UsageError, VerificationError)
}


def address_of(peer: KnownPeer) -> PeerAddress:
    return PeerAddress(peer_id_of(peer.node), peer.addresses)


def first_message(messages: MessageSet, frame: bytes, stream: Stream) -> Record:
    """Of a stream from a stranger: garbage counts against it."""
    try:
        return messages.unpack(frame)
    except MalformedError as error:
        raise blame(error, stream.peer_id) from error


def blame(error: NexusError, peer_id: str) -> NexusError:
    if isinstance(error, PeerError) and not error.peer:
        error.peer = peer_id
    return error


def at_stage(error: NexusError, stage: int, peer_id: str) -> NexusError:
    """The same kind of error, with the stage named."""
    cause = f"stage {stage} ({peer_id}): {error.cause}"
    fix = error.fix or "Run it again; `nexus model plan` shows who is in the chain"
    return type(error)(cause, fix)


def first_cause(group: BaseExceptionGroup[NexusError]) -> NexusError:
    """The error to show of those that ended a session: a stage's own words before the silence that they caused elsewhere."""
    return min(_errors_in(group), key=lambda error: isinstance(error, UnreachableError | TimedOutError))


def _errors_in(group: BaseExceptionGroup[NexusError]) -> Iterator[NexusError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _errors_in(error)
        else:
            yield error
