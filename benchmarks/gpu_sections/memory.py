"""`hf-layerprune estimate` against the most memory that real healings take, in four ways to heal.

On a CPU, where the kernels of a GPU are missing, the bytes of live tensors stand for the memory of the device: the
script is proved, the estimate is not.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset

from gpu_sections.common import Case, Run, narrow, random_rows, release
from hf_layerprune import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, load_tokenizer, prune
from hf_layerprune.benchmark import load_shape, random_models
from hf_layerprune.memory import LiveBytes, StepMeter, StepShape, Way
from hf_layerprune.trainer.healing import HealingTrainer
from hf_layerprune.trainer.trainable import lora_config

WAYS = {
    "neighbours": Way("neighbours", None, "bfloat16", False),
    "neighbours, float32 weights, checkpointing": Way("neighbours", None, "float32", True),
    "all": Way("all", None, "bfloat16", False),
    "neighbours, LoRA": Way("neighbours", 16, "bfloat16", False),
}
WITHIN = 0.1
SHAPE = "Qwen2.5-1.5B"


def cases(run: Run) -> list[Case]:
    return [(name, partial(compare, run, way)) for name, way in WAYS.items()]


def settings(run: Run, way: Way, length: int, rows: int) -> IterativeLayerDistillConfig:
    return IterativeLayerDistillConfig(
        output_dir=str(run.scratch / "memory"), target_num_layers=1, trained_layers=str(way.trained), max_steps=3,
        per_device_train_batch_size=rows, max_length=length, packing=True, packing_strategy="wrapped",
        bf16=run.on_gpu, gradient_checkpointing=way.gradient_checkpointing, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=not run.on_gpu, num_calibration_samples=1,
    )  # fmt: skip


def compare(run: Run, way: Way) -> dict[str, Any]:
    """A layer in the middle removed; three steps of full rows."""
    config, length, rows = load_shape(SHAPE), 1024, 4
    if run.tiny:
        config, length, rows = narrow(config, 4), 32, 2
        config.vocab_size = len(load_tokenizer("embedded"))
    depth, args = config.num_hidden_layers, settings(run, way, length, rows)
    middle = depth // 2
    shape = StepShape(2, depth - middle - 2, middle)
    if way.trained == "all":
        shape = StepShape(depth - 1, 0, 1)
    expected = StepMeter(config, args).needs(way, shape, rows, accumulates=False)
    measured = peak(run, config, way, args, middle)
    ratio = expected.peak / measured
    found = {"estimated_bytes": expected.peak, "measured_bytes": measured, "estimated_over_measured": ratio}
    return found | ({"within": WITHIN, "ok": abs(ratio - 1) <= WITHIN} if run.on_gpu else {})


def peak(run: Run, config: Any, way: Way, args: IterativeLayerDistillConfig, removed: int) -> int:
    """The most bytes at once of a healing, models and optimizer included."""
    release()
    before = torch.cuda.memory_allocated() if run.on_gpu else 0
    with nullcontext() if run.on_gpu else LiveBytes() as live:
        (teacher,) = random_models(config, dtype=getattr(torch, way.dtype), device=run.device)
        ids = random_rows(run, 4000, 6 * args.per_device_train_batch_size, args.max_length).tolist()
        owner = IterativeLayerDistillTrainer(
            model=teacher, args=args, train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=load_tokenizer("embedded"), peft_config=lora_config(way.lora_r),
        )  # fmt: skip
        student, blocks = prune(teacher, [removed], share_weights=True), [removed - 1, removed]
        if way.trained == "all":
            blocks = list(range(student.config.num_hidden_layers))
        if run.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            live.peak = live.now
        trainer = HealingTrainer(owner, student, blocks, owner.train_dataset, run.scratch / "memory" / "healing")
        trainer.heal(next(student.parameters()).dtype)
        return torch.cuda.max_memory_allocated() - before if run.on_gpu else live.peak
