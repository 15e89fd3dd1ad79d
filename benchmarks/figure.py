"""The paper's figure on the embedded teacher: quality against removed layers, by criterion, repair and healing.

    python benchmarks/figure.py --output_dir runs/figure --results benchmarks/results

The five curves of [Iterative Layer-wise Distillation](https://huggingface.co/papers/2511.05085) are layers chosen by
measurement and healed, the same choice never healed, iterative block influence healed and not, and ShortGPT; measured
is KL, and on tasks as in the paper. The others are baselines, and ours with repair in closed form. Each curve is a run
of [`IterativeLayerDistillTrainer`] by the package's recipe: all heal with the same number of tokens per removed layer.
A seed decides the calibration text and the order of the healing text. Finished runs of the same settings in the output
folder are used again, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from hf_layerprune import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, embedded_dataset
from hf_layerprune.data import ASSETS
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.report import environment, save_plot

REMOVED = 8
STRETCHES = (2, 4, 6, 8)  # removed at once, each by a run of its own
UNHEALED = {"heal": False}
REPAIRED = {"compensation": "least_squares", "num_calibration_samples": 64}  # fits weights: wants more text
SAME_CHOICE = "KL, same choice, not healed"  # of the run "KL, healed"
CURVES: dict[str, dict[str, Any]] = {
    "KL, healed": {},
    SAME_CHOICE: {},
    "KL, not healed": UNHEALED,
    "block influence, healed": {"criterion": "block_influence"},
    "block influence, not healed": {"criterion": "block_influence"} | UNHEALED,
    "ShortGPT (one shot), not healed": {"criterion": "block_influence", "one_shot": True} | UNHEALED,
    "tail, healed": {"criterion": "tail"},
    "random, healed": {"criterion": "random"},
    "angular distance (one stretch), healed": {"criterion": "angular_distance"},
    "KL, least squares, not healed": REPAIRED | UNHEALED,
    "KL, least squares, healed": REPAIRED,
    "tasks, healed": {"criterion": "tasks", "tasks": "default"},
}
COLOURS = [*(f"C{n}" for n in range(10)), "black", "gold"]
STYLES = {"not healed": "--", "healed": "-"}


def run(folder: Path, seed: int, removed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of one run of the recipe, with other settings."""
    if (folder / "model" / "config.json").is_file():
        return json.loads((folder / "report.json").read_text())
    recipe = yaml.safe_load((ASSETS / "recipe.yaml").read_text())
    recipe.pop("model")
    recipe |= {"output_dir": str(folder), "target_num_layers": 16 - removed, "seed": seed, "measure_speed": False}
    trainer = IterativeLayerDistillTrainer(
        model="embedded",
        args=IterativeLayerDistillConfig(**recipe | {"disable_tqdm": True} | settings),
        train_dataset=embedded_dataset("healing"),
        eval_dataset=embedded_dataset("held_out"),
        calibration_dataset=embedded_dataset("calibration").shuffle(seed=seed),
    )
    trainer.train(resume_from_checkpoint=(folder / "run_state.json").is_file() or None)
    return json.loads((folder / "report.json").read_text())


def folder_of(output_dir: Path, settings: dict[str, Any], seed: int) -> Path:
    """Of the runs with these settings; another recipe gives another folder."""
    everything = json.dumps([settings, (ASSETS / "recipe.yaml").read_text()], sort_keys=True)
    words = "-".join(str(value).lower() for value in settings.values()) or "recipe"
    return output_dir / f"{words}-{hashlib.sha256(everything.encode()).hexdigest()[:6]}-seed{seed}"


def losses(name: str, folder: Path, seed: int) -> dict[int, dict[str, Any]]:
    """Removed layers to what came of it: rise of the held-out loss (nats per token), perplexity, edits."""
    settings = CURVES[name]
    if settings.get("criterion") != "angular_distance":
        reports = {None: run(folder, seed, REMOVED, settings)}
    else:
        steps = yaml.safe_load((ASSETS / "recipe.yaml").read_text())["max_steps"]
        reports = {
            count: run(
                folder / f"{count}-layers", seed, count,
                settings | {"layers_per_round": count, "max_steps": steps * count},
            )
            for count in STRETCHES
        }  # fmt: skip
    found, end = {}, "_unhealed" if name == SAME_CHOICE else ""
    for report in reports.values():
        for record in report["rounds"]:
            found[16 - record["num_layers"]] = {
                "rise": record["loss" + end] - report["teacher"]["loss"],
                "perplexity": record["perplexity" + end],
                "kl": record["kl" + end],
                "edits": record["edits"],
                "tokens": record.get("train_tokens", 0),
            }
    return found


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(curves: dict[str, dict[int, list[float]]]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        counts = sorted(points)
        means, errors = zip(*(spread([math.exp(-rise) for rise in points[count]]) for count in counts), strict=True)
        style = STYLES["not healed" if name.endswith("not healed") else "healed"]
        axes.errorbar(
            [0, *counts], [1, *means], [0, *errors], label=name, color=COLOURS[number], linestyle=style, capsize=2
        )
    axes.set_xlabel("layers removed, of 16")
    axes.set_ylabel("quality kept: the teacher's perplexity / the student's")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
    return figure


def markdown(curves: dict[str, dict[int, list[float]]], teacher: dict[str, Any], seeds: int) -> str:
    counts = range(1, REMOVED + 1)
    lines = [
        "# Quality against removed layers, on the embedded teacher",
        "",
        "Made by `python benchmarks/figure.py --output_dir runs/figure --results benchmarks/results`; all numbers are",
        "in figure.json.",
        "",
        f"Rise of the held-out loss over the teacher's {teacher['loss']:.4f} nats per token (perplexity "
        f"{teacher['perplexity']:.2f}): mean over {seeds} seeds ± standard deviation.",
        "",
        "| removed | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for name, points in curves.items():
        cells = []
        for count in counts:
            mean, deviation = spread(points[count]) if count in points else (math.nan, 0.0)
            cells.append("" if math.isnan(mean) else f"{mean:.3f} ± {deviation:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![quality against removed layers](figure.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the runs.")
    parser.add_argument("--results", type=Path, required=True, help="Folder for figure.json, .md and .png.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {name: {} for name in CURVES}
    for seed in arguments.seeds:
        for name in CURVES:
            found[name][str(seed)] = losses(name, folder_of(arguments.output_dir, CURVES[name], seed), seed)
            print(
                seed,
                name,
                {count: round(point["rise"], 4) for count, point in found[name][str(seed)].items()},
                flush=True,
            )
    first = folder_of(arguments.output_dir, {}, arguments.seeds[0])
    teacher = json.loads((first / "report.json").read_text())["teacher"]
    curves = {
        name: {
            count: [points[count]["rise"] for points in by_seed.values()] for count in next(iter(by_seed.values()))
        }
        for name, by_seed in found.items()
    }  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    content = {"teacher": teacher, "curves": found, "settings": CURVES, "environment": environment()}
    write_atomically(arguments.results / "figure.json", to_json(content))
    write_atomically(arguments.results / "figure.md", markdown(curves, teacher, len(arguments.seeds)))
    save_plot(plot(curves), arguments.results / "figure.png")


if __name__ == "__main__":
    main()
