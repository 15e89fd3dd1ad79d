"""What README.md shows is what the repository does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import read_report

from hf_layerprune.cli import VERBS
from hf_layerprune.cli.parsing import Parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow  # test_commands.py runs it on a narrow teacher
def test_the_example_heals(tmp_path):
    command = [sys.executable, "-W", "error::FutureWarning", ROOT / "examples" / "compress.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert "eval_perplexity" in result.stdout
    for record in read_report(tmp_path / "embedded-14")["rounds"]:
        assert record["kl"] < record["kl_before_healing"]


def test_nothing_is_left_to_fill_in():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")):
        assert "@@" not in path.read_text(), path


def test_the_make_targets_and_the_verbs_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert set(re.findall(r"hf-layerprune ([a-z][\w-]*)", README)) == set(VERBS)
    commands = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "make test" in commands
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == commands


def test_the_skill_names_verbs_and_settings_there_are():
    text = (ROOT / "SKILL.md").read_text()
    assert len(text.splitlines()) <= 60 and yaml.safe_load(text.split("---\n")[1])["name"] == "hf-layerprune"
    known = {verb: Parser(verb).settings for verb in VERBS}
    for verb, rest in re.findall(r"`hf-layerprune ([a-z][\w-]*)([^`]*)`", text):
        assert set(re.findall(r"--(\w+)", rest)) <= {*known[verb], "config"}, verb
    assert set(re.findall(r"`--(\w+)", text)) <= {"config"}.union(*known.values())
    for path in re.findall(r"`([\w/]+/[\w.]+\.md)`", text):
        assert path.startswith("OUT/") or (ROOT / path).is_file()


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")):
        for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{link} in {path}"
