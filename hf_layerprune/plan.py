"""The layer plan, and the edits that change it: which teacher layers a student keeps, and which run in parallel.

Every decision of the library is a `LayerPlan`. Layer indices are 0-based TEACHER indices everywhere; a position in
the student is called a block.

    ((0,), (1,), (2,), (4, 5), (6, 7), (9,))      # 3 and 8 removed; 4|5 and 6|7 run in parallel
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LayerPruneError

MAX_LAYERS = 10_000
"""Deeper than any teacher; a plan from outside that asks for more is a mistake, or meant to fill the memory."""


def layer_indices(layers: Iterable[int], what: str = "layers") -> list[int]:
    """Layer indices as a list of integers, whatever they came in.

    Raises:
        [`LayerPruneError`]: if they are anything else.
    """
    try:
        found = list(layers)
        if any(isinstance(layer, bool) for layer in found):
            raise TypeError
        return [operator.index(layer) for layer in found]
    except TypeError:
        raise LayerPruneError(f"{what}={layers!r:.200} must be a list of layer indices, such as [4, 9]") from None


@dataclass(frozen=True)
class LayerPlan:
    """Which teacher layers a student consists of.

    Args:
        blocks (`tuple[tuple[int, ...], ...]`):
            One tuple of teacher layer indices per student block. Indices ascend over the whole plan and appear once;
            a block of more than one layer runs them in parallel.
        num_teacher_layers (`int`, *optional*):
            Depth of the teacher. Defaults to the highest index in `blocks` plus one.

    Raises:
        [`LayerPruneError`]: if `blocks` is empty, an index is no layer of the teacher, or the order is wrong.
    """

    blocks: tuple[tuple[int, ...], ...]
    num_teacher_layers: int | None = None

    def __post_init__(self) -> None:
        try:
            blocks = tuple(tuple(block) for block in self.blocks)
        except TypeError:
            raise LayerPruneError(
                f"layer plan blocks={self.blocks!r:.200} is not a list of lists of layer indices"
            ) from None
        layers = [layer for block in blocks for layer in block]
        if not blocks or not all(blocks):
            raise LayerPruneError("layer plan has no blocks or an empty block; a model needs at least one layer")
        if any(type(layer) is not int or layer < 0 for layer in layers):
            raise LayerPruneError(f"layer plan holds {layers!r:.200}; layer indices are integers from 0")
        if any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
            raise LayerPruneError(f"layer plan holds {layers!r:.200}; layer indices must ascend without repeats")
        depth = layers[-1] + 1 if self.num_teacher_layers is None else self.num_teacher_layers
        if type(depth) is not int or not layers[-1] < depth <= MAX_LAYERS:
            raise LayerPruneError(
                f"layer plan uses layer {layers[-1]!r:.200} of a teacher of {depth!r:.200} layers; a teacher may have "
                f"{MAX_LAYERS}"
            )
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "num_teacher_layers", depth)

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
        """Blocks of more than one layer."""
        return tuple(block for block in self.blocks if len(block) > 1)

    def position_of(self, layer: int) -> int:
        """Position of the student block that holds teacher layer `layer`."""
        for position, block in enumerate(self.blocks):
            if layer in block:
                return position
        raise LayerPruneError(f"layer {layer} is not in the plan; it holds layers {list(self.layers)}")

    def remove(self, layer: int) -> LayerPlan:
        """The plan without teacher layer `layer`."""
        position = self.position_of(layer)
        rest = tuple(other for other in self.blocks[position] if other != layer)
        blocks = self.blocks[:position] + ((rest,) if rest else ()) + self.blocks[position + 1 :]
        if not blocks:
            raise LayerPruneError(f"layer {layer} is the last one left; a model needs at least one layer")
        return LayerPlan(blocks, self.num_teacher_layers)

    def parallelize(self, *layers: int) -> LayerPlan:
        """The plan with neighbouring blocks, named by all their teacher layers, merged into one."""
        first, last = self.position_of(layers[0]), self.position_of(layers[-1])
        merged = tuple(layer for block in self.blocks[first : last + 1] for layer in block)
        if len(layers) < 2 or merged != tuple(layers):
            raise LayerPruneError(
                f"layers {list(layers)} cannot run in parallel; name all layers of neighbouring blocks, in ascending "
                "order"
            )
        return LayerPlan((*self.blocks[:first], merged, *self.blocks[last + 1 :]), self.num_teacher_layers)

    def with_pairs(self, pairs: Iterable[Iterable[int]]) -> LayerPlan:
        """The plan with each of `pairs` (or longer groups) merged into one block.

        Raises:
            [`LayerPruneError`]: if a group is not made of whole neighbouring blocks.
        """
        plan = self
        for pair in pairs:
            plan = plan.parallelize(*layer_indices(pair, "a group of layers"))
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The form written to `config.json` and `plan.json`."""
        return {"num_teacher_layers": self.num_teacher_layers, "blocks": [list(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, data: Any) -> LayerPlan:
        """Read what `to_dict` wrote; treats it as outside input."""
        if not isinstance(data, Mapping) or set(data) != {"num_teacher_layers", "blocks"}:
            raise LayerPruneError('a layer plan is an object with exactly the keys "num_teacher_layers" and "blocks"')
        return cls(data["blocks"], data["num_teacher_layers"])

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what `to_json` wrote.

        Raises:
            [`LayerPruneError`]: if `text` is not JSON, or is not a valid plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LayerPruneError(f"layer plan is not JSON: {error}") from None
        return cls.from_dict(data)


EDIT_KINDS = ("remove", "parallelize")


@dataclass(frozen=True)
class Edit:
    """One change of a plan: remove a layer, or merge neighbouring blocks into one that runs in parallel.

    Args:
        kind (`str`): `"remove"` or `"parallelize"`.
        layers (`tuple[int, ...]`): the teacher layer to remove, or all layers of the new block.
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
        return getattr(plan, self.kind)(*self.layers)  # a kind of edit is a method of `LayerPlan`

    @property
    def label(self) -> str:
        """Its form in JSON: `"7"` removes layer 7, `"4|5"` runs layers 4 and 5 in parallel."""
        return "|".join(map(str, self.layers))

    def __str__(self) -> str:
        return f"{self.kind} {self.label}"

    @classmethod
    def from_label(cls, label: str) -> Edit:
        """Read a `label`."""
        layers = tuple(int(layer) for layer in label.split("|"))
        return cls("remove" if len(layers) == 1 else "parallelize", layers)


def edits_between(before: LayerPlan, after: LayerPlan) -> list[Edit]:
    """Edits that lead from one plan to another made of its layers: all removals, then the parallel blocks."""
    removed = [Edit.remove(layer) for layer in before.layers if layer not in after.layers]
    return removed + [Edit.parallelize(*block) for block in after.parallel_pairs if block not in before.blocks]
