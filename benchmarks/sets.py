"""Layers removed as a set, by a Fisher matrix, against one after the other by measured KL.

    python benchmarks/sets.py --teacher TEACHER --depths 24,20,15 --text DIR/healing.jsonl --held_out DIR \
        --output_file FILE.json

After [CBO](https://huggingface.co/papers/2602.00161): a gate g scales what every layer adds to the stream, x +
g (layer(x) - x). At g = 1 the gradient of KL(teacher || gated) is zero and its second derivative is the Fisher matrix
F of the gates, so removing a set of layers costs about half the sum of its entries in F. One backward pass gives a
sample of F: the gradient of the log-probability of tokens drawn from the teacher's own predictions, one at each
position of a text. The sets of each depth with the lowest cost are then measured, and the best one is compared with
the greedy choice of `search_plan` on the same rows. Both are measured on held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import torch
from real_models import LENGTH, a_device, rows_of_text, text_quality
from repair import numbers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerprune import LayerPlan, apply_plan, load_model, load_tokenizer, search_plan, tokenized_batches
from hf_layerprune.data import Batch, load_text_dataset
from hf_layerprune.environment import environment
from hf_layerprune.forward import to_device
from hf_layerprune.scoring import Race, score

MOST_SETS = 2_000_000  # that are listed one by one; of more, sets are searched by exchanging layers
STARTS = 400  # of that search
WAYS = ("fisher", "greedy")


def fisher(model: PreTrainedModel, batches: Sequence[Batch], draws: int, seed: int = 0) -> np.ndarray:
    """The Fisher matrix of the gates, `(L, L)`, in nats per token."""
    layers = model.base_model.layers
    gates = torch.ones(len(layers), device=model.device, requires_grad=True)
    generator = torch.Generator(model.device).manual_seed(seed)
    matrix, num_tokens = np.zeros((len(layers), len(layers))), 0

    def gated(position: int, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] + gates[position] * (output - args[0])

    with ExitStack() as hooks:
        for position, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(gated, position)))
        for batch in batches:
            for ids in batch["input_ids"]:
                log_probs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                for draw in range(draws):
                    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
                    (gradient,) = torch.autograd.grad(
                        log_probs.gather(-1, drawn).sum(), gates, retain_graph=draw + 1 < draws
                    )
                    gradient = gradient.cpu()
                    matrix += np.outer(gradient, gradient) / draws
                num_tokens += len(ids) - 1
    return matrix / num_tokens


def best_sets(matrix: np.ndarray, size: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """The `count` sets of `size` layers with the lowest sum of entries, the best first."""
    depth = len(matrix)
    if comb(depth, size) <= MOST_SETS:
        sets = np.array(list(combinations(range(depth), size)))
        costs = sum(matrix[sets[:, i], sets[:, j]] for i in range(size) for j in range(size))
        return [tuple(map(int, layers)) for layers in sets[np.argsort(costs)[:count]]]
    generator, found = np.random.default_rng(seed), {}
    for _ in range(STARTS):
        chosen = np.zeros(depth)
        chosen[generator.choice(depth, size, replace=False)] = 1
        while True:  # the best exchange of a layer that is in the set for one that is not
            inside, outside = np.flatnonzero(chosen), np.flatnonzero(chosen == 0)
            reach = matrix @ chosen
            change = -2 * reach[inside, None] + 2 * reach[None, outside] - 2 * matrix[np.ix_(inside, outside)]
            change += matrix.diagonal()[inside, None] + matrix.diagonal()[None, outside]
            for i, j in zip(*np.unravel_index(np.argsort(change, axis=None)[:count], change.shape), strict=True):
                other = frozenset({*inside.tolist(), int(outside[j])} - {int(inside[i])})
                found[other] = chosen @ reach + change[i, j]
            i, j = np.unravel_index(change.argmin(), change.shape)
            if change[i, j] >= -1e-12:
                break
            chosen[inside[i]], chosen[outside[j]] = 0, 1
    return [tuple(sorted(layers)) for layers in sorted(found, key=found.get)[:count]]


def without(depth: int, layers: Sequence[int]) -> LayerPlan:
    return LayerPlan(tuple((layer,) for layer in range(depth) if layer not in layers), depth)


def fisher_choice(
    teacher: PreTrainedModel, batches: Sequence[Batch], matrix: np.ndarray, left: int, count: int
) -> dict[str, object]:
    """The best by measured KL of the sets with the lowest cost that leave `left` layers."""
    start, depth = time.perf_counter(), len(matrix)
    sets = best_sets(matrix, depth - left, count)
    plans = [without(depth, layers) for layers in sets]
    scores = score(teacher, batches, plans, "kl", race=Race(0.95))
    place = plans.index(scores.safest)
    found = {"removed": sets[place], "place": place, "seconds": time.perf_counter() - start}
    guess = matrix[np.ix_(sets[place], sets[place])].sum() / 2
    return found | {"guess": guess, "kl": scores.values[plans[place]], "first": sets[0]}


def greedy_choices(
    teacher: PreTrainedModel, batches: Sequence[Batch], depths: Sequence[int]
) -> dict[int, dict[str, object]]:
    """What the search by measured KL removes to reach each depth."""
    start, seconds = time.perf_counter(), {}
    search = search_plan(
        teacher, batches, {"depth": min(depths)}, edits="remove", race=Race(0.95),
        on_step=lambda step: seconds.setdefault(step.plan.depth, time.perf_counter() - start),
    )  # fmt: skip
    return {
        step.plan.depth: {"removed": step.plan.removed_layers, "kl": step.cost, "seconds": seconds[step.plan.depth]}
        for step in search.steps
        if step.plan.depth in depths
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--depths", type=numbers, required=True, help="layers that are left, such as 24,20,15")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held_out", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens, for the matrix and for measuring")
    parser.add_argument("--draws", type=int, default=2, help="backward passes of each row")
    parser.add_argument("--sets", type=int, default=20, help="sets of each depth that are measured")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    teacher = load_model(args.teacher, "float32").to(a_device()).eval().requires_grad_(False)
    tokenizer, text = load_tokenizer(args.teacher), load_text_dataset(args.text)
    batches = tokenized_batches(text, tokenizer, max_length=LENGTH, num_rows=args.rows, batch_size=1)
    batches = [to_device(batch, teacher.device) for batch in batches]
    depth = teacher.config.num_hidden_layers
    chosen: dict[tuple[str, int], dict[str, object]] = {}
    settings: dict[str, object] = {"teacher": Path(args.teacher).name, "rows": args.rows, "environment": environment()}
    start = time.perf_counter()
    if "fisher" in args.ways:
        matrix = fisher(teacher, batches, args.draws)
        settings |= {"draws": args.draws, "sets": args.sets, "seconds_of_matrix": time.perf_counter() - start}
        settings["matrix"] = matrix.round(6).tolist()
        for left in args.depths:
            chosen["fisher", left] = fisher_choice(teacher, batches, matrix, left, args.sets)
            print("fisher", left, chosen["fisher", left], flush=True)
    if "greedy" in args.ways:
        for left, found in greedy_choices(teacher, batches, args.depths).items():
            chosen["greedy", left] = found
            print("greedy", left, found, flush=True)
    results = []
    for (way, left), found in chosen.items():
        student = apply_plan(teacher, without(depth, found["removed"]), share_weights=True).eval()
        for kind in ("text", "chat"):
            quality = text_quality(student, teacher, rows_of_text(args.held_out / f"held_out_{kind}.jsonl", tokenizer))
            found |= {f"kl_{kind}": quality["kl"], f"kl_{kind}_se": quality["kl_se"]}
        results.append({"way": way, "layers": left} | found)
        print(results[-1], flush=True)
    settings["results"] = results
    args.output_file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
