import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import random_batches, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_layerprune import PrunedQwen2Config, PrunedQwen2ForCausalLM, PrunedQwen2Model, prune
from hf_layerprune.surgery import to_pruned_qwen2

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
    to_pruned_qwen2(tiny_model()).save_pretrained(tmp_path)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"layer_plan": {"num_teacher_layers": 5, "blocks": [[0], [], [4]]}},
        {"layer_plan": {"num_teacher_layers": 5}},
        {"layer_types": ["full_attention"] * 5},
    ],
)
def test_config_that_contradicts_its_plan_is_refused(changes):
    with pytest.raises(ValueError):
        PrunedQwen2Config(**PAIRED | changes)


def test_loads_as_remote_code_where_the_package_is_missing(tmp_path):
    model = to_pruned_qwen2(prune(tiny_model(), [2]))
    model.save_pretrained(tmp_path / "saved")
    ids = random_batches(1, padded=False)[0]["input_ids"]
    torch.save((ids, model(ids).logits.detach()), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["hf_layerprune"] = None  # importing it would fail
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = {str(tmp_path / "saved")!r}
ids, logits = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "PrunedQwen2ForCausalLM", type(model)
assert torch.equal(model(ids).logits, logits)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "PrunedQwen2Model"
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).layer_plan["blocks"] == [[0], [1], [3], [4]]
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], check=True, stdin=subprocess.DEVNULL, env=environment)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
