"""How far stretches of layers turn their input: block influence and angular distance.

`1 - cos(input, output)` is the block influence of [ShortGPT](https://huggingface.co/papers/2403.03853);
`arccos(cos) / pi` the angular distance of [The Unreasonable Ineffectiveness of the Deeper
Layers](https://huggingface.co/papers/2403.17887). No head is run and no state is stored
beyond the open stretches: hooks add up and forget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch, check_batches, split_rows
from ..errors import LayerPruneError
from ..forward import final_states, measuring, to_device
from ..surgery import check_model, plan_of
from .evidence import Evidence
from .sharding import gathered, own_share
from .sweep import is_offloaded, needs_memory

ANGLES: dict[str, Callable[[Tensor], Tensor]] = {
    "block_influence": lambda cosine: 1 - cosine,
    "angular_distance": lambda cosine: torch.arccos(cosine.clamp(-1, 1)) / math.pi,
}
Stretch = tuple[int, int]  # positions of the first block and behind the last one
TOKENS_AT_ONCE = {"cpu": 512}
"""Rows of a batch go in pieces of about so many tokens: on a CPU as fast, and with a fraction of the memory."""
MANY_TOKENS = 8192  # of other devices


def measure_angles(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    stretches: Sequence[Stretch],
    criterion: str,
    on_batch: Callable[[], None] = lambda: None,
) -> Evidence:
    """Mean of `criterion` per stretch over all unpadded tokens; candidate 0, the model as it is, is turned by nothing.

    Runs inside [`~forward.measuring`].
    """
    angle, evidence = ANGLES[criterion], Evidence(1 + len(stretches))
    inputs: dict[int, tuple[Tensor, Tensor]] = {}  # of open stretches: the states and their lengths
    counts = torch.empty(0)
    sums: Tensor

    def before(position: int) -> Callable[..., None]:
        def keep(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[position] = with_lengths(args[0])

        return keep

    def behind(end: int) -> Callable[..., None]:
        def add(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            states, lengths = with_lengths(output)
            for index, (start, stop) in enumerate(stretches, 1):
                if stop == end:
                    cosine = torch.linalg.vecdot(inputs[start][0], states) / (inputs[start][1] * lengths)  # (B, T)
                    sums[index] = (angle(cosine).double() * counts).sum(1).cpu()
            for start in [s for s in inputs if not any(s == first and stop > end for first, stop in stretches)]:
                del inputs[start]

        return add

    found = []
    tokens_at_once = TOKENS_AT_ONCE.get(model.device.type, MANY_TOKENS)
    layers = model.base_model.layers
    handles = [layers[start].register_forward_pre_hook(before(start)) for start in {s for s, _ in stretches}]
    handles += [layers[end - 1].register_forward_hook(behind(end)) for end in {e for _, e in stretches}]
    try:
        for batch in own_share(batches, model):
            parts = []
            for piece in split_rows(batch, max(1, tokens_at_once // batch["input_ids"].shape[1])):
                piece = to_device(piece, model.device)
                mask = piece.get("attention_mask")
                counts = torch.ones_like(piece["input_ids"]) if mask is None else mask
                sums = torch.zeros(1 + len(stretches), len(counts), dtype=torch.float64)
                final_states(model, piece)
                parts.append((sums, counts.sum(1).cpu()))
                inputs.clear()
            found.append((torch.cat([part for part, _ in parts], dim=1), torch.cat([count for _, count in parts])))
            on_batch()
    finally:
        for handle in handles:
            handle.remove()
    for of_stretches, tokens in gathered(found, model):
        evidence.add(0, range(1 + len(stretches)), of_stretches, tokens)
    return evidence


def with_lengths(states: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; a state of zeros has a length that divides."""
    states = states.float()
    return states, torch.linalg.vector_norm(states, dim=-1).clamp_min(1e-8)


def contiguous_block(
    model: PreTrainedModel, batches: Iterable[Batch], size: int, layers: Iterable[int] | None = None
) -> tuple[int, ...]:
    """The stretch of `size` neighbouring layers that turns its input least, by angular distance.

    [The Unreasonable Ineffectiveness of the Deeper Layers](https://huggingface.co/papers/2403.17887) removes it in one
    go. Of equal stretches the deeper one.

    Args:
        layers (`Iterable[int]`, *optional*): teacher layers that may be in it; all by default.

    Raises:
        [`LayerPruneError`]: if there is no such stretch, or the model has parallel blocks.
    """
    check_model(model)
    plan = plan_of(model)
    allowed = set(plan.layers if layers is None else layers)
    starts = [n for n in range(plan.depth - size + 1) if allowed.issuperset(plan.layers[n : n + size])]
    if plan.parallel_pairs or not starts or size < 1:
        raise LayerPruneError(f"no stretch of {size} neighbouring single layers among {sorted(allowed)}")
    if is_offloaded(model):
        raise needs_memory("'angular_distance'")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    with measuring(model):
        evidence = measure_angles(model, batches, [(n, n + size) for n in starts], "angular_distance")
    best = min(range(len(starts)), key=lambda index: (evidence.value(index + 1), -starts[index]))
    return plan.layers[starts[best] : starts[best] + size]
