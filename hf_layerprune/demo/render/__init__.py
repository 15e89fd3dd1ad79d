"""What the demo shows, as HTML and inline SVG: no script, no request, readable in light and dark."""

from .answers import render_comparison, render_empty
from .charts import render_importance, render_quality
from .inside import render_inside
from .layers import render_layers
from .summary import summary_of
from .text import notice
from .tokens import render_positions

__all__ = [
    "notice",
    "render_comparison",
    "render_empty",
    "render_importance",
    "render_inside",
    "render_layers",
    "render_positions",
    "render_quality",
    "summary_of",
]
