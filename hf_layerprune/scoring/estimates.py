"""The criteria by name, and those that estimate what removing a layer costs, without running the model without it.

[`score`] names the papers they are from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch, check_batches, split_rows, valid_next_tokens
from ..errors import LayerPruneError
from ..forward import final_states, gathered, inference, record, shard, to_device, unpadded
from ..losses import next_token_loss
from ..plan import LayerPlan
from ..surgery import check_model, plan_of
from .scores import Evidence, Key, Scores

MEASURED = ("kl", "loss", "tasks")
TOKEN_MEASURES = {"kl": "kl", "loss": "nll"}  # criterion -> name in `token_statistics`
ANGLES: dict[str, Callable[[Tensor], Tensor]] = {
    "block_influence": lambda cosine: 1 - cosine,
    "angular_distance": lambda cosine: torch.arccos(cosine.clamp(-1, 1)) / math.pi,
}
CRITERION_UNITS = {
    "kl": "KL to the original without the layer (nats per token)",
    "loss": "next-token loss without the layer (nats per token)",
    "tasks": "mean cost on the tasks without the layer",
    "block_influence": "block influence, 1 - cos(input, output)",
    "angular_distance": "angle between input and output, over pi",
    "taylor": "sum of |weight x gradient of the loss|",
    "tail": "the last layer first",
    "random": "at random",
}
"""What the cost of a layer is, by criterion."""
CRITERIA = tuple(CRITERION_UNITS)

Criterion = Callable[[PreTrainedModel, Sequence[Batch], Sequence[int]], Sequence[float] | Evidence]
"""A criterion of your own: the model, calibration batches (empty if none are given) and positions of blocks in
`model.base_model.layers`, each of one layer, to a cost for each; lower is safer to remove."""

TOKENS_AT_ONCE = 1024  # whose states at all layers are held


def criterion_of(criterion: str | Criterion) -> str | Criterion:
    """A criterion by its name: one of `CRITERIA`, or a function named as `"module:function"`."""
    if callable(criterion) or criterion in CRITERIA:
        return criterion
    if isinstance(criterion, str) and ":" in criterion:
        try:
            found = resolve_name(criterion)
        except (ImportError, AttributeError, ValueError) as error:
            raise LayerPruneError(f"criterion={criterion!r} cannot be imported: {error}") from error
        if not callable(found):
            raise LayerPruneError(f"criterion={criterion!r} is of type {type(found).__name__}, not a function")
        return found
    choices = f"{', '.join(CRITERIA)}, or a function as module:function"
    raise LayerPruneError(f"criterion={criterion!r} is unknown; choose one of {choices}")


def estimate(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    candidates: Mapping[Key, LayerPlan],
    criterion: str | Criterion,
    seed: int,
    on_batch: Callable[[], None],
) -> Scores[Key]:
    """Score removals of layers that run alone, by a criterion that runs no candidate."""
    plan, blocks = plan_of(model), []
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    for key, after in candidates.items():
        if (layer := lone_removal(plan, after)) is None:
            what = f"removing layer {key}" if isinstance(key, int) else f"'{key}'"
            raise LayerPruneError(
                f"criterion={name!r} cannot score {what}, only the removal of a layer that runs alone; choose one of "
                f"{', '.join(MEASURED)}"
            )
        blocks.append(plan.position_of(layer))
    criterion = criterion_of(criterion)
    if callable(criterion):
        with inference(model):
            costs = criterion(model, batches, blocks)
        costs = costs if isinstance(costs, Evidence) else _numbers(costs, len(blocks), name)
    elif criterion in ANGLES:
        costs = measure_angles(model, batches, [(block, block + 1) for block in blocks], criterion, on_batch)
    elif criterion == "taylor":
        costs = taylor(model, batches, blocks, on_batch)
    elif criterion == "tail":
        costs = [-plan.blocks[block][0] for block in blocks]
    else:
        costs = random.Random(seed).sample(range(len(blocks)), len(blocks))
    if isinstance(costs, Evidence):
        return Scores.of(name, list(candidates), costs)
    num_tokens = sum(len(valid_next_tokens(batch)[1]) for batch in batches)
    return Scores(name, dict(zip(candidates, map(float, costs), strict=True)), num_tokens=num_tokens)


def _numbers(costs: Any, count: int, name: str) -> list[float]:
    """What a user's criterion returned, as `count` numbers."""
    with suppress(TypeError, ValueError, RuntimeError):
        found = [] if isinstance(costs, Mapping) else [float(cost) for cost in costs]
        if len(found) == count:
            return found
    what = " ".join(repr(costs).split())[:60]
    raise LayerPruneError(f"criterion={name!r} returned {what}; it must return a number for each of {count} blocks")


def lone_removal(plan: LayerPlan, after: LayerPlan) -> int | None:
    """The layer that runs alone in `plan` and is all that `after` lacks; `None` where another edit sets them apart."""
    gone = [block for block in plan.blocks if block not in after.blocks]
    return gone[0][0] if len(gone) == 1 and len(gone[0]) == 1 and plan.remove(gone[0][0]) == after else None


def taylor(
    model: PreTrainedModel, batches: Sequence[Batch], blocks: Sequence[int], on_batch: Callable[[], None]
) -> list[float]:
    """Sum of |weight x gradient of the mean next-token loss| over the weights of each block, in float32."""
    by_block = [list(model.base_model.layers[block].parameters()) for block in blocks]
    parameters = [parameter for of_block in by_block for parameter in of_block]
    gradients = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}
    trained = [parameter.requires_grad for parameter in parameters]
    num_tokens = sum(len(valid_next_tokens(batch)[1]) for batch in batches)
    with inference(model), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for batch in batches:
                batch = to_device(batch, model.device)
                valid, labels = valid_next_tokens(batch)
                if len(labels):
                    losses = next_token_loss(final_states(model, batch)[valid], model.lm_head, labels)
                    found = torch.autograd.grad(losses.sum() / num_tokens, parameters, materialize_grads=True)
                    for total, part in zip(gradients.values(), found, strict=True):
                        total += part
                on_batch()
        finally:
            for parameter, is_trained in zip(parameters, trained, strict=True):
                parameter.requires_grad_(is_trained)
    return [
        sum(float((p.detach().float() * gradients[p]).abs().double().sum()) for p in of_block) for of_block in by_block
    ]


def measure_angles(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    stretches: Sequence[tuple[int, int]],
    criterion: str,
    on_batch: Callable[[], None] = lambda: None,
) -> Evidence:
    """Mean angle by which each stretch of blocks, from a first position to before an end, turns its input."""
    evidence, found = Evidence(1 + len(stretches)), []
    first, step = processes = shard(model)
    with inference(model):
        for batch in batches[first::step]:
            parts = split_rows(batch, max(1, TOKENS_AT_ONCE // batch["input_ids"].shape[1]))
            measured = [_row_angles(model, part, stretches, ANGLES[criterion]) for part in parts]
            found.append([torch.cat(of_parts, dim=-1) for of_parts in zip(*measured, strict=True)])
            on_batch()
    for sums, counts in gathered(found, processes):
        evidence.add(0, range(1 + len(stretches)), sums, counts)
    return evidence


def _row_angles(
    model: PreTrainedModel, batch: Batch, stretches: Sequence[tuple[int, int]], angle: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Angles summed over each row, `(1 + stretches, B)`, of the unchanged model first (0), and tokens per row."""
    batch = to_device(batch, model.device)
    counts = unpadded(batch)
    states = record(model, batch, {position for stretch in stretches for position in stretch}, stop=True).states
    sums = torch.zeros(1 + len(stretches), len(counts), dtype=torch.float64)
    for index, (first, end) in enumerate(stretches, 1):
        cosine = F.cosine_similarity(states[first].float(), states[end].float(), dim=-1)  # (B, T)
        sums[index] = (angle(cosine).double() * counts).sum(1).cpu()
    return sums, counts.sum(1).cpu()


def contiguous_stretch(
    model: PreTrainedModel, batches: Iterable[Batch], size: int, layers: Iterable[int] | None = None
) -> tuple[int, ...]:
    """The stretch of `size` neighbouring layers, of all or of `layers`, that turns its input least.

    [The Unreasonable Ineffectiveness of the Deeper Layers](https://huggingface.co/papers/2403.17887) removes it in one
    go. Among equal stretches it is the deeper one.

    Raises:
        [`LayerPruneError`]: if no such stretch of single layers exists.
    """
    check_model(model)
    plan = plan_of(model)
    allowed = set(plan.layers if layers is None else layers)
    free = {position for position, block in enumerate(plan.blocks) if len(block) == 1 and block[0] in allowed}
    starts = [n for n in range(plan.depth - size + 1) if free.issuperset(range(n, n + size))]
    if not starts or size < 1:
        raise LayerPruneError(f"no stretch of {size} neighbouring single layers among {sorted(allowed)}")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    evidence = measure_angles(model, batches, [(n, n + size) for n in starts], "angular_distance")
    best = min(range(len(starts)), key=lambda index: (evidence.value(index + 1), -starts[index]))
    return tuple(block[0] for block in plan.blocks[starts[best] : starts[best] + size])
