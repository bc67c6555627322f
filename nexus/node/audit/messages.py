"""What is said in `/nexus/audit/1`, coordinator to stage, one stream per audit.

The coordinator sends Ask. The stage answers Working now and then while it computes the session again, then Answer and one Shown per
opening, in the order of the cells; or Declined at any time, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.record import MessageSet, Record, nested
from nexus.network.transport import ProtocolSpec
from nexus.proof.audit import OPENING_BYTES_MAX, Opening, SignedAuditAnswer, SignedAuditRequest
from nexus.proof.receipts import SignedRefusal

SHOWN_BYTES_MAX = OPENING_BYTES_MAX + (64 << 10)
ASK_BYTES_MAX = 1024

AUDIT = ProtocolSpec(
    "/nexus/audit/1", frame_max=SHOWN_BYTES_MAX, first_frame_max=ASK_BYTES_MAX, read_timeout_s=None, streams_per_peer_max=4
)


@dataclass(frozen=True, slots=True)
class Ask(Record):
    request: SignedAuditRequest = nested(SignedAuditRequest)


@dataclass(frozen=True, slots=True)
class Working(Record):
    """The stage is still at it."""


@dataclass(frozen=True, slots=True)
class Answer(Record):
    answer: SignedAuditAnswer = nested(SignedAuditAnswer)


@dataclass(frozen=True, slots=True)
class Shown(Record):
    opening: Opening = nested(Opening)


@dataclass(frozen=True, slots=True)
class Declined(Record):
    refusal: SignedRefusal = nested(SignedRefusal)


AUDIT_MESSAGES = MessageSet(Ask, Working, Answer, Shown, Declined)
