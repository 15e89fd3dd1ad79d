"""One healing step at the shape of Qwen2.5-3B: the paper's code, full logits, ours, and ours without each saving.

`benchmarks/healing.py` has the ways. Each is alone on the device while its memory is measured; then all take turns. At
the end two ways to have fewer kernels for the same layers: compiled by torch, and Liger's where it is installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import healing
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.models.qwen2 import modeling_qwen2

from gpu_sections.common import Case, Run, in_turns, median_ratio, relative_error, release
from gpu_sections.decode import card
from hf_layerprune.memory import LiveBytes
from hf_layerprune.trainer import healing as trainer_healing

WAYS = healing.WAYS | healing.SWITCHES
COUNTED = ("paper", "full logits", "ours", "ours, no shared prefix")
"""Ways whose operations are counted; others do the same as ours."""


def cases(run: Run) -> list[Case]:
    operations = lru_cache(partial(counted_operations, run))
    peaks = [(f"memory, {name}", partial(memory, run, name)) for name in WAYS]
    found = [*peaks, ("time", partial(times, run, operations)), ("profile of ours", partial(profile, run))]
    found.append(("layers compiled", partial(fused, run, compiled)))
    return found + [("layers of Liger", partial(with_liger, run))] * run.on_gpu


def shape_of(run: Run) -> dict[str, Any]:
    shape = healing.SHAPES["Qwen2.5-3B"]
    if run.tiny:
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
        config = shape["config"] | sizes | {"num_attention_heads": 4}
        shape = shape | {"config": config, "gap": 3, "length": 32}
    return shape


def dtype_of(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.on_gpu else torch.float32


def memory(run: Run, name: str) -> dict[str, int]:
    """The most bytes of three steps, models and optimizer included."""
    release()
    before = torch.cuda.memory_allocated() if run.on_gpu else 0
    with LiveBytes() if not run.on_gpu else torch.enable_grad() as live:
        teacher = healing.make_teacher(shape_of(run), dtype_of(run))
        step = healing.step_of(*WAYS[name](teacher, shape_of(run)))
        if run.on_gpu:
            torch.cuda.reset_peak_memory_stats()  # the teacher was made in float32 first
        for _ in range(3):
            step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before if run.on_gpu else live.peak}


def counted_operations(run: Run) -> dict[str, int]:
    """Operations of a step."""
    teacher, found = healing.make_teacher(shape_of(run), dtype_of(run)), {}
    for name in COUNTED:
        _, loss = WAYS[name](teacher, shape_of(run))
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        found[name] = counter.get_total_flops()
        release()
    return found


def times(run: Run, operations: Any) -> dict[str, Any]:
    """Every way in turn: seconds, tokens/s, and the share of the card's matrix rate."""
    shape, teacher = shape_of(run), healing.make_teacher(shape_of(run), dtype_of(run))
    steps = {name: healing.step_of(*make(teacher, shape)) for name, make in WAYS.items()}
    turns, tokens = in_turns(steps, run.repeats, warmup=2), shape["rows"] * shape["length"]
    del steps
    release()
    counted, rate = operations(), card(run)["bf16_operations_per_second"]
    found = {}
    for name, values in turns.items():
        seconds = statistics.median(values)
        found[name] = entry = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        entry["over_paper"] = median_ratio(values, turns["paper"])
        entry["over_full_logits"] = median_ratio(values, turns["full logits"])
        number = counted.get(name, counted["ours"])
        entry |= {"operations": number, "share_of_matrix_rate": number / seconds / rate}
    return found


def profile(run: Run) -> dict[str, Any]:
    """What a step of ours spends its time on: the operations that take most, in milliseconds and launches."""
    teacher = healing.make_teacher(shape_of(run), dtype_of(run))
    step = healing.step_of(*WAYS["ours"](teacher, shape_of(run)))
    step()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if run.on_gpu else kinds.CPU]) as seen:
        step()
    spent = [(event.self_device_time_total if run.on_gpu else event.self_cpu_time_total, event)
             for event in seen.key_averages()]  # fmt: skip
    most = sorted(spent, key=lambda item: -item[0])[:20]
    rows = [{"name": event.key[:120], "milliseconds": time / 1000, "count": event.count} for time, event in most]
    return {"all_milliseconds": sum(time for time, _ in spent) / 1000, "operations": rows}


def fused(run: Run, change: Callable[[PreTrainedModel], None]) -> dict[str, Any]:
    """A step of ours, and then one in which `change` has been made to the layers of both models."""
    found: dict[str, Any] = {"seconds": {}, "peak_bytes": {}}
    gradients = []
    for name, act in (("as they are", lambda model: None), ("changed", change)):
        release()
        before = torch.cuda.memory_allocated() if run.on_gpu else 0
        teacher = healing.make_teacher(shape_of(run), dtype_of(run))
        student, loss = healing.our_step(teacher, shape_of(run))
        for model in (teacher, student):
            act(model=model)
        loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).cpu())
        step = healing.step_of(student, loss)
        step()
        if run.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found["seconds"][name] = statistics.median(in_turns({name: step}, run.repeats)[name])
        if run.on_gpu:
            found["peak_bytes"][name] = torch.cuda.max_memory_allocated() - before
        del teacher, student, loss, step
    return found | {"gradient_difference": relative_error(*reversed(gradients))}


def compiled(model: PreTrainedModel) -> None:
    if model.device.type == "cpu":
        trainer_healing.COMPILER = "eager"  # which needs no compiler of C++
    trainer_healing.compile_layers([model])


def with_liger(run: Run) -> dict[str, Any]:
    """[`fused`] with Liger's norms, rotation and SwiGLU in the place of transformers', which come back afterwards."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    options = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    before = dict(vars(modeling_qwen2))
    try:
        return fused(run, partial(apply_liger_kernel_to_qwen2, fused_linear_cross_entropy=False, **options))
    finally:
        vars(modeling_qwen2).update(before)
