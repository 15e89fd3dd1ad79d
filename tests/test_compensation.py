"""Repairs against what they promise, written out: stacked activations, a stream that really is scaled."""

import copy

import pytest
import torch
from conftest import random_batches, tiny_model

from hf_layerprune import LayerPlan, LayerPruneError, evaluate_model, parallelize, prune
from hf_layerprune.compensation import DEFAULT_RIDGE, Repair, apply_repair, compensate, find_repairs
from hf_layerprune.forward import final_states
from hf_layerprune.surgery import apply_plan


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, tensors):
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def states(model, batch):
    """Unnormed states `(N, H)` at every entry, the last block's output being the last, and every block's neurons."""
    entered, neurons, handles = [], [], []
    valid = batch["attention_mask"].bool()
    for module in (*model.model.layers, model.model.norm):
        handles.append(module.register_forward_pre_hook(lambda _, args: entered.append(args[0][valid])))
    for layer in model.model.layers:
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: neurons.append(args[0][valid])))
    final_states(model, batch)
    for handle in handles:
        handle.remove()
    return entered, neurons


def stacked(model, batches):
    """`states` of all batches."""
    found = [states(model, batch) for batch in batches]
    return [[torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*found, strict=True)]


def dense_refit(model, batches, position, target, ridge):
    """The new `down_proj` by `lstsq` on all activations at once, the penalty as further rows."""
    entered, neurons = stacked(model, batches)
    weight = model.model.layers[position].mlp.down_proj.weight.detach().double()
    a = neurons[position].double()
    wanted = target.double() - entered[position + 1].double() + a @ weight.T  # t - y
    strength = (ridge * a.pow(2).sum() / len(a)).sqrt()
    rows = torch.cat([a, strength * torch.eye(a.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, strength * weight.T])).solution.T.float()


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_refit_is_the_dense_least_squares_solution(model, batches, layer):
    repair = find_repairs(model, batches, [layer], "least_squares", ridge=0.02)[layer]
    target = stacked(model, batches)[0][layer + 1]
    assert repair.position == layer - 1 and repair.scale == 1.0
    expected = dense_refit(model, batches, layer - 1, target, 0.02)
    torch.testing.assert_close(repair.weight, expected, atol=2e-4, rtol=1e-3)


def test_refit_of_a_pruned_and_parallel_student_meets_the_original_teacher(batches):
    teacher = tiny_model(num_layers=8)
    student = apply_plan(teacher, LayerPlan(((0,), (1, 2), (4,), (6, 7)), 8))  # lacks 3 and 5
    targets = stacked(teacher, batches)[0]
    repair = find_repairs(student, batches, [4], "least_squares", teacher, ridge=0.02)[4]
    assert repair.weight.shape == (32, 2 * 48)
    torch.testing.assert_close(repair.weight, dense_refit(student, batches, 1, targets[6], 0.02), atol=2e-4, rtol=1e-3)
    left = prune(student, [4])
    repaired = compensate(left, batches, "least_squares", teacher, gaps=[4], ridge=0.02)
    torch.testing.assert_close(repaired.model.layers[1].mlp.down_proj.weight, repair.weight, atol=1e-5, rtol=1e-4)

    inside = apply_plan(teacher, LayerPlan(((0,), (1, 3), (4,), (5,), (6,), (7,)), 8))  # lacks 2, beside 1 and 3
    repaired = compensate(inside, batches, "least_squares", teacher, ridge=0.02)
    expected = dense_refit(inside, batches, 1, targets[4], 0.02)
    torch.testing.assert_close(repaired.model.layers[1].mlp.down_proj.weight, expected, atol=2e-4, rtol=1e-3)
    assert same(compensate(inside, batches, "rescale", teacher), inside.state_dict())


@pytest.mark.parametrize("method", ["rescale", "least_squares"])
@pytest.mark.parametrize("max_bytes", [2**32, 1])
def test_one_pass_for_all_layers_is_compensating_each(model, batches, method, max_bytes):
    seen = []
    repairs = find_repairs(model, batches, range(5), method, max_bytes=max_bytes, on_batch=lambda: seen.append(1))
    assert list(repairs) == list(range(5)) and len(seen) == len(batches)
    for layer, repair in repairs.items():
        student = prune(model, [layer], share_weights=True)
        apply_repair(student, repair)
        expected = compensate(prune(model, [layer]), batches, method, model)
        for (name, tensor), other in zip(student.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(tensor, other, atol=1e-5, rtol=1e-4, msg=name)
    assert [layer for layer, repair in repairs.items() if repair.nothing] == [4 if method == "rescale" else 0]


@pytest.mark.parametrize("layer", [0, 2])
def test_folded_scale_is_a_scaled_stream(batches, layer):
    teacher = tiny_model(rms_norm_eps=1e-12)
    entered = stacked(teacher, batches)[0]
    scale = (entered[layer + 1].norm(dim=-1) / entered[layer].norm(dim=-1)).mean().item()
    repair = find_repairs(teacher, batches, [layer], "rescale")[layer]
    assert repair.scale == pytest.approx(scale, rel=1e-5) and abs(scale - 1) > 0.05
    student = prune(teacher, [layer])
    folded = compensate(student, batches, "rescale", teacher)
    assert torch.equal(folded.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    behind = student.model.layers[layer]
    behind.register_forward_pre_hook(lambda _, args: (args[0] * scale, *args[1:]))
    for batch in batches:
        valid = batch["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(final_states(folded, batch)[valid], final_states(student, batch)[valid])


def test_scales_of_several_gaps_multiply_and_neighbours_are_one_gap(batches):
    teacher = tiny_model(num_layers=7)
    one = {layer: r.scale for layer, r in find_repairs(teacher, batches, [1], "rescale").items()}
    entered = stacked(teacher, batches)[0]
    two = (entered[5].norm(dim=-1) / entered[3].norm(dim=-1)).mean().item()
    student = prune(teacher, [1, 3, 4])
    repaired = compensate(student, batches, "rescale", teacher)
    weights = [[m.model.layers[i].self_attn.o_proj.weight for m in (student, repaired)] for i in range(4)]
    for (before, after), scale in zip(weights, (1, one[1], one[1] * two, one[1] * two), strict=True):
        torch.testing.assert_close(before / scale, after)
    part = compensate(student, batches, "rescale", teacher, gaps=[1])
    torch.testing.assert_close(
        part.model.layers[3].mlp.down_proj.weight * one[1], student.model.layers[3].mlp.down_proj.weight
    )


def test_upper_refits_see_the_lower_ones(batches):
    teacher = tiny_model(num_layers=7)
    targets = stacked(teacher, batches)[0]
    lower = compensate(prune(teacher, [1, 3, 4]), batches, "least_squares", teacher, gaps=[1], ridge=0.02)
    both = compensate(prune(teacher, [1, 3, 4]), batches, "least_squares", teacher, ridge=0.02)
    torch.testing.assert_close(
        both.model.layers[1].mlp.down_proj.weight,
        dense_refit(lower, batches, 1, targets[5], 0.02),
        atol=5e-4,
        rtol=1e-3,
    )


def test_a_layer_the_block_before_can_take_over_is_repaired_exactly():
    """Without attention below the gap states are functions of the token; fewer tokens than neurons fit exactly."""
    teacher = tiny_model(tie_word_embeddings=False)
    for layer in teacher.model.layers[:3]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    batches = [{"input_ids": batch["input_ids"] % 20} for batch in random_batches(count=4)]
    student = prune(teacher, [2])
    lost = evaluate_model(student, batches, teacher).kl
    repaired = compensate(student, batches, "least_squares", teacher, ridge=1e-6)
    assert lost > 0.01 and evaluate_model(repaired, batches, teacher).kl < 1e-4 * lost


@pytest.mark.parametrize("method", ["none", "rescale", "least_squares"])
def test_nobody_else_is_touched(model, batches, method):
    before = snapshot(model)
    modes = [p.requires_grad for p in model.parameters()]
    student = prune(model, [1, 3], share_weights=True)
    plain = snapshot(student)
    repaired = compensate(student, batches, method, model)
    assert same(model, before) and same(student, plain)
    assert same(repaired, plain) == (method == "none")
    sharing = prune(model, [1], share_weights=True)
    apply_repair(sharing, find_repairs(model, batches, [1], method)[1])
    assert same(model, before) and [p.requires_grad for p in model.parameters()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["rescale", "least_squares"])
def test_padding_does_not_matter(model, method):
    (padded,) = random_batches(count=1)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    rows = [{"input_ids": row[keep.bool()][None]} for row, keep in zip(ids, mask, strict=True)]
    noise = {"input_ids": torch.where(mask.bool(), ids, 7), "attention_mask": mask}
    student = prune(model, [2])
    results = [compensate(student, b, method, model).state_dict() for b in ([padded], [noise], rows)]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(results[2][name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["rescale", "least_squares"])
def test_bfloat16_is_solved_in_float32(model, batches, method):
    half = copy.deepcopy(model).to(torch.bfloat16)
    repair = find_repairs(half, batches, [2], method)[2]
    if method == "rescale":
        assert repair.scale == pytest.approx(find_repairs(model, batches, [2], method)[2].scale, rel=0.02)
    else:
        expected = dense_refit(half, batches, 1, stacked(half, batches)[0][3], DEFAULT_RIDGE)
        assert repair.weight.dtype == torch.bfloat16
        torch.testing.assert_close(repair.weight.float(), expected, atol=1e-3, rtol=2**-8)
    repaired = compensate(prune(half, [2]), batches, method, half)
    assert {p.dtype for p in repaired.parameters()} == {torch.bfloat16}


def test_a_layer_inside_a_parallel_block_leaves_no_gap(model, batches):
    wide = parallelize(model, [(2, 3)])
    for method in ("rescale", "least_squares"):
        repairs = find_repairs(wide, batches, [2, 1], method, model)
        assert repairs[2].nothing and not repairs[1].nothing
        apply_repair(prune(wide, [2]), repairs[2])


def test_mistakes_are_one_clear_line(model, batches):
    padding = [
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    ]
    student = prune(model, [1])
    for call, message in [
        (lambda: find_repairs(model, batches, [1], "magic"), "compensation='magic' is unknown"),
        (lambda: find_repairs(model, padding, [1], "rescale"), "no token"),
        (lambda: find_repairs(model, batches, [9], "rescale"), "layers \\[9\\] are not in the teacher"),
        (lambda: find_repairs(student, batches, [1], "rescale", model), "layer 1 is not in the plan"),
        (lambda: find_repairs(model, batches, [1], "least_squares", ridge=0), "ridge=0 is out of range"),
        (lambda: find_repairs(model, batches, [1], "rescale", tiny_model(6)), "was not made of this teacher"),
        (lambda: compensate(student, batches, "rescale", model, gaps=[2]), "layers \\[2\\] are not missing"),
        (lambda: compensate(student, batches, "rescale", student), "layers \\[1\\] are not in the teacher"),
        (lambda: apply_repair(model, Repair((1,), 0, 2.0)), "it has \\[1\\]"),
        (lambda: apply_repair(prune(model, [0, 1]), Repair((1,), 0, 2.0)), "was found for another student"),
    ]:
        with pytest.raises(LayerPruneError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_states_that_are_not_finite_are_told(model, batches):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LayerPruneError, match="not finite"):
        find_repairs(model, batches, [2], "least_squares")
