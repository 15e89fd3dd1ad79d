"""Representative data sets, by whose quality layers are scored: what to ask a model, and what an answer costs.

A [`Task`] is data and how to ask; `prepare` turns it into chunks of token batches, each of which knows how to turn
what a model did into costs. [`evaluate_tasks`] runs them plainly; scoring runs the same chunks for many candidates.
"""

from .choices import MinimalPairsTask, MultipleChoiceTask
from .chunks import ChoiceChunk, Chunk, GenerationChunk, PreparedTask, TokenChunk, check_fits
from .evaluation import TaskReport, TaskResult, evaluate_prepared, evaluate_tasks, prepare_tasks
from .generation import CopyTask, GenerationTask
from .lm_eval_task import LmEvalTask, PreparedLmEvalTask
from .specs import load_tasks, register_task
from .task import PromptedTask, Task
from .text import KLTask, PerplexityTask

__all__ = [
    "ChoiceChunk",
    "Chunk",
    "CopyTask",
    "GenerationChunk",
    "GenerationTask",
    "KLTask",
    "LmEvalTask",
    "MinimalPairsTask",
    "MultipleChoiceTask",
    "PerplexityTask",
    "PreparedLmEvalTask",
    "PreparedTask",
    "PromptedTask",
    "Task",
    "TaskReport",
    "TaskResult",
    "TokenChunk",
    "check_fits",
    "evaluate_prepared",
    "evaluate_tasks",
    "load_tasks",
    "prepare_tasks",
    "register_task",
]
