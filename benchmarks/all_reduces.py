"""Collectives per forward pass of a model split over two processes, before and after its layers run in pairs.

    python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/all_reduces.py \
        --output benchmarks/results/all_reduces.json

The split is transformers' own tensor-parallel plan: the rows of a pair's first half, which are the heads and neurons
of its first layer, lie on the first device, those of its second layer on the second. One all-reduce of every forward
pass belongs to the embedding, two to each block.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_layerprune import parallelize, prune
from hf_layerprune.environment import environment
from hf_layerprune.loading import load_model
from hf_layerprune.surgery import plan_of


def measure(model: PreTrainedModel, folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Save `model`, load it split over the processes, compare its logits and count what it sends."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    split = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto"), trust_remote_code=False
    )
    with torch.no_grad(), CommDebugMode() as counter:
        logits = split(ids, use_cache=False).logits
    counts = {str(operation): count for operation, count in counter.get_comm_counts().items()}
    logits = getattr(logits, "full_tensor", lambda: logits)()
    difference = (logits - model(ids).logits).abs().max().item()
    generated = split.generate(ids, max_new_tokens=8, do_sample=False)
    return {
        "blocks": plan_of(model).depth,
        "pairs": len(plan_of(model).parallel_pairs),
        "all_reduces": sum(count for name, count in counts.items() if "reduce" in name),
        "collectives": counts,
        "largest_logit_difference": difference,
        "same_greedy_tokens": torch.equal(generated, model.generate(ids, max_new_tokens=8, do_sample=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--pairs", type=int, default=5, help="Pairs, from the third layer on.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = load_model(arguments.model, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (2, 16))
    pairs = [(2 * n + 2, 2 * n + 3) for n in range(arguments.pairs)]
    forms = {
        "original": model,
        "in pairs": parallelize(model, pairs),
        "first of each pair removed": prune(model, [a for a, _ in pairs]),
    }
    shared = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(shared)
    results = {
        name: measure(form, Path(shared[0]) / str(index), ids) for index, (name, form) in enumerate(forms.items())
    }
    if dist.get_rank() == 0:
        text = json.dumps({"model": arguments.model, "forms": results, "environment": environment()}, indent=1)
        if arguments.output is not None:
            arguments.output.write_text(text + "\n")
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
