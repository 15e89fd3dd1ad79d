"""`convert`: the same function in another family's form, in Python and on the command line."""

import json
from pathlib import Path

import pytest
import torch
from conftest import END, VOCAB_SIZE, errors_of, random_batches
from families import family_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from hf_layerprune import LayerPlan, LayerPruneError, cli, parallelize, prune
from hf_layerprune.conversion import convert
from hf_layerprune.loading import load_tokenizer
from hf_layerprune.surgery import plan_of

SHAPES = {
    "plain": {},
    "heads wider than hidden_size over their number": {"head_dim": 16},
    "untied, other eps": {"tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "rope scaled as in Llama 3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e3,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope scaled linearly": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "rope by yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Digits in threes and a first token, as in Llama 3."""
    vocab = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {END: VOCAB_SIZE - 1}
    vocab = vocab | {"12": VOCAB_SIZE, "123": VOCAB_SIZE + 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("12", "3")]))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, VOCAB_SIZE - 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


@pytest.fixture
def llama_folder(tmp_path) -> Path:
    folder = tmp_path / "llama"
    family_model("llama", vocab_size=VOCAB_SIZE + 2).save_pretrained(folder)
    published = {
        "eos_token_id": [VOCAB_SIZE - 1, 3],
        "temperature": 0.6,
        "top_p": 0.9,
    }  # without do_sample, as Llama 2
    (folder / "generation_config.json").write_text(json.dumps(published))
    llama_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_llama_is_a_qwen2_with_biases_of_zero(tmp_path, changes):
    llama = family_model("llama", **changes)
    batch = random_batches(1, rows=2, length=100, padded=False)[0]
    qwen2 = convert(llama)
    assert type(qwen2) is Qwen2ForCausalLM and not qwen2.model.layers[0].self_attn.q_proj.bias.any()
    assert qwen2.model.layers[0].mlp.up_proj.weight.data_ptr() == llama.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert distance(qwen2(**batch).logits, llama(**batch).logits) < 1e-6
    qwen2.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(reloaded) is Qwen2ForCausalLM
    assert distance(reloaded(**batch).logits, llama(**batch).logits) < 1e-6
    back = convert(reloaded, "llama")
    assert type(back) is type(llama) and distance(back(**batch).logits, llama(**batch).logits) < 1e-6
    assert back.state_dict().keys() == llama.state_dict().keys()


def test_mistral_without_windows_and_bfloat16():
    mistral = family_model("mistral").bfloat16()
    batch = random_batches(1, padded=False)[0]
    assert distance(convert(mistral)(**batch).logits.float(), mistral(**batch).logits.float()) < 0.02
    assert type(convert(mistral, "llama")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_family_goes_to_pruned_qwen2_and_back(family, batches):
    student = prune(family_model(family), [3])
    pruned = convert(student, "pruned_qwen2")
    back = convert(pruned)
    assert type(back) is type(student) and plan_of(back) == plan_of(pruned) == plan_of(student)
    for model in (pruned, back):
        assert torch.equal(model(**batches[0]).logits, student(**batches[0]).logits)


def test_what_has_no_place_is_refused():
    llama, qwen2, qwen3 = (family_model(family) for family in ("llama", "qwen2", "qwen3"))
    for model, to, message in (
        (qwen2, "qwen2", "already"),
        (qwen2, "llama", "q_proj.bias is not zero, and Llama has no biases"),
        (qwen3, None, "Qwen3 normalises queries and keys, Qwen2 does not"),
        (llama, "qwen3", "Qwen3 normalises queries and keys, Llama does not"),
        (llama, "gpt2", "'gpt2' is no form.*qwen2, qwen3, llama, mistral, pruned_qwen2"),
        (parallelize(llama, [(1, 2)]), None, r"\(1, 2\)\] in parallel"),
        (family_model("llama", attention_bias=True), None, "attention_bias=True"),
        (family_model("llama", mlp_bias=True), None, "mlp_bias=True"),
    ):
        with pytest.raises(LayerPruneError, match=message):
            convert(model, to)


def test_the_command_keeps_tokenizer_template_and_generation_config(llama_folder, tmp_path, capsys):
    out = tmp_path / "new" / "qwen2"
    assert cli.main(["convert", "--model", str(llama_folder), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM as Qwen2ForCausalLM" in said and "PreTrainedTokenizerFast.from_pretrained" in said
    assert [path.name for path in out.parent.iterdir()] == ["qwen2"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["converted_from"] == "llama"
    assert not {"mlp_bias", "pretraining_tp", "qk_norm", "attention_bias"} & config.keys()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (llama_folder, out))
    ids = random_batches(1, padded=False)[0]["input_ids"]
    assert distance(after(ids).logits, before(ids).logits) < 1e-6
    assert after.generation_config.top_p == 0.9 and after.generation_config.eos_token_id == [VOCAB_SIZE - 1, 3]
    tokenizer, text = load_tokenizer(str(out)), "in 12345 é"
    assert tokenizer(text).input_ids == llama_tokenizer()(text).input_ids
    assert tokenizer.chat_template == llama_tokenizer().chat_template
    assert PreTrainedTokenizerFast.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids
    if AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids:
        pytest.fail("AutoTokenizer reads it rightly now: the warning and load_tokenizer's exception can go")


def test_a_pruned_student_keeps_its_plan_and_goes_back(llama_folder, tmp_path, capsys):
    student, qwen2, back = tmp_path / "student", tmp_path / "qwen2", tmp_path / "back"
    prune(AutoModelForCausalLM.from_pretrained(llama_folder), [2]).save_pretrained(student)
    llama_tokenizer().save_pretrained(student)
    assert cli.main(["convert", "--model", str(student), "--output_dir", str(qwen2), "--dtype", "bfloat16"]) == 0
    assert cli.main(["convert", "--model", str(qwen2), "--to", "llama", "--output_dir", str(back)]) == 0
    assert "AutoTokenizer" not in capsys.readouterr().out.split("as LlamaForCausalLM")[1]
    model = AutoModelForCausalLM.from_pretrained(back)
    assert plan_of(model) == LayerPlan(((0,), (1,), (3,), (4,)), 5) and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(back)("12345").input_ids == llama_tokenizer()("12345").input_ids


def test_mistakes_are_one_line_and_leave_nothing(llama_folder, tmp_path, capsys):
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    gated = tmp_path / "gated"
    family_model("llama", attention_bias=True).save_pretrained(gated)
    llama_tokenizer().save_pretrained(gated)
    model, target = ["--model", str(llama_folder)], ["--output_dir", str(out)]
    for argv, message in (
        (target, "which model"),
        (model, "where to"),
        ([*model, "--output_dir", str(full)], "not empty"),
        ([*model, "--output_dir", str(full / "file")], "a file"),
        ([*model, *target, "--to", "gpt2"], "'gpt2'"),
        (["--model", str(gated), *target], "attention_bias=True"),
        (["--model", "embedded", *target], "already"),
        (["--model", str(tmp_path), *target], "no config.json"),
    ):
        assert cli.main(["convert", *argv]) == 2
        error = errors_of(capsys)
        assert message in error and error.count("\n") == 1, error
    assert not out.exists() and (full / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "gated", "llama"]


def test_nothing_is_left_where_the_result_does_not_compute_the_same(llama_folder, tmp_path, capsys, monkeypatch):
    from hf_layerprune.cli import convert as verb

    def broken(model, to):
        converted = convert(model, to)
        with torch.no_grad():
            converted.model.norm.weight.mul_(-2)
        return converted

    monkeypatch.setattr(verb, "convert_model", broken)
    assert cli.main(["convert", "--model", str(llama_folder), "--output_dir", str(tmp_path / "out")]) == 2
    assert "logits differ" in errors_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
