"""Two processes share a model by transformers' own tensor-parallel plan: pairs need half the all-reduces."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EMBEDDING = 1


def check(report):
    forms = report["forms"]
    assert forms["original"]["all_reduces"] == EMBEDDING + 2 * 16
    for name in ("in pairs", "first of each pair removed"):
        assert forms[name]["blocks"] == 11 and forms[name]["all_reduces"] == EMBEDDING + 2 * 11
    assert forms["in pairs"]["pairs"] == 5
    for form in forms.values():
        assert form["largest_logit_difference"] < 1e-4 and form["same_greedy_tokens"]


def test_two_processes_give_the_logits_of_one_with_half_the_all_reduces(tmp_path):
    output = tmp_path / "all_reduces.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "benchmarks" / "all_reduces.py"), "--output", str(output)]
    subprocess.run([*command, *script], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    check(json.loads(output.read_text()))


def test_the_committed_counts_are_those():
    check(json.loads((ROOT / "benchmarks" / "results" / "all_reduces.json").read_text()))


def test_every_family_with_parallel_layers_computes_the_same_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(ROOT / "tests" / "tensor_parallel_worker.py"), str(tmp_path)]
    result = subprocess.run([*command, *worker], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
