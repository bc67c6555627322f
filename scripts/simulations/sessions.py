"""One session of the simulation: real keys, terms, requests and receipts, and what the one who asked makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from nexus.core.errors import NexusError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT
from nexus.core.plan import Plan, PlanStage
from nexus.proof.accuse import AccusedStage, accuse
from nexus.proof.audit import Cell, ChallengeChain, chain_of, pick_cells
from nexus.proof.audit_check import AuditedStage, find_fault
from nexus.proof.audit_open import open_cell
from nexus.proof.bundle import ChainVerifier, first_stage_inputs, make_requests
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import MICRO, Receipt, SignedReceipt, SignedRequest, Terms, payload_root
from nexus.proof.trace import check_trace
from scripts.simulations.model import PROMPT_TOKENS, STAGES, STEPS, WINDOW, WINDOWS, Model, Work

# What a stage makes of its honest receipt: the one that it signs for the asker, and the one for the next stage.
Signs = Callable[[Receipt], tuple[Receipt, Receipt]]


def signs_honestly(receipt: Receipt) -> tuple[Receipt, Receipt]:
    return receipt, receipt


def signs_twice(receipt: Receipt) -> tuple[Receipt, Receipt]:
    """Tells the next stage another thing than the asker."""
    return receipt, replace(receipt, trace_root=leaf_hash(receipt.trace_root))


def breaks_the_chain(receipt: Receipt) -> tuple[Receipt, Receipt]:
    """Signs for an input that the stage before did not give; the first stage, for a cache that does not continue its own."""
    broken = (
        replace(receipt, kv_len=receipt.kv_len + bool(receipt.prev))
        if receipt.stage == 0
        else replace(receipt, in_root=leaf_hash(receipt.in_root))
    )
    return broken, broken


@dataclass(frozen=True, slots=True)
class Part:
    """Who has a stage, and what it does there. `withholds`: keeps what its roots are made of to itself."""

    identity: Identity
    act: str
    signs: Signs = signs_honestly
    withholds: bool = False

    @property
    def node(self) -> bytes:
        return self.identity.public_key


@dataclass(frozen=True, slots=True)
class Session:
    """A session that is over. `shown`: per stage the receipts that the asker has; `told`: those that the next stage has. `broken`:
    why the asker could not accept them, "" if it could, and `silent` the stage that did not give what is due."""

    plan: Plan
    terms: Terms
    challenge: ChallengeChain
    requests: tuple[SignedRequest, ...]
    parts: tuple[Part, ...]
    works: tuple[Work, ...]
    prompt: bytes
    shown: tuple[tuple[SignedReceipt, ...], ...]
    told: tuple[tuple[SignedReceipt, ...], ...]
    broken: str = ""
    silent: int | None = None

    @property
    def answer(self) -> tuple[bytes, ...]:
        return self.works[-1].outputs


def hold_session(model: Model, rng: Random, asker: Identity, parts: Sequence[Part], prompt: int) -> Session:
    """Runs a session to its end, or to where the asker cannot go on."""
    stages = tuple(PlanStage(part.node, start, end) for part, (start, end) in zip(parts, STAGES, strict=True))
    plan = Plan(1, model.manifest.root, EXACT, EXACT, stages).check(model.manifest)
    nonce = rng.randbytes(16)
    chain = chain_of(asker, nonce)
    text = model.prompts[prompt]
    terms = Terms(
        spec=1,
        nonce=nonce,
        coordinator=asker.public_key,
        model_root=plan.model_root,
        plan_root=plan.root,
        prompt=leaf_hash(text),
        steps_max=STEPS,
        window=WINDOW,
        temperature=0,
        top_k=0,
        top_p=MICRO,
        min_p=0,
        repetition_penalty=MICRO,
        seed=0,
        end_tokens=(),
        challenge=chain.head,
        answered=b"",
    )
    requests = make_requests(asker, terms, plan)
    works = model.session(tuple(part.act for part in parts), prompt)
    shown, told = _receipts(model, terms, requests, parts, works)
    session = Session(plan, terms, chain, requests, tuple(parts), works, text, shown, told)
    silent = next((number for number, part in enumerate(parts) if part.withholds), None)
    if silent is not None:
        return replace(session, broken="a stage withholds what it committed to", silent=silent)
    try:
        _accept(model, session)
    except NexusError as error:
        return replace(session, broken=error.cause)
    return session


def _receipts(
    model: Model, terms: Terms, requests: Sequence[SignedRequest], parts: Sequence[Part], works: Sequence[Work]
) -> tuple[tuple[tuple[SignedReceipt, ...], ...], tuple[tuple[SignedReceipt, ...], ...]]:
    """Window by window, stage by stage, as they come round the ring: what each signs, for the asker and for the next stage."""
    shown: list[list[SignedReceipt]] = [[] for _ in parts]
    told: list[list[SignedReceipt]] = [[] for _ in parts]
    parent: Receipt | None = None
    for window, (step0, n) in enumerate(WINDOWS):
        for stage, (part, work) in enumerate(zip(parts, works, strict=True)):
            trace, shape = work.traces[window], model.shape(stage)
            honest = Receipt(
                spec=1,
                profile=EXACT,
                model_root=terms.model_root,
                session=terms.session,
                node=part.node,
                stage=stage,
                step0=step0,
                n=n,
                kv_len=PROMPT_TOKENS + step0 + n - 1,
                request=requests[stage].request.id,
                parent=parent.id if parent else b"",
                prev=shown[stage][-1].receipt.id if shown[stage] else b"",
                in_root=payload_root(work.inputs[step0 : step0 + n]),
                out_root=payload_root(work.outputs[step0 : step0 + n]),
                kv_root=trace.kv_root(shape),
                trace_root=trace.trace_root(shape, n),
            )
            for_asker, for_next = part.signs(honest)
            signed = SignedReceipt.sign(for_asker, part.identity)
            shown[stage].append(signed)
            told[stage].append(signed if for_next is for_asker else SignedReceipt.sign(for_next, part.identity))
            parent = told[stage][-1].receipt
    return tuple(map(tuple, shown)), tuple(map(tuple, told))


def _accept(model: Model, session: Session) -> None:
    """What an honest asker checks of every receipt and trace as it comes. Raises VerificationError, MalformedError."""
    requests = [signed.request for signed in session.requests]
    verifier = ChainVerifier(model.manifest, session.plan, session.terms, requests)
    for window, (_, n) in enumerate(WINDOWS):
        for stage, work in enumerate(session.works):
            receipt = verifier.accept(session.shown[stage][window])
            check_trace(work.traces[window], model.shape(stage), n, receipt.trace_root, receipt.kv_root)
    inputs = first_stage_inputs(model.manifest, [session.prompt], session.answer)
    verifier.finish(inputs, session.answer)


def evidence_of_broken(session: Session) -> Evidence | None:
    """Evidence out of receipts that do not go together, if they convict anyone. The asker has its own and those that the next
    stages were told, which honest stages show when asked."""
    for evidence in _suspicions(session):
        try:
            verify_evidence(evidence)
        except NexusError:
            continue
        return evidence
    return None


def _suspicions(session: Session) -> Iterator[Evidence]:
    last = len(session.shown) - 1
    for window in range(len(WINDOWS)):
        for stage, receipts in enumerate(session.shown):
            told = session.told[stage][window]
            if told.receipt.id != receipts[window].receipt.id:
                yield Equivocation.of(receipts[window], told).evidence()
            before = session.shown[stage - 1][window] if stage else session.shown[last][window - 1] if window else None
            named = [*([receipts[window - 1]] if window else []), *([before] if before else [])]
            for one in named:
                yield BrokenChain(receipts[window], (one.receipt,), (), (), ()).evidence()


@dataclass(frozen=True, slots=True)
class Audited:
    """What a replica audit found. `right`: stages that were looked at and are right. `guilty`: the stage that is not, with the
    proof. `layers`: how many layers were computed again, all tokens of the session through each."""

    right: tuple[int, ...]
    guilty: int | None
    evidence: Evidence | None
    layers: int


def audit(model: Model, session: Session, wanted: Sequence[int]) -> Audited:
    """Computes the session again, stage after stage up to the last one `wanted`: the outputs of one are the inputs of the next. The
    first difference convicts; what comes after it worked on inputs that nobody here knows."""
    inputs = tuple(first_stage_inputs(model.manifest, [session.prompt], session.answer))
    right: list[int] = []
    layers = 0
    for stage in range(max(wanted, default=-1) + 1):
        work, recomputed = session.works[stage], model.recomputed(stage, inputs)
        start, end = STAGES[stage]
        layers += end - start
        outputs = session.answer if stage == len(STAGES) - 1 else ()
        if stage in wanted or not _gave(session, stage, recomputed.outputs):
            accused = AccusedStage(
                model.manifest,
                model.exact_json,
                session.plan,
                session.terms,
                session.shown[stage],
                work.traces,
                inputs,
                outputs,
            )
            evidence = accuse(accused, recomputed, model.weights)
            if evidence is not None:
                return Audited(tuple(right), stage, evidence, layers)
        if stage in wanted:
            right.append(stage)
        inputs = tuple(recomputed.outputs)
    return Audited(tuple(right), None, None, layers)


def _gave(session: Session, stage: int, outputs: Sequence[bytes]) -> bool:
    """Whether a stage signed for these outputs."""
    signed = [signed.receipt.out_root for signed in session.shown[stage]]
    return signed == [payload_root(outputs[step0 : step0 + n]) for step0, n in WINDOWS]


def light_cells(model: Model, session: Session, stage: int, drawn: bytes, count: int) -> tuple[Cell, ...]:
    """The cells that a light audit of a stage looks at."""
    subject = _subject(model, session, stage)
    return pick_cells(drawn, subject.rows, subject.shape.layers, model.exact.kv_heads, subject.is_last, count)


def light_fault(model: Model, session: Session, stage: int, cell: Cell) -> bool:
    """Whether what a stage shows of a cell is not what the model computes, or it has nothing to show."""
    subject = _subject(model, session, stage)
    own = replace(subject, inputs=session.works[stage].inputs, traces=(), results=())
    try:
        opening = open_cell(
            own, model.shown(session.parts[stage].act, stage, session.works[stage].inputs), model.stage_weights, cell
        )
        keys = model.keys(tuple(sorted(subject.pieces([cell]).items())))
        return find_fault(subject, keys, opening) is not None
    except NexusError:
        return True


def _subject(model: Model, session: Session, stage: int) -> AuditedStage:
    inputs = first_stage_inputs(model.manifest, [session.prompt], session.answer)
    return AuditedStage(
        manifest=model.manifest,
        exact=model.exact,
        plan=session.plan,
        terms=session.terms,
        stage=stage,
        receipts=[signed.receipt for signed in session.shown[stage]],
        traces=session.works[stage].traces,
        inputs=inputs,
        results=session.answer,
        rows=[len(payload) // 4 for payload in inputs],
    )


def convicts(evidence: Evidence, model: Model) -> bool:
    """What every node finds out for itself before it believes anything."""
    try:
        verify_evidence(evidence, model.weights)
    except NexusError:
        return False
    return True
