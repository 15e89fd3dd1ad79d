"""The report of a run as tables: `report.json`, `report.md` (with two plots), and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table

from .environment import wall_time
from .files import to_json, write_atomically
from .plan import Edit
from .plots import save_run_plots
from .record import REPORT_FILE, ModelRecord, RoundRecord, RunRecord

COLUMNS = {
    "layers": "layers",
    "edit": "edit",
    "parameters": "params",
    "ppl unhealed": "unhealed",
    "ppl before healing": "before",
    "ppl healed": "healed",
    "ppl": "ppl",
    "KL": "KL",
    "agreement": "top-1",
    "decode tokens/s": "tokens/s",
}
"""Columns of the result, and their names in a narrow terminal."""
HEALING_COLUMNS = ("ppl unhealed", "ppl before healing", "ppl healed")
BAR = "&#124;"  # `|` inside a cell of a Markdown table


def write_report(folder: Path, run: RunRecord) -> None:
    """Write `report.json`, `report.md`, `quality.png` and `layers.png`."""
    write_atomically(folder / REPORT_FILE, to_json(run.to_dict()))
    write_atomically(folder / "report.md", render_markdown(run))
    if run.rounds:
        save_run_plots(folder, run)


def recovery(run: RunRecord, record: RoundRecord) -> float | None:
    """Share of the lost loss (nats per token) that healing recovers; 1 is all of it, `None` where nothing was lost."""
    lost = record.unhealed.loss - run.teacher.quality.loss
    return (record.unhealed.loss - record.quality.loss) / lost if lost > 0 else None


def columns(run: RunRecord) -> tuple[str, ...]:
    """The columns a result needs: one perplexity where nothing was healed, three where something was."""
    unused = ("ppl",) if run.is_healed or not run.rounds else HEALING_COLUMNS
    return tuple(name for name in COLUMNS if name not in unused)


def table_rows(run: RunRecord) -> list[list[str]]:
    """The result as text cells in the order of [`columns`], the teacher first."""
    rows = [_cells(run.teacher) | {"KL": "0", "agreement": "100.0 %"}]
    for record in run.rounds:
        row = _cells(record) | {"edit": ", ".join(edit.label for edit in record.edits)}
        if record.healing is not None:
            row["ppl unhealed"] = f"{record.unhealed.perplexity:.2f}"
            row["ppl before healing"] = f"{record.before_healing.perplexity:.2f}"
        rows.append(row)
    return [[row.get(name, "") for name in columns(run)] for row in rows]


def _cells(record: ModelRecord) -> dict[str, str]:
    quality, perplexity = record.quality, f"{record.quality.perplexity:.2f}"
    cells = {"layers": str(record.depth), "parameters": millions(record.num_parameters)}
    cells |= {"ppl": perplexity, "ppl healed": perplexity}
    if quality.kl is not None:
        cells |= {"KL": f"{quality.kl:.4f}", "agreement": f"{100 * quality.agreement:.1f} %"}
    if record.speed is not None:
        speed = record.speed.report
        cells["decode tokens/s"] = f"{speed.decode_tokens_per_second:.0f} ({speed.decode_ratio:.2f}x)"
    return cells


def millions(count: int) -> str:
    """A number of parameters in millions or billions."""
    return f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def rich_table(run: RunRecord) -> Table:
    """The result as a table that fits a terminal of 80 columns."""
    title = "perplexity without training" if "ppl" in columns(run) else "perplexity unhealed, before healing, healed"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for name in columns(run):
        table.add_column(COLUMNS[name], justify="right", no_wrap=name != "edit")
    for row in table_rows(run):
        table.add_row(*row)
    return table


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned to the right."""
    head, *body = ("| " + " | ".join(cell.replace("|", BAR) for cell in line) + " |" for line in (names, *rows))
    return "\n".join([head, "|" + "---:|" * len(names), *body])


def render_markdown(run: RunRecord) -> str:
    """`report.md`: what was removed, what it cost, what healing recovered, where it was measured."""
    template = files(__package__).joinpath("templates/report.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    versions = [f"{name} {value}" for name, value in run.environment.items() if name != "hardware"]
    return environment.from_string(template).render(
        run=run,
        summary=summary(run) if run.rounds else "",
        quality_table=quality_table(run),
        task_table=task_table(run),
        score_table=score_table(run),
        certainties=[(r.number, s.certainty.replace("|", BAR)) for r in run.rounds for s in r.scores if s.certainty],
        versions=versions,
        wall_time=wall_time(run.seconds) if run.seconds else "",
    )


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
    parts = [
        f"Quality on {run.teacher.quality.num_tokens:,} tokens of {run.teacher.evaluated_on}; KL in nats per token "
        "against the original; agreement is the share of positions with the original's most likely token.",
        _edits_explained(run.edits),
        "Speed is a median of several runs; the ratio in brackets is the median of the ratios run by run, so it is "
        "not quite that of the two medians."
        if run.teacher.speed
        else "",
    ]
    return markdown_table(columns(run), table_rows(run)) + "\n\n" + " ".join(filter(None, parts))


def _edits_explained(edits: Sequence[Edit]) -> str:
    """What the labels of the edits mean, by the first of each kind."""
    parts = []
    for kind in ("remove", "parallelize"):
        edit = next((edit for edit in edits if edit.kind == kind), None)
        if edit is not None and kind == "remove":
            parts.append(f"edit {edit.label} removes layer {edit.layers[0]}")
        elif edit is not None:
            *most, last = map(str, edit.layers)
            parts.append(f"edit {edit.label} runs layers {', '.join(most)} and {last} in parallel, as one layer")
    return f"{'; '.join(parts).capitalize()}." if parts else ""


def task_table(run: RunRecord) -> str:
    """Quality on the tasks as a Markdown table, a row per depth, and the sentence that explains it."""
    if run.teacher.tasks is None:
        return ""
    measures = {name: result.measure for name, result in run.teacher.tasks.results.items()}
    rows = []
    for record in (run.teacher, *run.rounds):
        if record.tasks is None or not set(measures) <= set(record.tasks.results):
            continue
        qualities = [f"{record.tasks.results[name].quality:.4f}" for name in measures]
        rows.append([str(record.depth), f"{record.tasks.mean_cost:.4f}", *qualities])
    names = ["layers", "mean cost", *(f"{name} ({measure})" for name, measure in measures.items())]
    explained = "Mean cost is what layers were chosen by: 1 - accuracy or score, or nats per token."
    return explained + "\n\n" + markdown_table(names, rows)


def score_table(run: RunRecord) -> str:
    """What each edit would have cost in the first choice of each round, as a Markdown table."""
    every = {edit for record in run.rounds for scores in record.scores[:1] for edit in scores.values}
    if not every:
        return ""
    ordered = sorted(every, key=lambda edit: (edit.kind != "remove", edit.layers))
    rows = [[edit.label, *(_score_cell(record, edit) for record in run.rounds)] for edit in ordered]
    return markdown_table(["edit", *(f"round {record.number}" for record in run.rounds)], rows)


def _score_cell(record: RoundRecord, edit: Edit) -> str:
    scores = record.scores[0] if record.scores else None
    value = math.nan if scores is None else scores.values.get(edit, math.nan)
    if math.isnan(value):  # not possible in this round, or not a number
        return ""
    cell = f"**{value:.4f}**" if record.edits and edit == record.edits[0] else f"{value:.4f}"
    error = scores.standard_errors.get(edit, math.nan)
    cell = cell if math.isnan(error) else f"{cell} ± {error:.4f}"
    return f"{cell} (left at {scores.left[edit]:.0%})" if edit in scores.left else cell
