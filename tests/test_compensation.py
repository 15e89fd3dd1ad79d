"""Repairs against what they promise, written out: a dense solution on stacked activations."""

import copy

import pytest
import torch
from conftest import random_batches, tiny_model
from families import family_model

from hf_layerprune import LayerPlan, LayerPruneError, compensation, evaluate_model, prune, score_layers
from hf_layerprune.compensation import DEFAULT_RIDGE, apply_repair, compensate, find_repairs
from hf_layerprune.forward import final_states
from hf_layerprune.regression import Regression
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


@pytest.mark.parametrize("num_batches, layer", [(1, 1), (2, 1), (2, 3), (2, 4)])  # 27 or 54 tokens for 48 neurons
def test_refit_is_the_dense_least_squares_solution(model, num_batches, layer):
    batches = random_batches(num_batches)
    repair = find_repairs(model, batches, [layer], ridge=0.02)[layer]
    target = stacked(model, batches)[0][layer + 1]
    assert repair.position == layer - 1
    expected = dense_refit(model, batches, layer - 1, target, 0.02)
    torch.testing.assert_close(repair.tensors["mlp.down_proj.weight"], expected, atol=2e-4, rtol=1e-3)


def test_a_bias_stays_as_it_is(batches):
    model = family_model("llama", attention_bias=True, mlp_bias=True)
    repaired = compensate(prune(model, [2]), batches, "least_squares", model, ridge=0.02)
    projection, present = (each.model.layers[1].mlp.down_proj for each in (repaired, model))
    expected = dense_refit(model, batches, 1, stacked(model, batches)[0][3], 0.02)
    torch.testing.assert_close(projection.weight, expected, atol=2e-4, rtol=1e-3)
    assert present.bias.any() and torch.equal(projection.bias, present.bias)


@pytest.mark.parametrize("num_tokens, ridge", [(20, 5.0), (95, 0.02), (96, 0.02), (300, 5.0)])
def test_the_smaller_system_of_equations_gives_the_same_weight(num_tokens, ridge):
    generator = torch.Generator().manual_seed(0)
    inputs, missing = (torch.randn(num_tokens, size, generator=generator) for size in (96, 24))
    weight = torch.randn(24, 96, generator=generator)
    fit = Regression(weight, num_tokens)
    for rows in torch.arange(num_tokens).split(7):
        with torch.autocast("cpu", torch.bfloat16):
            fit.add(inputs[rows], missing[rows])
    assert fit.left.nbytes + fit.right.nbytes == Regression.num_bytes(weight, num_tokens)
    a, e = inputs.double(), missing.double()
    penalty = ridge * a.pow(2).sum() / num_tokens * torch.eye(96, dtype=torch.float64)
    expected = weight + torch.linalg.solve(a.T @ a + penalty, a.T @ e).T.float()  # the literal normal equations
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fit.solve(ridge), expected, atol=2e-5, rtol=2e-5)


def test_refit_of_a_pruned_and_parallel_student_meets_the_original_teacher(batches):
    teacher = tiny_model(num_layers=8)
    student = apply_plan(teacher, LayerPlan(((0,), (1, 2), (4,), (6, 7)), 8))  # lacks 3 and 5
    targets = stacked(teacher, batches)[0]
    repair = find_repairs(student, batches, [4], teacher, ridge=0.02)[4]
    assert repair.tensors["mlp.down_proj.weight"].shape == (32, 2 * 48)
    torch.testing.assert_close(
        repair.tensors["mlp.down_proj.weight"],
        dense_refit(student, batches, 1, targets[6], 0.02),
        atol=2e-4,
        rtol=1e-3,
    )
    left = prune(student, [4])
    repaired = compensate(left, batches, "least_squares", teacher, gaps=[4], ridge=0.02)
    torch.testing.assert_close(
        repaired.model.layers[1].mlp.down_proj.weight, repair.tensors["mlp.down_proj.weight"], atol=1e-5, rtol=1e-4
    )

    inside = apply_plan(teacher, LayerPlan(((0,), (1, 3), (4,), (5,), (6,), (7,)), 8))  # lacks 2, beside 1 and 3
    repaired = compensate(inside, batches, "least_squares", teacher, ridge=0.02)
    expected = dense_refit(inside, batches, 1, targets[4], 0.02)
    torch.testing.assert_close(repaired.model.layers[1].mlp.down_proj.weight, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("max_bytes", [2**32, 1])
def test_one_pass_for_all_layers_is_compensating_each(model, batches, monkeypatch, max_bytes):
    monkeypatch.setattr(compensation, "MAX_BYTES", max_bytes)
    method = "least_squares"
    repairs = find_repairs(model, batches, range(5))
    assert list(repairs) == [1, 2, 3, 4]
    for layer, repair in repairs.items():
        student = prune(model, [layer], share_weights=True)
        apply_repair(student, repair)
        expected = compensate(prune(model, [layer]), batches, method, model)
        for (name, tensor), other in zip(student.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(tensor, other, atol=1e-5, rtol=1e-4, msg=name)
    assert same(compensate(prune(model, [0]), batches, method, model), snapshot(prune(model, [0])))


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


@pytest.mark.parametrize("method", ["none", "least_squares"])
def test_nobody_else_is_touched(model, batches, method):
    before = snapshot(model)
    modes = [p.requires_grad for p in model.parameters()]
    student = prune(model, [1, 3], share_weights=True)
    plain = snapshot(student)
    repaired = compensate(student, batches, method, model)
    assert same(model, before) and same(student, plain)
    assert same(repaired, plain) == (method == "none")
    sharing = prune(model, [1], share_weights=True)
    apply_repair(sharing, find_repairs(model, batches, [1])[1])
    assert same(model, before) and [p.requires_grad for p in model.parameters()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_padding_does_not_matter(model):
    (padded,) = random_batches(count=1)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    rows = [{"input_ids": row[keep.bool()][None]} for row, keep in zip(ids, mask, strict=True)]
    noise = {"input_ids": torch.where(mask.bool(), ids, 7), "attention_mask": mask}
    student = prune(model, [2])
    results = [compensate(student, b, "least_squares", model).state_dict() for b in ([padded], [noise], rows)]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(results[2][name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_bfloat16_is_solved_in_float32(model, num_batches):
    batches, half = random_batches(num_batches), copy.deepcopy(model).to(torch.bfloat16)
    repair = find_repairs(half, batches, [2])[2]
    expected = dense_refit(half, batches, 1, stacked(half, batches)[0][3], DEFAULT_RIDGE)
    assert repair.tensors["mlp.down_proj.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(repair.tensors["mlp.down_proj.weight"].float(), expected, atol=1e-3, rtol=2**-8)
    repaired = compensate(prune(half, [2]), batches, "least_squares", half)
    assert {p.dtype for p in repaired.parameters()} == {torch.bfloat16}


def test_mistakes_are_one_clear_line(model, batches):
    padding = [
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    ]
    student = prune(model, [1])
    for call, message in [
        (lambda: score_layers(model, batches, compensation="magic"), "compensation='magic' is unknown"),
        (lambda: find_repairs(model, padding, [1]), "no token"),
        (lambda: find_repairs(model, batches, [9]), "layers \\[9\\] are not in the teacher"),
        (lambda: find_repairs(student, batches, [1], model), "layer 1 is not in the plan"),
        (lambda: find_repairs(model, batches, [1], ridge=-1), "ridge=-1 is too small"),
        (lambda: find_repairs(model, batches, [1], tiny_model(6)), "was not made from this teacher"),
        (lambda: compensate(student, batches, "least_squares", model, gaps=[2]), "layers \\[2\\] are not missing"),
        (lambda: compensate(student, batches, "least_squares", student), "layers \\[1\\] are not in the teacher"),
    ]:
        with pytest.raises(LayerPruneError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_states_that_are_not_finite_are_an_error(model, batches):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LayerPruneError, match="not finite"):
        find_repairs(model, batches, [2])
