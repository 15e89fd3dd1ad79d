"""What each candidate edit costs, how sure that is, and one price to compare them by.

`score.py` is the way in. `candidates.py` runs a model by other plans, `race.py` says which of them see how much
of the data, `estimates.py` holds the criteria that run no candidate, and `scores.py` adds up.
"""

from .estimates import CRITERIA, CRITERION_UNITS, MEASURED, contiguous_stretch, criterion_of
from .race import Race
from .score import score, score_layers
from .scores import Scores

__all__ = [
    "CRITERIA",
    "CRITERION_UNITS",
    "MEASURED",
    "Race",
    "Scores",
    "contiguous_stretch",
    "criterion_of",
    "score",
    "score_layers",
]
