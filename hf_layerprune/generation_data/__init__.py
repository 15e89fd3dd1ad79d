"""Data to heal on that the teacher wrote itself: prompts in, its answers out."""

from .config import HealingDataConfig
from .generate import generate_healing_data
from .journal import HealingDataReport

__all__ = ["HealingDataConfig", "HealingDataReport", "generate_healing_data"]
