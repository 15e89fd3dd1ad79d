"""vLLM serves plain, merged and paired students with the tokens and log-probabilities of transformers.

`make serve-test` installs vLLM and runs this. Real models are tested where `LAYERPRUNE_MODELS` (by default
`runs/models`) holds folders that `recipes/get_model.py` made.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_batches
from families import BLOCKS, family_model
from transformers import GenerationConfig

from hf_layerprune import LayerPlan, load_model, load_tokenizer, merge, parallelize, prune
from hf_layerprune.surgery import apply_plan

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make serve-test` does it", allow_module_level=True)

WORKER = Path(__file__).parent / "vllm_worker.py"
MODELS = Path(os.environ.get("LAYERPRUNE_MODELS", "runs/models"))
REAL = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # vLLM has no kernels for smaller heads
NEW_TOKENS = 16
EDITS = {
    "plain": lambda model: prune(model, [14, 16]),
    "merged": lambda model: merge(model, [(14, 15)], random_batches(2, length=64, padded=False)),
    "paired": lambda model: parallelize(model, [(14, 15), (16, 17)]),
}


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


def offline(folder, prompts, **engine):
    """What vLLM's `LLM.generate` gives, in a process of its own."""
    engine = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True} | engine
    asked = json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS, "engine": engine})
    output = folder.parent / "found.json"
    subprocess.run([sys.executable, WORKER, folder, output, asked], check=True, env=environment())
    return json.loads(output.read_text())


def expected(model, prompt):
    """The greedy tokens of transformers and their log-probabilities."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=NEW_TOKENS)
        logits = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    tokens = whole[0, len(prompt) :]
    return tokens.tolist(), logits.gather(-1, tokens[:, None])[:, 0].tolist()


def check(found, model, prompts):
    for tokens, logprobs, prompt in zip(found["tokens"], found["logprobs"], prompts, strict=True):
        wanted, wanted_logprobs = expected(model, prompt)
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-3)


def saved(model, tokenizer, folder):
    model.generation_config = GenerationConfig(do_sample=False)  # no end, and no penalty that `vllm serve` would read
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", [{}, {"enforce_eager": False}], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_wide_blocks_of_every_family(family, engine, tmp_path):
    model = apply_plan(family_model(family, num_layers=7, **SIZES), LayerPlan(BLOCKS, 7)).eval()
    prompts = random_batches(1, rows=2, length=9, padded=False)[0]["input_ids"].tolist()
    check(offline(saved(model, byte_tokenizer(), tmp_path / "student"), prompts, **engine), model, prompts)


@pytest.fixture(scope="module", params=[(name, edit) for name in REAL for edit in EDITS], ids="-".join)
def student(request, tmp_path_factory):
    """A student of a real model, in float32, its tokenizer, and the folder they are saved in."""
    name, edit = request.param
    if not (MODELS / name).is_dir():
        pytest.skip(f"{MODELS / name} is missing; recipes/get_model.py makes it")
    model, tokenizer = load_model(str(MODELS / name), dtype="float32"), load_tokenizer(str(MODELS / name))
    model = EDITS[edit](model).eval()
    return model, tokenizer, saved(model, tokenizer, tmp_path_factory.mktemp(edit) / "student")


TEXTS = ["The three most important things about the sea are", "def fibonacci(n):"]


def test_students_offline(student):
    model, tokenizer, folder = student
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    check(offline(folder, prompts), model, prompts)


def test_students_behind_the_openai_api(student):
    model, tokenizer, folder = student
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager",
               "--kv-cache-memory-bytes", str(2**28), "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    # what `vllm serve` runs; that command itself fails in the build for CPUs, whose package is not called vllm
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
             "--served-model-name", "student", *options]  # fmt: skip
    with subprocess.Popen(serve, env=environment()) as server:
        try:
            check_answer(ask(server, port), model, tokenizer)
        finally:
            server.terminate()


def ask(server, port):
    """What `curl` gets of `/v1/completions` once the server is up."""
    address = f"http://127.0.0.1:{port}"
    while subprocess.run(["curl", "--silent", "--fail", f"{address}/health"]).returncode:
        assert server.poll() is None, f"the server ended with status {server.returncode}"
        time.sleep(1)
    body = {"model": "student", "prompt": TEXTS[0], "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    curl = ["curl", "--silent", "--fail-with-body", f"{address}/v1/completions",
            "-H", "Content-Type: application/json", "-d", json.dumps(body)]  # fmt: skip
    answer = subprocess.run(curl, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    return json.loads(answer.stdout)["choices"][0]


def check_answer(answer, model, tokenizer):
    prompt = tokenizer(TEXTS[0]).input_ids
    found = {"tokens": [answer["token_ids"]], "logprobs": [answer["logprobs"]["token_logprobs"]]}
    check(found, model, [prompt])
