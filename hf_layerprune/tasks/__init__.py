"""Representative data sets, by whose quality layers are scored: what to ask a model, and what an answer costs.

A [`Task`] says where its rows are and how to ask; `prepare` turns it into chunks of token batches, each of which
`reduce`s what models did to costs. [`evaluate_tasks`] runs them on one model; scoring runs the same chunks for many
candidates.
"""

from .chunks import GenerationChunk, PreparedTask
from .evaluation import TaskReport, TaskResult, evaluate_tasks, prepare_tasks
from .kinds import CopyTask, GenerationTask, KLTask, MinimalPairsTask, MultipleChoiceTask, PerplexityTask
from .lm_eval_task import LmEvalChunk, LmEvalTask
from .load import load_tasks
from .task import PromptedTask, Task

__all__ = [
    "CopyTask",
    "GenerationChunk",
    "GenerationTask",
    "KLTask",
    "LmEvalChunk",
    "LmEvalTask",
    "MinimalPairsTask",
    "MultipleChoiceTask",
    "PerplexityTask",
    "PreparedTask",
    "PromptedTask",
    "Task",
    "TaskReport",
    "TaskResult",
    "evaluate_tasks",
    "load_tasks",
    "prepare_tasks",
]
