"""The layer plan, and the edits that change it: which teacher layers a student keeps, and which are put together.

Layer indices are 0-based TEACHER indices everywhere; a position in the student is called a block.

    ((0,), (1,), (2,), (4, 5), (6, 7), (9,))      # 3 and 8 removed; 4|5 and 6|7 run in parallel

Layers of a block run in parallel, so that it is as wide as all of them, or are merged into one layer of one layer's
width: `merged=((6, 7),)`.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .errors import LayerPruneError

MAX_LAYERS = 10_000
"""Deeper than any teacher; a plan from outside that asks for more is a mistake, or meant to fill the memory."""


def layer_indices(layers: Iterable[int], what: str = "layers") -> list[int]:
    """Layer indices as a list of integers, or a [`LayerPruneError`]."""
    try:
        found = list(layers)
        if any(isinstance(layer, bool) for layer in found):
            raise TypeError
        return [operator.index(layer) for layer in found]
    except TypeError:
        raise LayerPruneError(f"{what}={layers!r:.200} must be a list of layer indices, such as [4, 9]") from None


def layer_groups(groups: Iterable[Iterable[int]], what: str = "pairs") -> list[tuple[int, ...]]:
    """Groups of layer indices as tuples of integers, or a [`LayerPruneError`]."""
    if not isinstance(groups, Iterable):
        raise LayerPruneError(f"{what}={groups!r:.200} must be a list of groups of layers, such as [(4, 5)]")
    return [tuple(layer_indices(group, f"a group in {what}")) for group in groups]


@dataclass(frozen=True)
class LayerPlan:
    """Which teacher layers a student consists of.

    Args:
        blocks (`tuple[tuple[int, ...], ...]`):
            One tuple of teacher layer indices per student block. Indices ascend over the whole plan and appear once;
            a block of more than one layer runs them in parallel, unless it is one of `merged`.
        num_teacher_layers (`int`, *optional*):
            Depth of the teacher. Defaults to the highest index in `blocks` plus one.
        merged (`tuple[tuple[int, ...], ...]`, *optional*):
            Those of `blocks` whose layers were merged into one layer.

    Raises:
        [`LayerPruneError`]: if the three do not fit together.
    """

    blocks: tuple[tuple[int, ...], ...]
    num_teacher_layers: int | None = None
    merged: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        try:
            blocks, merged = (tuple(map(tuple, value)) for value in (self.blocks, self.merged))
        except TypeError:
            given = f"blocks={self.blocks!r:.200}, merged={self.merged!r:.200}"
            raise LayerPruneError(f"layer plan {given}: both must be lists of lists of layer indices") from None
        layers = [layer for block in blocks for layer in block]
        if not blocks or not all(blocks):
            raise LayerPruneError("layer plan has no blocks or an empty block; a model needs at least one layer")
        if any(type(layer) is not int for layer in layers) or any(a >= b for a, b in pairwise([-1, *layers])):
            raise LayerPruneError(
                f"layer plan holds {layers!r:.200}; layer indices are integers from 0 and must ascend without repeats"
            )
        depth = layers[-1] + 1 if self.num_teacher_layers is None else self.num_teacher_layers
        if type(depth) is not int or not 1 <= depth <= MAX_LAYERS:
            raise LayerPruneError(f"layer plan has a teacher of {depth!r:.200} layers; it may have 1 to {MAX_LAYERS}")
        if layers[-1] >= depth:
            raise LayerPruneError(f"layer plan uses layer {layers[-1]}, but the teacher has layers 0 to {depth - 1}")
        if unknown := [block for block in merged if len(block) < 2 or block not in blocks]:
            raise LayerPruneError(f"layer plan has merged={unknown!r:.200}, which are not blocks of several layers")
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "num_teacher_layers", depth)
        object.__setattr__(self, "merged", tuple(sorted(set(merged))))

    @classmethod
    def identity(cls, num_layers: int) -> LayerPlan:
        """The plan of an untouched model of `num_layers` layers."""
        return cls(tuple((layer,) for layer in range(num_layers)), num_layers)

    @property
    def depth(self) -> int:
        """Number of blocks: the student's `num_hidden_layers`."""
        return len(self.blocks)

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers the student keeps, in order."""
        return tuple(layer for block in self.blocks for layer in block)

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Teacher layers the student lacks, in order."""
        return tuple(sorted(set(range(self.num_teacher_layers)) - set(self.layers)))

    @property
    def parallel_pairs(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of more than one layer that run in parallel."""
        return tuple(block for block in self.blocks if self.width(block) > 1)

    def width(self, block: tuple[int, ...]) -> int:
        """How many layers wide one of `blocks` is."""
        return 1 if block in self.merged else len(block)

    def position_of(self, layer: int) -> int:
        """Position of the student block that holds teacher layer `layer`."""
        for position, block in enumerate(self.blocks):
            if layer in block:
                return position
        raise LayerPruneError(f"layer {layer} is not in the plan; it holds layers {list(self.layers)}")

    def remove(self, layer: int) -> LayerPlan:
        """The plan without teacher layer `layer`."""
        position = self.position_of(layer)
        if (block := self.blocks[position]) in self.merged:
            raise LayerPruneError(f"layer {layer} is merged with others into one, {list(block)}; it cannot be removed")
        rest = tuple(other for other in block if other != layer)
        blocks = self.blocks[:position] + ((rest,) if rest else ()) + self.blocks[position + 1 :]
        if not blocks:
            raise LayerPruneError(f"layer {layer} is the last one left; a model needs at least one layer")
        return replace(self, blocks=blocks)

    def parallelize(self, *layers: int) -> LayerPlan:
        """The plan with neighbouring blocks, named by all their teacher layers, run in parallel as one."""
        return self._joined(layers, "run in parallel", self.merged)

    def merge(self, *layers: int) -> LayerPlan:
        """The plan with neighbouring blocks, named by all their teacher layers, merged into one of a layer's width."""
        plan = self._joined(layers, "be merged", self.parallel_pairs)
        return replace(plan, merged=(*plan.merged, tuple(layers)))

    def _joined(self, layers: tuple[int, ...], how: str, others: Iterable[tuple[int, ...]]) -> LayerPlan:
        """The plan with neighbouring blocks, none of them among `others`, as one."""
        first, last = (self.position_of(layer) for layer in (layers[0], layers[-1])) if layers else (0, -1)
        blocks = self.blocks[first : last + 1]
        if len(blocks) < 2 or sum(blocks, ()) != tuple(layers):
            raise LayerPruneError(
                f"layers {list(layers)} cannot {how}; name all layers of neighbouring blocks, in ascending order"
            )
        if wrong := set(blocks) & set(others):
            raise LayerPruneError(
                f"layers {list(layers)} cannot {how}: {', '.join(map(str, map(list, sorted(wrong))))} "
                f"{'are merged' if wrong <= set(self.merged) else 'run in parallel'} already"
            )
        merged = tuple(block for block in self.merged if block not in blocks)
        blocks = (*self.blocks[:first], tuple(layers), *self.blocks[last + 1 :])
        return replace(self, blocks=blocks, merged=merged)

    @property
    def unmerged_layers(self) -> tuple[int, ...]:
        """Teacher layers that are not merged with others, in order."""
        return tuple(layer for block in self.blocks if block not in self.merged for layer in block)

    def before_merges(self, teacher: LayerPlan) -> LayerPlan:
        """The plan with the blocks of `teacher` in place of each merged block that it lacks."""
        blocks: list[tuple[int, ...]] = []
        for block in self.blocks:
            is_new = block in self.merged and block not in teacher.merged
            blocks += [other for other in teacher.blocks if {*other} <= {*block}] if is_new else [block]
        return LayerPlan(tuple(blocks), self.num_teacher_layers, tuple({*teacher.merged} & {*blocks}))

    def check_kept_whole(self, merged: Iterable[tuple[int, ...]]) -> None:
        """Raise [`LayerPruneError`] if the plan takes blocks apart that are `merged` into one, in whatever way."""
        for block in merged:
            whole = any({*block} <= {*other} for other in self.merged)
            if not whole and {*block} & {*self.layers}:
                raise LayerPruneError(
                    f"the plan takes layers {list(block)} apart, which are merged into one in the model"
                )

    @property
    def shape(self) -> LayerPlan:
        """A plan without merges of the same shape: the first layer of each merged block takes its place."""
        blocks = tuple(block[:1] if block in self.merged else block for block in self.blocks)
        return LayerPlan(blocks, self.num_teacher_layers)

    def with_pairs(self, pairs: Iterable[Iterable[int]]) -> LayerPlan:
        """The plan with each of `pairs` (or longer groups) of neighbouring layers run in parallel as one block."""
        plan = self
        for pair in layer_groups(pairs):
            plan = plan.parallelize(*pair)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The form written to `config.json` and `plan.json`."""
        plan = {"num_teacher_layers": self.num_teacher_layers, "blocks": [list(block) for block in self.blocks]}
        return plan | ({"merged": [list(block) for block in self.merged]} if self.merged else {})

    @classmethod
    def from_dict(cls, data: Any) -> LayerPlan:
        """Read what `to_dict` wrote; treats it as outside input."""
        if not isinstance(data, Mapping) or set(data) - {"merged"} != {"num_teacher_layers", "blocks"}:
            raise LayerPruneError(
                'a layer plan is an object with the keys "num_teacher_layers" and "blocks", and maybe "merged"'
            )
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what `to_json` wrote, or raise [`LayerPruneError`]."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LayerPruneError(f"layer plan is not JSON: {error}") from None
        return cls.from_dict(data)


SEPARATORS = {"parallelize": "|", "merge": "+"}  # of the layers of a new block
EDIT_KINDS = ("remove", *SEPARATORS)
DEFAULT_KINDS = ("remove", "parallelize")  # a merge is fitted to data, which takes its time


@dataclass(frozen=True)
class Edit:
    """One change of a plan: remove a layer, or make one block of neighbouring ones, in parallel or merged.

    Args:
        kind (`str`): `"remove"`, `"parallelize"` or `"merge"`.
        layers (`tuple[int, ...]`): the teacher layer to remove, or all layers of the new block.
    """

    kind: str
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in EDIT_KINDS or (self.kind == "remove" and len(self.layers) != 1):
            raise LayerPruneError(
                f"{self.kind!r} of layers {self.layers} is not an edit; remove takes one layer, "
                f"{' and '.join(SEPARATORS)} take two or more"
            )

    @classmethod
    def remove(cls, layer: int) -> Edit:
        return cls("remove", (layer,))

    @classmethod
    def parallelize(cls, *layers: int) -> Edit:
        return cls("parallelize", layers)

    @classmethod
    def merge(cls, *layers: int) -> Edit:
        return cls("merge", layers)

    def apply(self, plan: LayerPlan) -> LayerPlan:
        """The plan after this edit; a [`LayerPruneError`] if the layers are not there, or not neighbours."""
        return getattr(plan, self.kind)(*self.layers)  # a kind of edit is a method of `LayerPlan`

    @property
    def label(self) -> str:
        """Its form in JSON: `"7"` removes layer 7, `"4|5"` runs 4 and 5 in parallel, `"4+5"` merges them."""
        return SEPARATORS.get(self.kind, "").join(map(str, self.layers))

    def __str__(self) -> str:
        return f"{self.kind} {self.label}"

    @classmethod
    def from_label(cls, label: str) -> Edit:
        """Read a `label`."""
        for kind, separator in SEPARATORS.items():
            if separator in label:
                return cls(kind, tuple(map(int, label.split(separator))))
        return cls.remove(int(label))


def edits_between(before: LayerPlan, after: LayerPlan) -> list[Edit]:
    """Edits that lead from one plan to another made of its layers: all removals, then the new blocks."""
    edits = [Edit.remove(layer) for layer in before.layers if layer not in after.layers]
    edits += [Edit.parallelize(*block) for block in after.parallel_pairs if block not in before.blocks]
    return edits + [Edit.merge(*block) for block in after.merged if block not in before.merged]
