"""A plan from outside: what it may ask of the nodes that it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus.core.encoding import encode
from nexus.core.errors import MalformedError
from nexus.core.plan import Plan, PlanStage
from tests.swarm.ring import identity, manifest, plan_for

MODEL = manifest()
PLAN = plan_for(MODEL, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"profile": "exact", "dtype": "exact"},  # a node would sign that it computed so, whatever the model is
        {"profile": "exact"},
        {"dtype": "exact"},
        {"profile": ""},
        {"dtype": "float31"},
        {"dtype": "\x1b[2J"},
        {"model_root": bytes(32)},
        {"stages": ()},
        {"stages": PLAN.stages[:-1]},
        {"stages": PLAN.stages[1:]},
        {"stages": PLAN.stages[::-1]},
        {"stages": (*PLAN.stages, PlanStage(identity(9).public_key, 8, 9))},
        {"stages": (*PLAN.stages[:-1], replace(PLAN.stages[-1], node=PLAN.stages[0].node))},
        {"stages": (PlanStage(identity(9).public_key, 0, 0), *PLAN.stages)},
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        replace(PLAN, **change).check(MODEL)  # type: ignore[arg-type]


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(MalformedError, match=r"Plan\.spec"):
        Plan.from_bytes(encode((0, *PLAN.to_value()[1:])))  # type: ignore[index]
