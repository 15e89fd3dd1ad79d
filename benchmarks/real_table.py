"""The table and the picture of a recipe from what `benchmarks/real_models.py` measured.

    python benchmarks/real_table.py recipes/smollm2-135m-instruct/results

Reads `measured/*.json`, named METHOD-DEPTH or METHOD-DEPTH-STATE; writes `table.md` and `comparison.png`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

NAMES = {
    "teacher": "teacher",
    "ours": "KL after repair (ours)",
    "ours_seed1": "KL after repair (ours), seed 1",
    "paper": "the paper's recipe (KL, neighbours)",
    "kl": "KL without repair",
    "block_influence": "block influence",
    "block_influence2": "block influence, rounds of two layers",
    "shortgpt": "block influence, one shot (ShortGPT)",
    "tail": "last layers",
    "lora": "KL, one shot, LoRA",
    "parallel": "layers in parallel",
    "merge": "merged layers",
    "on_policy": "KL after repair (ours), own answers last",
}
DRAWN = {  # in the picture; the table has all
    "paper": "tab:red",
    "block_influence": "tab:gray",
    "ours": "tab:blue",
    "merge": "tab:green",
    "parallel": "tab:orange",
}
STATES = {"unhealed": "never healed", "repaired": "repaired only", "": "healed"}
COLUMNS = ("layers", "method", "", "KL text", "KL chat", "ppl text", "ppl chat", "task mean", "kept")
Entry = dict[str, Any]


def read(folder: Path) -> list[Entry]:
    """What was measured, by depth from the teacher down, then by method and state."""
    found = []
    for path in folder.glob("*.json"):
        method, _, rest = path.stem.partition("-")
        found.append(
            json.loads(path.read_text(encoding="utf-8")) | {"method": method, "state": rest.partition("-")[2]}
        )
    order = (list(NAMES), list(STATES))
    return sorted(found, key=lambda e: (-depth(e), order[0].index(e["method"]), order[1].index(e["state"])))


def depth(entry: Entry) -> int:
    """What the name says: the blocks of a model with layers in parallel, the layers of any other."""
    return int(entry["label"].split("-")[1]) if "-" in entry["label"] else entry["num_layers"]


def row(entry: Entry, teacher: Entry) -> list[str]:
    state = "" if entry is teacher else STATES[entry["state"]]
    text, chat = entry["text"], entry["chat"]
    kls = [f"{kind['kl']:.3f} ± {kind['kl_se']:.3f}" if entry is not teacher else "" for kind in (text, chat)]
    mean = f"{100 * entry['task_mean']:.1f} ± {100 * entry['task_mean_se']:.1f}"
    kept = f"{100 * entry['task_mean'] / teacher['task_mean']:.1f} %"
    perplexities = [f"{kind['perplexity']:.1f}" for kind in (text, chat)]
    return [str(depth(entry)), NAMES[entry["method"]], state, *kls, *perplexities, mean, kept]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":---" if i else "---:" for i in range(len(header))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def generation(entries: list[Entry]) -> str:
    rows = []
    for entry in entries:
        if "answers" in entry:
            code, chat = entry["humaneval"], entry["answers"]
            state = "" if entry["method"] == "teacher" else STATES[entry["state"]]
            solved = f"{100 * code['pass@1']:.1f} ± {100 * code['se']:.1f} %"
            ends = [f"{100 * chat['ends']:.0f} %", f"{100 * chat['repetition']:.0f} %"]
            rows.append([str(depth(entry)), NAMES[entry["method"]], state, solved, *ends])
    return table(["layers", "method", "", "HumanEval", "answers that end", "repeated 4-grams"], rows)


def tasks(entries: list[Entry]) -> str:
    names = list(entries[0]["tasks"])
    rows = []
    for entry in entries:
        state = "" if entry["method"] == "teacher" else STATES[entry["state"]]
        values = [f"{100 * t['accuracy']:.1f} ± {100 * t['se']:.1f}" for t in entry["tasks"].values()]
        rows.append([str(depth(entry)), NAMES[entry["method"]], state, *values])
    return table(["layers", "method", "", *names], rows)


def draw(entries: list[Entry], teacher: Entry, path: Path) -> None:
    """KL on chat answers and task mean against depth, a line for each of `DRAWN`, healed; markers stand apart."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    healed = [entry for entry in entries if not entry["state"]]
    drawn = [method for method in DRAWN if any(entry["method"] == method for entry in healed)]
    for number, method in enumerate(drawn):
        points = [entry for entry in healed if entry["method"] == method]
        apart = 0.12 * (number - (len(drawn) - 1) / 2)
        look = {"color": DRAWN[method], "marker": "o", "ms": 5, "capsize": 3, "label": NAMES[method]}
        depths = [depth(point) + apart for point in points]
        left.errorbar(depths, *zip(*((p["chat"]["kl"], p["chat"]["kl_se"]) for p in points), strict=True), **look)
        means = [(100 * p["task_mean"], 100 * p["task_mean_se"]) for p in (teacher, *points)]
        right.errorbar([depth(teacher) + apart, *depths], *zip(*means, strict=True), **look)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    for axes, title in ((left, "KL from the teacher on its own answers, nats per token"), (right, "task mean, %")):
        axes.set(xlabel="layers, or blocks of layers in parallel", title=title)
        axes.set_xticks(sorted({depth(entry) for entry in entries if axes is right or entry is not teacher}))
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), ncols=max(1, len(drawn)), loc="outside lower center")
    figure.savefig(path, dpi=140)


def main() -> None:
    folder = Path(sys.argv[1])
    entries = read(folder / "measured")
    teacher = next(entry for entry in entries if entry["method"] == "teacher")
    parts = [
        table(list(COLUMNS), [row(entry, teacher) for entry in entries]),
        "Accuracy of each task, %:\n\n" + tasks(entries),
        "Generation, greedy:\n\n" + generation(entries),
    ]
    (folder / "table.md").write_text("\n".join(parts), encoding="utf-8")
    draw(entries, teacher, folder / "comparison.png")
    print(parts[0])


if __name__ == "__main__":
    main()
