"""How long a decoding step of any plan takes, from a few measurements of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .benchmark import benchmark_models
from .plan import LayerPlan
from .surgery import apply_plan, plan_of

MOST_BLOCKS = 8  # of one width at a time: enough to average over, and bounds the copies that are made


@dataclass(frozen=True)
class BlockLatency:
    """Seconds of one decoding step: a fixed part, and one per block that depends on how many layers it has.

    Attributes:
        fixed (`float`): embedding, head, sampling and the loop around them, seconds.
        blocks (`tuple[float, ...]`): a block of 1, 2, ... layers, seconds.
    """

    fixed: float
    blocks: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # JSON gives a list

    def of(self, plan: LayerPlan) -> float:
        """Seconds per token of a model of this plan."""
        return self.fixed + sum(self.blocks[len(block) - 1] for block in plan.blocks)


def measure_latency(
    model: PreTrainedModel,
    max_group_size: int = 2,
    batch_size: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 7,
) -> BlockLatency:
    """Time greedy `generate` of `model` whole, by half, and with blocks of each width; solve for the parts.

    Forms take turns, as in [`benchmark_models`], and medians count. Wider blocks are copies of layers, of up to 8
    blocks of one width at a time.

    Args:
        model ([`~transformers.PreTrainedModel`]): on the device and in the dtype that count.
        max_group_size (`int`, *optional*, defaults to `2`): widest block to measure, in layers.
        batch_size, prompt_tokens, new_tokens, repeats (`int`, *optional*): see [`benchmark_models`].

    Returns:
        [`BlockLatency`]: an estimate for any plan. Where the clock is too coarse, no part is below a hundredth of its
        neighbour.
    """
    layers, depth = plan_of(model).layers, plan_of(model).num_teacher_layers
    settings = (prompt_tokens, new_tokens, batch_size, repeats)

    def form(width: int, count: int) -> PreTrainedModel:
        blocks = tuple(tuple(layers[width * n : width * (n + 1)]) for n in range(count))
        return apply_plan(model, LayerPlan(blocks, depth), share_weights=True)

    half = max(1, len(layers) // 2)
    whole = form(1, len(layers))
    report, report_of_half = benchmark_models([whole, form(1, half)], *settings)
    total = batch_size / report.decode_tokens_per_second
    by_half = total / report_of_half.decode_ratio
    single = (total - by_half) / (len(layers) - half) if len(layers) > half else total
    single = max(single, total / len(layers) / 100)  # where the clock is too coarse to tell
    fixed = max(0.0, total - len(layers) * single)
    blocks = [single]
    for width in range(2, min(max_group_size, len(layers)) + 1):
        count = min(len(layers) // width, MOST_BLOCKS)
        ratio = benchmark_models([whole, form(width, count)], *settings)[1].decode_ratio
        blocks.append(max((total / ratio - fixed) / count, blocks[-1] / 100))
    return BlockLatency(fixed, tuple(blocks))
