"""Push and pull against a Hub on loopback, by the unmodified client, with everything that can go wrong on the way."""

import copy
import json
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from hub_client import TOKEN, USER, Worker, environment
from hub_server import Fault, HubServer
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, cli, load_run, prune
from hf_layerprune.cli.parsing import parse
from hf_layerprune.hub.scrub import hub_id, placed

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


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def lfs_hub():
    with HubServer(lfs_suffixes=(".safetensors",)) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(request):
    for name in {"hub", "lfs_hub"} & set(request.fixturenames):
        request.getfixturevalue(name).reset()


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """A client with its default way to upload."""
    with Worker(hub, tmp_path_factory.mktemp("cache")) as process:
        yield process


@pytest.fixture(scope="module")
def lfs_worker(lfs_hub, tmp_path_factory):
    """A client that sends large files by LFS."""
    with Worker(lfs_hub, tmp_path_factory.mktemp("cache"), HF_HUB_DISABLE_XET="1") as process:
        yield process


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
    answer = worker.push(runs / "plain")
    assert set(repo.files()) == WHOLE | set(own)  # what a push did not bring stays
    assert "me/student is there already; its branch main holds a student" in answer["messages"][0]


def test_the_recipe_is_one(hub, worker, runs):
    worker.push(runs / "plain", round="01")
    worker.push(runs / "paired", "me/paired")
    one, other = (yaml.safe_load(hub.repos[name].files()["recipe.yaml"]) for name in ("me/student", "me/paired"))
    assert one["model"] == "tiny-model" and one["dataset"] == "diary.txt" and one["target_num_layers"] == 5
    assert other["pairs"] == ["2,3"] and other["output_dir"] == "paired"
    for recipe, verb in ((one, "compress"), (other, "parallelize")):
        path = runs / "recipe-from-the-hub.yaml"
        path.write_text(yaml.safe_dump(recipe))
        parse(verb, ["--config", str(path)])


def test_a_round(hub, worker, runs):
    worker.push(runs / "plain", round="02", revision="experiments/two")
    repo = hub.repos["me/student"]
    files = repo.files("experiments/two")
    report = json.loads(files["report.json"])
    assert [record["num_layers"] for record in report["rounds"]] == [5, 4]
    assert json.loads(files["config.json"])["num_hidden_layers"] == 4
    assert repo.files() == {} and set(repo.branches) == {"main", "experiments/two"}


def test_a_tag_for_every_depth(hub, worker, runs):
    worker.push(runs / "plain", depth_tags=True)
    repo = hub.repos["me/student"]
    assert set(repo.tags) == {"5-layers", "4-layers", "3-layers"} and set(repo.branches) == {"main"}
    for depth in (5, 4, 3):
        files = repo.files(f"{depth}-layers")
        assert set(files) == WHOLE and json.loads(files["config.json"])["num_hidden_layers"] == depth
    assert repo.tags["3-layers"] == repo.branches["main"] and "5-layers" in repo.files()["README.md"].decode()
    before = dict(repo.tags)
    worker.push(runs / "plain", depth_tags=True)
    assert repo.titles("4-layers") == ["4 layers of tiny-model"]
    assert repo.tags == before and repo.titles() == ["3 layers of tiny-model"]  # nothing new, so no new commit
    worker.push(runs / "plain", depth_tags=True, tags=["better"])
    assert all(repo.tags[tag] != before[tag] for tag in before) and set(repo.branches) == {"main"}
    card = repo.files("4-layers")["README.md"].decode()
    assert "better" in card and 'from_pretrained("me/student", revision="4-layers")' in card
    assert "vllm serve me/student --revision 4-layers" in card and "vllm serve me/student\n" in main_card(repo)


def main_card(repo):
    return repo.files()["README.md"].decode()


@pytest.mark.parametrize("part_size", [None, 20_000])
def test_large_files_by_lfs(lfs_hub, lfs_worker, runs, part_size):
    lfs_hub.part_size = part_size
    lfs_hub.store.clear()
    assert "oid" in lfs_worker.push(runs / "plain")
    repo = lfs_hub.repos["me/student"]
    assert repo.commits[repo.branches["main"]].tree["model.safetensors"].lfs
    assert repo.files()["model.safetensors"] == (runs / "plain" / "model" / "model.safetensors").read_bytes()
    lfs_hub.log.clear()
    lfs_worker.push(runs / "plain", tags=["again"])
    assert not any("PUT" in line for line in lfs_hub.log)  # what is there is not sent twice


def test_without_xet_and_lfs_as_well(lfs_hub, lfs_worker, runs):
    lfs_hub.lfs_suffixes = ()
    try:
        assert "oid" in lfs_worker.push(runs / "plain")
        assert set(lfs_hub.repos["me/student"].files()) == WHOLE
    finally:
        lfs_hub.lfs_suffixes = (".safetensors",)


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
    hub.reset()
    next(student.glob("*.safetensors")).unlink()
    refused(hub, worker.push(tmp_path / "run"), "no whole student", ".safetensors is missing")


def test_a_private_repository(hub, worker, runs):
    status, out, err = worker.run("push", runs / "plain", "--repo_id", "me/secret", "--private")
    assert "Text: scored on `diary.txt`, healed on `diary.txt`, measured on rows of it that were held out." in (
        main_card(hub.repos["me/secret"])
    )
    assert status == 0 and hub.repos["me/secret"].private and f"{hub.endpoint}/me/secret/commit/" in out
    assert "pushing 3 layers to me/secret" in err


def test_the_verb_takes_its_words_in_any_order(hub, worker, runs):
    extra = ["--private", runs / "plain", "--round", "01", "--repo_id", "team/shared", "--depth_tags", "true"]
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
    assert (
        "may only read" in wrong["error"] and not (tmp_path / "run" / "rounds").exists()
    )  # before anything is trained
    more = {"save_steps": 1, "hub_private_repo": True, "hub_revision": "side"}
    assert "oid" in worker("train", output_dir=str(tmp_path / "run"), **more, **options)
    repo = hub.repos["me/trained"]
    assert repo.titles("side") == ["Again", "5 layers of tiny-model"] and repo.private and repo.files() == {}
    files = repo.files("side")
    assert set(files) == WHOLE and str(tmp_path) not in files["recipe.yaml"].decode()
    card, recipe = files["README.md"].decode(), yaml.safe_load(files["recipe.yaml"])
    assert "- mine\n" in card and "- user/books\n" in card and "--dataset TEXT" in card
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parse("compress", ["--config", str(path)])
    assert recipe["model"] == "tiny-model" and recipe["target_num_layers"] == 5


# -- what comes back -------------------------------------------------------------------------------------------------

STRANGER = """
import importlib.util, json, sys
sys.path += {paths}
assert importlib.util.find_spec("hf_layerprune") is None or sys.modules.setdefault("hf_layerprune", None) is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code={trust}, revision="{revision}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", revision="{revision}")
ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save((type(model).__name__, ids, model(ids).logits), "{out}")
"""


@pytest.mark.parametrize("name, kind", [("plain", "Qwen2ForCausalLM"), ("paired", "PrunedQwen2ForCausalLM")])
def test_a_stranger_computes_the_same_to_the_bit(hub, worker, runs, tmp_path, name, kind):
    worker.push(runs / name)
    paths = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    fields = {"paths": paths, "repo_id": "me/student", "trust": name == "paired", "out": tmp_path / "out.pt"}
    script = STRANGER.format(**fields, revision="main")
    command = [sys.executable, "-I", "-S", "-c", script]  # without site-packages' path files, so without the package
    env = environment(hub, tmp_path / "empty") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded, ids, logits = torch.load(tmp_path / "out.pt")
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
from conftest import embedded_dataset, tiny_config
from hf_layerprune import IterativeLayerDistillTrainer
args = tiny_config({folder!r}, target_num_layers=2, model_init_kwargs={{"revision": "side"}})
texts = embedded_dataset("calibration").select(range(12))
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
    assert report["teacher"]["num_layers"] == 6 and report["teacher"]["name"] == "tiny-model"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["teacher"] == str(teacher)
    assert worker.push(out, "me/deeper")["oid"]
    card = hub.repos["me/deeper"].files()["README.md"].decode()
    assert "base_model: me/student\n" in card and "base_model_relation: finetune" in card and "license: mit" in card
    assert "Removed before this run: " in card
    origin = "[me/student@4-layers](https://huggingface.co/me/student/tree/4-layers)"
    assert f"made from {origin} (4 layers): 1 layer left out, healed by distillation." in card
    assert "It holds 3 of the 6 layers of the original." in card and "benchmark tiny-model me/deeper" in card


def test_the_model_comes_with_its_plan(hub, worker, runs):
    worker.push(runs / "paired")
    assert worker("load", name="me/student", model=True)["kind"] == "PrunedQwen2ForCausalLM"
    config = json.loads(hub.repos["me/student"].files()["config.json"])
    config["layer_plan"] = {"num_teacher_layers": 6, "blocks": [[0], [1], [2, 4], [3], [5]]}
    hub.seed("me/student", {"config.json": json.dumps(config).encode()})
    assert "must ascend" in worker("load", name="me/student", model=True)["error"]


def test_a_run_on_this_machine(runs, tmp_path):
    run = load_run(runs / "paired")
    assert run.revision is None and run.plan.parallel_pairs == ((2, 3),) and run.load_tokenizer()("a")
    assert run.load_model().config.layer_plan == run.plan.to_dict()
    with pytest.raises(LayerPruneError, match=r"holds no finished run: it has no plan\.json and no report\.json"):
        load_run(tmp_path)
    for name in ("plan.json", "report.json"):
        shutil.copy(runs / "plain" / name, tmp_path)
    shutil.copy(runs / "paired" / "plan.json", tmp_path)
    with pytest.raises(LayerPruneError, match="has another plan than"):
        load_run(tmp_path)


# -- what is refused before anything is sent -------------------------------------------------------------------------


def refused(hub, answer, *parts):
    assert all(part in answer["error"] for part in parts), answer
    assert "\n" not in answer["error"] and TOKEN not in answer["error"]
    assert not any(word in line for line in hub.log for word in ("POST", "PUT", "DELETE")), hub.log


@pytest.mark.parametrize("name", ["a b", "me/two/three", "-x", "me/" + "x" * 100, "", "me/dot..dot", "../etc"])
def test_a_name_that_is_none(hub, worker, runs, name):
    refused(hub, worker.push(runs / "plain", name), "is no name of a repository", "give user/name")
    assert hub.log == []


@pytest.mark.parametrize("revision", ["a b", "refs/heads/x", "../x", "0" * 40, "a..b", ""])
def test_a_revision_that_is_none(hub, worker, runs, revision):
    refused(hub, worker.push(runs / "plain", revision=revision), "is no name of a branch")


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("hf_wrong", "me/student", "the Hub refuses the token (401)"),
        ("hf_reader", "me/student", "may only read"),
        ("hf_coarse", "me/student", "fine-grained token for the Hub may not write to me/student"),
        (TOKEN, "google/student", "the token is me's, who cannot write to google/student; push to me/student"),
        (TOKEN, "club/student", "me may only read in club"),
    ],
)
def test_a_token_without_the_right(hub, worker, runs, token, repo_id, message):
    refused(hub, worker.push(runs / "plain", repo_id, token=token), message)


def test_a_fine_grained_token_with_the_right(hub, worker, runs):
    assert "oid" in worker.push(runs / "plain", "student", token="hf_fine")
    assert set(hub.repos) == {"me/student"}  # the token's own namespace


def test_a_repository_that_holds_something_else(hub, worker, runs):
    hub.seed("me/student", {"pytorch_model.bin": b"", "config.json": b"{}"})
    message = "me/student exists and its revision main holds something else (config.json, pytorch_model.bin"
    refused(hub, worker.push(runs / "plain"), message, "choose another name")
    assert "oid" in worker.push(runs / "plain", revision="pruned")  # what is there stays, there
    repo = hub.repos["me/student"]
    assert set(repo.files("pruned")) == WHOLE and set(repo.files()) == {"pytorch_model.bin", "config.json"}
    assert "oid" in worker.push(runs / "plain", revision="deep", depth_tags=True)
    assert all(set(repo.files(name)) == WHOLE for name in ("deep", "5-layers", "4-layers", "3-layers"))
    hub.reset()
    hub.seed("me/student", {"README.md": b"# soon", "LICENSE": b""})
    assert "oid" in worker.push(runs / "plain")


def test_branches_of_the_users_own_are_left_alone(hub, worker, runs):
    hub.seed("me/student", {})
    repo = hub.seed("me/student", {"experiment.txt": b"mine"}, branch="staging-prod")
    assert "oid" in worker.push(runs / "plain", revision="prod")
    assert set(repo.files("staging-prod")) == {"experiment.txt"} and set(repo.files("prod")) == WHOLE
    hub.seed("me/student", {"experiment.txt": b"mine"}, branch="hf-layerprune-staging-next")
    hub.log.clear()
    message = "its revision hf-layerprune-staging-next holds something else (experiment.txt"
    refused(hub, worker.push(runs / "plain", revision="next"), message)


def test_what_is_to_be_private_does_not_go_where_everybody_reads(hub, worker, runs):
    hub.seed("me/student", {})
    refused(hub, worker.push(runs / "plain", private=True), "me/student exists and is public")


def test_a_student_that_is_damaged(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    for student in (tmp_path / "run" / "rounds" / "03", tmp_path / "run" / "model"):
        weights = (student / "model.safetensors").read_bytes()
        (student / "model.safetensors").write_bytes(weights[:-100])
    refused(hub, worker.push(tmp_path / "run"), "no whole student: model.safetensors is damaged")


def test_metadata_the_hub_would_refuse(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: nonsense\n---\n")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) | {"model": str(base)}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    error = worker.push(tmp_path / "run")["error"]
    assert error.startswith("checking the card of me/student") and "license" in error and "\n" not in error
    assert hub.repos == {}  # not even an empty repository


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
    assert hub_id("user/model") == "user/model" and placed("user/model") == str(tmp_path / "user" / "model")


def test_of_rounds_of_one_depth_the_last_has_the_tag(hub, worker, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    report = json.loads((run / "report.json").read_text())
    student = prune(load_run_model(run / "rounds" / "01"), [plan_layer(report)])
    third = report["rounds"][1] | {"round": 3, "plan": student.config.layer_plan}
    report["rounds"] = [*report["rounds"][:2], third, report["rounds"][2] | {"round": 4}]
    (run / "report.json").write_text(json.dumps(report))
    (run / "rounds" / "03").rename(run / "rounds" / "04")
    shutil.copytree(run / "rounds" / "02", run / "rounds" / "03")
    student.save_pretrained(run / "rounds" / "03")
    worker.push(run, depth_tags=True)
    repo = hub.repos["me/student"]
    assert set(repo.tags) == {"5-layers", "4-layers", "3-layers"}
    assert json.loads(repo.files("4-layers")["plan.json"]) == student.config.layer_plan
    assert main_card(repo).count('"4-layers"') == 1


def load_run_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def plan_layer(report):
    """A layer that round 2 left in."""
    first, second = (report["rounds"][n]["plan"]["blocks"] for n in (0, 1))
    return next(block[0] for block in first if block in second)


def test_a_tag_that_is_a_branch_and_the_other_way_round(hub, worker, runs):
    repo = hub.seed("me/student", {})
    repo.tags["v1"] = repo.branches["4-layers"] = repo.branches["main"]
    refused(hub, worker.push(runs / "plain", revision="v1"), "'v1' is a tag")
    refused(hub, worker.push(runs / "plain", depth_tags=True), "has a branch '4-layers'")


def test_folders_that_hold_no_finished_run(hub, worker, runs, tmp_path):
    refused(hub, worker.push(tmp_path), "holds no finished run")
    refused(hub, worker.push(tmp_path / "nowhere"), "holds no finished run")
    for number in ("0", "04", "x", "-1"):
        refused(hub, worker.push(runs / "plain", round=number), f"round={number} but", "1..3")
    shutil.copytree(runs / "plain", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    refused(hub, worker.push(tmp_path / "cut"), "is not finished", "name a finished round")
    (tmp_path / "cut" / "rounds" / "02" / "tokenizer.json").unlink()
    refused(hub, worker.push(tmp_path / "cut", round=2), "no whole student: tokenizer.json")
    shutil.rmtree(tmp_path / "cut" / "rounds" / "01")
    refused(hub, worker.push(tmp_path / "cut", round=1), "no longer holds the student of round 1")
    (tmp_path / "cut" / "report.json").write_text("[" * 100_000)
    refused(hub, worker.push(tmp_path / "cut", round=1), "report.json is not JSON")


def test_what_would_leak_is_refused(hub, worker, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    for text, what in (("hf_" + "a" * 30, "an access token"), (f"see {tmp_path}/run/x", "the local path")):
        (tmp_path / "run" / "recipe.yaml").write_text(recipe + f"optim_args: {text}\n")
        refused(hub, worker.push(tmp_path / "run"), f"recipe.yaml holds {what}")


def test_no_token(hub, worker, runs):
    status, _, err = worker.run("push", runs / "plain", "--repo_id", "me/student", without_token=True)
    assert status == 2 and hub.log == []
    assert err == "hf-layerprune: no token for the Hub; set HF_TOKEN or log in with `hf auth login`\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which run?"),
        (["{run}"], "--repo_id user/name"),
        (["{run}", "{run}", "--repo_id", "me/x"], "are 2 words where one goes"),
        (["{run}", "--output_dir", "{run}", "--repo_id", "me/x"], "named twice"),
        (["{run}", "--repo_id", "a b"], "no name of a repository"),
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
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


# -- what goes wrong on the way --------------------------------------------------------------------------------------


def never_half_made(repo):
    """Every branch and tag always showed a whole student or none; only tags that moved were gone for a moment."""
    for name, files in repo.shown:
        assert files in (frozenset(), frozenset(WHOLE)) or (files is None and name not in ("main", "deep")), name
    gone = {name for name, files in repo.shown if files is None and "staging" not in name}
    assert gone <= set(repo.tags)


DEEP = {"round": 2, "depth_tags": True, "revision": "deep"}


def all_there(repo, rounds=2):
    tags = ["5-layers", "4-layers"][:rounds]
    assert all(set(repo.files(name)) == WHOLE for name in ("deep", *tags)) and set(repo.tags) == set(tags)
    assert set(repo.branches) == {"main", "deep"} and repo.tags[tags[-1]] == repo.branches["deep"]
    never_half_made(repo)


@pytest.mark.parametrize("kind", ["503", "cut", "cut body", "cut answer"])
@pytest.mark.parametrize("client", ["default", "lfs"])
def test_a_fault_at_every_request_in_turn(request, runs, kind, client):
    server, process = (request.getfixturevalue(f"lfs_{n}" if client == "lfs" else n) for n in ("hub", "worker"))
    server.reset()
    server.part_size, options = 30_000, DEEP if client == "default" else DEEP | {"round": 1}
    process.push(runs / "plain", **options)
    for number in range(len(server.log)):
        server.reset()
        server.store.clear()
        server.parts.clear()
        server.faults.append(Fault(kind, at=number))
        answer = process.push(runs / "plain", **options)
        assert "oid" in answer, (number, server.log[number], answer)
        all_there(server.repos["me/student"], options["round"])
        assert len(server.repos["me/student"].titles("deep")) == 1


@pytest.mark.parametrize("kind", ["503", "cut answer"])
def test_a_fault_at_every_request_that_replaces_a_push(hub, worker, runs, kind):
    worker.push(runs / "plain", **DEEP)
    before = copy.deepcopy(hub.repos)
    hub.log.clear()
    worker.push(runs / "plain", **DEEP, tags=["again"])
    for number in range(len(hub.log)):
        hub.reset()
        hub.repos.update(copy.deepcopy(before))
        hub.faults.append(Fault(kind, at=number))
        answer = worker.push(runs / "plain", **DEEP, tags=["again"])
        assert "oid" in answer, (number, hub.log[number], answer)
        repo = hub.repos["me/student"]
        all_there(repo)
        assert all("- again" in repo.files(tag)["README.md"].decode() for tag in ("4-layers", "5-layers"))
        assert repo.titles("deep") == ["4 layers of tiny-model"] * 2


LASTING = [
    ("default", path)
    for path in ("whoami", "create", "validate", "refs", "tree", "revision", "preupload", "/commit/", "POST .*/tag/",
                 "POST .*/branch/", "DELETE")
] + [("lfs", "objects/batch"), ("lfs", "PUT /lfs/")]  # fmt: skip


@pytest.mark.parametrize("kind", ["503", "cut", "cut answer"])
@pytest.mark.parametrize("client, path", LASTING)
def test_a_fault_that_stays_is_one_line_and_a_second_push_completes(request, runs, kind, client, path):
    server, process = (request.getfixturevalue(f"lfs_{n}" if client == "lfs" else n) for n in ("hub", "worker"))
    server.reset()
    server.part_size, options = None, {"depth_tags": True, "round": 2}
    server.store.clear()
    server.seed("me/student", {})
    server.repos["me/student"].shown.clear()
    server.faults.append(Fault(kind, path=path, times=10_000))
    if path == "create":
        server.repos.clear()
    answer = process.push(runs / "plain", **options)
    if kind != "cut answer" or "error" in answer:  # else it is there, as the next attempt finds
        error = answer["error"]
        assert "\n" not in error and "push again" in error
        assert "503" in error or "the connection to the Hub was lost" in error
    for repo in server.repos.values():
        never_half_made(repo)
    server.faults.clear()
    assert "oid" in process.push(runs / "plain", **options)
    repo = server.repos["me/student"]
    assert set(repo.files()) == set(repo.files("5-layers")) == WHOLE and set(repo.branches) == {"main"}
    assert repo.tags["4-layers"] == repo.branches["main"]
    never_half_made(repo)


def test_a_pull_waits_no_longer_than_the_client_is_told_to(hub, worker, runs, tmp_path):
    worker.push(runs / "plain")
    hub.delay, hub.faults = 3.0, [Fault("slow", path="resolve", times=1)]
    hub.log.clear()
    with Worker(hub, tmp_path, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1") as hasty:
        assert "plan" in hasty("load", name="me/student")
        assert sum("plan.json" in line for line in hub.log) > 2  # asked once more, then read


def test_a_move_that_stopped_halfway_is_completed(hub, worker, runs):
    worker.push(runs / "plain", **DEEP)
    hub.faults.append(Fault("503", path="POST .*/tag/", times=10_000))
    assert "tagging 5-layers" in worker.push(runs / "plain", **DEEP, tags=["again"])["error"]
    repo = hub.repos["me/student"]
    assert "5-layers" not in repo.tags  # the Hub cannot move a tag in one step
    hub.faults.clear()
    assert "oid" in worker.push(runs / "plain", **DEEP, tags=["again"])
    all_there(repo)
    assert "- again" in repo.files("5-layers")["README.md"].decode()


def test_a_tag_that_appeared_meanwhile_is_moved(hub, worker, runs):
    """What `check_target` saw is old by then."""
    worker.push(runs / "plain", "me/other", round=1)
    repo = hub.seed("me/student", {})
    point = repo.point

    def tag_behind_the_back(refs, name, oid):
        point(refs, name, oid)
        if name.endswith("5-layers") and name not in repo.tags:
            repo.tags["5-layers"] = next(iter(repo.commits))

    repo.point = tag_behind_the_back
    assert "oid" in worker.push(runs / "plain", **DEEP)
    all_there(repo)


# -- what was put there by somebody else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("plan.json", b'{"num_teacher_layers": 999999999999, "blocks": [[0]]}', "at most 10000"),
        ("plan.json", b'{"num_teacher_layers": true, "blocks": [[0]]}', "integer"),
        ("plan.json", b'{"num_teacher_layers": 1, "blocks": [[0]], "blocks": [[0]]}', "twice"),
        ("plan.json", b'{"num_teacher_layers": 2, "blocks": ["/etc/passwd"]}', "integers"),
        ("plan.json", b"[" * 900_000, "not JSON"),
        ("plan.json", b" " * 1_000_001, "1,000,001 bytes"),
        ("plan.json", b"\xff\xfe", "no text"),
        ("plan.json", None, "holds no plan.json"),
        ("report.json", b'{"rounds": []}', "teacher"),
        ("report.json", b"NaN", "a report is"),
        ("report.json", ("perplexity", 10**400), "which is no number"),
        ("report.json", ("num_layers", 10**400), "which is no depth"),
        ("report.json", ("decode_ratio", "fast"), "which is no number"),
        ("report.json", None, "holds no report.json"),
    ],
)
def test_a_pulled_plan_and_report_are_outside_input(hub, worker, runs, name, content, message):
    worker.push(runs / "plain")
    repo = hub.repos["me/student"]
    if isinstance(content, tuple):
        report = json.loads(repo.files()[name])
        report["rounds"][0][content[0]] = content[1]
        content = json.dumps(report).encode()
    if content is None:
        del repo.commits[repo.branches["main"]].tree[name]
    else:
        hub.seed("me/student", {name: content})
    error = worker("load", name="me/student")["error"]
    assert message in error and "\n" not in error and len(error) < 600
    assert "snapshots" not in error  # where it lies in the cache helps nobody


def test_a_private_student_is_read_with_its_token(hub, worker, runs):
    worker.push(runs / "plain", "me/secret", private=True)
    refusal = worker("load", name="me/secret", without_token=True)["error"]
    assert "private and the token in use may not see it" in refusal
    pulled = worker("load", name="me/secret", token=TOKEN, model=True, without_token=True)
    assert pulled["kind"] == "Qwen2ForCausalLM" and TOKEN not in pulled["shown"]


def test_errors_of_a_pull_speak_of_a_pull(hub, worker, runs):
    worker.push(runs / "plain")
    for kind, said in (("503", "the Hub answered 503"), ("cut", "the connection to the Hub was lost")):
        hub.faults = [Fault(kind, path="resolve", times=10_000)]
        error = worker("load", name="me/student", revision=kind * 9)["error"]
        assert said in error and error.endswith("try again in a moment") and "push" not in error
    hub.faults.clear()
    hub.repos["me/student"].gated = True
    error = worker("load", name="me/student@unread")["error"]
    assert "access to it is granted by its owners" in error and "write access" not in error
    with pytest.raises(LayerPruneError, match="HF_HUB_OFFLINE is set and the file was not read before"):
        load_run("me/never-read")
    with pytest.raises(LayerPruneError, match="me/x@a names another revision than revision='b'"):
        load_run("me/x@a", revision="b")


def test_a_student_that_is_nowhere(worker):
    assert "there is no such repository" in worker("load", name="me/nothing")["error"]


def test_code_beside_the_weights_is_not_run(hub, worker, runs, tmp_path):
    worker.push(runs / "paired")
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')\n".encode()
    hub.seed("me/student", dict.fromkeys(CODE, trap))
    quick = ["--dataset", runs / "diary.txt", "--max_length", 32, "--num_samples", 2]
    status, _, err = worker.run("evaluate", "--model", "me/student", *quick)
    assert status == 0, err
    assert not (tmp_path / "trap").exists()
