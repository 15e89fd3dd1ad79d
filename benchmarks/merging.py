"""Layers removed, removed with the gaps repaired, and merged, without any training: KL on two kinds of text.

    python benchmarks/merging.py --model MODEL --data runs/smollm2-135m-instruct/data \
        --pairs 4,5 6,7 8,9 12,13 14,15 16,17 --output benchmarks/results/merging.json

`--data` is the folder that recipes/data/mix.py wrote. Of each pair the second layer is removed, or both are merged
into one, so that all students have the same depth. Repairs and merges are fitted to the same rows of `healing.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from hf_layerprune import compensate, evaluate_model, load_model, load_tokenizer, merge, prune, tokenized_batches
from hf_layerprune.data import load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", required=True, metavar="A,B")
    parser.add_argument("--rows", type=int, default=64, help="rows of 256 tokens to fit to")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    pairs = [tuple(map(int, pair.split(","))) for pair in args.pairs]
    model, tokenizer = load_model(args.model, "float32").eval(), load_tokenizer(args.model)

    def rows_of(name: str, count: int) -> list:
        return tokenized_batches(load_text_dataset(str(args.data / name)), tokenizer, max_length=256, num_rows=count)

    fitted = rows_of("healing.jsonl", args.rows)
    held_out = {"text": rows_of("held_out_text.jsonl", 24), "chat": rows_of("held_out_chat.jsonl", 24)}
    gone = [second for _, second in pairs]
    ways: dict[str, Callable[[], PreTrainedModel]] = {
        "removed": lambda: prune(model, gone),
        "removed and repaired": lambda: compensate(prune(model, gone), fitted, "least_squares", model),
        "merged": lambda: merge(model, pairs, fitted),
    }
    results = {}
    for name, make in ways.items():
        start = time.perf_counter()
        student = make()
        seconds = time.perf_counter() - start
        kl = {kind: evaluate_model(student, rows, model).kl for kind, rows in held_out.items()}
        results[name] = {"kl": kl, "seconds": seconds}
        print(f"{name:22} KL text {kl['text']:.4f}, chat {kl['chat']:.4f}; {seconds:.0f} s", flush=True)
    content = {"pairs": pairs, "rows": args.rows, "results": results, "environment": environment()}
    write_atomically(args.output, to_json(content))


if __name__ == "__main__":
    main()
