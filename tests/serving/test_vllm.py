"""vLLM serves plain, merged and paired students with the tokens and log-probabilities of transformers.

`make serve-test` installs vLLM and runs this. Real models are tested where `LAYERPRUNE_MODELS` (by default
`runs/models`) holds folders that `recipes/get_model.py` made.
"""

import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
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


def environment(**changes):
    return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"} | changes


def offline(folder, prompts, variables=None, **engine):
    """What vLLM's `LLM.generate` gives, in a process of its own."""
    engine = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True} | engine
    asked = json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS, "engine": engine})
    output = folder.parent / "found.json"
    subprocess.run([sys.executable, WORKER, folder, output, asked], check=True, env=environment(**variables or {}))
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


def wide(family):
    """A random model with three layers in parallel, and with two."""
    return apply_plan(family_model(family, num_layers=7, **SIZES), LayerPlan(BLOCKS, 7)).eval()


def random_prompts():
    return random_batches(1, rows=2, length=9, padded=False)[0]["input_ids"].tolist()


@pytest.mark.parametrize("engine", [{}, {"enforce_eager": False}], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_wide_blocks_of_every_family(family, engine, tmp_path):
    model, prompts = wide(family), random_prompts()
    check(offline(saved(model, byte_tokenizer(), tmp_path / "student"), prompts, **engine), model, prompts)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_tensor_parallelism(family, tmp_path):
    """Two processes, each with half of the heads and of the MLP of every block."""
    cores = sorted(os.sched_getaffinity(0))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}  # where there are no two NUMA nodes
    model, prompts = wide(family), random_prompts()
    folder = saved(model, byte_tokenizer(), tmp_path / "student")
    check(offline(folder, prompts, bound, tensor_parallel_size=2), model, prompts)


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


def test_wide_blocks_behind_the_openai_api(tmp_path):
    model, tokenizer = wide("qwen2"), byte_tokenizer()
    with served(saved(model, tokenizer, tmp_path / "student"), "--trust-remote-code") as address:
        check_answer(ask(address, tmp_path / "student"), model, tokenizer)


def test_students_behind_the_openai_api(student):
    model, tokenizer, folder = student
    options = ["--trust-remote-code"] if "auto_map" in json.loads((folder / "config.json").read_text()) else []
    with served(folder, *options) as address:
        check_answer(ask(address, folder), model, tokenizer)


@contextmanager
def served(folder, *options):
    """The address of `vllm serve` of a folder, which is stopped in the end and leaves no process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, *options, "--dtype", "float32",
               "--max-model-len", "128", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28),
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    variables = environment(PYTHONPATH=os.pathsep.join([named_vllm(folder.parent), os.environ.get("PYTHONPATH", "")]))
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=variables, start_new_session=True) as server:
        try:
            while subprocess.run(["curl", "--silent", "--fail", f"{address}/health"]).returncode:
                assert server.poll() is None, f"the server ended with status {server.returncode}"
                time.sleep(1)
            yield address
        finally:
            server.terminate()
        assert server.wait(60) == 0
    assert ended(server.pid), "the server left processes"


def ended(group, seconds=30):
    """Whether all processes of a group end in time."""
    for _ in range(seconds):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(1)
    return False


def named_vllm(folder):
    """A folder in which `vllm` finds its own version; the build for CPUs is called vllm-cpu, and its command fails."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        metadata = folder / "names" / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder / "names")


def ask(address, folder):
    """What `curl` gets of `/v1/completions`."""
    body = {"model": str(folder), "prompt": TEXTS[0], "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1,
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
