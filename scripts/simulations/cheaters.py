"""What the malicious nodes of the simulation do, by name. Each is honest in everything but what its strategy is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from nexus.core.keys import Identity
from nexus.proof.accounts import PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.evidence import EQUIVOCATION, FORK, Evidence
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from scripts.simulations.model import FORGED, HONEST, LAZY, ONE_BIT, RANDOM, REWRITTEN
from scripts.simulations.sessions import Part, Session, Signs, breaks_the_chain, signs_honestly, signs_twice

# When a node cheats: on everybody, only on those who trust it already, and of these only where an accomplice does the same work in
# the second run of a request.
ALWAYS, AFTER_PROBATION, WITH_TWIN = "always", "after probation", "with a twin"
# A sleeper cannot see whether an asker trusts it already. It waits for so many executions more.
PATIENCE = 10


@dataclass(frozen=True, slots=True)
class Strategy:
    """`act`: what it computes when it cheats (`nexus.engine.exact.tampering`, or of `scripts.simulations.model`). `when`: to whom
    it does that; `share`: how often. `changes`: whether that may change answers. `accuses`, `forks`: what it does as the asker of
    a session. `mixed`: whether it is in the mix unless others are asked for."""

    name: str
    act: str = HONEST
    when: str = ALWAYS
    share: float = 1.0
    signs: Signs = signs_honestly
    withholds: bool = False
    changes: bool = False
    accuses: bool = False
    forks: bool = False
    mixed: bool = True

    def part(self, identity: Identity, executions: int, probation: int, rng: Random, *, twin: bool) -> Part:
        """What the node does in a session of somebody for whom it did `executions` before. `twin`: whether an accomplice does the
        same stage in the other run of a request."""
        trusted = executions >= probation + PATIENCE
        ready = {ALWAYS: True, AFTER_PROBATION: trusted, WITH_TWIN: trusted and twin}[self.when]
        cheats = ready and rng.random() < self.share
        return Part(identity, self.act, self.signs, self.withholds) if cheats else Part(identity, HONEST)


STRATEGIES = (
    Strategy("requantised-weights", "requantised-weights", changes=True),
    Strategy("sleeper", "requantised-weights", AFTER_PROBATION, changes=True),
    Strategy("random-output", RANDOM, changes=True),
    Strategy("equivocation", signs=signs_twice),
    Strategy("false-accuser", accuses=True),
    Strategy("double-spender", forks=True),
    Strategy("one-bit", ONE_BIT, changes=True),
    Strategy("forged-trace", FORGED),
    Strategy("rare-cheater", "skipped-layer", share=0.02, changes=True),
    Strategy("withheld-trace", withholds=True),
    Strategy("rare-sleeper", "skipped-layer", AFTER_PROBATION, share=0.2, changes=True),
    Strategy("swapped-weights", "swapped-weights", changes=True),
    Strategy("pruned-weights", "pruned-weights", changes=True),
    Strategy("flipped-bit", "flipped-bit", changes=True),
    Strategy("skipped-layer", "skipped-layer", changes=True),
    Strategy("truncated-cache", "truncated-cache", changes=True),
    Strategy("wrong-tables", "wrong-tables", changes=True),
    Strategy("lazy-copy", LAZY, changes=True),
    Strategy("rewritten-log", REWRITTEN),
    Strategy("broken-chain", signs=breaks_the_chain),
    Strategy("twin", "requantised-weights", WITH_TWIN, changes=True, mixed=False),
)


def accusations(session: Session, earlier: Session, genuine: Sequence[Evidence], entry: Entry) -> Iterator[Evidence]:
    """False evidence against the honest stages of a session: whatever an asker could put together that looks like a proof.

    `earlier`: another session of the same asker. `genuine`: evidence that convicts somebody else. `entry`: of somebody's ledger.
    """
    for stage, part in enumerate(session.parts):
        mine, node = session.shown[stage][0], part.node
        altered = replace(mine, receipt=replace(mine.receipt, out_root=mine.receipt.in_root))
        yield Equivocation.of(mine, altered).evidence()
        yield Equivocation.of(mine, mine).evidence()
        yield BrokenChain(mine, (earlier.shown[stage][0].receipt,), (), (), ()).evidence()
        yield BrokenChain(session.shown[stage][1], (mine.receipt,), (), (), ()).evidence()
        yield Evidence(1, FORK, node, _false_fork(node, entry).to_bytes())
        yield Evidence(1, EQUIVOCATION, node, b"\x80")
        for proof in genuine[:4]:
            yield replace(proof, accused=node)
            yield replace(proof, accused=node, body=proof.body[: len(proof.body) // 2])


def _false_fork(node: bytes, entry: Entry) -> Fork:
    """Two entries in the name of a node that never signed them."""
    of_node = replace(entry, account=node, kind=PAY, amount=1_000, shares=(Share(bytes(31) + b"\1", 900),), payment=b"")
    return Fork.of(*(SignedEntry(replace(of_node, session=bytes([number]) * 32), bytes(64)) for number in (1, 2)))
