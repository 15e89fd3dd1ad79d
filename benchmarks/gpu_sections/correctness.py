"""Results on this device against literal references, in float32 and bfloat16.

Every case says what it compared, how far the two are apart, how far they may be, and whether that is `ok`.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import healing
import kl
import scoring
import torch
from parallel_reference import literal
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import is_flash_attn_2_available

from gpu_sections.common import Case, Run, random_rows, relative_error, small_model
from gpu_sections.stepper import WARMUP, Stepper
from hf_layerprune import (
    IterativeLayerDistillConfig,
    IterativeLayerDistillTrainer,
    embedded_dataset,
    load_model,
    load_tokenizer,
    merge,
    parallelize,
    prune,
    score_layers,
)
from hf_layerprune.benchmark import Load, benchmark_models
from hf_layerprune.surgery import plan_of

GROUPS = ((1, 2), (3, 4, 5))
HALF_TIMES = 1.5
"""In bfloat16 no more than so many times the error of the literal equations in bfloat16, both against float32."""
ATTENTION = ("eager", "sdpa", "sdpa, flash kernel", "flash_attention_2")


def cases(run: Run) -> list[Case]:
    found: list[Case] = [("scores against the naive loop", partial(scores, run))]
    for family, attention in product(("qwen2", "qwen3"), ATTENTION):
        if attention != "flash_attention_2" or is_flash_attn_2_available():
            found.append((f"parallel blocks, {family}, {attention}", partial(blocks, run, family, attention)))
    found += [
        ("merged blocks against the CPU", partial(merged, run)),
        ("greedy tokens of every cache", partial(caches, run)),
        ("gradients against full logits", partial(gradients, run)),
        ("divergence against full logits", partial(divergences, run)),
        ("resume", partial(resume, run)),
    ]
    return found + [("compiled decoding", partial(compiled, run))] * run.on_gpu


def judged(difference: float, allowed: float, **more: Any) -> dict[str, Any]:
    return {"difference": difference, "allowed": allowed, "ok": difference <= allowed} | more


def scores(run: Run) -> dict[str, Any]:
    """KL without each layer, from the shared prefix and from whole forward passes."""
    found = {}
    for name, allowed in (("float32", 1e-3), ("bfloat16", 0.1)):
        model = small_model("qwen2", 6, run.device, getattr(torch, name))
        batches = [{"input_ids": random_rows(run, 512, 4, 32)}]
        fast, slow = score_layers(model, batches), scoring.naive(model, batches)
        apart = max(abs(fast.values[layer] - cost) / cost for layer, cost in slow.items())
        found[name] = judged(apart, allowed, same_choice=fast.safest == min(slow, key=slow.get))
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, attention: str) -> torch.Tensor:
    model.set_attn_implementation(attention.split(",")[0])
    if attention.endswith("flash kernel"):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return model(input_ids=ids, use_cache=False).logits.float()
    return model(input_ids=ids, use_cache=False).logits.float()


def blocks(run: Run, family: str, attention: str) -> dict[str, Any]:
    """A pair and a group of three against the two equations: closely in float32, as well as these in bfloat16."""
    ids, model = random_rows(run, 512, 2, 24), small_model(family, 7, run.device)
    student = parallelize(model, GROUPS)
    reference = literal(model, plan_of(student).blocks)
    exact, found = logits(reference, ids, "sdpa"), {}
    if "flash" not in attention or run.device.type == "cpu":  # a GPU's flash kernels have no float32
        found["float32"] = judged(relative_error(logits(student, ids, attention), exact), 1e-4)
    half = logits(parallelize(copy.deepcopy(model).bfloat16(), GROUPS), ids, attention)
    plain = logits(reference.bfloat16(), ids, "sdpa")
    allowed = HALF_TIMES * relative_error(plain, exact)
    return found | {"bfloat16": judged(relative_error(half, exact), allowed)}


def merged(run: Run) -> dict[str, Any]:
    """Two layers fitted into one here and on the CPU, from the same data."""
    results = []
    for device in (run.device, torch.device("cpu")):
        model = small_model("qwen2", 5, device)
        ids = random_rows(run, 512, 4, 64).to(device)
        results.append(logits(merge(model, [(2, 3)], [{"input_ids": ids}]), ids, "sdpa").cpu())
    return judged(relative_error(*results), 1e-2)


def caches(run: Run) -> dict[str, Any]:
    """The same greedy continuation with the dynamic cache, the static one, and a CUDA graph of a step."""
    model, prompt = parallelize(small_model("qwen3", 7, run.device), GROUPS), random_rows(run, 512, 2, 9)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    expected = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    stepper = Stepper(model, prompt, 16)
    skipped = WARMUP if run.on_gpu else 0  # taken before its graph was recorded
    found = torch.cat([stepper.step().clone() for _ in range(11 - skipped)], 1)
    by_step = torch.equal(found, expected[:, prompt.shape[1] + 1 + skipped :])
    is_same = torch.equal(static, expected)
    return {"static_cache": is_same, "step_by_step": by_step, "ok": is_same and by_step}


def compiled(run: Run) -> dict[str, Any]:
    """`generate` compiled with the static cache: it runs, and how fast next to the dynamic cache."""
    model = parallelize(small_model("qwen3", 7, run.device, torch.bfloat16), GROUPS)
    load = {"prompt_tokens": 16, "new_tokens": 16, "repeats": 1}
    (plain,) = benchmark_models([model], **vars(Load(**load)))
    (fast,) = benchmark_models([model], **vars(Load(**load, cache_implementation="static", compile=True)))
    speeds = {"plain": plain.decode_tokens_per_second, "compiled": fast.decode_tokens_per_second}
    return {"tokens_per_second": speeds, "ok": True}


def gradients(run: Run) -> dict[str, Any]:
    """The healing step of the embedded teacher: ours against full logits without shared weights."""
    shape = healing.SHAPES["embedded"] | ({"rows": 2, "length": 32} if run.tiny else {})
    found = {}
    for name, allowed in (("float32", 1e-3), ("bfloat16", 0.1)):
        teacher = healing.make_teacher(shape, getattr(torch, name))
        found[name] = judged(healing.gradient_difference(teacher, shape), allowed)
    return found


def divergences(run: Run) -> dict[str, Any]:
    """TRL's Triton kernels, our own form and Liger's, with their gradients and their time."""
    shape, found = (64, 32, 1024) if run.tiny else (2048, 2048, 151_936), {}
    for dtype, train_head in ((torch.float32, True), (torch.bfloat16, False)):
        rows = kl.measure(shape, train_head, dtype, run.repeats)
        allowed = 1e-3 if dtype == torch.float32 else 0.05
        apart = max(row["gradient_difference"] for name, row in rows.items() if "Liger" not in name)
        found[str(dtype).removeprefix("torch.")] = judged(apart, allowed, forms=rows, head_trained=train_head)
    return found


class Killed(Exception):
    """The end of a run that is cut."""


class KillAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def resume(run: Run) -> dict[str, Any]:
    """A run that is cut after a checkpoint and goes on ends with the weights of one that is not."""
    settings = {
        "target_num_layers": 2, "num_calibration_samples": 2, "num_eval_samples": 2, "trained_layers": "all",
        "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "max_length": 32,
        "packing": True, "packing_strategy": "wrapped", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "measure_speed": False, "learning_rate": 1e-3, "use_cpu": not run.on_gpu,
    }  # fmt: skip
    texts, start = embedded_dataset("calibration").select(range(16)), short_teacher(run)

    def trainer(name: str, *callbacks: TrainerCallback) -> IterativeLayerDistillTrainer:
        args = IterativeLayerDistillConfig(output_dir=str(run.scratch / name), **settings)
        return IterativeLayerDistillTrainer(
            model=start, args=args, train_dataset=texts, processing_class=load_tokenizer("embedded"),
            callbacks=list(callbacks),
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    try:
        trainer("cut", KillAtStep(3)).train()
    except Killed:
        cut = trainer("cut")
        cut.train(resume_from_checkpoint=True)
    ends = [torch.cat([parameter.flatten() for parameter in each.model.parameters()]) for each in (cut, whole)]
    return judged(relative_error(*ends), 1e-3)


def short_teacher(run: Run) -> PreTrainedModel:
    """Three layers of the embedded teacher."""
    model = load_model("embedded", dtype=torch.float32).to(run.device)
    short = prune(model, range(3, 16))
    short.config.layer_plan = None  # a teacher of its own
    return short
