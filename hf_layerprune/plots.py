"""Plots of a run: quality against depth, the layer map, layer scores, runs of parallel pairs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from .files import write_atomically
from .losses import perplexity_of
from .plan import Edit, LayerPlan
from .record import RunRecord
from .scoring import CRITERION_UNITS, Scores

KEPT, REMOVED, PARALLEL, ABSENT, OTHER = "#1f6f8b", "#c44e52", "#dd8452", "#aaaaaa", "#b8cdd6"
COLORS = {"remove": REMOVED, "parallelize": PARALLEL}
STYLES = {
    "unhealed": {"color": REMOVED, "linestyle": ":", "marker": "v"},
    "before healing": {"color": PARALLEL, "linestyle": "--", "marker": "s"},
    "healed": {"color": KEPT, "linestyle": "-", "marker": "o", "linewidth": 2},
    "without training": {"color": KEPT, "linestyle": "-", "marker": "o", "linewidth": 2},
}


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def save_run_plots(folder: Path, run: RunRecord) -> None:
    """Write `quality.png` and `layers.png`."""
    save_plot(plot_quality(run), folder / "quality.png")
    save_plot(plot_layer_map(run), folder / "layers.png")


def quality_curves(run: RunRecord) -> dict[str, dict[int, float]]:
    """Curves of perplexity by depth: unhealed, before healing and healed, or one where nothing was healed."""
    teacher = {run.teacher.depth: run.teacher.quality.perplexity}
    final = teacher | {record.depth: record.quality.perplexity for record in run.rounds}
    if not run.is_healed:
        return {"without training": final}
    unhealed = {r.depth: r.unhealed.perplexity for r in run.rounds if r.unhealed}
    before = {r.depth: r.before_healing.perplexity for r in run.rounds if r.before_healing}
    return {"unhealed": teacher | unhealed, "before healing": teacher | before, "healed": final}


def plot_quality(run: RunRecord) -> Figure:
    """Perplexity against depth: unhealed, before healing and healed; one curve for a run without healing."""
    figure, axes = _perplexity_axes(run.teacher.quality.perplexity)
    for name, curve in quality_curves(run).items():
        axes.plot(list(curve), list(curve.values()), label=name, **STYLES[name])
    axes.set_xticks([run.teacher.depth, *(record.depth for record in run.rounds)])
    axes.invert_xaxis()
    axes.set_xlabel("layers")
    axes.set_ylabel("held-out perplexity")
    axes.set_title(f"{run.teacher.name}: quality against depth")
    axes.legend()
    return figure


def plot_range(losses: Scores[LayerPlan]) -> Figure:
    """Perplexity of every run of pairs against its first layer, a line per number of blocks."""
    figure, axes = _perplexity_axes(perplexity_of(losses.baseline))
    for depth in sorted({plan.depth for plan in losses.values}, reverse=True):
        runs = {plan.parallel_pairs[0][0]: loss for plan, loss in losses.values.items() if plan.depth == depth}
        axes.plot(sorted(runs), [perplexity_of(runs[n]) for n in sorted(runs)], marker="o", label=f"{depth} layers")
    axes.set_xlabel("first layer of the run of parallel pairs")
    axes.set_ylabel("perplexity")
    axes.legend()
    return figure


def _perplexity_axes(teacher: float) -> tuple[Figure, Axes]:
    """A log axis of perplexity with the teacher's as a line."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(teacher, color="#888888", linewidth=1, label="original")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def plot_scores(scores: Scores[int], title: str) -> Figure:
    """Bar chart of the cost of every layer, the safest one marked."""
    figure = Figure(figsize=(max(6, 0.32 * len(scores.values)), 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted(scores.values)
    colors = ["#55a868" if layer == scores.safest else KEPT for layer in layers]
    axes.bar([str(layer) for layer in layers], [scores.values[layer] for layer in layers], color=colors)
    if min(scores.values.values()) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("layer (green: safest to remove)")
    axes.set_ylabel(CRITERION_UNITS.get(scores.criterion, scores.criterion), fontsize=8)
    axes.set_title(title)
    return figure


def layer_map_text(plan: LayerPlan, width: int = 20) -> str:
    """The teacher's layers in lines of `width`: removed ones are dots, parallel ones in brackets."""
    cells = []
    for layer in range(plan.num_teacher_layers):
        block = plan.blocks[plan.block_of(layer)] if layer in plan.layers else ()
        text = str(layer) if block else "·"
        if len(block) > 1:
            text = f"{'(' * (layer == block[0])}{text}{')' * (layer == block[-1])}"
        cells.append(text)
    size = max(map(len, cells))
    lines = [cells[start : start + width] for start in range(0, len(cells), width)]
    return "\n".join(" ".join(cell.rjust(size) for cell in line) for line in lines)


def plot_layer_map(run: RunRecord) -> Figure:
    """The teacher's layers as a strip, and above it what each possible edit cost when it was measured last."""
    plan, costs = run.rounds[-1].plan, run.last_costs()
    width = min(12.0, max(5.0, 0.32 * plan.num_teacher_layers))
    if not costs:
        figure = Figure(figsize=(width, 1.3), layout="constrained")
        _draw_strip(figure.subplots(), plan, run.edits)
        return figure
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_costs(above, costs, run.edits)
    unit = run.cost_unit
    above.set_ylabel(f"cost ({run.rounds[-1].criterion})" + (f",\n{unit}" if unit else ""), fontsize=8)
    _draw_strip(below, plan, run.edits)
    return figure


def _draw_costs(axes: Axes, costs: dict[Edit, float], made: Iterable[Edit]) -> None:
    """A bar for each layer; where groups of layers have costs too, a line over the layers of each edit."""
    made = set(made)
    shades = [COLORS[edit.kind] if edit in made else OTHER for edit in costs]
    if all(edit.kind == "remove" for edit in costs):
        axes.bar([edit.layers[0] for edit in costs], list(costs.values()), width=0.72, color=shades)
    else:
        starts, ends = [edit.layers[0] - 0.36 for edit in costs], [edit.layers[-1] + 0.36 for edit in costs]
        widths = [3.5 if edit in made else 2 for edit in costs]
        axes.hlines(list(costs.values()), starts, ends, colors=shades, linewidths=widths)
    if min(costs.values()) > 0:
        axes.set_yscale("log")
    names = {"remove": "made: layer removed", "parallelize": "made: layers in parallel"}
    handles = [Patch(color=COLORS[kind], label=name) for kind, name in names.items() if kind in {e.kind for e in made}]
    handles += [Patch(color=OTHER, label="not made")] if set(costs) - made else []
    axes.legend(handles=handles, loc="upper right", fontsize=7, frameon=False)
    axes.tick_params(labelsize=7, bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_strip(axes: Axes, plan: LayerPlan, made: Iterable[Edit]) -> None:
    removed_here = {edit.layers[0] for edit in made if edit.kind == "remove"}
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
