"""The teacher's layers put back into healed students, one after the other: KL to the teacher at every depth.

    python benchmarks/restoring.py --teacher MODEL --data runs/smollm2-135m-instruct/data \
        --removed 15,17,14,5,6,7,9,13,26,28 --output_file recipes/smollm2-135m-instruct/results/restoring.json \
        "KL=runs/losses/KL/model" "KL + hidden=runs/losses/KL_+_hidden/model"

The students are those of `benchmarks/losses.py`, which differ in their loss. The layers that were removed last come
back first, in two ways: alone, or each with the teacher's own layer before its gap, which was repaired and healed to
do the missing layer's work. Measured as by `benchmarks/real_models.py --float32`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from real_models import a_device, rows_of_text, text_quality
from repair import numbers
from transformers import PreTrainedModel

from hf_layerprune import load_model, load_tokenizer, restore
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.surgery import plan_of


def before_gap(layers: set[int], missing: int) -> set[int]:
    """The last of `layers` before one that is missing."""
    return {max(kept for kept in layers if kept < missing)} if missing > min(layers) else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="LOSS=FOLDER")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--removed", type=numbers, required=True, help="teacher layers in the order of their removal")
    parser.add_argument("--back", type=numbers, help="how many are put back, such as 2,4; by default every number")
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()
    teacher, tokenizer = load_model(args.teacher, "float32").to(a_device()).eval(), load_tokenizer(args.teacher)
    texts = {kind: rows_of_text(args.data / f"held_out_{kind}.jsonl", tokenizer) for kind in ("text", "chat")}
    points: list[dict] = []

    def measure(loss: str, way: str, student: PreTrainedModel) -> None:
        point = {"loss": loss, "way": way, "layers": student.config.num_hidden_layers}
        for kind, rows in texts.items():
            found = text_quality(student.eval(), teacher, rows)
            point |= {f"kl_{kind}": found["kl"], f"kl_{kind}_se": found["kl_se"]}
        points.append(point)
        print(point, flush=True)
        content = {"removed": args.removed, "environment": environment(), "points": points}
        write_atomically(args.output_file, to_json(content))  # what is measured stays if the rest takes too long

    for loss, _, folder in (item.partition("=") for item in args.students):
        student = load_model(folder, "float32").to(teacher.device)
        measure(loss, "healed", student)
        kept = set(plan_of(student).layers)
        for way in ("layers alone", "with the layer before"):
            back: set[int] = set()
            for count, layer in enumerate(reversed(args.removed), 1):
                back |= {layer} | (set() if way == "layers alone" else before_gap(kept, layer))
                if args.back is None or count in args.back:
                    measure(loss, way, restore(student, teacher, sorted(back)))


if __name__ == "__main__":
    main()
