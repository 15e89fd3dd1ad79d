"""How much text a least-squares repair needs: KL to the teacher against the number of rows.

    python benchmarks/repair.py --teacher TEACHER --removed 11,12 --rows 16,64,160 \
        --repair_on DIR/healing.jsonl --held_out DIR --output_file FILE.json

Removes the layers from the teacher, repairs every gap on the first rows of the text, 256 tokens each, and measures KL
on modern text and on the teacher's own answers, as `benchmarks/real_models.py` does.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from real_models import LENGTH, rows_of_text, text_quality

from hf_layerprune import load_model, load_tokenizer, prune, tokenized_batches
from hf_layerprune.compensation import compensate
from hf_layerprune.data import load_text_dataset


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--removed", type=numbers, required=True, help="teacher layers, such as 11,12")
    parser.add_argument("--rows", type=numbers, required=True, help="numbers of rows, such as 16,64,160")
    parser.add_argument("--repair_on", required=True)
    parser.add_argument("--held_out", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    teacher, tokenizer = load_model(args.teacher, "float32").eval(), load_tokenizer(args.teacher)
    batches = tokenized_batches(
        load_text_dataset(args.repair_on), tokenizer, max_length=LENGTH, num_rows=max(args.rows), batch_size=1
    )
    pruned = prune(teacher, args.removed).eval()
    results = []
    for rows in [0, *args.rows]:
        start = time.perf_counter()
        student = compensate(pruned, batches[:rows], "least_squares", teacher, share_weights=True) if rows else pruned
        found = {"rows": rows, "tokens": rows * LENGTH, "seconds": round(time.perf_counter() - start, 1)}
        for kind in ("text", "chat"):
            quality = text_quality(student, teacher, rows_of_text(args.held_out / f"held_out_{kind}.jsonl", tokenizer))
            found |= {f"kl_{kind}": quality["kl"], f"kl_{kind}_se": quality["kl_se"]}
        results.append(found)
        print(found, flush=True)
    settings = {"teacher": Path(args.teacher).name, "removed": args.removed, "threads": torch.get_num_threads()}
    args.output_file.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
