"""Make language models of the Qwen2, Qwen3, Llama and Mistral families shallower: measure, remove, heal, share."""

from .benchmark import BenchmarkReport, benchmark_model
from .budget import Budget
from .compensation import compensate
from .conversion import convert
from .data import EMBEDDED_MODEL, embedded_dataset, tokenized_batches
from .edits import Edit
from .errors import LayerPruneError
from .evaluation import EvaluationReport, evaluate_model
from .generation_data import HealingDataConfig, HealingDataReport, generate_healing_data
from .hub import load_run, push_run
from .latency import BlockLatency
from .loading import load_model, load_tokenizer
from .models import PrunedQwen2Config, PrunedQwen2ForCausalLM, PrunedQwen2Model
from .plan import LayerPlan
from .scoring import (
    Guess,
    LayerScores,
    Question,
    Race,
    contiguous_block,
    register_criterion,
    score_edits,
    score_layers,
)
from .search import PlanSearch, find_parallel_range, search_plan
from .surgery import apply_plan, parallelize, prune, unparallelize
from .tasks import load_tasks
from .trainer import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, LayerDistillCallback

__version__ = "0.1.0"

__all__ = [
    "EMBEDDED_MODEL",
    "BenchmarkReport",
    "BlockLatency",
    "Budget",
    "Edit",
    "EvaluationReport",
    "Guess",
    "HealingDataConfig",
    "HealingDataReport",
    "IterativeLayerDistillConfig",
    "IterativeLayerDistillTrainer",
    "LayerDistillCallback",
    "LayerPlan",
    "LayerPruneError",
    "LayerScores",
    "PlanSearch",
    "PrunedQwen2Config",
    "PrunedQwen2ForCausalLM",
    "PrunedQwen2Model",
    "Question",
    "Race",
    "apply_plan",
    "benchmark_model",
    "compensate",
    "contiguous_block",
    "convert",
    "embedded_dataset",
    "evaluate_model",
    "find_parallel_range",
    "generate_healing_data",
    "load_model",
    "load_run",
    "load_tasks",
    "load_tokenizer",
    "parallelize",
    "prune",
    "push_run",
    "register_criterion",
    "score_edits",
    "score_layers",
    "search_plan",
    "tokenized_batches",
    "unparallelize",
]
