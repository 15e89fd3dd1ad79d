"""The report of a run: `report.json`, `report.md`, two plots, and the table for the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .environment import environment, wall_time
from .files import to_json, write_atomically
from .layer_map import plot_layer_map
from .plan import Edit
from .scoring import Scores
from .search import ParallelRange

COLUMNS = {
    "layers": "layers",
    "edit": "edit",
    "parameters": "params",
    "ppl never healed": "never",
    "ppl before healing": "before",
    "ppl healed": "healed",
    "ppl": "ppl",
    "KL": "KL",
    "agreement": "top-1",
    "decode tokens/s": "tokens/s",
}
"""Columns of the result, and their names in a narrow terminal."""
SPEED_EXPLAINED = (
    "Speed is a median of several runs; in brackets the ratio to the original, which is the median of the ratios run "
    "by run and so not quite that of the two medians."
)
OF_HEALED = ("ppl never healed", "ppl before healing", "ppl healed")
EDIT_BAR = "&#124;"  # `|` inside a cell of a Markdown table
CRITERION_UNITS = {
    "kl": "KL to the original without the layer (nats per token)",
    "loss": "next-token loss without the layer (nats per token)",
    "tasks": "mean cost on the tasks without the layer",
    "block_influence": "block influence, 1 - cos(input, output)",
    "angular_distance": "angle between input and output, over pi",
    "taylor": "sum of |weight x gradient of the loss|",
    "tail": "the last layer first",
    "random": "at random",
}
QUALITY_CURVES = {
    "perplexity_unhealed": "never healed",
    "perplexity_before_healing": "just before healing",
    "perplexity": "healed",
}


def criterion_unit(criterion: str) -> str:
    """What a cost by a criterion is; of one that was added its name."""
    return CRITERION_UNITS.get(criterion, criterion)


def report_of(
    teacher: dict[str, Any],
    rounds: list[dict[str, Any]],
    settings: dict[str, Any],
    device: torch.device | None = None,
    seconds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The content of `report.json`, measured on a device; `seconds` is what each phase of the run took."""
    time = {} if seconds is None else {"seconds": {"total": sum(seconds.values()), "phases": seconds}}
    return {"teacher": teacher, "rounds": rounds, "settings": settings, "environment": environment(device)} | time


def write_report(
    folder: Path,
    teacher: dict[str, Any],
    rounds: list[dict[str, Any]],
    settings: dict[str, Any],
    device: torch.device | None = None,
    seconds: dict[str, float] | None = None,
) -> None:
    """Write the report of a run that was measured here, on a device, into its output folder."""
    write_report_files(folder, report_of(teacher, rounds, settings, device, seconds))


def write_report_files(folder: Path, report: dict[str, Any]) -> None:
    """Write a report's four files: `report.json`, `report.md`, `quality.png` and `layers.png`."""
    write_atomically(folder / "report.json", to_json(report))
    write_atomically(folder / "report.md", render_markdown(report))
    if report["rounds"]:
        save_report_plots(folder, report)


def save_report_plots(folder: Path, report: dict[str, Any]) -> None:
    """Write `quality.png` and `layers.png`."""
    save_plot(plot_quality(report["teacher"], report["rounds"]), folder / "quality.png")
    save_plot(plot_layer_map(report["rounds"], cost_unit(report)), folder / "layers.png")


def weighed_by(settings: dict[str, Any]) -> str:
    """What an edit saves, where a run divided its cost by that; else empty."""
    unit = settings.get("target", "")
    unit = "latency" if settings.get("target_latency") else unit
    unit = "parameters" if settings.get("target_num_parameters") else unit
    return {"latency": "time", "parameters": "parameters"}.get(unit, "")


def cost_unit(report: dict[str, Any]) -> str:
    """The unit of a run's costs, where they have one."""
    plain = report["rounds"][-1]["criterion"] in ("kl", "loss") and not weighed_by(report["settings"])
    return "nats per token" if plain else ""


def recovery(teacher: dict[str, Any], record: dict[str, Any]) -> float | None:
    """Share of the way back from the never healed student's loss (nats per token) to the teacher's; 1 is all of it."""
    lost = record["loss_unhealed"] - teacher["loss"]
    return (record["loss_unhealed"] - record["loss"]) / lost if lost > 0 else None


def was_healed(record: dict[str, Any]) -> bool:
    """Whether a record is of a round with healing, or of a plan that was only searched for."""
    return "loss_unhealed" in record


def quality_curves(rounds: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The curves of quality against depth: what of a record each shows, and its name; one where nothing was healed."""
    return QUALITY_CURVES if any(map(was_healed, rounds)) else {"perplexity": "without training"}


def columns(rounds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The columns a result needs: one perplexity where nothing was healed, three where something was."""
    healed = any(was_healed(record) for record in rounds) or not rounds
    return tuple(name for name in COLUMNS if name != "ppl" and healed or name not in OF_HEALED and not healed)


def table_rows(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The result as text cells in the order of `columns`, the teacher first."""

    def cells(record: dict[str, Any]) -> dict[str, str]:
        speed = record.get("decode_tokens_per_second")
        row = {
            "layers": str(record["num_layers"]),
            "edit": ", ".join(record.get("edits", [])),
            "parameters": millions(record["num_parameters"]),
            "ppl": f"{record['perplexity']:.2f}",
            "ppl healed": f"{record['perplexity']:.2f}",
            "KL": f"{record.get('kl', 0):.4f}" if record is not teacher else "0",
            "agreement": f"{100 * record.get('agreement', 1):.1f} %",
        }
        if speed is not None:
            row["decode tokens/s"] = f"{speed:.0f} ({record['decode_ratio']:.2f}x)"
        if was_healed(record):
            row["ppl never healed"] = f"{record['perplexity_unhealed']:.2f}"
            row["ppl before healing"] = f"{record['perplexity_before_healing']:.2f}"
        return row

    return [[cells(record).get(name, "") for name in columns(rounds)] for record in (teacher, *rounds)]


def speed_measured(record: dict[str, Any]) -> str:
    """What a record's speed was measured with; empty where it does not say."""
    if not {"dtype", "prompt_tokens", "new_tokens", "batch_size"} <= set(record):
        return ""
    return (
        f"weights in {record['dtype']}, a prompt of {record['prompt_tokens']} tokens and {record['new_tokens']} new "
        f"ones, batch {record['batch_size']}"
    )


def millions(count: int) -> str:
    """A number of parameters as it is told."""
    return f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def rich_table(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> Table:
    """The result as a table that fits a terminal of 80 columns."""
    names = columns(rounds)
    title = "perplexity without training" if "ppl" in names else "perplexity never healed, before healing, healed"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for name in names:
        table.add_column(COLUMNS[name], justify="right", no_wrap=name != "edit")
    for row in table_rows(teacher, rounds):
        table.add_row(*row)
    return table


def render_markdown(report: dict[str, Any]) -> str:
    """`report.md`: what was removed, what it cost, what it gained, where it was measured."""
    teacher, rounds, env = report["teacher"], report["rounds"], report["environment"]
    lines = [f"# {teacher.get('name', 'model')}: {teacher['num_layers']} layers", ""]
    if rounds:
        last = rounds[-1]
        lines[0] += f" to {last['num_layers']}"
        lines += [summary(teacher, last), ""]
    lines += [quality_table(teacher, rounds), ""]
    if rounds:
        lines += ["![quality against depth](quality.png)", ""]
    if "tasks" in teacher:
        lines += ["## Tasks", "", task_table([teacher, *rounds]), ""]
    if any(record["scores"] for record in rounds):
        lines += ["## Scores", ""]
        spread = " ± is one standard error." if any(_standard_errors(record) for record in rounds) else ""
        lines += [f"What each edit would have cost in its round; the one that was made is bold.{spread}", ""]
        labels = {label: Edit.from_label(label) for record in rounds for label in record["scores"]}
        lines += ["| edit | " + " | ".join(f"round {record['round']}" for record in rounds) + " |"]
        lines += ["|---:|" + "---:|" * len(rounds)]
        for label in sorted(labels, key=lambda label: (labels[label].kind != "remove", labels[label].layers)):
            cells = [_score_cell(record, label) for record in rounds]
            lines.append(f"| {label.replace('|', EDIT_BAR)} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"* Round {number}: {text}." for number, text in _certainties(rounds)]
        lines += [""] * bool(_certainties(rounds))
    lines += [
        "Measured on "
        + env["hardware"]
        + " with "
        + ", ".join(f"{k} {v}" for k, v in env.items() if k != "hardware")
        + "."
        + (f" Speed: {how}." if (how := speed_measured(teacher)) else "")
        + (f" {wall_time(report['seconds'])}" if "seconds" in report else "")
    ]
    return "\n".join(lines) + "\n"


def _edits_explained(rounds: Sequence[dict[str, Any]]) -> str:
    """What the labels of the edits mean, by the first of each kind."""
    labels = [label for record in rounds for label in record["edits"]]
    first = {Edit.from_label(label).kind: Edit.from_label(label) for label in reversed(labels)}
    told = {
        "remove": lambda layers: f"edit {layers[0]} removed layer {layers[0]}",
        "parallelize": lambda layers: (
            f"edit {'|'.join(map(str, layers))} runs layers {', '.join(map(str, layers[:-1]))} and {layers[-1]} in "
            "parallel, as one layer"
        ),
    }
    parts = [tell(first[kind].layers) for kind, tell in told.items() if kind in first]
    return f"{'; '.join(parts).capitalize()}." if parts else ""


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned to the right."""
    lines = [names, *([cell.replace("|", EDIT_BAR) for cell in row] for row in rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---:|" * len(names), *body])


def quality_table(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> str:
    """The result as a Markdown table, and the sentence that explains it."""
    parts = [
        f"Quality on {teacher['num_tokens']:,} tokens of {teacher['evaluated_on']}; KL in nats per token against the "
        "original; agreement is the share of positions with the original's most likely token.",
        _edits_explained(rounds),
        SPEED_EXPLAINED if any("decode_ratio" in record for record in rounds) else "",
    ]
    explained = " ".join(filter(None, parts))
    return markdown_table(columns(rounds), table_rows(teacher, rounds)) + "\n\n" + explained


def task_table(records: Sequence[dict[str, Any]]) -> str:
    """Quality on the tasks as a Markdown table, a row per depth, and the sentence that explains it."""
    measures = {name: result["measure"] for name, result in records[0]["tasks"]["results"].items()}
    rows = []
    for record in records:
        results = record["tasks"]["results"]
        cells = [str(record["num_layers"]), f"{record['tasks']['mean_cost']:.4f}"]
        rows.append(cells + [f"{results[name]['quality']:.4f}" for name in measures])
    names = ["layers", "mean cost", *(f"{name} ({measure})" for name, measure in measures.items())]
    explained = "Mean cost is what layers were chosen by: 1 - accuracy or score, or nats per token."
    return explained + "\n\n" + markdown_table(names, rows)


def summary(teacher: dict[str, Any], last: dict[str, Any]) -> str:
    """One sentence: the loss before and after, and how much of the way back healing went."""
    if not was_healed(last):
        return f"Loss per token (nats) {teacher['loss']:.4f} before, **{last['loss']:.4f}** after, without training."
    back = recovery(teacher, last)
    return (
        f"Loss per token (nats) {teacher['loss']:.4f} for the original, {last['loss_unhealed']:.4f} for the same "
        f"edits never healed, **{last['loss']:.4f}** healed"
        + ("." if back is None else f": {100 * back:.0f} % of the way back.")
    )


def _score_cell(record: dict[str, Any], label: str) -> str:
    value, error = record["scores"].get(label), _standard_errors(record).get(label)
    if value is None:  # not possible in this round, or a score that is no number
        return ""
    cell = f"**{value:.4f}**" if label == record["edits"][0] else f"{value:.4f}"
    cell = cell if error is None or math.isnan(error) else f"{cell} ± {error:.4f}"
    left = (record.get("all_scores") or [{}])[0].get("left", {}).get(label)
    return cell if left is None else f"{cell} (left at {left:.0%})"


def _standard_errors(record: dict[str, Any]) -> dict[str, float | None]:
    """Of the scores of a round's first choice."""
    scores = record.get("all_scores") or [{}]
    return scores[0].get("standard_errors", {})


def _certainties(rounds: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Round and how sure its choice was, for every choice that was measured."""
    texts = [
        (record["round"], scores.get("certainty")) for record in rounds for scores in record.get("all_scores", [])
    ]
    return [(number, text.replace("|", EDIT_BAR)) for number, text in texts if text]


def plot_quality(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity against depth: never healed, just before healing, healed; one curve where nothing was healed."""
    depths = [teacher["num_layers"], *(record["num_layers"] for record in rounds)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {
        "perplexity_unhealed": {"color": "#c44e52", "linestyle": ":", "marker": "v"},
        "perplexity_before_healing": {"color": "#dd8452", "linestyle": "--", "marker": "s"},
        "perplexity": {"color": "#1f6f8b", "linestyle": "-", "marker": "o", "linewidth": 2},
    }
    for key, label in quality_curves(rounds).items():
        axes.plot(depths, [teacher["perplexity"], *(record[key] for record in rounds)], label=label, **styles[key])
    axes.axhline(teacher["perplexity"], color="#888888", linewidth=1, label="original")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(depths)
    axes.invert_xaxis()
    axes.set_xlabel("layers")
    axes.set_ylabel("held-out perplexity")
    axes.set_title(f"{teacher.get('name', 'model')}: quality against depth")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def plot_range(found: ParallelRange) -> Figure:
    """Perplexity of every run of pairs against its first layer, a line per number of blocks."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for depth in sorted({plan.depth for plan in found.perplexities}, reverse=True):
        runs = [
            (plan.parallel_pairs[0][0], value) for plan, value in found.perplexities.items() if plan.depth == depth
        ]
        axes.plot(*zip(*sorted(runs), strict=True), marker="o", label=f"{depth} layers")
    axes.axhline(found.original, color="#888888", linewidth=1, label="original")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("first layer of the run of parallel pairs")
    axes.set_ylabel("perplexity")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def plot_scores(scores: Scores[int], title: str) -> Figure:
    """Bar chart of the cost of every layer, the safest one marked."""
    figure = Figure(figsize=(max(6, 0.32 * len(scores.values)), 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted(scores.values)
    colors = ["#55a868" if layer == scores.safest else "#1f6f8b" for layer in layers]
    axes.bar([str(layer) for layer in layers], [scores.values[layer] for layer in layers], color=colors)
    if min(scores.values.values()) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("layer (green: safest to remove)")
    axes.set_ylabel(criterion_unit(scores.criterion), fontsize=8)
    axes.set_title(title)
    return figure
