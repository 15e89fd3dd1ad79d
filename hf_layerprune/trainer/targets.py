"""What a round may remove, what its healing trains, which hidden states it compares: functions of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerPruneError
from ..plan import LayerPlan


def removable_layers(plan: LayerPlan, protect_first: int, protect_last: int) -> list[int]:
    """Teacher layers a round may remove: single, and neither among the first nor the last protected ones."""
    last = plan.num_teacher_layers - protect_last
    single = (block[0] for block in plan.blocks if len(block) == 1)
    return [layer for layer in single if protect_first <= layer < last]


def neighbour_blocks(plan: LayerPlan, removed: list[int]) -> list[int]:
    """Positions of the blocks before and behind the gap each layer of `removed` left."""
    chosen: set[int] = set()
    for layer in removed:
        before = [position for position, block in enumerate(plan.blocks) if block[-1] < layer]
        behind = [position for position, block in enumerate(plan.blocks) if block[0] > layer]
        chosen |= set(before[-1:]) | set(behind[:1])
    return sorted(chosen)


def trained_blocks(plan: LayerPlan, removed: list[int], trained_layers: str | tuple[int, ...]) -> list[int]:
    """Positions of the blocks whose weights healing changes.

    Args:
        plan ([`LayerPlan`]): the student's.
        removed (`list[int]`): teacher layers removed in this round.
        trained_layers (`str` or `tuple[int, ...]`): `"neighbours"`, `"all"`, or named teacher layers.

    Raises:
        [`LayerPruneError`]: if none of the named layers is left.
    """
    if trained_layers == "neighbours":
        return neighbour_blocks(plan, removed)
    if trained_layers == "all":
        return list(range(plan.depth))
    blocks = sorted({plan.block_of(layer) for layer in trained_layers if layer in plan.layers})
    if not blocks:
        raise LayerPruneError(f"trained_layers={list(trained_layers)}: all of them have been removed; name others")
    return blocks


@dataclass(frozen=True)
class HiddenStateMap:
    """Which hidden states are compared: what a student block hands on against what the teacher hands to that place.

    Behind a gap that is the teacher's state AFTER the removed layers, since the student's block before the gap now has
    to do their work too.

    Attributes:
        student (`tuple[int, ...]`): student block positions.
        teacher (`tuple[int, ...]`): positions in the teacher of the layers whose outputs they are compared with.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @classmethod
    def of(cls, plan: LayerPlan, teacher_plan: LayerPlan, blocks: list[int]) -> HiddenStateMap:
        """Compare the outputs of `blocks` (positions in `plan`), but not the last one's: that is the final state."""
        inner = tuple(position for position in blocks if position < plan.depth - 1)
        return cls(inner, tuple(teacher_plan.block_of(plan.blocks[position + 1][0]) - 1 for position in inner))
