"""Heal one student: train some of its layers to bring it back to its teacher.

Loss: KL of the next-token distributions + squared error of hidden states (+ next-token loss), each per token with
padding masked out. https://huggingface.co/papers/2511.05085
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..data import Batch, valid_next_tokens
from ..errors import LayerPruneError
from ..losses import forward_kl, hidden_state_mse, next_token_loss, relative_hidden_state_mse
from ._trl import log_metric, redirect_forward
from .config import IterativeLayerDistillConfig
from .targets import HiddenStateMap
from .towers import run_towers


class LayerHealingTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] with the loss of layer-wise distillation from `self.teacher`.

    The teacher is a plain attribute: it is in no state dict, no optimizer and no wrapper. `shared_depth` says how many
    blocks it runs for both; see [`~towers.shared_depth`].
    """

    args: IterativeLayerDistillConfig
    loss_is_scaled_for_ga = True  # the loss is divided by the token count of the whole optimizer step

    teacher: PreTrainedModel
    hidden_state_map: HiddenStateMap
    shared_depth: int | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            parts = redirect_forward(model, student, self.loss_parts, student, inputs)
        num_tokens = parts.pop("num_tokens")
        if self.args.loss_preset == "paper":
            loss = parts["kl"] / 100 + (parts["hidden"] + parts["final_hidden"]) / num_tokens
            loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        else:
            args = self.args
            total = args.hidden_weight * (parts["hidden"] + parts["final_hidden"]) / 2
            if args.kl_weight:
                total = total + args.kl_weight * parts["kl"]
            if args.lm_weight:
                total = total + args.lm_weight * parts["lm"]
            loss = total / (num_tokens if num_items_in_batch is None else num_items_in_batch)
            if args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients over processes
        for name, value in parts.items():
            log_metric(self, f"{name}_loss", (value.detach() / num_tokens).item())
        return (loss, parts) if return_outputs else loss

    def loss_parts(self, student: PreTrainedModel, inputs: Batch) -> dict[str, Tensor]:
        """The parts of the loss, each a sum over the valid positions, and the number of these."""
        student = student.get_base_model() if is_peft_model(student) else student
        valid, labels = valid_next_tokens(inputs)
        forward_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        towers = run_towers(student, self.teacher, forward_inputs, valid, self.hidden_state_map, self.shared_depth)
        distance = hidden_state_mse if self.args.loss_preset == "paper" else relative_hidden_state_mse
        hidden = [distance(own, its).sum() for own, its in zip(towers.student, towers.teacher, strict=True)]
        student_final, teacher_final = towers.student_final, towers.teacher_final
        if self.args.loss_preset == "paper":
            hidden = hidden[-1:]
        parts = {
            "hidden": torch.stack(hidden).mean() if hidden else student_final.new_zeros((), dtype=torch.float32),
            "final_hidden": distance(student_final, teacher_final).sum(),
        }
        if self.args.kl_weight or self.args.loss_preset == "paper":
            parts["kl"] = forward_kl(
                student_final, student.lm_head, teacher_final, self.teacher.lm_head, self.args.temperature
            )
        if self.args.lm_weight:
            parts["lm"] = next_token_loss(student_final, student.lm_head, labels).sum()
        return parts | {"num_tokens": torch.tensor(max(1, len(labels)), device=student_final.device)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise LayerPruneError(
                f"the healing loss became {loss.item()} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}; lower the learning rate (now {self.args.learning_rate:g}) or train in "
                "higher precision"
            )
        return loss
