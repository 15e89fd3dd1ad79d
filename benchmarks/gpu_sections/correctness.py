"""Results on this device against literal references, in float32 and bfloat16.

Every case says what it compared, how far the two are apart, how far they may be, and whether that is `ok`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import healing
import kl
import scoring
import torch
from merging_reference import literal_model
from parallel_reference import literal
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, StaticCache, TrainerCallback
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
from hf_layerprune.compensation import DEFAULT_RIDGE
from hf_layerprune.forward import CACHE
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
        *((f"merged blocks, {family}", partial(merged, run, family)) for family in ("qwen2", "qwen3")),
        ("greedy tokens of every cache", partial(caches, run)),
        ("gradients against full logits", partial(gradients, run)),
        ("divergence against full logits", partial(divergences, run)),
        ("resume", partial(resume, run)),
        ("compiled decoding", partial(compiled, run)),
    ]
    return found


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


def merged(run: Run, family: str) -> dict[str, Any]:
    """Two layers fitted into one, against the dense solution on the CPU: as a whole model, as blocks are compared."""
    plain, layers = small_model(family, 5, torch.device("cpu")), (2, 3)
    ids = random_rows(run, 512, 8, 64)
    batch = {"input_ids": ids.cpu(), "attention_mask": torch.ones_like(ids.cpu())}
    student = merge(small_model(family, 5, run.device), [layers], [{"input_ids": ids}])
    reference = literal_model(copy.deepcopy(student).cpu(), plain, layers, [batch], DEFAULT_RIDGE).to(run.device)
    exact = logits(reference, ids, "sdpa")
    found = {"float32": judged(relative_error(logits(student, ids, "sdpa"), exact), 1e-3)}
    half, plain_half = (logits(model.bfloat16(), ids, "sdpa") for model in (student, reference))
    return found | {"bfloat16": judged(relative_error(half, exact), HALF_TIMES * relative_error(plain_half, exact))}


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
    """A static cache whose steps are compiled: their logits against those without, and `generate` compiled, timed."""
    model, ids = parallelize(small_model("qwen3", 7, run.device), GROUPS), random_rows(run, 512, 2, 12)
    plain, fast = (cached_logits(model, ids, step) for step in (model, compile_step(run, model)))
    found: dict[str, Any] = judged(relative_error(fast, plain), 1e-4)
    if run.on_gpu:
        load = Load(prompt_tokens=16, new_tokens=16, repeats=1, cache_implementation="static")
        reports = [benchmark_models([model], **vars(replace(load, compile=on)))[0] for on in (False, True)]
        plain_speed, fast_speed = (report.decode_tokens_per_second for report in reports)
        found["tokens_per_second"] = {"static cache": plain_speed, "compiled": fast_speed}
    return found


def compile_step(run: Run, model: PreTrainedModel) -> Any:
    """As for a GPU there; elsewhere in one graph all the same, which no compiler is needed for."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="inductor" if run.on_gpu else "eager")


@torch.no_grad()
def cached_logits(model: PreTrainedModel, ids: torch.Tensor, step: Any) -> torch.Tensor:
    """Logits of the last three tokens, each a step of a static cache."""
    cache, prompt = StaticCache(config=model.config, max_cache_len=ids.shape[1]), ids.shape[1] - 3
    model(input_ids=ids[:, :prompt], **{CACHE: cache}, use_cache=True)
    steps = [step(input_ids=ids[:, n : n + 1], **{CACHE: cache}, use_cache=True).logits.clone()
             for n in range(prompt, ids.shape[1])]  # fmt: skip
    return torch.cat(steps, 1)


def gradients(run: Run) -> dict[str, Any]:
    """The healing step of the embedded teacher: ours against full logits without shared weights."""
    shape = healing.SHAPES["embedded"] | ({"rows": 2, "length": 32} if run.tiny else {})
    found = {}
    for name, allowed in (("float32", 1e-3), ("bfloat16", 0.1)):
        teacher = healing.make_teacher(shape, getattr(torch, name))
        found[name] = judged(healing.gradient_difference(teacher, shape), allowed)
    return found


def divergences(run: Run) -> dict[str, Any]:
    """Our own form; TRL's Triton kernels and Liger's form stand next to it, all with their time."""
    shape, found = (64, 32, 1024) if run.tiny else (2048, 2048, 151_936), {}
    for dtype, train_head in ((torch.float32, True), (torch.bfloat16, False)):
        rows = kl.measure(shape, train_head, dtype, run.repeats)
        allowed = 1e-3 if dtype == torch.float32 else 0.05
        apart = max(rows["ours"]["value_difference"], rows["ours"]["gradient_difference"])
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
