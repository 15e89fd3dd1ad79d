"""Every recipe is parsed as strictly as the command line does; `test_commands.py` runs them on tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCAB_SIZE, byte_tokenizer, errors_of, read_report
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hf_layerprune import cli
from hf_layerprune.benchmark import load_shape
from hf_layerprune.cli.parsing import parse
from hf_layerprune.data import ASSETS, embedded_dataset
from hf_layerprune.surgery import plan_of

ROOT = Path(__file__).parent.parent
OF_OTHERS = ("accelerate", "figure", "data")  # accelerate's own files, see below; of a benchmark; tasks
RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name not in OF_OTHERS)
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048, "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1, "initializer_range": 0.15, "dtype": "float32",
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUICK = {
    "compress": {
        "num_calibration_samples": 2, "num_eval_samples": 2, "max_steps": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2, "max_length": 64, "warmup_steps": 0,
        "save_strategy": "no", "measure_speed": "false", "use_cpu": "true",
    },
    "parallelize": {
        "max_length": 32, "num_samples": 2, "num_eval_samples": 2, "batch_size": 2, "measure_speed": "false",
        "dtype": "float32",
    },
    "generate": {"num_prompts": 6, "max_new_tokens": 4, "batch_size": 3, "dtype": "float32"},
}  # fmt: skip
PAPER_ROWS = {  # of the paper's tasks, by their names
    "MMLU": {
        "subject": "anatomy", "answer": 1, "question_en": "q", "choices_en": list("wxyz"), "question_ru": "в",
        "choices_ru": list("wxyz"),
    },
    "treeway": {"src_sents": ["a b", "c"], "summary_sents": ["a"]},
    "cp_": {"inputs": {"text": "word for word"}},
    "flores": {"inputs": {"en": "Good day", "ru": "Добрый день"}},
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def verb_of(path: Path) -> str:
    """A recipe opens with the command that runs it."""
    command = re.fullmatch(r"# hf-layerprune (\w+) --config (\S+)", path.read_text().splitlines()[0])
    assert command, f"{path} does not open with its command"
    assert command[2] == name_of(path)
    return command[1]


def content_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_there_are_recipes():
    models = {content_of(path)["model"] for path in RECIPES}
    assert {f"Qwen/Qwen2.5-{name}" for name in ("0.5B", "3B", "7B-Instruct")} <= models
    assert {"Qwen/Qwen3-8B", "meta-llama/Llama-3.2-3B"} <= models


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_parses_strictly(path):
    parsed = parse(verb_of(path), ["--config", str(path)])
    for key, value in content_of(path).items():
        (holder,) = (part for part in parsed if hasattr(part, key))  # one place, and no other
        read = getattr(holder, key) or "none"  # report_to
        read = ",".join(read) if isinstance(read, tuple) else read
        assert str(getattr(read, "value", read)) == str(value or "none"), key


def test_the_embedded_recipe_parses_strictly():
    path = ASSETS / "recipe.yaml"
    arguments, config = parse("compress", ["--config", str(path)])
    assert (arguments.model, config.target_num_layers) == ("embedded", content_of(path)["target_num_layers"])


def test_the_pages_name_every_recipe():
    index = (ROOT / "recipes" / "README.md").read_text()
    for path in RECIPES:
        assert f"]({path.parent.name}/README.md)" in index
        assert f"{verb_of(path)} --config {name_of(path)}" in (path.parent / "README.md").read_text()


def test_the_costs_are_of_these_recipes():
    table = (ROOT / "recipes" / "cost.md").read_text()
    for path in RECIPES:
        if verb_of(path) == "compress":
            _, config = parse("compress", ["--config", str(path)])
            depth = tiny_config(content_of(path)["model"]).num_hidden_layers
            rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
            rows *= 8 if path.stem == "paper" else 1  # processes
            rounds = -(-(depth - config.target_num_layers) // config.layers_per_round)
            tokens = rows * config.max_length * config.max_steps * rounds / 1e6
            layers = f"{depth} -> {config.target_num_layers}"
            line = f"| `{path.parent.name}/{path.name}` | {layers} | {rows} | {tokens:,.1f}M |"
            assert line in table, "run `python recipes/cost.py --output recipes/cost.md`"


def test_the_pages_have_the_memory_of_the_table():
    table = (ROOT / "recipes" / "cost.md").read_text()
    for path in RECIPES:
        if verb_of(path) == "compress":
            page = (path.parent / "README.md").read_text()
            (gigabytes,) = re.findall(rf"^\| `{path.parent.name}/{path.name}` .* (\d+) \|$", table, re.MULTILINE)
            assert f"{gigabytes} GiB by [count]" in page or path.stem == "paper", path


@pytest.mark.slow
def test_the_table_is_what_its_script_makes(tmp_path):
    command = [sys.executable, ROOT / "recipes" / "cost.py", "--output", tmp_path / "cost.md"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "cost.md").read_text() == (ROOT / "recipes" / "cost.md").read_text()


# -------------------------------------------------------------------------------------------------------- dry runs


def tiny_config(model: str, **changes) -> PretrainedConfig:
    """The architecture and the depth of a model, and nothing of its width."""
    config = load_shape(model)
    kept = ("num_hidden_layers", "tie_word_embeddings", "rms_norm_eps", "rope_parameters")
    return type(config)(**{name: getattr(config, name) for name in kept} | SMALL | changes)


def arguments_of(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def as_files(model: PreTrainedModel, folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint with its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_round_of_the_paper_scored_by_its_seven_data_sets(tmp_path, capsys):
    """What its commands do otherwise is run in test_commands.py."""
    path = ROOT / "recipes" / "qwen2.5-3b" / "paper.yaml"
    entries = yaml.safe_load((ASSETS / "tasks" / "paper.yaml").read_text())
    files = {"rows": [{"text": text[:300]} for text in embedded_dataset("calibration")["text"][:24]]}
    for entry in entries:
        (row,) = (row for part, row in PAPER_ROWS.items() if part in entry["name"])
        files[entry["name"]] = [row] * 2
        entry |= {"num_few_shot": 1, "limit": 1, "dataset": f"{entry['name']}.jsonl"}
        entry.pop("config_name", None)  # which a file has none of
        entry |= {"max_new_tokens": 2} if "max_new_tokens" in entry else {}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(entries))
    torch.manual_seed(0)
    as_files(AutoModelForCausalLM.from_config(tiny_config(content_of(path)["model"])), tmp_path / "model")
    settings = QUICK["compress"] | {
        "model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out",
        "tasks": tmp_path / "tasks.yaml", "target_num_layers": 35,
        "protect_first_layers": 33,  # scoring all layers takes long
    }  # fmt: skip
    status = cli.main(["compress", "--config", str(path), *arguments_of(settings)])
    assert status == 0, errors_of(capsys)
    (record,) = read_report(tmp_path / "out")["rounds"]
    assert len(record["scores"]) == 3 and set(record["tasks"]["results"]) == {entry["name"] for entry in entries}
    assert plan_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")).depth == 35
