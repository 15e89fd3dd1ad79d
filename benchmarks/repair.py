"""Repairs of gaps compared: KL to the teacher by the way of repair and the number of rows it reads.

    python benchmarks/repair.py --teacher TEACHER --removed 11,12 --rows 16,64,160 \
        --repair_on DIR/healing.jsonl --held_out DIR --output_file FILE.json

Removes the layers from the teacher, repairs every gap on the first rows of the text, 256 tokens each, and measures KL
on modern text and on the teacher's own answers, as `benchmarks/real_models.py` does. The ways are

* `refit`: least squares on the `down_proj` before the gap, as `compensation="least_squares"` does it;
* `map`: a matrix on the residual stream at the gap, of hidden x hidden parameters, after [Ghosted
  Layers](https://huggingface.co/papers/2605.15491): state + state M, the ridge regression of what the state lacks;
* `refit and map`: the second after the first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from real_models import LENGTH, a_device, rows_of_text, text_quality
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerprune import load_model, load_tokenizer, prune, tokenized_batches
from hf_layerprune.compensation import DEFAULT_RIDGE, compensate, target_state
from hf_layerprune.data import Batch, load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.forward import inference, record, to_device
from hf_layerprune.regression import Regression
from hf_layerprune.surgery import plan_of

WAYS = ("refit", "map", "refit and map")


def add_maps(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], ridge: float) -> list[int]:
    """Map the state at every gap to the teacher's after it, from the bottom up, in place; returns the positions."""
    plan, size = plan_of(student), student.config.hidden_size
    after = (*(block[0] for block in plan.blocks[1:]), plan.num_teacher_layers)
    gaps = [position for position, block in enumerate(plan.blocks) if block[-1] + 1 < after[position]]
    num_tokens = sum(batch["input_ids"].numel() for batch in batches)
    for position in gaps:
        target = target_state(position, plan, plan_of(teacher))
        fit = Regression(torch.zeros(size, size, device=student.device), num_tokens)
        for batch in batches:
            with inference(student, teacher):
                state = record(student, batch, [position + 1], stop=True).states[position + 1].flatten(0, 1)
                wanted = record(teacher, batch, [target], stop=True).states[target].flatten(0, 1)
            fit.add(state, wanted - state)
        matrix = fit.solve(ridge)

        def mapped(_: nn.Module, __: object, state: Tensor, matrix: Tensor = matrix) -> Tensor:
            return state + state @ matrix.T

        student.base_model.layers[position].register_forward_hook(mapped)
    return gaps


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--removed", type=numbers, required=True, help="teacher layers, such as 11,12")
    parser.add_argument("--rows", type=numbers, required=True, help="numbers of rows, such as 16,64,160")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--ridge", type=float, default=DEFAULT_RIDGE, help="of both ways, in tokens")
    parser.add_argument("--repair_on", required=True)
    parser.add_argument("--held_out", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    teacher = load_model(args.teacher, "float32").to(a_device()).eval()
    tokenizer, text = load_tokenizer(args.teacher), load_text_dataset(args.repair_on)
    batches = tokenized_batches(text, tokenizer, max_length=LENGTH, num_rows=max(args.rows), batch_size=1)
    batches = [to_device(batch, teacher.device) for batch in batches]
    texts = {kind: rows_of_text(args.held_out / f"held_out_{kind}.jsonl", tokenizer) for kind in ("text", "chat")}
    results = []
    for way, rows in [("none", 0), *((way, rows) for way in args.ways for rows in args.rows)]:
        start, student = time.perf_counter(), prune(teacher, args.removed, share_weights=True).eval()
        parameters = student.num_parameters()
        if "refit" in way:
            student = compensate(
                student, batches[:rows], "least_squares", teacher, ridge=args.ridge, share_weights=True
            )
        if "map" in way:
            parameters += len(add_maps(student, teacher, batches[:rows], args.ridge)) * student.config.hidden_size**2
        found = {"way": way, "rows": rows, "tokens": rows * LENGTH, "parameters": parameters}
        found["seconds"] = round(time.perf_counter() - start, 1)
        for kind, text in texts.items():
            quality = text_quality(student, teacher, text)
            found |= {f"kl_{kind}": quality["kl"], f"kl_{kind}_se": quality["kl_se"]}
        results.append(found)
        print(found, flush=True)
    settings = {"teacher": Path(args.teacher).name, "removed": args.removed, "ridge": args.ridge}
    settings["environment"] = environment()
    args.output_file.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
