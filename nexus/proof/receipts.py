"""Requests and receipts: who asked for which steps, who computed them, on what input, with what output.

A *step* is one pass of a session through the model: step 0 reads the whole prompt, every later step one token (an encoder takes
one text per step). Each stage commits to the inputs and outputs of a window of some steps (WINDOW by default) and signs the
receipt. Receipts
chain twice: `parent` is the receipt of the stage before for the same steps, `prev` this stage's receipt for the steps before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root, tagged_hash
from nexus.core.keys import Identity, verify_digest, verify_signature
from nexus.core.record import Record, digest, many, nested, optional_digest, raw, text, uint

SPEC = 1
WINDOW = 16
WINDOW_MAX = 64
STEPS_MAX = 1 << 20
# Tokens of an answer that a session may go on from.
ANSWERED_MAX = 1 << 16
FLOAT = "float"
MICRO = 1_000_000
TEMPERATURE_MAX = 100
TOP_K_MAX = 1 << 24
REPETITION_PENALTY_MAX = 100
# The least is as far below 1, which changes nothing, as the most is above it.
REPETITION_PENALTY_MIN = 0.01


def millionths(value: float) -> int:
    """A sampling option as it is signed for and computed with. Gives back `count` for `count / MICRO`."""
    return round(value * MICRO)


@dataclass(frozen=True, slots=True)
class Terms(Record):
    """What a session is about; its hash is the session id, so every receipt binds the sampling and the prompt as well.

    `temperature`, `top_p`, `min_p` and `repetition_penalty` are in millionths; temperature 0 is greedy, top_k 0 is no limit, a
    penalty of one million is none. `seed` makes sampling repeatable. `steps_max`: passes through the model at most. `end_tokens`:
    ids that end the answer. `prompt`: leaf hash of the first step's input bytes. `window`: steps per receipt; 0 asks for none,
    and then nothing of the session can be verified. `challenge`: head of the hash chain that audits of the session are drawn from
    (`nexus.proof.audit`); empty where there will be none. `answered`: where the session goes on with an answer that another one
    began, the token ids of that answer so far, with which the prompt then ends; the sampler counts them as its own.
    """

    spec: int = uint(SPEC, least=SPEC)
    nonce: bytes = raw(16)
    coordinator: bytes = raw(32)
    model_root: bytes = digest()
    plan_root: bytes = digest()
    prompt: bytes = digest()
    steps_max: int = uint(STEPS_MAX)
    window: int = uint(WINDOW_MAX)
    temperature: int = uint(TEMPERATURE_MAX * MICRO)
    top_k: int = uint(TOP_K_MAX)
    top_p: int = uint(MICRO, least=1)
    min_p: int = uint(MICRO)
    repetition_penalty: int = uint(REPETITION_PENALTY_MAX * MICRO, least=millionths(REPETITION_PENALTY_MIN))
    seed: int = uint()
    end_tokens: tuple[int, ...] = many(uint(2**32 - 1), 64)
    challenge: bytes = optional_digest()
    answered: bytes = raw(most=4 * ANSWERED_MAX)

    @property
    def session(self) -> bytes:
        return tagged_hash("session", self.to_bytes())


@lru_cache(maxsize=1024)
def _id_of(tag: str, record: Record) -> bytes:
    # One receipt's id is wanted by its signature, its check and its neighbours in the chain; records are immutable.
    return tagged_hash(tag, record.to_bytes())


@dataclass(frozen=True, slots=True)
class Request(Record):
    """The coordinator asks one stage for steps [step0, step0 + n). `in_root` and `parent` are given to the first stage only;
    every later stage takes its input from its parent's receipt."""

    spec: int = uint(SPEC, least=SPEC)
    coordinator: bytes = raw(32)
    session: bytes = digest()
    model_root: bytes = digest()
    plan_root: bytes = digest()
    stage: int = uint(4095)
    step0: int = uint(STEPS_MAX)
    n: int = uint(STEPS_MAX)
    in_root: bytes = optional_digest()
    parent: bytes = optional_digest()

    @property
    def id(self) -> bytes:
        return _id_of("request", self)


@dataclass(frozen=True, slots=True)
class SignedRequest(Record):
    request: Request = nested(Request)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, request: Request, coordinator: Identity) -> SignedRequest:
        return cls(request, coordinator.sign_digest(request.id))

    def verify(self) -> Request:
        verify_digest(self.request.coordinator, "request", self.request.id, self.signature)
        return self.request


@dataclass(frozen=True, slots=True)
class Receipt(Record):
    """A stage's statement about steps [step0, step0 + n).

    `in_root`, `out_root`: Merkle roots over the step payloads, n leaves each. `kv_len`: tokens in the KV cache afterwards.
    `trace_root`, `kv_root`: over everything that was computed, and over all keys and values so far, see `nexus.proof.trace`. Both
    are empty in the float profile, whose arithmetic cannot be repeated bit for bit elsewhere; an encoder keeps no keys and values.
    Neither a time nor a free nonce is in it, so there is nothing to grind.
    """

    spec: int = uint(SPEC, least=SPEC)
    profile: str = text(16)
    model_root: bytes = digest()
    session: bytes = digest()
    node: bytes = raw(32)
    stage: int = uint(4095)
    step0: int = uint(STEPS_MAX)
    n: int = uint(WINDOW_MAX)
    kv_len: int = uint(2**32)
    request: bytes = digest()
    parent: bytes = optional_digest()
    prev: bytes = optional_digest()
    in_root: bytes = digest()
    out_root: bytes = digest()
    kv_root: bytes = optional_digest()
    trace_root: bytes = optional_digest()

    @property
    def id(self) -> bytes:
        """Leaves the signature out: one statement has one id."""
        return _id_of("receipt", self)


@dataclass(frozen=True, slots=True)
class SignedReceipt(Record):
    receipt: Receipt = nested(Receipt)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, receipt: Receipt, node: Identity) -> SignedReceipt:
        return cls(receipt, node.sign_digest(receipt.id))

    def verify(self) -> Receipt:
        verify_digest(self.receipt.node, "receipt", self.receipt.id, self.signature)
        return self.receipt


@dataclass(frozen=True, slots=True)
class Refusal(Record):
    """A stage declines, or cannot go on. `code` is one of the error codes of `nexus.core.errors`."""

    session: bytes = digest()
    node: bytes = raw(32)
    stage: int = uint(4095)
    step: int = uint(STEPS_MAX)
    code: str = text(32)
    cause: str = text(1024)
    fix: str = text(1024)


@dataclass(frozen=True, slots=True)
class SignedRefusal(Record):
    refusal: Refusal = nested(Refusal)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, refusal: Refusal, node: Identity) -> SignedRefusal:
        return cls(refusal, node.sign("refusal", refusal.to_bytes()))

    def verify(self) -> Refusal:
        verify_signature(self.refusal.node, "refusal", self.refusal.to_bytes(), self.signature)
        return self.refusal


def payload_root(payloads: Iterable[bytes]) -> bytes:
    """in_root or out_root over the payloads of a window, in step order."""
    return merkle_root(leaf_hash(payload) for payload in payloads)


def tokens_to_bytes(tokens: Iterable[int]) -> bytes:
    """Token ids as they are hashed and sent: unsigned 32-bit little-endian each."""
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def tokens_from_bytes(payload: bytes) -> list[int]:
    if len(payload) % 4:
        raise MalformedError("token ids take four bytes each")
    return [int.from_bytes(payload[at : at + 4], "little") for at in range(0, len(payload), 4)]


def check_parent(receipt: Receipt, parent: Receipt | None) -> None:
    """The chain rule between a receipt and the one it names as parent. Raises VerificationError."""
    if parent is None:
        if receipt.parent:
            raise VerificationError("a receipt names a parent that is not there")
        return
    if receipt.parent != parent.id:
        raise VerificationError(f"stage {receipt.stage} does not chain to the receipt of stage {parent.stage}")
