"""One healing step: as the authors of the paper wrote it, as distillation trainers do it, ours.

    python benchmarks/healing.py --output benchmarks/results/healing.json
    python benchmarks/healing.py --count --output benchmarks/results/healing_counts.json    # on paper, nothing is run

The student lacks one layer in the middle, and its neighbours are trained. A step is forward, backward and AdamW.

* paper: both models in full with all hidden states, logits of all positions twice, padding included, a third model in
  memory, as in https://github.com/kaengreg/layer-wise_distillation.
* full logits: the same loss as ours from the logits of all positions, models without common weights.
* ours: [`HealingTrainer.loss_parts`]; `SWITCHES` are ours with one of its savings left out.

Times are medians over turns in one process; the peak of memory is that of a process of its own per way, models
included, over what is there before they are made.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from kl import trl
from predictions import Kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_layerprune import losses, prune
from hf_layerprune.data import Batch, valid_next_tokens
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.loading import load_model
from hf_layerprune.losses import relative_hidden_state_mse
from hf_layerprune.memory import LiveBytes
from hf_layerprune.surgery import plan_of
from hf_layerprune.trainer import healing as trainer_module
from hf_layerprune.trainer.healing import HealingTrainer, compared_states, shared_depth
from hf_layerprune.trainer.trainable import make_trainable

QWEN_3B = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = QWEN_3B | {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {"config": None, "gap": 8, "rows": 8, "length": 256},
    "24 layers x 512, vocabulary of 151,936": {"config": SMALL, "gap": 12, "rows": 2, "length": 256},
    "Qwen2.5-3B": {"config": QWEN_3B, "gap": 19, "rows": 2, "length": 2048},
}
HIDDEN_WEIGHT = 10.0
Step = Callable[[], Tensor]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_teacher(shape: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    if shape["config"] is None:
        model = load_model("embedded", dtype=dtype)
    else:
        with torch.device(device()):
            model = Qwen2ForCausalLM(Qwen2Config(**shape["config"])).to(dtype)
    return model.to(device()).eval().requires_grad_(False)


def make_batch(shape: dict[str, Any], vocabulary: int) -> Batch:
    """Random tokens; every row but the first is padded, by up to a quarter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(vocabulary, 4096), (shape["rows"], shape["length"]), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, shape["rows"]):
        mask[row, shape["length"] - shape["length"] * row // (4 * shape["rows"] - 4) :] = 0
    return {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}


def paper_step(teacher: PreTrainedModel, shape: dict[str, Any]) -> tuple[PreTrainedModel, Step]:
    student, neighbours = separate_student(teacher, shape["gap"])
    unused = copy.deepcopy(student)
    batch = make_batch(shape, teacher.config.vocab_size)

    def loss() -> Tensor:
        _ = unused
        with torch.no_grad():
            theirs = teacher(**batch, output_hidden_states=True)
        own = student(**batch, output_hidden_states=True)
        log_q, p = F.log_softmax(own.logits, -1), F.softmax(theirs.logits, -1)
        kl = F.kl_div(log_q, p, reduction="sum") / 100
        last = neighbours[-1]
        hidden = F.mse_loss(own.hidden_states[last + 1], theirs.hidden_states[last + 2])
        return kl + hidden + F.mse_loss(own.hidden_states[-1], theirs.hidden_states[-1])

    return student, loss


def full_logits_step(teacher: PreTrainedModel, shape: dict[str, Any]) -> tuple[PreTrainedModel, Step]:
    student, neighbours = separate_student(teacher, shape["gap"])
    states = compared_states(plan_of(student), plan_of(teacher), neighbours)
    batch = make_batch(shape, teacher.config.vocab_size)
    valid, labels = valid_next_tokens(batch)

    def loss() -> Tensor:
        with torch.no_grad():
            theirs = teacher(**batch, output_hidden_states=True)
        own = student(**batch, output_hidden_states=True)
        log_p, log_q = (F.log_softmax(logits.float(), -1) for logits in (theirs.logits, own.logits))
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[valid].sum()
        pairs = [(own.hidden_states[a + 1], theirs.hidden_states[b + 1]) for a, b in states]
        hidden = torch.stack([relative_hidden_state_mse(a[valid], b[valid]).sum() for a, b in pairs]).mean()
        final = relative_hidden_state_mse(own.hidden_states[-1][valid], theirs.hidden_states[-1][valid]).sum()
        return (kl + HIDDEN_WEIGHT * (hidden + final) / 2) / len(labels)

    return student, loss


def our_step(
    teacher: PreTrainedModel,
    shape: dict[str, Any],
    share_weights: bool = True,
    share_prefix: bool = True,
    divergence: Callable[..., Tensor] = losses.divergence,
) -> tuple[PreTrainedModel, Step]:
    student = prune(teacher, [shape["gap"]], share_weights=share_weights)
    neighbours = [shape["gap"] - 1, shape["gap"]]
    student = make_trainable(student, neighbours, everything=False).train()
    args = SimpleNamespace(
        loss_preset=None, kl_weight=1.0, lm_weight=0.0, temperature=1.0, beta=0.0
    )  # fmt: skip
    trainer = SimpleNamespace(
        teacher=teacher,
        args=args,
        compared=compared_states(plan_of(student), plan_of(teacher), neighbours),
        shared_depth=shared_depth(student, teacher) if share_prefix else None,
        frozen_head=None,
    )
    batch = make_batch(shape, teacher.config.vocab_size)

    def loss() -> Tensor:
        with patch.object(losses, "divergence", divergence):
            parts = HealingTrainer.loss_parts(trainer, student, batch)
        hidden = (parts["hidden"] + parts["final_hidden"]) / 2
        return (parts["kl"] + HIDDEN_WEIGHT * hidden) / parts["num_tokens"]

    return student, loss


def divergence_of_logits(
    student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear, *_: Any
) -> Tensor:
    """KL from the logits of all positions at once."""
    log_q = F.log_softmax(head(student).float(), -1)
    with torch.no_grad():
        log_p = F.log_softmax(teacher_head(teacher).float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def divergence_of_trl(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear, *_: Any) -> Tensor:
    """TRL's chunked divergence, on a GPU by its Triton kernels."""
    return trl(student, head, teacher, teacher_head)


WAYS = {"paper": paper_step, "full logits": full_logits_step, "ours": our_step}
SWITCHES: dict[str, Callable[..., tuple[PreTrainedModel, Step]]] = {
    "ours, no shared prefix": partial(our_step, share_prefix=False),
    "ours, no shared weights": partial(our_step, share_weights=False),
    "ours, divergence of full logits": partial(our_step, divergence=divergence_of_logits),
    "ours, divergence of TRL": partial(our_step, divergence=divergence_of_trl),
}


def separate_student(teacher: PreTrainedModel, gap: int) -> tuple[PreTrainedModel, list[int]]:
    """A student that shares nothing with its teacher, the neighbours of its gap trained."""
    student = prune(teacher, [gap]).train().requires_grad_(False)
    neighbours = [gap - 1, gap]
    for position in neighbours:
        student.model.layers[position].requires_grad_(True)
    return student, neighbours


def step_of(student: PreTrainedModel, loss: Step) -> Callable[[], float]:
    """Forward, backward and AdamW, in seconds."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6)

    def step() -> float:
        synchronize()
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - start

    return step


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gradient_difference(teacher: PreTrainedModel, shape: dict[str, Any]) -> float:
    """Largest relative difference of a tensor's gradient between ours and full logits."""
    gradients = []
    for way in ("full logits", "ours"):
        student, loss = WAYS[way](teacher, shape)
        loss().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    full, other = gradients
    assert full.keys() == other.keys()
    return max(((other[name] - full[name]).norm() / full[name].norm()).item() for name in full)


def peak_bytes(shape_name: str, way: str, dtype: torch.dtype) -> int:
    """Most memory of three steps, models and optimizer included, in a process that does nothing else."""
    command = [sys.executable, __file__, "--peak", shape_name, way, str(dtype).removeprefix("torch.")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(shape_name: str, way: str, dtype: torch.dtype) -> None:
    before = resident("VmRSS")
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    teacher = make_teacher(SHAPES[shape_name], dtype)
    step = step_of(*WAYS[way](teacher, SHAPES[shape_name]))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a model is made in float32 first
    for _ in range(3):
        step()
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}; memory is measured on Linux")


def compare(name: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    shape = SHAPES[name]
    teacher = make_teacher(shape, dtype)
    steps = {way: step_of(*make(teacher, shape)) for way, make in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for repeat in range(-1, repeats):
        for way, step in steps.items():
            taken = step()
            if repeat >= 0:
                seconds[way].append(taken)
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "positions": shape["rows"] * shape["length"],
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
    }
    if dtype == torch.float32:
        result["gradient_difference"] = gradient_difference(teacher, shape)
    del teacher, steps
    result["peak_bytes"] = {way: peak_bytes(name, way, dtype) for way in WAYS}
    for other in ("paper", "full logits"):
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[other], strict=True)]
        result[f"time_over_{other.replace(' ', '_')}"] = statistics.median(ratios)
        result[f"memory_over_{other.replace(' ', '_')}"] = result["peak_bytes"]["ours"] / result["peak_bytes"][other]
    return result


class Places(tuple):
    """Indices in the place of a mask, which tensors without values cannot be selected by."""

    def nonzero(self, as_tuple: bool) -> tuple[Tensor, ...]:
        return tuple(self)


def full_rows(batch: Batch) -> tuple[Places, Tensor]:
    """What `valid_next_tokens` gives for rows without padding."""
    rows, length = batch["input_ids"].shape
    places = Places((torch.arange(rows).repeat_interleave(length - 1), torch.arange(length - 1).repeat(rows)))
    return places, torch.zeros_like(places[0])


class Traffic(Kernels):
    """Counts, next to kernels, the bytes that those without products, attention or embedding read and write."""

    moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, result = self.count, super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if self.count > before and not any(part in name for part in ("mm", "attention", "embedding")):
            tensors, _ = tree_flatten((args, kwargs, result))
            self.moved += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return result


def counted(shape: dict[str, Any], way: str) -> dict[str, int]:
    """Operations, kernels and their traffic in a bfloat16 step of full rows without AdamW; bytes of weights and peak.

    The step is run on tensors that have shapes and no memory, the divergence by our own form. The peak includes AdamW.
    """
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    ids = torch.zeros(shape["rows"], shape["length"], dtype=torch.long)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake.cache_enabled = False  # with it, torch 2.13 crashed once where other tests had run before
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that tensors have no place in memory
        for module in (sys.modules[__name__], trainer_module):
            stack.enter_context(patch.object(module, "valid_next_tokens", full_rows))
        stack.enter_context(patch.object(sys.modules[__name__], "make_batch", lambda *_: {"input_ids": ids}))
        stack.enter_context(fake)
        live = stack.enter_context(LiveBytes())
        config = Qwen2Config(**shape["config"], attn_implementation="sdpa_without_mask")
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        student, loss = WAYS[way](teacher, shape)
        weights = live.now
        live.peak = 0
        with FlopCounterMode(display=False) as counter, Traffic() as kernels:
            loss().backward()
        states = 2 * sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    counts = {"operations": counter.get_total_flops(), "kernels": kernels.count, "moved_bytes": kernels.moved}
    return counts | {"weight_bytes": weights, "peak_bytes": live.peak + states}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="Count a step of Qwen2.5-3B; nothing is run.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="Which to measure.")
    parser.add_argument("--peak", nargs=3, metavar=("SHAPE", "WAY", "DTYPE"), help="Print one peak of memory.")
    arguments = parser.parse_args()
    if arguments.peak:
        shape, way, dtype = arguments.peak
        print_peak(shape, way, getattr(torch, dtype))
        return
    if arguments.count:
        counts = {way: counted(SHAPES["Qwen2.5-3B"], way) for way in WAYS}
        print(json.dumps(counts, indent=1))
        if arguments.output:
            write_atomically(arguments.output, to_json(counts | {"environment": environment()}))
        return
    results = {}
    for name in arguments.shapes:
        if name != "Qwen2.5-3B":
            results[name] = compare(name, torch.float32, arguments.repeats)
        elif torch.cuda.is_available():
            results[name] = compare(name, torch.bfloat16, arguments.repeats)
    print(json.dumps(results, indent=1))
    if arguments.output:
        write_atomically(arguments.output, to_json(results | {"environment": environment()}))


if __name__ == "__main__":
    main()
