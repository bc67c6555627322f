"""Receipts that contradict each other, or what they name: two answers to one question, and chains that do not hold.

No arithmetic is redone here. Only receipts of the exact profile convict: an honest node may give other bits in the float profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import merkle_root
from nexus.core.keys import peer_id_of
from nexus.core.manifest import EXACT
from nexus.core.record import Record, digest, many, nested
from nexus.proof.evidence.record import CHAIN, EQUIVOCATION, Evidence, Verdict
from nexus.proof.receipts import WINDOW_MAX, Receipt, SignedReceipt, Terms

# What a stage is asked, as far as its receipt says: an honest node answers it in one way only.
_QUESTION = ("spec", "profile", "model_root", "session", "node", "stage", "step0", "n", "request", "parent", "prev", "in_root")
_ANSWER = ("kv_len", "out_root", "kv_root", "trace_root")


@dataclass(frozen=True, slots=True)
class Equivocation(Record):
    """Two receipts that one node signed for one question. The one with the lesser id comes first, so that the same two make the
    same evidence wherever they are found."""

    one: SignedReceipt = nested(SignedReceipt)
    other: SignedReceipt = nested(SignedReceipt)

    @classmethod
    def of(cls, one: SignedReceipt, other: SignedReceipt) -> Self:
        return cls(*sorted((one, other), key=lambda signed: signed.receipt.id))

    def evidence(self) -> Evidence:
        return Evidence(1, EQUIVOCATION, self.one.receipt.node, self.to_bytes())


def is_equivocation(one: Receipt, other: Receipt) -> bool:
    """Whether two receipts, their signatures taken as good, answer one question in two ways."""
    if one.profile != EXACT or any(getattr(one, name) != getattr(other, name) for name in _QUESTION):
        return False
    return any(getattr(one, name) != getattr(other, name) for name in _ANSWER)


def equivocation_verdict(evidence: Evidence) -> Verdict:
    """Raises MalformedError, VerificationError."""
    body = Equivocation.from_bytes(evidence.body)
    one, other = body.one.verify(), body.other.verify()
    if one.id > other.id:
        raise MalformedError("the receipt with the lesser id comes first")
    _require_exact(one)
    if not is_equivocation(one, other):
        raise VerificationError("the two receipts do not answer one question in two ways")
    differing = next(name for name in _ANSWER if getattr(one, name) != getattr(other, name))
    return _verdict(
        evidence, one, f"{peer_id_of(one.node)} signed two receipts for {_steps(one)} of one session that differ in {differing}"
    )


@dataclass(frozen=True, slots=True)
class BrokenChain(Record):
    """A receipt and the one record that it names, or the session's terms, which it does not go with.

    `named`: the receipt that is `receipt.parent` or `receipt.prev`; its signature is not needed, for its id names it. For what
    comes back to the first stage of a causal model both are given, the parent first. `inputs`: the leaf hashes under
    `receipt.in_root`, in that case behind those of the previous receipt; `outputs`: those under the parent's `out_root`.
    `terms`: alone, where the first input is not the session's prompt.
    """

    receipt: SignedReceipt = nested(SignedReceipt)
    named: tuple[Receipt, ...] = many(nested(Receipt), 2)
    terms: tuple[Terms, ...] = many(nested(Terms), 1)
    inputs: tuple[bytes, ...] = many(digest(), 2 * WINDOW_MAX)
    outputs: tuple[bytes, ...] = many(digest(), WINDOW_MAX)

    def evidence(self) -> Evidence:
        return Evidence(1, CHAIN, self.receipt.receipt.node, self.to_bytes())


def chain_verdict(evidence: Evidence) -> Verdict:
    """Raises MalformedError, VerificationError."""
    body = BrokenChain.from_bytes(evidence.body)
    receipt = body.receipt.verify()
    _require_exact(receipt)
    match (body.terms, body.named):
        case ((terms,), ()):
            fault = _prompt_fault(receipt, terms, body.inputs)
        case ((), (named,)):
            fault = _named_fault(receipt, named)
        case ((), (parent, prev)):
            fault = _ring_fault(receipt, parent, prev, body.inputs, body.outputs)
        case _:
            raise MalformedError("a broken chain is shown by the terms, or by one or two receipts")
    if not fault:
        raise VerificationError("the receipt goes with all that it names")
    return _verdict(evidence, receipt, f"{peer_id_of(receipt.node)} signed for {_steps(receipt)}, {fault}")


def find_contradiction(
    signed: SignedReceipt, parent: SignedReceipt | None, before: SignedReceipt | None, prev: SignedReceipt | None
) -> tuple[Evidence, Verdict] | None:
    """What convicts somebody among the receipts of a session as its coordinator has them, if anything does.

    `signed`: a stage's newest receipt. `parent`: the one that the stage was given as its parent. `before`: the one that the same
    node gave the coordinator for those steps. `prev`: the stage's own one before.
    """
    found: list[Evidence] = []
    if parent and before and parent != before:
        found.append(Equivocation.of(parent, before).evidence())
    found += [BrokenChain(signed, (named.receipt,), (), (), ()).evidence() for named in (parent, prev) if named]
    for evidence in found:
        try:
            return evidence, (equivocation_verdict if evidence.kind == EQUIVOCATION else chain_verdict)(evidence)
        except (MalformedError, VerificationError):
            continue  # as it is with all honest receipts
    return None


def _named_fault(receipt: Receipt, named: Receipt) -> str:
    if named.id == receipt.prev:
        return _prev_fault(receipt, named)
    if named.id == receipt.parent:
        return _parent_fault(receipt, named)
    raise VerificationError("the receipt does not name the other one")


def _prev_fault(receipt: Receipt, prev: Receipt) -> str:
    same = ("profile", "model_root", "session", "node", "stage", "request")
    if any(getattr(receipt, name) != getattr(prev, name) for name in same):
        return "and names a receipt of another stage, session or model as its previous one"
    if prev.step0 + prev.n != receipt.step0:
        return f"and names a receipt for {_steps(prev)} as its previous one"
    # A causal model has the prompt's tokens in its cache at least, and reads one per later step; an encoder has no cache.
    if receipt.kv_len != (prev.kv_len + receipt.n if prev.kv_len else 0):
        return f"and for {receipt.kv_len} tokens in its cache after {prev.kv_len}"
    return ""


def _parent_fault(receipt: Receipt, parent: Receipt) -> str:
    same = ("profile", "model_root", "session")
    if any(getattr(receipt, name) != getattr(parent, name) for name in same):
        return "and names a receipt of another session or model as its parent"
    if receipt.stage == 0:
        # The last stage's receipt of the window before. What went round is shown by both receipts together, see `_ring_fault`.
        if parent.step0 + parent.n != receipt.step0 or parent.kv_len + receipt.n != receipt.kv_len:
            return f"and names a receipt for {_steps(parent)} as that of the tokens that it read"
        return ""
    if parent.stage != receipt.stage - 1:
        return f"and names a receipt of stage {parent.stage} as that of the stage before {receipt.stage}"
    if (parent.step0, parent.n, parent.kv_len) != (receipt.step0, receipt.n, receipt.kv_len):
        return f"and names a receipt for {_steps(parent)} as its parent"
    return "" if parent.out_root == receipt.in_root else "with an input that is not the output of the receipt that it names"


def _ring_fault(receipt: Receipt, parent: Receipt, prev: Receipt, inputs: tuple[bytes, ...], outputs: tuple[bytes, ...]) -> str:
    """At the first stage of a causal model: what came back is what the last stage signed for."""
    if receipt.stage or parent.id != receipt.parent or prev.id != receipt.prev:
        raise VerificationError("the receipt is not one of a first stage that names the other two")
    if _parent_fault(receipt, parent) or _prev_fault(receipt, prev) or parent.n != prev.n:
        raise VerificationError("the receipts are not for steps that follow one another")
    before, own = inputs[: prev.n], inputs[prev.n :]
    _require_leaves(before, prev.n, prev.in_root)
    _require_leaves(own, receipt.n, receipt.in_root)
    _require_leaves(outputs, parent.n, parent.out_root)
    return "" if (*before[1:], own[0]) == outputs else "but read other tokens than the last stage's receipt that it names is for"


def _prompt_fault(receipt: Receipt, terms: Terms, inputs: tuple[bytes, ...]) -> str:
    if terms.session != receipt.session or receipt.stage or receipt.step0:
        raise VerificationError("the receipt is not that of the prompt of the session with these terms")
    _require_leaves(inputs, receipt.n, receipt.in_root)
    return "" if inputs[0] == terms.prompt else "with another prompt than the session's"


def _require_leaves(leaves: tuple[bytes, ...], count: int, root: bytes) -> None:
    if not count or len(leaves) != count or merkle_root(leaves) != root:
        raise VerificationError("the hashes given are not those under the receipt's root")


def _require_exact(receipt: Receipt) -> None:
    if receipt.profile != EXACT:
        raise VerificationError(f"receipts of profile {receipt.profile!r} convict nobody")


def _steps(receipt: Receipt) -> str:
    return f"steps {receipt.step0} to {receipt.step0 + max(receipt.n, 1) - 1}"


def _verdict(evidence: Evidence, receipt: Receipt, summary: str) -> Verdict:
    return Verdict(
        accused=receipt.node,
        kind=evidence.kind,
        evidence=evidence.id,
        summary=summary,
        session=receipt.session,
        model_root=receipt.model_root,
        stage=receipt.stage,
        step=receipt.step0,
    )
