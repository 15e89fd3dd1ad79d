"""What removing layers and running them in parallel buy: ways to make the embedded teacher shallower.

    python benchmarks/edits.py --output_dir runs/edits --results benchmarks/results

Each way is a whole run of `hf-layerprune compress` (a finished one in the output folder is used again): every round
makes the best edit of the kinds it may make and heals the blocks it touched, the same way for all; one more run heals
all weights after each removal, as `benchmarks/embedded.yaml` does. Then all different students are timed side by side,
in turns, and put into tables: at equal depth, at equal measured time per token, at equal number of parameters.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from hf_layerprune import LayerPlan, cli
from hf_layerprune.benchmark import benchmark_models
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.loading import load_model
from hf_layerprune.record import ModelRecord, RoundRecord, RunRecord, read_run
from hf_layerprune.report import save_plot
from hf_layerprune.surgery import apply_plan

TOUCHED = {"trained_layers": "neighbours", "learning_rate": 1e-3}  # heals the blocks an edit touches
STRATEGIES = {
    "removal": {"target_num_layers": 8, **TOUCHED},
    "removal, all weights healed": {"target_num_layers": 8},
    "pairs": {"edits": "parallelize", "target_num_layers": 9, **TOUCHED},
    "groups of up to 4": {"edits": "parallelize", "max_group_size": 4, "target_num_layers": 6, **TOUCHED},
    "mixed, by latency": {"edits": "remove,parallelize", "max_group_size": 4, "target_latency": 0.6, **TOUCHED},
}
LOOKS = (  # color, size of a point, line healed and never healed; dashed where another way may lie below
    ("#c44e52", 4, "-", ":"),
    ("#dd8452", 4, "-", (0, (1, 5))),
    ("#1f6f8b", 7, "-", ":"),
    ("#55a868", 5, (0, (6, 12)), (0, (1, 5))),
    ("#8172b2", 3, (9, (6, 12)), (3, (1, 5))),
)
DEPTHS = (14, 12, 10, 9, 8, 7, 6)
LATENCIES = (0.9, 0.8, 0.7, 0.6)
PARAMETERS = (0.95, 0.85, 0.75, 0.65)


HEAD = """Made by `python benchmarks/edits.py --output_dir runs/edits --results benchmarks/results`; all numbers and
the settings of every run in edits.json.

Cells: held-out perplexity of the same plan never healed / **healed** / KL of the healed student to the teacher in nats
per token. "Equal" time and parameters: the first student of each way that is within the limit; blank where none is."""


def folder_of(name: str, parent: Path) -> Path:
    return parent / name.replace(",", "").replace(" ", "-")


def run(name: str, parent: Path) -> RunRecord:
    """One way, from disk if it is finished."""
    folder = folder_of(name, parent)
    if not (folder / "model").is_dir():
        arguments = ["compress", "--config", str(Path(__file__).parent / "embedded.yaml"), "--measure_speed", "false"]
        settings = [str(part) for key, value in STRATEGIES[name].items() for part in (f"--{key}", value)]
        resume = ["--resume"] if (folder / "run_state.json").is_file() else []
        if status := cli.main([*arguments, "--output_dir", str(folder), *settings, *resume]):
            raise SystemExit(status)
    record = read_run(folder / "report.json")
    for key, value in STRATEGIES[name].items():
        wanted = value.split(",") if key == "edits" else value
        if not key.startswith("target") and record.settings[key] != wanted:
            raise SystemExit(f"{folder} holds a run with {key}={record.settings[key]!r}; move it away")
    return record


def row(record: ModelRecord) -> dict[str, Any]:
    """What the tables and plots show of a round, or of the teacher."""
    found = {"num_layers": record.depth, "num_parameters": record.num_parameters, "plan": record.plan.to_dict()}
    found |= asdict(record.quality)
    if isinstance(record, RoundRecord):
        found |= {f"{key}_unhealed": getattr(record.unhealed, key) for key in ("loss", "perplexity", "kl")}
        found["edits"] = [edit.label for edit in record.edits]
    return found


def time_all(rounds: dict[str, list[dict[str, Any]]], repeats: int) -> None:
    """Add each student's time per token, as a share of the teacher's, to its record; equal plans are timed once."""
    teacher = load_model("embedded", dtype=torch.float32).eval()
    records = [record for of_one in rounds.values() for record in of_one]
    plans = list(dict.fromkeys(LayerPlan.from_dict(record["plan"]) for record in records))
    students = [apply_plan(teacher, plan, share_weights=True) for plan in plans]
    reports = dict(zip(plans, benchmark_models([teacher, *students], repeats=repeats)[1:], strict=True))
    for record in records:
        report = reports[LayerPlan.from_dict(record["plan"])]
        record["latency"] = 1 / report.decode_ratio
        record["prefill"] = 1 / report.prefill_ratio


def first_within(records: list[dict[str, Any]], key: str, limit: float) -> dict[str, Any] | None:
    return next((record for record in records if record[key] <= limit), None)


def tables(rounds: dict[str, list[dict[str, Any]]], teacher: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = ["# Removing layers and running them in parallel, on the embedded teacher", "", HEAD, ""]
    size = teacher["num_parameters"]
    for title, key, limits, show in (
        ("equal depth", "num_layers", DEPTHS, lambda limit: f"{limit} layers"),
        ("equal time per token", "latency", LATENCIES, lambda limit: f"at most {limit:.2f} of the teacher's"),
        ("equal parameters", "num_parameters", [p * size for p in PARAMETERS], lambda p: f"at most {p / 1e6:.2f}M"),
    ):
        lines += [f"## At {title}", "", f"| {title.removeprefix('equal ')} | " + " | ".join(rounds) + " |"]
        lines += ["|---:|" + "---:|" * len(rounds)]
        for limit in limits:
            cells = [cell(first_within(of_one, key, limit), key, limit, teacher) for of_one in rounds.values()]
            lines.append(f"| {show(limit)} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Every round", ""]
    for name, of_one in rounds.items():
        lines += [
            f"### {name}",
            "",
            "| layers | edit | parameters | time per token | never healed: loss, KL | healed |",
        ]
        lines += ["|---:|---|---:|---:|---:|---:|"]
        for r in of_one:
            edit = ", ".join(r["edits"]).replace("|", "&#124;")
            lines.append(
                f"| {r['num_layers']} | {edit} | {r['num_parameters'] / 1e6:.2f}M | {r['latency']:.2f} | "
                f"{r['loss_unhealed'] - teacher['loss']:+.4f}, {r['kl_unhealed']:.4f} | "
                f"{r['loss'] - teacher['loss']:+.4f}, {r['kl']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def cell(record: dict[str, Any] | None, key: str, limit: float, teacher: dict[str, Any]) -> str:
    if record is None or (key == "num_layers" and record[key] != limit):
        return ""
    healed, never = record["perplexity"], record["perplexity_unhealed"]
    return f"{never:.2f} / **{healed:.2f}** / {record['kl']:.3f}"


def plot(rounds: dict[str, list[dict[str, Any]]], teacher: dict[str, Any]) -> Figure:
    """Loss against depth, time and parameters; dotted: never healed."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (key, label) in zip(
        axes, (("num_layers", "layers"), ("latency", "time per token / teacher's"), ("num_parameters", "parameters")),
        strict=True,
    ):  # fmt: skip
        start = {"num_layers": teacher["num_layers"], "latency": 1.0, "num_parameters": teacher["num_parameters"]}[key]
        for (name, of_one), (color, size, *lines) in zip(rounds.items(), LOOKS, strict=True):
            where = [start, *(record[key] for record in of_one)]
            for field, marker, line in zip(("loss", "loss_unhealed"), "ov", lines, strict=True):
                losses = [0.0, *(record[field] - teacher["loss"] for record in of_one)]
                label_of = name if field == "loss" else None
                axis.plot(where, losses, marker, ls=line, color=color, label=label_of, markersize=size)
        axis.set_xlabel(label)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss above the teacher's\n(nats per token; dotted: never healed)")
    axes[0].set_ylim(-0.01, 0.45)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LOOKS))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/edits"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    runs = {name: run(name, arguments.output_dir) for name in STRATEGIES}
    rounds = {name: [row(record) for record in one.rounds] for name, one in runs.items()}
    teacher = row(runs["removal"].teacher)
    time_all(rounds, arguments.repeats)
    kept = ("num_layers", "edits", "num_parameters", "latency", "prefill", "loss_unhealed", "perplexity_unhealed",
            "kl_unhealed", "loss", "perplexity", "kl", "agreement", "plan")  # fmt: skip
    content = {
        "teacher": teacher,
        "environment": environment(),
        "settings": STRATEGIES,
        "rounds": {name: [{key: r[key] for key in kept} for r in of_one] for name, of_one in rounds.items()},
    }
    write_atomically(arguments.results / "edits.json", to_json(content))
    write_atomically(arguments.results / "edits.md", tables(rounds, teacher))
    save_plot(plot(rounds, teacher), arguments.results / "edits.png")
    print(tables(rounds, teacher))


if __name__ == "__main__":
    main()
