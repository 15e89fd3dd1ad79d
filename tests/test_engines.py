"""The healing step inside engines that split a model over processes: the same loss and gradients as one process."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DynamoBackend, is_deepspeed_available
from conftest import byte_tokenizer, read_report, short_texts, tiny_config, tiny_model
from forked import CLI, accelerate_launch, run, run_ranks

from hf_layerprune import LayerPruneError, prune
from hf_layerprune.loading import load_model
from hf_layerprune.trainer.engines import check_engine

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "recipes" / "accelerate"

SCRIPT = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from pathlib import Path
from conftest import byte_tokenizer, random_batches, tiny_model
from hf_layerprune import evaluate_model, prune
from hf_layerprune.loading import load_model
from hf_layerprune.surgery import plan_of
from hf_layerprune._trl import redirect_forward
from hf_layerprune.trainer.engines import fill_outline, frozen_head, outline
from hf_layerprune.trainer.healing import HealingTrainer, compared_states, shared_depth
from hf_layerprune.trainer.run import save_student
from hf_layerprune.trainer.trainable import fold_adapters, make_trainable

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
everything = sys.argv[1] == "all"
blocks = list(range(5)) if everything else [2, 3]
args = SimpleNamespace(loss_preset=None, kl_weight=1.0, lm_weight=0.2, temperature=1.0, beta=0.0)
(batch,) = random_batches(1, rows=4)

def step(split):
    teacher = tiny_model(6)
    student = make_trainable(prune(teacher, [3], share_weights=True), blocks, everything)
    states = compared_states(plan_of(student), plan_of(teacher), blocks)
    trainer = SimpleNamespace(teacher=teacher, args=args, compared=states,
                              shared_depth=shared_depth(student, teacher))
    assert (trainer.shared_depth is None) == everything
    part, scale, empty = batch, 1.0, outline(student)
    trainer.frozen_head = frozen_head(empty) if split else None
    assert (trainer.frozen_head is None) == (everything or not split)
    if split:
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        part = {key: value[dist.get_rank() :: 2] for key, value in batch.items()}
        scale = float(dist.get_world_size())  # the engine takes the mean of the processes' gradients
    loss_parts = lambda model, inputs: HealingTrainer.loss_parts(trainer, model, inputs)
    parts = redirect_forward(student, student, loss_parts, student, part)
    total = parts["kl"] + 5 * (parts["hidden"] + parts["final_hidden"]) + 0.2 * parts["lm"]
    (scale * total / 40).backward()
    gradients = {}
    for name, p in student.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return total.detach(), gradients, student, empty

whole, expected, plain, _ = step(False)
share, found, split, empty = step(True)
dist.all_reduce(share)
torch.testing.assert_close(share, whole, rtol=1e-5, atol=1e-5)
assert found.keys() == expected.keys() and len(found) >= 24
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

for model in (plain, split):
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01).step()
before = [p.data_ptr() for p in empty.parameters() if not p.requires_grad]
healed = fold_adapters(fill_outline(empty, split, torch.device("cpu")), torch.float32)
plain = fold_adapters(plain, torch.float32)
assert type(healed) is type(plain) and not any(isinstance(p, DTensor) for p in healed.parameters())
assert before == [p.data_ptr() for name, p in healed.named_parameters() if name not in expected]  # still the teacher's
for (name, a), b in zip(healed.named_parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    everyone = [torch.empty_like(a) for _ in range(2)]
    dist.all_gather(everyone, a.detach())
    assert torch.equal(*everyone), name
scores = evaluate_model(healed, [batch], tiny_model(6))
if dist.get_rank() == 0:
    save_student(healed, byte_tokenizer(), torch.float32, Path(sys.argv[2]))
dist.barrier()
saved = load_model(sys.argv[2])
assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), healed.parameters(), strict=True))
assert evaluate_model(saved, [batch], tiny_model(6)).kl == scores.kl
dist.destroy_process_group()
"""


@pytest.mark.parametrize("trained", ["neighbours", "all"])
def test_fully_sharded_healing_is_that_of_one_process_and_comes_back_whole(tmp_path, trained):
    run_ranks(2, SCRIPT, trained, tmp_path / "student")


KILLED = """
import os, signal, sys
if {engine}:
    import cpu_engine
import torch.distributed as dist
from transformers import TrainerCallback
from hf_layerprune.cli import main
from hf_layerprune.trainer import iterative

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **_):
        if state.global_step == 2:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

start = iterative.IterativeLayerDistillTrainer.__init__
def killed(self, *args, **kwargs):
    start(self, *args, **kwargs)
    self.add_callback(Kill())
iterative.IterativeLayerDistillTrainer.__init__ = killed
main(sys.argv[1:])
"""


COMPILED = """
import sys
from hf_layerprune.cli import main
from hf_layerprune.trainer import healing

healing.COMPILER = "eager"  # which needs no compiler of C++
sys.exit(main(sys.argv[1:]))
"""


def launch(model, texts, folder, config, killed=False, resume=False, **settings):
    """Report and student of the command line, on as many processes as a configuration of accelerate says.

    Nothing, if all of them are to be `killed` behind the checkpoint of the second step.
    """
    recipe = {
        "model": str(model), "dataset": str(texts), "output_dir": str(folder), "target_num_layers": 3, "max_steps": 3,
        "trained_layers": "all", "optim": "sgd", "max_grad_norm": 1e9, "bf16": False, "logging_steps": 1,
        "num_calibration_samples": 4, "num_eval_samples": 4, "per_device_eval_batch_size": 2, "max_length": 64,
        "packing": True, "packing_strategy": "wrapped", "measure_speed": False, "report_to": "none", "use_cpu": True,
        "learning_rate": 0.01, "save_strategy": "no",
    } | settings  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    words = ["compress", "--config", str(path), *(["--resume"] if resume else [])]
    if config is None:
        assert (one := run(CLI, *words)).wait() == 0, one.stderr[-3000:]
    else:
        plain = config == "ddp_cpu.yaml"
        script = ["-m", "hf_layerprune.cli"] if plain else [TESTS / "cpu_engine.py"]
        if killed or settings.get("compile_layers"):
            script = [folder.with_name("script.py")]
            script[0].write_text(KILLED.format(engine=not plain) if killed else COMPILED)
        settings = ("--config_file", CONFIGS / config, "--num_processes", 2, "--mixed_precision", "no")
        with pytest.raises(AssertionError) if killed else nullcontext():
            accelerate_launch(*settings, *script, *words)
    if killed:
        return None
    report = read_report(folder)
    return report, load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of two rounds: its model, its text, its report and its student."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    short_texts().to_json(folder / "texts.jsonl")
    data = (folder / "teacher", folder / "texts.jsonl")
    return *data, *launch(*data, folder / "one", None, per_device_train_batch_size=4)


needs_deepspeed = [
    pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed"),
    pytest.mark.slow,  # it compiles something for the CPU first
]
ENGINES = [
    "ddp_cpu.yaml",
    "fsdp2.yaml",
    pytest.param("deepspeed_zero2.yaml", marks=needs_deepspeed),
    pytest.param("deepspeed_zero3.yaml", marks=needs_deepspeed),
]


@pytest.mark.parametrize("config", ENGINES)
def test_rounds_in_every_engine_are_those_of_one_process_with_the_same_batch(tmp_path, one_process, config):
    check_two_processes(tmp_path, one_process, config)


def test_compiled_layers_heal_alike_in_two_processes(tmp_path, one_process):
    check_two_processes(tmp_path, one_process, "ddp_cpu.yaml", compile_layers=True)


def check_two_processes(tmp_path, one_process, config, **settings):
    teacher, texts, one, of_one = one_process
    two, of_two = launch(teacher, texts, tmp_path / "two", config, per_device_train_batch_size=2, **settings)
    assert two["settings"]["num_processes"] == 2 and one["settings"]["num_processes"] == 1
    assert len(one["rounds"]) == 2
    for a, b in zip(two["rounds"], one["rounds"], strict=True):
        assert a["edits"] == b["edits"] and a["train_tokens"] == b["train_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    start = prune(load_model(str(teacher)), [int(edit) for record in one["rounds"] for edit in record["edits"]])
    for (name, a), b, before in zip(of_two.named_parameters(), of_one.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a - before, b - before, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(b, before), name


@pytest.mark.parametrize("config", ENGINES)
@pytest.mark.slow
def test_a_healing_that_was_killed_goes_on_from_the_checkpoint_of_its_engine(tmp_path, one_process, config):
    how = (*one_process[:2], tmp_path / "cut", config)
    settings = {"target_num_layers": 4, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    launch(*how, killed=True, **settings)
    assert (tmp_path / "cut" / "healing" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (tmp_path / "cut" / "rounds").exists() and not (tmp_path / "cut" / "model").exists()
    cut, student = launch(*how, resume=True, **settings)
    whole, expected = launch(*how[:2], tmp_path / "whole", config, **settings)
    assert cut["rounds"][0]["train_tokens"] == whole["rounds"][0]["train_tokens"]
    for (name, a), b in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))  # strict: an unknown key is an error
    kinds = {"ddp": "MULTI_GPU", "fsd": "FSDP", "dee": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.name[:3]]
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2 and not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if config.distributed_type == "DEEPSPEED":
        assert path.stem.endswith(str(config.deepspeed_config["zero_stage"]))


def engine(kind, backend=DynamoBackend.NO, **more):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(distributed_type=DistributedType[kind], state=state, **more)


@pytest.mark.parametrize(
    "accelerator, changes, words",
    [
        (engine("FSDP", is_fsdp2=False), {}, "fsdp_version: 2"),
        (engine("FSDP", is_fsdp2=True), {"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy cannot"),
        (engine("DEEPSPEED"), {"compile_layers": True}, "compile_layers"),
        (engine("NO", backend=DynamoBackend.INDUCTOR), {}, "set compile_layers instead"),
    ],
)
def test_what_cannot_work_in_an_engine_is_refused_in_one_line(tmp_path, accelerator, changes, words):
    args = tiny_config(tmp_path, **changes)
    with pytest.raises(LayerPruneError, match=words) as caught:
        check_engine(accelerator, args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("accelerator", [engine("NO"), engine("MULTI_GPU"), engine("DEEPSPEED")])
def test_what_works_is_not_refused(tmp_path, accelerator):
    check_engine(accelerator, tiny_config(tmp_path))


def test_a_teacher_that_would_not_be_whole_is_refused(monkeypatch, model_folder):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(LayerPruneError, match="fsdp_cpu_ram_efficient_loading"):
        load_model(str(model_folder))
