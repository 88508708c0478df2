"""What a prediction will do, before it does it."""

from xchmv2.plan.memory import TaskMemory
from xchmv2.plan.planning import plan
from xchmv2.plan.prediction_plan import PredictionPlan

__all__ = ["PredictionPlan", "TaskMemory", "plan"]
