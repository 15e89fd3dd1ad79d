"""What a student on disk says of itself is true, whichever way it was written."""

import json

import pytest
import torch
from conftest import tiny_config
from families import family_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPlan,
    PrunedQwen2ForCausalLM,
    cli,
    parallelize,
    prune,
    unparallelize,
)
from hf_layerprune.conversion import convert
from hf_layerprune.surgery import to_pruned_qwen2

PAIRED = LayerPlan(((0,), (1, 2), (3,), (4,)), 5)
IN_PYTHON = {
    "prune": lambda source: prune(load(source), [1]),
    "parallelize": lambda source: parallelize(load(source), [(1, 2)]),
    "unparallelize": lambda source: unparallelize(parallelize(load(source), [(1, 2)])),
    "to_pruned_qwen2": lambda source: to_pruned_qwen2(load(source)),
    "convert": lambda source: convert(load(source)),
    "from_pretrained": lambda source: PrunedQwen2ForCausalLM.from_pretrained(source, layer_plan=PAIRED),
}
QUICK = ["--pairs", "1,2", "--max_length", "32", "--num_samples", "2", "--num_eval_samples", "2"]
COMMANDS = {
    "hf-layerprune parallelize": ("parallelize", *QUICK, "--measure_speed", "false"),
    "hf-layerprune convert": ("convert",),
}
TRAINER = "the trainer"
every_way = pytest.mark.parametrize("way", [*IN_PYTHON, *COMMANDS, TRAINER])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def write_by(way, source, tmp_path, texts):
    """The folder in which a student of the model in `source` lies, written in one of the ways there are."""
    out = tmp_path / "out"
    if way in IN_PYTHON:
        IN_PYTHON[way](source).save_pretrained(out)
        return out
    if way in COMMANDS:
        verb, *extra = COMMANDS[way]
        assert cli.main([verb, "--model", str(source), "--output_dir", str(out), *extra]) == 0
        return out / "model" if verb == "parallelize" else out
    args = tiny_config(out, target_num_layers=4, trained_layers="neighbours", max_steps=1)
    IterativeLayerDistillTrainer(model=str(source), args=args, train_dataset=texts, eval_dataset=texts).train()
    config = (out / "rounds" / "01" / "config.json").read_text()
    assert (out / "model" / "config.json").read_text() == config
    return out / "model"


def change_config(folder, **changes):
    """Write other values into `config.json`, or take them out where they are `None`."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def source(tmp_path, tokenizer):
    """A folder to save a model in, next to a tokenizer."""
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@every_way
def test_a_head_of_its_own_is_kept_and_the_config_says_so(way, source, tmp_path, texts):
    model = family_model("llama", tie_word_embeddings=False)
    model.save_pretrained(source)
    change_config(source, tie_word_embeddings=True)
    folder = write_by(way, source, tmp_path, texts)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(load(folder).lm_head.weight, model.lm_head.weight)


def test_a_head_of_its_own_is_kept_in_a_plain_checkpoint_read_as_pruned_qwen2(tmp_path):
    family_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    assert PrunedQwen2ForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is False
