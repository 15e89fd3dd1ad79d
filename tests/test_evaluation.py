import math
from functools import partial

import pytest
import torch
from conftest import random_batches, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import GraniteConfig, GraniteForCausalLM

from hf_layerprune import Budget, LayerPruneError, evaluate_model, score_layers, search_plan


def test_perplexity_is_weighted_by_tokens(model):
    batches = random_batches(1, rows=2, length=20, padded=False) + random_batches(1, rows=1, length=4, padded=False)
    total, count = 0.0, 0
    for batch in batches:
        tokens = len(batch["input_ids"]) * (batch["input_ids"].shape[1] - 1)
        total += model(**batch, labels=batch["input_ids"]).loss.item() * tokens
        count += tokens
    report = evaluate_model(model, batches)
    assert report.loss == pytest.approx(total / count, abs=1e-5)
    assert report.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert report.num_tokens == count
    assert report.kl is None and report.agreement is None


def test_against_a_teacher(model, batches):
    same = evaluate_model(model, batches, model)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.agreement == 1
    other = evaluate_model(model, batches, tiny_model(seed=5))
    assert other.kl > 0.01 and 0 <= other.agreement < 1


def test_the_result_does_not_depend_on_the_batch_split(model):
    whole = random_batches(1, rows=4, length=10, padded=True)
    rows = [{key: value[i : i + 1] for key, value in whole[0].items()} for i in range(4)]
    teacher = tiny_model(seed=5)
    a, b = evaluate_model(model, whole, teacher), evaluate_model(model, rows, teacher)
    assert a.to_dict() == pytest.approx(b.to_dict(), abs=1e-5)


def test_modes_come_back_even_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError, match="rotary|size|must match"):
        positions = torch.ones(1, 3, dtype=torch.long)
        model.model.rotary_emb.register_buffer("inv_freq", torch.ones(3), persistent=False)
        evaluate_model(model, [{"input_ids": torch.tensor([[1, 2, 3]]), "position_ids": positions}])
    assert model.training


def test_a_config_that_asks_for_tuples_changes_nothing(model, batches):
    before = evaluate_model(model, batches).loss
    model.config.return_dict = False
    assert evaluate_model(model, batches).loss == before


def test_a_family_that_scales_its_logits_is_refused(batches):
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        logits_scaling=8,
    )
    with pytest.raises(LayerPruneError, match="model_type='granite' is not supported"):
        evaluate_model(GraniteForCausalLM(config), batches)


def test_other_vocabularies_are_refused(model, batches):
    with pytest.raises(LayerPruneError, match="300 entries"):
        evaluate_model(model, batches, tiny_model(vocab_size=300))


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_models_in_adapters_are_refused_by_name(model, batches, place):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LayerPruneError, match="PeftModel carries adapters; merge them"):
        evaluate_model(*((adapted, batches) if place == "student" else (model, batches, adapted)))


@pytest.mark.parametrize("measure", [evaluate_model, score_layers, partial(search_plan, budget=Budget("depth", 3))])
def test_models_without_weights_are_refused_in_one_line(measure, batches):
    with pytest.raises(LayerPruneError, match="no weights, it is on the device meta"):
        measure(tiny_model().to("meta"), batches)
    with pytest.raises(LayerPruneError, match="no weights, it is on the device meta"):
        measure(tiny_model(), batches, teacher=tiny_model().to("meta"))
