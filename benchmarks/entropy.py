"""The rise of entropy as a criterion: layers removed at once by it, against block influence, never healed.

    python benchmarks/entropy.py --teacher TEACHER --depths 24,20 --text DIR/healing.jsonl --held_out DIR \
        --output_file FILE.json

After EntroDrop (ICLR 2026): the entropy of a hidden state is that of a histogram of its entries. It falls over the
first layers and then rises; of the layers in which it rises, those that raise it least go first. Also a criterion of
one's own: `--criterion entropy:rise_of_entropy` with this folder on PYTHONPATH. The number of buckets is ours.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from real_models import LENGTH, a_device, rows_of_text, text_quality
from repair import numbers
from torch import Tensor
from transformers import PreTrainedModel

from hf_layerprune import load_model, load_tokenizer, prune, score_layers, tokenized_batches
from hf_layerprune.data import Batch, load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.forward import record, to_device

BUCKETS = 40


def entropy(states: Tensor) -> Tensor:
    """Entropy of the entries of each state, in buckets from its least to its greatest: `(N, H) -> (N,)`, nats."""
    least, most = states.aminmax(dim=-1, keepdim=True)
    places = ((states - least) / (most - least).clamp_min(1e-12) * BUCKETS).long().clamp_max(BUCKETS - 1)
    shares = torch.zeros(len(states), BUCKETS, device=states.device).scatter_add_(-1, places, torch.ones_like(states))
    shares = shares / states.shape[-1]
    return torch.special.entr(shares).sum(-1)


def rise_of_entropy(model: PreTrainedModel, batches: Sequence[Batch], blocks: Sequence[int]) -> list[float]:
    """Entropy after each block less that before it, means over tokens; blocks before the least entropy go last."""
    places = sorted({*blocks, *(block + 1 for block in blocks)})
    total = torch.zeros(len(places))
    for batch in batches:
        states = record(model, to_device(batch, model.device), places).states
        total += torch.tensor([entropy(states[place].flatten(0, 1).float()).mean().item() for place in places])
    means = dict(zip(places, (total / len(batches)).tolist(), strict=True))
    least = min(means, key=means.get)
    return [means[block + 1] - means[block] + (block < least) * math.log(BUCKETS) for block in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--depths", type=numbers, required=True, help="layers that are left, such as 24,20")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held_out", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens that layers are scored on")
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    teacher, tokenizer = load_model(args.teacher, "float32").to(a_device()).eval(), load_tokenizer(args.teacher)
    batches = tokenized_batches(load_text_dataset(args.text), tokenizer, max_length=LENGTH, num_rows=args.rows)
    depth, results = teacher.config.num_hidden_layers, []
    texts = {kind: rows_of_text(args.held_out / f"held_out_{kind}.jsonl", tokenizer) for kind in ("text", "chat")}
    for name, criterion in (("rise of entropy", rise_of_entropy), ("block influence", "block_influence")):
        costs = score_layers(teacher, batches, criterion).values
        order = sorted(costs, key=costs.get)
        for left in args.depths:
            removed = sorted(order[: depth - left])
            student, found = prune(teacher, removed, share_weights=True), {"criterion": name, "layers": left}
            for kind, rows in texts.items():
                quality = text_quality(student, teacher, rows)
                found |= {f"kl_{kind}": quality["kl"], f"kl_{kind}_se": quality["kl_se"]}
            results.append(found | {"removed": removed})
            print(results[-1], flush=True)
    settings = {"teacher": Path(args.teacher).name, "rows": args.rows, "environment": environment()}
    args.output_file.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
