"""Two processes share a model by transformers' own tensor-parallel plan: pairs need half the all-reduces."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import family_model
from forked import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_layerprune import parallelize

ROOT = Path(__file__).parent.parent
EMBEDDING = 1


def check(report, num_layers, num_pairs):
    forms = report["forms"]
    assert forms["original"]["all_reduces"] == EMBEDDING + 2 * num_layers
    for name in ("in pairs", "first of each pair removed"):
        assert forms[name]["blocks"] == num_layers - num_pairs
        assert forms[name]["all_reduces"] == EMBEDDING + 2 * (num_layers - num_pairs)
    assert forms["in pairs"]["pairs"] == num_pairs
    for form in forms.values():
        assert form["largest_logit_difference"] < 1e-4 and form["same_greedy_tokens"]


def test_two_processes_give_the_logits_of_one_with_half_the_all_reduces(tmp_path, model_folder):
    output = tmp_path / "all_reduces.json"
    script = ROOT / "benchmarks" / "all_reduces.py"
    run_ranks(2, script, "--model", model_folder, "--pairs", 1, "--output", output)
    check(json.loads(output.read_text()), 5, 1)


def test_the_committed_counts_are_those():
    check(json.loads((ROOT / "benchmarks" / "results" / "all_reduces.json").read_text()), 16, 5)


def test_every_family_with_parallel_layers_computes_the_same_in_two_processes(tmp_path):
    run_ranks(2, ROOT / "tests" / "tensor_parallel_worker.py", tmp_path)


@pytest.fixture
def attention():
    """A pair of Qwen3 layers: 8 heads of queries, 4 of keys, of two layers."""
    return parallelize(family_model("qwen3"), [(1, 2)]).model.layers[1].self_attn


def norms_here(attention, heads, rank, size):
    """What the norm of the queries, or keys, gives of this process's heads, and what it gives of these heads whole."""
    norm = attention.q_norm if heads == 8 else attention.k_norm
    states = torch.randn(2, 3, heads, 16, generator=torch.Generator().manual_seed(0))
    split = states.repeat_interleave(max(size // heads, 1), dim=2).chunk(size, dim=2)
    whole = torch.stack([nn.functional.rms_norm(states[..., n, :], (16,), eps=1e-6) for n in range(heads)], dim=2)
    whole = whole * norm.weight.repeat_interleave(heads // 2, dim=0)
    return norm(split[rank]), whole.repeat_interleave(max(size // heads, 1), dim=2).chunk(size, dim=2)[rank]


def test_a_process_takes_the_gains_of_its_own_heads_wherever_it_is_on_a_mesh(attention):
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))["tp"]  # 2 and 3 have the second half
        weight = DTensor.from_local(attention.o_proj.weight.data.chunk(2, dim=1)[1], mesh, [Shard(1)])
        attention.o_proj.weight = nn.Parameter(weight)
        for heads in (8, 4):
            torch.testing.assert_close(*norms_here(attention, heads, 1, 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size, rank", [(2, 1), (4, 2), (8, 5)])
def test_vllm_says_which_heads_are_here(attention, size, rank):
    attention.o_proj.tp_rank, attention.o_proj.tp_size = rank, size  # with 8, two processes have the same head of keys
    for heads in (8, 4):
        torch.testing.assert_close(*norms_here(attention, heads, rank, size))


def test_heads_that_nobody_can_place_are_refused(attention):
    with pytest.raises(ValueError, match="4 of 8 heads are here, but o_proj is split over 1 processes"):
        attention.q_norm(torch.randn(1, 2, 4, 16))


@pytest.mark.slow
def test_blocks_with_norms_of_heads_compute_the_same_wherever_a_mesh_has_tensor_parallelism():
    run_ranks(4, ROOT / "tests" / "mesh_worker.py")
