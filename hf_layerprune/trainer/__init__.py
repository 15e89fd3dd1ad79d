"""Iterative layer-wise distillation as a TRL-style trainer."""

from .config import IterativeLayerDistillConfig
from .iterative import IterativeLayerDistillTrainer
from .rounds import LayerDistillCallback

__all__ = ["IterativeLayerDistillConfig", "IterativeLayerDistillTrainer", "LayerDistillCallback"]
