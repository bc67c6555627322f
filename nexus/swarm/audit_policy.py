"""Which stages of a session are audited, and how. Pure decisions: the same for everyone who knows the receipt, the challenge
and how often a node was seen at work."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.audits import DUAL, OFF, REPLICA
from nexus.core.hashing import tagged_hash
from nexus.core.manifest import EXACT
from nexus.core.plan import Plan


@dataclass(frozen=True, slots=True)
class AuditPolicy:
    """`mode`: one of `nexus.core.audits.MODES`. `rate`: share of executions that are audited after probation, 0 to 1.
    `probation_sessions`: a node's first so many executions are all audited. `cells`: of each stage that a light audit checks."""

    mode: str
    rate: float
    probation_sessions: int
    cells: int


@dataclass(frozen=True, slots=True)
class StagePolicy:
    """What to do about one stage. `mode` OFF: nothing. `thorough`: look at everything there is, not at a sample. `reason`: why, in
    words for a user."""

    mode: str
    thorough: bool
    reason: str


def is_drawn(drawn: bytes, rate: float) -> bool:
    """Whether a challenge says that this execution is audited: true for the share `rate` of all challenges."""
    number = int.from_bytes(tagged_hash("audit-draw", drawn)[:8], "little")
    return number < int(rate * 2**64)


def is_on_probation(policy: AuditPolicy, executions: int) -> bool:
    """`executions`: of the node that are known to have been done well."""
    return executions < policy.probation_sessions


def session_mode(policy: AuditPolicy, asked: str | None) -> str:
    """The mode of a session as a whole, which decides before it runs whether it runs twice."""
    return policy.mode if asked is None else asked


def stage_policy(policy: AuditPolicy, asked: str | None, drawn: bytes, executions: int, *, is_own: bool) -> StagePolicy:
    """What to do about one stage of a finished session. `asked`: what the user asked for, None for what the settings say. `is_own`:
    the auditor computed this stage itself."""
    mode = session_mode(policy, asked)
    if is_own:
        return StagePolicy(OFF, False, "computed on this node")
    if mode == OFF:
        return StagePolicy(OFF, False, "audits are off")
    # Of two runs that agree nothing more is asked: see `dual_differs`.
    mode = REPLICA if mode == DUAL else mode
    if is_on_probation(policy, executions):
        return StagePolicy(mode, True, f"on probation: {executions} of {policy.probation_sessions} executions done")
    if asked is not None:
        return StagePolicy(mode, False, "asked for")
    if is_drawn(drawn, policy.rate):
        return StagePolicy(mode, False, f"drawn at a rate of {policy.rate:g}")
    return StagePolicy(OFF, False, f"not drawn at a rate of {policy.rate:g}")


def other_nodes(plan: Plan, own: bytes) -> frozenset[bytes]:
    """Who must have no part in the second run of a dual execution. The auditor trusts itself: it may be in both."""
    return frozenset(stage.node for stage in plan.stages) - {own}


def can_audit(profile: str, mode: str) -> bool:
    """Only arithmetic that repeats bit for bit can be checked; two runs of the float profile can be compared by nobody."""
    return profile == EXACT or mode == OFF
