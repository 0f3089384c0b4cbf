"""What a config costs before anything is built."""

from .planner import Figures, LayerPlan, Plan, plan

__all__ = ["Figures", "LayerPlan", "Plan", "plan"]
