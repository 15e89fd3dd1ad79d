"""One whole step of healing on fake tensors: the literal reference for what `hf_layerprune.memory` puts together."""

import copy
import warnings
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_layerprune.memory import (
    DEFAULT_LENGTH,
    LiveBytes,
    StepNeeds,
    _attention,
    _DivergenceOnGpu,
    _modules_stay,
    _tiles_of,
    _with_divergence,
)
from hf_layerprune.surgery import apply_plan, plan_of
from hf_layerprune.trainer.healing import parts_of_loss
from hf_layerprune.trainer.targets import HiddenStateMap, trained_blocks
from hf_layerprune.trainer.towers import run_towers
from hf_layerprune.trainer.trainable import lora_config, make_trainable


def simulate_step(config, args, edits, dtype, lora_r=None, on_gpu=False, mode=FakeTensorMode):
    """`StepNeeds` of a student of `config`; `mode` may be `nullcontext`, for real tensors."""
    peft_config = lora_config(lora_r)
    with mode(), LiveBytes() as live, _tiles_of(on_gpu), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the other name that checkpointing has had
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_attention(args))
        teacher.eval().requires_grad_(False)
        plan = plan_of(teacher)
        for edit in edits:
            plan = edit.apply(plan)
        student = apply_plan(teacher, plan, share_weights=True)
        trained = args.named_trained_layers() or args.trained_layers
        blocks = trained_blocks(plan, list(edits), trained)
        everything = args.trained_layers == "all" and peft_config is None
        shared = None if everything else min(*blocks, _first_difference(student, teacher))
        with _modules_stay():
            trainable = make_trainable(student, blocks, everything, peft_config).train()
        if args.gradient_checkpointing:
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        weights = live.now
        parameters = [p for p in trainable.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in parameters for _ in range(2)]  # AdamW's; its fused step needs no more
        step = partial(_step, teacher, student, args, blocks, shared, on_gpu)
        if args.gradient_accumulation_steps > 1:  # all micro-batches but the first find gradients there
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        live.take_peak()
        step()
        peak = live.take_peak()
        with FlopCounterMode(display=False) as counter:  # it keeps tensors alive
            step()
        del states
    flops = counter.get_total_flops()
    if on_gpu and _with_divergence(args):
        positions = args.per_device_train_batch_size * ((args.max_length or DEFAULT_LENGTH) - 1)
        flops += (5 + everything) * 2 * positions * config.hidden_size * config.vocab_size
    return StepNeeds(weights, sum(p.nbytes for p in parameters), peak, flops)


def _step(teacher, student, args, blocks, shared, on_gpu):
    """Forward and backward on a full batch. Gradients are kept."""
    rows, length = args.per_device_train_batch_size, args.max_length or DEFAULT_LENGTH
    ids = torch.zeros(rows, length, dtype=torch.long)
    valid = (torch.arange(rows).repeat_interleave(length - 1), torch.arange(length - 1).repeat(rows))
    labels = torch.zeros(len(valid[0]), dtype=torch.long)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), blocks)
    without_divergence = copy.copy(args)
    if on_gpu:
        without_divergence.kl_weight, without_divergence.loss_preset = 0, None
    with torch.autocast("cpu", torch.float16 if args.fp16 else torch.bfloat16, enabled=bool(args.bf16 or args.fp16)):
        updates = args.hidden_target == "updates"
        towers = run_towers(student, teacher, {"input_ids": ids}, valid, states, shared, updates)
        parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, labels, without_divergence)
        if on_gpu and _with_divergence(args):
            heads = (towers.student_final, student.lm_head.weight, towers.teacher_final, teacher.lm_head.weight)
            parts["kl"] = _DivergenceOnGpu.apply(*heads)
        del towers
    (parts["hidden"] + parts["final_hidden"] + parts.get("kl", 0) + parts.get("lm", 0)).backward()


def _first_difference(student, teacher):
    """Position of the first block that is not the same in both."""
    both = zip(plan_of(student).blocks, plan_of(teacher).blocks, strict=False)
    depth = student.config.num_hidden_layers
    return next((position for position, (own, its) in enumerate(both) if own != its), depth)
