"""Every command and every snippet of README, docs and recipes is run as it stands there.

What stands for something of the reader's is put in: texts under the names that the pages use, `me` for `user`, and
tiny models of the same architecture and depth, on a Hub on loopback, for the real ones; the embedded teacher is a
narrow one as well. Settings appended to a command make it short; data sets of the recipes are local rows.
"""

import json
import re
import shlex
import shutil
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import byte_tokenizer, read_report
from gguf_writer import write_gguf
from hub_client import Worker
from hub_server import HubServer
from test_recipes import QUICK, RECIPES, SMALL, arguments_of, as_files, content_of, tiny_config, verb_of
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from hf_layerprune import embedded_dataset
from hf_layerprune.cli import VERBS
from hf_layerprune.cli.arguments import OF_HEALING, OF_TRAINING
from hf_layerprune.data import EMBEDDED_MODEL
from hf_layerprune.surgery import plan_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/**/README.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

WHOLE_COMMAND = re.compile(r"`(hf-layerprune [\w-]+ --[^`<]*)`")  # within a sentence
DEFAULT_FOLDERS = {"compress": "trainer_output", "parallelize": "layerprune-parallel"}
SETS_A_VARIABLE = re.compile(r"\w+=")
STANDS_FOR_SOMETHING = re.compile(r"[A-Z]+|user/name")

MODELS = sorted({"Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-3B-Instruct"} | {content_of(path)["model"] for path in RECIPES})
EXAMPLE = (ROOT / "examples" / "compress.py").read_text()
GIVEN = """
from conftest import random_batches
from hf_layerprune.loading import load_model
batches, prompts = random_batches(1), "my_prompts.jsonl"
model, teacher = "qwen-18/model", load_model("Qwen/Qwen2.5-0.5B")
"""
RUN_ELSEWHERE = {
    "make": ".ci/run",
    "recipes/real_model.sh": "takes its model from PyPI, and hours",
    "benchmarks/gpu_real.sh": "takes a GPU; test_gpu_real.py reads the commands it would run",
    "pip": "make test installs the package with its extras",
    "hf": "the Hub's own client, against the Hub",
    "lm_eval": "lm-eval's own command, for models that fill a GPU",
    "python": "benchmarks and what made the embedded assets, for hours; test_figure.py runs a short one",
}
SHORT = QUICK | {
    "score": {"num_samples": 2, "max_length": 32, "batch_size": 2},
    "evaluate": {"num_samples": 2, "max_length": 32, "batch_size": 2},
    "benchmark": {"prompt_tokens": 4, "new_tokens": 3, "repeats": 1},
    "estimate": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "dtype": "bfloat16",
    },
}
DEPTHS = {"Qwen/Qwen2.5-0.5B": 24, "Qwen/Qwen2.5-3B": 30, "Qwen/Qwen2.5-3B-Instruct": 30}
"""Layers of the models on the Hub that README and docs make shallower."""
FEW = 2
"""As many layers are removed by a recipe's command, in two rounds."""
SHORT_IN_PYTHON = {
    r"max_new_tokens=\d+": "max_new_tokens=4",
    r"max_steps=\d+": "max_steps=2, measure_speed=False",
    r"num_calibration_samples=\d+": "num_calibration_samples=2",
    r"max_length=\d+, num_rows=\d+": "max_length=32, num_rows=2",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of each command that a page gives, without the variables set before it."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    whole = [shlex.split(command) for command in WHOLE_COMMAND.findall(FENCE.sub("", page.read_text()))]
    found += [words for words in whole if not any(map(STANDS_FOR_SOMETHING.fullmatch, words))]
    return [list(dropwhile(SETS_A_VARIABLE.match, words)) for words in found]


def of_the_package(words: list[str]) -> list[str] | None:
    """The verb and its settings; None for a command of others. What launches it is parsed as accelerate does."""
    if words[0] == "accelerate":
        start = words.index("-m")
        arguments = launch_command_parser().parse_args(words[2:start] + ["script.py"])
        assert (ROOT / arguments.config_file).is_file() and words[start + 1] == "hf_layerprune.cli"
        return words[start + 2 :]
    return words[1:] if words[0] == "hf-layerprune" else None


def is_typed(page: Path) -> bool:
    """Whether a page, whose commands are not those of README, has something for `types`."""
    return page.name != "cli.md" and bool(blocks(page, "python") or any(map(of_the_package, commands(page))))


PAGES_OF_DOCS = [page for page in PAGES if page.parent.name == "docs" and is_typed(page)]
PAGES_OF_RECIPES = [page for page in sorted(ROOT.glob("recipes/**/README.md")) if is_typed(page)]


def test_commands_are_known():
    pages = [*PAGES, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]
    for words in (words for page in pages for words in commands(page)):
        ours = of_the_package(words)
        if ours is not None:
            assert ours[0] in VERBS, words
        elif words[0].startswith(".venv/bin/"):
            assert words[0].endswith(("/python", "/hf-layerprune")), words
        else:
            assert words[0] in RUN_ELSEWHERE, words
        for before, word in pairwise(words):  # what is written need not be there
            if before != "--output" and word.startswith(("recipes/", "benchmarks/", "docs/", "tests/")):
                assert (ROOT / word).exists(), words


# ------------------------------------------------------------------------------------------ one reader's afternoon


def a_desk(folder: Path) -> Path:
    """The folder in which somebody types: texts, tasks and recipes."""
    texts = [text[:300] for text in embedded_dataset("calibration").select(range(24))["text"]]
    files = {
        "my_texts.jsonl": [{"text": text} for text in texts],
        "rows.jsonl": [{"text": text, "prompt": text[:40]} for text in texts],  # of the recipes
        "my_prompts.jsonl": [{"prompt": text[:40]} for text in texts],
        "sentences.jsonl": [{"sentence_good": "He reads.", "sentence_bad": "He read reads."}] * 3,
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"kind": "multiple_choice", "name": "grammar", "dataset": str(folder / "sentences.jsonl"), "prompt": "",
              "choices": ["sentence_good", "sentence_bad"], "answer": "sentence_good"}]  # fmt: skip
    (folder / "my_tasks.yaml").write_text(yaml.safe_dump(tasks))
    recipe = {"model": "Qwen/Qwen2.5-0.5B", "dataset": "my_texts.jsonl", "target_num_layers": 22, "output_dir": "own"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "models.yaml").write_text(next(iter(blocks(ROOT / "docs/space.md", "yaml"))).replace("user/", "me/"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("Qwen/Qwen2.5-0.5B"))
    write_gguf(model, folder / "SmolLM2-135M-Instruct-Q4_K_M.gguf", byte_tokenizer())
    (folder / "shape.json").write_text(tiny_config("Qwen/Qwen2.5-3B").to_json_string(use_diff=False))
    for name in ("recipes", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def narrow_teacher(folder: Path) -> Path:
    """The embedded teacher with its depth and its tokenizer, but next to no width."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(EMBEDDED_MODEL)
    narrow = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")}
    config.update(narrow | {"num_key_value_heads": 1, "initializer_range": 0.15, "dtype": "float32"})
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def terminal(desk, tmp_path_factory):
    """A process with the Hub's client, and tiny models on the Hub."""
    with HubServer() as hub:
        for model in MODELS:
            torch.manual_seed(0)
            tiny = AutoModelForCausalLM.from_config(on_the_hub(model))
            files = as_files(tiny, tmp_path_factory.mktemp("model"))
            hub.seed(model, files)
            if model == "Qwen/Qwen2.5-0.5B":
                hub.seed("me/qwen-parallel", files)
        hub.seed("me/name", {"model-Q8_0.gguf": (desk / "SmolLM2-135M-Instruct-Q4_K_M.gguf").read_bytes()})
        teacher = narrow_teacher(tmp_path_factory.mktemp("embedded") / "teacher")
        with Worker(hub, tmp_path_factory.mktemp("cache"), desk, EMBEDDED_MODEL=str(teacher)) as worker:
            yield worker


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return a_desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def reader(terminal, desk):
    """Somebody who has read README and typed all of it, one line after the other."""
    types(terminal, desk, ROOT / "README.md")
    typed(terminal, desk, shlex.split("hf-layerprune push qwen-29 --repo_id me/qwen-29"))
    return terminal


def on_the_hub(model: str) -> PretrainedConfig:
    return tiny_config(model, num_hidden_layers=DEPTHS.get(model, 3 * FEW))


def few_layers_less(recipe: dict) -> int:
    return on_the_hub(recipe["model"]).num_hidden_layers - FEW


def num_rounds(output_dir: str) -> int:
    """As many as the recipe that writes this folder has."""
    (recipe,) = (recipe for recipe in map(content_of, RECIPES) if recipe.get("output_dir") == output_dir)
    gone = tiny_config(recipe["model"]).num_hidden_layers - recipe["target_num_layers"]
    return -(-gone // recipe.get("layers_per_round", 1))


def value_of(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def short(verb: str, rest: list[str], recipe: dict, desk: Path) -> dict:
    """Settings that make a command short."""
    settings = dict(SHORT.get(verb, {}))
    of_a_recipe = (value_of(rest, "--config") or "").startswith("recipes/")
    if verb == "compress" and "--layers_per_round" not in rest:
        settings["layers_per_round"] = FEW // 2 if of_a_recipe else 4
    if "--on_policy_steps" in rest:
        settings |= {"on_policy_steps": 1, "on_policy_tokens": 4}
    if of_a_recipe and verb in ("compress", "parallelize"):
        settings["target_num_layers"] = few_layers_less(recipe)
    if of_a_recipe and verb != "estimate":
        if not (desk / recipe["dataset"]).exists():  # else `generate` has written it
            settings |= {"dataset": "rows.jsonl", "dataset_split": "train"}
            settings |= {"eval_dataset": "rows.jsonl"} if "eval_dataset" in recipe else {}
        few = {"tasks": "my_tasks.yaml", "num_repair_samples": 4}
        settings |= {name: value for name, value in few.items() if name in recipe}
    if value_of(rest, "--heal") == "false":
        settings = {name: value for name, value in settings.items() if name not in OF_HEALING | OF_TRAINING}
    only_tasks = verb in ("score", "evaluate") and "--tasks" in rest and "--dataset" not in rest
    return {} if only_tasks else settings  # they bring their own text


def typed(worker: Worker, desk: Path, words: list[str]) -> None:
    """Type a command, unless this very one was typed before."""
    if words in worker.typed:
        return
    worker.typed.append(words)
    verb, *rest = of_the_package(words)
    rest = [re.sub(r"^user/", "me/", word) for word in rest]
    for position, word in enumerate(rest):
        if found := re.fullmatch(r"([^/]+)/rounds/(\d+)", word):
            assert int(found[2]) <= num_rounds(found[1])
            rest[position] = f"{found[1]}/rounds/02"
    if verb == "benchmark" and "Qwen2.5-3B" in rest:
        rest[rest.index("Qwen2.5-3B")] = "shape.json"
        rest = [word for word in rest if word != "--compile"]  # takes minutes; see test_benchmark.py
    config = value_of(rest, "--config") or ""
    recipe = yaml.safe_load((desk / config).read_text()) if config.endswith(".yaml") else {}
    output_dir = value_of(rest, "--output_dir") or recipe.get("output_dir") or DEFAULT_FOLDERS.get(verb)
    if verb in DEFAULT_FOLDERS and "--resume" not in rest:  # another example under the same name
        shutil.rmtree(desk / output_dir, ignore_errors=True)
    if "--tasks" in rest:
        rest[rest.index("--tasks") + 1] = "my_tasks.yaml"  # the paper's are on the Hub, the default ones take long
    if verb == "estimate" and sum(of_the_package(words)[0] == verb for words in worker.typed) > 2:  # the others differ
        answer = worker("python", code=f"from hf_layerprune.cli.parsing import parse; parse('estimate', {rest!r})")
        assert answer == {}, (words, answer)
        return
    status, _, error = worker.run(verb, *rest, *arguments_of(short(verb, rest, recipe, desk)))
    assert status == 0, (words, error)


def types(worker: Worker, desk: Path, page: Path) -> None:
    for words in commands(page):
        if of_the_package(words):
            typed(worker, desk, words)
    snippets = [code for code in blocks(page, "python") if "gradio_client" not in code]
    if snippets:
        code = "\n".join([GIVEN, *snippets]).replace("user/", "me/")
        for long, few in SHORT_IN_PYTHON.items():
            code = re.sub(long, few, code)
        answer = worker("python", code=code)
        assert "error" not in answer, (page.name, answer)


@pytest.mark.parametrize("page", PAGES_OF_DOCS, ids=lambda page: page.name)
def test_a_reader_types_what_stands_there(reader, desk, page):
    types(reader, desk, page)


def test_the_example_of_readme_has_run(reader, desk):
    assert EXAMPLE.split('"""\n\n', 1)[1] in (ROOT / "README.md").read_text()
    assert [record["num_layers"] for record in read_report(desk / "embedded-14")["rounds"]] == [15, 14]


@pytest.mark.parametrize("page", PAGES_OF_RECIPES, ids=lambda page: page.parent.name)
def test_a_reader_types_a_recipe(terminal, desk, page):
    types(terminal, desk, page)
    for path in RECIPES:
        if path.parent == page.parent:
            check_result(desk, path)


def check_result(desk: Path, path: Path) -> None:
    """A recipe leaves answers, or a student made by its kind of edit."""
    recipe = content_of(path)
    if verb_of(path) == "generate":
        answers = [json.loads(line) for line in (desk / recipe["output_file"]).read_text().splitlines()]
        assert answers and all({"prompt", "completion"} <= set(answer) for answer in answers)
        return
    plan = plan_of(AutoModelForCausalLM.from_pretrained(desk / recipe["output_dir"] / "model"))
    assert (plan.depth, plan.num_teacher_layers - plan.depth) == (few_layers_less(recipe), FEW)
    pairs = verb_of(path) == "parallelize" or recipe.get("edits") == "parallelize"
    assert (len(plan.parallel_pairs), len(plan.removed_layers)) == ((FEW, 0) if pairs else (0, FEW))
