"""A student without pairs is what other runtimes read: llama.cpp's file format, vLLM's and SGLang's Qwen2 loaders."""

import json

import pytest
import torch
from conftest import random_batches, tiny_model
from gguf_writer import write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_layerprune import prune


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def student(request):
    return prune(tiny_model(5, tie_word_embeddings=request.param), [1, 3])


def test_a_gguf_file_holds_the_same_model(student, tmp_path):
    path = write_gguf(student, tmp_path / "student.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    (batch,) = random_batches(1)
    assert type(again) is type(student) and again.config.num_hidden_layers == 3
    assert torch.equal(again(**batch).logits, student(**batch).logits)


def test_vllm_and_sglang_find_every_key_and_shape(student, tmp_path):
    """What `vllm/model_executor/models/qwen2.py` and `sglang/srt/models/qwen2.py` read, as of 2026."""
    student.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["architectures"] == ["Qwen2ForCausalLM"] and told["model_type"] == "qwen2"
    assert "auto_map" not in told  # else they would run code of the repository
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
             "vocab_size", "max_position_embeddings")  # fmt: skip
    assert all(type(told[name]) is int and told[name] > 0 for name in sizes)
    assert told["hidden_act"] == "silu" and told["rms_norm_eps"] > 0 and "pad_token_id" in told
    assert told["rope_parameters"]["rope_theta"] > 0 and told["rope_parameters"]["rope_type"] == "default"
    assert not told["use_sliding_window"] and set(told["layer_types"]) == {"full_attention"}
    assert told["max_window_layers"] in (None, told["num_hidden_layers"]) or told["sliding_window"] is None
    assert len(told["layer_types"]) == told["num_hidden_layers"] == 3

    width, inner, vocabulary = told["hidden_size"], told["intermediate_size"], told["vocab_size"]
    head = width // told["num_attention_heads"]  # both compute it so, whatever `head_dim` says
    query, key = told["num_attention_heads"] * head, told["num_key_value_heads"] * head
    layer = {
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (query, width), "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.weight": (key, width), "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.weight": (key, width), "self_attn.v_proj.bias": (key,),
        "self_attn.o_proj.weight": (width, query),
        "mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }  # fmt: skip
    wanted = {f"model.layers.{n}.{name}": shape for n in range(3) for name, shape in layer.items()}
    wanted |= {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not told["tie_word_embeddings"]:
        wanted["lm_head.weight"] = (vocabulary, width)
    weights = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == wanted
