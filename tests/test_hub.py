"""Push and pull against a Hub on loopback, by the unmodified client, with everything that can go wrong on the way."""

import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from hub_client import TOKEN, USER, environment
from hub_server import Fault
from test_report import ROUNDS, RUN
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, cli, load_run, prune
from hf_layerprune.cli.parsing import parse
from hf_layerprune.hub.paths import absolute_if_local, hub_id
from hf_layerprune.hub.push import read_evaluation
from hf_layerprune.hub.runs import hub_errors
from hf_layerprune.report import write_report
from hf_layerprune.tasks import TaskReport, TaskResult

WHOLE = {
    "README.md", "config.json", "generation_config.json", "layers.png", "model.safetensors", "plan.json",
    "quality.png", "recipe.yaml", "report.json", "report.md", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
CODE = {"configuration_pruned_qwen2.py", "modeling_pruned_qwen2.py"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs under a folder with a user's name: three rounds of removal, and one with a pair."""
    home = tmp_path_factory.mktemp("home") / USER
    teacher, text = home / "tiny-model", home / "diary.txt"
    tiny_model(6).save_pretrained(teacher)
    byte_tokenizer().save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A tiny model\n")
    text.write_text("\n".join(f"Once upon a time, {n} times over, there was a small house." for n in range(80)))
    common = ["--model", teacher, "--dataset", text, "--max_length", 32]
    quick = [
        "--target_num_layers", 3, "--max_steps", 1, "--num_calibration_samples", 2, "--num_eval_samples", 2,
        "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2, "--packing", "true",
        "--packing_strategy", "wrapped", "--save_strategy", "no", "--report_to", "none", "--measure_speed", "false",
    ]  # fmt: skip
    pairs = ["--pairs", "2,3", "--num_samples", 2, "--num_eval_samples", 2, "--measure_speed", "false"]
    for verb, name, extra in (("compress", "plain", quick), ("parallelize", "paired", pairs)):
        assert cli.main([verb, *map(str, common), "--output_dir", str(home / name), *map(str, extra)]) == 0
    return home


@pytest.fixture(autouse=True)
def fresh(hub):
    hub.reset()


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_one_commit_with_everything_a_stranger_needs_and_nothing_local(hub, worker, runs):
    assert "oid" in worker.push(runs / "plain")
    repo = hub.repos["me/student"]
    files = repo.files()
    assert set(files) == WHOLE
    assert repo.titles() == ["3 layers of tiny-model"]
    assert files["model.safetensors"] == (runs / "plain" / "model" / "model.safetensors").read_bytes()
    told = b"\n".join(content for name, content in files.items() if name != "model.safetensors").decode("latin-1")
    for secret in (str(runs), str(runs.parent), USER, TOKEN, "optimizer.pt"):
        assert secret not in told
    assert "tiny-model" in told and "diary.txt" in told


def test_with_pairs_the_two_code_files_come_along_and_leave_with_them(hub, worker, runs):
    worker.push(runs / "paired")
    repo = hub.repos["me/student"]
    assert set(repo.files()) == WHOLE | CODE
    own = {"notes.md": b"mine", "my_lora.safetensors": b"mine", "adapters/model.safetensors": b"mine"}
    hub.seed("me/student", own | {"model-00001-of-00002.safetensors": b"an old shard"})
    worker.push(runs / "plain")
    assert set(repo.files()) == WHOLE | set(own)  # what a push did not bring stays


def test_the_recipe_is_one(hub, worker, runs):
    worker.push(runs / "plain", round=1)
    worker.push(runs / "paired", "me/paired")
    one, other = (yaml.safe_load(hub.repos[name].files()["recipe.yaml"]) for name in ("me/student", "me/paired"))
    assert one["model"] == "tiny-model" and one["dataset"] == "diary.txt" and one["target_num_layers"] == 5
    assert other["pairs"] == ["2,3"] and other["output_dir"] == "paired"
    for recipe, verb in ((one, "compress"), (other, "parallelize")):
        path = runs / "recipe-from-the-hub.yaml"
        path.write_text(yaml.safe_dump(recipe))
        parse(verb, ["--config", str(path)])


def test_a_run_that_is_not_finished_says_so_and_its_recipe_leads_to_what_is_pushed(hub, worker, runs, tmp_path):
    folder = shutil.copytree(runs / "plain", tmp_path / "plain")
    write_report(folder, load_run(folder).record.until(2))
    (folder / "plan.json").unlink()  # the end of a run writes it
    status, _, err = worker.run("push", folder, "--repo_id", "me/student")
    assert status == 0 and "holds a run that is not finished: it has got as far as 4 layers" in err
    assert yaml.safe_load(hub.repos["me/student"].files()["recipe.yaml"])["target_num_layers"] == 4
    assert "not finished" not in worker.run("push", runs / "plain", "--repo_id", "me/student")[2]


def test_a_round(hub, worker, runs):
    worker.push(runs / "plain", round=2, revision="experiments/two")
    repo = hub.repos["me/student"]
    files = repo.files("experiments/two")
    report = json.loads(files["report.json"])
    assert [len(record["plan"]["blocks"]) for record in report["rounds"]] == [5, 4]
    assert json.loads(files["config.json"])["num_hidden_layers"] == 4
    assert repo.files() == {} and set(repo.branches) == {"main", "experiments/two"}


def test_the_base_model_that_is_named_is_that_of_card_recipe_and_report(hub, worker, runs):
    status, _, err = worker.run("push", runs / "plain", "--repo_id", "me/student", "--base_model", "Qwen/Qwen2.5-0.5B")
    assert status == 0, err
    files = hub.repos["me/student"].files()
    assert yaml.safe_load(files["recipe.yaml"])["model"] == "Qwen/Qwen2.5-0.5B"
    assert json.loads(files["report.json"])["teacher"]["name"] == "Qwen/Qwen2.5-0.5B"
    assert "base_model: Qwen/Qwen2.5-0.5B\n" in files["README.md"].decode()


def test_the_folder_that_a_local_card_names_is_found(runs):
    folder = runs / "plain"
    assert load_run(folder / "model").plan == load_run(folder).plan


def test_a_tag_for_every_depth(hub, worker, runs):
    worker.push(runs / "plain", depth_tags=True)
    repo = hub.repos["me/student"]
    assert set(repo.tags) == {"5-layers", "4-layers", "3-layers"} and set(repo.branches) == {"main"}
    for depth in (5, 4, 3):
        files = repo.files(f"{depth}-layers")
        assert set(files) == WHOLE and json.loads(files["config.json"])["num_hidden_layers"] == depth
    assert repo.tags["3-layers"] == repo.branches["main"] and "5-layers" in main_card(repo)
    assert repo.titles() == ["3 layers of tiny-model", "4 layers of tiny-model", "5 layers of tiny-model"]
    before = dict(repo.tags)
    worker.push(runs / "plain", depth_tags=True, tags=["better"])
    assert all(repo.tags[tag] != before[tag] for tag in before) and set(repo.branches) == {"main"}
    card = repo.files("4-layers")["README.md"].decode()
    assert "better" in card and 'from_pretrained("me/student", revision="4-layers")' in card
    assert "vllm serve me/student --revision 4-layers" in card and "vllm serve me/student\n" in main_card(repo)


def test_a_repository_for_every_depth_in_a_collection(hub, worker, runs):
    command = ["push", runs / "plain", "--repo_id", "team/tiny", "--collection"]
    for _ in range(2):  # the second time all is there
        status, out, err = worker.run(*command)
        assert status == 0, err
        (collection,) = hub.collections.values()
        names = [f"team/tiny-{depth}-layers" for depth in (5, 4, 3)]
        assert [item["id"] for item in collection["items"]] == names and collection["title"] == "tiny"
        assert set(hub.repos) == set(names) and collection["slug"].startswith("team/tiny-")
    assert f"collection: {hub.endpoint}/collections/{collection['slug']}" in err and f"{names[-1]}/commit/" in out
    for depth, name in zip((5, 4, 3), names, strict=True):
        repo = hub.repos[name]
        assert set(repo.files()) == WHOLE and not repo.tags and set(repo.branches) == {"main"}
        assert json.loads(repo.files()["config.json"])["num_hidden_layers"] == depth
    assert f'from_pretrained("{names[1]}")' in main_card(hub.repos[names[1]])
    others = ", ".join(f"[{n}-layers](https://huggingface.co/team/tiny-{n}-layers)" for n in (5, 3))
    assert f"Other depths of the same run: {others}." in main_card(hub.repos[names[1]])
    hub.log.clear()
    refused(hub, worker.push(runs / "plain", "team/tiny", collection=True, private=True), "exists and is public")
    refused(hub, worker.push(runs / "plain", collection=True, depth_tags=True), "choose one of them")


@pytest.mark.parametrize("path", ["POST .*/tiny-4-layers/commit/", "POST .*/collections", "POST .*/items"])
def test_after_a_fault_a_second_push_completes_the_collection(hub, worker, runs, path):
    hub.faults.append(Fault("503", path=path, times=10_000))
    assert "pushing to me/tiny: " in worker.push(runs / "plain", "me/tiny", collection=True)["error"]
    hub.faults.clear()
    assert "oid" in worker.push(runs / "plain", "me/tiny", collection=True)
    assert all(set(repo.files()) == WHOLE for repo in hub.repos.values())
    assert [len(one["items"]) for one in hub.collections.values()] == [3]


def evaluation(runs, folder, number=-1, **changes):
    """An `evaluation.json` of a student, as `evaluate` writes it."""
    plan = json.loads((runs / "plain" / "report.json").read_text())["rounds"][number]["plan"]
    result = {"measure": "score", "quality": 0.341, "cost": 0.659, "standard_error": 0.01, "num_examples": 1319}
    content = {"plan": plan, "tasks": {changes.pop("name", "gsm8k"): result | {"weight": 1.0} | changes}}
    path = folder / "evaluation.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_benchmark_goes_where_the_hub_looks_for_it(hub, worker, runs, tmp_path):
    path, name = evaluation(runs, tmp_path, number=1), ".eval_results/gsm8k.yaml"
    worker.push(runs / "plain", depth_tags=True, evaluation=path)
    repo = hub.repos["me/student"]
    assert yaml.safe_load(repo.files("4-layers")[name]) == [
        {
            "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
            "value": 34.1,
            "notes": "score, measured by hf-layerprune evaluate",
        }
    ]
    assert set(repo.files("5-layers")) == set(repo.files("3-layers")) == WHOLE
    worker.push(runs / "plain", round=2, evaluation=path)
    assert name in repo.files()
    worker.push(runs / "plain")  # another student
    assert set(repo.files()) == WHOLE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"number": 0}, "is of a student with other layers than those that are pushed"),
        ({"num_examples": 100}, "gsm8k on 100 examples, which no leaderboard takes; give gsm8k on 1,319 examples"),
        ({"name": "my_task"}, "my_task on 1,319 examples, which no leaderboard takes"),
        ({"quality": "good"}, "is not an evaluation.json with tasks"),
    ],
)
def test_a_number_no_leaderboard_takes_is_refused(hub, worker, runs, tmp_path, changes, message):
    refused(hub, worker.push(runs / "plain", evaluation=evaluation(runs, tmp_path, **changes)), message)
    refused(
        hub, worker.push(runs / "plain", evaluation=str(runs / "diary.txt")), "is not an evaluation.json with tasks"
    )


def test_a_benchmark_that_chose_the_layers_is_refused(runs, tmp_path):
    run, number = load_run(runs / "plain"), 3
    tasks = TaskReport({"gsm8k": TaskResult("score", 0.3, 0.7, 0.01, 1319, 1.0)})
    chosen = replace(run, record=replace(run.record, teacher=replace(run.record.teacher, tasks=tasks)))
    assert read_evaluation(evaluation(runs, tmp_path), run, [number]).keys() == {number}
    with pytest.raises(LayerPruneError, match="holds gsm8k, which chose the layers"):
        read_evaluation(evaluation(runs, tmp_path), chosen, [number])


def main_card(repo):
    return repo.files()["README.md"].decode()


@pytest.fixture
def by_lfs(hub, worker, monkeypatch):
    """A Hub and a client that move large files by LFS, without Xet."""
    switch = "from huggingface_hub import constants; constants.HF_HUB_DISABLE_XET = {}"
    monkeypatch.setattr(hub, "lfs_suffixes", (".safetensors",))
    worker("python", code=switch.format(True))
    yield
    worker("python", code=switch.format(False))


def test_large_files_by_lfs(hub, worker, by_lfs, runs):
    hub.store.clear()
    assert "oid" in worker.push(runs / "plain")
    repo = hub.repos["me/student"]
    assert repo.commits[repo.branches["main"]].tree["model.safetensors"].lfs
    assert repo.files()["model.safetensors"] == (runs / "plain" / "model" / "model.safetensors").read_bytes()
    hub.log.clear()
    worker.push(runs / "plain", tags=["again"])
    assert not any("PUT" in line for line in hub.log)  # what is there is not sent twice


def test_weights_in_several_files(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rounds" / "03")
    student = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(student)
    (student / "model.safetensors").unlink()
    model.save_pretrained(student, max_shard_size="8KB")
    assert "oid" in worker.push(tmp_path / "run")
    repo = hub.repos["me/student"]
    assert {name for name in repo.files() if "model" in name} == {path.name for path in student.glob("model*")}
    assert len(repo.files()) > 20 and len(repo.titles()) == 1  # one commit, which the client does not split


def test_a_private_repository(hub, worker, runs):
    status, out, err = worker.run("push", runs / "plain", "--repo_id", "me/secret", "--private")
    assert "Text: scored on `diary.txt`, healed on `diary.txt`, measured on held-out rows of `diary.txt`." in (
        main_card(hub.repos["me/secret"])
    )
    assert status == 0 and hub.repos["me/secret"].private and f"{hub.endpoint}/me/secret/commit/" in out
    assert "pushing 3 layers to me/secret" in err


def test_the_verb_takes_its_words_in_any_order(hub, worker, runs):
    extra = [runs / "plain", "--private", "--round", "01", "--repo_id", "team/shared", "--depth_tags", "true"]
    status, _, err = worker.run("push", *extra)
    assert status == 0, err
    assert set(hub.repos["team/shared"].tags) == {"5-layers"} and hub.repos["team/shared"].private


def test_a_trainer_pushes_when_it_is_done_and_not_before(hub, worker, runs, tmp_path):
    options = {
        "model": str(runs / "tiny-model"),
        "push_to_hub": True,
        "hub_model_id": "trained",
        "save_strategy": "steps",
    }
    wrong = worker("train", output_dir=str(tmp_path / "run"), hub_token="hf_reader", **options)
    assert "403 Forbidden" in wrong["error"]
    assert not (tmp_path / "run" / "rounds").exists()  # before anything is trained
    more = {"save_steps": 1, "hub_private_repo": True, "hub_revision": "side"}
    assert "oid" in worker("train", output_dir=str(tmp_path / "run"), **more, **options)
    repo = hub.repos["me/trained"]
    assert repo.titles("side") == ["Again", "5 layers of tiny-model"] and repo.private and repo.files() == {}
    files = repo.files("side")
    assert set(files) == WHOLE - {"recipe.yaml"}  # it was not a recipe that was run
    card = files["README.md"].decode()
    assert "- mine\n" in card and "- user/books\n" in card and "recipe.yaml" not in card


# -- what comes back -------------------------------------------------------------------------------------------------

STRANGER = """
import importlib.util, json, sys
sys.path += {paths}
assert importlib.util.find_spec("hf_layerprune") is None or sys.modules.setdefault("hf_layerprune", None) is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("plain", "paired"):
    model = AutoModelForCausalLM.from_pretrained(f"me/{{name}}", trust_remote_code=name == "paired")
    ids = AutoTokenizer.from_pretrained(f"me/{{name}}")("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save((type(model).__name__, ids, model(ids).logits), name + ".pt")
"""


def test_a_stranger_computes_the_same_to_the_bit(hub, worker, runs, tmp_path):
    for name in ("plain", "paired"):
        worker.push(runs / name, f"me/{name}")
    paths = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    script = STRANGER.format(paths=paths)
    command = [sys.executable, "-I", "-S", "-c", script]  # without site-packages' path files, so without the package
    env = environment(hub, tmp_path / "empty") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, kind in (("plain", "Qwen2ForCausalLM"), ("paired", "PrunedQwen2ForCausalLM")):
        loaded, ids, logits = torch.load(tmp_path / f"{name}.pt")
        student = AutoModelForCausalLM.from_pretrained(runs / name / "model")
        with torch.no_grad():
            assert loaded == kind and torch.equal(logits, student(ids).logits)


def test_plan_and_report_come_back(hub, worker, runs):
    oid = worker.push(runs / "plain", depth_tags=True)["oid"]
    pulled = worker("load", name="me/student")
    report = json.loads((runs / "plain" / "report.json").read_text())
    assert pulled["revision"] == oid and pulled["plan"] == report["rounds"][-1]["plan"]
    assert pulled["report"]["rounds"] == report["rounds"]
    assert len(worker("load", name="me/student@4-layers")["report"]["rounds"]) == 2
    assert len(worker("load", name="me/student", revision="5-layers")["report"]["rounds"]) == 1


QUICK = ("--max_length", 32, "--num_calibration_samples", 2, "--max_steps", 1, "--num_eval_samples", 2,
         "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2, "--save_strategy", "no",
         "--report_to", "none", "--measure_speed", "false")  # fmt: skip
OF_A_BRANCH = """
from conftest import short_texts, tiny_config
from hf_layerprune import IterativeLayerDistillTrainer
args = tiny_config({folder!r}, target_num_layers=2, model_init_kwargs={{"revision": "side"}})
texts = short_texts()
trainer = IterativeLayerDistillTrainer(model="me/aside", args=args, train_dataset=texts)
assert len(trainer.processing_class) == 257
"""


def test_the_tokenizer_is_that_of_the_revision_the_model_is_of(hub, worker, runs, tmp_path):
    worker.push(runs / "plain", "me/aside", revision="side")
    assert hub.repos["me/aside"].files() == {}  # nothing to load on main
    assert worker("python", code=OF_A_BRANCH.format(folder=str(tmp_path / "by-hand"))) == {}
    command = ["compress", "--model", "me/aside", "--model_init_kwargs", '{"revision": "side"}', *QUICK]
    more = ["--dataset", runs / "diary.txt", "--target_num_layers", 2, "--output_dir", tmp_path / "on"]
    status, _, err = worker.run(*command, *more)
    assert status == 0, err


def test_compress_continues_from_a_pushed_student(hub, worker, runs, tmp_path):
    worker.push(runs / "plain", depth_tags=True)
    quick = ["--dataset", runs / "diary.txt", *QUICK]
    out, teacher = tmp_path / "on", runs / "tiny-model"
    command = ["compress", "--model", "me/student@4-layers", "--teacher", teacher, "--target_num_layers", 3]
    status, _, err = worker.run(*command, "--output_dir", out, *quick)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    before = json.loads(hub.repos["me/student"].files("4-layers")["plan.json"])
    plan = report["rounds"][0]["plan"]
    assert plan["num_teacher_layers"] == 6 and len(plan["blocks"]) == 3
    assert all(block in before["blocks"] for block in plan["blocks"])
    assert len(report["teacher"]["plan"]["blocks"]) == 6 and report["teacher"]["name"] == "tiny-model"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["teacher"] == str(teacher)
    assert worker.push(out, "me/deeper")["oid"]
    card = hub.repos["me/deeper"].files()["README.md"].decode()
    assert "base_model: me/student\n" in card and "base_model_relation: finetune" in card and "license: mit" in card
    assert "Removed before this run: " in card
    origin = "[me/student@4-layers](https://huggingface.co/me/student/tree/4-layers)"
    assert f"made from {origin} (4 layers): 1 layer left out, healed by distillation." in card
    assert "It holds 3 of the 6 layers of the original." in card and "benchmark tiny-model me/deeper" in card


def test_a_run_on_this_machine(runs, tmp_path):
    run = load_run(runs / "paired")
    assert run.revision is None and run.plan.parallel_pairs == ((2, 3),) and run.settings["pairs"] == ["2,3"]
    with pytest.raises(LayerPruneError, match=r"holds no finished run: it has no report\.json"):
        load_run(tmp_path)


def test_parallelize_keeps_only_the_last_student(tmp_path):
    write_report(tmp_path, replace(RUN, settings={"search": "greedy"}))
    tiny_model(2).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"layer_plan": ROUNDS[1].plan.to_dict()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load_run(tmp_path).student(2) == tmp_path / "model"
    with pytest.raises(LayerPruneError, match="no longer holds the student of round 1"):
        load_run(tmp_path).student(1)


# -- what is refused before anything is sent -------------------------------------------------------------------------


def refused(hub, answer, *parts):
    assert all(part in answer["error"] for part in parts), answer
    assert "\n" not in answer["error"] and TOKEN not in answer["error"]
    log = [line for line in hub.log if line != "POST /api/repos/create"]  # which changes nothing that exists
    assert not any(word in line for line in log for word in ("POST", "PUT", "DELETE")), log


def test_a_tag_is_not_named_like_a_branch(hub, worker, runs):
    refused(
        hub,
        worker.push(runs / "plain", revision="3-layers", depth_tags=True),
        "3-layers would be a tag and a branch",
    )
    assert hub.repos == {}
    assert "oid" in worker.push(runs / "plain", revision="3-layers")
    hub.log.clear()
    refused(hub, worker.push(runs / "plain", depth_tags=True), "3-layers would be a tag and a branch")


def test_a_branch_is_not_named_like_a_tag(hub, worker, runs):
    assert "oid" in worker.push(runs / "plain", depth_tags=True)
    hub.log.clear()
    refused(hub, worker.push(runs / "plain", revision="3-layers"), "3-layers would be a tag and a branch")


@pytest.mark.parametrize("name", ["a b", "me/two/three", ""])
def test_a_name_that_is_none(hub, worker, runs, name):
    refused(hub, worker.push(runs / "plain", name), f"looking at {name}: ")
    assert hub.log == []


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("hf_wrong", "me/student", "Invalid user token"),
        ("hf_reader", "me/student", "403 Forbidden"),
        (TOKEN, "club/student", "You don't have the rights to create a model under club"),
    ],
)
def test_a_token_without_the_right(hub, worker, runs, token, repo_id, message):
    answer = worker.push(runs / "plain", repo_id, token=token)
    assert message in answer["error"] and hub.repos == {}
    hub.seed(repo_id, {})
    hub.log.clear()
    refused(hub, worker.push(runs / "plain", repo_id, token=token), repo_id)
    assert hub.repos[repo_id].files() == {}


def test_a_fine_grained_token_with_the_right(hub, worker, runs):
    assert "oid" in worker.push(runs / "plain", "student", token="hf_fine")
    assert set(hub.repos) == {"me/student"}  # the token's own namespace


def test_a_repository_that_holds_something_else(hub, worker, runs):
    hub.seed("me/student", {"pytorch_model.bin": b"", "config.json": b"{}"})
    message = "me/student, revision main, holds something else (config.json, pytorch_model.bin, no plan.json)"
    refused(hub, worker.push(runs / "plain"), message, "choose another name")
    assert "oid" in worker.push(runs / "plain", revision="pruned")  # what is there stays, there
    repo = hub.repos["me/student"]
    assert set(repo.files("pruned")) == WHOLE and set(repo.files()) == {"pytorch_model.bin", "config.json"}
    assert "oid" in worker.push(runs / "plain", revision="deep", depth_tags=True)
    assert all(set(repo.files(name)) == WHOLE for name in ("deep", "5-layers", "4-layers", "3-layers"))
    hub.reset()
    hub.seed("me/student", {"README.md": b"# soon", "LICENSE": b""})
    assert "oid" in worker.push(runs / "plain")


def test_what_is_to_be_private_does_not_go_where_everybody_reads(hub, worker, runs):
    hub.seed("me/student", {})
    refused(hub, worker.push(runs / "plain", private=True), "me/student exists and is public")


def test_metadata_the_hub_would_refuse(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: nonsense\n---\n")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) | {"model": str(base)}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    error = worker.push(tmp_path / "run")["error"]
    assert "Invalid metadata in README.md" in error and "license" in error and "\n" not in error
    assert hub.repos["me/student"].files() == {}


def test_a_vocabulary_holds_all_kinds_of_words(hub, worker, runs, tmp_path):
    """`/tmp` is a token of Qwen's vocabulary."""
    shutil.copytree(runs / "plain", tmp_path / "run")
    for name in ("model", "rounds/03"):
        path = tmp_path / "run" / name / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"][str(tmp_path / "run")] = 257
        path.write_text(json.dumps(tokenizer))
    assert "oid" in worker.push(tmp_path / "run")
    assert str(tmp_path).encode() in hub.repos["me/student"].files()["tokenizer.json"]


def test_local_names_are_known_as_local_wherever_the_push_is_made(hub, worker, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "tiny-model", tmp_path / "checkpoints" / "acme-secret")
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    shutil.copy(runs / "diary.txt", tmp_path / "clients" / "acme")
    names = ["--model", "checkpoints/acme-secret", "--dataset", "clients/acme", "--max_length", "32"]
    quick = ["--pairs", "2,3", "--num_samples", "2", "--num_eval_samples", "2", "--measure_speed", "false"]
    assert cli.main(["parallelize", *names, "--output_dir", "run", *quick]) == 0
    assert "oid" in worker.push(tmp_path / "run")  # the worker lives in another folder
    files = hub.repos["me/student"].files()
    card, recipe = files["README.md"].decode(), yaml.safe_load(files["recipe.yaml"])
    assert recipe["model"] == "acme-secret" and recipe["dataset"] == "acme" and "license: mit" in card
    assert "base_model" not in card and "datasets:" not in card and "checkpoints" not in card
    assert "Text: measured on held-out rows of `acme`." in card
    (tmp_path / "user" / "model").mkdir(parents=True)  # a folder that is called what something on the Hub is called
    assert hub_id("user/model") == "user/model" and absolute_if_local("user/model") == str(tmp_path / "user" / "model")


def test_of_rounds_of_one_depth_the_last_has_the_tag(hub, worker, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    report = json.loads((run / "report.json").read_text())
    student = prune(load_run_model(run / "rounds" / "01"), [plan_layer(report)])
    third = report["rounds"][1] | {"number": 3, "plan": student.config.layer_plan}
    report["rounds"] = [*report["rounds"][:2], third, report["rounds"][2] | {"number": 4}]
    (run / "report.json").write_text(json.dumps(report))
    (run / "rounds" / "03").rename(run / "rounds" / "04")
    shutil.copytree(run / "rounds" / "02", run / "rounds" / "03")
    student.save_pretrained(run / "rounds" / "03")
    worker.push(run, depth_tags=True)
    repo = hub.repos["me/student"]
    assert set(repo.tags) == {"5-layers", "4-layers", "3-layers"}
    assert json.loads(repo.files("4-layers")["plan.json"]) == student.config.layer_plan
    assert main_card(repo).count("[4-layers]") == 1


def load_run_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def plan_layer(report):
    """A layer that round 2 left in."""
    first, second = (report["rounds"][n]["plan"]["blocks"] for n in (0, 1))
    return next(block[0] for block in first if block in second)


def test_folders_that_hold_no_finished_run(hub, worker, runs, tmp_path):
    refused(hub, worker.push(tmp_path), "holds no finished run")
    refused(hub, worker.push(tmp_path / "nowhere"), "is not a folder")
    for number in (0, 4):
        refused(hub, worker.push(runs / "plain", round=number), f"round={number} but the run has rounds 1..3")
    shutil.copytree(runs / "plain", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "rounds" / "01")
    refused(hub, worker.push(tmp_path / "cut", round=1), "no longer holds the student of round 1")
    (tmp_path / "cut" / "report.json").write_text("[" * 100_000)
    refused(hub, worker.push(tmp_path / "cut", round=1), "cut/report.json: ")


def test_what_would_leak_is_refused(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    for text, what in (("hf_" + "a" * 30, "an access token"), (f"see {tmp_path}/run/x", "the local path")):
        (tmp_path / "run" / "recipe.yaml").write_text(recipe + f"optim_args: {text}\n")
        refused(hub, worker.push(tmp_path / "run"), f"recipe.yaml holds {what}")


def test_no_token(hub, worker, runs):
    status, _, err = worker.run("push", runs / "plain", "--repo_id", "me/student", without_token=True)
    assert status == 2 and hub.log == []
    assert err.startswith("hf-layerprune: looking at me/student: Token is required") and "hf auth login" in err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which run, and where to?"),
        (["{run}"], "--repo_id user/name"),
        (["{run}", "{run}", "--repo_id", "me/x"], "unknown setting"),
        (["{run}", "--repo_id", "a b"], "looking at a b: Repo id must"),
        (["{run}", "--repo_id", "me/x", "--base_model", "./model"], "base_model='./model'"),
        (["{run}", "--repo_id", "me/x", "--rounds", "1"], "--rounds"),
        (["{run}", "--repo_id", "me/x", "--round", "99"], "round=99"),
    ],
)
def test_bad_input_of_the_verb_is_one_line_and_exit_status_2(runs, capsys, words, message):
    assert cli.main(["push", *(word.format(run=runs / "plain") for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and message in error


def test_offline(runs, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["push", str(runs / "plain"), "--repo_id", "me/x"]) == 2
    assert "unset the `HF_HUB_OFFLINE`" in capsys.readouterr().err


# -- what goes wrong on the way --------------------------------------------------------------------------------------


DEEP = {"round": 2, "depth_tags": True, "revision": "deep"}


@pytest.mark.parametrize(
    "kind, path",
    [
        ("503", "/commit/"),
        ("cut answer", "/commit/"),
        ("cut answer", "POST .*/branch/"),
        ("cut", "POST .*/tag/"),
        ("cut answer", "DELETE .*/tag/"),
    ],
)
def test_after_a_fault_a_second_push_completes(hub, worker, runs, kind, path):
    if path.startswith("DELETE"):
        worker.push(runs / "plain", **DEEP)
    hub.faults.append(Fault(kind, path=path, times=10_000))
    error = worker.push(runs / "plain", **DEEP, tags=["again"])["error"]
    assert "\n" not in error and "me/student: " in error
    hub.faults.clear()
    assert "oid" in worker.push(runs / "plain", **DEEP, tags=["again"])
    repo = hub.repos["me/student"]
    assert set(repo.branches) == {"main", "deep"} and set(repo.tags) == {"5-layers", "4-layers"}
    for name in ("deep", "5-layers", "4-layers"):
        assert set(repo.files(name)) == WHOLE and "- again" in repo.files(name)["README.md"].decode()
    assert repo.tags["4-layers"] == repo.branches["deep"]
    assert all(files in (None, frozenset(), frozenset(WHOLE)) for _, files in repo.shown)  # never half a student


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("404 Error. (Request ID: Root=1-2;3)\n\nNot Found.\nSee x"), "404 Error. Not Found. See x"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_an_error_of_the_client_is_one_line(error, message):
    client = {"__name__": "huggingface_hub.lfs"}
    exec("def call(error): raise error", client)
    with pytest.raises(LayerPruneError, match=f"^asking: {message}$"), hub_errors("asking"):
        client["call"](error)


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), LayerPruneError("x")])
def test_a_bug_of_ours_is_not_blamed_on_the_hub(error):
    with pytest.raises(type(error), match=f"^{error}$"), hub_errors("asking"):
        raise error


# -- what was put there by somebody else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"rounds": []}', "without a finished round"),
        (b"NaN", "the run=nan must be an object"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (("edits", ["x"]), "must be a label"),
        (None, "it has no report.json"),
    ],
)
def test_a_pulled_report_is_outside_input(hub, worker, runs, content, message):
    worker.push(runs / "plain")
    files = hub.repos["me/student"].files()
    if isinstance(content, tuple):
        report = json.loads(files["report.json"])
        report["rounds"][0][content[0]] = content[1]
        content = json.dumps(report).encode()
    files = {name: files[name] for name in files if name != "report.json"}
    hub.seed("me/other", files if content is None else files | {"report.json": content})
    error = worker("load", name="me/other")["error"]
    assert message in error and "\n" not in error and len(error) < 600
    assert "snapshots" not in error  # where it lies in the cache helps nobody


def test_a_private_student_is_read_with_its_token(hub, worker, runs):
    worker.push(runs / "plain", "me/secret", private=True)
    refusal = worker("load", name="me/secret", without_token=True)["error"]
    assert "Repository Not Found" in refusal and "private" in refusal
    assert worker("load", name="me/secret", token=TOKEN, without_token=True)["revision"]


def test_errors_of_a_pull_speak_of_a_pull(hub, worker, runs):
    worker.push(runs / "plain")
    for kind, said in (("503", "503 Service Unavailable"), ("cut", "disconnected")):
        hub.faults = [Fault(kind, path="me/student", times=10_000)]
        error = worker("load", name="me/student", revision=kind * 9)["error"]
        assert said in error and error.startswith("reading me/student: ") and "\n" not in error
    hub.faults.clear()
    hub.repos["me/student"].gated = True
    error = worker("load", name="me/student@unread")["error"]
    assert "Cannot access gated repo" in error
    with pytest.raises(LayerPruneError, match="HF_HUB_OFFLINE"):
        load_run("me/never-read")
    with pytest.raises(LayerPruneError, match="me/x@a names another revision than revision='b'"):
        load_run("me/x@a", revision="b")


def test_a_student_that_is_nowhere(worker):
    assert "Repository Not Found" in worker("load", name="me/nothing")["error"]


def test_code_beside_the_weights_is_not_run(hub, worker, runs, tmp_path):
    worker.push(runs / "paired")
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')\n".encode()
    hub.seed("me/student", dict.fromkeys(CODE, trap))
    quick = ["--dataset", runs / "diary.txt", "--max_length", 32, "--num_samples", 2]
    status, _, err = worker.run("evaluate", "--model", "me/student", *quick)
    assert status == 0, err
    assert not (tmp_path / "trap").exists()
