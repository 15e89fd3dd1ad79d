"""Make Qwen2-family language models shallower: measure, remove, heal, share."""

from .benchmark import BenchmarkReport, benchmark_model
from .data import EMBEDDED_MODEL, embedded_dataset
from .errors import LayerPruneError
from .evaluation import EvaluationReport, evaluate_model
from .models import PrunedQwen2Config, PrunedQwen2ForCausalLM, PrunedQwen2Model
from .plan import LayerPlan
from .scoring import LayerScores, score_layers
from .surgery import parallelize, prune, unparallelize
from .trainer import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, LayerDistillCallback

__version__ = "0.1.0"

__all__ = [
    "EMBEDDED_MODEL",
    "BenchmarkReport",
    "EvaluationReport",
    "IterativeLayerDistillConfig",
    "IterativeLayerDistillTrainer",
    "LayerDistillCallback",
    "LayerPlan",
    "LayerPruneError",
    "LayerScores",
    "PrunedQwen2Config",
    "PrunedQwen2ForCausalLM",
    "PrunedQwen2Model",
    "benchmark_model",
    "embedded_dataset",
    "evaluate_model",
    "parallelize",
    "prune",
    "score_layers",
    "unparallelize",
]
