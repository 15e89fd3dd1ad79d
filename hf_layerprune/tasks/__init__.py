"""Representative data sets, by whose quality layers are scored.

A [`Task`] says where its rows are and how to ask; `prepare` turns it into chunks of token batches, each of which
`reduce`s what models did to costs. [`evaluate_tasks`] runs them on one model; scoring runs the same chunks for many
candidates.
"""

from .chunks import GenerationChunk as GenerationChunk
from .chunks import PreparedTask as PreparedTask
from .evaluation import TaskReport as TaskReport
from .evaluation import TaskResult as TaskResult
from .evaluation import evaluate_tasks as evaluate_tasks
from .evaluation import load_tasks as load_tasks
from .evaluation import prepare_tasks as prepare_tasks
from .kinds import TASK_KINDS as TASK_KINDS
from .kinds import GenerationTask as GenerationTask
from .kinds import KLTask as KLTask
from .kinds import LmEvalChunk as LmEvalChunk
from .kinds import LmEvalTask as LmEvalTask
from .kinds import MultipleChoiceTask as MultipleChoiceTask
from .kinds import PerplexityTask as PerplexityTask
from .task import PromptedTask as PromptedTask
from .task import Task as Task
