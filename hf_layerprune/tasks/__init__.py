"""Representative data sets, by whose quality layers are scored.

A [`Task`] says where its rows are and how to ask; `prepare` turns it into chunks of token batches, each of which
`reduce`s what models did to costs. [`evaluate_tasks`] runs them on one model; scoring runs the same chunks for many
candidates.
"""

from .chunks import GenerationChunk, PreparedTask
from .evaluation import TaskReport, TaskResult, evaluate_tasks, load_tasks, prepare_tasks
from .kinds import (
    TASK_KINDS,
    GenerationTask,
    KLTask,
    LmEvalChunk,
    LmEvalTask,
    MultipleChoiceTask,
    PerplexityTask,
)
from .task import PromptedTask, Task

__all__ = [
    "TASK_KINDS",
    "GenerationChunk",
    "GenerationTask",
    "KLTask",
    "LmEvalChunk",
    "LmEvalTask",
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
