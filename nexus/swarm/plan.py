from nexus.core.plan import STAGES_MAX, Plan, PlanStage

__all__ = ["STAGES_MAX", "Plan", "PlanStage"]
