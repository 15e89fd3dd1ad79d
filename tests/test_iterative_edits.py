"""Rounds that run layers in parallel: chosen, healed, saved, resumed, against the original teacher."""

import copy

import pytest
import torch
from conftest import load, random_batches, read_report, rounds_of, tiny_model
from peft import LoraConfig
from test_resuming import KillAt, Killed

import hf_layerprune.budget as budget
from hf_layerprune import LayerPlan, LayerPruneError, PrunedQwen2ForCausalLM, evaluate_model
from hf_layerprune.budget import BlockCosts, EditSpace
from hf_layerprune.plan import Edit
from hf_layerprune.scoring import score
from hf_layerprune.surgery import apply_plan, plan_of

PAIRS = {"edits": "parallelize", "target_num_layers": 4, "trained_layers": "neighbours", "measure_speed": False}


def test_pairs_are_chosen_healed_and_saved(make, tmp_path):
    teacher = tiny_model(num_layers=6)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(teacher, **PAIRS)
    edits = EditSpace(("parallelize",)).edits(LayerPlan.identity(6))
    expected = score(teacher, trainer.calibration_batches, edits)
    trainer.train()
    report = read_report(tmp_path / "run")
    first, second = report["rounds"]
    assert first["edits"] == [expected.safest.label] and first["removed_layers"] == []
    assert first["scores"] == pytest.approx({edit.label: cost for edit, cost in expected.values.items()})
    assert [record["num_layers"] for record in report["rounds"]] == [5, 4]
    assert second["num_parameters"] > report["teacher"]["num_parameters"] - 6 * 2 * 32  # only norms became fewer
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    final = load(tmp_path / "run" / "model")
    assert type(final) is PrunedQwen2ForCausalLM
    assert plan_of(final) == LayerPlan.from_json((tmp_path / "run" / "plan.json").read_text())
    measured = evaluate_model(final, trainer.eval_batches, teacher)
    assert measured.loss == pytest.approx(second["loss"], abs=1e-5)
    assert measured.kl == pytest.approx(second["kl"], abs=1e-5)
    unhealed = evaluate_model(apply_plan(teacher, plan_of(final)), trainer.eval_batches, teacher)
    assert unhealed.loss == pytest.approx(second["loss_unhealed"], abs=1e-5)
    assert "trust_remote_code=True" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert (tmp_path / "run" / "model" / "modeling_pruned_qwen2.py").is_file()


def test_only_the_paired_block_moves(make, tmp_path):
    teacher = tiny_model(num_layers=6)
    make(teacher, **PAIRS | {"target_num_layers": 5}).train()
    student = load(tmp_path / "run" / "model")
    unhealed = apply_plan(teacher, plan_of(student))
    block = plan_of(student).blocks.index(plan_of(student).parallel_pairs[0])
    for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True):
        assert torch.equal(healed, original) == (f".layers.{block}." not in name), name


def test_adapters_on_the_paired_block_are_merged(make, tmp_path):
    teacher = tiny_model(num_layers=6)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
    make(teacher, peft_config=config, **PAIRS | {"target_num_layers": 5}).train()
    student = load(tmp_path / "run" / "model")
    assert type(student) is PrunedQwen2ForCausalLM
    unhealed = apply_plan(teacher, plan_of(student))
    block = plan_of(student).blocks.index(plan_of(student).parallel_pairs[0])
    moved = {
        name
        for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True)
        if not torch.equal(healed, original)
    }
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    assert moved == {f"model.layers.{block}.{part}.weight" for part in parts}


def test_adapters_that_pairs_have_no_default_for_are_refused_before_a_layer_is_scored(make):
    with pytest.raises(LayerPruneError, match="name them, such as q_proj and v_proj"):
        make(peft_config=LoraConfig(r=4), **PAIRS)
    make(peft_config=LoraConfig(r=4), target_num_layers=4)


def test_healing_a_pair_brings_it_back(make):
    teacher = tiny_model(num_layers=6)
    settings = {"max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    trainer = make(teacher, **PAIRS | settings | {"target_num_layers": 5})
    trainer.train()
    (record,) = rounds_of(trainer)
    assert record["kl"] < record["kl_before_healing"] == record["kl_unhealed"]


def test_both_kinds_of_edit_under_a_budget_of_latency(make, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "measure_latency", lambda *_: BlockCosts(1.0, (1.0, 1.4)))
    settings = {"edits": "remove,parallelize", "target_num_layers": None, "target_latency": 0.7, "heal": False}
    trainer = make(tiny_model(num_layers=6), measure_speed=False, **settings)
    trainer.train()
    plans = [LayerPlan.identity(6), *(LayerPlan.from_dict(record["plan"]) for record in rounds_of(trainer))]

    def share(plan):
        return (1 + sum(1.0 if len(block) == 1 else 1.4 for block in plan.blocks)) / 7

    assert share(plans[-1]) <= 0.7 < share(plans[-2])
    for plan, record in zip(plans, rounds_of(trainer), strict=False):
        prices = {}
        for label, cost in record["scores"].items():
            saved = share(plan) - max(0.7, share(Edit.from_label(label).apply(plan)))
            cost -= record["all_scores"][0]["baseline"]
            prices[label] = (cost > 0, cost / saved if cost > 0 else cost * saved)
        assert record["edits"] == [min(prices, key=prices.get)]
    settings["target_latency"] = 0.5
    deeper = make(tiny_model(num_layers=6), measure_speed=False, **settings)
    deeper.train(resume_from_checkpoint=True)
    assert len(rounds_of(deeper)) > len(plans) - 1
    assert deeper.run.latency == BlockCosts(1.0, (1.0, 1.4))


@pytest.mark.parametrize("event, count", [("on_phase_begin", 3), ("on_step_end", 2), ("on_step_end", 4)])
def test_resume_ends_the_same(make, whole, tmp_path, event, count):
    settings = PAIRS | {"edits": "remove,parallelize", "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with pytest.raises(Killed):
        make(tiny_model(num_layers=6), callbacks=[KillAt(event, count)], **settings).train()
    make(tiny_model(num_layers=6), **settings).train(resume_from_checkpoint=True)
    expected, cut = load(whole(num_layers=6, **settings) / "model"), load(tmp_path / "run" / "model")
    assert plan_of(expected) == plan_of(cut)
    for a, b in zip(expected.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_paired_student_is_compressed_further_in_the_same_indices(make, tmp_path):
    teacher = tiny_model(num_layers=6)
    make(teacher, **PAIRS | {"target_num_layers": 5}).train()
    paired = load(tmp_path / "run" / "model")
    settings = {"edits": "remove", "target_num_layers": None, "target_num_parameters": paired.num_parameters() - 1}
    trainer = make(paired, folder="further", **PAIRS | settings)
    trainer.train()
    (record,) = rounds_of(trainer)
    assert set(map(int, record["scores"])) == set(range(6))  # also each half of the pair
    after = LayerPlan.from_dict(record["plan"])
    assert after == Edit.from_label(record["edits"][0]).apply(plan_of(paired))
    student = load(tmp_path / "further" / "model")
    ids = random_batches(1, padded=False)[0]["input_ids"]
    assert torch.isfinite(student(ids).logits).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"edits": "swap"}, "choose one or more of"),
        ({"max_group_size": 1}, "max_group_size=1"),
        ({"target_num_layers": 2}, "target_num_layers=2 is out of reach"),
        ({"target_latency": 0.5}, "give exactly one of depth"),
        ({"target_num_layers": None, "target_latency": 1.5}, "latency=1.5"),
        (
            {"target_num_layers": None, "target_num_parameters": 10},
            "parameters=10 is out of reach: parallelize can go from",
        ),
        ({"criterion": "block_influence"}, "block_influence'? cannot score|needs a criterion that is measured"),
    ],
)
def test_requests_that_cannot_work_are_refused(make, tmp_path, changes, message):
    with pytest.raises(LayerPruneError, match=message):
        make(tiny_model(num_layers=6), **PAIRS | changes).open_run()
    assert not (tmp_path / "run" / "run_state.json").exists()
