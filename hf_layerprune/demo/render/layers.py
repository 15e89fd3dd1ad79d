"""The layer map of a plan: every layer of the original, what became of it, and what it costs to leave it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...layer_map import last_costs
from ...plan import Edit, LayerPlan
from ...report import criterion_unit, was_healed
from ...trainer.targets import named_layers, trained_blocks
from .text import escaped

SIZE, GAP = 44, 4
KINDS = {
    "kept": "kept as it was",
    "healed": "kept and healed",
    "paired": "in parallel, as one layer",
    "removed": "removed",
}


def render_layers(plan: LayerPlan, rounds: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The map, as one small drawing for each block, and the words that explain it.

    Args:
        plan ([`LayerPlan`]): of the compressed model.
        rounds (`Sequence[dict]`): records of the rounds that led to it; may be empty.
        settings (`dict`): of the run.
    """
    costs, when = last_costs(rounds), _rounds_of_edits(rounds)
    healed = healed_layers(rounds, settings)
    groups: list[tuple[int, ...]] = sorted([*plan.blocks, *((layer,) for layer in plan.removed_layers)])
    kinds, drawings = set(), []
    for group in groups:
        kind = _kind(group, plan, healed)
        kinds.add(kind)
        told = _told(group, kind, costs, when, healed, rounds)
        drawings.append(_drawing(group, kind, kind != "removed" and bool(set(group) & healed), told))
    legend = "".join(
        f'<li><svg class="lp-layer lp-{kind}" viewBox="0 0 20 20" aria-hidden="true">{_box(2, 16, kind)}'
        f"{_dot(15, 5) * (kind == 'healed')}</svg>{text}</li>"
        for kind, text in KINDS.items()
        if kind in kinds
    )
    wanted = "its score" if costs else "what became of it; this pair of models comes without a run's scores"
    explained = (
        f"{plan.num_teacher_layers} layers became {plan.depth}. Point at a layer, tap it, or step there with the Tab "
        f"key, for {wanted}."
    )
    return (
        f'<p class="lp-hint">{explained}</p><div class="lp-map" role="list" aria-label="layers of the original">'
        f'{"".join(drawings)}</div><ul class="lp-key">{legend}</ul>'
    )


def healed_layers(rounds: Sequence[dict[str, Any]], settings: dict[str, Any]) -> set[int]:
    """Layers of the original whose weights healing changed, in any of the rounds."""
    layers: set[int] = set()
    told = settings.get("trained_layers", "neighbours")
    trained = named_layers(told) or told
    for record in rounds:
        if not was_healed(record):
            continue
        plan = LayerPlan.from_dict(record["plan"])
        edits = [Edit.from_label(label) for label in record["edits"]]
        blocks = trained_blocks(plan, edits, trained)
        layers |= {layer for position in blocks for layer in plan.blocks[position]}
    return layers


def _rounds_of_edits(rounds: Sequence[dict[str, Any]]) -> dict[Edit, int]:
    return {Edit.from_label(label): record["round"] for record in rounds for label in record["edits"]}


def _kind(group: tuple[int, ...], plan: LayerPlan, healed: set[int]) -> str:
    if group[0] not in plan.layers:
        return "removed"
    return "paired" if len(group) > 1 else "healed" if group[0] in healed else "kept"


def _told(
    group: tuple[int, ...],
    kind: str,
    costs: dict[Edit, float],
    when: dict[Edit, int],
    healed: set[int],
    rounds: Sequence[dict[str, Any]],
) -> str:
    """What the tooltip says of a block."""
    several = len(group) > 1
    named = f"Layers {', '.join(map(str, group[:-1]))} and {group[-1]}" if several else f"Layer {group[0]}"
    edit = Edit.parallelize(*group) if several else Edit.remove(group[0])
    done = f"put {KINDS[kind]}," if kind == "paired" and edit in when else KINDS[kind]
    parts = [f"{named}: {done}" + (f" in round {when[edit]}" if edit in when else "")]
    if several and set(group) & healed:
        parts[0] += ", and healed"
    if edit in costs:
        unit = criterion_unit(rounds[-1]["criterion"]).replace(" without the layer", "")
        verb = "Cost" if edit in when else "Would cost"
        parts.append(f"{verb} {costs[edit]:.4f}: {unit}")
    return ". ".join(parts) + "."


def _drawing(group: tuple[int, ...], kind: str, healed: bool, told: str) -> str:
    width = len(group) * SIZE + (len(group) - 1) * GAP
    boxes = "".join(
        _box(n * (SIZE + GAP) + 2, SIZE - 4, kind)
        + f'<text x="{n * (SIZE + GAP) + SIZE / 2}" y="{SIZE / 2 + 5}" text-anchor="middle">{layer}</text>'
        for n, layer in enumerate(group)
    )
    links = "".join(
        f'<line x1="{(n + 1) * (SIZE + GAP) - GAP - 3}" x2="{(n + 1) * (SIZE + GAP) + 3}" y1="{y}" y2="{y}"/>'
        for n in range(len(group) - 1)
        for y in (SIZE / 2 - 8, SIZE / 2 + 8)
    )
    dot = _dot(width - 8, 8) if healed else ""
    text = escaped(told)
    return (
        f'<span class="lp-block" role="listitem" tabindex="0" aria-label="{text}" data-told="{text}">'
        f'<svg class="lp-layer lp-{kind}" width="{width}" height="{SIZE}" viewBox="0 0 {width} {SIZE}" '
        f'aria-hidden="true">{links}{boxes}{dot}</svg></span>'
    )


def _box(x: float, size: float, kind: str) -> str:
    cross = (
        f'<line class="lp-cross" x1="{x + 4}" y1="{size - 2}" x2="{x + size - 4}" y2="6"/>'
        if kind == "removed"
        else ""
    )
    return f'<rect x="{x}" y="2" width="{size}" height="{size}" rx="5"/>{cross}'


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x}" cy="{y}" r="3"/>'
