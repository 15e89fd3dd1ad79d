"""Plain students load in transformers 4: the same classes, token ids, logits and greedy tokens.

`make v4-test` installs transformers 4.57 into an environment of its own and runs this; `LAYERPRUNE_V4` is the Python
of that environment. Real models are tested where `LAYERPRUNE_MODELS` (by default `runs/models`) holds folders that
`recipes/get_model.py` made.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import random_batches
from families import family_model
from trained_tokenizers import SIZE, byte_level, sentencepiece, texts

from hf_layerprune import load_model, load_tokenizer, merge, prune
from hf_layerprune.trainer.run import save_student

pytestmark = pytest.mark.v4
WORKER = Path(__file__).with_name("transformers_4_worker.py")
MODELS = Path(os.environ.get("LAYERPRUNE_MODELS", "runs/models"))
REAL = [path for name in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct") if (path := MODELS / name).is_dir()]
NEW_TOKENS = 16
SHAPE = {"vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512,
         "eos_token_id": 2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
UNTIED = {"tie_word_embeddings": False}
TINY = {
    "qwen2, tied": ("qwen2", {}, "qwen2"),
    "qwen2, untied": ("qwen2", UNTIED, "qwen2"),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}, "qwen2"),
    "qwen3, tied": ("qwen3", {}, "qwen2"),
    "qwen3, untied": ("qwen3", UNTIED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "qwen2"),
    "llama, tied": ("llama", {}, "smollm"),
    "llama, untied": ("llama", UNTIED, "sentencepiece"),
    "llama 3, tied": ("llama", {"rope_parameters": LLAMA3}, "llama-bpe"),
    "llama 3, untied": ("llama", UNTIED | {"rope_parameters": LLAMA3}, "llama-bpe"),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, "gpt-2"),
    "mistral, untied": ("mistral", UNTIED, "tekken"),
}


def expected(model, tokenizer):
    rows = [tokenizer(text).input_ids for text in texts(tokenizer)]
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in rows]
        prompt = torch.tensor([rows[0]])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS)
    return {"class": type(model).__name__, "rows": rows, "logits": logits, "answer": answer[0].tolist()}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Saved students with their tokenizers, by name: tiny ones, and pruned and merged real ones in bfloat16."""
    home, made = tmp_path_factory.mktemp("students"), {}
    for name, (family, changes, way) in TINY.items():
        tokenizer = sentencepiece() if way == "sentencepiece" else byte_level(way)
        student = prune(family_model(family, **SHAPE | changes), [1, 3])
        made[name] = student, tokenizer, torch.float32
    for path in REAL:
        model, tokenizer = load_model(str(path)).float(), load_tokenizer(str(path))
        made[f"{path.name}, pruned"] = prune(model, [10, 17]), tokenizer, torch.bfloat16
        batches = random_batches(2, length=32, padded=False)
        made[f"{path.name}, merged"] = merge(model, [(10, 11)], batches), tokenizer, torch.bfloat16
    for name, (student, tokenizer, dtype) in made.items():
        save_student(student, tokenizer, dtype, home / name)
    return {name: (home / name, tokenizer) for name, (_, tokenizer, _) in made.items()}


@pytest.fixture(scope="module")
def read(students, tmp_path_factory):
    """What transformers 4 makes of all of them, in one process."""
    home = tmp_path_factory.mktemp("read")
    asked = [(str(folder), texts(tokenizer), NEW_TOKENS) for folder, tokenizer in students.values()]
    (home / "asked.json").write_text(json.dumps(asked))
    command = [os.environ["LAYERPRUNE_V4"], "-I", WORKER, home / "asked.json", home / "found.pt"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return torch.load(home / "found.pt")


@pytest.mark.parametrize("name", [*TINY, *(f"{path.name}, {edit}" for path in REAL for edit in ("pruned", "merged"))])
def test_transformers_4_computes_the_same(students, read, name):
    folder, tokenizer = students[name]
    model = load_model(str(folder)).float()
    found, wanted = read[str(folder)], expected(model, tokenizer)
    assert found.pop("version").startswith("4.57.") and found.pop("missing") == []
    logits = found.pop("logits")
    worst = max((a - b).abs().max().item() for a, b in zip(logits, wanted.pop("logits"), strict=True))
    assert found == wanted
    assert worst < 2e-4, worst
