"""Who is audited: decided by challenges, thorough for the new, never one's own work."""

from __future__ import annotations

import pytest

from nexus.core.audits import DUAL, LIGHT, OFF, REPLICA
from nexus.core.manifest import EXACT, FLOAT
from nexus.swarm.audit_policy import AuditPolicy, can_audit, is_drawn, other_nodes, session_mode, stage_policy
from tests.swarm.ring import identity, manifest, plan_for

POLICY = AuditPolicy(LIGHT, 0.1, 20, 2)


def draws(count: int = 4000) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in range(count)]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_challenge_draws_the_share_that_the_rate_says(rate: float) -> None:
    drawn = sum(is_drawn(one, rate) for one in draws())
    assert abs(drawn - rate * 4000) <= 6 * (4000 * rate * (1 - rate)) ** 0.5


def test_the_new_are_audited_always_and_thoroughly() -> None:
    for drawn in draws(50):
        new = stage_policy(POLICY, None, drawn, 19, is_own=False)
        assert (new.mode, new.thorough) == (LIGHT, True)
        known = stage_policy(POLICY, None, drawn, 20, is_own=False)
        assert known.mode == (LIGHT if is_drawn(drawn, 0.1) else OFF)
        assert not known.thorough


@pytest.mark.parametrize("asked", [LIGHT, REPLICA])
def test_what_is_asked_for_is_done_at_any_rate(asked: str) -> None:
    for drawn in draws(20):
        assert stage_policy(POLICY, asked, drawn, 1000, is_own=False).mode == asked
        assert stage_policy(POLICY, OFF, drawn, 0, is_own=False).mode == OFF
        assert stage_policy(POLICY, asked, drawn, 0, is_own=True).mode == OFF
        assert stage_policy(AuditPolicy(OFF, 1.0, 20, 2), None, drawn, 0, is_own=False).mode == OFF


def test_a_dual_execution_is_decided_for_the_session_as_a_whole() -> None:
    assert session_mode(AuditPolicy(DUAL, 0.1, 20, 2), None) == DUAL
    assert session_mode(AuditPolicy(DUAL, 0.1, 20, 2), LIGHT) == LIGHT
    assert session_mode(POLICY, None) == LIGHT
    assert stage_policy(POLICY, DUAL, bytes(32), 1000, is_own=False).mode == REPLICA


def test_the_second_run_has_nobody_of_the_first_but_oneself() -> None:
    model = manifest()
    plan = plan_for(model, 3)
    own = plan.stages[1].node
    assert other_nodes(plan, own) == {plan.stages[0].node, plan.stages[2].node}
    assert other_nodes(plan, identity(9).public_key) == {stage.node for stage in plan.stages}


def test_only_what_repeats_bit_for_bit_can_be_audited() -> None:
    assert can_audit(EXACT, LIGHT)
    assert can_audit(FLOAT, OFF)
    assert not can_audit(FLOAT, LIGHT)
    assert not can_audit(FLOAT, DUAL)
