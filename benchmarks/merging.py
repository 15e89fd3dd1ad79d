"""Layers removed, removed with the gaps repaired, and merged, without any training: KL on two kinds of text.

    python benchmarks/merging.py --model MODEL --data runs/smollm2-135m-instruct/data --depths 24 20 \
        --output benchmarks/results/merging.json

`--data` is the folder that recipes/data/mix.py wrote. The merges of all neighbours are scored once, by KL on rows that
they were not fitted to; for each depth the cheapest pairs without a common layer are merged. Two students of the same
depth stand next to each: the second layers of these pairs removed, and removed with their gaps repaired; with
`--removed`, other layers removed, too. Repairs and merges are fitted to the same rows of `healing.jsonl`. `--save`
keeps the merged students.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_models import LENGTH, a_device, rows_of_text, text_quality
from repair import numbers
from transformers import PreTrainedModel

from hf_layerprune import Edit, compensate, load_model, load_tokenizer, merge, prune, tokenized_batches
from hf_layerprune.data import load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.scoring import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", required=True)
    parser.add_argument("--removed", type=numbers, nargs="+", default=[], help="layers to remove, such as 15,17 5,6,7")
    parser.add_argument("--rows", type=int, default=64, help="rows of 256 tokens to fit to")
    parser.add_argument("--score_rows", type=int, default=16, help="rows of 256 tokens to score the merges on")
    parser.add_argument("--save", type=Path, help="folder for the merged students, one for each depth")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, "float32").to(a_device()).eval(), load_tokenizer(args.model)

    def rows_of(name: str, count: int) -> list:
        return tokenized_batches(
            load_text_dataset(str(args.data / name)), tokenizer, max_length=LENGTH, num_rows=count
        )

    fitted = rows_of("healing.jsonl", args.rows)
    held_out = {kind: rows_of_text(args.data / f"held_out_{kind}.jsonl", tokenizer) for kind in ("text", "chat")}
    merges = [Edit.merge(first, first + 1) for first in range(model.config.num_hidden_layers - 1)]
    start = time.perf_counter()
    scores = score(model, rows_of("healing.jsonl", args.score_rows), merges)
    seconds_scoring = time.perf_counter() - start
    costs = {" ".join(map(str, edit.layers)): value for edit, value in scores.values.items()}
    print(f"merges scored in {seconds_scoring:.0f} s: {costs}", flush=True)
    results: list[dict[str, Any]] = []
    content = {"model": Path(args.model).name, "rows": args.rows, "score_rows": args.score_rows, "costs": costs}
    content |= {"seconds_scoring": seconds_scoring, "environment": environment(), "results": results}

    def measure(way: str, layers: list[Any], make: Callable[[], PreTrainedModel]) -> None:
        start = time.perf_counter()
        student = make()
        found = {"way": way, "depth": student.config.num_hidden_layers, "layers": layers}
        found["seconds"] = time.perf_counter() - start
        for kind, rows in held_out.items():
            quality = text_quality(student, model, rows)
            found |= {f"kl_{kind}": quality["kl"], f"kl_{kind}_se": quality["kl_se"]}
        results.append(found)
        print(found, flush=True)
        write_atomically(args.output, to_json(content))  # what is measured stays if the rest takes too long
        if args.save and way == "merged":
            student.save_pretrained(args.save / str(found["depth"]))
            tokenizer.save_pretrained(args.save / str(found["depth"]))

    def measure_removed(layers: list[int]) -> None:
        measure("removed", layers, lambda: prune(model, layers))
        measure(
            "removed and repaired", layers, lambda: compensate(prune(model, layers), fitted, "least_squares", model)
        )

    for depth in args.depths:
        pairs: list[tuple[int, ...]] = []
        for edit in scores.ranking:
            if len(pairs) < model.config.num_hidden_layers - depth and not set(edit.layers) & set(sum(pairs, ())):
                pairs.append(edit.layers)
        measure("merged", pairs, lambda pairs=pairs: merge(model, pairs, fitted))
        measure_removed([second for _, second in pairs])
    for layers in args.removed:
        measure_removed(layers)


if __name__ == "__main__":
    main()
