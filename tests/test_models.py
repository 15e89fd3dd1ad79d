import json
from dataclasses import replace

import pytest
import torch
from conftest import random_batches, tiny_model
from families import pruned_qwen2
from forked import run_without_package
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config
from transformers.distributed import DistributedConfig

from hf_layerprune import (
    LayerPlan,
    PrunedQwen2Config,
    PrunedQwen2ForCausalLM,
    PrunedQwen2Model,
    parallelize,
    prune,
)
from hf_layerprune.surgery import apply_plan, plan_of

PAIRED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_plan": {"num_teacher_layers": 5, "blocks": [[0], [1, 2], [4]]},
}


def test_auto_classes_know_it(tmp_path):
    pruned_qwen2(tiny_model()).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PrunedQwen2Config
    assert type(AutoModel.from_pretrained(tmp_path)) is PrunedQwen2Model
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is PrunedQwen2ForCausalLM


def test_a_block_of_two_layers_is_twice_as_wide():
    model = PrunedQwen2ForCausalLM(PrunedQwen2Config(**PAIRED)).eval()
    single, pair = model.model.layers[0], model.model.layers[1]
    assert pair.self_attn.q_proj.out_features == 2 * single.self_attn.q_proj.out_features
    assert pair.self_attn.k_proj.out_features == 2 * single.self_attn.k_proj.out_features
    assert pair.mlp.up_proj.out_features == 2 * single.mlp.up_proj.out_features
    ids = torch.randint(64, (2, 7))
    cached = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


def test_pairs_survive_saving(tmp_path):
    model = PrunedQwen2ForCausalLM(PrunedQwen2Config(**PAIRED)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(64, (2, 7))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# ------------------------------------------------------------------ widths of blocks


WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


def config_file(folder, **changes):
    """What `config.json` in `folder` holds, after `changes`; a change to `None` removes a field."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return values


def test_the_saved_config_says_how_wide_each_wide_block_is(tmp_path):
    plan = {"num_teacher_layers": 6, "blocks": [[0], [1, 2], [4, 5]], "merged": [[4, 5]]}  # merged: of one width
    PrunedQwen2Config(**PAIRED | {"layer_plan": plan}).save_pretrained(tmp_path)
    assert config_file(tmp_path)["per_layer_config"] == {"1": WIDE}
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.is_heterogeneous and config.per_layer_config[1].num_attention_heads == 8
    assert [config.per_layer_config[n].intermediate_size for n in range(3)] == [48, 96, 48]
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 48)
    assert config.head_dim == config.per_layer_config[1].head_dim == 8


def test_the_plan_decides_the_widths_whatever_the_file_says(tmp_path):
    PrunedQwen2ForCausalLM(PrunedQwen2Config(**PAIRED)).save_pretrained(tmp_path)
    for given in (None, {"0": {"num_attention_heads": 16}, "1": {"intermediate_size": 48}}):  # None: an older file
        config_file(tmp_path, per_layer_config=given, head_dim=None)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.model.layers[1].mlp.up_proj.out_features == 96
        assert model.config.to_dict()["per_layer_config"] == {"1": WIDE}


def test_widths_follow_a_plan_that_changes():
    model = PrunedQwen2ForCausalLM(PrunedQwen2Config(**PAIRED | {"num_attention_heads": 4}))
    student = prune(model, [0])
    assert student.config.to_dict()["per_layer_config"] == {"0": WIDE}
    assert not prune(student, [2]).config.is_heterogeneous
    assert model.config.to_dict()["per_layer_config"] == {"1": WIDE}
    plain = PrunedQwen2Config(**{name: value for name, value in PAIRED.items() if name != "layer_plan"})
    assert not plain.is_heterogeneous and "per_layer_config" not in plain.to_dict()


# ------------------------------------------------------------------ plans that are none


@pytest.mark.parametrize("plan", [
    [[0], [1, 2], [4]],
    {"num_teacher_layers": 5, "blocks": [[0], [], [4]]},
    {"num_teacher_layers": 5, "blocks": []},
    {"num_teacher_layers": 5},
    {"num_teacher_layers": 4, "blocks": [[0], [1, 2], [4]]},
    {"num_teacher_layers": 5, "blocks": [[0], [2, 1], [4]]},
    {"num_teacher_layers": 5, "blocks": [[-1], [2], [4]]},
    {"num_teacher_layers": 5, "blocks": [["0"], [2], [4]]},
    {"num_teacher_layers": 5, "blocks": "abc"},
], ids=str)  # fmt: skip
def test_plans_that_are_none_are_refused(plan):
    with pytest.raises(ValueError, match="layer_plan"):
        PrunedQwen2Config(**PAIRED | {"layer_plan": plan})


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 4}, {"layer_types": ["full_attention"] * 5}])
def test_config_that_contradicts_its_plan_is_refused(changes):
    with pytest.raises(ValueError, match="3 blocks"):
        PrunedQwen2Config(**PAIRED | changes)


# ------------------------------------------------------------------ loading


def edit_checkpoint(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("auto", [True, False])
def test_a_checkpoint_that_does_not_fit_its_plan_is_an_error_that_names_the_tensors(tmp_path, auto):
    load = AutoModelForCausalLM.from_pretrained if auto else PrunedQwen2ForCausalLM.from_pretrained
    parallelize(tiny_model(), [(2, 3)]).save_pretrained(tmp_path)
    load(tmp_path)
    config = (tmp_path / "config.json").read_text()

    (tmp_path / "config.json").write_text(config.replace("[2, 3]", "[2]").replace("2,\n        3\n", "2\n"))
    with pytest.raises(ValueError, match=r"layers\.2\.\S+ has shape"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    edit_checkpoint(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load(tmp_path)
    edit_checkpoint(
        tmp_path,
        lambda tensors: tensors.update(
            {
                "model.layers.1.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"].clone(),
                "model.layers.7.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"].clone(),
            }
        ),
    )
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj\.weight belongs to no block"):
        load(tmp_path)


def test_plans_are_built_from_a_plain_checkpoint(tmp_path, batches):
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    plan = LayerPlan(((0,), (2, 3), (4,)), 5)
    for wanted in (plan, plan.to_dict()):
        student, info = PrunedQwen2ForCausalLM.from_pretrained(
            tmp_path / "plain", layer_plan=wanted, output_loading_info=True
        )
        assert type(student) is PrunedQwen2ForCausalLM and plan_of(student) == plan and not info["missing_keys"]
        assert torch.equal(student(**batches[0]).logits, apply_plan(model, plan)(**batches[0]).logits)
    half = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "plain", layer_plan=plan, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    bare = PrunedQwen2Model.from_pretrained(tmp_path / "plain", layer_plan=plan)
    assert torch.equal(bare(**batches[0]).last_hidden_state, student.model(**batches[0]).last_hidden_state)

    student.save_pretrained(tmp_path / "paired")
    deeper = LayerPlan(((0,), (2, 3, 4)), 5)
    again = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "paired", layer_plan=deeper)
    expected = apply_plan(model, deeper)(**batches[0]).logits
    torch.testing.assert_close(again(**batches[0]).logits, expected, atol=1e-5, rtol=1e-5)
    whole = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(whole(**batches[0]).logits, model(**batches[0]).logits)


def test_auto_classes_take_the_plan_as_well(tmp_path, batches):
    model = tiny_model()
    student = parallelize(model, [(1, 2)])
    student.save_pretrained(tmp_path)
    other = LayerPlan(((0,), (1,), (2, 3), (4,)), 5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, layer_plan=other.to_dict())
    assert plan_of(loaded) == other
    expected = apply_plan(model, other)(**batches[0]).logits
    torch.testing.assert_close(loaded(**batches[0]).logits, expected, atol=1e-5, rtol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path)
    assert plan_of(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) == plan_of(student)
    with pytest.raises(ValueError, match="teacher of 9 layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, layer_plan={**other.to_dict(), "num_teacher_layers": 9})


def test_parallel_layers_with_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="sliding-window"):
        PrunedQwen2Config(**PAIRED, use_sliding_window=True, sliding_window=8, max_window_layers=1)


def test_plans_that_do_not_fit_a_checkpoint_are_refused(tmp_path):
    prune(tiny_model(), [1]).save_pretrained(tmp_path / "plain")
    load = PrunedQwen2ForCausalLM.from_pretrained
    with pytest.raises(ValueError, match=r"asks for layers \[1\]"):
        load(tmp_path / "plain", layer_plan=LayerPlan(((0,), (1, 2)), 5))
    with pytest.raises(ValueError, match="teacher of 9 layers"):
        load(tmp_path / "plain", layer_plan=LayerPlan(((0,), (2, 3)), 9))
    with pytest.raises(ValueError, match="the keys"):
        load(tmp_path / "plain", layer_plan=[(2, 3)])
    with pytest.raises(ValueError, match="tp_plan do not go together"):
        load(tmp_path / "plain", layer_plan=LayerPlan(((0,), (2, 3)), 5), tp_plan="auto")
    with pytest.raises(ValueError, match="distributed_config do not go together"):
        config = DistributedConfig(tp_plan="auto")
        load(tmp_path / "plain", layer_plan=LayerPlan(((0,), (2, 3)), 5), distributed_config=config)
    GPT2Config().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="gpt2"):
        load(tmp_path / "other", layer_plan=LayerPlan(((0,), (2, 3)), 5))
    edit_checkpoint(tmp_path / "plain", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load(tmp_path / "plain", layer_plan=LayerPlan(((0,), (2, 3)), 5))


@pytest.mark.parametrize("adapters", [LoraConfig(r=2, target_modules=["q_proj"]), IA3Config(), "in place", "wrapper"])
@pytest.mark.parametrize("blocks", [[[0], [1], [2, 3]], [[0], [1], [2], [3]]])
def test_models_in_adapters_or_wrappers_are_refused_in_one_line(adapters, blocks):
    model = tiny_model(4)
    if adapters == "in place":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    elif adapters == "wrapper":
        model = torch.compile(model)
    else:
        wrapped = get_peft_model(model, replace(adapters, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match=r"carries adapters or a wrapper \(.*merge or unwrap them first"):
            PrunedQwen2ForCausalLM.from_plain(wrapped, LayerPlan(blocks))
    with pytest.raises(ValueError, match=r"carries adapters or a wrapper \(.*merge or unwrap them first"):
        PrunedQwen2ForCausalLM.from_plain(model, LayerPlan(blocks))


@pytest.mark.parametrize("pairs", [False, True])
def test_loads_as_remote_code_where_the_package_is_missing(tmp_path, pairs):
    model = prune(tiny_model(), [2])
    model = parallelize(model, [(1, 3)]) if pairs else pruned_qwen2(model)
    model.save_pretrained(tmp_path / "saved")
    ids = random_batches(1, padded=False)[0]["input_ids"]
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch.save((ids, model(ids).logits.detach(), generated), tmp_path / "expected.pt")
    tiny_model().save_pretrained(tmp_path / "teacher")
    blocks = [[0], [1, 3], [4]] if pairs else [[0], [1], [3], [4]]
    script = f"""
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = {str(tmp_path / "saved")!r}
ids, logits, generated = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "PrunedQwen2ForCausalLM", type(model)
assert torch.equal(model(ids).logits, logits)
assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "PrunedQwen2Model"
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.layer_plan["blocks"] == {blocks}
direct = type(model).from_pretrained({str(tmp_path / "teacher")!r}, layer_plan=config.layer_plan)
assert torch.equal(direct(ids).logits, logits)
model.save_pretrained({str(tmp_path / "again")!r})  # what a stranger saves is whole as well
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(again(ids).logits, logits)
"""
    run_without_package(script, tmp_path / "home")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize(
    "plan",
    [
        {"num_teacher_layers": 10**12, "blocks": [[0]]},
        {"num_teacher_layers": 10**4000, "blocks": [[0]]},
        {"num_teacher_layers": True, "blocks": [[0]]},
        {"num_teacher_layers": 20_000, "blocks": [[n] for n in range(20_000)]},
        {"num_teacher_layers": 2, "blocks": ["/etc/passwd"]},
        "../../etc/passwd" * 1000,
    ],
)
def test_a_plan_in_a_config_is_outside_input(plan):
    with pytest.raises(ValueError, match="layer_plan") as error:
        PrunedQwen2Config(layer_plan=plan, num_hidden_layers=1)
    assert len(str(error.value)) < 500
