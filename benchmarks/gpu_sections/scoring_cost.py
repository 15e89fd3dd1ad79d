"""What it costs to score 36 layers: the shared prefix against the naive loop and against counting; races."""

from __future__ import annotations

from functools import partial
from typing import Any

import scoring
import torch

from gpu_sections.common import Case, Run, narrow, random_rows
from hf_layerprune import embedded_dataset, load_model, load_tokenizer, tokenized_batches
from hf_layerprune.benchmark import load_shape, random_models
from hf_layerprune.forward import to_device


def cases(run: Run) -> list[Case]:
    shapes = ["Qwen2.5-3B"] + ["Qwen3-0.6B", "Qwen3-8B"] * run.full
    return [("embedded teacher", partial(embedded, run)), *((shape, partial(random, run, shape)) for shape in shapes)]


def embedded(run: Run) -> dict[str, Any]:
    """Real weights: here a race has something to decide."""
    teacher, text = load_model("embedded", dtype=torch.float32).to(run.device), embedded_dataset("calibration")
    rows, length = (2, 16) if run.tiny else (64, 256)
    batches = tokenized_batches(text, load_tokenizer("embedded"), max_length=length, num_rows=rows, batch_size=16)
    batches = [to_device(batch, run.device) for batch in batches]
    return scoring.compare(teacher, batches, run.repeats, scoring.without_each(teacher))


def random(run: Run, shape: str) -> dict[str, Any]:
    """Random weights of a real shape: time alone means something."""
    config, rows, length, dtype = load_shape(shape), 8, 512, torch.bfloat16
    if run.tiny:
        config, rows, length, dtype = narrow(config, 6), 4, 16, torch.float32
    (model,) = random_models(config, dtype=dtype, device=run.device)
    batches = [{"input_ids": part} for part in random_rows(run, 500, rows, length).split(4)]
    return scoring.compare(model, batches, run.repeats if run.full else 1, scoring.without_each(model))
