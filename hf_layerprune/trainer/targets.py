"""What the healing of a round trains, and which hidden states it compares: functions of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerPruneError
from ..plan import Edit, LayerPlan, edits_between

TRAINED_LAYERS = ("neighbours", "all")


def touched_blocks(plan: LayerPlan, edits: list[Edit]) -> list[int]:
    """Positions of the blocks next to the gap of each removal, and of the merged ones."""
    touched: set[int] = set()
    for edit in edits:
        if edit.kind == "parallelize":
            touched |= {plan.block_of(layer) for layer in edit.layers if layer in plan.layers}
        else:
            (layer,) = edit.layers
            before = sum(block[0] < layer for block in plan.blocks) - 1
            after = sum(block[-1] < layer for block in plan.blocks)
            touched |= {before, after} & set(range(plan.depth))
    return sorted(touched)


def named_layers(trained_layers: str) -> tuple[int, ...] | None:
    """The teacher layers that a setting such as `"3,4,10"` names; `None` for `"neighbours"` and `"all"`."""
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
        edits (`list[Edit]`): this round's; if there are none, all gaps of the plan count.
        trained_layers (`str` or `tuple[int, ...]`): `"neighbours"`, `"all"`, or teacher layers; one must be left.
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
    """Which hidden states are compared: what a block hands on, with what the next layer reads in the teacher.

    After a gap that is the state AFTER the removed layers, since the block before the gap now does their work too;
    after a pair it is the state after the pair's second layer.

    Attributes:
        student (`tuple[int, ...]`): positions of blocks in the student.
        teacher (`tuple[int, ...]`): positions in the teacher of the layers whose outputs theirs are compared with.
        teacher_start (`tuple[int, ...]`): positions in the teacher of the layers whose inputs are those of the blocks.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    teacher_start: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: LayerPlan, teacher_plan: LayerPlan, blocks: list[int]) -> HiddenStateMap:
        """Compare the outputs of `blocks` (positions in `plan`), but not the last one's: that is the final state."""
        compared = []
        for position in blocks:
            if position < plan.depth - 1:
                block, next_layer = plan.blocks[position], plan.blocks[position + 1][0]
                first, last, reader = (teacher_plan.block_of(layer) for layer in (block[0], block[-1], next_layer))
                if last != reader:  # else the teacher has no state between them
                    compared.append((position, reader - 1, first))
        return cls(*zip(*compared, strict=True)) if compared else cls((), ())
