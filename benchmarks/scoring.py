"""What scoring costs: the naive loop, the shared prefix, races; block influence as others measure it and by hooks.

    python benchmarks/scoring.py --output benchmarks/results/scoring.json

Ways take turns in one run; times are medians of ratios to the naive loop of the same turn. The naive loop leaves out
one layer after the other, runs the whole model, and compares with the teacher, which runs once per batch, by the plain
formula.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hf_layerprune import embedded_dataset, prune, score_layers
from hf_layerprune.data import Batch, tokenized_batches, valid_next_tokens
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.forward import final_states, inference
from hf_layerprune.loading import load_model, load_tokenizer
from hf_layerprune.losses import token_statistics
from hf_layerprune.scoring import Race
from hf_layerprune.surgery import plan_of

RANDOM = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LARGE_HEAD = RANDOM | {"vocab_size": 151_936}  # Qwen's; as many products per token as 24 of these layers


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, made while it is on, without the weights of `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.owners: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.weights:
            return
        self.owners[key] = self.owners.get(key, 0) + 1
        if self.owners[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self.owners[key] -= 1
        if not self.owners[key]:
            del self.owners[key]
            self.now -= size


def without_each(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [prune(model, [layer], share_weights=True) for layer in plan_of(model).layers]


def naive(
    model: PreTrainedModel, batches: list[Batch], students: list[PreTrainedModel] | None = None
) -> dict[int, float]:
    """KL without each layer, every candidate run from the embedding to the head; students are made if not given."""
    layers = plan_of(model).layers
    students = students or without_each(model)
    totals, tokens = dict.fromkeys(layers, 0.0), 0
    with inference(model):
        for batch in batches:
            valid, labels = valid_next_tokens(batch)
            teacher = model.lm_head(final_states(model, batch)[valid]).log_softmax(-1)
            for layer, student in zip(layers, students, strict=True):
                found = student.lm_head(final_states(student, batch)[valid]).log_softmax(-1)
                kl = F.kl_div(found, teacher, reduction="none", log_target=True).sum(-1)
                totals[layer] += kl.double().sum().item()
            tokens += len(labels)
    return {layer: total / tokens for layer, total in totals.items()}


def influence_elsewhere(model: PreTrainedModel, batches: list[Batch]) -> list[float]:
    """Block influence from the hidden states of a full forward pass, head and all."""
    totals, tokens = [0.0] * model.config.num_hidden_layers, 0
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
                totals[layer] += float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())
            tokens += batch["input_ids"].numel()
    return [total / tokens for total in totals]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every way in each of the repeats, after one that does not count; last results."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for repeat in range(-1, repeats):
        for name, way in ways.items():
            taken, results[name] = timed(way)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds, results


def ratios(seconds: dict[str, list[float]], over: str) -> dict[str, float]:
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[over], strict=True))
        for name, values in seconds.items()
    }


def compare(
    model: PreTrainedModel, batches: list[Batch], repeats: int, students: list[PreTrainedModel] | None = None
) -> dict[str, Any]:
    """Naive loop, shared prefix, race, in turns."""
    depth = model.config.num_hidden_layers
    layer_seconds, head_seconds = cost_of_parts(model, batches)
    passes = {"naive": depth * (depth - 1) + depth, "shared prefix": depth * (depth - 1) / 2 + depth}
    heads = {"naive": depth + 1, "shared prefix": depth + 2}  # of the teacher too, and of the model as it is
    expected = {name: passes[name] * layer_seconds + heads[name] * head_seconds for name in passes}
    ways: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(model, batches, students),
        "shared prefix": lambda: score_layers(model, batches),
        "race": lambda: score_layers(model, batches, race=Race()),
    }
    seconds, results = in_turns(ways, repeats)
    full = results["shared prefix"]
    return {
        "layers": depth,
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_naive": ratios(seconds, "naive"),
        "over_naive_by_counting": expected["shared prefix"] / expected["naive"],
        "largest_difference": max(abs(full.values[layer] - cost) for layer, cost in results["naive"].items()),
        "race_dropped": {str(layer): share for layer, share in results["race"].dropped.items()},
        "race_chose_the_same": results["race"].safest == full.safest,
    }


def compare_influence(model: PreTrainedModel, batches: list[Batch], repeats: int) -> dict[str, Any]:
    """Time and memory of block influence, by the hidden states of a full forward pass and by hooks."""
    ways: dict[str, Callable[[], Any]] = {
        "elsewhere": lambda: influence_elsewhere(model, batches),
        "hooks": lambda: score_layers(model, batches, "block_influence"),
    }
    seconds, _ = in_turns(ways, repeats)
    peaks = {}
    for name, way in ways.items():
        with PeakBytes(model) as meter:
            way()
        peaks[name] = meter.peak
    return {
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_over_elsewhere": ratios(seconds, "elsewhere")["hooks"],
        "memory_over_elsewhere": peaks["hooks"] / peaks["elsewhere"],
        "bytes": peaks,
    }


def cost_of_parts(model: PreTrainedModel, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of one layer and of one head (with KL) over all the data."""
    with inference(model):
        layers, head = [], []
        for _ in range(3):
            taken, states = timed(lambda: [final_states(model, batch) for batch in batches])
            layers.append(taken / model.config.num_hidden_layers)
            parts = [
                (state[valid_next_tokens(b)[0]], valid_next_tokens(b)[1])
                for state, b in zip(states, batches, strict=True)
            ]
            both, _ = timed(
                lambda parts=parts: [token_statistics([h, h], model.lm_head, y, h, model.lm_head) for h, y in parts]
            )
            head.append(both / 3)
    return statistics.median(layers), statistics.median(head)


def trials(model: PreTrainedModel, rows: torch.Tensor, number: int, size: int) -> dict[str, Any]:
    """How often a race over `size` random rows chooses what all of them would; the time it takes, over all data's."""
    agreed, shares, dropped, of_naive = 0, [], [], []
    for seed in range(number):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]
        batches = [{"input_ids": part} for part in rows[order].split(8)]
        whole, full = timed(lambda batches=batches: score_layers(model, batches))
        short, race = timed(lambda batches=batches, seed=seed: score_layers(model, batches, race=Race(seed=seed)))
        agreed += full.safest == race.safest
        shares.append(short / whole)
        if seed % 5 == 0:
            of_naive.append(short / timed(lambda batches=batches: naive(model, batches))[0])
        dropped.append(len(race.dropped))
    return {
        "trials": number,
        "agreed": agreed,
        "over_naive": statistics.median(of_naive),
        "over_shared_prefix": statistics.median(shares),
        "over_shared_prefix_mean": statistics.mean(shares),
        "candidates_dropped": statistics.mean(dropped),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--parts", help="only those with this in their name; others stay as they are")
    arguments = parser.parse_args()
    teacher, tokenizer = load_model("embedded", dtype="float32"), load_tokenizer("embedded")
    text = embedded_dataset("calibration")
    batches = tokenized_batches(text, tokenizer, max_length=256, num_rows=64, batch_size=8)
    torch.manual_seed(0)
    random_model = Qwen2ForCausalLM(Qwen2Config(**RANDOM)).eval()
    large_head = Qwen2ForCausalLM(Qwen2Config(**LARGE_HEAD)).eval()
    short = [{"input_ids": torch.randint(4096, (8, 16))} for _ in range(8)]
    wide = [{"input_ids": torch.randint(4096, (8, 256))}]
    rows = torch.cat([b["input_ids"] for b in tokenized_batches(text, tokenizer, max_length=64, num_rows=512)])
    student = prune(teacher, [1, 2])  # the first two choices are clear; from here on they are not
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "embedded": lambda: compare(teacher, batches, arguments.repeats),
        "random, 24 layers x 512": lambda: compare(random_model, short, arguments.repeats),
        "block influence, embedded": lambda: compare_influence(teacher, batches, arguments.repeats),
        "block influence, random": lambda: compare_influence(random_model, wide, arguments.repeats),
        "block influence, random, vocabulary of 151,936": lambda: compare_influence(
            large_head, wide, arguments.repeats
        ),
        "races, embedded": lambda: trials(teacher, rows, arguments.trials, 64),
        "races, embedded, two layers removed": lambda: trials(student, rows, arguments.trials, 64),
    }
    kept = json.loads(arguments.output.read_text()) if arguments.parts and arguments.output.is_file() else {}
    results = kept | {"environment": environment()}
    for name, measure in parts.items():
        if (arguments.parts or "") not in name:
            continue
        results[name] = measure()
        print(name, json.dumps(results[name], indent=1), flush=True)
        write_atomically(arguments.output, to_json(results))


if __name__ == "__main__":
    main()
