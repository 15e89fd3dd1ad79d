"""GGUF files are read wherever a model is named, and their students are plain folders."""

import json
import re

import pytest
import torch
import yaml
from conftest import VOCAB_SIZE, byte_tokenizer, errors_of, random_batches, read_report, tiny_config, tiny_model
from families import family_model
from gguf_writer import write_gguf
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, cli, load_model, load_tokenizer
from hf_layerprune.cli.estimate import _config as config_to_plan
from hf_layerprune.demo.catalog import open_catalog
from hf_layerprune.demo.settings import DemoSettings, ModelEntry
from hf_layerprune.hub.paths import hub_id
from hf_layerprune.loading import load_config

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QUICK = [
    "--dataset", "embedded:healing", "--target_num_layers", "4", "--max_steps", "1", "--num_calibration_samples", "2",
    "--num_eval_samples", "2",
    "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--max_length", "32",
    "--save_strategy", "no", "--report_to", "none", "--measure_speed", "false",
]  # fmt: skip


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return write_gguf(tiny_model(), tmp_path_factory.mktemp("models") / "tiny.gguf", tokenizer, quantized=True)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_gguf_file_is_dequantized_to_bfloat16(family, tmp_path):
    original = family_model(family)
    path = write_gguf(original, tmp_path / "model.gguf", byte_tokenizer(), quantized=True)
    loaded = load_model(str(path))
    assert loaded.dtype == load_config(str(path)).dtype == torch.bfloat16
    wide = load_model(str(path), dtype="float32")
    assert type(wide) is type(original) and wide.name_or_path == str(path)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name].float()), name
        torch.testing.assert_close(tensor, original.state_dict()[name], rtol=0.01, atol=0.01, msg=name)
    (batch,) = random_batches(1)
    difference = wide(**batch).logits - original(**batch).logits
    assert difference.norm() < 0.05 * original(**batch).logits.norm()


def test_its_tokenizer_is_read_as_well(gguf_file):
    tokenizer, text = load_tokenizer(str(gguf_file)), "Über 12345<|endoftext|>"
    assert tokenizer(text).input_ids == byte_tokenizer()(text).input_ids
    assert tokenizer.eos_token_id == VOCAB_SIZE - 1 and tokenizer.chat_template == TEMPLATE


def test_compress_makes_a_plain_folder_of_it(gguf_file, tmp_path, capsys):
    out, named = tmp_path / "out", ("--model", gguf_file.parent, "--gguf_file", gguf_file.name)
    assert run("compress", *named, "--teacher", gguf_file, "--output_dir", out, *QUICK) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["num_hidden_layers"] == 4 and "quantization_config" not in config
    student, own = load_model(str(out / "model"), dtype="float32"), load_model(str(gguf_file), dtype="float32")
    assert torch.equal(student.model.embed_tokens.weight, own.model.embed_tokens.weight)  # rounded once, on loading
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == TEMPLATE
    assert read_report(out)["teacher"]["name"] == "tiny.gguf"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == str(gguf_file)


def test_every_verb_reads_it(gguf_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = ("--dataset", "embedded:calibration", "--num_samples", 2, "--max_length", 32)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"}\n')
    quick = ("--eval_dataset", "embedded:held_out", "--measure_speed", "false")
    for verb in (
        ("score", "--model", gguf_file, *text),
        ("evaluate", "--model", gguf_file, "--teacher", gguf_file, *text),
        ("parallelize", "--model", gguf_file, "--pairs", "2,3", *text, "--num_eval_samples", 2, *quick),
        ("benchmark", gguf_file, "--prompt_tokens", 4, "--new_tokens", 2, "--repeats", 1),
        ("generate", "--model", gguf_file, "--dataset", tmp_path / "prompts.jsonl", "--max_new_tokens", 4),
    ):
        assert run(*verb) == 0, capsys.readouterr().err
    assert load_model("layerprune-parallel/model").dtype == torch.bfloat16
    assert config_to_plan(str(gguf_file)).num_hidden_layers == 5
    entry = ModelEntry("tiny", teacher=str(gguf_file), student="layerprune-parallel/model")
    assert open_catalog(DemoSettings([entry]))["tiny"].can_chat


def test_in_python_the_options_of_transformers_name_it(gguf_file, texts, tmp_path):
    options = {"gguf_file": gguf_file.name}
    assert load_config(str(gguf_file.parent), **options).num_hidden_layers == 5
    assert load_model(str(gguf_file.parent), **options).name_or_path == str(gguf_file)
    args = tiny_config(tmp_path / "run", model_init_kwargs=options)
    trainer = IterativeLayerDistillTrainer(str(gguf_file.parent), args, texts, teacher=str(gguf_file))
    assert trainer.model_name == trainer.teacher_name == str(gguf_file)
    assert trainer.start.dtype == torch.float32 and trainer.save_dtype == torch.bfloat16


def test_a_file_of_a_repository(gguf_file, monkeypatch):
    asked = []

    def cached_file(*args, **kwargs):
        asked.append((*args, kwargs))
        return str(gguf_file)

    monkeypatch.setattr("hf_layerprune.loading.cached_file", cached_file)
    load_tokenizer("user/name@main", gguf_file="q8/tiny.gguf", token="secret")
    assert asked == [("user/name", "q8/tiny.gguf", {"revision": "main", "token": "secret"})]
    assert load_config("user/name/tiny.gguf").name_or_path == "user/name/tiny.gguf"
    assert hub_id("user/name/q8/tiny.gguf@main") == hub_id("user/name/tiny.gguf") == "user/name"
    assert hub_id("tiny.gguf") is None and hub_id("models/tiny.gguf") is None


def llama3_factors(model):
    """By how much Llama 3.1 slows each rotary frequency, as llama.cpp's converter writes it into the file."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    plain = model.base_model.rotary_emb.inv_freq.clone()
    model.config.rope_parameters |= rope
    scaled = ROPE_INIT_FUNCTIONS["llama3"](model.config)[0]
    assert not torch.allclose(plain, scaled)
    return plain / scaled


def test_positions_of_llama_3_are_scaled_as_the_file_says(tmp_path):
    original = family_model("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    factors = llama3_factors(original)
    path = write_gguf(original, tmp_path / "model.gguf", rope_factors=factors)
    loaded = load_model(str(path), dtype="float32")
    assert {key: loaded.config.rope_parameters[key] for key in original.config.rope_parameters} == (
        original.config.rope_parameters
    )
    torch.testing.assert_close(
        loaded.base_model.rotary_emb.inv_freq, ROPE_INIT_FUNCTIONS["llama3"](original.config)[0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_factors": torch.tensor([1.0, 2.0, 5.0, 3.0])}, r"rotary positions are scaled \(rope_freqs\)"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rotary positions are scaled \(yarn\)"),
        ({"left_out": "blk.3.ffn_up.weight"}, r"do not fit the config: model\.layers\.3\.mlp\.up_proj"),
    ],
)
def test_what_would_be_another_model_is_refused(options, message, tmp_path):
    path = write_gguf(family_model("llama"), tmp_path / "model.gguf", **options)
    with pytest.raises(LayerPruneError, match=rf"model\.gguf: .*{message}"):
        load_model(str(path))


def test_mistakes_are_one_line(gguf_file, tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more than that, though it goes on for a while")
    bare = write_gguf(tiny_model(), tmp_path / "bare.gguf")
    for verb, message in (
        (("score", "--model", "nowhere.gguf"), "nowhere.gguf does not exist"),
        (("score", "--model", gguf_file.parent), "name one of its GGUF files, tiny.gguf"),
        (("score", "--model", "user/name/x.gguf"), "user/name/x.gguf"),
        (("score", "--model", tmp_path / "broken.gguf"), "broken.gguf cannot be loaded as a model"),
        (("score", "--model", bare), "bare.gguf has no tokenizer"),
        (("score", "--model", gguf_file, "--offload", "true"), "tiny.gguf cannot be loaded as a model: .*[Dd]isk"),
    ):
        assert run(*verb, "--dataset", "embedded:calibration", "--max_length", 32) == 2
        error = errors_of(capsys).strip()
        assert "\n" not in error and re.search(message, error), error
