"""The report of a run: `report.json`, `report.md`, `quality.png`, and the table for the terminal."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .edits import Edit
from .files import to_json, write_atomically
from .scoring import LayerScores

COLUMNS = (
    "layers", "edit", "parameters", "ppl never healed", "ppl before healing", "ppl healed", "KL", "agreement",
    "decode tokens/s",
)  # fmt: skip
EDIT_BAR = "&#124;"  # `|` inside a cell of a Markdown table
EDITS_EXPLAINED = "Edit 7 removed layer 7; edit 4|5 runs layers 4 and 5 in parallel, as one layer."
CRITERION_UNITS = {
    "kl": "KL to the teacher without the layer (nats per token)",
    "loss": "next-token loss without the layer (nats per token)",
    "block_influence": "block influence, 1 - cos(input, output)",
}


def environment() -> dict[str, Any]:
    """Versions and hardware the numbers come from."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "hardware": gpu or f"CPU {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("hf-layerprune", "torch", "transformers", "trl")},
    }


def report_of(teacher: dict[str, Any], rounds: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of `report.json`."""
    return {"teacher": teacher, "rounds": rounds, "settings": settings, "environment": environment()}


def write_report(
    folder: Path, teacher: dict[str, Any], rounds: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Write the three files of a run's report into its output folder."""
    report = report_of(teacher, rounds, settings)
    write_atomically(folder / "report.json", to_json(report))
    write_atomically(folder / "report.md", render_markdown(report))
    if rounds:
        save_plot(plot_quality(teacher, rounds), folder / "quality.png")


def recovery(teacher: dict[str, Any], record: dict[str, Any]) -> float | None:
    """Share of the way back from the never healed student's loss (nats per token) to the teacher's; 1 is all of it."""
    lost = record["loss_unhealed"] - teacher["loss"]
    return (record["loss_unhealed"] - record["loss"]) / lost if lost > 0 else None


def table_rows(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The result as text cells in the order of `COLUMNS`, the teacher first."""

    def speed(record: dict[str, Any]) -> str:
        value = record.get("decode_tokens_per_second")
        return "" if value is None else f"{value:.0f} ({value / teacher['decode_tokens_per_second']:.2f}x)"

    rows = [
        [str(teacher["num_layers"]), "", _millions(teacher["num_parameters"]), "", "", f"{teacher['perplexity']:.2f}",
         "0", "100.0 %", speed(teacher)]
    ]  # fmt: skip
    for record in rounds:
        rows.append(
            [
                str(record["num_layers"]),
                ", ".join(record["edits"]),
                _millions(record["num_parameters"]),
                *_perplexities(record),
                f"{record['kl']:.4f}",
                f"{100 * record['agreement']:.1f} %",
                speed(record),
            ]
        )
    return rows


def _perplexities(record: dict[str, Any]) -> list[str]:
    """Never healed, just before healing, healed; a plan that was only searched for has the first alone."""
    if not was_healed(record):
        return [f"{record['perplexity']:.2f}", "", ""]
    return [f"{record[key]:.2f}" for key in ("perplexity_unhealed", "perplexity_before_healing", "perplexity")]


def was_healed(record: dict[str, Any]) -> bool:
    return "loss_unhealed" in record


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def rich_table(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> Table:
    """The result as a table that fits a terminal of 80 columns."""
    healed = any(was_healed(record) for record in rounds)
    title = "perplexity never healed, before healing, healed" if healed else "perplexity without training"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    columns = ("layers", "edit", "params", "never" if healed else "ppl", "before", "healed", "KL", "top-1", "tokens/s")
    unused = () if healed else ("before", "healed")
    for column in columns:
        if column not in unused:
            table.add_column(column, justify="right", no_wrap=column != "edit")
    for row in table_rows(teacher, rounds):
        cells = dict(zip(columns, row, strict=True))
        if not healed and not row[1]:
            cells["ppl"] = row[5]  # the teacher's own
        table.add_row(*(cell for column, cell in cells.items() if column not in unused))
    return table


def render_markdown(report: dict[str, Any]) -> str:
    """`report.md`: what was removed, what it cost, what it gained, where it was measured."""
    teacher, rounds, env = report["teacher"], report["rounds"], report["environment"]
    lines = [f"# {teacher.get('name', 'model')}: {teacher['num_layers']} layers", ""]
    if rounds:
        last = rounds[-1]
        lines[0] += f" to {last['num_layers']}"
        lines += [_summary(teacher, last), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---:|" * len(COLUMNS)]
    lines += [
        "| " + " | ".join(cell.replace("|", EDIT_BAR) for cell in row) + " |" for row in table_rows(teacher, rounds)
    ]
    lines += [
        "",
        f"Quality on {teacher['num_tokens']:,} tokens of {teacher['evaluated_on']}; KL in nats per token against the "
        f"teacher; agreement is the share of positions with the teacher's most likely token. {EDITS_EXPLAINED}",
        "",
    ]
    if rounds:
        lines += ["![quality against depth](quality.png)", "", "## Scores", ""]
        lines += ["What each edit would have cost in its round; the one that was made is bold.", ""]
        labels = {label: Edit.from_label(label) for record in rounds for label in record["scores"]}
        lines += ["| edit | " + " | ".join(f"round {record['round']}" for record in rounds) + " |"]
        lines += ["|---:|" + "---:|" * len(rounds)]
        for label in sorted(labels, key=lambda label: (labels[label].kind != "remove", labels[label].layers)):
            cells = [_score_cell(record, label) for record in rounds]
            lines.append(f"| {label.replace('|', EDIT_BAR)} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "Measured on "
        + env["hardware"]
        + " with "
        + ", ".join(f"{k} {v}" for k, v in env.items() if k != "hardware")
        + "."
    ]
    return "\n".join(lines) + "\n"


def _summary(teacher: dict[str, Any], last: dict[str, Any]) -> str:
    if not was_healed(last):
        return f"Loss per token (nats) {teacher['loss']:.4f} before, **{last['loss']:.4f}** after, without training."
    back = recovery(teacher, last)
    return (
        f"Loss per token (nats) {teacher['loss']:.4f} for the teacher, {last['loss_unhealed']:.4f} for the same edits "
        f"never healed, **{last['loss']:.4f}** healed"
        + ("." if back is None else f": {100 * back:.0f} % of the way back.")
    )


def _score_cell(record: dict[str, Any], label: str) -> str:
    value = record["scores"].get(label)
    if value is None:  # not possible in this round, or a score that is no number
        return ""
    return f"**{value:.4f}**" if label == record["edits"][0] else f"{value:.4f}"


def plot_quality(teacher: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity against depth: never healed, just before healing, healed; one curve where nothing was healed."""
    depths = [teacher["num_layers"], *(record["num_layers"] for record in rounds)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curves = (
        ("perplexity_unhealed", "never healed", {"color": "#c44e52", "linestyle": ":", "marker": "v"}),
        ("perplexity_before_healing", "just before healing", {"color": "#dd8452", "linestyle": "--", "marker": "s"}),
        ("perplexity", "healed", {"color": "#1f6f8b", "linestyle": "-", "marker": "o", "linewidth": 2}),
    )
    if not any(was_healed(record) for record in rounds):
        curves = (("perplexity", "without training", curves[-1][-1]),)
    for key, label, style in curves:
        axes.plot(depths, [teacher["perplexity"], *(record[key] for record in rounds)], label=label, **style)
    axes.axhline(teacher["perplexity"], color="#888888", linewidth=1, label="teacher")
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


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def plot_scores(scores: LayerScores, title: str) -> Figure:
    """Bar chart of the cost of every layer, the safest one marked."""
    figure = Figure(figsize=(max(6, 0.32 * len(scores.values)), 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted(scores.values)
    colors = ["#55a868" if layer == scores.safest else "#1f6f8b" for layer in layers]
    axes.bar([str(layer) for layer in layers], [scores.values[layer] for layer in layers], color=colors)
    if min(scores.values.values()) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("layer (green: safest to remove)")
    axes.set_ylabel(CRITERION_UNITS[scores.criterion], fontsize=8)
    axes.set_title(title)
    return figure
