"""The layer map of a run: which layers of the original are left, and what leaving each out would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from .plan import Edit, LayerPlan

KEPT, REMOVED, PARALLEL, ABSENT, OTHER = "#1f6f8b", "#c44e52", "#dd8452", "#aaaaaa", "#b8cdd6"
COLORS = {"remove": REMOVED, "parallelize": PARALLEL}
"""Of the edits that were made."""
GONE = "·"
"""What stands in the place of a removed layer in a map of text."""


def plan_of_record(record: dict[str, Any]) -> LayerPlan:
    """The plan of a round's student."""
    return LayerPlan.from_dict(record["plan"])


def made_edits(rounds: Sequence[dict[str, Any]]) -> list[Edit]:
    """Every edit of a run, in the order they were made."""
    return [Edit.from_label(label) for record in rounds for label in record["edits"]]


def last_costs(rounds: Sequence[dict[str, Any]]) -> dict[Edit, float]:
    """What each edit cost when it was measured last; for one that was made, that is when it was chosen."""
    costs: dict[Edit, float] = {}
    for record in rounds:
        for scores in record.get("all_scores") or [{"values": record["scores"]}]:
            finite = {label: cost for label, cost in scores["values"].items() if cost is not None and isfinite(cost)}
            costs |= {Edit.from_label(label): cost for label, cost in finite.items()}
    return costs


def layer_map_text(plan: LayerPlan, width: int = 20) -> str:
    """The original's layers in lines of `width`: removed ones are dots, parallel ones in brackets."""
    cells = []
    for layer in range(plan.num_teacher_layers):
        block = plan.blocks[plan.block_of(layer)] if layer in plan.layers else ()
        text = str(layer) if block else GONE
        if len(block) > 1:
            text = f"{'(' * (layer == block[0])}{text}{')' * (layer == block[-1])}"
        cells.append(text)
    size = max(map(len, cells))
    lines = [cells[start : start + width] for start in range(0, len(cells), width)]
    return "\n".join(" ".join(cell.rjust(size) for cell in line) for line in lines)


def plot_layer_map(rounds: Sequence[dict[str, Any]], unit: str = "") -> Figure:
    """The layers of the original as a strip, and above it what each possible edit cost when it was measured last.

    Args:
        rounds (`Sequence[dict]`): the records of a run.
        unit (`str`, *optional*): what costs are in.
    """
    plan, costs = plan_of_record(rounds[-1]), last_costs(rounds)
    width = min(12.0, max(5.0, 0.32 * plan.num_teacher_layers))
    if not costs:
        figure = Figure(figsize=(width, 1.3), layout="constrained")
        _draw_strip(figure.subplots(), plan, rounds)
        return figure
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_costs(above, costs, made_edits(rounds), rounds[-1]["criterion"], unit)
    _draw_strip(below, plan, rounds)
    return figure


def _draw_costs(axes: Axes, costs: dict[Edit, float], made: list[Edit], criterion: str, unit: str) -> None:
    """A bar for each layer; where groups of layers have costs too, a line over the layers of each edit."""
    shades = [COLORS[edit.kind] if edit in made else OTHER for edit in costs]
    if all(edit.kind == "remove" for edit in costs):
        axes.bar([edit.layers[0] for edit in costs], list(costs.values()), width=0.72, color=shades)
    else:
        starts, ends = [edit.layers[0] - 0.36 for edit in costs], [edit.layers[-1] + 0.36 for edit in costs]
        widths = [3.5 if edit in made else 2 for edit in costs]
        axes.hlines(list(costs.values()), starts, ends, colors=shades, linewidths=widths)
    if min(costs.values()) > 0:
        axes.set_yscale("log")
    axes.set_ylabel(f"cost ({criterion})" + (f",\n{unit}" if unit else ""), fontsize=8)
    names = {"remove": "made: layer removed", "parallelize": "made: layers in parallel"}
    handles = [Patch(color=COLORS[kind], label=name) for kind, name in names.items() if kind in {e.kind for e in made}]
    handles += [Patch(color=OTHER, label="not made")] if set(costs) - set(made) else []
    axes.legend(handles=handles, loc="upper right", fontsize=7, frameon=False)
    axes.tick_params(labelsize=7, bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_strip(axes: Axes, plan: LayerPlan, rounds: Sequence[dict[str, Any]]) -> None:
    removed_here = {edit.layers[0] for edit in made_edits(rounds) if edit.kind == "remove"}
    for block in plan.parallel_pairs:
        size = block[-1] - block[0] + 0.96
        style = {"boxstyle": "round,pad=0,rounding_size=0.2", "facecolor": "#f6ddcd", "edgecolor": PARALLEL}
        axes.add_patch(FancyBboxPatch((block[0] - 0.48, 0.02), size, 0.96, **style))
    for layer in range(plan.num_teacher_layers):
        if layer in plan.layers:
            color = PARALLEL if len(plan.blocks[plan.block_of(layer)]) > 1 else KEPT
            style, text = {"facecolor": color, "edgecolor": color}, {"color": "white"}
        else:
            color = REMOVED if layer in removed_here else ABSENT
            style, text = {"facecolor": "white", "edgecolor": color, "linestyle": ":"}, {"color": color}
        box = FancyBboxPatch((layer - 0.36, 0.14), 0.72, 0.72, boxstyle="round,pad=0,rounding_size=0.12", **style)
        axes.add_patch(box)
        axes.text(layer, 0.48, str(layer), ha="center", va="center", fontsize=7, **text)
    axes.set_xlim(-0.7, plan.num_teacher_layers - 0.3)
    axes.set_ylim(-0.05, 1.05)
    axes.axis("off")
    handles = [Patch(color=KEPT, label="kept")]
    if removed_here:
        handles.append(Patch(facecolor="white", edgecolor=REMOVED, linestyle=":", label="removed"))
    if set(plan.removed_layers) - removed_here:
        handles.append(Patch(facecolor="white", edgecolor=ABSENT, linestyle=":", label="removed before this run"))
    if plan.parallel_pairs:
        handles.append(Patch(color=PARALLEL, label="in parallel, as one layer"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, fontsize=7, frameon=False)
