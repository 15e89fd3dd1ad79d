"""Students on the Hugging Face Hub: the model card, push, pull."""

from .card import model_card, run_card
from .metadata import PARALLEL_TAG, TAGS
from .pull import PulledRun, load_run
from .push import push_run
from .reading import read_plan, read_report
from .run_folder import RunFolder

__all__ = [
    "PARALLEL_TAG",
    "TAGS",
    "PulledRun",
    "RunFolder",
    "load_run",
    "model_card",
    "push_run",
    "read_plan",
    "read_report",
    "run_card",
]
