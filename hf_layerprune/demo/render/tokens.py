"""The next-token view: a heat strip of how far apart the models are, and what each expects."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from ..next_tokens import Position
from .text import escaped, notice

FULL_HEAT = 1.0
"""KL in nats from which the strip is at its strongest."""


def render_positions(positions: Sequence[Position], depth: int) -> str:
    """The strip, a cell for each token; an opened cell shows what both models expect after it.

    Args:
        positions (`Sequence[Position]`): of the text; the one where the models are farthest apart is open.
        depth (`int`): of the compressed model.
    """
    group = f"lp-{secrets.token_hex(6)}"  # of one answer, so that only one of its cells is open
    mean = sum(position.kl for position in positions) / len(positions)
    worst = max(range(len(positions)), key=lambda number: positions[number].kl)
    cells = "".join(_cell(position, n, group, n == worst) for n, position in enumerate(positions))
    told = (
        f"KL from the original to the compressed model of {depth} layers, {mean:.3f} nats per token on average; "
        f"farthest apart after \u201c{_shown(positions[worst].token)}\u201d ({positions[worst].kl:.2f})."
    )
    todo = "Choose a token to see what each model expects after it."
    scale = (
        f'<div class="lp-scale" aria-hidden="true"><span>0</span><i></i><span>{FULL_HEAT:g} nat or more</span></div>'
    )
    return f'{notice(told)}<p class="lp-hint">{todo}</p>{scale}<div class="lp-strip">{cells}</div>'


def _shown(token: str) -> str:
    """A token with its white space visible."""
    return token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u2423") or "\u2205"


def _cell(position: Position, number: int, group: str, opened: bool) -> str:
    heat = min(1.0, position.kl / FULL_HEAT)
    tables = "".join(
        f'<div class="lp-{kind}"><h4>{title}</h4>{_table(tokens)}</div>'
        for kind, title, tokens in (
            ("original", "Original", position.original),
            ("compressed", "Compressed", position.compressed),
        )
    )
    head = f"After \u201c{_shown(position.token)}\u201d, position {number + 1}: KL {position.kl:.3f} nats"
    return (
        f'<details name="{group}"{" open" * opened}><summary style="--heat:{heat:.3f}" title="KL {position.kl:.3f}">'
        f'{escaped(_shown(position.token))}</summary><div class="lp-expected"><p>{escaped(head)}</p>'
        f"<div>{tables}</div></div></details>"
    )


def _table(tokens: Sequence[tuple[str, float]]) -> str:
    rows = "".join(
        f'<li style="--share:{100 * share:.1f}%"><span>{escaped(_shown(token))}</span><b>{share:.1%}</b></li>'
        for token, share in tokens
    )
    return f"<ol>{rows}</ol>"
