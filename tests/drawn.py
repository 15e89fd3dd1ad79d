"""Importing this draws the plots of a run once for every kind of run: they take longer than tiny rounds."""

from pathlib import Path

from hf_layerprune import report
from hf_layerprune.record import RunRecord

FILES = ("quality.png", "layers.png")
draw, drawn = report.save_run_plots, {}


def save_run_plots(folder: Path, run: RunRecord) -> None:
    kind = (len(run.rounds), run.is_healed, *sorted({edit.kind for edit in run.edits}))
    if kind not in drawn:
        draw(folder, run)
        drawn[kind] = {name: (folder / name).read_bytes() for name in FILES}
    for name, content in drawn[kind].items():
        (folder / name).write_bytes(content)


report.save_run_plots = save_run_plots
