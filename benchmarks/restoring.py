"""The teacher's layers put back into a healed student, one after the other: KL to the teacher at every depth.

    python benchmarks/restoring.py --teacher MODEL --run runs/smollm2-135m-instruct/ours \
        --data runs/smollm2-135m-instruct/data --output benchmarks/results/restoring.json

`--data` is the folder that recipes/data/mix.py wrote. The layers that the run removed last come back first. Two ways:
the layers alone, or with each also the teacher's own layer before the gap it fills, which was repaired or healed to do
its work. The students that the run healed at their own depths stand next to them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from real_models import a_device

from hf_layerprune import LayerPlan, evaluate_model, load_model, load_tokenizer, restore, tokenized_batches
from hf_layerprune.data import load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.files import round_folder, to_json, write_atomically
from hf_layerprune.record import read_run


def before_gap(plan: LayerPlan, layer: int) -> list[int]:
    """The layer that `plan` has before the missing `layer`."""
    return [max(kept for kept in plan.layers if kept < layer)] if layer > plan.layers[0] else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--run", type=Path, required=True, help="output folder of compress, with removals only")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="rows of 256 tokens of each kind of text")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    teacher, tokenizer = load_model(args.teacher, "float32").to(a_device()).eval(), load_tokenizer(args.teacher)
    held_out = {
        kind: tokenized_batches(
            load_text_dataset(str(args.data / f"held_out_{kind}.jsonl")), tokenizer, max_length=256, num_rows=args.rows
        )
        for kind in ("text", "chat")
    }
    points = []

    def measure(way: str, depth: int, student: object) -> None:
        kl = {kind: evaluate_model(student, rows, teacher).kl for kind, rows in held_out.items()}
        points.append({"way": way, "layers": depth} | kl)
        print(points[-1], flush=True)
        content = {"points": points, "removed": gone, "environment": environment()}
        write_atomically(args.output, to_json(content))  # what is measured stays if the rest takes too long

    run = read_run(args.run / "report.json")
    gone = [edit.layers[0] for edit in run.edits]
    for record in run.rounds:
        student = load_model(str(round_folder(args.run, record.number)), "float32").to(teacher.device).eval()
        measure("healed", record.depth, student)
    plan = run.rounds[-1].plan
    for way in ("layers alone", "with the layer before"):
        back: set[int] = set()
        for layer in reversed(gone[1:]):  # the last one makes the teacher
            back |= {layer} | set(before_gap(plan, layer) if way != "layers alone" else [])
            deeper = restore(student, teacher, sorted(back))
            measure(way, deeper.config.num_hidden_layers, deeper)


if __name__ == "__main__":
    main()
