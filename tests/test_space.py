"""The Space: its files in the repository, and `push-space` against a Hub on loopback."""

from pathlib import Path

import pytest
import yaml

from hf_layerprune.demo import read_settings, settings_of
from hf_layerprune.demo.space import write_space

SPACE = Path(__file__).parent.parent / "space"
FILES = {"app.py", "README.md", "requirements.txt", "models.yaml", "thumbnail.png"}


def front_matter(text):
    return yaml.safe_load(text.split("---")[1])


def test_the_space_in_the_repository_is_what_the_package_writes(tmp_path):
    write_space(tmp_path, read_settings(SPACE / "models.yaml"), "user/layer-comparison")
    assert (
        {path.name for path in tmp_path.iterdir()}
        == FILES
        == {path.name for path in SPACE.iterdir() if path.is_file()}
    )
    for name in FILES:
        assert (SPACE / name).read_bytes() == (tmp_path / name).read_bytes(), f"space/{name} is out of date"


def test_its_front_matter_is_complete_and_its_list_is_read():
    told = front_matter((SPACE / "README.md").read_text())
    needed = {
        "title",
        "emoji",
        "colorFrom",
        "colorTo",
        "sdk",
        "sdk_version",
        "app_file",
        "license",
        "short_description",
        "thumbnail",
    }
    assert needed <= set(told) and told["sdk"] == "gradio" and told["sdk_version"].startswith("6.")
    assert len(told["short_description"]) <= 60
    assert (SPACE / told["app_file"]).is_file()
    real, embedded = read_settings(SPACE / "models.yaml").models
    assert [embedded] == settings_of([]).models
    assert told["models"] == told["preload_from_hub"] == [real.run, real.teacher]
    assert (SPACE / "requirements.txt").read_text().startswith("hf-layerprune[demo]")
    assert len((SPACE / "app.py").read_text().splitlines()) < 15


@pytest.fixture
def pushed(hub, demo_folder):
    """A student on the Hub, made from a model that is there too, with a tag of another depth."""
    hub.reset()
    folder = demo_folder / "text"
    run = folder / "run"
    report = (run / "report.json").read_text().replace('"name": "teacher"', '"name": "me/teacher"')
    for name, model in (("me/teacher", folder / "teacher"), ("me/student", run / "model")):
        hub.seed(name, {path.name: path.read_bytes() for path in model.iterdir()})
    files = {"plan.json": (run / "plan.json").read_bytes(), "report.json": report.encode()}
    repo = hub.seed("me/student", files)
    depth_4 = run / "rounds" / "02"
    hub.seed("me/student", {path.name: path.read_bytes() for path in depth_4.iterdir()}, branch="other")
    repo.tags["4-layers"] = repo.branches["other"]
    return "me/student"


def test_a_space_is_made_and_updated_in_one_commit_each(hub, worker, pushed):
    status, out, err = worker.run(
        "push-space", pushed, "--repo_id", "me/space", "--private", "--hardware", "zero-a10g"
    )
    assert status == 0 and "making the Space me/space" in err and "/spaces/me/space" in out
    repo = hub.repos["spaces/me/space"]
    files = repo.files()
    assert set(files) == FILES and repo.private and len(repo.titles()) == 1
    told = front_matter(files["README.md"].decode())
    assert told["models"] == ["me/student", "me/teacher"] and told["suggested_hardware"] == "zero-a10g"
    assert told["thumbnail"] == f"{hub.endpoint}/spaces/me/space/resolve/main/thumbnail.png"
    entry = yaml.safe_load(files["models.yaml"])["models"][0]
    assert entry == {"name": "student, 6 to 3 layers", "run": "me/student", "teacher": "me/teacher"}
    hub.seed("spaces/me/space", {"notes.md": b"mine"})
    status, _, err = worker.run("push-space", pushed, "--repo_id", "me/space", "--title", "Another title")
    assert status == 0 and "updating" in err
    assert set(repo.files()) == FILES | {"notes.md"} and b"Another title" in repo.files()["README.md"]
    assert worker("open", run="me/student")["depths"] == [6, 4, 3]  # the original too


def test_a_wheel_goes_along_until_there_is_a_release(hub, worker, pushed, tmp_path):
    wheel, other = tmp_path / "hf_layerprune-9.9-py3-none-any.whl", tmp_path / "torch-2.0-py3-none-any.whl"
    for path in (wheel, other):
        path.write_bytes(b"PK")
    command = ["push-space", pushed, "--repo_id", "me/space", "--wheel"]
    for argv, told in (([other], "is not a wheel of hf-layerprune"), ([wheel, "--private"], "a private Space cannot")):
        status, _, err = worker.run(*command, *argv)
        assert status == 2 and told in err and hub.repos.keys() == {"me/teacher", "me/student"}
    assert worker.run(*command, wheel)[0] == 0
    repo = hub.repos["spaces/me/space"]
    assert repo.files()[wheel.name] == b"PK"
    address = f"{hub.endpoint}/spaces/me/space/resolve/main/{wheel.name}"
    assert repo.files()["requirements.txt"].decode() == f"hf-layerprune[demo] @ {address}\n"
    assert worker.run(*command[:-1])[0] == 0
    assert set(repo.files()) == FILES  # the release takes its place


def test_a_yaml_list_is_pushed_as_it_is(hub, worker, tmp_path, pushed):
    path = tmp_path / "list.yaml"
    path.write_text(
        "title: Ours\nmodels:\n- {name: Ours, run: me/student, teacher: me/teacher, examples: [Hello]}\n"
        "limits: {max_new_tokens: 64}\ndtype: bfloat16\n"
    )
    assert worker.run("push-space", "--models", path, "--repo_id", "space")[0] == 0
    there = tmp_path / "there.yaml"
    there.write_bytes(hub.repos["spaces/me/space"].files()["models.yaml"])
    assert read_settings(there) == read_settings(path)


def test_mistakes_are_one_line_and_nothing_is_sent(hub, worker, pushed, demo_folder, tmp_path):
    run, local = demo_folder / "text" / "run", tmp_path / "local.yaml"
    local.write_text(f"models: [{{name: a, run: {run}, teacher: embedded}}]")
    hub.seed("spaces/me/taken", {"index.html": b"<html>"})
    before = len(hub.repos["spaces/me/taken"].titles())
    for argv, told in (
        ([], "what should it show, and where"),
        (["--repo_id", "me/space"], "what should it show"),
        (["me/student", "--models", "a.yaml", "--repo_id", "me/space"], "what should it show"),
        ([run, "--repo_id", "me/space"], "push it first"),
        (["me/nothing", "--repo_id", "me/space"], "me/nothing"),
        (["me/student", "--repo_id", "you/space"], "You don't have the rights to create a model under you"),
        (["me/student", "--repo_id", "a b"], "looking at a b: Repo id must"),
        (["me/student", "--repo_id", "me/taken"], "holds something else"),
        (["--models", local, "--repo_id", "me/space"], "is not a model on the Hub"),
    ):
        status, _, err = worker.run("push-space", *argv)
        assert status == 2 and told in err and err.strip().splitlines()[-1].startswith("hf-layerprune: "), argv
    assert "spaces/me/space" not in hub.repos and len(hub.repos["spaces/me/taken"].titles()) == before


def test_every_model_of_a_list_is_looked_for_before_anything_is_sent(hub, worker, pushed, tmp_path):
    path, student = tmp_path / "list.yaml", hub.repos["me/student"].files()
    hub.seed("me/local", student | {"report.json": student["report.json"].replace(b"me/teacher", b"teacher")})
    for entry, told in (
        ({"run": "me/typo"}, "me/typo"),
        ({"run": "me/teacher"}, "no report.json"),
        ({"teacher": "me/typo", "student": "me/student"}, "a: looking at me/typo: 404"),
        ({"teacher": "me/teacher", "student": "me/typo@v1"}, "a: looking at me/typo@v1: 404"),
        ({"teacher": "me/teacher", "student": "me/student@9-layers"}, "me/student@9-layers"),
        ({"run": "me/local"}, "was made from 'teacher', which is not a model on the Hub"),
    ):
        path.write_text(yaml.safe_dump({"models": [{"name": "a"} | entry]}))
        status, _, err = worker.run("push-space", "--models", path, "--repo_id", "me/space")
        assert status == 2 and told in err and err.strip().count("\n") == 0, entry
    assert "spaces/me/space" not in hub.repos
    status, _, err = worker.run("demo", "me/local")
    assert status == 2 and "made from 'teacher', which is not a model on the Hub; name its original" in err


def test_private_models_are_told(hub, worker, pushed):
    hub.repos["me/teacher"].private = True
    status, _, err = worker.run("push-space", pushed, "--repo_id", "me/space")
    assert status == 0 and "me/teacher is private" in err and "me/student is private" not in err


def test_without_a_token_nothing_is_sent(hub, worker, pushed):
    status, _, err = worker.run("push-space", pushed, "--repo_id", "me/space", without_token=True)
    assert status == 2 and "Token is required" in err
