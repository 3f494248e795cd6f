"""What may change in a model, and how far: a plan that people read and edit. Knows torch only."""

from lightning_grow.planning.entries import GroupFacts, GroupLimits, GroupPlan, StackFacts, StackLimits, StackPlan
from lightning_grow.planning.errors import PlanError
from lightning_grow.planning.plan import Plan, plan

__all__ = [
    "GroupFacts",
    "GroupLimits",
    "GroupPlan",
    "Plan",
    "PlanError",
    "StackFacts",
    "StackLimits",
    "StackPlan",
    "plan",
]
