"""One inference session as state machines without I/O: events in, actions out. `nexus.node.infer` carries the actions out.

A session runs round a ring of stages. The coordinator feeds the first stage; every stage pushes its output straight to the next;
the last stage shows each result to the coordinator and, for a causal model, feeds the token back to the first stage:

    coordinator --Feed--> stage 0 --Step--> stage 1 --Step--> ... last stage --Output--> coordinator
                             ^------------------- Step (the new token) ---------'

Every `Terms.window` steps each stage signs a receipt, and gives it to the next stage and to the coordinator. Receipts run behind
the step that completes the window, one hop at a time, so that nobody waits for a signature: a stage first pushes its output on, and
signs when it has checked the receipt of the stage before against the bytes that it received itself. No step of the next window is
taken before that. When the session ends, the same happens for the last, shorter window; `Finish` follows the receipts round.

A receipt is made in three turns of a stage: `Seal` (exact profile: the engine gives the roots over what it computed), `Sign` (the
driver makes the receipt durable, then signs it, which takes as long as the disk does), and out it goes. Meanwhile the stage may
compute on, but nothing leaves it: what the next step gives is held until the receipt is out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nexus.core.errors import CapacityError, MalformedError, PeerError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import CAUSAL, ENCODER, EXACT, Manifest
from nexus.core.plan import STAGES_MAX, Plan
from nexus.core.record import Record, many, nested, raw
from nexus.proof.bundle import (
    PAYLOAD_MAX,
    Bundle,
    ChainVerifier,
    check_output,
    check_place,
    check_request,
    ends_answer,
    first_stage_inputs,
    make_requests,
    request_for,
    verify_bundle,
)
from nexus.proof.evidence import Evidence
from nexus.proof.evidence.statements import find_contradiction
from nexus.proof.receipts import WINDOW_MAX, Receipt, SignedReceipt, SignedRequest, Terms, tokens_from_bytes
from nexus.proof.trace import Sealed, TraceShape, WindowTrace, check_trace

# Receipts of one stage that may wait at the coordinator for those of the other stages: one per window under way.
EARLY_MAX = 2
# Texts of an encoder go in one after the other without waiting for vectors: so far a stage may be ahead of the last one.
STEPS_AHEAD_MAX = 256
# What a coordinator keeps of one session's traces: at 5 KB a token, those of 50,000.
TRACES_BYTES_MAX = 256 * 1024 * 1024


def commits(plan: Plan, terms: Terms) -> bool:
    """Whether the stages commit to what they compute beside what goes in and out."""
    return plan.profile == EXACT and bool(terms.window)


def completes_window(terms: Terms, step: int) -> bool:
    """Whether receipts are due with this step."""
    return bool(terms.window) and (step + 1) % terms.window == 0


# What a session wants done.
@dataclass(frozen=True, slots=True)
class Compute:
    """Run the stage on `payload`, then call `computed` with what comes out."""

    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """Have the engine close its trace over the oldest `n` steps that are not sealed yet, then call `sealed` with what it gives."""

    n: int


@dataclass(frozen=True, slots=True)
class Sign:
    """Make this receipt durable and sign it, then call `signed`. Other events may be handled before that."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class SendStep:
    """Push to the next stage of the ring; from the last stage, back to the first."""

    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """Hand this stage's receipt to the next stage of the ring."""

    receipt: SignedReceipt


@dataclass(frozen=True, slots=True)
class SendOutput:
    """Show a result to the coordinator."""

    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class ShowParent:
    """Show the coordinator the receipt that this stage's next one names as its parent: a stage that signed another one for the
    coordinator's eyes has then signed against itself."""

    receipt: SignedReceipt


@dataclass(frozen=True, slots=True)
class ShowReceipt:
    """Show this stage's receipt to the coordinator."""

    receipt: SignedReceipt


@dataclass(frozen=True, slots=True)
class ShowTrace:
    """Show the coordinator the hashes behind the receipt that comes next."""

    trace: WindowTrace


@dataclass(frozen=True, slots=True)
class SendFinish:
    """Tell the next stage of the ring that no more steps come."""


@dataclass(frozen=True, slots=True)
class SendDone:
    """Tell the coordinator that every step is receipted."""


@dataclass(frozen=True, slots=True)
class Close:
    """This stage has no further part in the session."""


StageAction: TypeAlias = (
    Compute
    | Seal
    | Sign
    | SendStep
    | SendReceipt
    | SendOutput
    | ShowTrace
    | ShowParent
    | ShowReceipt
    | SendFinish
    | SendDone
    | Close
)


@dataclass(frozen=True, slots=True)
class _Signing:
    """A receipt on its way to the disk. `goes_on`: the next stage of the ring waits for it."""

    trace: WindowTrace | None
    parent: SignedReceipt | None
    goes_on: bool


class StageSession:
    """One stage's part in one session.

    Raises VerificationError or MalformedError when whoever feeds it breaks the rules; the session is then over, and the driver
    answers with a signed refusal.
    """

    def __init__(self, node: bytes, manifest: Manifest, plan: Plan, terms: Terms, request: SignedRequest, stage: int) -> None:
        """`node`: the public key of this node, which the plan must name for `stage`."""
        if not 0 <= stage < len(plan.stages) or plan.stages[stage].node != node:
            raise VerificationError(f"the plan does not name this node for stage {stage}")
        self._node = node
        self._manifest = manifest
        self._plan = plan
        self._terms = terms
        self._request_id = check_request(request, terms, plan, stage).id
        self.stage = stage
        self._request_before = request_for(terms, self.before).id
        self._first = stage == 0
        self._last = stage == len(plan.stages) - 1
        self._feeds_back = manifest.kind == CAUSAL
        self._commits = commits(plan, terms)
        self._step = 0  # the step that is due next
        self._window = 0  # the first step of the open window
        self.kv_len = 0
        self._inputs: list[bytes] = []  # leaf hashes of the open window
        self._outputs: list[bytes] = []
        self._sealed: Sealed | None = None  # the engine's word on the open window
        self._fed_back: list[bytes] = []  # first stage: leaf hashes of the tokens that came back, the last stage's outputs
        self._prev: Receipt | None = None
        self._parent: SignedReceipt | None = None  # the newest receipt of the stage before this one in the ring
        self._parent_signed = False  # later stages: that receipt is for the open window
        self._awaited: bytes | None = None  # first stage: the root that the last stage's next receipt must have
        self._signing: _Signing | None = None
        self._held: list[StageAction] = []  # what may leave once the receipt that is being signed is out
        self._finish_wanted = False
        self._ended = False  # last stage: it has told the first one to finish
        self.closed = False
        self.receipts_signed = 0

    @property
    def before(self) -> int:
        """The stage before this one in the ring."""
        return (self.stage - 1) % len(self._plan.stages)

    @property
    def holds(self) -> bool:
        """Whether something waits for a signature. The driver then gives no event but `signed`, so that what waits has a bound."""
        return bool(self._held)

    def feed(self, step: int, payload: bytes) -> list[StageAction]:
        """First stage only: the coordinator's input, the prompt or a text."""
        if not self._first or (self._feeds_back and step > 0):
            raise VerificationError("the coordinator feeds the first stage, and a causal model only its prompt")
        if self._finish_wanted:
            raise VerificationError("the coordinator feeds on after it said that no more comes")
        if step == 0 and leaf_hash(payload) != self._terms.prompt:
            raise VerificationError("the input is not the one that the session's terms name")
        return self._take(step, payload)

    def push(self, step: int, payload: bytes) -> list[StageAction]:
        """A step from the stage before."""
        if self.closed or self._finish_wanted:
            return []
        if self._ended:
            raise VerificationError(f"stage {self.before} pushes on after the answer was over")
        if self._is_full or self._awaited is not None:
            raise VerificationError(f"stage {self.before} pushes on without having signed the window that it completed")
        if self._terms.window and self._window % self._terms.window:
            raise VerificationError(f"stage {self.before} pushes on after it signed for a last, short window")
        if self._first:
            self._take_back(step, payload)
        return self._take(step, payload)

    def computed(self, step: int, output: bytes) -> list[StageAction]:
        """What the stage made of the step that it was told to compute."""
        if self._terms.window:
            self._outputs.append(leaf_hash(output))
        actions: list[StageAction] = []
        if not self._last:
            actions.append(SendStep(step, output))
        elif self._feeds_back and not self._ends(step, output):
            # The token goes round first: the ring waits for it, the user's eyes do not.
            actions += [SendStep(step + 1, output), SendOutput(step, output)]
        else:
            actions.append(SendOutput(step, output))
            if self._feeds_back:
                self._ended = True
                actions.append(SendFinish())
        return self._hold(actions) + self._proceed()

    def receipt(self, signed: SignedReceipt) -> list[StageAction]:
        """The receipt of the stage before: for the open window, or at the first stage for the window before."""
        if self.closed:
            return []
        if self._first:
            self._check_last(signed)
        else:
            self._check_parent(signed)
        return self._proceed()

    def sealed(self, sealed: Sealed) -> list[StageAction]:
        """The engine's roots over the open window."""
        if self._sealed is not None or bool(sealed.kv_root) != self._feeds_back or not sealed.trace_root:
            raise RuntimeError("the engine sealed a window twice, or as that of another kind of model")
        self._sealed = sealed
        return self._proceed()

    def signed(self, own: SignedReceipt) -> list[StageAction]:
        """This node's receipt, durable by now. It goes out, and what waited for it follows."""
        if self._signing is None:
            raise RuntimeError("a signature came that nobody asked for")
        self.receipts_signed += 1
        actions: list[StageAction] = [SendReceipt(own)] if self._signing.goes_on else []
        if self._signing.trace:
            actions.append(ShowTrace(self._signing.trace))
        if self._signing.parent:
            actions.append(ShowParent(self._signing.parent))
        actions.append(ShowReceipt(own))
        self._signing, held, self._held = None, self._held, []
        return actions + held + self._proceed()

    def finish(self) -> list[StageAction]:
        """No more steps come: from the coordinator or the last stage to the first, from stage to stage after that."""
        if self.closed or self._finish_wanted:
            return []
        if not self._first and self._inputs and not self._parent_signed:
            raise VerificationError(f"stage {self.before} finishes without having signed for its last steps")
        self._finish_wanted = True
        return self._proceed()

    def _proceed(self) -> list[StageAction]:
        """The next turn towards the receipt of the open window, and after the last one the end, as far as nothing is missing."""
        if self.closed:
            return []
        signs = self._may_sign
        if self._commits and self._sealed is None and (signs or self._is_full) and len(self._outputs) == len(self._inputs):
            return [Seal(len(self._inputs))]
        if signs and self._signing is None:
            return [self._sign(), *self._finish()]
        return self._finish()

    def _finish(self) -> list[StageAction]:
        if not self._finish_wanted or self._inputs or self._awaited is not None:
            return []  # the last stage's receipt may be on its way, and ours for the rest must name it
        self.closed = True
        return self._hold([SendDone() if self._last else SendFinish(), Close()])

    def _hold(self, actions: list[StageAction]) -> list[StageAction]:
        """What of these may leave now."""
        if self._signing is None:
            return actions
        self._held += actions
        return []

    @property
    def _is_full(self) -> bool:
        """Whether the open window is complete and not signed yet."""
        return 0 < self._terms.window == len(self._inputs)

    @property
    def _may_sign(self) -> bool:
        """Whether the open window is over and what its receipt builds on is there."""
        if not self._inputs or len(self._outputs) != len(self._inputs):
            return False
        if self._first:
            return self._awaited is None and (self._is_full or self._finish_wanted)
        return self._parent_signed

    def _check_step(self, step: int) -> None:
        if self.closed or step != self._step or step >= self._terms.steps_max:
            raise VerificationError(f"step {step} came where step {self._step} of {self._terms.steps_max} is due")

    def _tokens_in(self, step: int, payload: bytes) -> int:
        """Tokens that `payload` brings in: of a prompt or text any number that the context takes, of a later step one."""
        width = 4 if self._first else 4 * self._manifest.hidden_size
        tokens, rest = divmod(len(payload), width)
        most = 1 if self._feeds_back and step else self._manifest.context
        if rest or not 1 <= tokens <= most:
            raise MalformedError(f"{len(payload)} bytes came for step {step}, where 1 to {most} tokens of {width} bytes are due")
        return tokens

    def _take(self, step: int, payload: bytes) -> list[StageAction]:
        self._check_step(step)
        tokens = self._tokens_in(step, payload)
        if self._feeds_back:
            self.kv_len += tokens
        if self._terms.window:
            self._inputs.append(leaf_hash(payload))
        self._step = step + 1
        return [Compute(step, payload)]

    def _take_back(self, step: int, payload: bytes) -> None:
        """The token that came round."""
        if not self._feeds_back or step == 0 or len(payload) != 4:
            raise MalformedError("what came back to the first stage is not one token")
        self._check_step(step)
        if not self._terms.window:
            return
        self._fed_back.append(leaf_hash(payload))
        if len(self._fed_back) == self._terms.window:
            self._awaited = merkle_root(self._fed_back)
            self._fed_back = []

    def _check_last(self, signed: SignedReceipt) -> None:
        """At the first stage: the last stage signed for the tokens that came round."""
        if self._awaited is None:
            raise VerificationError("a receipt came from the last stage that is not due")
        receipt = self._check_before(signed)
        tokens = self.kv_len - len(self._inputs)  # the token that opens the next window may be in already
        if (receipt.n, receipt.kv_len, receipt.out_root) != (self._terms.window, tokens, self._awaited):
            raise VerificationError("the last stage signed for other tokens than those that it sent")
        self._awaited = None
        self._parent = signed

    def _check_parent(self, signed: SignedReceipt) -> None:
        """At a later stage: the stage before signed for what it pushed in the open window. Ours will build on it."""
        if not self._inputs or self._parent_signed:
            raise VerificationError(f"a receipt came from stage {self.before} that is not due")
        receipt = self._check_before(signed)
        if (receipt.n, receipt.kv_len) != (len(self._inputs), self.kv_len) or receipt.out_root != merkle_root(self._inputs):
            raise VerificationError(f"stage {self.before} signed for other bytes than those that it sent")
        self._parent, self._parent_signed = signed, True

    def _check_before(self, signed: SignedReceipt) -> Receipt:
        """A receipt of the stage before this one: signed by it, in this session, next after its previous one."""
        receipt = signed.verify()
        previous = self._parent.receipt if self._parent else None
        check_place(receipt, self._manifest.kind, self._plan, self._terms, self.before, self._request_before, previous)
        return receipt

    def _sign(self) -> Sign:
        """Sign for the open window, and start the next."""
        shown = None if self._first and not self._feeds_back else self._parent
        parent, sealed = shown.receipt if shown else None, self._sealed
        receipt = Receipt(
            spec=1,
            profile=self._plan.profile,
            model_root=self._terms.model_root,
            session=self._terms.session,
            node=self._node,
            stage=self.stage,
            step0=self._window,
            n=len(self._inputs),
            kv_len=self.kv_len,
            request=self._request_id,
            parent=parent.id if parent else b"",
            prev=self._prev.id if self._prev else b"",
            in_root=parent.out_root if parent and not self._first else merkle_root(self._inputs),
            out_root=merkle_root(self._outputs),
            kv_root=sealed.kv_root if sealed else b"",
            trace_root=sealed.trace_root if sealed else b"",
        )
        self._prev = receipt
        self._window += receipt.n
        self._inputs, self._outputs, self._sealed, self._parent_signed = [], [], None, False
        goes_on = not self._last or (self._feeds_back and not self._ended and receipt.n == self._terms.window)
        self._signing = _Signing(sealed.trace if sealed else None, shown if self._commits else None, goes_on)
        return Sign(receipt)

    def _ends(self, step: int, output: bytes) -> bool:
        return step + 1 >= self._terms.steps_max or tokens_from_bytes(output)[0] in self._terms.end_tokens


# What the coordinator wants done.
@dataclass(frozen=True, slots=True)
class Feed:
    """Send an input to the first stage."""

    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """Step `step` gave `payload`. Signed for by the end of its window; verified when `Verified` comes."""

    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class AskFinish:
    """Tell the first stage that no more steps are wanted."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The session is over and every step is receipted, chained and signed. `traces`: of every stage the hashes behind each of
    its receipts; none where the stages commit to nothing."""

    bundle: Bundle
    traces: tuple[tuple[WindowTrace, ...], ...]


CoordinatorAction: TypeAlias = Feed | Result | AskFinish | Verified


@dataclass(frozen=True, slots=True)
class SignedWindow(Record):
    """What every stage has signed for, of one window: results of its steps, receipts and the traces behind them in stage order."""

    outputs: tuple[bytes, ...] = many(raw(most=PAYLOAD_MAX), WINDOW_MAX)
    receipts: tuple[SignedReceipt, ...] = many(nested(SignedReceipt), STAGES_MAX)
    traces: tuple[WindowTrace, ...] = many(nested(WindowTrace), STAGES_MAX)


@dataclass(slots=True)
class _Shown:
    """What a stage shows of one window."""

    receipt: SignedReceipt | None = None
    trace: WindowTrace | None = None
    parent: SignedReceipt | None = None


class CoordinatorSession:
    """The asker's part: it feeds the inputs, takes the results in order and accepts nothing that the receipts do not bear out.

    `evidence`: what convicts a stage by its receipts alone, if the session ended over it.
    """

    def __init__(
        self,
        identity: Identity,
        name: str,
        manifest: Manifest,
        plan: Plan,
        terms: Terms,
        inputs: Sequence[bytes],
        shapes: Sequence[TraceShape] = (),
    ) -> None:
        """`shapes`: of every stage what its traces look like; none where the stages commit to nothing."""
        if len(shapes) != (len(plan.stages) if commits(plan, terms) else 0):
            raise ValueError("a session needs the shape of every stage's traces, or none where there are none")
        if terms.coordinator != identity.public_key or not inputs or leaf_hash(inputs[0]) != terms.prompt:
            raise ValueError("the terms are not this coordinator's")
        self.requests = make_requests(identity, terms, plan)
        self._name = name
        self._manifest = manifest
        self._plan = plan
        self._terms = terms
        self._inputs = list(inputs)
        self._outputs: list[bytes] = []
        self._receipts: list[SignedReceipt] = []
        self._waiting = set(range(len(plan.stages)))
        self._chain = ChainVerifier(manifest, plan, terms, [signed.request for signed in self.requests])
        self._asked_to_finish = False
        self._early: list[deque[_Shown]] = [deque() for _ in plan.stages]
        ahead = STEPS_AHEAD_MAX // terms.window if manifest.kind == ENCODER and terms.window else 0
        self._early_max = EARLY_MAX + ahead
        self._shapes = tuple(shapes)
        self._next: list[_Shown] = [_Shown() for _ in plan.stages]  # what goes with the receipt that comes next
        self._traces: list[list[WindowTrace]] = [[] for _ in plan.stages]
        self._traces_bytes = 0
        self._done = False
        self._verified = False
        self.evidence: list[Evidence] = []

    @property
    def receipts_verified(self) -> int:
        """Receipts whose signature, place, parent and predecessor hold; their roots are checked by `done`."""
        return self._chain.accepted

    def is_ahead(self, stage: int, step: int | None = None) -> bool:
        """Whether the next receipt of this stage, or its result of `step`, has to wait for receipts of other stages.

        Each stage has a stream of its own, and any of them may be late. The driver then reads no further in this one: that is no
        fault of the stage. It is one where what is missing is the stage's own: `receipt` and `output` raise for that.
        """
        if self._chain.due_stage == stage:
            return False
        return len(self._early[stage]) >= self._early_max if step is None else self._lacks_receipts(step)

    def _lacks_receipts(self, step: int) -> bool:
        """Whether a result opens a window, and the window before the last one is not signed for by all."""
        return completes_window(self._terms, step - 1) and self._chain.steps < step - self._terms.window

    def accepted(self, stage: int) -> list[CoordinatorAction]:
        """Stage `stage` is ready. When all are, the inputs go out."""
        if stage not in self._waiting:
            raise MalformedError(f"stage {stage} accepted twice")
        self._waiting.remove(stage)
        if self._waiting:
            return []
        actions: list[CoordinatorAction] = [Feed(step, payload) for step, payload in enumerate(self._inputs)]
        if self._manifest.kind == ENCODER:
            actions += self.stop()
        return actions

    def output(self, step: int, payload: bytes) -> list[CoordinatorAction]:
        """The last stage shows a result."""
        if self._waiting or self._done or step != len(self._outputs) or step >= self._terms.steps_max:
            raise VerificationError(f"a result for step {step} came where step {len(self._outputs)} is due")
        if self._outputs and ends_answer(self._manifest, self._terms, self._outputs[-1]):
            raise VerificationError(f"a result for step {step} came after the answer was over")
        check_output(self._manifest, payload)
        if self._lacks_receipts(step):
            raise VerificationError(f"the stages go on to step {step} without having signed for step {self._chain.steps}")
        self._outputs.append(payload)
        return [Result(step, payload)]

    def trace(self, stage: int, trace: WindowTrace) -> None:
        """The hashes behind the stage's next receipt, from the stage itself."""
        if not self._shapes or self._next[stage].trace is not None or self._verified:
            raise VerificationError(f"stage {stage} shows a trace that is not due")
        steps, rest = divmod(len(trace.cells), self._shapes[stage].step_bytes)
        if rest or not 0 < steps <= self._terms.window or len(trace.logs) != self._shapes[stage].logs_bytes:
            raise MalformedError(f"stage {stage} shows a trace that is not of its layers")
        self._next[stage].trace = trace

    def parent(self, stage: int, signed: SignedReceipt) -> None:
        """The receipt that the stage's next one names as its parent, as the stage itself was given it."""
        if not self._shapes or self._next[stage].parent is not None or self._verified:
            raise VerificationError(f"stage {stage} shows a parent that is not due")
        self._next[stage].parent = signed

    def receipt(self, stage: int, signed: SignedReceipt) -> list[CoordinatorAction]:
        """A receipt from the stage itself. Stages' streams are not in step with each other: it may have to wait for others."""
        waiting = self._early[stage]
        if self._verified or signed.receipt.stage != stage or len(waiting) >= self._early_max:
            raise VerificationError(f"a receipt came from stage {stage} that is not due, or not its own")
        shown, self._next[stage] = self._next[stage], _Shown()
        if self._shapes and shown.trace is None:
            raise VerificationError(f"stage {stage} signed without showing what it computed")
        if self._shapes and (shown.parent.receipt.id if shown.parent else b"") != signed.receipt.parent:
            raise VerificationError(f"stage {stage} signed without showing the receipt that it names as its parent")
        shown.receipt = signed
        waiting.append(shown)
        while self._early[self._chain.due_stage]:
            due = self._chain.due_stage
            self._accept(due, self._early[due].popleft())
        return self._verify_if_complete()

    def _accept(self, stage: int, shown: _Shown) -> None:
        signed, trace = shown.receipt, shown.trace
        assert signed is not None
        before = self._receipts[-1] if self._receipts and (stage or self._manifest.kind == CAUSAL) else None
        try:
            if self._shapes and shown.parent != before:
                raise VerificationError(f"stage {stage} was given another receipt as its parent than the coordinator")
            receipt = self._chain.accept(signed)
            if trace is not None:
                check_trace(trace, self._shapes[stage], receipt.n, receipt.trace_root, receipt.kv_root)
        except PeerError as error:
            prev = next((one for one in reversed(self._receipts) if one.receipt.stage == stage), None)
            found = find_contradiction(signed, shown.parent, before, prev)
            if found is None:
                # It may be looked at when another stage's receipt comes.
                error.peer = peer_id_of(self._plan.stages[stage].node)
                raise
            evidence, verdict = found
            self.evidence.append(evidence)
            fix = "It is convicted by what it signed: run it again, without it"
            raise VerificationError(verdict.summary, fix, verdict.peer_id) from error
        self._receipts.append(signed)
        if trace is None:
            return
        self._traces_bytes += len(trace.cells) + len(trace.logs)
        if self._traces_bytes > TRACES_BYTES_MAX:
            raise CapacityError(
                f"the answer is so long that what proves it takes more than {TRACES_BYTES_MAX >> 20} MiB", "Ask for a shorter one"
            )
        self._traces[stage].append(trace)

    def stop(self) -> list[CoordinatorAction]:
        """No more steps are wanted. What is under way still arrives and is receipted."""
        if self._asked_to_finish:
            return []
        self._asked_to_finish = True
        return [AskFinish()]

    def done(self) -> list[CoordinatorAction]:
        """The last stage has nothing more to show."""
        if self._done:
            raise VerificationError("the stages ended the session twice")
        self._done = True
        if not self._asked_to_finish and (not self._outputs or self.ends_with(len(self._outputs) - 1, self._outputs[-1]) is None):
            raise VerificationError("the stages ended the session before the answer was over")
        return self._verify_if_complete()

    @property
    def is_done(self) -> bool:
        """Whether the stages say that all is shown. What they owe then is receipts."""
        return self._done

    def _verify_if_complete(self) -> list[CoordinatorAction]:
        if not self._done or (self._terms.window and not self._chain.covers(len(self._outputs))):
            return []
        self._verified = True
        self._chain.finish(first_stage_inputs(self._manifest, self._inputs, self._outputs), self._outputs)
        return [self._proof(len(self._outputs), len(self._receipts))]

    def so_far(self) -> Verified | None:
        """Of a session that broke off: the windows that every stage has signed for, as the session that it would have been had it
        stopped there. None where there are none, or where they do not lead to what was shown."""
        steps = self._chain.steps
        if not steps or steps > len(self._outputs):
            return None
        windows = -(-steps // self._terms.window)
        proof = self._proof(steps, windows * len(self._plan.stages))
        try:
            verify_bundle(proof.bundle)
        except PeerError:
            return None
        return proof

    @property
    def header(self) -> Bundle:
        """The session's proof without what its stages did."""
        return self._proof(0, 0).bundle

    def windows(self, first: int) -> list[SignedWindow]:
        """What every stage has signed for and was shown, from window `first` on. Nothing where the session asks for no receipts."""
        stages, length = len(self._plan.stages), self._terms.window
        found = []
        for number in range(first, len(self._receipts) // stages):
            receipts = self._receipts[number * stages : (number + 1) * stages]
            outputs = self._outputs[number * length : number * length + receipts[0].receipt.n]
            if len(outputs) < receipts[0].receipt.n:
                break
            traces = tuple(traces[number] for traces in self._traces) if self._shapes else ()
            found.append(SignedWindow(tuple(outputs), tuple(receipts), traces))
        return found

    def _proof(self, steps: int, receipts: int) -> Verified:
        windows = receipts // len(self._plan.stages)
        bundle = Bundle(
            spec=1,
            model_name=self._name,
            manifest=self._manifest,
            plan=self._plan,
            terms=self._terms,
            requests=self.requests,
            inputs=tuple(self._inputs if self._manifest.kind == CAUSAL else self._inputs[:steps]),
            outputs=tuple(self._outputs[:steps]),
            receipts=tuple(self._receipts[:receipts]),
        )
        return Verified(bundle, tuple(tuple(traces[:windows]) for traces in self._traces) if self._shapes else ())

    def ends_with(self, step: int, payload: bytes) -> str | None:
        """Why the answer is over after this result: "stop", "length", or None while it goes on."""
        if ends_answer(self._manifest, self._terms, payload):
            return "stop"
        return "length" if step + 1 == self._terms.steps_max else None
