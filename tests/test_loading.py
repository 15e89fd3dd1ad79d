import json
import re

import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config

from hf_layerprune import (
    HealingDataConfig,
    IterativeLayerDistillConfig,
    IterativeLayerDistillTrainer,
    LayerPruneError,
    cli,
    export_gguf,
    generate_healing_data,
    prune,
)
from hf_layerprune.benchmark import load_shape
from hf_layerprune.data import load_text_dataset
from hf_layerprune.loading import load_config, load_model, load_tokenizer
from hf_layerprune.surgery import plan_of


def test_loads_a_folder_with_its_plan(model, tmp_path):
    prune(model, [1]).save_pretrained(tmp_path)
    assert plan_of(load_model(str(tmp_path))).removed_layers == (1,)
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_config_and_the_tokenizer_come_from_where_the_weights_do(model, tokenizer, tmp_path, monkeypatch):
    tiny_model(3).save_pretrained(tmp_path)
    prune(model, [1]).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert plan_of(load_config(str(tmp_path), subfolder="student")).removed_layers == (1,)
    assert plan_of(load_model(str(tmp_path), subfolder="student")).removed_layers == (1,)
    assert len(load_tokenizer(str(tmp_path), subfolder="student")) == len(tokenizer)
    with pytest.raises(LayerPruneError, match="the folder does not exist"):
        load_model(str(tmp_path), subfolder="nothing")
    seen, read = [], AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda *args, **kwargs: seen.append(kwargs) or read(*args, **kwargs)
    )
    where = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    load_model(str(tmp_path), **where)
    assert where.items() <= seen[0].items()


def test_whatever_is_named_may_be_a_path(model_folder, texts, tmp_path):
    assert load_model(model_folder).config.num_hidden_layers == 5
    assert len(load_tokenizer(model_folder)) == len(byte_tokenizer())
    texts.to_json(tmp_path / "texts.jsonl")
    assert load_text_dataset(tmp_path / "texts.jsonl")["text"] == texts["text"]
    trainer = IterativeLayerDistillTrainer(model_folder, tiny_config(tmp_path / "run"), texts, teacher=model_folder)
    assert trainer.model_name == trainer.teacher_name == str(model_folder)
    few = HealingDataConfig(num_prompts=2, max_new_tokens=2)
    report = generate_healing_data(model_folder, tmp_path / "texts.jsonl", tmp_path / "answers.jsonl", few)
    assert report.num_rows + report.num_empty == 2


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(LayerPruneError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LayerPruneError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_architecture_that_is_not_supported(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match="gpt2.*not supported"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"load_in_8bit": True},
    ],
    ids=lambda values: values.get("quant_method", "without a name"),
)
def test_quantized_checkpoints_are_refused_before_weights_are_read(quantization, model, tmp_path, monkeypatch, capsys):
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("hf_layerprune.loading.AutoModelForCausalLM.from_pretrained", pytest.fail)
    named = re.escape(f"{tmp_path}: this Qwen2 model is quantized ({quantization.get('quant_method', '')}")
    for load in (load_config, load_model):
        with pytest.raises(LayerPruneError, match=named):
            load(str(tmp_path))
    estimate = "estimate --gpu_memory 1GiB --model"
    for verb in ("score --model", "compress --model", "benchmark", estimate, "demo embedded"):
        assert cli.main([*verb.split(), str(tmp_path)]) == 2
        assert re.search(named, capsys.readouterr().err)
    with pytest.raises(LayerPruneError, match="is quantized"):
        load_shape(str(tmp_path / "config.json"))


def test_a_folder_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "nowhere"), "runs/nowhere/model", "./nowhere", "../nowhere"):
        with pytest.raises(LayerPruneError, match="nowhere.* cannot be loaded as a model: the folder does not exist"):
            load_config(name)
    with pytest.raises(LayerPruneError) as raised:  # a name on the Hub
        load_config("user/nowhere")
    assert "folder" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": "wide"}, "field 'hidden_size': TypeError: .*expected int, got str"),
        ({"layer_types": ["full_attention"]}, "'validate_layer_type': ValueError: "),
        ({"dtype": "torch.bfloat16"}, "'torch' has no attribute 'torch.bfloat16'"),
        ({"model_type": ["qwen2"]}, "unhashable type"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "there is no 'mrope'"),
        ({"hidden_act": "silly"}, "there is no 'silly'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_transformers_cannot_read(model, tmp_path, changes, message):
    fields = json.loads(model.config.to_json_string()) | changes
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(LayerPruneError, match=f"{tmp_path} cannot be loaded as a model: .*{message}"):
        load_model(str(tmp_path))


def test_a_file_of_a_model_is_not_its_folder(model_folder):
    with pytest.raises(LayerPruneError, match="cannot be loaded as a model: it is a file; name the folder"):
        load_config(model_folder / "model.safetensors")
    with pytest.raises(LayerPruneError, match="has no tokenizer .*it is a file, not the folder of a model"):
        load_tokenizer(model_folder / "config.json")


def test_options_that_transformers_does_not_know(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match="cannot be loaded as a model: .*unexpected keyword argument 'load_in_8"):
        load_model(str(tmp_path), load_in_8bit=True)


def test_weights_that_do_not_fit_the_config_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights, path = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    norm = weights.pop("model.norm.weight")
    save_file(weights | {"v_head.weight": norm}, path, metadata={"format": "pt"})
    with pytest.raises(LayerPruneError, match=r": model\.norm\.weight is missing, v_head\.weight is not in the model"):
        load_model(str(tmp_path))
    save_file(weights | {"model.norm.weight": norm.repeat(2)}, path, metadata={"format": "pt"})
    with pytest.raises(LayerPruneError, match=r": model\.norm\.weight has shape \(64,\) instead of \(32,\)$"):
        load_model(str(tmp_path))


def test_name_that_is_nowhere():
    with pytest.raises(LayerPruneError, match="nobody/nothing") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_no_tensor_is_left_random(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayerPruneError, match=r"layers\.3\.mlp\.up_proj"):
        load_model(str(tmp_path))
    save_file(weights | {"model.layers.3.mlp.up_proj.weight": removed, "extra": removed.clone()},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(LayerPruneError, match="extra"):
        load_model(str(tmp_path))


def test_plan_that_does_not_fit(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for plan in ({"num_teacher_layers": 5, "blocks": [[0], [1]]}, {"blocks": []}, "../../etc"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"layer_plan": plan}))
        with pytest.raises(LayerPruneError):
            load_model(str(tmp_path))


def test_weights_are_broken(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(LayerPruneError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_tokenizer_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_layerprune.loading.is_sentencepiece_available", lambda: False)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(LayerPruneError, match="its tokenizer.model is read with pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path))


def test_a_model_without_a_name_takes_no_tokenizer_from_the_current_folder(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayerPruneError, match="give processing_class"):
        IterativeLayerDistillTrainer(tiny_model(), tiny_config(tmp_path / "run", target_num_layers=4))


def test_code_of_a_folder_is_not_run_even_by_who_says_yes_to_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')\n"
    (tmp_path / "evil.py").write_text(trap + "class Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    (tmp_path / "tokenizer.json").write_text("{}")
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(LayerPruneError):
            load(str(tmp_path))
    assert not (tmp_path / "trap").exists()


def test_pickles_are_not_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(LayerPruneError, match=r"its weights are pickled \(.bin\)"):
        load_model(str(tmp_path))


def test_an_adapter_is_no_model(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(LayerPruneError, match="it holds an adapter alone; merge it"):
            load_model(str(tmp_path))
        model.config.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match="carries adapters; merge them"):
        export_gguf(load_model(str(tmp_path)), byte_tokenizer(), tmp_path / "student.gguf")


@pytest.fixture
def cpu_without_bfloat16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


def test_auto_computes_in_float32_where_the_cpu_would_emulate_the_checkpoints_dtype(cpu_without_bfloat16, tmp_path):
    for dtype, expected in (("bfloat16", torch.float32), ("float16", torch.float32), ("float64", torch.float64)):
        tiny_model(dtype=getattr(torch, dtype)).to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
        assert load_model(str(tmp_path / dtype), for_device="cpu").dtype == expected
        assert load_model(str(tmp_path / dtype)).dtype == load_model(str(tmp_path / dtype), for_device="cuda").dtype
        assert load_model(str(tmp_path / dtype)).dtype == getattr(torch, dtype)
    assert load_model("embedded", "bfloat16", "cpu").dtype == torch.bfloat16  # as was asked for
    assert IterativeLayerDistillConfig(str(tmp_path), use_cpu=True).bf16 is False


def test_with_native_bfloat16_auto_is_the_checkpoints_own(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert load_model("embedded", for_device="cpu").dtype == torch.bfloat16
