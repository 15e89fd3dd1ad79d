"""What a student on disk says of itself is true, in transformers 4 as well, whichever way it was written."""

import json

import pytest
import torch
from conftest import END, VOCAB_SIZE, byte_tokenizer, short_texts, tiny_config
from families import family_model, pruned_qwen2
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPlan,
    PrunedQwen2ForCausalLM,
    cli,
    parallelize,
    prune,
    unparallelize,
)
from hf_layerprune.trainer.run import save_student

SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PAIRED = LayerPlan(((0,), (1, 2), (3,), (4,)), 5)
IN_PYTHON = {
    "prune": lambda source: prune(load(source), [1]),
    "parallelize": lambda source: parallelize(load(source), [(1, 2)]),
    "unparallelize": lambda source: unparallelize(parallelize(load(source), [(1, 2)])),
    "from_plain": lambda source: pruned_qwen2(load(source)),
    "from_pretrained": lambda source: PrunedQwen2ForCausalLM.from_pretrained(source, layer_plan=PAIRED),
}
TEXTS = "--dataset embedded:calibration --eval_dataset embedded:held_out "
QUICK = (
    TEXTS + "--pairs 1,2 --dtype float32 --max_length 32 --num_samples 2 --num_eval_samples 2 --measure_speed false"
)
COMMANDS = {"hf-layerprune parallelize": ["parallelize", *QUICK.split()]}
TRAINER = "the trainer"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    """Write other values into `config.json`, or take them out where they are `None`."""
    values = {key: value for key, value in (config_of(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama in bfloat16 with scaled positions; its config names no dtype, hides that the head is not tied and, like
    its tokenizer, names code that a stock class does not need."""
    folder = tmp_path_factory.mktemp("source")
    rope = SCALING | {"rope_theta": 5e3}
    family_model("llama", tie_word_embeddings=False, rope_parameters=rope).bfloat16().save_pretrained(folder)
    change_config(folder, tie_word_embeddings=True, dtype=None, auto_map={"AutoConfig": "theirs.Config"})
    byte_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "theirs.Tokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    return folder


@pytest.fixture(scope="module", params=[*IN_PYTHON, *COMMANDS, TRAINER])
def student(request, source, tmp_path_factory):
    """The folder a student was written to, in every way there is."""
    way, out = request.param, tmp_path_factory.mktemp("students") / "out"
    if way in IN_PYTHON:
        IN_PYTHON[way](source).save_pretrained(out)
        return out
    if way in COMMANDS:
        assert cli.main([*COMMANDS[way], "--model", str(source), "--output_dir", str(out)]) == 0
        return out / "model"
    texts = short_texts()
    args = tiny_config(out, target_num_layers=4, trained_layers="neighbours", max_steps=1)
    IterativeLayerDistillTrainer(model=str(source), args=args, train_dataset=texts, eval_dataset=texts).train()
    assert config_of(out / "rounds" / "01") == config_of(out / "model")
    return out / "model"


def test_a_head_of_its_own_is_kept_and_the_config_says_so(source, student):
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    assert config_of(student)["tie_word_embeddings"] is False
    assert torch.equal(load_file(student / "model.safetensors")["lm_head.weight"], head)
    assert torch.equal(load(student).lm_head.weight, head)


def test_code_that_is_named_is_there(student):
    named = config_of(student).get("auto_map", {}).values()
    assert all((student / f"{name.split('.')[0]}.py").is_file() for name in named)
    tokenizer = student / "tokenizer_config.json"
    assert not tokenizer.exists() or "auto_map" not in json.loads(tokenizer.read_text())


def test_weights_are_saved_in_their_own_dtype(student):
    assert config_of(student)["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(student / "model.safetensors").values()} == {torch.bfloat16}


def test_positions_are_written_as_transformers_4_reads_them_too(student, source, recwarn):
    config = config_of(student)
    assert config["rope_theta"] == 5e3 and config["rope_scaling"] == SCALING
    read = load(student)
    assert read.config.rope_parameters == load(source).config.rope_parameters == config["rope_parameters"]
    assert not [warning for warning in recwarn if "rope" in str(warning.message)]


@pytest.mark.parametrize("form", ["plain", "pruned_qwen2"])
@pytest.mark.parametrize(
    "rope, older",
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        # with an original length in it, transformers 4 would take the factor from that length: here 1
        ({"rope_type": "yarn", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}),
    ],
)
def test_every_kind_of_positions_has_its_older_form(rope, older, form, tmp_path):
    model = family_model("qwen3", rope_parameters=rope | {"rope_theta": 1e5})
    student = prune(model, [1]) if form == "plain" else pruned_qwen2(model)
    student.save_pretrained(tmp_path)
    assert config_of(tmp_path)["rope_theta"] == 1e5 and config_of(tmp_path)["rope_scaling"] == older
    again = load(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    prune(again, [2]).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["rope_scaling"] == older


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


def sentencepiece_tokenizer(bos):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "▁b": 7}
    return LlamaTokenizer(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], add_bos_token=bos)


@pytest.mark.parametrize(
    "tokenizer, name, bos",
    [
        (llama_tokenizer(), "PreTrainedTokenizerFast", True),
        (sentencepiece_tokenizer(True), "LlamaTokenizer", True),
        (sentencepiece_tokenizer(False), "LlamaTokenizer", False),
    ],
    ids=["no class of its own", "a BOS token", "no BOS token"],
)
def test_a_tokenizer_is_written_as_transformers_4_reads_it_too(tokenizer, name, bos, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    save_student(family_model("llama"), tokenizer, torch.float32, tmp_path / "student")
    values = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == name and values["add_bos_token"] is bos and values["add_eos_token"] is False
    # a list under this name, and transformers 4 fails on it under its newer one
    assert values["additional_special_tokens"] == ["<|x|>"] and "extra_special_tokens" not in values
    again = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert type(again) is type(tokenizer) and again.extra_special_tokens == ["<|x|>"]
    assert again("a b<|x|> a").input_ids == tokenizer("a b<|x|> a").input_ids


def test_a_plain_checkpoint_read_as_pruned_qwen2_keeps_a_head_of_its_own(tmp_path):
    family_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    assert PrunedQwen2ForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is False
