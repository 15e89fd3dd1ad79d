"""Fill the tables of docs/gpu.md and docs/parallel.md with what `benchmarks/gpu.py` measured.

    python benchmarks/gpu.py --suite quick --output benchmarks/results/gpu
    python benchmarks/gpu_tables.py                    # or another folder of results

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Cells that nothing has measured say what to run. Next
to what is measured stands what was predicted: decoding by `predictions.py`, healing by `healing.py --count`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
import predictions  # noqa: E402

from hf_layerprune.benchmark import load_shape  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EMPTY = "run `benchmarks/gpu.py`"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEALING_GOALS = {"time": 0.5, "peak memory": 0.35}
PEAKS = ("memory, ours", "memory, paper")
Records = dict[str, dict[str, Any]]


def result(records: Records, section: str, case: str) -> dict[str, Any]:
    """What a case found; nothing if it has not been run or has failed."""
    return records.get(section, {}).get("cases", {}).get(case, {}).get("result", {})


def row_of(records: Records, section: str, case: str, *cells: str) -> list[str]:
    """A row of a case; if it has failed, its empty cells say so."""
    error = records.get(section, {}).get("cases", {}).get(case, {}).get("error", "")
    empty = EMPTY if not error else "out of time" if error.startswith("stopped after") else "failed"
    return [case, *(empty if cell == EMPTY else cell for cell in cells)]


def cases(records: Records, section: str) -> list[str]:
    return list(records.get(section, {}).get("cases", {}))


def shown(value: float | None, form: str = "{:.2f}") -> str:
    return EMPTY if value is None else form.format(value)


def markdown(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table; the columns after the first are numbers."""
    columns = head.split("|")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines) + "\n"


def hardware(records: Records) -> str:
    """On what, and with which versions, each section was measured."""
    names = ("hardware", "torch", "triton", "transformers", "trl", "accelerate", "peft")
    about: dict[str, list[str]] = {}
    for section, record in records.items():
        found = record["environment"]
        versions = ", ".join(f"{name} {found[name]}" for name in names[1:] if found.get(name))
        about.setdefault(f"{found['hardware']}; {versions}; suite {record['suite']}", []).append(section)
    lines = [f"{', '.join(sections)}: {text}." for text, sections in about.items()]
    return "\n".join(lines or [f"Nothing yet: {EMPTY}."]) + "\n"


def correctness(records: Records) -> str:
    rows = []
    for case in cases(records, "correctness"):
        found = result(records, "correctness", case)
        parts = {"": found} if "ok" in found else found
        for dtype, part in parts.items():
            numbers = [f"{part[key]:.1e}" if key in part else "" for key in ("difference", "allowed")]
            rows.append([case, dtype, *numbers, "yes" if part["ok"] else "**no**"])
        if not parts:
            rows.append([case, "", "", "", "**failed**"])
    return markdown("|dtype|difference|allowed|ok", rows or [["all cases", "", EMPTY, "", ""]])


def goals(records: Records, counts: Records) -> str:
    """What was aimed at, predicted and found."""
    rows, decode = [], records.get("decode", {})
    for shape, variant, mode, least in predictions.GOALS:
        found = predictions.measured_ratio(decode, shape, variant, 1, mode)
        expected = predictions.predicted_ratio(shape, variant, 1, mode)
        name = f"{shape}, {variant}, {mode}, over all layers in sequence"
        rows.append([name, f">= {least:.2f}x", f"{expected:.2f}x", shown(found, "{:.2f}x")])
    for shape in predictions.SHAPES:
        plans = predictions.variants(load_shape(shape))
        removal, depth = list(plans)[1], plans["as it is"].depth
        proportional = depth / plans[removal].depth
        for mode in ("eager", "graphs"):
            expected = predictions.predicted_ratio(shape, removal, 1, mode) / proportional
            found = predictions.measured_ratio(decode, shape, removal, 1, mode)
            measured = shown(None if found is None else found / proportional)
            name = f"{shape}, {removal} of {depth}, {mode}, over proportional"
            rows.append([name, "0.95 to 1.05", f"{expected:.2f}", measured])
    time, ours, paper = (result(records, "healing_step", name) for name in ("time", *PEAKS))
    measured = {
        "time": time.get("ours", {}).get("over_paper"),
        "peak memory": ours["peak_bytes"] / paper["peak_bytes"] if ours and paper else None,
    }
    for name, key in (("time", "operations"), ("peak memory", "peak_bytes")):
        expected = counts["ours"][key] / counts["paper"][key]
        goal = f"<= {HEALING_GOALS[name]:.2f}"
        rows.append([f"healing step, {name}, over the paper's", goal, f"{expected:.2f}", shown(measured[name])])
    return markdown("at batch 1|goal|predicted|measured", rows)


def card(records: Records) -> str:
    found, assumed = result(records, "decode", "card"), predictions.H200
    rows = [
        ["bytes/s of a copy", f"{assumed.bandwidth / 1e12:.2f}e12", "copy_bytes_per_second", 1e12, "{:.2f}e12"],
        ["bfloat16 operations/s of a product", "", "bf16_operations_per_second", 1e12, "{:.0f}e12"],
        ["microseconds of a small kernel in a graph", f"{assumed.gap * 1e6:.2f}", "seconds_per_small_kernel", 1e-6,
         "{:.2f}"],
    ]  # fmt: skip
    return markdown(
        "|assumed|measured",
        (
            [name, guess, shown(found[key] / unit if key in found else None, form)]
            for name, guess, key, unit, form in rows
        ),
    )


def bandwidth(records: Records) -> str:
    """Bytes/s of the models as they are, and what of the copy bandwidth that is."""
    rows = []
    for shape in predictions.SHAPES:
        for batch in predictions.BATCHES:
            found = [result(records, "decode", f"{shape}, batch {batch}, {mode}") for mode in predictions.MODES]
            entries = [part.get("as it is", {}) for part in found]
            rows.append([shape, str(batch)] + [
                f"{entry['bytes_per_second'] / 1e12:.2f}e12, {entry['share_of_copy_bandwidth']:.0%}"
                if "bytes_per_second" in entry else EMPTY for entry in entries
            ])  # fmt: skip
    return markdown("|batch|eager|CUDA graphs|compiled", rows)


def per_kernel(records: Records) -> str:
    """What a kernel takes, over all variants of a shape: the time of a step without the reading of its bytes, which a
    CUDA graph waits for, over the kernels that were counted."""
    rows = []
    copied = result(records, "decode", "card").get("copy_bytes_per_second", math.nan)
    for shape, batch in product(predictions.SHAPES, predictions.BATCHES):
        plans, cells = predictions.variants(load_shape(shape)), []
        outside, of_width = predictions.counted_kernels(shape)
        for mode in ("eager", "graphs"):
            taken = []
            for name, entry in result(records, "decode", f"{shape}, batch {batch}, {mode}").items():
                reading = predictions.step_bytes(shape, plans[name], batch) / copied if mode == "graphs" else 0
                kernels = outside + sum(of_width[len(block)] for block in plans[name].blocks)
                taken.append((entry["seconds_per_step"] - reading) / kernels * 1e6)
            cells.append(f"{min(taken):.1f} to {max(taken):.1f}" if taken else EMPTY)
        rows.append([shape, str(batch), *cells])
    return markdown("microseconds|batch|eager|CUDA graphs", rows)


def healing_step(records: Records, counts: Records) -> str:
    names = dict.fromkeys(name.removeprefix("memory, ") for name in cases(records, "healing_step") if "memory" in name)
    times, paper = result(records, "healing_step", "time"), result(records, "healing_step", PEAKS[1])
    rows = []
    for name in names or ("paper", "full logits", "ours"):
        time, peak = times.get(name, {}), result(records, "healing_step", f"memory, {name}").get("peak_bytes")
        expected = ["", ""]
        if name in counts:
            expected = [f"{counts[name][key] / counts['paper'][key]:.2f}" for key in ("operations", "peak_bytes")]
        rows.append([
            name, shown(time.get("seconds") and 1000 * time["seconds"], "{:.0f}"), expected[0],
            shown(time.get("over_paper")), shown(time.get("tokens_per_second"), "{:,.0f}"),
            shown(time.get("share_of_matrix_rate"), "{:.0%}"), shown(peak and peak / 2**30, "{:.1f}"), expected[1],
            shown(peak / paper["peak_bytes"] if peak and paper else None),
        ])  # fmt: skip
    time_columns = "ms|operations, over the paper's|time, over the paper's|tokens/s|share of the matrix rate"
    return markdown(f"|{time_columns}|peak GiB|counted, over the paper's|measured, over the paper's", rows)


def fused(records: Records) -> str:
    rows = []
    for case in ("layers compiled", "layers of Liger"):
        found = result(records, "healing_step", case)
        ratios = []
        for key in ("seconds", "peak_bytes"):
            values = found.get(key, {})
            ratios.append(shown(values["changed"] / values["as they are"] if values else None))
        rows.append([case, *ratios, shown(found.get("gradient_difference"), "{:.1e}")])
    return markdown("over ours as it is|time|peak memory|difference of the gradients", rows)


def scoring(records: Records) -> str:
    rows = []
    for case in cases(records, "scoring_cost") or ["embedded teacher", "Qwen2.5-3B"]:
        found = result(records, "scoring_cost", case)
        over = found.get("over_naive", {})
        same = {True: "yes", False: "no", None: EMPTY}[found.get("race_chose_the_same")]
        ratios = (found.get("over_naive_by_counting"), over.get("shared prefix"), over.get("race"))
        rows.append(row_of(records, "scoring_cost", case, *map(shown, ratios), same))
    return markdown("over the naive loop|by counting|shared prefix|race|race chose the same", rows)


def memory(records: Records) -> str:
    rows = []
    ways = ["neighbours", "neighbours, float32 weights, checkpointing", "all", "neighbours, LoRA"]
    for case in cases(records, "memory") or ways:
        found = result(records, "memory", case)
        sizes = [found.get(key) and found[key] / 2**30 for key in ("estimated_bytes", "measured_bytes")]
        cells = [shown(size, "{:.2f}") for size in sizes]
        rows.append(row_of(records, "memory", case, *cells, shown(found.get("estimated_over_measured"))))
    return markdown("Qwen2.5-1.5B, 4 x 1024 tokens|estimated, GiB|measured, GiB|estimated over measured", rows)


def engines(records: Records) -> str:
    rows = []
    for case in cases(records, "engines") or ["plain", "ddp.yaml", "fsdp2.yaml"]:
        found = result(records, "engines", case)
        apart = "" if case == "plain" else shown(found.get("kl_difference"), "{:.1e}")
        cells = [shown(found.get("seconds"), "{:.0f}"), shown(found.get("kl"), "{:.4f}")]
        rows.append(row_of(records, "engines", case, *cells, apart))
    return markdown("one process|seconds, imports included|KL|relative difference to plain", rows)


def tables(records: Records, counts: Records) -> dict[str, str]:
    """Every table by its name."""
    decode = records.get("decode")
    return {
        "hardware": hardware(records),
        "correctness": correctness(records),
        "goals": goals(records, counts),
        "card": card(records),
        "pairs": predictions.table(decode),
        "removal_and_groups": predictions.table(decode, (1, 4)),
        "bandwidth": bandwidth(records),
        "per_kernel": per_kernel(records),
        "healing_step": healing_step(records, counts),
        "fused": fused(records),
        "scoring": scoring(records),
        "memory": memory(records),
        "engines": engines(records),
    }


def read(folder: Path) -> Records:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def filled(page: str, found: dict[str, str]) -> str:
    """A page with its tables written anew."""
    return TABLE.sub(lambda match: match[1] + found[match[2]] + match[3], page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "gpu", help="folder of benchmarks/gpu.py")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    arguments = parser.parse_args(argv)
    records = read(arguments.results)
    if arguments.docs == ROOT / "docs" and any(record["tiny"] for record in records.values()):
        parser.error(f"{arguments.results} has results of --tiny, which prove the script alone; give another --docs")
    found = tables(records, json.loads((RESULTS / "healing_counts.json").read_text(encoding="utf-8")))
    for path in sorted(arguments.docs.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := filled(page, found)) != page:
            path.write_text(new, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
