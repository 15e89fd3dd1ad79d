"""Losses of healing compared at equal tokens: KL to the teacher, from the same repaired student.

    python benchmarks/losses.py --teacher MODEL --data runs/smollm2-135m-instruct/data \
        --recipe recipes/smollm2-135m-instruct/recipe.yaml --removed 15,17,14,5,6,7,9,13,26,28 \
        --output_dir runs/losses --results recipes/smollm2-135m-instruct/results/losses.json

Removes the layers from the teacher, repairs the gaps on the first rows of `healing.jsonl`, and heals the result once
with each loss and the other settings of the recipe:

* `KL`: the divergence alone;
* `KL + CE`: a tenth of the next-token loss on top;
* `KL, tail twice`: the divergence split as in [tail-aware distillation](https://huggingface.co/papers/2602.20816):
  that of the teacher's ten likeliest tokens, with all others as one class, and that among these others, which counts
  twice;
* `KL + hidden`: the distance of the hidden states on top, at the weight that is the default of `compress`.

Measured as by `benchmarks/real_models.py --float32`. A loss whose student is in the output folder is not healed again.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from real_models import LENGTH, a_device, rows_of_text, standard_error, text_quality
from repair import numbers
from torch import Tensor

from hf_layerprune import compensate, load_model, load_tokenizer, prune, tokenized_batches
from hf_layerprune.cli import main as hf_layerprune
from hf_layerprune.data import load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically

LOSSES = {
    "KL": [],
    "KL + CE": ["--lm_weight", "0.1"],
    "KL, tail twice": [],
    "KL + hidden": ["--hidden_weight", "10"],
}
TOP, TAIL_WEIGHT = 10, 2.0


def tail_aware(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The tail-aware divergence of log-probabilities `(N, V)`: the sum over positions, the gradient by the logits."""
    assert beta == 0
    own, wanted = student.exp(), teacher.exp()
    tail = torch.ones_like(wanted).scatter_(-1, teacher.topk(TOP).indices, 0.0)
    own_tail, wanted_tail = ((p * tail).sum(-1, keepdim=True).clamp_min(1e-12) for p in (own, wanted))
    ratio = teacher - student
    tail_ratio = wanted_tail.log() - own_tail.log()
    top = (wanted * ratio * (1 - tail)).sum() + (wanted_tail * tail_ratio).sum()
    within = (wanted * tail * (ratio - tail_ratio)).sum()
    expected = own * wanted_tail / own_tail * tail  # the mass of the teacher's tail, spread as the student does
    gradient = own - wanted * (1 - tail) - expected + TAIL_WEIGHT * (expected - wanted * tail)
    return top + TAIL_WEIGHT * within, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--removed", type=numbers, required=True, help="teacher layers, such as 11,12")
    parser.add_argument("--rows", type=int, default=192, help="rows of 256 tokens that the repairs are fitted to")
    parser.add_argument("--steps", type=int, default=60, help="of healing, for each loss")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()

    teacher, tokenizer = load_model(args.teacher, "float32").to(a_device()).eval(), load_tokenizer(args.teacher)
    texts = {kind: rows_of_text(args.data / f"held_out_{kind}.jsonl", tokenizer) for kind in ("text", "chat")}
    repaired = args.output_dir / "repaired"
    if not (repaired / "tokenizer_config.json").is_file():  # which is written last
        rows = load_text_dataset(str(args.data / "healing.jsonl"))
        batches = tokenized_batches(rows, tokenizer, max_length=LENGTH, num_rows=args.rows)
        student = prune(teacher, args.removed, share_weights=True)
        compensate(student, batches, "least_squares", teacher, share_weights=True).save_pretrained(repaired)
        tokenizer.save_pretrained(repaired)

    points: list[dict] = []

    def measure(loss: str, folder: Path) -> None:
        student = load_model(str(folder), "float32").to(teacher.device).eval()
        point = {"loss": loss, "layers": student.config.num_hidden_layers}
        for kind, rows in texts.items():
            found = text_quality(student, teacher, rows)
            point |= {f"kl_{kind}": found["kl"], f"kl_{kind}_se": found["kl_se"], f"kl_{kind}_rows": found["kl_rows"]}
            if len(points) > 1:  # the same rows healed with KL alone: only the difference tells two losses apart
                pairs = zip(found["kl_rows"], points[1][f"kl_{kind}_rows"], strict=True)
                differences = [here - plain for here, plain in pairs]
                point[f"kl_{kind}_above_plain"] = sum(differences) / len(differences)
                point[f"kl_{kind}_above_plain_se"] = standard_error(differences)
        points.append(point)
        print({name: value for name, value in point.items() if not name.endswith("rows")}, flush=True)
        settings = {"teacher": Path(args.teacher).name, "removed": args.removed, "steps": args.steps}
        content = settings | {"environment": environment(), "points": points}
        write_atomically(args.results, to_json(content))  # what is measured stays if the rest takes too long

    measure("none", repaired)
    for loss, settings in ((name, LOSSES[name]) for name in args.losses):
        folder = args.output_dir / loss.replace(" ", "_").replace(",", "")
        command = ["compress", "--config", args.recipe, "--model", str(repaired), "--teacher", args.teacher]
        command += ["--target_num_layers", str(teacher.config.num_hidden_layers - len(args.removed))]
        command += ["--dataset", str(args.data / "healing.jsonl"), "--max_steps", str(args.steps)]
        command += ["--eval_dataset", str(args.data / "held_out_chat.jsonl"), "--output_dir", str(folder)]
        command += ["--measure_speed", "false", "--hidden_weight", "0", *settings]
        command += ["--resume"] if (folder / "run_state.json").is_file() else []
        other = patch("hf_layerprune.losses._divergence_of_log_probabilities", tail_aware)
        with other if "tail" in loss else nullcontext():
            status = 0 if (folder / "plan.json").is_file() else hf_layerprune(command)
        if status:
            sys.exit(status)
        measure(loss, folder / "model")


if __name__ == "__main__":
    main()
