"""What a process imports before there is something to do."""

import importlib
import subprocess
import sys
from pathlib import Path

import forked
import pytest

import hf_layerprune

SCRIPT = [str(Path(sys.executable).parent / "hf-layerprune")]
MODULE = ["-m", "hf_layerprune.cli"]


@pytest.mark.parametrize(
    "command",
    [[*MODULE, "--help"], [*MODULE, "generate", "--help"], [*SCRIPT, "--version"]],
    ids=lambda command: " ".join(command[-2:]),
)  # fmt: skip
def test_help_imports_neither_torch_nor_transformers(command):
    result = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "hf_layerprune.cli" in imported
    assert not {"torch", "transformers", "datasets"} & imported
    assert "hf-layerprune" in result.stdout


def test_importing_the_package_registers_its_models():
    code = "import hf_layerprune; from transformers import AutoConfig; AutoConfig.for_model('pruned_qwen2')"
    process = forked.run(code, server="libraries")
    assert process.wait() == 0, process.stderr


def test_public_names_are_those_of_the_stub():
    for name in hf_layerprune.__all__:
        assert getattr(hf_layerprune, name) is not None
        assert name in dir(hf_layerprune)
    assert hf_layerprune.report is importlib.import_module("hf_layerprune.report")
    with pytest.raises(AttributeError, match="prunne"):
        hf_layerprune.prunne  # noqa: B018
