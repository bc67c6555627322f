"""What every proof about a session's arithmetic begins with: the model, the plan, the terms, and a receipt that the accused signed.

All of it hangs on that one signature: the receipt names the session, the session's terms the plan and the model, the model its own
parts. So whatever a proof shows about the model or the session is what the accused itself signed for.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.errors import VerificationError
from nexus.core.manifest import EXACT
from nexus.core.plan import Plan
from nexus.core.record import Record, nested
from nexus.proof.arithmetic.plan import ExactPlan, trace_shape, value_widths
from nexus.proof.bundle import request_for
from nexus.proof.evidence.model import CheckedModel, ModelParts, check_model
from nexus.proof.receipts import Receipt, SignedReceipt, Terms
from nexus.proof.trace import TraceShape

_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Case(Record):
    """`receipt`: of the window that the fault is in, signed by the accused."""

    model: ModelParts = nested(ModelParts)
    plan: Plan = nested(Plan)
    terms: Terms = nested(Terms)
    receipt: SignedReceipt = nested(SignedReceipt)


@dataclass(frozen=True, slots=True)
class CheckedCase:
    """A case whose parts go together. `start`, `end`: the layers of the accused's stage. `prompt`: tokens of the session's first
    step, 0 for an encoder, whose steps are texts of their own. `widths`: float32 values per row of everything committed to."""

    model: CheckedModel
    terms: Terms
    receipt: Receipt
    start: int
    end: int
    shape: TraceShape
    widths: dict[str, int]
    prompt: int

    @property
    def exact(self) -> ExactPlan:
        return self.model.plan

    @property
    def causal(self) -> bool:
        return self.exact.causal

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def last(self) -> bool:
        return self.end == len(self.exact.layers)

    @property
    def input_bytes(self) -> int:
        """Of one token in the payload of a step."""
        return _TOKEN_BYTES if self.first else 4 * self.exact.hidden

    def has_step(self, step: int) -> bool:
        """Whether the receipt is for this step."""
        return self.receipt.step0 <= step < self.receipt.step0 + self.receipt.n

    def rows(self, step: int) -> int:
        """Tokens of a step of a causal session: the whole prompt in the first one, one in every later one."""
        return 1 if step else self.prompt

    def position(self, step: int) -> int:
        """Of the first token of a step; those of an encoder's text count from 0."""
        return self.prompt + step - 1 if step and self.causal else 0


def check_case(case: Case) -> CheckedCase:
    """Raises MalformedError, VerificationError where the parts do not go together, or an honest stage would not have signed."""
    model, plan, terms, receipt = check_model(case.model), case.plan, case.terms, case.receipt.verify()
    exact = model.plan
    if plan.profile != EXACT or receipt.profile != EXACT:
        raise VerificationError("only the exact profile's arithmetic can be done again elsewhere")
    if plan.model_root != model.root or terms.model_root != model.root or terms.plan_root != plan.root:
        raise VerificationError("the terms are not for this model and plan")
    if receipt.stage >= len(plan.stages):
        raise VerificationError(f"the plan has no stage {receipt.stage}")
    stage = plan.stages[receipt.stage]
    if not 0 <= stage.start < stage.end <= len(exact.layers):
        raise VerificationError("the plan gives the stage layers that the model does not have")
    expected = (terms.session, model.root, request_for(terms, receipt.stage).id, stage.node)
    if (receipt.session, receipt.model_root, receipt.request, receipt.node) != expected:
        raise VerificationError("the receipt is not of this session, model and plan")
    window = terms.window
    if not 0 < receipt.n <= window or receipt.step0 % window or receipt.step0 + receipt.n > terms.steps_max:
        raise VerificationError("the receipt is not for a window of the session")
    if not receipt.trace_root or bool(receipt.kv_root) != exact.causal:
        raise VerificationError("the receipt does not commit to what was computed")
    prompt = receipt.kv_len - (receipt.step0 + receipt.n - 1) if exact.causal else 0
    if (exact.causal and prompt < 1) or receipt.kv_len > model.context or (receipt.kv_len and not exact.causal):
        raise VerificationError(f"{receipt.kv_len} tokens in the cache do not go with steps {receipt.step0} + {receipt.n}")
    return CheckedCase(
        model=model,
        terms=terms,
        receipt=receipt,
        start=stage.start,
        end=stage.end,
        shape=trace_shape(exact, stage.start, stage.end),
        widths=value_widths(exact),
        prompt=prompt,
    )
