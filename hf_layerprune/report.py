"""The report of a run: `report.json`, `report.md`, its tables and plots. Matplotlib is imported when it draws."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from .errors import needs_extra
from .files import write_atomically
from .plan import Edit, LayerPlan
from .record import REPORT_FILE, ModelRecord, RoundRecord, RunRecord
from .scoring import CRITERION_UNITS, Scores

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = "&#124;"  # `|` inside a cell of a Markdown table
EXPLANATION = (
    "KL is to the original, in nats per token; top-1 is the share of positions with the original's most likely token. "
    "An edit is a layer that is removed, or layers such as 4|5 that run in parallel, as one."
)
SPEED_EXPLANATION = " Speed is that of decoding, next to the original's: the median of the ratios run by run."

PLOTS = ("quality.png", "layers.png")
KEPT, REMOVED, PARALLEL, MERGED, ABSENT = "#1f6f8b", "#c44e52", "#dd8452", "#8172b3", "#aaaaaa"
OTHER, OTHER_LINE = "#b8cdd6", "#6d8b97"  # of an edit that was not made: a bar, and a line, which may cross bars
UNHEALED = {"color": REMOVED, "linestyle": ":", "marker": "v"}
BEFORE_HEALING = {"color": PARALLEL, "linestyle": "--", "marker": "s"}
FINAL = {"color": KEPT, "linestyle": "-", "marker": "o", "linewidth": 2}
STATES = {
    "kept": KEPT, "in parallel, as one layer": PARALLEL, "merged into one layer": MERGED, "removed": REMOVED,
    "removed before this run": ABSENT,
}  # fmt: skip
"""What became of a layer, and its color in the layer map."""
EDITS = {"remove": REMOVED, "parallelize": PARALLEL, "merge": MERGED}


def has_plots() -> bool:
    """Whether Matplotlib is installed (extra `plots`); without it reports have no plots."""
    return find_spec("matplotlib") is not None


def write_report(folder: Path, run: RunRecord) -> None:
    """Write `report.json`, `report.md` and, with Matplotlib, `quality.png` and `layers.png`."""
    write_atomically(folder / REPORT_FILE, run.to_json())
    write_atomically(folder / "report.md", render_markdown(run))
    if run.rounds and has_plots():
        save_run_plots(folder, run)


def recovery(run: RunRecord, record: RoundRecord) -> float | None:
    """Share of the lost loss (nats per token) that healing recovers; 1 is all of it, `None` where nothing was lost."""
    lost = record.unhealed.loss - run.teacher.quality.loss
    return (record.unhealed.loss - record.quality.loss) / lost if lost > 0 else None


def millions(count: int) -> str:
    """A number of parameters in millions or billions."""
    return f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def table_rows(run: RunRecord) -> list[dict[str, str]]:
    """The result by its columns, without empty ones: a row for the teacher, then one per round."""
    rows = [_row(record, run.is_healed) for record in (run.teacher, *run.rounds)]
    return [{name: row[name] for name in row if any(other[name] for other in rows)} for row in rows]


def _row(record: ModelRecord, is_healed: bool) -> dict[str, str]:
    edits, qualities = "", {"ppl": record.quality}
    if isinstance(record, RoundRecord):
        edits = "on policy" if record.is_on_policy else ", ".join(edit.label for edit in record.edits)
    if is_healed:
        columns = {"unhealed": "unhealed", "before": "before_healing", "healed": "quality"}
        qualities = {column: getattr(record, name, None) for column, name in columns.items()}
    speed = record.speed and record.speed.report
    return {
        "layers": str(record.depth),
        "edit": edits,
        "params": millions(record.num_parameters),
        **{name: "" if quality is None else f"{quality.perplexity:.2f}" for name, quality in qualities.items()},
        "KL": "0" if record.quality.kl is None else f"{record.quality.kl:.4f}",
        "top-1": "100.0 %" if record.quality.agreement is None else f"{100 * record.quality.agreement:.1f} %",
        "speed": f"{speed.decode_ratio:.2f}x" if speed else "",
    }


def perplexity_caption(run: RunRecord) -> str:
    """What the columns of perplexity hold."""
    return "perplexity (unhealed, before healing, healed)" if run.is_healed else "perplexity (without training)"


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows by their columns, aligned to the right."""
    names = list(rows[0])
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    head, *body = ("| " + " | ".join(cell.replace("|", BAR) for cell in line) + " |" for line in lines)
    return "\n".join([head, "|" + "---:|" * len(names), *body])


def render_markdown(run: RunRecord) -> str:
    """`report.md`: what was removed, what it cost, what healing recovered, where it was measured."""
    loader, options = jinja2.PackageLoader("hf_layerprune"), {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, keep_trailing_newline=True, **options)
    return environment.get_template("report.md.jinja").render(run=run, report=sys.modules[__name__])


def wall_time(phases: dict[str, float]) -> str:
    """One sentence on how long a run took, from the seconds of its phases."""

    def duration(value: float) -> str:
        return f"{value:.1f} s" if value < 60 else str(timedelta(seconds=round(value)))

    longest_first = sorted(phases.items(), key=lambda phase: -phase[1])
    parts = ", ".join(f"{name} {duration(value)}" for name, value in longest_first)
    return f"The run took {duration(sum(phases.values()))}: {parts}."


def summary(run: RunRecord) -> str:
    """One sentence: the loss before and after, and how much of what was lost healing recovers."""
    last, before = run.rounds[-1], run.teacher.quality.loss
    if last.healing is None:
        return f"Loss per token (nats) {before:.4f} before, **{last.quality.loss:.4f}** after, without training."
    share = recovery(run, last)
    recovered = "" if share is None or share < 0 else f": {100 * share:.0f} % of the loss recovered"
    return (
        f"Loss per token (nats) {before:.4f} for the original, {last.unhealed.loss:.4f} unhealed, "
        f"**{last.quality.loss:.4f}** healed{recovered}. KL to the original {last.unhealed.kl:.4f} unhealed, "
        f"**{last.quality.kl:.4f}** healed."
    )


def quality_table(run: RunRecord) -> str:
    """The result as a Markdown table, and the sentences that explain it."""
    teacher, caption = run.teacher, perplexity_caption(run).capitalize()
    text = f"{caption} on {teacher.quality.num_tokens:,} tokens of {teacher.evaluated_on}."
    merges = " Layers such as 4+5 were merged into one." if any(edit.kind == "merge" for edit in run.edits) else ""
    explanation = f"{text} {EXPLANATION}{merges}" + (SPEED_EXPLANATION if teacher.speed else "")
    return f"{markdown_table(table_rows(run))}\n\n{explanation}"


def task_table(run: RunRecord) -> str:
    """Quality on the tasks as a Markdown table, a row per depth, and the sentence that explains it."""
    rows = [
        {"layers": str(record.depth), "mean cost": f"{record.tasks.mean_cost:.4f}"}
        | {f"{name} ({result.measure})": f"{result.quality:.4f}" for name, result in record.tasks.results.items()}
        for record in (run.teacher, *run.rounds)
        if record.tasks is not None
    ]
    explanation = "Mean cost is what layers were chosen by: 1 - accuracy or score, or nats per token."
    return f"{explanation}\n\n{markdown_table(rows)}" if rows else ""


def score_table(run: RunRecord) -> str:
    """What each edit would have cost in the first choice of each round, as a Markdown table."""
    every = {edit for record in run.rounds for scores in record.scores[:1] for edit in scores.values}
    ordered = sorted(every, key=lambda edit: (edit.kind != "remove", edit.layers))
    rounds = [record for record in run.rounds if record.scores]
    rows = [{"edit": edit.label} | {f"round {r.number}": _score_cell(r, edit) for r in rounds} for edit in ordered]
    return markdown_table(rows) if rows else ""


def _score_cell(record: RoundRecord, edit: Edit) -> str:
    scores = record.scores[0]
    value = scores.values.get(edit, math.nan)
    if math.isnan(value):  # not possible in this round, or not a number
        return ""
    cell = f"**{value:.4f}**" if edit in record.edits[:1] else f"{value:.4f}"
    error = scores.standard_errors.get(edit, math.nan)
    cell = cell if math.isnan(error) else f"{cell} ± {error:.4f}"
    return f"{cell} (dropped at {scores.dropped[edit]:.0%})" if edit in scores.dropped else cell


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
    figure, axes = _axes(7, 4.2)
    axes.axhline(run.teacher.quality.perplexity, color="#888888", linewidth=1, label="original")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")

    def draw(name: str, states: str, style: dict[str, object]) -> None:
        measured = {record.depth: getattr(record, states) for record in run.rounds if getattr(record, states)}
        curve = {run.teacher.depth: run.teacher.quality} | measured
        line = {} if len(run.rounds) > 1 else {"linestyle": "none"}  # two points do not make a curve
        axes.plot(list(curve), [quality.perplexity for quality in curve.values()], label=name, **style | line)

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


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches."""
    if not has_plots():
        raise needs_extra("matplotlib", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_scores(scores: Scores[int], title: str) -> Figure:
    """Bar chart of the cost of every layer, the safest one marked."""
    figure, axes = _axes(max(6, 0.32 * len(scores.values)), 3.8)
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
    """The teacher's layers in lines of `width`: removed ones are dots, parallel ones in brackets, merged ones with a
    plus."""
    cells = ["·"] * plan.num_teacher_layers
    for block in plan.blocks:
        texts = list(map(str, block))
        if block in plan.merged:
            texts[1:] = [f"+{text}" for text in texts[1:]]
        elif len(block) > 1:
            texts[0], texts[-1] = f"({texts[0]}", f"{texts[-1]})"
        for layer, text in zip(block, texts, strict=True):
            cells[layer] = text
    size = max(map(len, cells))
    lines = [cells[start : start + width] for start in range(0, len(cells), width)]
    return "\n".join(" ".join(cell.rjust(size) for cell in line) for line in lines)


def plot_layer_map(run: RunRecord) -> Figure:
    """What became of each of the teacher's layers, and what each edit cost when it was measured last.

    A bar is a layer, as high as removing it costs; a line is layers that become one block. Edits not made are pale;
    layers that became one share a bar above their numbers.
    """
    plan, criterion, made = run.rounds[-1].plan, run.rounds[-1].criterion, set(run.edits)
    every = (cost for record in run.rounds for scores in record.scores for cost in scores.values.items())
    costs = {edit: cost for edit, cost in every if math.isfinite(cost)}  # of each edit the last one
    figure, axes = _axes(min(12.0, max(5.0, 0.32 * plan.num_teacher_layers)), 3.0 if costs else 1.0)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    states = [_state(layer, plan, made) for layer in range(plan.num_teacher_layers)]
    for edit, cost in costs.items():
        if edit.kind == "remove":
            axes.bar(edit.layers[0], cost, 0.72, color=REMOVED if edit in made else OTHER)
        else:
            color = EDITS[edit.kind] if edit in made else OTHER_LINE
            axes.hlines(cost, edit.layers[0] - 0.36, edit.layers[-1] + 0.36, colors=color, linewidths=3)
    for block in filter(lambda block: block[1:], plan.blocks):  # a bar above the numbers of what became one
        color, ends = STATES[states[block[0]]], (block[0] - 0.4, block[-1] + 0.4)
        axes.hlines(0, *ends, colors=color, linewidths=5, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xticks(range(len(states)))
    for label, state in zip(axes.get_xticklabels(), states, strict=True):
        label.set_bbox({"facecolor": STATES[state], "edgecolor": "none", "boxstyle": "round,pad=0.25"})
        label.set(color="white", fontsize=7)
    axes.set_xlim(-0.7, len(states) - 0.3)
    if costs and min(costs.values()) > 0:
        axes.set_yscale("log")
    measures = {"kl": "how much predictions change\n(KL, nats per token)", "loss": "loss it costs\n(nats per token)"}
    axes.set_ylabel(measures.get(criterion, f"cost ({criterion})"), fontsize=8)
    axes.tick_params("y", which="both", labelsize=7)
    axes.yaxis.set_visible(bool(costs))
    axes.spines[["top", "right"]].set_visible(False)
    handles: list[Artist] = [Patch(color=color, label=state) for state, color in STATES.items() if state in states]
    if any(edit.kind != "remove" for edit in costs):
        handles.append(Line2D([], [], color=OTHER_LINE, linewidth=3, label="cost of layers as one"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _state(layer: int, plan: LayerPlan, made: set[Edit]) -> str:
    if layer in plan.layers:
        block = plan.blocks[plan.position_of(layer)]
        names = {plan.parallel_pairs: "in parallel, as one layer", plan.merged: "merged into one layer"}
        return next((name for blocks, name in names.items() if block in blocks), "kept")
    return "removed" if Edit.remove(layer) in made else "removed before this run"
