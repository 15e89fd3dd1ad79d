"""What the demo shows, as HTML and inline SVG: no script, no request, readable in light and dark."""

from .answers import render_comparison, render_empty
from .inside import render_inside
from .summary import summary_of
from .text import notice
from .tokens import render_positions

__all__ = [
    "notice",
    "render_comparison",
    "render_empty",
    "render_inside",
    "render_positions",
    "summary_of",
]
