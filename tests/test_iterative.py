import copy
import inspect
import json
import shutil

import pytest
import torch
from conftest import load, random_batches, read_report, rounds_of, tiny_config, tiny_model
from datasets import Dataset
from forked import run_ranks, run_without_package
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTConfig

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPlan,
    LayerPruneError,
    evaluate_model,
    prune,
    score_layers,
)
from hf_layerprune.surgery import plan_of


def test_two_rounds_end_to_end(make, tmp_path):
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(teacher, measure_speed=True)
    trainer.train()
    folder = tmp_path / "run"
    report = read_report(folder)

    assert report["teacher"]["num_layers"] == 5
    assert [record["num_layers"] for record in report["rounds"]] == [4, 3]
    for record in report["rounds"]:
        for key in ("perplexity_unhealed", "perplexity_before_healing", "perplexity", "kl", "num_parameters",
                    "seconds_scoring", "seconds_healing", "train_tokens", "decode_tokens_per_second"):  # fmt: skip
            assert record[key] > 0, key
        scores = {int(layer): cost for layer, cost in record["scores"].items()}
        assert record["removed_layer"] == min(scores, key=scores.get)
        assert record["train_tokens"] == 3 * 2 * 32
    assert report["rounds"][1]["scores"].keys() == report["rounds"][0]["scores"].keys() - {
        str(report["rounds"][0]["removed_layer"])
    }
    # round 1 is the teacher without a layer: before healing and never healed are the same
    assert report["rounds"][0]["perplexity_before_healing"] == report["rounds"][0]["perplexity_unhealed"]

    # every trainable parameter of both students moved, none of the teacher's
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    plan, student = teacher, None
    for number, record in enumerate(report["rounds"], start=1):
        student = load(folder / "rounds" / f"{number:02d}")
        plan = LayerPlan.from_dict(record["plan"])
        assert plan_of(student) == plan
        unhealed = prune(teacher, plan.removed_layers)
        for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True):
            assert not torch.equal(healed, original), f"round {number}: {name} was not trained"

    # the last round, the final model and the plan agree, and what is on disk is what was measured
    final = load(folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), final.parameters(), strict=True))
    assert LayerPlan.from_json((folder / "plan.json").read_text()) == plan
    measured = evaluate_model(final, trainer.eval_batches, teacher)
    assert measured.loss == pytest.approx(report["rounds"][-1]["loss"], abs=1e-5)
    assert measured.kl == pytest.approx(report["rounds"][-1]["kl"], abs=1e-5)
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "| 3 |" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, is_harmed",
    [
        ({"learning_rate": 0.05}, True),
        ({"learning_rate": 1e-3, "max_steps": 20}, False),
        ({"learning_rate": 0.05, "lm_weight": 1.0}, False),
    ],
)
def test_a_healing_that_makes_it_worse_is_reported(changes, is_harmed, make, caplog):
    trainer = make(tiny_model(), target_num_layers=4, **changes)
    trainer.train()
    (record,) = trainer.file.record.rounds
    assert (record.quality.kl > record.before_healing.kl) == (changes["learning_rate"] == 0.05)
    assert ("round 1: healing raised KL to the teacher from" in caplog.text) == is_harmed
    assert not is_harmed or "lower learning_rate (now 0.05)" in caplog.text


def test_the_first_choice_is_the_one_score_layers_makes(make):
    teacher = tiny_model()
    trainer = make(teacher, target_num_layers=4)
    expected = score_layers(teacher, trainer.calibration_batches, "kl")
    trainer.train()
    assert rounds_of(trainer)[0]["removed_layer"] == expected.safest
    assert rounds_of(trainer)[0]["scores"] == {str(layer): cost for layer, cost in expected.values.items()}


def test_mixed_precision_trains_and_leaves_a_plain_student(make, tmp_path):
    teacher = tiny_model()
    trainer = make(teacher, bf16=True, max_steps=2)
    trainer.train()
    student = load(tmp_path / "run" / "model")
    assert student.dtype == torch.float32
    measured = evaluate_model(student, trainer.eval_batches, teacher)
    assert measured.loss == pytest.approx(rounds_of(trainer)[-1]["loss"], abs=1e-5)


def test_healing_heals(make):
    trainer = make(target_num_layers=4, max_steps=30, learning_rate=2e-3, per_device_train_batch_size=4)
    trainer.train()
    record = rounds_of(trainer)[-1]
    assert record["kl"] < 0.7 * record["kl_before_healing"]


def test_student_loads_where_only_transformers_is(make, tmp_path):
    make(target_num_layers=4, max_steps=1).train()
    script = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "run" / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder)
ids = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
a, b = (model.generate(**ids, max_new_tokens=12, do_sample=False, use_cache=flag) for flag in (True, False))
assert type(model).__name__ == "Qwen2ForCausalLM" and torch.equal(a, b)
"""
    run_without_package(script, tmp_path / "home")


def test_only_the_neighbours_move(make, tmp_path):
    teacher = tiny_model()
    make(teacher, target_num_layers=4, trained_layers="neighbours").train()
    report = read_report(tmp_path / "run")
    removed = report["rounds"][0]["removed_layer"]
    plan = LayerPlan.identity(5).remove(removed)
    neighbours = {plan.position_of(layer) for layer in (removed - 1, removed + 1) if layer in plan.layers}
    student, unhealed = load(tmp_path / "run" / "model"), prune(teacher, [removed])
    for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True):
        moved = "layers" in name and int(name.split(".")[2]) in neighbours
        assert torch.equal(healed, original) != moved, name


def test_named_layers_and_protection(make, tmp_path):
    trainer = make(trained_layers="0", protect_first_layers=1, protect_last_layers=1)
    trainer.train()
    assert all(set(record["scores"]) <= {"1", "2", "3"} for record in rounds_of(trainer))
    student, teacher = load(tmp_path / "run" / "model"), tiny_model()
    unhealed = prune(teacher, plan_of(student).removed_layers)
    for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True):
        assert torch.equal(healed, original) != ("layers.0." in name), name


def test_lora_is_merged_into_a_plain_student(make, tmp_path):
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = make(teacher, target_num_layers=3, trained_layers="neighbours", peft_config=config)
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    student = load(tmp_path / "run" / "model")
    unhealed = prune(teacher, plan_of(student).removed_layers)
    assert student.state_dict().keys() == unhealed.state_dict().keys()
    moved = {name for (name, a), b in zip(student.named_parameters(), unhealed.parameters(), strict=True)
             if not torch.equal(a, b)}  # fmt: skip
    assert moved and all("q_proj.weight" in name or "down_proj.weight" in name for name in moved)
    measured = evaluate_model(student, trainer.eval_batches, teacher)
    assert measured.loss == pytest.approx(rounds_of(trainer)[-1]["loss"], abs=1e-5)


def test_several_layers_a_round_are_scored_one_after_the_other(make):
    teacher = tiny_model()
    trainer = make(teacher, layers_per_round=2, target_num_layers=2, max_steps=1)
    trainer.train()
    first, second = rounds_of(trainer)
    assert (first["num_layers"], second["num_layers"]) == (3, 2)
    expected = score_layers(prune(teacher, first["removed_layers"][:1]), trainer.calibration_batches, "kl", teacher)
    assert first["removed_layers"][1] == expected.safest
    assert len(second["removed_layers"]) == 1


def test_two_processes_agree_and_one_writes(tmp_path):
    script = f"""
import json, os, sys
import conftest, torch
from pathlib import Path
from hf_layerprune import IterativeLayerDistillTrainer
torch.set_num_threads(1)
texts = conftest.short_texts()
args = conftest.tiny_config(Path({str(tmp_path / "run")!r}), save_strategy="steps", save_steps=2, measure_speed=False)
trainer = IterativeLayerDistillTrainer(model=conftest.tiny_model(), args=args, train_dataset=texts, eval_dataset=texts,
                                       processing_class=conftest.byte_tokenizer())
trainer.train()
seen = [trainer.accelerator.num_processes, [r["removed_layers"] for r in conftest.rounds_of(trainer)],
        [r["perplexity"] for r in conftest.rounds_of(trainer)],
        [p.double().sum().item() for p in trainer.model.parameters()]]
Path({str(tmp_path)!r}, "rank" + os.environ["RANK"]).write_text(json.dumps(seen))
"""
    run_ranks(2, script)
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first == second and first[0] == 2
    assert [record["removed_layers"] for record in read_report(tmp_path / "run")["rounds"]] == first[1]
    assert load(tmp_path / "run" / "model").config.num_hidden_layers == 3


def test_the_trained_student_is_independent_of_the_users_model(make):
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(teacher, target_num_layers=4, trained_layers="neighbours")
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_head_is_trained_whole_next_to_adapters(make, tmp_path):
    teacher = tiny_model()  # whose head is its embedding
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make(teacher, target_num_layers=4, peft_config=config)
    trainer.train()
    student = load(tmp_path / "run" / "model")
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    measured = evaluate_model(student, trainer.eval_batches, teacher)
    assert measured.kl == pytest.approx(rounds_of(trainer)[-1]["kl"], abs=1e-5)


def test_adapters_on_every_linear_module_of_a_few_layers(make, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    make(tiny_model(3), target_num_layers=2, trained_layers="neighbours", peft_config=config).train()
    assert len(load(tmp_path / "run" / "model").model.layers) == 2


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(target_modules=r".*q_proj"), "layers_to_transform.* cannot be used when .* is a str"),
        (LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]), "layers_to_transform"),
        (LoraConfig(target_modules=["query"]), "'query'.* not found"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "target_modules names lm_head, which the layers"),
        (LoraConfig(target_modules=["self_attn.q_proj", "up_projection"]), "target_modules names up_projection"),
        (PromptTuningConfig(num_virtual_tokens=4), "PromptTuningConfig must support layers_to_transform"),
    ],
)
def test_adapters_that_cannot_be_made_are_refused_before_a_layer_is_scored(make, config, message):
    with pytest.raises(LayerPruneError, match=message):
        make(peft_config=config)


def test_biases_of_layers_that_are_not_trained_stay_the_teachers(make):
    with pytest.raises(LayerPruneError, match="bias='all' trains the biases of every layer; set bias='lora_only', or"):
        make(peft_config=LoraConfig(target_modules=["q_proj"], bias="all"), trained_layers="neighbours")
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    for bias, trained_layers in (("all", "all"), ("lora_only", "neighbours")):
        config, settings = LoraConfig(target_modules=["q_proj"], bias=bias), {"trained_layers": trained_layers}
        make(teacher, folder=bias, target_num_layers=4, peft_config=config, **settings).train()
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_an_optimizer_that_cannot_be_made_is_refused_before_a_layer_is_scored(make):
    with pytest.raises(LayerPruneError, match="Invalid beta parameter at index 1: 2"):
        make(adam_beta2=2.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_rate"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 1}}, "'cycles': 1}: .*unexpected keyword"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_a_layer_is_scored(make, changes, message):
    with pytest.raises(LayerPruneError, match=message):
        make(**changes)


def test_settings_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(LayerPruneError, match="args is of type SFTConfig; give an IterativeLayerDistillConfig"):
        IterativeLayerDistillTrainer(tiny_model(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_weights_in_float16_are_refused_before_a_layer_is_scored(make):
    with pytest.raises(LayerPruneError, match="is in float16.*; load it in float32 or bfloat16"):
        make(tiny_model().half())
    make(tiny_model().half(), heal=False)
    make(tiny_model().half(), peft_config=LoraConfig(target_modules=["q_proj"]))


def test_a_healing_without_a_step_is_no_healing(make):
    trainer = make(dataloader_drop_last=True, per_device_train_batch_size=10_000)
    with pytest.raises(LayerPruneError, match="the healing made no step"):
        trainer.train()


@pytest.mark.parametrize("measure_speed", [True, False])
def test_speed_is_measured_only_if_asked(make, measure_speed):
    trainer = make(target_num_layers=4, measure_speed=measure_speed)
    trainer.train()
    assert ("decode_tokens_per_second" in rounds_of(trainer)[0]) == measure_speed


def test_evaluate_is_the_measurement_of_the_student(make):
    trainer = make(target_num_layers=4)
    trainer.train()
    metrics = trainer.evaluate()
    record = rounds_of(trainer)[-1]
    assert metrics["eval_loss"] == pytest.approx(record["loss"])
    assert metrics["eval_perplexity"] == pytest.approx(record["perplexity"])
    assert metrics["eval_kl"] == pytest.approx(record["kl"])
    other = trainer.evaluate(Dataset.from_dict({"text": ["Quite another text, and a little longer than before."] * 9}))
    assert other["eval_loss"] != metrics["eval_loss"]


def test_evaluation_while_healing(make):
    trainer = make(target_num_layers=4, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert sum("eval_kl" in entry for entry in trainer.state.log_history) == 3


def test_without_evaluation_data_the_report_says_so(make, tmp_path):
    make(target_num_layers=4, eval_dataset=None).train()
    assert read_report(tmp_path / "run")["teacher"]["evaluated_on"] == "calibration data"
    assert "calibration data" in (tmp_path / "run" / "report.md").read_text()


def test_by_name_students_keep_the_checkpoints_dtype_and_the_numbers_are_theirs(tmp_path, tokenizer, texts):
    teacher = tiny_model()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    args = tiny_config(tmp_path / "run", target_num_layers=4)
    trainer = IterativeLayerDistillTrainer(
        model=str(tmp_path / "teacher"), args=args, train_dataset=texts, eval_dataset=texts
    )
    assert trainer.teacher.dtype == torch.float32
    trainer.train()
    assert load(tmp_path / "run" / "model").dtype == torch.bfloat16
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    measured = evaluate_model(student, trainer.eval_batches, trainer.teacher)
    assert measured.loss == pytest.approx(rounds_of(trainer)[-1]["loss"], abs=1e-6)


def test_a_saved_student_is_compressed_further_in_the_same_indices(make, tmp_path, tokenizer, texts):
    make(target_num_layers=4).train()
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "student")
    trainer = IterativeLayerDistillTrainer(
        model=str(tmp_path / "student"),
        args=tiny_config(tmp_path / "second", target_num_layers=3),
        train_dataset=texts,
        teacher=tiny_model(),
    )
    trainer.train()
    plan = plan_of(load(tmp_path / "second" / "model"))
    assert plan.num_teacher_layers == 5 and len(plan.removed_layers) == 2
    assert set(plan_of(load(tmp_path / "student")).removed_layers) < set(plan.removed_layers)


def test_save_model_and_model_card(make, tmp_path):
    trainer = make(target_num_layers=4)
    trainer.train()
    trainer.create_model_card(model_name="somebody/student", tags="our-own")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (tmp_path / "run" / "model" / "README.md").is_file() and (
        tmp_path / "run" / "model" / "quality.png"
    ).is_file()
    assert card.data.get("library_name") == "transformers"
    assert {"layer-pruning", "our-own"} <= set(card.data.tags)
    assert f"{rounds_of(trainer)[0]['perplexity']:.2f}" in card.text and "somebody/student" in card.text
    assert str(tmp_path) not in card.content
    trainer.save_model(str(tmp_path / "saved"))
    saved, final = load(tmp_path / "saved"), load(tmp_path / "run" / "model")
    ids = random_batches(1, padded=False)[0]["input_ids"]
    assert torch.equal(saved(ids).logits, final(ids).logits)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_num_layers": None}, "target_num_layers is missing"),
        ({"target_num_layers": 5}, "choose 1..4"),
        ({"trained_layers": "2,7"}, r"names \[7\]"),
        ({"protect_first_layers": 2, "protect_last_layers": 2, "target_num_layers": 3}, "can go from 5 to 4"),
        ({"dataset_text_field": "story"}, "no text"),
    ],
)
def test_requests_that_cannot_work_are_refused(make, changes, message):
    with pytest.raises(LayerPruneError, match=message):
        make(**changes)


def test_a_model_of_one_layer_has_none_to_spare(tmp_path, tokenizer, texts):
    with pytest.raises(LayerPruneError, match="has one layer, which a model needs"):
        IterativeLayerDistillTrainer(
            model=tiny_model(1), args=tiny_config(tmp_path, target_num_layers=1), train_dataset=texts,
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_push_takes_what_other_trainers_take_and_nothing_misspelt(make):
    trainer = make()
    taken = set(inspect.signature(trainer.push_to_hub).parameters)
    others = set(inspect.signature(Trainer.push_to_hub).parameters) - {"self", "kwargs"}
    assert others | {"dataset_name", "tags"} <= taken
    with pytest.raises(TypeError, match="privat'"):
        trainer.push_to_hub(privat=True)


def test_vocabularies_must_match(tmp_path, tokenizer, texts):
    with pytest.raises(LayerPruneError, match="vocabulary has 300"):
        IterativeLayerDistillTrainer(
            model=tiny_model(), teacher=tiny_model(vocab_size=300), args=tiny_config(tmp_path), train_dataset=texts,
            processing_class=tokenizer,
        )  # fmt: skip
    with pytest.raises(LayerPruneError, match="tokenizer has 257"):
        IterativeLayerDistillTrainer(
            model=tiny_model(vocab_size=200, eos_token_id=0), args=tiny_config(tmp_path), train_dataset=texts,
            processing_class=tokenizer,
        )  # fmt: skip


def test_teacher_must_be_what_the_student_came_from(tmp_path, tokenizer, texts):
    with pytest.raises(LayerPruneError, match="pruned from"):
        IterativeLayerDistillTrainer(
            model=prune(tiny_model(), [1]), teacher=tiny_model(num_layers=8), args=tiny_config(tmp_path),
            train_dataset=texts, processing_class=tokenizer,
        )  # fmt: skip
