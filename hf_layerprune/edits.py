"""Edits: the single changes of a plan, and which of them a search may make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import LayerPruneError
from .plan import LayerPlan

EDIT_KINDS = ("remove", "parallelize")


@dataclass(frozen=True)
class Edit:
    """One change of a plan: leave out a layer, or merge neighbouring blocks into one that runs in parallel.

    Args:
        kind (`str`): `"remove"` or `"parallelize"`.
        layers (`tuple[int, ...]`): the teacher layer to remove; or all layers of the block that comes to be.
    """

    kind: str
    layers: tuple[int, ...]

    @classmethod
    def remove(cls, layer: int) -> Edit:
        return cls("remove", (layer,))

    @classmethod
    def parallelize(cls, *layers: int) -> Edit:
        return cls("parallelize", layers)

    def apply(self, plan: LayerPlan) -> LayerPlan:
        """The plan after this edit.

        Raises:
            [`LayerPruneError`]: if the plan lacks one of the layers, or they are not in neighbouring blocks.
        """
        return plan.remove(*self.layers) if self.kind == "remove" else plan.group(self.layers)

    @property
    def label(self) -> str:
        """Short and unique: `"7"` for removing layer 7, `"4|5"` for running 4 and 5 in parallel."""
        return "|".join(map(str, self.layers))

    def __str__(self) -> str:
        return f"{self.kind} {self.label}"

    @classmethod
    def from_label(cls, label: str) -> Edit:
        """Read what `label` gave."""
        layers = tuple(int(layer) for layer in label.split("|"))
        return cls("remove" if len(layers) == 1 else "parallelize", layers)


@dataclass(frozen=True)
class EditSpace:
    """Which edits of a plan are allowed.

    Args:
        kinds (`Iterable[str]` or `str`, *optional*): `"remove"`, `"parallelize"` or both; a string is split at commas.
        max_group_size (`int`, *optional*, defaults to `2`): most layers in one parallel block.
        protect_first (`int`, *optional*, defaults to `0`): number of first teacher layers that no edit touches.
        protect_last (`int`, *optional*, defaults to `0`): number of last teacher layers that no edit touches.

    Raises:
        [`LayerPruneError`]: for an unknown kind, or a group that is none.
    """

    kinds: Iterable[str] | str = EDIT_KINDS
    max_group_size: int = 2
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        kinds = self.kinds.split(",") if isinstance(self.kinds, str) else self.kinds
        kinds = tuple(kind.strip() if isinstance(kind, str) else kind for kind in kinds)
        if not kinds or not set(kinds) <= set(EDIT_KINDS):
            raise LayerPruneError(f"edits={','.join(map(str, kinds))!r}: choose {' or '.join(EDIT_KINDS)}, or both")
        for name, least in (("max_group_size", 2), ("protect_first", 0), ("protect_last", 0)):
            value = getattr(self, name)
            matters = name != "max_group_size" or "parallelize" in kinds
            if type(value) is not int or (value < least and matters):
                raise LayerPruneError(
                    f"{name}={value!r} is out of range; it must be a whole number of at least {least}"
                )
        object.__setattr__(self, "kinds", kinds)

    def edits(self, plan: LayerPlan) -> list[Edit]:
        """Every allowed edit of `plan`."""
        edits = []
        if "remove" in self.kinds and len(plan.layers) > 1:
            edits += [Edit.remove(layer) for layer in plan.layers if self._free((layer,), plan)]
        if "parallelize" in self.kinds:
            merged = (a + b for a, b in zip(plan.blocks, plan.blocks[1:], strict=False))
            edits += [Edit.parallelize(*layers) for layers in merged if self._mergeable(layers, plan)]
        return edits

    def smallest(self, plan: LayerPlan, cost: Callable[[int], float] = lambda width: 1.0) -> LayerPlan:
        """The cheapest plan that edits can lead to, where a block of `width` layers costs `cost(width)`.

        By default every block costs the same: the shallowest plan.
        """
        if "remove" in self.kinds:
            kept = (tuple(layer for layer in block if not self._free((layer,), plan)) for block in plan.blocks)
            blocks = tuple(block for block in kept if block) or ((plan.layers[-1],),)
            return LayerPlan(blocks, plan.num_teacher_layers)
        best: list[tuple[float, tuple[tuple[int, ...], ...]]] = [(0.0, ())]  # of the first n blocks
        for end in range(1, plan.depth + 1):
            options = []
            for start in range(end):
                merged = sum(plan.blocks[start:end], ())
                if start == end - 1 or self._mergeable(merged, plan):
                    options.append((best[start][0] + cost(len(merged)), (*best[start][1], merged)))
            best.append(min(options))
        return LayerPlan(best[-1][1], plan.num_teacher_layers)

    def _free(self, layers: tuple[int, ...], plan: LayerPlan) -> bool:
        return self.protect_first <= layers[0] and layers[-1] < plan.num_teacher_layers - self.protect_last

    def _mergeable(self, layers: tuple[int, ...], plan: LayerPlan) -> bool:
        return len(layers) <= self.max_group_size and self._free(layers, plan)


def edits_between(before: LayerPlan, after: LayerPlan) -> list[Edit]:
    """Edits that lead from one plan to another made of its layers: all removals, then the parallel blocks."""
    removed = [Edit.remove(layer) for layer in before.layers if layer not in after.layers]
    return removed + [Edit.parallelize(*block) for block in after.parallel_pairs if block not in before.blocks]
