"""Plots of a run: quality against depth, the layer map, layer scores, runs of parallel pairs."""

from __future__ import annotations

import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .files import write_atomically
from .losses import perplexity_of
from .plan import Edit, LayerPlan
from .record import RunRecord
from .scoring import CRITERION_UNITS, Scores

KEPT, REMOVED, PARALLEL, ABSENT, OTHER = "#1f6f8b", "#c44e52", "#dd8452", "#aaaaaa", "#b8cdd6"
UNHEALED = {"color": REMOVED, "linestyle": ":", "marker": "v"}
BEFORE_HEALING = {"color": PARALLEL, "linestyle": "--", "marker": "s"}
FINAL = {"color": KEPT, "linestyle": "-", "marker": "o", "linewidth": 2}
STATES = {"kept": KEPT, "in parallel, as one layer": PARALLEL, "removed": REMOVED, "removed before this run": ABSENT}
"""What became of a layer, and its color in the layer map."""


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def save_run_plots(folder: Path, run: RunRecord) -> None:
    """Write `quality.png` and `layers.png`."""
    save_plot(plot_quality(run), folder / "quality.png")
    save_plot(plot_layer_map(run), folder / "layers.png")


def plot_quality(run: RunRecord) -> Figure:
    """Perplexity against depth: unhealed, before healing and healed; one curve for a run without healing."""
    figure, axes = _perplexity_axes(run.teacher.quality.perplexity)

    def draw(name: str, states: str, style: dict[str, object]) -> None:
        measured = {record.depth: getattr(record, states) for record in run.rounds if getattr(record, states)}
        curve = {run.teacher.depth: run.teacher.quality} | measured
        axes.plot(list(curve), [quality.perplexity for quality in curve.values()], label=name, **style)

    if run.is_healed:
        draw("unhealed", "unhealed", UNHEALED)
        draw("before healing", "before_healing", BEFORE_HEALING)
    draw("healed" if run.is_healed else "without training", "quality", FINAL)
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
    cells = ["·"] * plan.num_teacher_layers
    for block in plan.blocks:
        texts = list(map(str, block))
        if len(block) > 1:
            texts[0], texts[-1] = f"({texts[0]}", f"{texts[-1]})"
        for layer, text in zip(block, texts, strict=True):
            cells[layer] = text
    size = max(map(len, cells))
    lines = [cells[start : start + width] for start in range(0, len(cells), width)]
    return "\n".join(" ".join(cell.rjust(size) for cell in line) for line in lines)


def plot_layer_map(run: RunRecord) -> Figure:
    """What became of each of the teacher's layers, and what each edit cost when it was measured last.

    A bar is a layer, as high as removing it costs; a line is layers that run in parallel. Edits not made are pale.
    """
    plan, criterion, made = run.rounds[-1].plan, run.rounds[-1].criterion, set(run.edits)
    every = (cost for record in run.rounds for scores in record.scores for cost in scores.values.items())
    costs = {edit: cost for edit, cost in every if math.isfinite(cost)}  # of each edit the last one
    width = min(12.0, max(5.0, 0.32 * plan.num_teacher_layers))
    figure = Figure(figsize=(width, 3.0 if costs else 1.0), layout="constrained")
    axes = figure.subplots()
    states = [_state(layer, plan, made) for layer in range(plan.num_teacher_layers)]
    for edit, cost in costs.items():
        color = OTHER if edit not in made else REMOVED if edit.kind == "remove" else PARALLEL
        if edit.kind == "remove":
            axes.bar(edit.layers[0], cost, 0.72, color=color)
        else:
            axes.hlines(cost, edit.layers[0] - 0.36, edit.layers[-1] + 0.36, colors=color, linewidths=3)
    axes.set_xticks(range(len(states)))
    for label, state in zip(axes.get_xticklabels(), states, strict=True):
        label.set_bbox({"facecolor": STATES[state], "edgecolor": "none", "boxstyle": "round,pad=0.25"})
        label.set(color="white", fontsize=7)
    axes.set_xlim(-0.7, len(states) - 0.3)
    if costs and min(costs.values()) > 0:
        axes.set_yscale("log")
    unit = ",\nnats per token" if criterion in ("kl", "loss") else ""
    axes.set_ylabel(f"cost ({criterion}){unit}", fontsize=8)
    axes.tick_params("y", labelsize=7)
    axes.yaxis.set_visible(bool(costs))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=state) for state, color in STATES.items() if state in states]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _state(layer: int, plan: LayerPlan, made: set[Edit]) -> str:
    if layer in plan.layers:
        return "in parallel, as one layer" if len(plan.blocks[plan.position_of(layer)]) > 1 else "kept"
    return "removed" if Edit.remove(layer) in made else "removed before this run"
