"""The healing step inside engines that split a model over processes: the same loss and gradients as one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_layerprune import prune
from hf_layerprune.loading import load_model

SCRIPT = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
sys.path.insert(0, sys.argv[1])
from conftest import random_batches, tiny_model
from hf_layerprune import prune
from hf_layerprune.surgery import plan_of
from hf_layerprune.trainer._trl import redirect_forward
from hf_layerprune.trainer.healing import LayerHealingTrainer
from hf_layerprune.trainer.targets import HiddenStateMap
from hf_layerprune.trainer.towers import shared_depth
from hf_layerprune.trainer.trainable import make_trainable

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
everything = sys.argv[2] == "all"
blocks = list(range(5)) if everything else [2, 3]
args = SimpleNamespace(loss_preset=None, kl_weight=1.0, lm_weight=0.2, temperature=1.0, beta=0.0,
                       hidden_distance="mse", hidden_target="states")
(batch,) = random_batches(1, rows=4)

def step(split):
    teacher = tiny_model(6)
    student = make_trainable(prune(teacher, [3], share_weights=True), blocks, everything)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), blocks)
    trainer = SimpleNamespace(teacher=teacher, args=args, teacher_cache=None, hidden_state_map=states,
                              shared_depth=shared_depth(student, teacher))
    assert (trainer.shared_depth is None) == everything
    part, scale = batch, 1.0
    if split:
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        part = {key: value[dist.get_rank() :: 2] for key, value in batch.items()}
        scale = float(dist.get_world_size())  # the engine takes the mean of the processes' gradients
    loss_parts = lambda model, inputs: LayerHealingTrainer.loss_parts(trainer, model, inputs)
    parts = redirect_forward(student, student, loss_parts, student, part)
    total = parts["kl"] + 5 * (parts["hidden"] + parts["final_hidden"]) + 0.2 * parts["lm"]
    (scale * total / 40).backward()
    gradients = {}
    for name, p in student.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return total.detach(), gradients

whole, expected = step(False)
share, found = step(True)
dist.all_reduce(share)
torch.testing.assert_close(share, whole, rtol=1e-5, atol=1e-5)
assert found.keys() == expected.keys() and len(found) >= 24
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize("trained", ["neighbours", "all"])
def test_fully_sharded_gradients_are_those_of_one_process(trained):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command += [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), trained]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 2


def launch(model, texts, folder, config, **settings):
    """The training losses of one round of the command line, on as many processes as the configuration says."""
    recipe = {
        "model": str(model), "dataset": str(texts), "output_dir": str(folder), "target_num_layers": 4, "max_steps": 3,
        "trained_layers": "all", "optim": "sgd", "max_grad_norm": 1e9, "bf16": False, "logging_steps": 1,
        "num_calibration_samples": 4, "num_eval_samples": 4, "per_device_eval_batch_size": 2, "max_length": 64,
        "packing": True, "packing_strategy": "wrapped", "measure_speed": False, "report_to": "none", "use_cpu": True,
        "learning_rate": 0.1, "save_strategy": "no",
    } | settings  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "hf_layerprune.cli", "compress", "--config", str(path)]
    if config is not None:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*start, "-m", *command[2:]]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    return report, load_model(str(folder / "model"))


def test_data_parallel_healing_is_that_of_one_process_with_the_same_batch(tmp_path, model_folder, texts):
    config = Path(__file__).parent.parent / "recipes" / "accelerate" / "ddp_cpu.yaml"
    file = tmp_path / "texts.jsonl"
    texts.to_json(file)
    two, of_two = launch(model_folder, file, tmp_path / "two", config, per_device_train_batch_size=2)
    one, of_one = launch(model_folder, file, tmp_path / "one", None, per_device_train_batch_size=4)
    assert two["settings"]["num_processes"] == 2 and one["settings"]["num_processes"] == 1
    for a, b in zip(two["rounds"], one["rounds"], strict=True):
        assert a["edits"] == b["edits"] and a["train_tokens"] == b["train_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    start = prune(load_model(str(model_folder)), one["rounds"][0]["removed_layers"])
    for (name, a), b, before in zip(of_two.named_parameters(), of_one.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a - before, b - before, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(b, before), name
