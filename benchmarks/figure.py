"""The paper's figure on the embedded teacher: quality against removed layers, by criterion, repair and healing.

    python benchmarks/figure.py --output_dir runs/figure --results benchmarks/results

runs [`recipes/figure/figure.yaml`](../recipes/figure/README.md), or another one given with `--recipe`. The five curves
of [Iterative Layer-wise Distillation](https://huggingface.co/papers/2511.05085) are layers chosen by measurement and
healed, the same choice never healed, iterative block influence healed and not, and ShortGPT; measured is KL, and on
tasks as in the paper. The others are baselines, and ours with repair in closed form. Each curve is a run of
[`IterativeLayerDistillTrainer`] by `benchmarks/embedded.yaml`: all heal with the same number of tokens per removed
layer. A seed decides the calibration text and the order of the healing text. Finished runs of the same settings in the
output folder are used again, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from hf_layerprune import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, embedded_dataset
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.record import RunRecord, read_run
from hf_layerprune.report import save_plot

EMBEDDED = Path(__file__).parent / "embedded.yaml"
RECIPE = Path(__file__).parent.parent / "recipes" / "figure" / "figure.yaml"
STYLES = {"tail": ":", "random": ":", "angular": ":", "ShortGPT": ":", "least squares": "--"}


@dataclass(frozen=True)
class FigureRecipe:
    """What is drawn.

    Attributes:
        removed (`int`): layers every curve goes down to.
        stretches (`list[int]`): layers that go at once, for a criterion that chooses a contiguous stretch.
        seeds (`list[int]`): each is a run of every curve.
        curves (`dict[str, dict]`): name to the settings in which a curve differs from `embedded.yaml`.
    """

    removed: int
    stretches: list[int]
    seeds: list[int]
    curves: dict[str, dict[str, Any]]


def run(folder: Path, seed: int, removed: int, settings: dict[str, Any]) -> RunRecord:
    """One run of the recipe, with other settings."""
    if (folder / "model" / "config.json").is_file():
        return read_run(folder / "report.json")
    base = yaml.safe_load(EMBEDDED.read_text())
    base.pop("model")
    base |= {"output_dir": str(folder), "target_num_layers": 16 - removed, "seed": seed, "measure_speed": False}
    trainer = IterativeLayerDistillTrainer(
        model="embedded",
        args=IterativeLayerDistillConfig(**base | {"disable_tqdm": True} | settings),
        train_dataset=embedded_dataset("healing"),
        eval_dataset=embedded_dataset("held_out"),
        calibration_dataset=embedded_dataset("calibration").shuffle(seed=seed),
    )
    trainer.train(resume_from_checkpoint=(folder / "run_state.json").is_file() or None)
    return trainer.run


def folder_of(output_dir: Path, settings: dict[str, Any], seed: int) -> Path:
    """The folder of the runs with these settings; another recipe gives another folder."""
    everything = json.dumps([settings, EMBEDDED.read_text()], sort_keys=True)
    words = "-".join(str(value).lower() for value in settings.values()) or "recipe"
    return output_dir / f"{words}-{hashlib.sha256(everything.encode()).hexdigest()[:6]}-seed{seed}"


def losses(recipe: FigureRecipe, name: str, output_dir: Path, seed: int) -> dict[int, dict[str, Any]]:
    """Removed layers to what came of it: rise of the held-out loss (nats per token), perplexity, edits."""
    same_choice = recipe.curves[name].get("same_choice_as")
    settings = recipe.curves[same_choice or name]
    folder = folder_of(output_dir, settings, seed)
    if settings.get("criterion") != "angular_distance":
        runs = [run(folder, seed, recipe.removed, settings)]
    else:
        steps = yaml.safe_load(EMBEDDED.read_text())["max_steps"]
        runs = [
            run(
                folder / f"{count}-layers", seed, count,
                settings | {"layers_per_round": count, "max_steps": steps * count},
            )
            for count in recipe.stretches
        ]  # fmt: skip
    found = {}
    for one in runs:
        for record in one.rounds:
            quality = record.unhealed if same_choice else record.quality
            found[16 - record.depth] = {
                "rise": quality.loss - one.teacher.quality.loss,
                "perplexity": quality.perplexity,
                "kl": quality.kl,
                "edits": [edit.label for edit in record.edits],
                "tokens": record.healing.num_tokens if record.healing else 0,
            }
    return found


def rises(found: dict[str, dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Curve to removed layers to the rise of the held-out loss, of every seed."""
    return {
        name: {
            int(count): [points[count]["rise"] for points in seeds.values()] for count in next(iter(seeds.values()))
        }
        for name, seeds in found.items()
    }


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(curves: dict[str, dict[int, list[float]]]) -> Figure:
    """Healed curves next to unhealed ones, each with a scale of its own."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, healed in zip(figure.subplots(1, 2), (True, False), strict=True):
        for name, points in curves.items():
            if name.endswith("not healed") == healed:
                continue
            counts = sorted(points)
            kept = [[math.exp(-rise) for rise in points[count]] for count in counts]
            means, errors = zip(*map(spread, kept), strict=True)
            style = next((style for word, style in STYLES.items() if word in name), "-")
            axes.errorbar([0, *counts], [1, *means], [0, *errors], label=name, linestyle=style, capsize=2)
        axes.set_title("healed after every removal" if healed else "never healed")
        axes.set_xlabel("layers removed, of 16")
        axes.set_ylabel("quality kept: the teacher's perplexity / the student's")
        axes.set_ylim(0.7 if healed else 0.5, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    return figure


def markdown(curves: dict[str, dict[int, list[float]]], teacher: dict[str, Any], seeds: int) -> str:
    counts = range(1, max(max(points) for points in curves.values()) + 1)
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
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="YAML file of the curves.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Other seeds than the recipe's.")
    arguments = parser.parse_args()
    recipe = FigureRecipe(**yaml.safe_load(arguments.recipe.read_text()))
    seeds = arguments.seeds or recipe.seeds
    found: dict[str, dict[str, Any]] = {name: {} for name in recipe.curves}
    for seed in seeds:
        for name in recipe.curves:
            found[name][str(seed)] = losses(recipe, name, arguments.output_dir, seed)
            print(
                seed,
                name,
                {count: round(point["rise"], 4) for count, point in found[name][str(seed)].items()},
                flush=True,
            )
    first = folder_of(arguments.output_dir, next(iter(recipe.curves.values())), seeds[0])
    teacher = asdict(read_run(first / "report.json").teacher.quality)
    curves = rises(found)
    arguments.results.mkdir(parents=True, exist_ok=True)
    content = {"teacher": teacher, "curves": found, "settings": recipe.curves, "environment": environment()}
    write_atomically(arguments.results / "figure.json", to_json(content))
    write_atomically(arguments.results / "figure.md", markdown(curves, teacher, len(seeds)))
    save_plot(plot(curves), arguments.results / "figure.png")


if __name__ == "__main__":
    main()
