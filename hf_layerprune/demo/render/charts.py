"""Two charts as inline SVG: quality against depth, and the importance of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...layer_map import last_costs, made_edits
from ...report import criterion_unit, quality_curves
from .text import escaped

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 40
CHARACTER = 7.0
"""Width of a digit in a label, with some room."""
KINDS = {"perplexity_unhealed": "lp-never", "perplexity_before_healing": "lp-before", "perplexity": "lp-healed"}
"""Style of each curve."""
STRONG = ' class="lp-strong"'
Scale = Callable[[float], float]


def render_quality(report: dict[str, Any] | None, depth: int) -> str:
    """Perplexity against depth for every round, the chosen depth marked; words where there is no report."""
    if not report or not report["rounds"]:
        return _hint("No run was recorded for this pair of models, so there is no quality to show.")
    teacher, rounds = report["teacher"], report["rounds"]
    curves = quality_curves(rounds)
    depths = [teacher["num_layers"], *(record["num_layers"] for record in rounds)]
    start = _finite(teacher.get("perplexity"))
    values = {key: [start, *(_finite(record.get(key)) for record in rounds)] for key in curves}
    numbers = [value for line in values.values() for value in line if value is not None]
    if not numbers:
        return _hint("The run has no perplexity that could be drawn.")
    y, ticks = _vertical(min(numbers), max(numbers), logarithmic=max(numbers) > 4 * min(numbers) > 0)
    x = _horizontal(min(depths), max(depths))
    parts = [_grid(y, ticks), _depth_axis(sorted(set(depths)), x, depth)]
    parts.append(
        f'<line class="lp-chosen" x1="{x(depth):.1f}" x2="{x(depth):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    )
    for key, label in curves.items():
        points = [(x(d), y(v), d, v) for d, v in zip(depths, values[key], strict=True) if v is not None]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        kind = KINDS[key]
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        parts += [
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{d} layers, {label}: perplexity {v:.2f}'
            "</title></circle>"
            for px, py, d, v in points
        ]
    parts.append(_axis_name("layers"))
    key = "".join(f'<li><i class="{KINDS[key]}"></i>{label}</li>' for key, label in curves.items())
    last = dict(zip(depths[1:], values["perplexity"][1:], strict=True)).get(depth)
    told = "" if last is None or start is None else f"{depth} layers: {last:.2f}, the original {start:.2f}."
    return _figure(parts, "Perplexity against depth", key, f"Held-out perplexity, lower is better. {told}")


def render_importance(rounds: Sequence[dict[str, Any]]) -> str:
    """What each edit cost when it was measured last, a bar each; words where nothing was measured."""
    costs = last_costs(rounds)
    if not costs:
        return _hint("No run was recorded for this pair of models, so no layer has a score.")
    made = set(made_edits(rounds))
    ordered = sorted(costs.items(), key=lambda item: item[0].layers)
    positive = [cost for cost in costs.values() if cost > 0]
    logarithmic = len(positive) == len(costs) and max(positive) > 20 * min(positive)
    low = min(positive) * 0.7 if logarithmic else min(0.0, *costs.values())
    y, ticks = _vertical(low, max(costs.values()), logarithmic)
    step = (WIDTH - LEFT - RIGHT) / len(ordered)
    floor = y(low)
    parts = [_grid(y, ticks)]
    free = 0.0  # where the next label may begin
    for number, (edit, cost) in enumerate(ordered):
        kind = "lp-other" if edit not in made else "lp-gone" if edit.kind == "remove" else "lp-together"
        verb = "cost" if edit in made else "would cost"
        top, left = min(y(cost), floor), LEFT + (number + 0.12) * step
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{0.76 * step:.1f}" '
            f'height="{max(1.0, abs(floor - y(cost))):.1f}"><title>{edit}: {verb} {cost:.4f}</title></rect>'
        )
        middle, half = LEFT + (number + 0.5) * step, CHARACTER * len(edit.label) / 2
        if middle - half >= free and middle + half <= WIDTH:
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{edit.label}</text>')
            free = middle + half + CHARACTER
    parts.append(_axis_name("layer" if all(len(edit.layers) == 1 for edit in costs) else "layers of the edit"))
    kinds = {"lp-other": "left as it is", "lp-gone": "removed", "lp-together": "put in parallel"}
    used = {"lp-other"} | {"lp-gone" if edit.kind == "remove" else "lp-together" for edit in made}
    key = "".join(f'<li><i class="{kind}"></i>{text}</li>' for kind, text in kinds.items() if kind in used)
    unit = criterion_unit(rounds[-1]["criterion"])
    scale = " Each line is ten times the one below it." if logarithmic else ""
    return _figure(parts, f"Cost of every edit: {unit}", key, f"{unit}, when it was measured last.{scale}")


def _figure(parts: Sequence[str], label: str, key: str, caption: str) -> str:
    return (
        f'<figure class="lp-chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(label)}">'
        f'{"".join(parts)}</svg><ul class="lp-key">{key}</ul><figcaption>{escaped(caption.strip())}</figcaption>'
        "</figure>"
    )


def _hint(text: str) -> str:
    return f'<p class="lp-hint">{text}</p>'


def _finite(value: object) -> float | None:
    """A value that can be drawn."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None  # type: ignore


def _horizontal(first: float, last: float) -> Scale:
    """Depths from the shallowest on the left, as the slider has them, with half a step of room on both sides."""
    room = 18
    span = max(1.0, last - first)
    return lambda value: LEFT + room + (value - first) / span * (WIDTH - LEFT - RIGHT - 2 * room)


def _vertical(low: float, high: float, logarithmic: bool) -> tuple[Scale, list[float]]:
    """A scale from the bottom up, and the values that get a line."""
    inner = HEIGHT - TOP - BOTTOM
    if logarithmic:
        a, b = math.log10(low), math.log10(high)
        pad = 0.06 * (b - a or 1)
        ticks = [10.0**n for n in range(math.floor(a) - 1, math.ceil(b) + 1)]
        ticks = [tick for tick in ticks if low <= tick <= high * 1.1]
        if len(ticks) < 2:
            ticks = [low, (low * high) ** 0.5, high]
        return lambda value: TOP + (b + pad - math.log10(value)) / (b - a + pad or 1) * inner, ticks
    span = (high - low) or 1.0
    step = _nice(span / 4)
    ticks = [tick * step for tick in range(math.ceil(low / step), math.floor(high / step) + 1)]
    pad = 0.06 * span
    return lambda value: TOP + (high + pad - value) / (span + 2 * pad) * inner, ticks


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... above a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


def _grid(y: Scale, ticks: Sequence[float]) -> str:
    return "".join(
        f'<line class="lp-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        for tick in ticks
    )


def _depth_axis(depths: Sequence[int], x: Scale, chosen: int) -> str:
    every = math.ceil(len(depths) / 12)
    return "".join(
        f'<text x="{x(depth):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle"'
        f"{STRONG * (depth == chosen)}>{depth}</text>"
        for number, depth in enumerate(depths)
        if number % every == 0 or depth == chosen
    )


def _axis_name(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{text}</text>'
