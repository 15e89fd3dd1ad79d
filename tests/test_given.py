"""Models and settings as users bring them: models that other trainers have changed, settings changed after they were
made, trainers with methods of their own."""

from __future__ import annotations

import json
import shutil
from types import MethodType

import pytest
import torch
from conftest import random_batches, rounds_of, short_texts, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPruneError,
    compensate,
    evaluate_model,
    load_model,
    merge,
    parallelize,
    prune,
    restore,
    score_layers,
    unparallelize,
)
from hf_layerprune.trainer.config import settled


def in_a_trainer(model, tokenizer, folder):
    """`model` after an `SFTTrainer` was made of it, which replaces its forward for good."""
    args = SFTConfig(str(folder), max_length=32, use_cpu=True, bf16=False, report_to="none")
    SFTTrainer(model, args, train_dataset=short_texts(), processing_class=tokenizer)
    assert "forward" in vars(model)
    return model.eval()


def with_forwards_of_a_user(model, tokenizer, folder):
    mlp, model_forward, mlp_forward = model.model.layers[3].mlp, model.forward, model.model.layers[3].mlp.forward
    mlp.forward = lambda states: mlp_forward(states)
    model.forward = lambda *args, **kwargs: model_forward(*args, **kwargs)
    return model


def test_a_forward_that_is_bound_to_its_module_comes_along():
    teacher, ids = tiny_model(), random_batches()[0]["input_ids"]
    mlp = teacher.model.layers[3].mlp
    mlp.forward = MethodType(lambda self, states: self.down_proj(self.up_proj(states)), mlp)
    student = prune(teacher, [])
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    with torch.no_grad():
        student.model.layers[3].mlp.up_proj.weight.zero_()
    assert not torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("changed", [in_a_trainer, with_forwards_of_a_user])
def test_a_student_of_a_model_with_another_forward_computes_with_its_own_weights(changed, tokenizer, tmp_path):
    teacher, batches = changed(tiny_model(), tokenizer, tmp_path), random_batches()
    ids = batches[0]["input_ids"]
    pruned = prune(teacher, [1, 2])
    students = [pruned, prune(teacher, [1], share_weights=True), merge(teacher, [(1, 2)], batches)]
    students += [compensate(pruned, batches, "least_squares", teacher), restore(pruned, teacher, [1])]
    for student in students:
        fresh = Qwen2ForCausalLM(student.config).eval()
        fresh.load_state_dict(student.state_dict())
        assert torch.equal(student(ids).logits, fresh(ids).logits)
        assert not torch.equal(student(ids).logits, teacher(ids).logits)


def test_a_run_of_a_model_from_another_trainer_ends(make, tokenizer, tmp_path):
    make(in_a_trainer(tiny_model(), tokenizer, tmp_path / "sft"), target_num_layers=4, measure_speed=True).train()
    assert len(load_model(tmp_path / "run" / "model").model.layers) == 4


def test_adapters_in_a_model_are_refused_wherever_it_comes_from(make, tokenizer, texts, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    base, batches = adapted.get_base_model(), random_batches()
    for call in (
        lambda: prune(base, [1]),
        lambda: parallelize(base, [(1, 2)]),
        lambda: merge(base, [(1, 2)], batches),
        lambda: score_layers(base, batches),
        lambda: make(base),
        lambda: IterativeLayerDistillTrainer(
            tiny_model(), tiny_config(tmp_path), texts, processing_class=tokenizer, teacher=base
        ),
    ):
        with pytest.raises(LayerPruneError, match=r"carries adapters; .*merge_and_unload"):
            call()
    assert len(prune(adapted.merge_and_unload(), [1]).model.layers) == 4


def test_layers_taken_out_by_hand_are_counted():
    model = tiny_model()
    del model.model.layers[2]
    with pytest.raises(LayerPruneError, match="has 4 layers but its config says num_hidden_layers=5; take layers out"):
        prune(model, [1])
    model.config.num_hidden_layers, model.config.layer_types = 4, ["full_attention"] * 4
    assert len(prune(model, [1]).model.layers) == 3


def test_a_plain_model_cannot_claim_parallel_layers():
    model = tiny_model(4)
    model.config.layer_plan = {"num_teacher_layers": 5, "blocks": [[0], [1], [2], [3, 4]]}
    for call in (lambda: prune(model, [1]), lambda: unparallelize(model)):
        with pytest.raises(LayerPruneError, match=r"has \(3, 4\) in parallel, which a model of type qwen2 cannot"):
            call()


def test_frozen_weights_stay_frozen():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    students = [prune(model, [3]), parallelize(model, [(3, 4)]), merge(model, [(3, 4)], random_batches())]
    students.append(unparallelize(students[1]))
    for student in students:
        assert not student.model.embed_tokens.weight.requires_grad
        assert all(parameter.requires_grad for parameter in student.model.layers.parameters())
    for layer in (1, 2):
        model.model.layers[layer].requires_grad_(False)
    for student in (parallelize(model, [(1, 2), (3, 4)]), merge(model, [(1, 2)], random_batches())):
        states = [all(p.requires_grad for p in layer.parameters()) for layer in student.model.layers]
        assert states == [True, False, True] + [True] * (len(states) - 3)
    apart = unparallelize(parallelize(model, [(1, 2)]))
    assert [layer.mlp.up_proj.weight.requires_grad for layer in apart.model.layers] == [True, False, False, True, True]
    model.requires_grad_(False)
    for student in (parallelize(model, [(3, 4)]), merge(model, [(3, 4)], random_batches())):
        assert not any(parameter.requires_grad for parameter in student.parameters())


def test_the_default_dtype_of_torch_does_not_matter_for_a_merge():
    model, batches = tiny_model(), random_batches()
    wanted = merge(model, [(1, 2)], batches).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = merge(model, [(1, 2)], batches).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_the_cure_for_sliding_windows_works(family, tmp_path):
    if family == "Qwen2":
        tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=2).save_pretrained(tmp_path)
        changes = {"use_sliding_window": False}
    else:
        shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        config = MistralConfig(**shape, num_hidden_layers=3, num_key_value_heads=1, sliding_window=8)
        MistralForCausalLM(config).save_pretrained(tmp_path)
        changes = {"sliding_window": None}
    (name, value), path = *changes.items(), tmp_path / "config.json"
    with pytest.raises(LayerPruneError, match=f'write "{name}": {json.dumps(value)} into its config.json, and remove'):
        load_model(tmp_path)
    settings = json.loads(path.read_text()) | changes
    settings.pop("layer_types", None)
    path.write_text(json.dumps(settings))
    assert prune(load_model(tmp_path), [1])


def test_labels_must_be_token_ids():
    batch = random_batches(1)[0]
    for kind in (torch.float32, torch.bool):
        with pytest.raises(LayerPruneError, match=f"batch 0: labels are {kind}; give token ids"):
            evaluate_model(tiny_model(), [batch | {"labels": batch["input_ids"].to(kind)}])


# ------------------------------------------------------------------------------------------------ settings


class Evaluations(TrainerCallback):
    def __init__(self):
        self.kls = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.kls.append(metrics["eval_kl"])


@pytest.mark.parametrize("name", ["kl", "eval_kl"])
def test_the_best_checkpoint_is_the_one_with_the_lowest_kl(make, name):
    seen, every_step = Evaluations(), {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": name, "save_steps": 1}
    trainer = make(callbacks=[seen], target_num_layers=4, max_steps=4, learning_rate=0.1, **every_step, **best)
    trainer.train()
    assert min(seen.kls) < seen.kls[-1]  # else it would be the best whatever is chosen by
    assert rounds_of(trainer)[0]["kl"] == pytest.approx(min(seen.kls), rel=1e-5)


def test_what_is_not_measured_chooses_no_checkpoint(tmp_path):
    with pytest.raises(LayerPruneError, match="metric_for_best_model='accuracy' is not measured; choose one of loss"):
        tiny_config(tmp_path, metric_for_best_model="accuracy")
    assert tiny_config(tmp_path, metric_for_best_model="agreement").greater_is_better


def test_settings_may_be_changed_after_they_are_made(tmp_path, tokenizer, texts):
    args = tiny_config(tmp_path, target_num_layers=4, heal=False)
    args.target_num_layers, args.protect_last_layers, args.trained_layers = 3, 3, "0,1"
    data = {"train_dataset": texts, "processing_class": tokenizer}
    trainer = IterativeLayerDistillTrainer(tiny_model(), args, **data)
    trainer.train()
    assert trainer.run.rounds[-1].plan.blocks == ((2,), (3,), (4,))
    assert trainer.args.trained_layers == (0, 1) and args.trained_layers == "0,1"
    args.target_num_layers = 9
    with pytest.raises(LayerPruneError, match="target_num_layers=9 but"):
        IterativeLayerDistillTrainer(tiny_model(), args, **data)


def test_what_follows_from_a_setting_follows_its_change(tmp_path):
    args = tiny_config(tmp_path, criterion="tasks", metric_for_best_model="kl")
    args.criterion, args.metric_for_best_model = "loss", "agreement"
    changed = settled(args)
    assert (changed.criterion, changed.tasks, changed.greater_is_better) == ("loss", None, True)
    args.metric_for_best_model = "accuracy"
    with pytest.raises(LayerPruneError, match="metric_for_best_model='accuracy' is not measured"):
        settled(args)
    args = tiny_config(tmp_path)
    args.tasks = ["a.yaml", "b.yaml"]
    assert (settled(args).criterion, settled(args).tasks) == ("tasks", "a.yaml,b.yaml")
    for tasks in ("default", "a.yaml"):  # what was given is not dropped for what is given later
        for criterion in ("kl", "loss"):
            args = tiny_config(tmp_path, tasks=tasks)
            args.criterion = criterion
            with pytest.raises(LayerPruneError, match=f"tasks='{tasks}' are for criterion='tasks', not '{criterion}'"):
                settled(args)


def test_a_student_may_be_narrower_than_its_teacher(tmp_path, tokenizer, texts):
    narrow = tiny_model(4, intermediate_size=40)
    narrow.config.layer_plan = {"num_teacher_layers": 5, "blocks": [[0], [1], [2], [4]]}
    data = {"train_dataset": texts, "processing_class": tokenizer, "teacher": tiny_model()}
    args = tiny_config(tmp_path, target_num_layers=4, trained_layers="all")
    trainer = IterativeLayerDistillTrainer(narrow, args, **data)
    trainer.train()
    assert trainer.run.rounds[-1].plan.depth == 4
    with pytest.raises(LayerPruneError, match="intermediate_size 40 and 48"):
        restore(narrow, data["teacher"], [3])


def test_options_of_loading_that_load_nothing_are_refused(make, saved_model, tmp_path):
    with pytest.raises(LayerPruneError, match="has no effect on a loaded model; name the model"):
        make(model_init_kwargs={"attn_implementation": "eager"})
    for name in ("dtype", "torch_dtype"):
        assert make(str(saved_model), model_init_kwargs={name: "bfloat16"}).start.dtype == torch.bfloat16


def test_a_model_that_checkpoints_reentrantly_heals_like_any_other(make, tmp_path):
    healed = []
    for reentrant in (False, True):
        model = tiny_model()
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        trainer = make(model, target_num_layers=4, trained_layers="neighbours")
        trainer.train()
        assert rounds_of(trainer)[0]["kl"] != rounds_of(trainer)[0]["kl_before_healing"]
        healed.append(load_model(tmp_path / "run" / "model").state_dict())
        shutil.rmtree(tmp_path / "run")
    assert all(torch.equal(value, healed[1][name]) for name, value in healed[0].items())


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_checkpoint_without_its_optimizer_is_not_resumed_from(make, tmp_path):
    settings = {"target_num_layers": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"save_only_model": True}
    whole = make(**settings)
    whole.train()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[Stop()], **settings).train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert rounds_of(resumed)[0]["kl"] == rounds_of(whole)[0]["kl"]


def test_the_log_keeps_every_round(make):
    trainer = make(target_num_layers=3, logging_steps=1)
    trainer.train()
    logged = [entry["round"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == sorted(logged) and set(logged) == {1, 2}


def test_methods_that_no_healing_calls_are_refused(tmp_path, tokenizer, texts, make):
    class Mine(IterativeLayerDistillTrainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError

    with pytest.raises(LayerPruneError, match="Mine overrides compute_loss, but every round is healed by"):
        Mine(tiny_model(), tiny_config(tmp_path, target_num_layers=4), texts, processing_class=tokenizer)
    with pytest.raises(LayerPruneError, match=r"use evaluate\(eval_dataset=...\)"):
        make().predict(texts)
