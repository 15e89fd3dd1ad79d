"""Repair without training: match the states across a gap in closed form and fold the correction into existing weights.

Where layers were left out, the block behind the gap is fed with states it has never seen. Two repairs, neither of
which adds a parameter:

- `"rescale"`, as in [Prune&Comp](https://huggingface.co/papers/2507.18212): removed layers made the residual stream
  longer, so it is multiplied by the mean ratio alpha of its norm behind and before them. Every block reads the stream
  through an RMSNorm, to which only proportions matter, so the stream, with the embedding that may be tied to the head,
  stays as it is and what is added to it LATER is divided by alpha: `o_proj` and `down_proj` of all blocks behind.
- `"least_squares"`, after [ReplaceMe](https://huggingface.co/papers/2505.02819): the block before the gap gets its
  `down_proj` refitted by ridge regression so that its output is what the teacher had BEHIND the removed layers.

A gap is between two blocks, in front of the first or behind the last. A student was repaired by one method or by the
other: after `"rescale"` its states are no longer on the teacher's scale, which `"least_squares"` compares them with.

Shapes: B batch, T positions, N unpadded positions, H hidden, I neurons of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import check_supported, output_projections
from .data import Batch, check_batches
from .errors import LayerPruneError
from .forward import Reached, check_same_vocabulary, measuring, run_for_hooks
from .plan import LayerPlan
from .surgery import apply_plan, plan_of

COMPENSATIONS = ("none", "rescale", "least_squares")
DEFAULT_RIDGE = 5.0  # on the embedded teacher near the best at 4 and at 16 tokens per neuron; fewer help little
MAX_NORMAL_BYTES = 2**32


@dataclass(frozen=True)
class Repair:
    """What makes up for leaving out neighbouring layers.

    Attributes:
        layers (`tuple[int, ...]`): the removed teacher layers.
        position (`int`): the block before the gap, the same in the model and in the student without the layers; -1 if
            there is none.
        scale (`float`): what the state entering the block behind the gap is multiplied by.
        weight (`Tensor` of shape `(H, I)`, *optional*): new `mlp.down_proj.weight` of the block before the gap.
    """

    layers: tuple[int, ...]
    position: int
    scale: float = 1.0
    weight: Tensor | None = None

    @property
    def nothing(self) -> bool:
        """Whether it changes nothing."""
        return self.weight is None and self.scale == 1.0


def find_repairs(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    layers: Iterable[int],
    method: str,
    teacher: PreTrainedModel | None = None,
    ridge: float = DEFAULT_RIDGE,
    max_bytes: int = MAX_NORMAL_BYTES,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[int, Repair]:
    """For each of `layers` alone, the repair that leaving it out of `model` needs; no model is changed.

    All come from the same pass over the data: a block is before one gap only, so each has its own normal equations.

    Args:
        model ([`~transformers.PreTrainedModel`]): holds the layers; possibly a student pruned or parallelized before.
        batches (`Iterable[dict[str, Tensor]]`): calibration data; padding never counts.
        layers (`Iterable[int]`): teacher layer indices.
        method (`str`): `"none"`, `"rescale"` or `"least_squares"`.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            The model whose states are to be met: the ORIGINAL teacher where `model` is a student. Defaults to `model`.
        ridge (`float`, *optional*, defaults to `5.0`):
            How firmly `"least_squares"` holds on to the present weights, in tokens: every neuron's weights are held as
            if `ridge` tokens of mean energy had found them right. So the less data there is, the less they move.
        max_bytes (`int`, *optional*, defaults to 4 GiB):
            Size of the normal equations held at a time, `4 (I I + I H)` bytes per block; always at least one block's.
            If they need more, the data is read several times. To solve those of one block takes four times its size.
        on_batch (`Callable[[], None]`, *optional*): called after every batch of the last pass, for progress bars.

    Returns:
        A [`Repair`] per layer. It is nothing where no weight could take it: for `"rescale"` behind the last block, for
        `"least_squares"` in front of the first, and for a layer inside a parallel block, which leaves no gap.

    Raises:
        [`LayerPruneError`]: for an unknown method, a layer `model` or `teacher` lacks, a teacher that is none of
            `model`, or data without a token.
    """
    teacher = model if teacher is None else teacher
    plan, layers = plan_of(model), list(dict.fromkeys(layers))
    _check(model, teacher, method, ridge, layers)
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    gaps = [_Gap.of((layer,), plan.remove(layer), plan_of(teacher)) for layer in layers]
    alone = [gap for gap in gaps if gap.layers in plan.blocks]
    found = {gap.layers[0]: gap.repair() for gap in gaps}
    repairs = _solve(model, teacher, batches, alone, method, ridge, max_bytes, on_batch)
    return found | {repair.layers[0]: repair for repair in repairs}


def apply_repair(student: PreTrainedModel, repair: Repair) -> None:
    """Repair `student`, which lacks the layers, in place.

    The weights that change get memory of their own, so a model that `student` shares weights with stays as it is.

    Raises:
        [`LayerPruneError`]: if `student` still has the layers, or the block before them is another one than in the
            student that the repair was found for.
    """
    plan = plan_of(student)
    if present := sorted(set(repair.layers) & set(plan.layers)):
        raise LayerPruneError(f"the repair is for a student without layers {list(repair.layers)}; it has {present}")
    if _position_before(plan, repair.layers[0]) != repair.position:
        raise LayerPruneError(
            f"the repair for leaving out layers {list(repair.layers)} was found for another student; find it again "
            "after every removal"
        )
    if repair.weight is not None:
        projection = output_projections(student, repair.position)[1]
        projection.weight.data = repair.weight.to(projection.weight, copy=True)
    if repair.scale != 1.0:
        for position in range(repair.position + 1, plan.depth):
            for projection in output_projections(student, position):
                scaled = projection.weight.data.float() / repair.scale
                projection.weight.data = scaled.to(projection.weight.dtype)


def compensate(
    student: PreTrainedModel,
    batches: Iterable[Batch],
    method: str,
    teacher: PreTrainedModel,
    gaps: Iterable[int] | None = None,
    ridge: float = DEFAULT_RIDGE,
    on_batch: Callable[[], None] = lambda: None,
    *,
    share_weights: bool = False,
) -> PreTrainedModel:
    """A new model: `student` with its gaps repaired, from the bottom up, so that each repair sees those below it.

    Args:
        student ([`~transformers.PreTrainedModel`]): a model that lacks some layers.
        batches (`Iterable[dict[str, Tensor]]`): calibration data; `"least_squares"` reads it once per gap.
        method (`str`): `"none"`, `"rescale"` or `"least_squares"`.
        teacher ([`~transformers.PreTrainedModel`]): the model with those layers.
        gaps (`Iterable[int]`, *optional*):
            Teacher layers that `student` lacks and is to be repaired for; all by default. Neighbouring layers are one
            gap. If a gap lies within a parallel block, `"least_squares"` refits that block, `"rescale"` does nothing.
        ridge (`float`, *optional*): see [`find_repairs`].
        on_batch (`Callable[[], None]`, *optional*): called after every batch of every gap.
        share_weights (`bool`, *optional*, defaults to `False`): whether what is not changed shares memory with
            `student`; see [`apply_plan`].

    Raises:
        [`LayerPruneError`]: as [`find_repairs`]; if `gaps` names a layer that `student` has.
    """
    plan = plan_of(student)
    layers = sorted(set(plan.removed_layers if gaps is None else gaps))
    if wrong := sorted(set(layers) - set(plan.removed_layers)):
        raise LayerPruneError(f"gaps={layers}: layers {wrong} are not missing; {list(plan.removed_layers)} are")
    _check(student, teacher, method, ridge, layers)
    batches = check_batches(batches, student.config.vocab_size, "calibration data")
    repaired = apply_plan(student, plan, share_weights=share_weights)
    todo = [_Gap.of(stretch, plan, plan_of(teacher)) for stretch in _stretches(layers)]
    rounds = [[gap] for gap in todo] if method == "least_squares" else [todo]  # the teacher alone tells the scales
    for gaps_at_once in rounds:
        for repair in _solve(repaired, teacher, batches, gaps_at_once, method, ridge, MAX_NORMAL_BYTES, on_batch):
            apply_repair(repaired, repair)
    return repaired


@dataclass(frozen=True)
class _Gap:
    """Removed neighbouring layers. A state is found where a block of the teacher is entered: `before` the first of
    them, `behind` the last; `target` is what the next kept layer read."""

    layers: tuple[int, ...]
    position: int
    before: int
    behind: int
    target: int
    can_rescale: bool

    @classmethod
    def of(cls, layers: tuple[int, ...], plan: LayerPlan, reference: LayerPlan) -> _Gap:
        """The gap in `plan`, which lacks `layers`, seen in the teacher's plan `reference`."""

        def entry(layer: int) -> int:
            return sum(block[-1] < layer for block in reference.blocks)

        position = _position_before(plan, layers[0])
        is_last = position + 1 == plan.depth
        inside = position >= 0 and plan.blocks[position][-1] > layers[-1]
        target = len(reference.blocks) if is_last else entry(plan.blocks[position + 1][0])
        return cls(layers, position, entry(layers[0]), entry(layers[-1] + 1), target, not (is_last or inside))

    def repair(self, scale: float = 1.0, weight: Tensor | None = None) -> Repair:
        return Repair(self.layers, self.position, scale, weight)


def _position_before(plan: LayerPlan, layer: int) -> int:
    """Position of the last block with a layer below `layer`; -1 if there is none."""
    return sum(block[0] < layer for block in plan.blocks) - 1


def _stretches(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Ascending layers, cut where they are no neighbours."""
    stretches: list[tuple[int, ...]] = []
    for layer in layers:
        if stretches and stretches[-1][-1] == layer - 1:
            stretches[-1] += (layer,)
        else:
            stretches.append((layer,))
    return stretches


def check_compensation(method: str) -> None:
    """Raise [`LayerPruneError`] unless there is such a method."""
    if method not in COMPENSATIONS:
        raise LayerPruneError(f"compensation={method!r} is unknown; choose one of {', '.join(COMPENSATIONS)}")


def _check(model: PreTrainedModel, teacher: PreTrainedModel, method: str, ridge: float, layers: Sequence[int]) -> None:
    check_compensation(method)
    if not 0 < ridge < float("inf"):
        raise LayerPruneError(f"ridge={ridge} is out of range; it must be above 0, such as {DEFAULT_RIDGE}")
    for each in (model, teacher):
        check_supported(each.config)
        if any(parameter.is_meta for parameter in each.parameters()):
            raise LayerPruneError("the model is partly on disk or in CPU memory; load it on one device to repair it")
    check_same_vocabulary(model, teacher)
    plan, reference = plan_of(model), plan_of(teacher)
    sizes = [(p.num_teacher_layers, m.config.hidden_size) for p, m in ((plan, model), (reference, teacher))]
    if sizes[0] != sizes[1]:
        raise LayerPruneError(
            "the model was not made of this teacher: it stems from {} layers of {} hidden units, the teacher from {} "
            "of {}".format(*sizes[0], *sizes[1])
        )
    if unknown := sorted(set(layers) - set(reference.layers)):
        raise LayerPruneError(f"layers {unknown} are not in the teacher; it has {list(reference.layers)}")


def _solve(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    gaps: Sequence[_Gap],
    method: str,
    ridge: float,
    max_bytes: int,
    on_batch: Callable[[], None],
) -> list[Repair]:
    """The repairs of gaps that have different blocks before them; `model` may have the layers or lack them."""
    with measuring(model, teacher):
        if method == "rescale":
            gaps = [gap for gap in gaps if gap.can_rescale]
            scales = _scales(teacher, batches, gaps, on_batch) if gaps else []
            return [gap.repair(scale=scale) for gap, scale in zip(gaps, scales, strict=True)]
        repairs = []
        if method == "least_squares":
            groups = _groups(model, [gap for gap in gaps if gap.position >= 0], max_bytes)
            for group in groups:
                report = on_batch if group is groups[-1] else lambda: None
                weights = _refitted(model, teacher, batches, group, ridge, report)
                repairs += [gap.repair(weight=weight) for gap, weight in zip(group, weights, strict=True)]
        return repairs


def _scales(
    teacher: PreTrainedModel, batches: Sequence[Batch], gaps: Sequence[_Gap], on_batch: Callable[[], None]
) -> list[float]:
    """Per gap the mean over tokens of the norm of the teacher's state behind it over the norm before it."""
    entries = {entry for gap in gaps for entry in (gap.before, gap.behind)}
    totals, num_tokens = [0.0] * len(gaps), 0
    for batch in batches:
        with _recorded(teacher, entries, ()) as (states, _):
            valid = run_for_hooks(teacher, batch)
        norms = {entry: states[entry][valid].float().norm(dim=-1) for entry in entries}
        for index, gap in enumerate(gaps):
            totals[index] += (norms[gap.behind] / norms[gap.before]).double().sum().item()
        num_tokens += int(valid.sum())
        on_batch()
    return [total / num_tokens for total in totals]


def _refitted(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    gaps: Sequence[_Gap],
    ridge: float,
    on_batch: Callable[[], None],
) -> list[Tensor]:
    """Per gap the new `down_proj.weight` of the block before it, `(H, I)` in the model's dtype."""
    projections = [output_projections(model, gap.position)[1] for gap in gaps]
    equations = [_NormalEquations(projection.weight) for projection in projections]
    positions, targets = {gap.position for gap in gaps}, {gap.target for gap in gaps}
    outputs = {position + 1 for position in positions}  # what leaves a block enters the next
    for batch in batches:
        with ExitStack() as stack:
            apart = teacher is not model  # then neither runs further than it is read
            wanted, _ = stack.enter_context(_recorded(teacher, targets, (), stop=apart))
            states, neurons = stack.enter_context(_recorded(model, outputs, positions, stop=apart))
            valid = run_for_hooks(model, batch)
            if teacher is not model:
                run_for_hooks(teacher, batch)
        for gap, equation in zip(gaps, equations, strict=True):
            target = wanted[gap.target].to(model.device)[valid]
            error = target.float() - states[gap.position + 1][valid].float()
            equation.add(neurons[gap.position][valid].float(), error)
        on_batch()
    return [
        (projection.weight.float() + equation.correction(ridge)).to(projection.weight.dtype)
        for projection, equation in zip(projections, equations, strict=True)
    ]


class _NormalEquations:
    """Finds C `(H, I)` with least |E - A C'|^2 + ridge |A|^2 / N |C|^2, for activations A `(N, I)` and what the
    block's output lacks E `(N, H)`. C is added to `down_proj`, so the penalty holds on to its present weights."""

    def __init__(self, weight: Tensor) -> None:
        self.gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)  # A'A
        self.cross = weight.new_zeros(weight.shape[1], weight.shape[0], dtype=torch.float32)  # A'E
        self.num_tokens = 0

    def add(self, neurons: Tensor, error: Tensor) -> None:
        self.gram.addmm_(neurons.T, neurons)
        self.cross.addmm_(neurons.T, error)
        self.num_tokens += len(neurons)

    def correction(self, ridge: float) -> Tensor:
        device = "cpu" if self.gram.device.type == "mps" else self.gram.device  # float64 is missing there
        gram, cross = (matrix.to(device, torch.float64) for matrix in (self.gram, self.cross))
        gram.diagonal().add_(ridge * gram.trace() / self.num_tokens)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solution = torch.cholesky_solve(cross, factor)
        if failed or not solution.isfinite().all():
            raise LayerPruneError(
                f"ridge={ridge} is too small for the normal equations of this data, or the model's states are not "
                "finite; choose a larger ridge"
            )
        return solution.T.to(self.gram)


def _groups(model: PreTrainedModel, gaps: Sequence[_Gap], max_bytes: int) -> list[list[_Gap]]:
    """The gaps in groups whose normal equations fit into `max_bytes`."""
    groups: list[list[_Gap]] = []
    free = 0
    for gap in gaps:
        rows, columns = output_projections(model, gap.position)[1].weight.shape
        size = 4 * columns * (columns + rows)
        if not groups or size > free:
            groups.append([])
            free = max_bytes
        groups[-1].append(gap)
        free -= size
    return groups


@contextmanager
def _recorded(
    model: PreTrainedModel, entries: Collection[int], positions: Iterable[int], stop: bool = False
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """What one forward pass feeds into blocks, the norm after the last counted as one, and into their `down_proj`.

    Filled when the model runs: states `(B, T, H)` by entry and activations `(B, T, I)` by position. With `stop` the
    pass ends at the last of `entries`, which must come after all of `positions`.
    """
    states: dict[int, Tensor] = {}
    neurons: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], key: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            into[key] = args[0]
            if stop and into is states and key == max(entries):
                raise Reached

        return module.register_forward_pre_hook(record)

    layers, norm = model.base_model.layers, model.base_model.norm
    handles = [keep(states, entry, [*layers, norm][entry]) for entry in entries]
    handles += [keep(neurons, position, output_projections(model, position)[1]) for position in positions]
    try:
        yield states, neurons
    finally:
        for handle in handles:
            handle.remove()
