"""One healing step at the shape of Qwen2.5-3B: the paper's code, full logits, ours, and ours without each saving.

`benchmarks/healing.py` has the ways. Each is alone on the device while its memory is measured; then all take turns.
"""

from __future__ import annotations

import statistics
from functools import lru_cache, partial
from typing import Any

import healing
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_sections.common import Case, Run, in_turns, median_ratio, release
from gpu_sections.decode import card
from hf_layerprune.memory import LiveBytes

WAYS = healing.WAYS | healing.SWITCHES
EQUAL_WORK = "ours, divergence of full logits"
"""Its operations can be counted; ours computes the same in kernels that no counter sees."""


def cases(run: Run) -> list[Case]:
    operations = lru_cache(partial(counted_operations, run))
    peaks = [(f"memory, {name}", partial(memory, run, name)) for name in WAYS]
    return [*peaks, ("time", partial(times, run, operations)), ("profile of ours", partial(profile, run))]


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
    """Operations of a step, of those ways that multiply with torch alone."""
    teacher, found = healing.make_teacher(shape_of(run), dtype_of(run)), {}
    for name in ("paper", "full logits", EQUAL_WORK):
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
        same = name if name in counted else EQUAL_WORK if "no shared" not in name else None
        if same is not None:
            entry |= {"operations": counted[same], "share_of_matrix_rate": counted[same] / seconds / rate}
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
