"""Students on the Hugging Face Hub: the model card, pushing, reading."""

from .card import TAGS, run_card
from .push import push_run
from .runs import Run, load_run

__all__ = ["TAGS", "Run", "load_run", "push_run", "run_card"]
