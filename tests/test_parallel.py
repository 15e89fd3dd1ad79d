"""Parallel blocks: `parallelize`, `unparallelize`, `apply_plan`, against the literal equations."""

import copy

import pytest
import torch
from conftest import random_batches, tiny_model
from families import pruned_qwen2
from parallel_reference import literal
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import Qwen2ForCausalLM, StaticCache

from hf_layerprune import LayerPlan, LayerPruneError, PrunedQwen2ForCausalLM, parallelize, prune, unparallelize
from hf_layerprune.forward import CACHE
from hf_layerprune.surgery import apply_plan, plan_of

SHAPES = {
    "grouped-query attention": {},
    "multi-head attention": {"num_key_value_heads": 4},
    "multi-query attention": {"num_key_value_heads": 1},
    "untied embeddings": {"tie_word_embeddings": False},
}
PLANS = {
    "one pair": (((0,), (1,), (2, 3), (4,), (5,), (6,)), 7),
    "two pairs": (((0,), (1, 2), (3, 4), (5,), (6,)), 7),
    "group of four": (((0,), (1, 2, 3, 4), (5,), (6,)), 7),
    "pairs of a pruned model": (((0,), (1, 3), (4,), (5, 6)), 7),
    "all in one": (((0, 1, 2, 3, 4, 5, 6),), 7),
}


def model_of(**changes):
    return tiny_model(num_layers=7, **changes)


@pytest.mark.parametrize("blocks, depth", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_equals_the_literal_equations(changes, blocks, depth):
    model = model_of(**changes)
    for batch in random_batches():
        expected = literal(model, blocks)(**batch, use_cache=False).logits
        student = apply_plan(model, LayerPlan(blocks, depth))
        assert type(student) is PrunedQwen2ForCausalLM
        valid = batch["attention_mask"].bool()
        torch.testing.assert_close(student(**batch).logits[valid], expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation(attention):
    model, blocks = model_of(), ((0,), (1, 2), (3,), (4, 5), (6,))
    student = parallelize(model, [(1, 2), (4, 5)])
    student.set_attn_implementation(attention)
    assert all(layer.self_attn.config._attn_implementation == attention for layer in student.model.layers)
    batch = random_batches(1)[0]
    valid = batch["attention_mask"].bool()
    expected = literal(model, blocks)(**batch, use_cache=False).logits
    torch.testing.assert_close(student(**batch).logits[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_bfloat16_is_folded_in_float32():
    model = model_of()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    layers = [model.model.layers[i] for i in (3, 4)]
    pair = parallelize(model, [(3, 4)]).model.layers[3]
    assert {parameter.dtype for parameter in pair.parameters()} == {torch.bfloat16}
    expected = [
        (layer.mlp.up_proj.weight.float() * layer.post_attention_layernorm.weight.float()).bfloat16()
        for layer in layers
    ]
    assert torch.equal(pair.mlp.up_proj.weight, torch.cat(expected))
    batch = random_batches(1, padded=False)[0]
    exact = literal(model.float(), plan_of(parallelize(model, [(3, 4)])).blocks)(**batch, use_cache=False).logits
    student = parallelize(model.bfloat16(), [(3, 4)])
    assert (student(**batch).logits.float() - exact).abs().mean() < 0.02 * exact.std()


def test_gradients_are_those_of_the_equations():
    model, blocks = model_of(), ((0,), (1,), (2,), (3, 4), (5,), (6,))
    student, reference = parallelize(model, [(3, 4)]), literal(model, blocks)
    batch = random_batches(1, padded=False)[0]
    student(**batch, labels=batch["input_ids"]).loss.backward()
    reference(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    pair, (a, b) = student.model.layers[3], reference.model.layers[3].layers
    expected = torch.cat([a.mlp.down_proj.weight.grad, b.mlp.down_proj.weight.grad], dim=1)
    torch.testing.assert_close(pair.mlp.down_proj.weight.grad, expected, atol=1e-5, rtol=1e-4)
    expected = torch.cat([a.self_attn.k_proj.bias.grad, b.self_attn.k_proj.bias.grad])
    torch.testing.assert_close(pair.self_attn.k_proj.bias.grad, expected, atol=1e-5, rtol=1e-4)
    below = reference.model.layers[0].layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(student.model.layers[0].mlp.up_proj.weight.grad, below, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model = model_of().train()
    plain, recomputed = (parallelize(model, [(2, 3)]) for _ in range(2))
    getattr(recomputed, "activation_checkpointing_enable", recomputed.gradient_checkpointing_enable)()
    assert recomputed.training and all(layer.gradient_checkpointing for layer in recomputed.model.layers)
    batch = random_batches(1, padded=False)[0]
    for student in (plain, recomputed):
        student(**batch, labels=batch["input_ids"]).loss.backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_is_the_same_with_every_cache(cache):
    student = parallelize(prune(model_of(), [1]), [(2, 3), (4, 5)])
    batch = random_batches(1, padded=False)[0]
    plain = student.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=False)
    implementation = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    cached = student.generate(**batch, max_new_tokens=12, do_sample=False, **implementation)
    assert torch.equal(cached, plain)


def test_left_padded_prompts_generate_what_they_do_alone():
    student = parallelize(model_of(), [(2, 3), (4, 5)])
    torch.manual_seed(0)
    prompts = [torch.randint(256, (length,)) for length in (5, 9)]
    alone = [student.generate(p[None], max_new_tokens=8, do_sample=False)[0, len(p) :] for p in prompts]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    together = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, width:]
    for row, expected in zip(together, alone, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()


def test_compiles_to_one_graph():
    student = parallelize(tiny_model(3), [(1, 2)])
    ids = random_batches(1, padded=False)[0]["input_ids"]
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=student.config, max_cache_len=16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, student(ids).logits)
        first = compiled(ids[:, :-1], **{CACHE: cache}).logits[:, -1]
        second = compiled(ids[:, -1:], **{CACHE: cache}).logits[:, -1]
        expected = student(ids).logits
    torch.testing.assert_close(first, expected[:, -2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, expected[:, -1], atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was_and_shares_nothing():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    student = parallelize(model, [(2, 3)])
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert student.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_shared_weights_are_those_outside_the_pairs():
    model = model_of()
    student = parallelize(model, [(2, 3)], share_weights=True)
    own = [parameter.data_ptr() for parameter in model.parameters()]
    shared = {name for name, parameter in student.named_parameters() if parameter.data_ptr() in own}
    assert {name for name, _ in student.named_parameters()} - shared == {
        name for name, _ in student.named_parameters() if ".layers.2." in name
    }
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_unparallelize_gives_back_the_separate_layers():
    model = model_of()
    student = parallelize(prune(model, [5]), [(1, 2), (3, 4)])
    batch = random_batches(1, padded=False)[0]
    back = unparallelize(student)
    assert type(back) is Qwen2ForCausalLM and back.config.model_type == "qwen2"
    assert plan_of(back) == plan_of(prune(model, [5]))
    torch.testing.assert_close(back(**batch).logits, prune(model, [5])(**batch).logits, atol=1e-5, rtol=1e-5)
    half = unparallelize(student, [(3, 4)])
    assert plan_of(half).blocks == ((0,), (1, 2), (3,), (4,), (6,))
    expected = parallelize(prune(model, [5]), [(1, 2)])(**batch).logits
    torch.testing.assert_close(half(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(LayerPruneError, match="not parallel blocks"):
        unparallelize(student, [(0, 1)])


def test_edits_in_any_order_give_the_same_model():
    model = model_of()
    batch = random_batches(1, padded=False)[0]
    a = prune(parallelize(model, [(2, 3), (4, 5)]), [3])
    b = parallelize(prune(model, [3]), [(4, 5)])
    c = apply_plan(model, LayerPlan(((0,), (1,), (2,), (4, 5), (6,)), 7))
    assert plan_of(a) == plan_of(b) == plan_of(c)
    for student in (a, b):
        torch.testing.assert_close(student(**batch).logits, c(**batch).logits, atol=1e-5, rtol=1e-5)
    grown = parallelize(parallelize(model, [(2, 3), (4, 5)]), [(2, 3, 4, 5)])
    assert plan_of(grown).blocks == ((0,), (1,), (2, 3, 4, 5), (6,))
    expected = parallelize(model, [(2, 3, 4, 5)])(**batch).logits
    torch.testing.assert_close(grown(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert type(prune(parallelize(model, [(2, 3)]), [2, 3])) is Qwen2ForCausalLM


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([(1, 3)], "name all layers of neighbouring blocks"),
        ([(3, 2)], "ascending order"),
        ([(2,)], "cannot run in parallel"),
        ([(2, 3), (3, 4)], "cannot run in parallel"),
        ([(6, 7)], "not in the plan"),
        ([2, 3], "must be a list of layer indices"),
    ],
)
def test_bad_pairs_are_refused(pairs, message):
    with pytest.raises(LayerPruneError, match=message):
        parallelize(model_of(), pairs)


def test_what_cannot_be_rearranged_is_refused():
    with pytest.raises(LayerPruneError, match="name all layers of neighbouring blocks"):
        parallelize(parallelize(model_of(), [(2, 3)]), [(3, 4)])
    with pytest.raises(LayerPruneError, match="teacher of 24 layers, not of 7"):
        apply_plan(model_of(), LayerPlan(((0,), (1,)), 24))
    with pytest.raises(LayerPruneError, match="list of layer indices"):
        unparallelize(parallelize(model_of(), [(2, 3)]), (2, 3))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(LayerPruneError, match="PeftModelForCausalLM is not a plain causal"):
        parallelize(get_peft_model(model_of(), lora), [(2, 3)])
    adapted = model_of()
    inject_adapter_in_model(lora, adapted)
    with pytest.raises(LayerPruneError, match="carries adapters"):
        parallelize(adapted, [(2, 3)])
    quantized = model_of()
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LayerPruneError, match="quantized"):
        parallelize(quantized, [(2, 3)])


def test_frozen_models_stay_frozen():
    model = model_of().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in parallelize(model, [(2, 3)]).parameters())


def test_unparallelize_of_single_layers_is_plain():
    assert type(unparallelize(pruned_qwen2(model_of()))) is Qwen2ForCausalLM


def test_sliding_windows_are_refused():
    sliding = model_of(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(LayerPruneError, match="sliding"):
        parallelize(sliding, [(2, 3)])
    with pytest.raises(LayerPruneError, match="layers \\[5\\]"):
        apply_plan(prune(model_of(), [5]), LayerPlan(((0,), (4, 5)), 7))
