"""Merged layers against what they promise, and against the dense solution of `merging_reference.py`."""

import copy

import pytest
import torch
from conftest import load, random_batches, read_report, tiny_model
from families import FAMILIES, family_model, pruned_qwen2
from merging_reference import entered, literal_model
from test_resuming import KillAt, Killed

from hf_layerprune import (
    Edit,
    LayerPlan,
    LayerPruneError,
    PrunedQwen2ForCausalLM,
    compensate,
    contiguous_stretch,
    evaluate_model,
    find_parallel_range,
    merge,
    merging,
    parallelize,
    prune,
    score,
    score_layers,
    search_plan,
    unparallelize,
)
from hf_layerprune.budget import EditSpace, count_parameters, measure_latency
from hf_layerprune.regression import Inputs
from hf_layerprune.surgery import apply_plan, plan_of
from hf_layerprune.trainer.rounds import Rounds

MERGES = {"edits": "merge", "target_num_layers": 4, "trained_layers": "neighbours", "measure_speed": False}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1, 2), (2, 3, 4)])
def test_a_merged_layer_is_the_dense_solution(family, layers):
    model, batches, ridge = family_model(family, num_layers=6), random_batches(8), 0.05
    before, first = copy.deepcopy(model.state_dict()), layers[0]
    merged = merge(model, [layers], batches, ridge=ridge)
    assert type(merged) is type(model) and plan_of(merged).merged == (layers,)
    assert merged.config.num_hidden_layers == 6 - len(layers) + 1
    layer = merged.model.layers[first].state_dict()
    for name, tensor in literal_model(merged, model, layers, batches, ridge).model.layers[first].state_dict().items():
        solved = {"atol": 2e-4, "rtol": 1e-3} if "o_proj" in name or "down_proj" in name else {}
        torch.testing.assert_close(layer[name], tensor, **solved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    others = [n for n in range(6 - len(layers) + 1) if n != first]
    for n in others:
        original = model.model.layers[plan_of(merged).blocks[n][0]].state_dict()
        assert all(torch.equal(t, original[name]) for name, t in merged.model.layers[n].state_dict().items())


@pytest.mark.parametrize("num_tokens", [8, 12, 30])
def test_leverage_is_the_dense_solution_with_few_tokens_and_many(num_tokens):
    rows = torch.randn(num_tokens, 12, generator=torch.Generator().manual_seed(0))
    read = Inputs(12, num_tokens, rows.device)
    for part in rows.split(5):
        read.add(part)
    gram = (rows.T @ rows).double()
    penalty = merging.LEVERAGE_RIDGE * gram.trace() / 12 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(read.gram(), gram.float())
    expected = torch.linalg.solve(gram + penalty, gram).diagonal().float()
    torch.testing.assert_close(read.leverage(merging.LEVERAGE_RIDGE), expected)


@pytest.mark.parametrize("max_bytes", [2**32, 1])
def test_one_pass_for_all_pairs_is_merging_each(batches, monkeypatch, max_bytes):
    monkeypatch.setattr(merging, "MAX_BYTES", max_bytes)
    model, groups, calls = tiny_model(num_layers=6), [(0, 1), (1, 2), (3, 4), (4, 5)], []
    found = merging.find_merges(model, batches, groups, model, on_batch=lambda: calls.append(1))
    assert list(found) == groups and len(calls) == len(batches)
    for group, repair in found.items():
        alone = merge(model, [group], batches).model.layers[repair.position].state_dict()
        assert repair.tensors.keys() == alone.keys()
        for name, tensor in repair.tensors.items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=1e-4)


def test_two_layers_of_which_one_adds_nothing_become_the_other(batches):
    model = tiny_model(num_layers=5)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].mlp.up_proj.weight.zero_()  # so that its neurons are not worth keeping
    for pair in ((1, 2), (2, 3)):
        merged = merge(model, [pair], batches)
        for batch in batches:
            valid = batch["attention_mask"].bool()
            expected = model(**batch).logits[valid]
            torch.testing.assert_close(merged(**batch).logits[valid], expected, atol=2e-3, rtol=2e-3)


def test_merged_layers_are_nearer_to_the_teacher_than_one_of_them_alone():
    model, batches = tiny_model(num_layers=6), random_batches(30, rows=8)
    held_out = random_batches(2, seed=5)
    merged = evaluate_model(merge(model, [(2, 3)], batches), held_out, model).kl
    assert merged < 0.5 * min(evaluate_model(prune(model, [layer]), held_out, model).kl for layer in (2, 3))


def test_padding_never_counts():
    model, batches = tiny_model(num_layers=5), random_batches(2)
    padded = [{key: torch.cat([value, torch.zeros_like(value)], dim=1) for key, value in b.items()} for b in batches]
    plain, other = (merge(model, [(1, 2)], each) for each in (batches, padded))
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_merge_in_a_student_meets_what_the_next_layer_reads_in_the_teacher(batches):
    teacher = tiny_model(num_layers=7)
    student = prune(teacher, [4])
    merged = merge(student, [(2, 3)], batches, teacher, ridge=1e-4)
    gap = entered(teacher, batches)[5]  # what layer 5 reads, after 4
    before = entered(merge(student, [(2, 3)], batches, ridge=1e-4), batches)[3]
    assert (entered(merged, batches)[3] - gap).norm() < 0.9 * (before - gap).norm()


def test_merged_blocks_merge_further_and_stand_next_to_parallel_ones(tmp_path, batches):
    model = tiny_model(num_layers=7)
    student = merge(model, [(1, 2)], batches)
    further = merge(student, [(1, 2, 3)], batches, model)
    assert plan_of(further) == LayerPlan(((0,), (1, 2, 3), (4,), (5,), (6,)), 7, ((1, 2, 3),))
    both = merge(parallelize(model, [(4, 5)]), [(1, 2)], batches)
    assert type(both) is PrunedQwen2ForCausalLM
    assert plan_of(both) == LayerPlan(((0,), (1, 2), (3,), (4, 5), (6,)), 7, ((1, 2),))
    assert plan_of(prune(both, [0])).merged == ((1, 2),)
    apart = unparallelize(both)
    assert type(apart) is type(model) and plan_of(apart).merged == ((1, 2),)
    for batch in batches:  # the blocks stay as they are
        valid = batch["attention_mask"].bool()
        torch.testing.assert_close(
            parallelize(apart, [(4, 5)])(**batch).logits[valid], both(**batch).logits[valid], atol=1e-5, rtol=1e-5
        )
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(load(tmp_path / "both")(**batches[0]).logits, both(**batches[0]).logits)
    student.save_pretrained(tmp_path / "plain")
    as_pruned = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plan_of(as_pruned) == plan_of(student)
    assert torch.equal(as_pruned(**batches[0]).logits, student(**batches[0]).logits)
    assert torch.equal(pruned_qwen2(student)(**batches[0]).logits, student(**batches[0]).logits)


def test_a_repair_next_to_a_merged_block(batches):
    model = tiny_model(num_layers=6)
    student = prune(merge(model, [(1, 2)], batches), [3])
    repaired = compensate(student, batches, "least_squares", model, gaps=[3], ridge=0.02)
    target = entered(model, batches)[4]
    far = [(entered(each, batches)[2] - target).norm() for each in (student, repaired)]
    assert far[1] < 0.7 * far[0]


def test_what_cannot_be_merged_is_refused(batches):
    model = tiny_model(num_layers=6)
    paired = parallelize(model, [(1, 2)])
    merged = merge(model, [(1, 2)], batches)
    for call, words in [
        (lambda: merge(model, [(1, 3)], batches), "neighbouring"),
        (lambda: merge(model, [(1,)], batches), "neighbouring"),
        (lambda: merge(model, [(5, 6)], batches), "layer"),
        (lambda: merge(paired, [(1, 2, 3)], batches), "run in parallel already"),
        (lambda: merge(model, [(1, 2)], []), "calibration data"),
        (lambda: parallelize(merged, [(1, 2, 3)]), "are merged already"),
        (lambda: prune(merged, [1]), "merged with others"),
        (lambda: apply_plan(model, plan_of(merged)), "takes data"),
        (lambda: apply_plan(merged, LayerPlan.identity(6)), "takes layers"),
        (lambda: apply_plan(paired, plan_of(merged)), "takes data"),
        (lambda: apply_plan(merged, plan_of(paired)), "takes layers"),
        (lambda: score(merged, batches, [plan_of(paired)]), "takes layers"),
        (lambda: score(merged, batches, [LayerPlan.identity(6)]), "takes layers"),
        (lambda: find_parallel_range(merged, batches), "one block"),
        (lambda: merge(model, [()], batches), "neighbouring"),
        (lambda: score(model, batches, [LayerPlan.identity(6).merge(1, 2).remove(4)]), "score one merge"),
        (lambda: score(model, batches, [Edit.merge(1, 2)], "block_influence"), "cannot score"),
        (lambda: score(model, [{"input_ids": batches[0]["input_ids"][1:2]}], [Edit.merge(1, 2)]), "two rows"),
    ]:
        with pytest.raises(LayerPruneError, match=words):
            call()


def test_scores_are_of_the_merged_students(batches):
    """Each half of the rows is measured with a merge fitted to the other."""
    model, edits = (
        tiny_model(num_layers=6),
        [Edit.merge(1, 2), Edit.merge(3, 4), Edit.remove(2), Edit.parallelize(1, 2)],
    )
    scores = score(model, batches, edits, compensation="least_squares")
    rows = [{k: v[n : n + 1] for k, v in batch.items()} for batch in batches for n in range(len(batch["input_ids"]))]
    for edit in edits[:2]:
        halves = rows[0::2], rows[1::2]
        reports = [
            evaluate_model(merge(model, [edit.layers], other), half, model) for half, other in (halves, halves[::-1])
        ]
        total = sum(r.num_tokens for r in reports)
        assert scores.values[edit] == pytest.approx(sum(r.kl * r.num_tokens for r in reports) / total, rel=1e-3)
    alone = score(model, batches, edits[2:3], compensation="least_squares")
    assert scores.values[edits[2]] == pytest.approx(alone.values[edits[2]], rel=1e-5)


def test_a_search_among_three_kinds_takes_the_cheapest_and_keeps_its_budget(batches):
    model = tiny_model(num_layers=6)
    found = search_plan(model, batches, {"depth": 4}, "remove,merge,parallelize")
    first = score(model, batches, EditSpace("remove,merge,parallelize").edits(LayerPlan.identity(6)))
    assert found.steps[0].edit == first.safest and found.plan.depth == 4
    found = search_plan(model, batches, {"depth": 2}, "merge", max_group_size=3)
    assert found.plan == LayerPlan(((0, 1, 2), (3, 4, 5)), 6, ((0, 1, 2), (3, 4, 5)))
    size = prune(model, [1, 2]).num_parameters()
    found = search_plan(model, batches, {"parameters": size}, "merge,parallelize")
    assert merge(model, found.plan.merged, batches).num_parameters() == size
    with pytest.raises(LayerPruneError, match="out of reach"):
        search_plan(model, batches, {"depth": 2}, "merge")


def test_a_merged_model_has_the_size_and_the_time_of_its_blocks(batches):
    model = tiny_model(num_layers=6)
    merged = merge(parallelize(model, [(4, 5)]), [(1, 2)], batches)
    plan = plan_of(merged)
    assert count_parameters(merged).of(plan) == merged.num_parameters()
    assert count_parameters(merged).blocks[0] == count_parameters(model).blocks[0]
    latency = measure_latency(merged, 2, prompt_tokens=4, new_tokens=3, repeats=1)
    assert len(latency.blocks) == 2 and latency.of(plan) > 0 and plan_of(merged) == plan


def test_the_smallest_plan_of_every_mix_of_edits_is_what_brute_force_finds():
    def reachable(space, plan):
        seen, todo = set(), [plan]
        while todo:
            plan = todo.pop()
            if plan not in seen:
                seen.add(plan)
                todo += [edit.apply(plan) for edit in space.edits(plan)]
        return seen

    def cost(width):
        return 0.6 + 0.4 * width

    for kinds in ("merge", "merge,parallelize", "remove,merge", "remove,merge,parallelize"):
        for protect in ((0, 0), (1, 1)):
            space = EditSpace(kinds, 3, *protect)
            for plan in (LayerPlan.identity(5), LayerPlan(((0,), (1, 2), (3,), (4,)), 5, ((1, 2),))):
                plans = reachable(space, plan)
                sizes = [sum(cost(p.width(block)) for block in p.blocks) for p in plans]
                smallest = space.smallest(plan, cost)
                assert smallest in plans
                assert sum(cost(smallest.width(b)) for b in smallest.blocks) == pytest.approx(min(sizes))


def test_every_criterion_sees_the_layers_that_are_not_merged(batches):
    model = tiny_model(num_layers=6)
    merged = merge(model, [(2, 3)], batches)
    for criterion in ("kl", "loss", "block_influence", "angular_distance", "taylor", "tail"):
        assert list(score_layers(merged, batches, criterion, model).values) == [0, 1, 4, 5]
    assert contiguous_stretch(merged, batches, 2) in ((0, 1), (4, 5))


def test_a_layer_without_active_neurons_can_be_merged_and_infinite_states_cannot(batches):
    model = tiny_model(num_layers=5)
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.mlp.up_proj.weight.zero_()
    assert merge(model, [(1, 2)], batches)(**batches[0]).logits.isfinite().all()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(torch.inf)
    with pytest.raises(LayerPruneError, match="not finite"):
        merge(model, [(1, 2)], batches)


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_a_merged_model_is_a_teacher(make, tmp_path, batches, compensation):
    teacher = merge(tiny_model(num_layers=7), [(2, 3)], batches)
    edits = "remove,merge" if compensation == "least_squares" else "merge"
    make(teacher, **MERGES | {"edits": edits, "max_group_size": 3, "compensation": compensation}).train()
    final = plan_of(load(tmp_path / "run" / "model"))
    assert final.depth == 4 and any({2, 3} <= {*block} for block in final.merged)


def test_the_teacher_is_not_copied_to_measure_the_unhealed_student(make, monkeypatch):
    teacher, shared = tiny_model(num_layers=5), []

    def spy(rounds, plan):
        model = edited_teacher(rounds, plan)
        mine = {parameter.data_ptr() for parameter in rounds.teacher.parameters()}
        shared.append(all(parameter.data_ptr() in mine for parameter in model.parameters()))
        return model

    edited_teacher = Rounds._edited_teacher
    monkeypatch.setattr(Rounds, "_edited_teacher", spy)
    make(teacher, target_num_layers=3, compensation="least_squares", measure_speed=False).train()
    assert shared == [True, True]


def test_a_run_merges_heals_and_saves(make, tmp_path):
    teacher = tiny_model(num_layers=6)
    trainer = make(teacher, **MERGES)
    edits = EditSpace("merge").edits(LayerPlan.identity(6))
    expected = score(teacher, trainer.calibration_batches, edits)
    trainer.train()
    report = read_report(tmp_path / "run")
    first, second = report["rounds"]
    assert first["edits"] == [expected.safest.label] and "+" in first["edits"][0]
    assert [record["num_layers"] for record in report["rounds"]] == [5, 4]
    final = load(tmp_path / "run" / "model")
    assert type(final) is type(teacher) and final.config.num_hidden_layers == 4
    plan = plan_of(final)
    assert plan == LayerPlan.from_json((tmp_path / "run" / "plan.json").read_text()) and len(plan.merged) >= 1
    unhealed = merge(teacher, plan.merged, trainer.repair_batches)
    measured = evaluate_model(unhealed, trainer.eval_batches, teacher)
    assert measured.loss == pytest.approx(second["loss_unhealed"], abs=1e-4)
    assert evaluate_model(final, trainer.eval_batches, teacher).loss == pytest.approx(second["loss"], abs=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "merged into" in card and "trust_remote_code" not in card and "vllm serve" in card
    text = (tmp_path / "run" / "report.md").read_text()
    assert first["edits"][0] in text


@pytest.mark.parametrize("event, count", [("on_phase_begin", 4), ("on_step_end", 2), ("on_round_end", 1)])
def test_a_killed_run_of_merges_resumes_to_the_same_weights(make, tmp_path, event, count):
    settings = MERGES | {"max_steps": 3, "save_strategy": "no"}
    make(tiny_model(num_layers=6), folder="whole", **settings).train()
    with pytest.raises(Killed):
        make(tiny_model(num_layers=6), folder="cut", callbacks=[KillAt(event, count)], **settings).train()
    make(tiny_model(num_layers=6), folder="cut", **settings).train(resume_from_checkpoint=True)
    whole, resumed = (load(tmp_path / name / "model") for name in ("whole", "cut"))
    assert plan_of(whole) == plan_of(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
