"""What a config costs before anything is built."""

from .figures import Figures, LayerPlan, Plan, SpanPlan
from .planner import plan

__all__ = ["Figures", "LayerPlan", "Plan", "SpanPlan", "plan"]
