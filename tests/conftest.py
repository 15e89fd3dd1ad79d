"""Everything offline: random models of a few thousand weights, a byte-level tokenizer, and the embedded text."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
from tempfile import mkdtemp

os.environ.update(
    TRACKIO_DIR=mkdtemp(),  # read when Trackio is imported, which any test may be the first to do
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",  # tiny models gain nothing by more, and threads of several processes wait for each other
)

from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import quick  # noqa: F401
import torch
from datasets import Dataset
from peft import PeftConfig
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from hf_layerprune import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, embedded_dataset
from hf_layerprune.trainer.healing import HealingTrainer

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)
torch.set_num_threads(1)
gc.freeze()  # what the imports made is not looked through at every later collection, nor what a file of tests left
atexit.register(gc.unfreeze)  # else Triton reports it as leaked

END = "<|endoftext|>"
VOCAB_SIZE = 257  # the bytes and the end token
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": VOCAB_SIZE - 1,
    "initializer_range": 0.15,
}


def tiny_model(num_layers: int = 5, seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A random Qwen2 whose layers matter: biases and norms away from their initial values."""
    torch.manual_seed(seed)
    return with_layers_that_matter(
        Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"num_hidden_layers": num_layers} | changes))
    )


def with_layers_that_matter(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_batches(count: int = 2, rows: int = 3, length: int = 12, padded: bool = True, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(VOCAB_SIZE - 1, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, length // 2 :] = 0
            mask[1, :3] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def pytest_sessionstart() -> None:
    forked.SERVERS["package"] = forked.Server()


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    return tiny_model()


@pytest.fixture
def batches() -> list[dict]:
    return random_batches()


def byte_tokenizer() -> Qwen2Tokenizer:
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))} | {END: VOCAB_SIZE - 1}
    return Qwen2Tokenizer(vocab=vocab, merges=[])


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> Qwen2Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Qwen2Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cpu_with_bfloat16(monkeypatch) -> None:
    """A CPU on which a bfloat16 checkpoint is computed in bfloat16, whatever this one is."""
    monkeypatch.setattr("hf_layerprune.environment.has_bf16", lambda use_cpu: True)


@pytest.fixture
def model_folder(tmp_path: Path, saved_model: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "tiny-model"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | list], str]:
    """Write a file, of JSON lines where it is given rows, and return its path."""

    def write_file(name: str, content: str | list) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def texts() -> Dataset:
    return short_texts()


def short_texts(count: int = 12) -> Dataset:
    """The beginnings of embedded texts."""
    beginnings = [text[:400] for text in embedded_dataset("calibration").select(range(count))["text"]]
    return Dataset.from_dict({"text": beginnings})


def tiny_config(output_dir: Path, **changes) -> IterativeLayerDistillConfig:
    """Settings of a run of seconds."""
    settings = {
        "output_dir": str(output_dir),
        "target_num_layers": 3,
        "num_calibration_samples": 4,
        "num_eval_samples": 4,
        "trained_layers": "all",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_length": 32,
        "packing": True,
        "packing_strategy": "wrapped",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "measure_speed": False,
        "use_cpu": True,
        "bf16": False,
    }
    return IterativeLayerDistillConfig(**settings | changes)


@pytest.fixture
def make(tmp_path, tokenizer, texts):
    """Build a trainer on the embedded text; `folder` names its output folder."""

    def build(
        teacher=None,
        folder="run",
        callbacks=None,
        peft_config=None,
        eval_dataset=texts,
        prompt_dataset=None,
        **changes,
    ):
        return IterativeLayerDistillTrainer(
            model=tiny_model() if teacher is None else teacher,
            args=tiny_config(tmp_path / folder, **changes),
            train_dataset=texts,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
            prompt_dataset=prompt_dataset,
        )

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Qwen2Tokenizer, texts: Dataset) -> Callable[..., Path]:
    """The folder of a run that nothing ends early, made once for equal settings; only to be read."""
    folders = {}

    def build(num_layers: int = 5, peft_config: PeftConfig | None = None, **changes) -> Path:
        key = repr((num_layers, peft_config, sorted(changes.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "run"
            args = tiny_config(folders[key], **changes)
            data = {"train_dataset": texts, "eval_dataset": texts, "processing_class": tokenizer}
            IterativeLayerDistillTrainer(tiny_model(num_layers), args, peft_config=peft_config, **data).train()
        return folders[key]

    return build


@pytest.fixture
def healings(monkeypatch):
    """Every healing of the test, in order."""
    found, init = [], HealingTrainer.__init__

    def remember(self, *args, **kwargs):
        found.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(HealingTrainer, "__init__", remember)
    return found


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that a demo shows, see `demo_models.make_service`; only to be read."""
    from demo_models import make_service

    folder = tmp_path_factory.mktemp("demo")
    make_service(folder)
    return folder


@pytest.fixture(scope="session")
def hub() -> Iterator:
    """A Hub on loopback, which tests of several files share."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def worker(hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A process with the Hub's client."""
    from hub_client import Worker

    with Worker(hub, tmp_path_factory.mktemp("cache")) as process:
        yield process


def errors_of(capsys) -> str:
    """What went to stderr, without the lines that say what a verb is doing."""
    return errors_in(capsys.readouterr().err)


def errors_in(told: str) -> str:
    lines = told.splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith(" ...\n") and " %" not in line)


def flat(record):
    """A teacher or round of `report.json` with its measures on one level, and what follows from them."""
    plain = record | record["quality"] | {"num_layers": len(record["plan"]["blocks"])}
    if speed := record["speed"]:
        plain |= speed["report"] | speed
    if "edits" not in record:
        return plain
    removed = [int(label) for label in record["edits"] if label.isdigit()]
    scores = record["scores"]
    plain |= {"round": record["number"], "removed_layers": removed, "removed_layer": next(iter(removed), None)}
    plain |= {"all_scores": scores, "scores": scores[0]["values"] if scores else {}}
    for state in filter(record.get, ("unhealed", "before_healing")):
        plain |= {f"{name}_{state}": value for name, value in record[state].items()}
    if healing := record["healing"]:
        plain |= {"train_tokens": healing["num_tokens"], "seconds_healing": healing["seconds"]}
    return plain


def read_report(folder):
    report = json.loads((folder / "report.json").read_text())
    return report | {"teacher": flat(report["teacher"]), "rounds": [flat(record) for record in report["rounds"]]}


def rounds_of(trainer):
    """The finished rounds as [`read_report`] reads them."""
    return [flat(record) for record in json.loads(trainer.run.to_json())["rounds"]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)
