"""Heal one student: train some of its layers so that it matches its teacher again.

The loss is the divergence of the next-token distributions + the distance of hidden states (+ the next-token loss),
each per token, without padding: [`~losses.parts_of_loss`]. https://huggingface.co/papers/2511.05085

What student and teacher have in common is held once in memory and runs once: below the lowest block in which they
differ, the teacher runs for both, without gradients, and the student continues from there.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints, set_seed
from trl import SFTTrainer

from .._trl import keep_weights_in_place, redirect_forward, set_model
from ..compensation import target_state
from ..data import Batch, valid_next_tokens
from ..errors import LayerPruneError, NotANumber
from ..files import sync_folder
from ..forward import record, replay
from ..losses import TowerStates, loss_of_parts, parts_of_loss
from ..plan import LayerPlan
from ..record import Healing
from ..surgery import plan_of
from .config import IterativeLayerDistillConfig
from .engines import autocast, fill_outline, frozen_head, outline, splits_model, without_adapters
from .trainable import fold_adapters, make_trainable

if TYPE_CHECKING:
    from .iterative import IterativeLayerDistillTrainer

COMPILER = "inductor"  # the backend of `torch.compile`
NOT_CALLED = (
    "compute_loss", "training_step", "create_optimizer", "create_scheduler", "create_optimizer_and_scheduler",
    "get_train_dataloader", "get_batch_samples", "_get_train_sampler",
)  # fmt: skip
"""Methods of an [`IterativeLayerDistillTrainer`] that no healing calls."""


class HealingTrainer(Trainer):
    """One healing of one student: a [`~transformers.Trainer`] with the loss of layer-wise distillation.

    The teacher is a plain attribute: it is in no state dict, no optimizer and no wrapper. It runs the first
    [`shared_depth`] blocks for both models. The settings, callbacks and teacher are those of `owner`. `student` may
    share weights with the teacher: what is trained, the `blocks` or all weights if the settings say so, is copied.
    `on_checkpoint` is called after each whole checkpoint in `folder`, with its step as `checkpoint` and what was taken
    until then as `healing`. `frozen_head` is the student's head if an engine splits the model's own and nothing trains
    it.
    """

    args: IterativeLayerDistillConfig
    loss_is_scaled_for_ga = True  # the loss is divided by the token count of the whole optimizer step

    def __init__(
        self,
        owner: IterativeLayerDistillTrainer,
        student: PreTrainedModel,
        blocks: list[int],
        rows: Dataset | IterableDataset,
        folder: Path,
        on_checkpoint: Callable[..., None] = lambda checkpoint, healing: None,
    ) -> None:
        self.owner, self.teacher, self.folder, self.on_checkpoint = owner, owner.teacher, folder, on_checkpoint
        self.compared = compared_states(plan_of(student), plan_of(self.teacher), blocks)
        trained = make_trainable(student, blocks, owner.args.trained_layers == "all", owner._peft_config)
        self.shared_depth = shared_depth(trained, self.teacher)
        use_cache = trained.config.use_cache  # which a `Trainer` sets
        args = copy.copy(owner.args)
        args.push_to_hub, args.report_to, args.enable_jit_checkpoint = False, [], False
        super().__init__(
            trained,
            args,
            owner.data_collator,
            rows,
            eval_dataset=rows,  # never read: `evaluate` measures as the rounds do
            processing_class=owner.processing_class,
            optimizer_cls_and_kwargs=owner.optimizer_cls_and_kwargs,
        )
        trained.config.use_cache = use_cache
        set_model(owner, trained)
        self.callback_handler.callbacks = owner.callback_handler.callbacks
        self.model_accepts_loss_kwargs = True
        self._signature_columns = ["input_ids", "labels", "seq_lengths"]
        self._outline = outline(trained) if splits_model(self.accelerator) else None
        self.frozen_head = None if self._outline is None else frozen_head(self._outline)
        self._step_loss: Tensor | int = 0  # sum over the micro-batches of the step in progress
        self._parts: dict[str, list[Tensor]] = defaultdict(list)  # of the loss, since the last line of the log
        self._started = 0.0
        keep_weights_in_place(owner, trained)

    def heal(
        self, save_dtype: torch.dtype, checkpoint: Path | None = None, seconds: float = 0.0
    ) -> tuple[PreTrainedModel, TrainOutput]:
        """Train the student, from a `checkpoint` at which it had taken `seconds`, and round it to `save_dtype`.

        Returns the healed student, without adapters, and what [`~transformers.Trainer.train`] returns. Raises
        [`NotANumber`] if the loss or a weight is not finite.
        """
        self._started = time.perf_counter() - seconds
        set_seed(self.args.seed + self.owner.round)  # a `Trainer` that is made sets it to the same in every round
        self.accelerator.free_memory()
        if self.args.compile_layers:
            compile_layers([self.model, self.teacher])
        log_before = self.owner.state.log_history
        try:
            output = self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.state.log_history = log_before + self.state.log_history
            self.owner.state, self.owner.control = self.state, self.control
            if self.args.compile_layers:
                uncompile_layers([self.accelerator.unwrap_model(self.model), self.teacher])
        if not self.state.global_step:  # of which a `Trainer` only warns
            raise LayerPruneError("the healing made no step: the training data has less than a batch; give more text")
        healed = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        healed = healed if self._outline is None else fill_outline(self._outline, healed, self.args.device)
        self.model = self.model_wrapped = self.optimizer = self.lr_scheduler = self.deepspeed = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()
        return fold_adapters(healed, save_dtype), output

    @property
    def so_far(self) -> Healing:
        """What the healing has taken until now, over all sessions of the run."""
        return Healing(int(self.state.num_input_tokens_seen), time.perf_counter() - self._started)

    def create_accelerator_and_postprocess(self) -> None:
        """Reuse the run's accelerator; DeepSpeed allows only one."""
        for name in ("accelerator", "gather_function", "is_deepspeed_enabled", "is_fsdp_enabled", "is_tp_enabled"):
            if hasattr(self.owner, name):
                setattr(self, name, getattr(self.owner, name))

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Measure the student as the rounds do."""
        self.owner.state, self.owner.control = self.state, self.control
        return self.owner.evaluate(metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        parts = {name: fmean(torch.stack(values).tolist()) for name, values in self._parts.items()}
        self._parts.clear()
        super().log({"round": self.owner.round} | logs | parts, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint and report it when it is complete; not that of the last step, after which a `Trainer` that
        resumes would take one more."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones stay until it is whole
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit, step = limit, self.state.global_step
        self.accelerator.wait_for_everyone()
        if step < self.state.max_steps:
            if self.args.should_save:
                sync_folder(self.folder / f"checkpoint-{step}")
            if not self.args.save_only_model:  # from which no healing can continue
                self.on_checkpoint(checkpoint=step, healing=self.so_far)
            if self.args.should_save:
                rotate_checkpoints(str(self.folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        args, student = self.args, self.accelerator.unwrap_model(model)

        def parts_of_batch() -> dict[str, Tensor]:
            with autocast(self.accelerator):
                return self.loss_parts(student, inputs)

        parts = redirect_forward(model, student, parts_of_batch)
        loss, num_tokens = loss_of_parts(parts, args), parts.pop("num_tokens")
        if args.loss_preset == "paper":
            loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        else:
            of_step = num_tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            loss = loss / of_step.clamp_min(1)  # 0: no text
            if args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients over processes
        for name, value in parts.items():
            self._parts[f"{name}_loss"].append(value.detach() / num_tokens)
        return (loss, parts) if return_outputs else loss

    def loss_parts(self, student: PreTrainedModel, inputs: Batch) -> dict[str, Tensor]:
        """What [`~losses.parts_of_loss`] gives for a batch."""
        student = without_adapters(student)
        valid, labels = valid_next_tokens(inputs)
        places = valid.nonzero(as_tuple=True)  # once: each selection by a mask synchronizes with the GPU
        towers = run_towers(student, self.teacher, inputs, places, self.compared, self.shared_depth)
        return parts_of_loss(towers, self.frozen_head or student.lm_head, self.teacher.lm_head, labels, self.args)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Stops all processes if the loss of a step is not a finite number in one of them."""
        self.owner.state, self.owner.control = self.state, self.control  # for callbacks that hold the owner
        with self.owner.maybe_activation_offload_context:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        if self.accelerator.sync_gradients:
            value, self._step_loss = self.accelerator.reduce(self._step_loss, "sum").item(), 0
            if not math.isfinite(value):
                raise NotANumber(
                    f"the healing loss became {value} at step {self.state.global_step + 1} of {self.state.max_steps}; "
                    f"lower the learning rate (now {self.args.learning_rate:g}) or train in higher precision"
                )
        return loss


def compared_states(plan: LayerPlan, teacher_plan: LayerPlan, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of student and teacher hidden states to compare, by the positions of the blocks that output them.

    What a student's block hands on is compared with what the next layer reads in the teacher. After a gap that is the
    state after the removed layers, since the block before the gap now does their work too; after a pair it is the
    state after the pair's second layer. The last block's output is left out: that is the final state.
    """
    compared = []
    for position in blocks:
        reader, end = target_state(position, plan, teacher_plan), teacher_plan.position_of(plan.blocks[position][-1])
        if position < plan.depth - 1 and reader != end:  # else the teacher has no state between them
            compared.append((position, reader - 1))
    return compared


def check_overrides(kind: type[SFTTrainer]) -> None:
    """Refuse a trainer with methods of its own that would never be called: a [`HealingTrainer`] trains each round."""
    if own := [name for name in NOT_CALLED if getattr(kind, name) is not getattr(SFTTrainer, name)]:
        raise LayerPruneError(
            f"{kind.__name__} overrides {', '.join(own)}, but every round is healed by a trainer of its own; use the "
            "weights of the loss, optimizer_cls_and_kwargs or callbacks"
        )


def compile_layers(models: Sequence[nn.Module]) -> None:
    """Compile every layer where it is: half of the memory of a step on a GPU, and less time (`docs/healing.md`)."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # frozen, trained, wide, ...
    for model in models:
        for layer in without_adapters(model).base_model.layers:
            layer.compile(backend=COMPILER)


def uncompile_layers(models: Sequence[nn.Module]) -> None:
    """Undo [`compile_layers`]: scoring, evaluation and saving use the layers as they are."""
    for model in models:
        for layer in without_adapters(model).base_model.layers:
            layer._compiled_call_impl = None


def shared_depth(student: nn.Module, teacher: PreTrainedModel) -> int | None:
    """How many blocks, from the first, are the same weights in memory in both models and are not trained.

    `None` if both must run in full: they differ in the embedding or in how attention is computed (each kind has its
    own masks), or dropout drops other weights in each of them.
    """
    student = without_adapters(student)
    same_attention = student.config._attn_implementation == teacher.config._attn_implementation
    same_start = _same(student.get_input_embeddings(), teacher.get_input_embeddings())
    if student.config.attention_dropout or not same_attention or not same_start:
        return None
    student_blocks = zip(plan_of(student).blocks, student.base_model.layers, strict=True)
    teacher_blocks = zip(plan_of(teacher).blocks, teacher.base_model.layers, strict=True)
    depth = 0
    for (block, module), (teacher_block, teacher_module) in zip(student_blocks, teacher_blocks, strict=False):
        if block != teacher_block or not _same(module, teacher_module):
            break
        depth += 1
    return min(depth, len(teacher.base_model.layers) - 1)


def _same(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are the same weights in memory, which are not trained."""
    ours, theirs = list(module.parameters()), list(other.parameters())
    return len(ours) == len(theirs) and not any(
        a.requires_grad or a.data_ptr() != b.data_ptr() for a, b in zip(ours, theirs, strict=True)
    )


def run_towers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Batch,
    valid: Tensor | tuple[Tensor, ...],
    compared: Sequence[tuple[int, int]],
    shared: int | None,
) -> TowerStates:
    """Run both models, without wrappers, on a batch; the student with gradients.

    `valid` is a mask `(B, T)` of the N positions that count, or a tuple of their two indices `(N,)`. See
    [`compared_states`] for `compared`, [`shared_depth`] for `shared`.
    """
    student_numbers = {position + 1 for position, _ in compared}
    teacher_numbers = {position + 1 for _, position in compared}
    kind = inputs["input_ids"].device.type
    # autocast would keep a copy of every weight that asks for gradients, as those of a loaded teacher do
    with torch.no_grad(), torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        of_teacher = record(teacher, inputs, teacher_numbers if shared is None else teacher_numbers | {shared})
    if shared is None:
        of_student = record(student, inputs, student_numbers)
    else:
        decoder = student.base_model
        of_student = replay(of_teacher, shared, decoder.layers[shared:], decoder.norm, student_numbers)
    return TowerStates(
        of_student.final[valid],
        of_teacher.final[valid],
        [of_student.states[position + 1][valid] for position, _ in compared],
        [of_teacher.states[position + 1][valid] for _, position in compared],
    )
