import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.offload import OffloadedWeightsLoader
from conftest import random_batches, tiny_config, tiny_model
from parallel_reference import literal

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPlan,
    LayerPruneError,
    Scores,
    evaluate_model,
    parallelize,
    prune,
    score_layers,
)
from hf_layerprune.budget import EditSpace
from hf_layerprune.cli.score import device_map
from hf_layerprune.loading import load_model
from hf_layerprune.plan import Edit
from hf_layerprune.scoring import CRITERIA, candidates, score
from hf_layerprune.scoring.estimates import measure_angles
from hf_layerprune.surgery import apply_plan, plan_of

STUDENTS = {  # of a teacher of six layers
    "plain": ((0,), (1,), (2,), (3,), (4,), (5,)),
    "pruned": ((0,), (2,), (3,), (5,)),
    "parallelized": ((0,), (1, 2), (3,), (4, 5)),
    "both": ((0, 1), (3, 4, 5)),
}


def naive_scores(model, batches, teacher, criterion):
    """Remove each layer, run the whole model, take the mean over all tokens: the slow reference."""
    scores = {}
    for layer in range(model.config.num_hidden_layers):
        student, total, count = prune(model, [layer]), 0.0, 0
        for batch in batches:
            with torch.no_grad():
                student_log = F.log_softmax(student(**batch).logits.double(), -1)
                teacher_log = F.log_softmax(teacher(**batch).logits.double(), -1)
            mask, ids = batch["attention_mask"], batch["input_ids"]
            for row in range(len(ids)):
                for t in range(ids.shape[1] - 1):
                    if mask[row, t] and mask[row, t + 1]:
                        p, q = teacher_log[row, t], student_log[row, t]
                        total += (p.exp() * (p - q)).sum() if criterion == "kl" else -q[ids[row, t + 1]]
                        count += 1
        scores[layer] = float(total) / count
    return scores


@pytest.mark.parametrize("criterion, own_teacher", [("kl", True), ("kl", False), ("loss", True)])
def test_leave_one_out_equals_naive_removal(model, batches, criterion, own_teacher):
    teacher = model if own_teacher else tiny_model(seed=3)
    scores = score_layers(model, batches, criterion, teacher=teacher)
    expected = naive_scores(model, batches, teacher, criterion)
    assert scores.values == pytest.approx(expected, abs=1e-5)
    assert scores.num_tokens == 48
    whole = evaluate_model(model, batches, teacher)
    assert scores.baseline == pytest.approx(whole.kl if criterion == "kl" else whole.loss, abs=1e-5)


def test_block_influence_equals_the_formula_over_all_hidden_states(model, batches):
    total, count = torch.zeros(5, dtype=torch.float64), 0
    for batch in batches:
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]
        # the last entry of hidden_states is behind the final norm, so the last layer is run by hand
        with torch.no_grad():
            captured = []
            handle = model.model.layers[-1].register_forward_hook(lambda _, __, out, into=captured: into.append(out))
            model(**batch)
            handle.remove()
        states = [*states, captured[0]]
        mask = batch["attention_mask"].bool()
        count += int(mask.sum())
        for layer in range(5):
            total[layer] += (1 - F.cosine_similarity(states[layer], states[layer + 1], dim=-1))[mask].double().sum()
    scores = score_layers(model, batches, "block_influence")
    assert list(scores.values.values()) == pytest.approx((total / count).tolist(), abs=1e-5)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "tasks"])
def test_padding_never_counts(model, criterion):
    short = random_batches(1, rows=2, length=6, padded=False)
    expected = score_layers(model, short, criterion)
    for before, after in ((0, 5), (5, 0)):
        ids = torch.nn.functional.pad(short[0]["input_ids"], (before, after), value=9)
        mask = torch.nn.functional.pad(short[0]["attention_mask"], (before, after))
        padded = score_layers(model, [{"input_ids": ids, "attention_mask": mask}], criterion)
        assert padded.values == pytest.approx(expected.values, abs=1e-5)


def test_students_are_scored_in_teacher_indices_against_the_original_teacher(model, batches):
    student = prune(model, [1])
    scores = score_layers(student, batches, "kl", teacher=model)
    assert list(scores.values) == [0, 2, 3, 4]
    for layer in scores.values:
        expected = evaluate_model(prune(model, [1, layer]), batches, model).kl
        assert scores.values[layer] == pytest.approx(expected, abs=1e-5)


def test_protected_layers_are_left_out(model, batches):
    assert list(score_layers(model, batches, layers=[1, 2]).values) == [1, 2]
    assert list(score_layers(model, batches, layers=[2, 1, 2]).values) == [2, 1]
    with pytest.raises(LayerPruneError, match="all layers are protected"):
        score_layers(model, batches, layers=[])


def test_the_model_is_left_as_it_was(model, batches):
    model.train()
    before = [parameter.clone() for parameter in model.parameters()]
    score_layers(model, batches)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_ties_go_to_the_deeper_layer_and_nan_comes_last():
    scores = Scores("kl", {0: 0.2, 1: 0.1, 2: 0.1, 3: math.nan, 4: math.inf}, 0.0, 1)
    assert scores.ranking == (2, 1, 0, 4, 3)
    assert scores.safest == 2
    with pytest.raises(LayerPruneError, match="broken"):
        _ = Scores("kl", {0: math.nan, 1: math.nan}, 0.0, 1).safest


def test_bad_requests_are_refused(model, batches):
    with pytest.raises(LayerPruneError, match="criterion='cosine'"):
        score_layers(model, batches, "cosine")
    with pytest.raises(LayerPruneError, match="criterion=None is unknown"):
        score_layers(model, batches, None)
    with pytest.raises(LayerPruneError, match="race=0.9 is of type float; give a hf_layerprune.Race"):
        score_layers(model, batches, race=0.9)
    with pytest.raises(LayerPruneError, match="str is not a plain .* load one by name with hf_layerprune.load_model"):
        score_layers("embedded", batches)
    with pytest.raises(LayerPruneError, match="not in the plan"):
        score_layers(model, batches, layers=[7])
    with pytest.raises(LayerPruneError, match="vocabulary"):
        score_layers(model, batches, teacher=tiny_model(vocab_size=300))
    with pytest.raises(LayerPruneError, match="no token to score"):
        score_layers(model, [])


def naive_measure(model, batches, teacher, criterion):
    """The mean over all tokens by the plain formulas, from whole runs of two models without a KV cache."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            q = F.log_softmax(model(**batch, use_cache=False).logits.double(), -1)[:, :-1]
            p = F.log_softmax(teacher(**batch, use_cache=False).logits.double(), -1)[:, :-1]
        mask, targets = batch["attention_mask"].bool(), batch["input_ids"][:, 1:]
        valid = mask[:, :-1] & mask[:, 1:]
        kl = (p.exp() * (p - q)).sum(-1)
        loss = -q.gather(-1, targets[..., None])[..., 0]
        total += (kl if criterion == "kl" else loss)[valid].sum().item()
        count += int(valid.sum())
    return total / count


def student_of(model, name):
    return apply_plan(model, LayerPlan(STUDENTS[name], 6))


@pytest.mark.parametrize(
    "name, criterion", [("plain", "loss"), ("pruned", "kl"), ("parallelized", "kl"), ("both", "loss")]
)
def test_edits_cost_what_the_literal_equations_of_the_whole_model_give(batches, name, criterion):
    model = tiny_model(6)
    student, plan = student_of(model, name), LayerPlan(STUDENTS[name], 6)
    edits = EditSpace(max_group_size=4).edits(plan)
    assert {edit.kind for edit in edits} == ({"remove"} if name == "both" else {"remove", "parallelize"})
    scores = score(student, batches, edits, criterion, teacher=model)
    expected = {
        edit: naive_measure(literal(model, edit.apply(plan).blocks), batches, model, criterion) for edit in edits
    }
    assert scores.values == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 5) for value in expected.values()}) == len(edits)  # or a mix-up would not show
    whole = naive_measure(literal(model, plan.blocks), batches, model, criterion)
    assert scores.baseline == pytest.approx(whole, abs=1e-5)
    assert (scores.criterion, scores.num_tokens) == (criterion, 48)


def test_another_teacher_than_the_original_can_judge_edits(batches):
    model, teacher = tiny_model(6), tiny_model(3, seed=3)
    student, plan = student_of(model, "parallelized"), LayerPlan(STUDENTS["parallelized"], 6)
    edits = [Edit.parallelize(1, 2, 3), Edit.remove(4), Edit.remove(3)]
    expected = [naive_measure(literal(model, edit.apply(plan).blocks), batches, teacher, "kl") for edit in edits]
    scores = score(student, batches, edits, teacher=teacher)
    assert list(scores.values) == edits
    assert list(scores.values.values()) == pytest.approx(expected, abs=1e-5)
    own = score(student, batches, edits)
    expected = [naive_measure(literal(model, edit.apply(plan).blocks), batches, student, "kl") for edit in edits]
    assert list(own.values.values()) == pytest.approx(expected, abs=1e-5)
    assert own.baseline == pytest.approx(0, abs=1e-6)


def test_removing_one_layer_of_a_pair_scores_the_model_that_is_built_so(model, batches):
    student = parallelize(model, [(1, 2), (3, 4)])
    student.config.attention_dropout = 0.5  # off in copies of parts too
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():  # healed since: its blocks are no longer those of the teacher
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.05)
    scores = score_layers(student.train(), batches, teacher=model)
    assert list(scores.values) == [0, 1, 2, 3, 4] and student.training
    for layer, value in scores.values.items():
        assert value == pytest.approx(evaluate_model(prune(student, [layer]), batches, model).kl, abs=1e-5)


def test_parts_of_parallel_blocks_use_the_attention_implementation_of_the_model(batches):
    model = tiny_model(6)
    student = student_of(model, "parallelized")
    student.set_attn_implementation("eager")
    edits = EditSpace(max_group_size=3).edits(plan_of(student))
    expected = [
        naive_measure(literal(model, edit.apply(plan_of(student)).blocks), batches, model, "kl") for edit in edits
    ]
    scores = score(student, batches, edits, teacher=model)
    assert list(scores.values.values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_any_plan_scores_as_the_model_that_is_built_by_it(batches, name):
    model = tiny_model(6)
    student, plan = student_of(model, name), LayerPlan(STUDENTS[name], 6)
    layers = plan.layers
    plans = [
        plan,  # nothing changed
        LayerPlan(tuple((layer,) for layer in layers), 6),  # pairs run one after the other
        LayerPlan((layers,), 6),  # all at once
        LayerPlan((layers[:1],), 6),
        LayerPlan((layers[-1:],), 6),
        LayerPlan((layers[:2], layers[3:]), 6),
        LayerPlan(((layers[0], layers[2]), (layers[3],)), 6),  # parts of several blocks in one
        LayerPlan(plan.blocks[:-1], 6),  # the end left out
        LayerPlan(plan.blocks[1:], 6),
    ]
    kl, loss = (score(student, batches, plans, criterion, teacher=model) for criterion in ("kl", "loss"))
    for candidate in plans:
        report = evaluate_model(apply_plan(student, candidate), batches, model)
        assert kl.values[candidate] == pytest.approx(report.kl, abs=1e-5), candidate
        assert loss.values[candidate] == pytest.approx(report.loss, abs=1e-5), candidate
    assert kl.values[plan] == kl.baseline and loss.values[plan] == loss.baseline


def test_plans_of_layers_the_model_lacks_are_refused(model, batches):
    student = prune(model, [2])
    with pytest.raises(LayerPruneError, match=r"layers \[2\] are not in the model; it has \[0, 1, 3, 4\]"):
        score(student, batches, [LayerPlan(((0,), (1, 2), (3,)), 5)])
    with pytest.raises(LayerPruneError, match="cannot run in parallel"):
        score(student, batches, [Edit.parallelize(0, 3)])
    with pytest.raises(LayerPruneError, match="nothing to score"):
        score(model, batches, [])
    with pytest.raises(LayerPruneError, match="only the removal of a layer that runs alone"):
        score(model, batches, [LayerPlan.identity(5).parallelize(1, 2)], "block_influence")


def count_calls(modules):
    calls = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    return calls, handles


@pytest.mark.parametrize("depth", [2, 6])
def test_candidates_share_the_layers_before_their_first_change(depth):
    model, batches = tiny_model(depth), random_batches(2)
    removals = [Edit.remove(layer) for layer in range(depth)]
    pairs = [Edit.parallelize(layer, layer + 1) for layer in range(depth - 1)]
    for edits, passes in (
        (removals, depth * (depth - 1) // 2),
        (pairs, sum(depth - first for first in range(depth - 1))),
        (removals + pairs, depth * (depth - 1) // 2 + sum(depth - first for first in range(depth - 1))),
        (removals[-1:], 0),
        (removals[:1], depth - 1),
    ):
        calls, handles = count_calls([layer.self_attn for layer in model.model.layers])
        score(model, batches, edits)
        assert len(calls) == len(batches) * (depth + passes)
        for handle in handles:
            handle.remove()


def test_padding_never_counts_for_edits_of_either_kind():
    student = parallelize(tiny_model(6), [(3, 4)])
    edits = EditSpace(max_group_size=3).edits(plan_of(student))
    short = random_batches(1, rows=2, length=6, padded=False)
    ids = torch.cat([short[0]["input_ids"], torch.full((2, 5), 9)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 5)], dim=1).long()
    expected = score(student, short, edits)
    padded = score(student, [{"input_ids": ids, "attention_mask": mask}], edits)
    assert padded.values == pytest.approx(expected.values, abs=1e-5)
    assert padded.num_tokens == expected.num_tokens == 10


def hooks_of(model):
    return [key for module in model.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("name", ["plain", "both"])
def test_scoring_edits_leaves_the_model_and_its_teacher_as_they_were(batches, name):
    model = tiny_model(6)
    student, edits = student_of(model, name).train(), EditSpace(max_group_size=4).edits(LayerPlan(STUDENTS[name], 6))
    before = [[tensor.clone() for tensor in m.state_dict().values()] for m in (model, student)]
    configs = [m.config.to_dict() for m in (model, student)]
    score(student, batches, edits, teacher=model)
    assert student.training and not model.training
    for m, tensors, config in zip((model, student), before, configs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), tensors, strict=True))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in m.parameters())
        assert [layer.self_attn.layer_idx for layer in m.model.layers] == list(range(len(m.model.layers)))
        assert m.config.to_dict() == config and not hooks_of(m)


@pytest.mark.parametrize("criterion", ["kl", "block_influence", "taylor"])
def test_no_hook_stays_behind_when_the_model_fails(monkeypatch, model, batches, criterion):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.layers[-1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_layers(model, batches, criterion)
    assert not hooks_of(model)


def test_block_influence_judges_only_removals_of_layers_that_run_alone(model, batches):
    with pytest.raises(LayerPruneError, match="cannot score 'parallelize 1\\|2'.* one of kl, loss"):
        score(model, batches, [Edit.remove(1), Edit.parallelize(1, 2)], "block_influence")
    student = parallelize(model, [(1, 2)])
    with pytest.raises(LayerPruneError, match="cannot score removing layer 2"):
        score_layers(student, batches, "block_influence", layers=[0, 2])
    alone = score(student, batches, [Edit.remove(0), Edit.remove(4)], "block_influence")
    first = score_layers(model, batches, "block_influence").values[0]
    assert alone.values[Edit.remove(0)] == pytest.approx(first, abs=1e-6)
    assert (alone.baseline, len(alone.values)) == (0, 2)


def test_equal_costs_of_edits_go_to_the_deeper_first_layer(batches):
    model = tiny_model(6)
    for layer in (2, 4):
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)
    scores = score(model, batches, EditSpace().edits(LayerPlan.identity(6)))
    free = [edit for edit in scores.ranking if scores.values[edit] < 1e-6]
    assert {edit.label for edit in free} == {"2", "4", "1|2", "2|3", "3|4", "4|5"}
    equal = [edit for edit in free if scores.values[edit] == scores.values[free[0]]]
    assert len(equal) > 1
    assert scores.safest == free[0] and free[0].layers[0] == max(edit.layers[0] for edit in equal)


def test_scores_of_edits_are_written_by_label(model, batches):
    edits = [Edit.remove(3), Edit.parallelize(0, 1)]
    scores = score(model, batches, edits, "loss")
    written = scores.to_dict()
    assert set(written["values"]) == {"3", "0|1"}
    assert {Edit.from_label(label): value for label, value in written["values"].items()} == scores.values
    assert (written["criterion"], written["baseline"], written["num_tokens"]) == ("loss", scores.baseline, 48)


def test_every_batch_is_reported_once(model, batches):
    done = []
    score(model, batches, [Edit.remove(1), Edit.parallelize(1, 2)], on_batch=lambda: done.append(1))
    assert len(done) == len(batches)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_states_held_at_a_time_are_bounded(model, rows, monkeypatch):
    batches = random_batches(2, rows=4)
    expected = score_layers(model, batches)
    seen, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **more: (
        seen.append(len(input_ids)), forward(input_ids, **more))[1])  # fmt: skip
    of_row = 12 * 32 * 4 * (5 + 1 + 5)  # tokens x hidden x bytes x (layers, the model, candidates)
    monkeypatch.setattr(candidates, "MAX_STATE_BYTES", rows * of_row)
    scores = score_layers(model, batches)
    assert set(seen) == {rows} and sum(seen) == 8
    assert scores.values == pytest.approx(expected.values, rel=1e-4, abs=1e-6)
    assert scores.standard_errors == pytest.approx(expected.standard_errors, rel=1e-3)


def on_disk(model, folder):
    model.save_pretrained(folder / "model")
    where = device_map(str(folder / "model"), torch.device("cpu"))
    return load_model(str(folder / "model"), device_map=where, offload_folder=str(folder / "offload"))


def test_one_sweep_reads_every_weight_of_a_layer_once(model, tmp_path, monkeypatch):
    offloaded, read, get = on_disk(model, tmp_path), [], OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, key: read.append(key) or get(self, key))
    expected = score_layers(model, random_batches(4))
    for states, sweeps in ((candidates.MAX_STATE_BYTES, 1), (1, model.config.num_hidden_layers)):
        monkeypatch.setattr(candidates, "MAX_STATE_BYTES", states)
        read.clear()
        scores = score_layers(offloaded, random_batches(4))
        assert scores.values == pytest.approx(expected.values, rel=1e-5)
        assert scores.standard_errors == pytest.approx(expected.standard_errors, rel=1e-4)
        of_layers = [name for name in read if ".layers." in name]
        assert len(of_layers) == sweeps * len(set(of_layers)) > 0


def test_a_model_on_disk_gets_the_same_scores(batches, tmp_path):
    model = tiny_model(6)
    offloaded = on_disk(model, tmp_path)
    edits = [Edit.remove(0), Edit.remove(3), Edit.parallelize(1, 2)]
    for criterion in ("kl", "loss"):
        expected = score(model, batches, edits, criterion)
        assert score(offloaded, batches, edits, criterion).values == pytest.approx(expected.values, rel=1e-5)
    expected = score_layers(model, batches, "block_influence")
    assert score_layers(offloaded, batches, "block_influence").values == pytest.approx(expected.values, rel=1e-5)
    assert next(offloaded.model.layers[2].mlp.parameters()).device.type == "meta"  # its weights are let go again
    assert score_layers(prune(model, [2]), batches, teacher=offloaded).values == pytest.approx(
        score_layers(prune(model, [2]), batches, teacher=model).values, rel=1e-5
    )
    with pytest.raises(LayerPruneError, match="criterion='taylor' needs the whole model in memory"):
        score_layers(offloaded, batches, "taylor")
    with pytest.raises(LayerPruneError, match="partly on disk"):
        score_layers(offloaded, batches, compensation="least_squares")


@pytest.mark.parametrize(
    "criterion, how",
    [("kl", "bfloat16"), ("kl", "autocast"), ("block_influence", "bfloat16"), ("angular_distance", "autocast"),
     ("taylor", "autocast")],
)  # fmt: skip
def test_half_precision_finds_the_same_layer(criterion, how, batches):
    model = tiny_model(6)
    for layer in (2, 4):  # all but the identity
        for part in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            with torch.no_grad():
                part.weight *= 0.01 * (layer - 1)
    exact = score_layers(model, batches, criterion)
    if how == "bfloat16":
        scores = score_layers(model.bfloat16(), batches, criterion)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_layers(model, batches, criterion)
    assert exact.safest == scores.safest == 2
    assert scores.values == pytest.approx(exact.values, rel=0.1, abs=0.03)


def test_arguments_that_do_not_fit_together_are_refused(model, batches):
    edits = [Edit.remove(1), Edit.remove(2)]
    for message, options in {
        "compensation='folding' is unknown": {"compensation": "folding"},
        "races and compensation are for kl, loss, tasks": {"compensation": "least_squares", "criterion": "taylor"},
        "tasks are for criterion='tasks'": {"tasks": [object()]},
    }.items():
        with pytest.raises(LayerPruneError, match=message):
            score(model, batches, edits, **options)
    for criterion in ("kl", "taylor", "block_influence"):
        with pytest.raises(LayerPruneError, match="no token to score"):
            score_layers(model, None, criterion)


def weight_norm(model, batches, blocks):
    return [sum(float(p.norm()) for p in model.base_model.layers[block].parameters()) for block in blocks]


def angles_of_their_own(model, batches, blocks):
    return measure_angles(model, batches, [(block, block + 1) for block in blocks], "angular_distance")


def test_a_criterion_of_ones_own_goes_through_scores_and_rounds(tmp_path, tokenizer, texts, batches):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1e-3)
    by_name = score_layers(model, None, f"{__name__}:weight_norm")
    assert score_layers(model, None, weight_norm).values == by_name.values and by_name.safest == 2
    assert (by_name.criterion, by_name.certainty) == (f"{__name__}:weight_norm", "")
    for name in (f"{__name__}:nothing", "no_such_module:weight_norm", ":"):
        with pytest.raises(LayerPruneError, match=f"criterion='{name}' cannot be imported"):
            score_layers(model, None, name)
    with pytest.raises(LayerPruneError, match="criterion='math:pi' is of type float, not a function"):
        score_layers(model, None, "math:pi")
    partial = functools.partial(weight_norm)
    assert score_layers(model, None, partial).values == by_name.values
    angles = score_layers(model, batches, angles_of_their_own)
    assert angles.values == score_layers(model, batches, "angular_distance").values and angles.standard_errors
    for wrong in ([1.0], None, torch.ones(5, 2), dict.fromkeys(range(5), 1.0)):
        with pytest.raises(LayerPruneError, match=r"returned .*; it must return a number for each of 5 blocks"):
            score_layers(model, None, lambda *_, wrong=wrong: wrong)
    modes = []
    score_layers(model.train(), None, lambda model, *_: modes.append(model.training) or range(5))
    assert modes == [False] and model.training
    with pytest.raises(LayerPruneError, match="is a function, which a run cannot record"):
        tiny_config(tmp_path, criterion=weight_norm)
    args = tiny_config(tmp_path, criterion=by_name.criterion, target_num_layers=4, max_steps=1)
    IterativeLayerDistillTrainer(model=model, args=args, train_dataset=texts, processing_class=tokenizer).train()
    assert json.loads((tmp_path / "report.json").read_text())["rounds"][0]["edits"] == ["2"]
