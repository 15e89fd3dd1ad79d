"""Iterative layer-wise distillation as a TRL-style trainer."""

from .callbacks import LayerDistillCallback
from .config import IterativeLayerDistillConfig
from .iterative import IterativeLayerDistillTrainer

__all__ = ["IterativeLayerDistillConfig", "IterativeLayerDistillTrainer", "LayerDistillCallback"]
