"""Importing this draws the plots of a run once for every plan: they take longer than a round of a tiny model."""

from pathlib import Path

from hf_layerprune import report
from hf_layerprune.plan import LayerPlan
from hf_layerprune.record import RunRecord

FILES = ("quality.png", "layers.png")
draw = report.save_run_plots
drawn: dict[tuple[LayerPlan, ...], dict[str, bytes]] = {}


def save_run_plots(folder: Path, run: RunRecord) -> None:
    plans = tuple(record.plan for record in run.rounds)
    if plans not in drawn:
        draw(folder, run)
        drawn[plans] = {name: (folder / name).read_bytes() for name in FILES}
    for name, content in drawn[plans].items():
        (folder / name).write_bytes(content)


report.save_run_plots = save_run_plots
