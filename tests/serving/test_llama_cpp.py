"""llama.cpp itself runs what `hf-layerprune export` writes: the same token ids, the same greedy tokens.

`make serve-test` installs llama.cpp (the wheel `xllamacpp`) and runs this. Real models are tested where
`LAYERPRUNE_MODELS` (by default `runs/models`) holds folders that `recipes/get_model.py` made.
"""

import json
import os
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import random_batches
from families import family_model
from trained_tokenizers import SIZE, byte_level, sentencepiece, texts

from hf_layerprune import load_model, load_tokenizer, merge, prune
from hf_layerprune.export import export_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; `make serve-test` does it")

pytestmark = pytest.mark.serving
MODELS = Path(os.environ.get("LAYERPRUNE_MODELS", "runs/models"))
REAL = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
PROMPT = "The three most important things about the sea are"
WIDE = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
TINY = {
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen2"),
    "llama": ("llama", {"tie_word_embeddings": False}, "sentencepiece"),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}, "llama-bpe"),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "gpt-2"),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, "smollm"),
    "mistral": ("mistral", {"tie_word_embeddings": False}, "tekken"),
}


class LlamaCpp:
    """A file in llama.cpp's own server, on loopback."""

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel = str(path), 512, 0, 1
        params.warmup, params.fit_params, params.verbosity = False, False, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def _post(self, route, **content):
        body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urlopen(Request(self.server.listening_address + route, data=body, headers=kind)) as answer:
            return json.load(answer)

    def tokenize(self, text):
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def render(self, messages):
        return self._post("/apply-template", messages=messages)["prompt"]

    def generate(self, prompt_ids, count=32):
        answer = self._post(
            "/completion", prompt=prompt_ids, n_predict=count, temperature=0, return_tokens=True, ignore_eos=True
        )
        return answer["tokens"]


def greedy(model, tokenizer, prompt_ids, count=32):
    """The tokens of transformers in float32, where llama.cpp may not choose an end token either."""
    stops = {token for token in ("<|endoftext|>", "<|im_end|>", "</s>") if token in tokenizer.get_vocab()}
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        out = model.float().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            suppress_tokens=tokenizer.convert_tokens_to_ids(sorted(stops)) or None,
        )
    return out[0, len(prompt_ids) :].tolist()


def gap(model, prompt_ids, expected, found):
    """How much less likely than the expected token the first other one is, in nats; 0 where there is none."""
    differing = [position for position in range(len(expected)) if found[position] != expected[position]]
    if not differing:
        return 0.0
    first = differing[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + expected[:first]])).logits[0, -1]
    return (logits[expected[first]] - logits[found[first]]).item()


def check(model, tokenizer, folder, outtypes):
    """Both give the same tokens; q8_0 runs."""
    prompt_ids = tokenizer(PROMPT).input_ids
    expected = greedy(model, tokenizer, prompt_ids)
    for outtype in outtypes:
        runtime = LlamaCpp(export_gguf(model, tokenizer, folder / f"{outtype}.gguf", outtype))
        for text in texts(tokenizer):
            assert runtime.tokenize(text) == tokenizer(text).input_ids, (outtype, text)
        found = runtime.generate(prompt_ids)
        assert len(found) == 32
        if outtype == "f32":
            assert found == expected
        elif outtype != "q8_0":  # llama.cpp rounds the activations too, which may break a tie the other way
            assert gap(model, prompt_ids, expected, found) < 0.01, (outtype, found, expected)


@pytest.mark.parametrize("name", TINY)
def test_random_models_of_every_family(name, tmp_path):
    family, changes, way = TINY[name]
    tokenizer = sentencepiece() if way == "sentencepiece" else byte_level(way)
    model = family_model(family, **WIDE | ({"head_dim": 16} if family == "qwen2" else {}) | changes)
    check(prune(model, [1]), tokenizer, tmp_path, ["f32", "f16", "q8_0"])


@pytest.fixture(scope="module", params=REAL)
def real(request):
    if not (MODELS / request.param).is_dir():
        pytest.skip(f"{MODELS / request.param} is missing; recipes/get_model.py makes it")
    name = str(MODELS / request.param)
    return load_model(name), load_tokenizer(name)


def test_a_pruned_student(real, tmp_path):
    model, tokenizer = real
    check(prune(model, [10, 17]), tokenizer, tmp_path, ["f32", "f16", "q8_0"])


def test_a_merged_student(real, tmp_path):
    model, tokenizer = real
    batches = random_batches(2, length=32, padded=False)
    check(merge(model.float(), [(10, 11)], batches), tokenizer, tmp_path, ["f32", "f16"])


def test_the_embedded_model(tmp_path):
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    check(prune(model, [3, 4]), tokenizer, tmp_path, ["f32", "f16", "bf16", "q8_0"])


def test_the_chat_template_is_the_models_own(tmp_path):
    tokenizer = byte_level("qwen2")
    model = family_model("qwen2", **WIDE | {"head_dim": 16})
    runtime = LlamaCpp(export_gguf(model, tokenizer, tmp_path / "chat.gguf"))
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    for chat in ([question], [{"role": "system", "content": "Be brief."}, question, answer, question]):
        assert runtime.render(chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
