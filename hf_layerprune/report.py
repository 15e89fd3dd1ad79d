"""The report of a run: `report.json`, `report.md` with two plots, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table

from .files import write_atomically
from .plan import Edit
from .plots import save_run_plots
from .record import REPORT_FILE, ModelRecord, RoundRecord, RunRecord

BAR = "&#124;"  # `|` inside a cell of a Markdown table
EXPLANATION = (
    "KL is to the original, in nats per token; top-1 is the share of positions with the original's most likely token. "
    "An edit is a layer that is removed, or layers such as 4|5 that run in parallel, as one."
)
SPEED_EXPLANATION = (
    " Speed is the median of several runs; the ratio in brackets is the median of the ratios run by run."
)


def write_report(folder: Path, run: RunRecord) -> None:
    """Write `report.json`, `report.md`, `quality.png` and `layers.png`."""
    write_atomically(folder / REPORT_FILE, run.to_json())
    write_atomically(folder / "report.md", render_markdown(run))
    if run.rounds:
        save_run_plots(folder, run)


def recovery(run: RunRecord, record: RoundRecord) -> float | None:
    """Share of the lost loss (nats per token) that healing recovers; 1 is all of it, `None` where nothing was lost."""
    lost = record.unhealed.loss - run.teacher.quality.loss
    return (record.unhealed.loss - record.quality.loss) / lost if lost > 0 else None


def millions(count: int) -> str:
    """A number of parameters in millions or billions."""
    return f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def table_rows(run: RunRecord) -> list[dict[str, str]]:
    """The result by its columns: a row for the teacher, then one per round."""
    return [_row(record, run.is_healed) for record in (run.teacher, *run.rounds)]


def _row(record: ModelRecord, is_healed: bool) -> dict[str, str]:
    is_round = isinstance(record, RoundRecord)
    qualities = {"healed" if is_healed else "ppl": record.quality}
    if is_healed:
        earlier = (record.unhealed, record.before_healing) if is_round else (None, None)
        qualities = dict(zip(("unhealed", "before"), earlier, strict=True)) | qualities
    speed = record.speed and record.speed.report
    return {
        "layers": str(record.depth),
        "edit": ", ".join(edit.label for edit in record.edits) if is_round else "",
        "params": millions(record.num_parameters),
        **{name: "" if quality is None else f"{quality.perplexity:.2f}" for name, quality in qualities.items()},
        "KL": "0" if record.quality.kl is None else f"{record.quality.kl:.4f}",
        "top-1": "100.0 %" if record.quality.agreement is None else f"{100 * record.quality.agreement:.1f} %",
        "tokens/s": f"{speed.decode_tokens_per_second:.0f} ({speed.decode_ratio:.2f}x)" if speed else "",
    }


def measured(run: RunRecord) -> str:
    """What the columns of perplexity hold."""
    return "perplexity (unhealed, before healing, healed)" if run.is_healed else "perplexity (without training)"


def rich_table(run: RunRecord) -> Table:
    """The result as a table that fits a terminal of 80 columns."""
    rows = table_rows(run)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=measured(run))
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=name != "edit")
    for row in rows:
        table.add_row(*row.values())
    return table


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows by their columns, aligned to the right."""
    names = list(rows[0])
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    head, *body = ("| " + " | ".join(cell.replace("|", BAR) for cell in line) + " |" for line in lines)
    return "\n".join([head, "|" + "---:|" * len(names), *body])


def render_markdown(run: RunRecord) -> str:
    """`report.md`: what was removed, what it cost, what healing recovered, where it was measured."""
    template = files(__package__).joinpath("templates/report.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        run=run,
        summary=summary(run) if run.rounds else "",
        quality_table=quality_table(run),
        task_table=task_table(run),
        score_table=score_table(run),
        certainties=[(r.number, s.certainty.replace("|", BAR)) for r in run.rounds for s in r.scores if s.certainty],
        versions=[f"{name} {value}" for name, value in run.environment.items() if name != "hardware"],
        wall_time=wall_time(run.seconds) if run.seconds else "",
    )


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
    text = f"{measured(run).capitalize()} on {run.teacher.quality.num_tokens:,} tokens of {run.teacher.evaluated_on}."
    explanation = f"{text} {EXPLANATION}" + (SPEED_EXPLANATION if run.teacher.speed else "")
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
    rows = [{"edit": edit.label} | {f"round {r.number}": _score_cell(r, edit) for r in run.rounds} for edit in ordered]
    return markdown_table(rows) if rows else ""


def _score_cell(record: RoundRecord, edit: Edit) -> str:
    scores = record.scores[0] if record.scores else None
    value = math.nan if scores is None else scores.values.get(edit, math.nan)
    if math.isnan(value):  # not possible in this round, or not a number
        return ""
    cell = f"**{value:.4f}**" if edit in record.edits[:1] else f"{value:.4f}"
    error = scores.standard_errors.get(edit, math.nan)
    cell = cell if math.isnan(error) else f"{cell} ± {error:.4f}"
    return f"{cell} (dropped at {scores.dropped[edit]:.0%})" if edit in scores.dropped else cell
