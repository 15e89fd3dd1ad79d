"""What a student loses against its teacher, and the loss that heals it: pure tensor functions.

Shapes: N valid positions, H hidden size, V vocabulary. No function holds an `(N, V)` tensor for all positions at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits held at a time: 4 MiB of float32 on a CPU, about what a core keeps in its caches; 256 MiB on a GPU.
MAX_LOGITS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}
MIN_ROWS_PER_CHUNK = 64  # fewer make the matrix products slow, whatever the vocabulary


def perplexity_of(loss: float) -> float:
    """`exp(loss)`, of nats per token; infinite if that is beyond a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def divergence(
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """How far apart the next-token distributions are, summed over positions: `(N, H), (N, H) -> ()`, nats.

    The generalized Jensen-Shannon divergence of [GKD](https://huggingface.co/papers/2306.13649) with the mixture
    m = `beta` teacher + (1 - `beta`) student: `beta` KL(teacher || m) + (1 - `beta`) KL(student || m). At its ends it
    is taken to be KL(teacher || student), `beta` 0, and KL(student || teacher), `beta` 1.

    Gradients reach the student's hidden states and, if it is trained, its head; a head has no bias in any supported
    family. As in [Hinton et al.](https://huggingface.co/papers/1503.02531) the value is scaled by `temperature`
    squared, so that the size of the gradients does not depend on it.
    """
    weights = (student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    return Divergence.apply(*weights, temperature, beta)


class Divergence(torch.autograd.Function):
    """[`divergence`], with its gradient computed in the forward pass, a chunk of positions at a time.

    The result is one number, so the backward pass only scales the gradients. No logits are kept, and none are computed
    twice, unlike in TRL's chunked kernel (`benchmarks/kl.py`). Nor is a head needed in the backward pass, when FSDP2
    may have split its weights again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N, H)
        student_weight: Tensor,  # (V, H)
        teacher_hidden: Tensor,  # (N, H)
        teacher_weight: Tensor,  # (V, H)
        temperature: float,
        beta: float,
    ) -> Tensor:
        device = student_hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
        with torch.autocast(device, enabled=False):
            weight = student_weight.to(dtype)
            is_shared = not ctx.needs_input_grad[1] and (
                student_weight is teacher_weight or student_weight.data_ptr() == teacher_weight.data_ptr()
            )
            reference_weight = weight if is_shared else teacher_weight.to(dtype)
            total = student_hidden.new_zeros((), dtype=torch.float32)
            grad_hidden = torch.empty_like(student_hidden)
            grad_weight = None
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(student_weight, dtype=torch.float32)
            for rows in _chunks(student_hidden, len(weight)):
                hidden = student_hidden[rows].to(dtype)
                student = _log_probabilities(hidden @ weight.T, temperature)
                teacher = _log_probabilities(teacher_hidden[rows].to(dtype) @ reference_weight.T, temperature)
                value, grad_logits = _divergence_of_log_probabilities(student, teacher, beta)
                total += value
                grad_logits = grad_logits.to(dtype)
                grad_hidden[rows] = (grad_logits @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ hidden
                del student, teacher, grad_logits  # before the next chunk has its own
        ctx.temperature, ctx.weight_dtype = temperature, student_weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output * ctx.temperature
        grad_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden * scale, grad_weight, None, None, None, None


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, -1)


def _divergence_of_log_probabilities(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The sum over positions and its gradient by the student's logits, `(N, V)`; both inputs are used up."""
    if beta == 0:
        probabilities = teacher.exp()
        value = teacher.sub_(student).mul_(probabilities).sum()
        return value, student.exp_().sub_(probabilities)
    own = student.exp()
    if beta == 1:
        over = student.sub_(teacher)
        parts = over.mul_(own)
        of_position = parts.sum(-1, keepdim=True)
        return of_position.sum(), parts.sub_(own.mul_(of_position))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = teacher.exp().mul_(teacher.sub_(mixture)).sum()
    parts = student.sub_(mixture).mul_(own)
    of_position = parts.sum(-1, keepdim=True)
    value = beta * of_teacher + (1 - beta) * of_position.sum()
    return value, parts.sub_(own.mul_(of_position)).mul_(1 - beta)


def hidden_state_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the hidden dimension per position, in float32: `(N, H), (N, H) -> (N,)`."""
    return (student.float() - teacher.float()).pow(2).mean(-1)


def relative_hidden_state_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """`hidden_state_mse` over the teacher's own mean square: 0 is equal, 1 as far off as the zero vector, `(N,)`.

    Hidden states differ by orders of magnitude between layers and models; the ratio has one unit for all.
    """
    scale = teacher.float().pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return hidden_state_mse(student, teacher) / scale


def next_token_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Negative log-likelihood of `labels`, in nats, per position, with gradients: `(N, H), (N,) -> (N,)`."""

    def chunk_loss(states: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), target, reduction="none")

    rows = _chunks(labels, head.out_features)
    return torch.cat([checkpoint(chunk_loss, hidden[r], labels[r], use_reentrant=False) for r in rows])


@dataclass
class TowerStates:
    """What student and teacher computed at N valid positions."""

    student_final: Tensor  # (N, H), after the final norm
    teacher_final: Tensor
    student: list[Tensor]  # (N, H) each, hidden states to compare with those of the teacher
    teacher: list[Tensor]


def parts_of_loss(
    towers: TowerStates, student_head: nn.Linear, teacher_head: nn.Linear, labels: Tensor, args: Any
) -> dict[str, Tensor]:
    """The parts of the healing loss that `args`, the settings of a run, ask for, each a sum over N positions;
    `num_tokens` is N. `labels` `(N,)` follow the positions."""
    paper = args.loss_preset == "paper"
    distance = hidden_state_mse if paper else relative_hidden_state_mse
    hidden = [distance(*pair).sum() for pair in zip(towers.student, towers.teacher, strict=True)]
    hidden = hidden[-1:] if paper else hidden
    student_final, teacher_final = towers.student_final, towers.teacher_final
    parts = {
        "hidden": torch.stack(hidden).mean() if hidden else student_final.new_zeros((), dtype=torch.float32),
        "final_hidden": distance(student_final, teacher_final).sum(),
    }
    if args.kl_weight or paper:
        heads = (student_final, student_head, teacher_final, teacher_head)
        parts["kl"] = divergence(*heads, args.temperature, args.beta)
    if args.lm_weight:
        parts["lm"] = next_token_loss(student_final, student_head, labels).sum()
    return parts | {"num_tokens": torch.tensor(max(1, len(labels)), device=student_final.device)}


def loss_of_parts(parts: dict[str, Tensor], args: Any) -> Tensor:
    """The healing loss of what [`parts_of_loss`] gives: a sum over positions, or the paper's of a micro-batch."""
    hidden = parts["hidden"] + parts["final_hidden"]
    if args.loss_preset == "paper":
        return parts["kl"] / 100 + hidden / parts["num_tokens"]
    total = args.hidden_weight * hidden / 2
    if "kl" in parts:
        total = total + args.kl_weight * parts["kl"]
    return total + args.lm_weight * parts["lm"] if "lm" in parts else total


@torch.no_grad()
def token_statistics(
    hidden: list[Tensor],
    head: nn.Linear,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    with_agreement: bool = False,
) -> list[dict[str, Tensor]]:
    """Measure several final hidden states `(N, H)` of the same positions at once, against those of a teacher, if there
    is one: it is projected once for all. `labels` `(N,)` follow the positions.

    For each: `nll` of the labels, nats; `kl` (teacher || model), nats; `agreement` on the first token; `(N,)` each.
    """
    parts: list[list[dict[str, Tensor]]] = [[] for _ in hidden]
    for rows in _chunks(labels, head.out_features):
        target = labels[rows].unsqueeze(-1)
        if teacher_hidden is not None:
            reference = F.log_softmax(teacher_head(teacher_hidden[rows]).float(), -1)
            favourite = reference.argmax(-1) if with_agreement else None
            probabilities = reference.exp()
            negative_entropy = reference.mul_(probabilities).sum(-1)
        for states, collected in zip(hidden, parts, strict=True):
            logits = head(states[rows]).float()
            log_z = logits.logsumexp(-1)
            statistics = {"nll": log_z - logits.gather(-1, target).squeeze(-1)}
            if teacher_hidden is not None:
                if with_agreement:
                    statistics["agreement"] = logits.argmax(-1) == favourite
                # No matrix product: on a CPU that adds up in one float32, which is off by 1e-3 at 150,000 tokens.
                statistics["kl"] = negative_entropy - logits.sub_(log_z.unsqueeze(-1)).mul_(probabilities).sum(-1)
            collected.append(statistics)
    return [{name: torch.cat([part[name] for part in collected]) for name in collected[0]} for collected in parts]


def _chunks(rows: Tensor, vocabulary: int) -> Iterator[slice]:
    limit = MAX_LOGITS_PER_CHUNK.get(rows.device.type, MAX_LOGITS_PER_CHUNK["cuda"])
    step = max(MIN_ROWS_PER_CHUNK, limit // vocabulary)
    return (slice(start, start + step) for start in range(0, len(rows), step))
