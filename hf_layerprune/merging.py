"""Merge neighbouring layers into one layer of one layer's width, in closed form.

Side by side the layers are one block, as wide as all of them (see `models/`). After
[FlattenGPT](https://huggingface.co/papers/2602.08858) that block is cut back to the width of a single layer: it keeps
the groups of heads that add most to the residual stream, and the neurons that the others can least stand in for. Then
what reads them is refitted by ridge regression: `o_proj` to what all heads add, and `down_proj` to the state that the
teacher has after the last of the layers.

Shapes: B batch, T positions, N unpadded tokens, H hidden, D of a head, I neurons of a layer, n layers to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .architectures import check_parallel
from .compensation import (
    DEFAULT_RIDGE,
    MAX_BYTES,
    Repair,
    apply_plan_and_repair,
    check_repairable,
    run_both,
    target_state,
)
from .data import Batch
from .forward import inference, inputs_of, record, to_device, unpadded
from .models.modeling_pruned_qwen2 import HEAD_NORMS, join_layers
from .plan import Edit, layer_groups
from .regression import Inputs, Regression, solve_ridge
from .surgery import apply_plan, check_in_memory, check_model, copy_requires_grad, plan_of

LEVERAGE_RIDGE = 10.0  # in mean eigenvalues of the activations' Gram matrix
DOWN = "mlp.down_proj.weight"


def merge(
    model: PreTrainedModel,
    pairs: Iterable[Iterable[int]],
    batches: Iterable[Batch],
    teacher: PreTrainedModel | None = None,
    ridge: float = DEFAULT_RIDGE,
    on_batch: Callable[[], None] = lambda: None,
    *,
    share_weights: bool = False,
) -> PreTrainedModel:
    """A new model with neighbouring layers merged into one layer, without training; `model` is left untouched.

    After [FlattenGPT](https://huggingface.co/papers/2602.08858), from the bottom up, so that each merge sees those
    below it.

    Args:
        model ([`~transformers.PreTrainedModel`]): a Qwen2, Qwen3, Llama or Mistral, possibly pruned before.
        pairs (`Iterable[tuple[int, ...]]`):
            Teacher layer indices, 0-based. Each pair (or longer group) must be neighbours in `model`, none in a
            parallel block, and name all layers of a block that was merged before.
        batches (`Iterable[dict[str, Tensor]]`): calibration data, as in [`score`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): whose states are to be matched; `model` by default.
        ridge, on_batch: see [`compensate`].
        share_weights: see [`apply_plan`].

    Returns:
        A model of the same class, a layer less deep for each pair, its `config.layer_plan` set.

    Raises:
        [`LayerPruneError`]: for an unsupported architecture, layers that are not neighbours, or data without a token.
    """
    check_model(model)
    groups = sorted(layer_groups(pairs))
    teacher = model if teacher is None else teacher
    batches = check_repairable(model, batches, teacher, sum(groups, ()))
    student = start = apply_plan(model, plan_of(model), share_weights=share_weights)
    for group in groups:
        found = find_merges(student, batches, [group], teacher, ridge, on_batch)
        student = apply_plan_and_repair(student, plan_of(student).merge(*group), found[group])
    copy_requires_grad(start, student)
    return student


def edited(
    model: PreTrainedModel,
    edit: Edit,
    batches: Iterable[Batch],
    teacher: PreTrainedModel,
    on_batch: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """`model` after `edit`, weights shared; a merge is fitted to `batches`."""
    if edit.kind == "merge":
        return merge(model, [edit.layers], batches, teacher, on_batch=on_batch, share_weights=True)
    return apply_plan(model, edit.apply(plan_of(model)), share_weights=True)


class _Merge(NamedTuple):
    group: tuple[int, ...]
    start: int  # position in the model of the first of the group
    layers: list[nn.Module]
    target: int  # number of the teacher's state which the new layer must hand on


def find_merges(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    groups: Iterable[tuple[int, ...]],
    teacher: PreTrainedModel,
    ridge: float = DEFAULT_RIDGE,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[tuple[int, ...], Repair]:
    """The layer that each of `groups` alone becomes. No model is changed; arguments as in [`merge`].

    The data is read twice; more often if the equations of all groups take more than `MAX_BYTES`.
    """
    check_parallel(model.config)
    check_in_memory(model, teacher)
    plan, teacher_plan, merges = plan_of(model), plan_of(teacher), []
    for group in dict.fromkeys(groups):
        after, start, last = plan.merge(*group), plan.position_of(group[0]), plan.position_of(group[-1])
        layers = list(model.base_model.layers[start : last + 1])
        merges.append(_Merge(group, start, layers, target_state(start, after, teacher_plan)))
    num_tokens = sum(int(unpadded(batch).sum()) for batch in batches)
    sizes = [_sizes(one.layers) for one in merges]
    num_bytes = [4 * (heads**2 + min(num_tokens, neurons) * neurons) for heads, neurons in sizes]
    at_once = max(1, MAX_BYTES // max(num_bytes, default=1))
    found = {}
    with inference(model, teacher):
        for first in range(0, len(merges), at_once):
            some, is_last = merges[first : first + at_once], first + at_once >= len(merges)
            narrow = _cut_back(model, batches, some, num_tokens, ridge)
            fits = _fits(model, teacher, batches, some, narrow, num_tokens, on_batch if is_last else lambda: None)
            for one, tensors, fit in zip(some, narrow, fits, strict=True):
                found[one.group] = Repair(one.start, tensors | {DOWN: fit.solve(ridge)})
    return found


def _sizes(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """How many numbers the heads, and the neurons, of all `layers` give for a token."""
    heads, neurons = ([layer.self_attn.o_proj for layer in layers], [layer.mlp.down_proj for layer in layers])
    return sum(part.in_features for part in heads), sum(part.in_features for part in neurons)


def _cut_back(
    model: PreTrainedModel, batches: Sequence[Batch], merges: Sequence[_Merge], num_tokens: int, ridge: float
) -> list[dict[str, Tensor]]:
    """The layer of each merge, with the heads and neurons that are kept, and `down_proj` as it was."""
    read = [[Inputs(size, num_tokens, model.device) for size in _sizes(one.layers)] for one in merges]
    for batch in batches:
        batch = to_device(batch, model.device)
        run, valid = record(model, batch, {one.start for one in merges}, stop=True), unpadded(batch)
        for one, both in zip(merges, read, strict=True):
            parts = _side_by_side(one.layers, run.states[one.start], run.arguments[one.start])
            for kept, part in zip(both, parts, strict=True):
                kept.add(part[valid].float())
    with torch.autocast(model.device.type, enabled=False):
        return [
            _kept_part(one.layers, heads.gram(), neurons.leverage(LEVERAGE_RIDGE), num_tokens, ridge)
            for one, (heads, neurons) in zip(merges, read, strict=True)
        ]


def _side_by_side(layers: Sequence[nn.Module], state: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What `o_proj`, `(B, T, n * heads * D)`, and `down_proj`, `(B, T, n * I)`, of layers with one input read."""
    heads, added, neurons = [], [], []
    for layer in layers:
        with inputs_of(layer.self_attn.o_proj) as read:
            added.append(layer.self_attn(layer.input_layernorm(state), **arguments)[0])
        heads += read
    state = state + sum(added)
    for layer in layers:
        with inputs_of(layer.mlp.down_proj) as read:
            layer.mlp(layer.post_attention_layernorm(state))
        neurons += read
    return torch.cat(heads, dim=-1), torch.cat(neurons, dim=-1)


def _kept_part(
    layers: Sequence[nn.Module], heads: Tensor, scores: Tensor, num_tokens: int, ridge: float
) -> dict[str, Tensor]:
    """The tensors of one layer of the heads and neurons that count, by the Gram matrix of what `o_proj` reads and the
    leverage `scores` of the neurons."""
    wide = join_layers([{name: tensor.detach() for name, tensor in layer.named_parameters()} for layer in layers])
    output, head_dim = wide["self_attn.o_proj.weight"], layers[0].self_attn.head_dim
    num_groups = len(wide["self_attn.k_proj.weight"]) // head_dim  # each a head of keys and values, and its queries
    has_norms = "self_attn.k_norm.weight" in wide  # of which a layer has only one set
    groups = _strongest_groups(heads, output, num_groups, len(layers), of_one_layer=has_norms)
    keys, queries = (
        (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
        for size in (head_dim, output.shape[1] // num_groups)
    )
    missing = heads[queries] @ output.float().T - heads[queries][:, queries] @ output[:, queries].float().T
    change = solve_ridge(heads[queries][:, queries], missing, ridge, num_tokens)
    kept = scores.topk(len(scores) // len(layers)).indices.sort().values
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": kept, "up_proj": kept}
    tensors = {}
    for name, tensor in wide.items():
        if name in HEAD_NORMS:
            tensor = tensor[int(groups[0]) * len(layers) // num_groups]
        elif (projection := name.split(".")[-2]) in rows:
            tensor = tensor[rows[projection]]
        tensors[name] = tensor
    tensors[DOWN] = wide[DOWN][:, kept]
    tensors["self_attn.o_proj.weight"] = (output[:, queries].float() + change.T).to(output.dtype)
    return tensors


def _strongest_groups(
    heads: Tensor, output: Tensor, num_groups: int, num_layers: int, *, of_one_layer: bool
) -> Tensor:
    """The groups of heads that add most to the residual stream: as many as a layer has, perhaps all `of_one_layer`."""
    size = len(heads) // num_groups
    parts = [slice(start, start + size) for start in range(0, len(heads), size)]
    added = torch.stack([(output[:, p].float() @ heads[p, p] * output[:, p].float()).sum() for p in parts])
    if of_one_layer:
        best = added.view(num_layers, -1).sum(dim=1).argmax()
        return torch.arange(num_groups, device=heads.device).view(num_layers, -1)[best]
    return added.topk(num_groups // num_layers).indices.sort().values


def _fits(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    merges: Sequence[_Merge],
    narrow: Sequence[dict[str, Tensor]],
    num_tokens: int,
    on_batch: Callable[[], None],
) -> list[Regression]:
    """The regressions that find the `down_proj` of each of the `narrow` layers."""
    fits = [Regression(tensors[DOWN], num_tokens) for tensors in narrow]
    starts, targets = {one.start for one in merges}, {one.target for one in merges}
    for batch in batches:
        run, wanted = run_both(model, teacher, batch, starts, targets)
        valid = unpadded(batch).to(model.device)
        for one, tensors, fit in zip(merges, narrow, fits, strict=True):
            layer = one.layers[0]  # of the right shape
            with inputs_of(layer.mlp.down_proj) as read:
                state = (run.states[one.start],)
                output = functional_call(layer, tensors, state, run.arguments[one.start])
            fit.add(read[0][valid].float(), wanted[one.target][valid].float() - output[valid].float())
        on_batch()
    return fits
