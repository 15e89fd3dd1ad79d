"""What the healing of a round trains, and which hidden states it compares: functions of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerPruneError
from ..plan import Edit, LayerPlan, edits_between

TRAINED_LAYERS = ("neighbours", "all")


def touched_blocks(plan: LayerPlan, edits: list[Edit]) -> list[int]:
    """Positions of the blocks beside the gap each removal left, and of those that were put together."""
    chosen: set[int] = set()
    for edit in edits:
        if edit.kind == "parallelize":
            chosen |= {plan.block_of(layer) for layer in edit.layers if layer in plan.layers}
        else:
            (layer,) = edit.layers
            before = [position for position, block in enumerate(plan.blocks) if block[0] < layer]
            behind = [position for position, block in enumerate(plan.blocks) if block[-1] > layer]
            chosen |= set(before[-1:]) | set(behind[:1])
    return sorted(chosen)


def named_layers(trained_layers: str) -> tuple[int, ...] | None:
    """The teacher layers that a setting such as `"3,4,10"` names, or `None` where it is a word.

    Raises:
        [`LayerPruneError`]: if it is neither a known word nor a list of integers.
    """
    if trained_layers in TRAINED_LAYERS:
        return None
    try:
        return tuple(sorted({int(part) for part in trained_layers.split(",")}))
    except ValueError:
        raise LayerPruneError(
            f"trained_layers={trained_layers!r} is neither one of {', '.join(TRAINED_LAYERS)} nor a list of layers "
            "such as '3,4,10'"
        ) from None


def trained_blocks(plan: LayerPlan, edits: list[Edit], trained_layers: str | tuple[int, ...]) -> list[int]:
    """Positions of the blocks whose weights healing changes.

    Args:
        plan ([`LayerPlan`]): the student's.
        edits (`list[Edit]`): what this round did; of a round that only heals none, and all gaps of the plan count.
        trained_layers (`str` or `tuple[int, ...]`): `"neighbours"`, `"all"`, or named teacher layers.

    Raises:
        [`LayerPruneError`]: if none of the named layers is left.
    """
    if trained_layers == "neighbours":
        return touched_blocks(plan, edits or edits_between(LayerPlan.identity(plan.num_teacher_layers), plan))
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
    to do their work too; behind a pair it is the state after the pair's second layer.

    Attributes:
        student (`tuple[int, ...]`): student block positions.
        teacher (`tuple[int, ...]`): positions in the teacher of the layers whose outputs they are compared with.
        teacher_start (`tuple[int, ...]`): positions in the teacher of the layers whose inputs are those of the blocks.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    teacher_start: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: LayerPlan, teacher_plan: LayerPlan, blocks: list[int]) -> HiddenStateMap:
        """Compare the outputs of `blocks` (positions in `plan`), but not the last one's: that is the final state."""
        pairs = []
        for position in blocks:
            if position < plan.depth - 1:
                own, behind = plan.blocks[position][-1], plan.blocks[position + 1][0]
                if teacher_plan.block_of(own) != teacher_plan.block_of(behind):  # else it has no state between them
                    first = teacher_plan.block_of(plan.blocks[position][0])
                    pairs.append((position, teacher_plan.block_of(behind) - 1, first))
        return cls(*zip(*pairs, strict=True)) if pairs else cls((), ())
