"""`find_parallel_range` and `search_plan`, against naive searches that build every model they judge."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import random_batches, tiny_model
from parallel_reference import literal

import hf_layerprune.budget as module
from hf_layerprune import LayerPlan, LayerPruneError, evaluate_model, parallelize, prune, score_layers
from hf_layerprune.budget import BlockCosts, Budget, EditSpace, Goal, count_parameters
from hf_layerprune.plan import DEFAULT_KINDS, Edit
from hf_layerprune.scoring import Scores
from hf_layerprune.search import find_parallel_range, search_plan
from hf_layerprune.surgery import apply_plan, plan_of
from hf_layerprune.tasks import PerplexityTask

BOTH = DEFAULT_KINDS
KINDS = (("remove",), ("parallelize",), BOTH)
HALF = BlockCosts(2.0, (1.0, 1.5, 2.0))  # a pair saves half of what leaving a layer out saves
EQUAL = BlockCosts(0.0, (1.0, 1.0, 1.0))  # a block costs the same, whatever its width


@pytest.fixture
def few():
    return random_batches(1, rows=2, length=8)


def planted(model, layers, factor=0.0):
    """`model` with the outputs of some layers scaled down: they matter little, and not at all for 0."""
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].self_attn.o_proj.weight.mul_(factor)
            model.model.layers[layer].mlp.down_proj.weight.mul_(factor)
    return model


def snapshot(model):
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    flags = [(p.requires_grad, p.data_ptr()) for p in model.parameters()]
    return tensors, flags, model.config.to_dict(), model.training


def assert_unchanged(model, before):
    tensors, *others = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert others == list(before[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- find_parallel_range ---------------------------------------------------------------------------------------------


def naive_range(model, layers, batches):
    """Loss by blocks of every run of pairs, each of them built by the equations and run whole."""
    found = {}
    for start in range(len(layers)):
        for end in range(start + 2, len(layers) + 1, 2):  # blocks start..end-1 pair up
            if start == 0 or end == len(layers):
                continue
            pairs = [tuple(layers[n : n + 2]) for n in range(start, end, 2)]
            blocks = (*((n,) for n in layers[:start]), *pairs, *((n,) for n in layers[end:]))
            found[blocks] = evaluate_model(literal(model, blocks), batches).loss
    return found


@pytest.mark.parametrize("depth, removed", [(4, []), (8, []), (9, [2, 5])])
def test_every_run_of_pairs_gets_its_loss(batches, depth, removed):
    model = tiny_model(depth)
    student = prune(model, removed)
    before = snapshot(student)
    found = find_parallel_range(student, batches)
    expected = naive_range(model, [n for n in range(depth) if n not in removed], batches)
    assert {plan.blocks: loss for plan, loss in found.values.items()} == pytest.approx(expected, rel=1e-5)
    assert {plan.num_teacher_layers for plan in found.values} == {depth}
    assert found.baseline == pytest.approx(evaluate_model(student, batches).loss, rel=1e-5)
    assert_unchanged(student, before)
    for target in {plan.depth for plan in found.values}:
        of_depth = {blocks: loss for blocks, loss in expected.items() if len(blocks) == target}
        only = find_parallel_range(student, batches, target)
        assert {plan.blocks: only.values[plan] for plan in only.values} == pytest.approx(of_depth, rel=1e-5)
        assert only.safest.blocks == min(of_depth, key=of_depth.get)


def test_of_equal_runs_the_later_is_best(few):
    found = find_parallel_range(planted(tiny_model(7), range(7)), few)
    assert found.ranking[0].blocks == ((0,), (1,), (2,), (3,), (4, 5), (6,))
    assert find_parallel_range(planted(tiny_model(7), range(7)), few, 5).safest.blocks[-3:] == ((2, 3), (4, 5), (6,))


def test_runs_share_the_model_before_their_start(batches):
    model = tiny_model(8)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    find_parallel_range(model, batches[:1])
    passes = sum(8 - start for count in (1, 2, 3) for start in range(1, 8 - 2 * count))
    assert len(calls) == 8 + passes


def test_models_and_depths_that_have_no_run_of_pairs_are_refused(model, few):
    for target in (0, 4, 8, 6.5, "6"):
        with pytest.raises(LayerPruneError, match=r"depth=.* choose one of \[5, 6, 7\]"):
            find_parallel_range(tiny_model(8), few, target)
    with pytest.raises(LayerPruneError, match=r"layers \[\(1, 2\)\] are one block"):
        find_parallel_range(parallelize(model, [(1, 2)]), few)
    for depth in (1, 3):
        with pytest.raises(LayerPruneError, match=f"the model has {depth} layers; .* needs at least 4"):
            find_parallel_range(tiny_model(depth), few)
    with pytest.raises(LayerPruneError, match="no token to score"):
        find_parallel_range(model, [])


def test_a_model_whose_outputs_are_broken_is_refused(model, few):
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(LayerPruneError, match="broken"):
        _ = find_parallel_range(model, few).safest
    with pytest.raises(LayerPruneError, match="broken"):
        search_plan(model, few, {"depth": 4})


# --- search_plan -----------------------------------------------------------------------------------------------------


def every_edit(plan, kinds, most):
    """Every edit of a plan with nothing protected, and the plan behind it."""
    if "remove" in kinds and len(plan.layers) > 1:
        for layer in plan.layers:
            yield Edit("remove", (layer,)), plan.remove(layer)
    if "parallelize" in kinds:
        for a, b in zip(plan.blocks, plan.blocks[1:], strict=False):
            if len(a + b) <= most:
                yield Edit("parallelize", a + b), plan.parallelize(*a, *b)


def naive_reach(kinds, most, met):
    """A function that says whether any sequence of edits leads from a plan to one that is `met`."""

    @cache
    def reaches(plan):
        return met(plan) or any(reaches(after) for _, after in every_edit(plan, kinds, most))

    return reaches


def assert_every_step_is_the_best(
    found, start, target, original, batches, teacher, size, kinds, most=2, criterion="kl"
):
    """Recompute a search from `start` step by step: run every plan whole, weigh its cost by what it saves."""
    plan = start
    reaches = naive_reach(kinds, most, lambda plan: size(plan) <= target)

    @cache
    def measure(plan):
        report = evaluate_model(literal(original, plan.blocks), batches, teacher)
        return report.kl if criterion == "kl" else report.loss

    for step in found.steps:
        assert size(plan) > target
        useful = {
            e: after for e, after in every_edit(plan, kinds, most) if size(after) < size(plan) and reaches(after)
        }
        costs = {edit: measure(after) for edit, after in useful.items()}
        assert step.scores.values == pytest.approx(costs, abs=1e-5)
        assert step.scores.baseline == pytest.approx(measure(plan), abs=1e-5)
        added = {edit: cost - measure(plan) for edit, cost in costs.items()}
        saved = {edit: size(plan) - max(size(after), target) for edit, after in useful.items()}
        prices = {e: added[e] / saved[e] if added[e] > 0 else added[e] * saved[e] for e in useful}
        assert prices[step.edit] == pytest.approx(min(prices.values()), rel=1e-3, abs=1e-6)
        assert step.cost == step.scores.values[step.edit]
        plan = step.edit.apply(plan)
        assert step.plan == plan
        assert step.size == pytest.approx(size(plan))
    assert found.plan == plan and size(plan) <= target


STARTS = {
    "plain": LayerPlan.identity(6),
    "pruned": LayerPlan(((0,), (1,), (2,), (4,), (5,)), 6),
    "parallelized": LayerPlan(((0,), (1, 2), (3,), (4,), (5,)), 6),
}


@pytest.mark.parametrize(
    "name, kinds, target",
    [("plain", BOTH, 3), ("plain", ("parallelize",), 3), ("pruned", ("remove",), 3), ("parallelized", BOTH, 3),
     ("parallelized", ("parallelize",), 4)],  # 1|2 leaves 0 alone
)  # fmt: skip
def test_every_step_costs_least_per_block_saved(few, name, kinds, target):
    model, start = tiny_model(6), STARTS[name]
    found = search_plan(apply_plan(model, start), few, {"depth": target}, kinds, teacher=model)
    assert len(found.steps) == start.depth - target and found.plan.depth == target
    assert_every_step_is_the_best(found, start, target, model, few, model, lambda plan: plan.depth, kinds)


@pytest.mark.parametrize(
    "name, most, criterion",
    [("plain", 3, "loss"), ("parallelized", 3, "kl")],
)
def test_every_step_costs_least_per_second_saved(few, name, most, criterion):
    model, start = tiny_model(6), STARTS[name]
    how = {"max_group_size": most, "criterion": criterion, "teacher": model, "latency": HALF}
    found = search_plan(apply_plan(model, start), few, {"latency": 0.7}, **how)

    def size(plan):  # a share of the teacher's time, not of the student's
        return (2 + sum((1, 1.5, 2)[len(block) - 1] for block in plan.blocks)) / 8

    assert found.latency is HALF
    assert_every_step_is_the_best(found, start, 0.7, model, few, model, size, BOTH, most, criterion)


@pytest.mark.parametrize("name", ["plain", "parallelized"])
def test_every_step_costs_least_per_parameter_saved(few, name):
    model, start = tiny_model(6), STARTS[name]
    target = prune(model, [1, 2, 3]).num_parameters() + 100

    @cache
    def size(plan):
        return apply_plan(model, plan, share_weights=True).num_parameters()

    found = search_plan(apply_plan(model, start), few, {"parameters": target}, teacher=model)
    assert_every_step_is_the_best(found, start, target, model, few, model, size, ("remove",))
    assert size(found.plan) <= target < size(found.steps[-2].plan)


def test_the_costs_are_those_against_the_teacher_that_is_given(few):
    model, teacher = tiny_model(5), tiny_model(5, seed=4)
    found = search_plan(model, few, {"depth": 3}, teacher=teacher)
    assert_every_step_is_the_best(found, plan_of(model), 3, model, few, teacher, lambda plan: plan.depth, BOTH)


def test_every_step_is_reported_as_it_is_made_and_the_model_is_left_as_it_was(few):
    model, seen = tiny_model(6).train(), []
    before = snapshot(model)
    found = search_plan(model, few, Budget("depth", 4), on_step=seen.append)
    assert seen == found.steps and len(seen) == 2
    assert found.plan == seen[-1].plan and found.latency is None
    assert_unchanged(model, before)


def test_budgets_may_be_objects_or_names(few):
    model = tiny_model(4)
    assert search_plan(model, few, Budget("depth", 2)) == search_plan(model, few, {"depth": 2})
    assert Budget.of({"latency": 0.5}) == Budget("latency", 0.5)


def test_layers_that_do_nothing_go_first(few):
    model = planted(tiny_model(8), (2, 5))
    for kinds in KINDS:
        found = search_plan(model, few, {"depth": 6}, kinds)
        assert all({2, 5} & set(step.edit.layers) for step in found.steps)
        assert found.steps[-1].cost == pytest.approx(0, abs=1e-6)
    assert search_plan(model, few, {"depth": 6}, ("remove",)).plan.removed_layers == (2, 5)
    parameters = search_plan(model, few, {"parameters": prune(model, [0, 1]).num_parameters()})
    assert parameters.plan.removed_layers == (2, 5)


# --- budgets of parameters


PLANS = {
    "whole": ((0,), (1,), (2,), (3,), (4,), (5,)),
    "pruned": ((0,), (4,)),
    "pairs": ((0, 1), (2,), (3, 4), (5,)),
    "groups": ((0,), (1, 2, 4, 5)),
    "one layer": ((3,),),
}


@pytest.mark.parametrize("start, tied", [("whole", True), ("pairs", False)])
def test_parameters_are_counted_as_the_built_model_has_them(tied, start):
    model = tiny_model(6, tie_word_embeddings=tied)
    student = apply_plan(model, LayerPlan(PLANS[start], 6))
    goal = Goal.of(Budget("parameters", 1), EditSpace(), student, plan_of(model))
    for blocks in PLANS.values():
        plan = LayerPlan(blocks, 6)
        built = apply_plan(model, plan)
        assert goal.size(plan) == built.num_parameters() == sum(p.numel() for p in built.parameters())
        assert count_parameters(built).of(plan) == built.num_parameters()


def test_a_budget_of_parameters_never_parallelizes(few):
    model = planted(tiny_model(6), (2, 3), 1e-2)  # side by side they cost far less than leaving one out does
    assert search_plan(model, few, {"depth": 5}).steps[0].edit == Edit.parallelize(2, 3)
    found = search_plan(model, few, {"parameters": prune(model, [0, 1]).num_parameters()})
    assert [step.edit.kind for step in found.steps] == ["remove", "remove"]
    assert set(found.plan.removed_layers) == {2, 3}
    assert {edit.kind for step in found.steps for edit in step.scores.values} == {"remove"}
    with pytest.raises(LayerPruneError, match="parameters=.* out of reach: parallelize can go from"):
        search_plan(model, few, {"parameters": model.num_parameters() // 2}, ("parallelize",))


# --- budgets of latency


def test_what_a_pair_takes_decides_between_pairs_and_removals(few):
    model = planted(tiny_model(6), range(6), 0.3)
    for pair, kind in ((1.0, "parallelize"), (1.99, "remove"), (2.0, "remove"), (2.5, "remove")):
        found = search_plan(model, few, {"latency": 0.7}, latency=BlockCosts(0.0, (1.0, pair)))
        assert {step.edit.kind for step in found.steps} == {kind}, pair


def test_a_share_of_latency_is_one_of_the_teachers_time(few):
    model = tiny_model(6)
    student = prune(model, [2])
    latency = BlockCosts(4.0, (1.0, 1.25))  # 10 s whole, 9 s pruned
    found = search_plan(student, few, {"latency": 0.8}, ("remove",), teacher=model, latency=latency)
    assert [step.size for step in found.steps] == pytest.approx([0.8])
    with pytest.raises(LayerPruneError, match="meets latency=0.9 already: it has 0.9"):
        search_plan(student, few, {"latency": 0.9}, ("remove",), teacher=model, latency=latency)


@pytest.mark.parametrize("most, widest", [(2, 3), (4, 4)])
def test_latency_is_measured_once_for_every_width_that_can_come(monkeypatch, few, most, widest):
    asked = []
    monkeypatch.setattr(module, "measure_latency", lambda *args: asked.append(args) or BlockCosts(1, (1, 1, 1, 1)))
    model = parallelize(tiny_model(6), [(1, 2, 3)])
    found = search_plan(model, few, {"latency": 0.7}, max_group_size=most)
    assert [(args[0] is model, *args[1:]) for args in asked] == [(True, widest)]
    assert found.latency == BlockCosts(1, (1, 1, 1, 1))
    search_plan(model, few, {"latency": 0.7}, latency=EQUAL)
    search_plan(model, few, {"depth": 3})
    assert len(asked) == 1


def goal_of_four(latency, target):
    return Goal(Budget("latency", target), EditSpace(), latency, LayerPlan.identity(4))


def best_of_four(goal, values, baseline):
    savings = dict(zip(values, goal.savings(values, LayerPlan.identity(4)), strict=True))
    return Scores("loss", values, baseline, 1, savings=savings).safest


def test_what_an_edit_saves_beyond_the_budget_does_not_count():
    latency, remove, pair = BlockCosts(0.0, (1.0, 1.5)), Edit.remove(1), Edit.parallelize(2, 3)
    costs = {remove: 0.02, pair: 0.015}
    assert best_of_four(goal_of_four(latency, 0.5), costs, 0.0) == remove  # 0.02 / 0.25 against 0.015 / 0.125
    assert best_of_four(goal_of_four(latency, 0.9), costs, 0.0) == pair  # 0.02 / 0.1 against 0.015 / 0.1


def test_only_what_an_edit_adds_to_the_measure_is_its_cost():
    latency, remove, pair = BlockCosts(0.0, (1.0, 1.5)), Edit.remove(1), Edit.parallelize(2, 3)
    costs = {remove: 3.10, pair: 3.04}
    assert best_of_four(goal_of_four(latency, 0.5), costs, 3.0) == pair  # 0.4 against 0.32 per unit


def test_edits_that_cost_nothing_come_first_and_of_them_those_that_gain_and_save_most():
    latency, remove, pair = BlockCosts(0.0, (1.0, 1.5)), Edit.remove(1), Edit.parallelize(2, 3)
    for costs, expected in (
        ({remove: 3.0, pair: 3.001}, remove),
        ({remove: 3.001, pair: 3.0}, pair),
        ({remove: 2.9, pair: 3.0}, remove),
        ({remove: 3.0, pair: 2.9}, pair),
        ({remove: 2.9, pair: 2.9}, remove),  # both gain the same, and to remove saves twice as much
        ({remove: 2.9, pair: 2.7}, pair),
    ):
        assert best_of_four(goal_of_four(latency, 0.5), costs, 3.0) == expected, costs


def test_costs_that_are_no_numbers_are_never_chosen():
    remove, pair = Edit.remove(1), Edit.parallelize(2, 3)
    for broken in (math.nan, math.inf):
        assert best_of_four(goal_of_four(EQUAL, 0.5), {remove: broken, pair: 99.0}, 3.0) == pair
        with pytest.raises(LayerPruneError, match="broken"):
            best_of_four(goal_of_four(EQUAL, 0.5), {remove: broken, pair: math.nan}, 3.0)


# --- what can be reached is reached


@pytest.mark.parametrize("most, expected", [(2, 4), (3, 3), (4, 2)])
def test_groups_grow_up_to_the_largest_size_and_no_further(few, most, expected):
    model = planted(tiny_model(8), (3, 4, 5), 1e-3)  # cheapest to run together, all three and more
    found = search_plan(model, few, {"depth": expected}, ("parallelize",), max_group_size=most)
    assert found.plan.depth == expected
    assert max(len(block) for block in found.plan.blocks) == most
    assert found.plan.layers == tuple(range(8))
    with pytest.raises(LayerPruneError, match=f"larger groups \\(max_group_size, now {most}\\)"):
        search_plan(model, few, {"depth": expected - 1}, ("parallelize",), max_group_size=most)


def test_cheap_pairs_that_would_leave_odd_layers_over_are_passed_by(few):
    model = planted(planted(tiny_model(6), (1, 2), 0.05), (3, 4), 0.1)
    near = search_plan(model, few, {"depth": 4}, ("parallelize",))
    assert near.plan.blocks == ((0,), (1, 2), (3, 4), (5,))  # which leads to no pair for 0 and none for 5
    found = search_plan(model, few, {"depth": 3}, ("parallelize",))
    assert found.plan.blocks == ((0, 1), (2, 3), (4, 5))
    tried = {edit.label for step in found.steps for edit in step.scores.values}
    assert tried == {"0|1", "2|3", "4|5"}


REACH = {
    "whole": LayerPlan.identity(5),
    "odd pair": LayerPlan(((0,), (1, 2), (3,), (4,)), 5),
    "full pairs": LayerPlan(((0, 1), (3, 4)), 5),
}


@pytest.mark.parametrize(
    "name, kinds, most, first, last",
    [("whole", BOTH, 2, 1, 1), ("whole", ("parallelize",), 3, 0, 0), ("odd pair", BOTH, 3, 0, 0),
     ("odd pair", ("parallelize",), 2, 1, 1), ("full pairs", ("remove",), 3, 0, 0)],
)  # fmt: skip
def test_every_depth_within_reach_is_reached_exactly(few, name, kinds, most, first, last):
    model, plan = planted(tiny_model(5), (1, 2, 3), 0.1), REACH[name]
    smallest = EditSpace(kinds, most, first, last).smallest(plan)
    student = apply_plan(model, plan)
    for depth in range(1, plan.depth):
        request = {"protect_first_layers": first, "protect_last_layers": last, "teacher": model}
        if depth < smallest.depth:
            with pytest.raises(LayerPruneError, match=f"depth={depth} is out of reach"):
                search_plan(student, few, {"depth": depth}, kinds, most, **request)
        else:
            found = search_plan(student, few, {"depth": depth}, kinds, most, **request)
            assert found.plan.depth == depth
            assert all(max(map(len, step.plan.blocks)) <= most for step in found.steps)


def test_edits_that_save_nothing_are_tried_only_where_none_saves(few):
    def useful(blocks, depth=1):
        goal = Goal(Budget("depth", depth), EditSpace(), BlockCosts(0, [1] * 5), LayerPlan.identity(5))
        return [edit.label for edit in goal.useful_edits(LayerPlan(blocks, 5))]

    assert useful(((0, 1), (2, 3))) == ["0", "1", "2", "3"]  # two of them save one block
    assert useful(((0, 1), (2, 3), (4,))) == ["4"]
    assert useful(((0, 1), (2,), (3,))) == ["2", "3", "2|3"]
    student = apply_plan(tiny_model(4), LayerPlan(((0, 1), (2, 3)), 4))
    first = search_plan(student, few, {"depth": 1}, ("remove",)).steps[0]  # no edit saves: the least cost alone counts
    assert first.cost == min(first.scores.values.values()) and not first.scores.savings


LATENCIES = {
    "equal": EQUAL,
    "half": HALF,
    "a pair takes as long as two layers": BlockCosts(1.0, (1.0, 2.0, 3.0)),
    "triples slower than pairs": BlockCosts(0.0, (1.0, 1.5, 4.0)),
    "only triples save": BlockCosts(0.0, (1.0, 2.0, 2.0)),
}


@pytest.mark.parametrize(
    "latency, kinds", [*((name, BOTH) for name in LATENCIES), ("only triples save", ("parallelize",))], ids=str
)
def test_every_latency_within_reach_is_reached(few, kinds, latency):
    latency = LATENCIES[latency]
    model = tiny_model(5)
    original = LayerPlan.identity(5)
    for share in (0.85, 0.6, 0.4):
        reaches = naive_reach(kinds, 3, lambda plan, share=share: latency.of(plan) <= share * latency.of(original))
        if reaches(original):
            found = search_plan(model, few, {"latency": share}, kinds, 3, latency=latency)
            assert latency.of(found.plan) <= share * latency.of(original)
        else:
            with pytest.raises(LayerPruneError, match=f"latency={share} is out of reach"):
                search_plan(model, few, {"latency": share}, kinds, 3, latency=latency)


@pytest.mark.parametrize("name, kinds", [("plain", BOTH), ("pruned", ("parallelize",))])
def test_protected_layers_are_untouched(few, name, kinds):
    model = planted(tiny_model(8), (0, 1, 6, 7))  # nothing is cheaper than to touch these
    student = model if name == "plain" else prune(model, [6])
    depth = student.config.num_hidden_layers - 2
    found = search_plan(
        *(student, few, {"depth": depth}, kinds), protect_first_layers=2, protect_last_layers=2, teacher=model
    )
    edits = {edit for step in found.steps for edit in step.scores.values}
    assert not {0, 1, 6, 7} & {layer for edit in edits for layer in edit.layers}
    assert {(0,), (1,), (7,)} <= set(found.plan.blocks)
    assert ((6,) in found.plan.blocks) == (name == "plain")


# --- what makes no sense is refused


def test_budgets_that_are_none_are_refused():
    for budget, message in [
        ({}, "exactly one"), ({"depth": 3, "latency": 0.5}, "exactly one"), ({"depth": None}, "exactly one"),
        ({"depth": 0}, "depth=0"), ({"depth": 1.5}, "depth=1.5"), ({"depth": True}, "depth=True"),
        ({"depth": "3"}, "depth='3'"), ({"latency": 0}, "latency=0"), ({"latency": 1.5}, "latency=1.5"),
        ({"latency": math.nan}, "latency=nan"), ({"latency": "0.5"}, "latency='0.5'"),
        ({"parameters": 0}, "parameters=0"), ({"parameters": "7B"}, "parameters='7B'"),
        ({"layers": 3}, "in one of depth, latency, parameters"), (3, "exactly one of depth"),
    ]:  # fmt: skip
        with pytest.raises(LayerPruneError, match=message):
            Budget.of(budget)


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"budget": {"depth": 5}}, "meets depth=5 already: it has 5"),
        ({"budget": {"parameters": 10**9}}, "meets parameters=1e\\+09 already"),
        ({"budget": {"depth": 2}, "edits": ["parallelize"]}, "depth=2 is out of reach: .* from 5 to 3"),
        ({"budget": {"parameters": 100}}, "parameters=100 is out of reach"),
        ({"budget": {"latency": 0.3}, "latency": HALF}, "latency=0.3 is out of reach: .* from 1 to 0.4286"),
        ({"budget": {"depth": 1}, "protect_first_layers": 1, "protect_last_layers": 1}, "protect fewer layers"),
        ({"budget": {"depth": 4}, "edits": ["prune"]}, "choose one or more of"),
        ({"budget": {"depth": 4}, "max_group_size": 1}, "max_group_size=1"),
        ({"budget": {"depth": 4}, "criterion": "cosine"}, "criterion='cosine'"),
        ({"budget": {"depth": 4}, "criterion": "tasks"}, "needs the model's tokenizer"),
        ({"budget": {"depth": 4}, "tasks": [PerplexityTask("none")]}, "tasks are for criterion='tasks'"),
        ({"budget": {"depth": 4}, "batches": None}, "no token to score"),
        ({"budget": {"depth": 4}, "criterion": "block_influence"}, "cannot score 'parallelize"),
        ({"budget": {"depth": 4}, "teacher": SimpleNamespace()}, "vocabulary"),
        ({"budget": {"latency": 0.9}, "latency": BlockCosts(1.0, (1.0,))}, "latency knows blocks of up to 1 "),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused(model, few, request_, message):
    if "teacher" in request_:
        request_ = request_ | {"teacher": tiny_model(vocab_size=300)}
    with pytest.raises(LayerPruneError, match=message):
        search_plan(model, **{"batches": few} | request_)


def test_kinds_of_edits_may_be_given_as_words(few):
    model = tiny_model(4)
    assert search_plan(model, few, {"depth": 3}, "remove") == search_plan(model, few, {"depth": 3}, ["remove"])
    assert search_plan(model, few, {"depth": 3}, "remove, parallelize") == search_plan(model, few, {"depth": 3})


def test_removals_can_be_chosen_by_block_influence(few):
    model = planted(tiny_model(6), (1, 3))
    found = search_plan(model, few, {"depth": 4}, ["remove"], criterion="block_influence")
    assert found.plan.removed_layers == (1, 3)


def test_tasks_choose_what_goes(tokenizer, texts):
    model, student = tiny_model(6), tiny_model(6)
    tasks = [PerplexityTask(texts, name="text", max_length=32, limit=6)]
    found = search_plan(model, None, {"depth": 4}, "remove", criterion="tasks", tasks=tasks, tokenizer=tokenizer)
    for step in found.steps:
        safest = score_layers(student, None, "tasks", tasks=tasks, tokenizer=tokenizer).safest
        assert step.edit == Edit.remove(safest)
        student = prune(student, [safest])
    assert found.plan == plan_of(student)
