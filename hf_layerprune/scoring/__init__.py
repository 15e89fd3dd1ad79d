"""How much each candidate edit costs.

`score.py` is the way in. `measures.py` and `tasks/` measure, `candidates.py` runs a model without its layers,
`evidence.py` adds up, `race.py` stops early, `sweep.py` reads a model from disk once, `proxies.py` guesses.
"""

from .angles import contiguous_block
from .measures import MEASURED
from .proxies import Guess, Question, check_criterion, criteria, register_criterion
from .race import Race
from .score import score_edits, score_layers, score_plans
from .scores import EditScores, LayerScores, PlanScores, Scores

__all__ = [
    "MEASURED",
    "EditScores",
    "Guess",
    "LayerScores",
    "PlanScores",
    "Question",
    "Race",
    "Scores",
    "check_criterion",
    "contiguous_block",
    "criteria",
    "register_criterion",
    "score_edits",
    "score_layers",
    "score_plans",
]
