import copy
import json

import pytest
import torch
from conftest import random_batches, tiny_config, tiny_model
from families import pruned_qwen2
from forked import run_without_package
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from hf_layerprune import (
    Edit,
    IterativeLayerDistillTrainer,
    LayerPlan,
    LayerPruneError,
    PrunedQwen2ForCausalLM,
    apply_plan,
    compensate,
    export_gguf,
    find_parallel_range,
    load_model,
    merge,
    parallelize,
    prune,
    score,
    score_layers,
    search_plan,
    unparallelize,
)
from hf_layerprune.cli.score import device_map
from hf_layerprune.surgery import plan_of, to_plain, unshare_parameters


def naive_without(model, layer):
    """The model with one layer skipped in place: the slow, literal reference."""
    skipped = copy.deepcopy(model)
    skipped.model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    return skipped


@pytest.mark.parametrize("layers", [[0], [2], [4], [1, 3]])
def test_logits_equal_the_model_with_layers_skipped(model, batches, layers):
    expected = model
    for layer in layers:
        expected = naive_without(expected, layer)
    student = prune(model, layers)
    assert torch.equal(student(**batches[0]).logits, expected(**batches[0], use_cache=False).logits)


def test_teacher_is_untouched(model, batches):
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    student = prune(model, [1])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_config_is_consistent(model):
    model.generation_config.top_k = 7
    student = prune(model, [1, 4])
    config = student.config
    assert config.num_hidden_layers == 3 == len(config.layer_types) == config.max_window_layers
    assert plan_of(student) == LayerPlan(((0,), (2,), (3,)), 5)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert student.generation_config.top_k == 7
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert not student.training


def test_indices_stay_the_teachers(model):
    student = prune(prune(model, [1]), [3])
    assert plan_of(student).layers == (0, 2, 4)
    direct = prune(model, [1, 3])
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), direct.parameters(), strict=True))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_student_loads_in_stock_transformers(tmp_path, tie, dtype):
    teacher = tiny_model(tie_word_embeddings=tie)
    for parameter in teacher.parameters():  # `.to` would round the rotary frequencies too; loading does not
        parameter.data = parameter.data.to(dtype)
    student = prune(teacher, [1, 2])
    student.save_pretrained(tmp_path)
    ids = random_batches(1, padded=False)[0]["input_ids"]
    generated = student.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save((ids, student(ids).logits.detach(), generated), tmp_path / "expected.pt")
    script = f"""
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
ids, logits, generated = torch.load({str(tmp_path / "expected.pt")!r})
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert type(model) is Qwen2ForCausalLM
assert not any(info.values()), info
assert torch.equal(model(ids).logits, logits)
for use_cache in (True, False) if model.dtype == torch.float32 else ():  # bfloat16 rounds differently
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache), generated)
"""
    run_without_package(script, tmp_path / "home")
    assert json.loads((tmp_path / "config.json").read_text())["layer_plan"]["blocks"] == [[0], [3], [4]]


def test_shared_weights_share_memory_until_unshared(model):
    student = prune(model, [2], share_weights=True)
    assert student.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert student.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    layer = student.model.layers[0]
    unshare_parameters(layer.parameters())
    with torch.no_grad():
        layer.mlp.up_proj.weight.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.any()


def test_pruned_qwen2_without_pairs_is_bit_identical_and_converts_back(model, batches):
    student = prune(model, [3])
    pruned = pruned_qwen2(student)
    assert type(pruned) is PrunedQwen2ForCausalLM
    assert torch.equal(pruned(**batches[0]).logits, student(**batches[0]).logits)
    back = to_plain(pruned)
    assert type(back) is Qwen2ForCausalLM and back.config.model_type == "qwen2"
    assert torch.equal(back(**batches[0]).logits, student(**batches[0]).logits)
    assert plan_of(back) == plan_of(student) == plan_of(pruned)


def test_pruned_qwen2_can_be_pruned(model, batches):
    a, b = prune(pruned_qwen2(model), [1]), prune(model, [1])
    assert type(a) is PrunedQwen2ForCausalLM
    assert torch.equal(a(**batches[0]).logits, b(**batches[0]).logits)


def test_bad_requests_are_refused(model, tmp_path):
    for layers in ([5], [-1], [1, 1], [0, 1, 2, 3, 4]):
        with pytest.raises(LayerPruneError):
            prune(model, layers)
    with pytest.raises(LayerPruneError, match="not in the plan"):
        prune(prune(model, [2]), [2])
    sliding = tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(LayerPruneError, match="sliding"):
        prune(sliding, [0])
    model.config.layer_plan = {"num_teacher_layers": 9, "blocks": [[0], [1]]}
    with pytest.raises(LayerPruneError, match="2 blocks"):
        plan_of(model)


def test_layers_and_groups_of_layers_that_are_none_are_refused(model, batches):
    pair, student = parallelize(model, [(1, 2)]), prune(model, [1])
    for pairs in (3, [1, 2], ["1,2"]):
        for act, *given in ((parallelize, model, pairs), (merge, model, pairs, batches), (unparallelize, pair, pairs)):
            with pytest.raises(LayerPruneError, match="must be a list of "):
                act(*given)
    with pytest.raises(LayerPruneError, match="pairs=None must be a list of groups of layers, such as"):
        parallelize(model, None)
    with pytest.raises(LayerPruneError, match="gaps=1 must be a list of layer indices"):
        compensate(student, batches, "least_squares", model, gaps=1)


@pytest.mark.parametrize(
    "act",
    [
        lambda model, batches: prune(model, [3]),
        lambda model, batches: apply_plan(model, LayerPlan.identity(5).remove(3)),
        lambda model, batches: score_layers(model, batches),
        lambda model, batches: score(model, batches, [Edit.remove(3)]),
        lambda model, batches: search_plan(model, batches, {"depth": 4}),
        lambda model, batches: find_parallel_range(model, batches),
    ],
)
def test_what_is_no_whole_plain_language_model_is_refused(model, batches, act):
    with pytest.raises(LayerPruneError, match="Qwen2Model is not a plain causal language model"):
        act(model.model, batches)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(LayerPruneError, match="PeftModelForCausalLM is not a plain.*merge its adapters"):
        act(adapted, batches)


def test_a_model_on_disk_is_refused_where_its_weights_are_needed(model, texts, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    where = device_map(str(tmp_path / "model"), torch.device("cpu"))
    offloaded = load_model(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "offload"))
    needs = {"train_dataset": texts, "processing_class": tokenizer}
    partly = "a model is partly on disk or in CPU memory; load it whole"
    for start, teacher in ((offloaded, None), (model, offloaded)):
        with pytest.raises(LayerPruneError, match=partly):
            IterativeLayerDistillTrainer(start, tiny_config(tmp_path / "run"), **needs, teacher=teacher)
    with pytest.raises(LayerPruneError, match=partly):
        export_gguf(offloaded, tokenizer, tmp_path / "model.gguf")


def test_reloaded_student_continues_from_its_plan(model, tmp_path):
    prune(model, [1]).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plan_of(prune(student, [3])).layers == (0, 2, 4)
