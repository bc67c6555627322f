"""A swarm of which a part cheats: who is found out, by which proof, after how long, and whether an honest node is ever harmed.

Sessions, receipts, audits, evidence, standing and ledger are the program's own code; what is simulated is who meets whom. One
request follows the other, and between two of them nodes gossip. Everything follows from the seed.

The asker of a session audits it. Malicious askers audit nothing, tell nobody of each other, and pass nothing on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from nexus.core.audits import DUAL, LIGHT, REPLICA
from nexus.core.errors import VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity
from nexus.node.evidence import INVALID_MAX
from nexus.proof.accounts import Fork, SignedEntry
from nexus.proof.audit import Cell, challenge
from nexus.proof.evidence import FORK, Evidence
from nexus.swarm.audit_policy import AuditPolicy, stage_policy
from nexus.swarm.ledger import Book, earn_entry, pay_entry, session_cost
from nexus.swarm.standing import DEMOTED, SlashedSet, Standing, Tally, standing_of
from scripts.simulations.cheaters import STRATEGIES, Strategy, accusations
from scripts.simulations.model import HONEST, LAYERS, STAGES, TOKENS, Model
from scripts.simulations.sessions import (
    Part,
    Session,
    audit,
    convicts,
    evidence_of_broken,
    hold_session,
    light_cells,
    light_fault,
    signs_honestly,
)

ATTEMPTS_MAX = 8
# Of the honest nodes those that ask a random other one for news between two requests.
PULL_SHARE = 0.1
PRICE = 1_000
FALSE_ACCUSATIONS_MAX = 400


@dataclass(frozen=True, slots=True)
class Options:
    """`malicious`: share of the nodes. `askers`: honest nodes that ask. `dual`: every request runs on two sets of nodes."""

    seed: int
    nodes: int
    requests: int
    malicious: float
    askers: int
    policy: AuditPolicy
    strategies: tuple[str, ...] = ()

    @property
    def dual(self) -> bool:
        return self.policy.mode == DUAL


@dataclass
class Node:
    """One node, and what it knows of the others. `strategy`: None of an honest one."""

    number: int
    identity: Identity
    strategy: Strategy | None
    slashed: SlashedSet = field(default_factory=SlashedSet)
    tallies: dict[bytes, Tally] = field(default_factory=dict)
    evidence: dict[bytes, Evidence] = field(default_factory=dict)
    refused: set[bytes] = field(default_factory=set)
    invalid: Counter[int] = field(default_factory=Counter)
    executions: Counter[int] = field(default_factory=Counter)
    payment: SignedEntry | None = None

    @property
    def key(self) -> bytes:
        return self.identity.public_key

    @property
    def honest(self) -> bool:
        return self.strategy is None

    def tally(self, key: bytes) -> Tally:
        return self.tallies.get(key, Tally())

    def standing(self, key: bytes, probation: int) -> Standing:
        """What this node thinks of another one."""
        found = self.slashed.evidence_of(key)
        return standing_of(self.tally(key), evidence_id=found, held=False, suspension=None, probation_runs=probation, now_ms=0)


@dataclass
class Found:
    """What became of one malicious node."""

    executions: int = 0
    false: int = 0
    wrong_before: int = 0
    wrong_after: int = 0
    convicted: int | None = None
    everywhere: int | None = None
    kind: str = ""
    bytes: int = 0


@dataclass
class Counts:
    requests: int = 0
    answered: int = 0
    unanswered: int = 0
    after: int = 0
    wrong_before: int = 0
    wrong_after: int = 0
    false_before: int = 0
    false_after: int = 0
    refused: int = 0
    sessions: int = 0
    broken: int = 0
    layers_computed: int = 0
    layers_audited: int = 0
    cells: int = 0
    stages_audited: int = 0
    stages_run: int = 0
    accusations: int = 0
    accusations_believed: int = 0
    unpaid_broken: int = 0
    unpaid_forks: int = 0


class Swarm:
    def __init__(self, options: Options, model: Model) -> None:
        self.options = options
        self.model = model
        self.rng = Random(options.seed)
        self.book = Book()
        self.counts = Counts()
        chosen = [one for one in STRATEGIES if (one.name in options.strategies if options.strategies else one.mixed)]
        bad = round(options.nodes * options.malicious)
        strategies: list[Strategy | None] = [chosen[number % len(chosen)] for number in range(bad)]
        strategies += [None] * (options.nodes - bad)
        self.rng.shuffle(strategies)
        self.nodes = [Node(number, self._identity(number), strategy) for number, strategy in enumerate(strategies)]
        self.by_key = {node.key: node for node in self.nodes}
        self.honest = [node for node in self.nodes if node.honest]
        self.askers = self.honest[: options.askers]
        self.found = {node.number: Found() for node in self.nodes if not node.honest}
        self._verdicts: dict[bytes, bool] = {}
        self._faults: dict[tuple[tuple[str, ...], bytes, int, Cell], bool] = {}
        self._earlier: Session | None = None
        self._request = 0

    def _identity(self, number: int) -> Identity:
        return Identity(tagged_hash("simulated node", self.options.seed.to_bytes(8, "little"), number.to_bytes(4, "little")))

    def run(self) -> None:
        for request in range(self.options.requests):
            self._request = request
            self._one_request()
            self._gossip()
        # What is still on its way arrives.
        while any(self._gossip(everyone=True) for _ in range(4)):
            pass

    # --- asking -------------------------------------------------------------------------------------------------------------

    def _one_request(self) -> None:
        prompt = self.rng.randrange(len(self.model.prompts))
        if self.rng.random() < self.options.malicious:
            bad = self.rng.choice([node for node in self.nodes if not node.honest])
            if self._malicious_request(bad, prompt):
                return
        self._honest_request(self.rng.choice(self.askers), prompt)

    def _honest_request(self, asker: Node, prompt: int) -> None:
        """Tries until an answer is one that the asker has no reason to doubt."""
        counts = self.counts
        counts.requests += 1
        for _ in range(ATTEMPTS_MAX):
            runs = self._plan(asker)
            probation = self.options.policy.probation_sessions
            on_probation = any(asker.tally(node.key).audits_ok < probation for run in runs for node in run)
            sessions = [self._hold(asker, run, prompt, others) for run, others in zip(runs, reversed(runs), strict=True)]
            # Each is looked at, also where another one is refused already: whoever is found out is found out.
            believed = [self._examine(asker, session) for session in sessions]
            if not all(believed):
                continue
            if len({session.answer for session in sessions}) > 1:
                # Somebody lied: everything is looked at, and whoever it was is not asked again.
                for session in sessions:
                    self._audit(asker, session, range(len(STAGES)))
                continue
            counts.answered += 1
            counts.after += not on_probation
            self._note_accepted(sessions, prompt, on_probation=on_probation)
            return
        counts.unanswered += 1

    def _plan(self, asker: Node) -> list[list[Node]]:
        """The nodes of every run, each node in one place at most; demoted ones only where others are too few."""
        wanted = len(STAGES) * (2 if self.options.dual else 1)
        probation = self.options.policy.probation_sessions
        standings = [(node, asker.standing(node.key, probation)) for node in self.nodes if node is not asker]
        good = [node for node, standing in standings if standing.may_work and standing.state != DEMOTED]
        rest = [node for node, standing in standings if standing.may_work and standing.state == DEMOTED]
        chosen = self.rng.sample(good, min(wanted, len(good)))
        chosen += self.rng.sample(rest, wanted - len(chosen))
        return [chosen[at : at + len(STAGES)] for at in range(0, wanted, len(STAGES))]

    def _hold(self, asker: Node, nodes: Sequence[Node], prompt: int, others: Sequence[Node] = ()) -> Session:
        """One session over these nodes. `others`: who does the same in the other run of the request, or the same ones."""
        parts = []
        probation = self.options.policy.probation_sessions
        for node, other in zip(nodes, others or nodes, strict=True):
            if node.strategy is None:
                parts.append(Part(node.identity, HONEST))
            else:
                executions, twin = node.executions[asker.number], other is not node and other.strategy is node.strategy
                parts.append(node.strategy.part(node.identity, executions, probation, self.rng, twin=twin))
            node.executions[asker.number] += 1
        session = hold_session(self.model, self.rng, asker.identity, parts, prompt)
        self.counts.sessions += 1
        self.counts.layers_computed += LAYERS
        self.counts.stages_run += len(STAGES)
        for stage, (node, part, work) in enumerate(zip(nodes, parts, session.works, strict=True)):
            if not node.honest:
                found = self.found[node.number]
                found.executions += 1
                lies = part.signs is not signs_honestly or part.withholds
                found.false += lies or self.model.is_false(part.act, stage, work)
        return session

    def _examine(self, asker: Node, session: Session) -> bool:
        """Whether the asker may believe the session, after its receipts were checked and the audits that are due were made."""
        if session.broken:
            self._note_broken(asker, session)
            return False
        for part in session.parts:
            self._note_run(asker, part.node, flaky=False)
        policy = self.options.policy
        replicas = []
        for stage, part in enumerate(session.parts):
            drawn = challenge(session.shown[stage][-1].receipt.id, session.challenge.reveal(0))
            decision = stage_policy(policy, None, drawn, asker.tally(part.node).audits_ok, is_own=part.node == asker.key)
            if decision.mode == REPLICA or (decision.mode == LIGHT and self._light_finds(asker, session, stage, drawn)):
                replicas.append(stage)
        guilty = self._audit(asker, session, replicas)
        # Who is convicted gets nothing; the others did their part.
        self._pay(asker, session, guilty)
        return not guilty

    def _light_finds(self, asker: Node, session: Session, stage: int, drawn: bytes) -> bool:
        """Whether one of the cells that the challenge picks is wrong; then all is computed again."""
        cells = light_cells(self.model, session, stage, drawn, self.options.policy.cells)
        self.counts.stages_audited += 1
        self.counts.cells += len(cells)
        acts = tuple(part.act for part in session.parts)
        for cell in cells:
            key = acts, session.prompt, stage, cell
            if key not in self._faults:
                self._faults[key] = light_fault(self.model, session, stage, cell)
            if self._faults[key]:
                return True
        node = session.parts[stage].node
        asker.tallies[node] = asker.tally(node).audited(True)
        return False

    def _audit(self, asker: Node, session: Session, wanted: Sequence[int]) -> frozenset[bytes]:
        """Looks at these stages; who is convicted by what it finds."""
        result = audit(self.model, session, wanted)
        self.counts.stages_audited += len(wanted)
        self.counts.layers_audited += result.layers
        for stage in result.right:
            key = session.parts[stage].node
            asker.tallies[key] = asker.tally(key).audited(True)
        if result.guilty is None or result.evidence is None:
            return frozenset()
        key = session.parts[result.guilty].node
        asker.tallies[key] = asker.tally(key).audited(False)
        self._submit(asker, result.evidence)
        return frozenset({key})

    def _note_broken(self, asker: Node, session: Session) -> None:
        self.counts.broken += 1
        self.counts.unpaid_broken += sum(self.by_key[part.node].honest for part in session.parts)
        if session.silent is not None:
            self._note_run(asker, session.parts[session.silent].node, flaky=True)
            return
        evidence = evidence_of_broken(session)
        if evidence is not None:
            self._submit(asker, evidence)

    def _note_run(self, asker: Node, key: bytes, *, flaky: bool) -> None:
        asker.tallies[key] = asker.tally(key).ran(flaky=flaky)

    def _note_accepted(self, sessions: Sequence[Session], prompt: int, *, on_probation: bool) -> None:
        counts = self.counts
        wrong = sessions[0].answer != self.model.answers[prompt]
        false = any(
            self.model.is_false(part.act, stage, session.works[stage])
            for session in sessions
            for stage, part in enumerate(session.parts)
        )
        counts.wrong_before += wrong and on_probation
        counts.wrong_after += wrong and not on_probation
        counts.false_before += false and on_probation
        counts.false_after += false and not on_probation
        for part in (part for session in sessions for part in session.parts if wrong and part.act != HONEST):
            found = self.found[self.by_key[part.node].number]
            found.wrong_before += on_probation
            found.wrong_after += not on_probation

    # --- malicious askers ---------------------------------------------------------------------------------------------------

    def _malicious_request(self, asker: Node, prompt: int) -> bool:
        """A session that a malicious node asks for; whether the others take part."""
        assert asker.strategy is not None
        nodes = self.rng.sample([node for node in self.nodes if node is not asker], len(STAGES))
        if any(asker.key in node.slashed for node in nodes if node.honest):
            self.counts.refused += 1
            return False
        session = self._hold(asker, nodes, prompt)
        if session.broken:
            return True
        if asker.strategy.forks and asker.payment is not None:
            self._double_spend(asker, session, asker.payment)
        else:
            asker.payment = self._pay(asker, session, frozenset()) or asker.payment
        if asker.strategy.accuses and self._earlier is not None and self.counts.accusations < FALSE_ACCUSATIONS_MAX:
            self._accuse_falsely(asker, session, self._earlier)
        self._earlier = session
        return True

    def _accuse_falsely(self, asker: Node, session: Session, earlier: Session) -> None:
        genuine = [evidence for node in self.askers for evidence in node.evidence.values()]
        if asker.payment is None:
            return
        for evidence in accusations(session, earlier, genuine, asker.payment.entry):
            if self.by_key[evidence.accused].honest:
                self.counts.accusations += 1
                asker.evidence[evidence.id] = evidence

    def _double_spend(self, asker: Node, session: Session, spent: SignedEntry) -> None:
        """Pays with the number of an entry that is spent. An honest stage finds that the account has another one there: a fork."""
        cost = session_cost(session.plan, TOKENS, self._prices(session), asker.key)
        payee = next((self.by_key[part.node] for part in session.parts if self.by_key[part.node].honest), None)
        if cost is None or payee is None:
            return
        entry = replace(spent.entry, session=session.terms.session, amount=cost.amount, shares=cost.shares)
        signed = SignedEntry.sign(entry, asker.identity)
        try:
            self.book.apply(signed)
        except VerificationError:
            self.counts.unpaid_forks += sum(share.amount for share in cost.shares if self.by_key[share.account].honest)
            self._submit(payee, Evidence(1, FORK, asker.key, Fork.of(signed, spent).to_bytes()))
        else:
            raise RuntimeError("the ledger took two entries of one number")

    # --- paying -------------------------------------------------------------------------------------------------------------

    def _pay(self, payer: Node, session: Session, forfeited: frozenset[bytes]) -> SignedEntry | None:
        cost = session_cost(session.plan, TOKENS, self._prices(session), payer.key, forfeited)
        if cost is None:
            return None
        payment = SignedEntry.sign(pay_entry(self.book.account(payer.key), session.terms.session, cost), payer.identity)
        self.book.apply(payment)
        for share in cost.shares:
            earner = self.by_key[share.account]
            self.book.apply(SignedEntry.sign(earn_entry(self.book.account(earner.key), payment.entry), earner.identity))
        return payment

    def _prices(self, session: Session) -> dict[bytes, int]:
        return {part.node: PRICE for part in session.parts}

    # --- evidence -----------------------------------------------------------------------------------------------------------

    def _submit(self, node: Node, evidence: Evidence) -> None:
        """Evidence that a node found itself."""
        if not self._convicts(evidence):
            raise RuntimeError(f"evidence of kind {evidence.kind} that an honest node made does not convict")
        self._believe(node, evidence)

    def _believe(self, node: Node, evidence: Evidence) -> None:
        node.slashed.add(evidence.accused, evidence.id)
        node.evidence[evidence.id] = evidence
        guilty = self.by_key[evidence.accused]
        if guilty.honest:
            self.counts.accusations_believed += 1
            return
        found = self.found[guilty.number]
        if found.convicted is None:
            found.convicted, found.kind, found.bytes = self._request, evidence.kind, len(evidence.to_file())
        if found.everywhere is None and all(guilty.key in one.slashed for one in self.honest):
            found.everywhere = self._request

    def _convicts(self, evidence: Evidence) -> bool:
        """The verdict follows from the evidence alone: it is made once, for all nodes."""
        if evidence.id not in self._verdicts:
            self._verdicts[evidence.id] = convicts(evidence, self.model)
        return self._verdicts[evidence.id]

    def _gossip(self, *, everyone: bool = False) -> bool:
        """Honest nodes ask others for news; malicious ones have none to give but false accusations. Whether anyone learned any."""
        learned = False
        for node in self.honest:
            if everyone or self.rng.random() < PULL_SHARE:
                learned |= self._pull(node, self.rng.choice(self.nodes))
        return learned

    def _pull(self, node: Node, peer: Node) -> bool:
        if peer is node or peer.key in node.slashed or node.invalid[peer.number] >= INVALID_MAX:
            return False
        if peer.strategy is not None and not peer.strategy.accuses:
            return False
        learned = False
        for evidence in list(peer.evidence.values()):
            if evidence.id in node.evidence or evidence.id in node.refused or not node.slashed.wants(evidence.accused, evidence.id):
                continue
            if self._convicts(evidence):
                self._believe(node, evidence)
                learned = True
                continue
            node.refused.add(evidence.id)
            node.invalid[peer.number] += 1
            if node.invalid[peer.number] >= INVALID_MAX:
                break
        return learned
