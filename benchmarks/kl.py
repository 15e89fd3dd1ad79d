"""One forward-KL step (value and gradients) four ways, side by side: full logits, TRL's kernel, Liger's loss, ours.

    python benchmarks/kl.py --output benchmarks/results/kl.json

Forms take turns within each repetition; the median of each and its ratio to full logits are reported.

Liger's loss takes part where `liger-kernel` is installed (on a CPU `pip install --no-deps liger-kernel` is enough, as
this part of it needs no Triton), and the output says where it is not. It is compiled on a GPU, as by its defaults, and
runs as it is written on a CPU. It always computes the head's gradient, and its softmax is taken in the dtype of its
inputs, which is the one autocast computes in.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.losses import Divergence

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
except Exception:  # not installed, or of a release that does not fit the others
    LigerFusedLinearJSDLoss = None

SHAPES = {"embedded teacher": (4096, 192, 4096), "Qwen2.5 vocabulary": (512, 256, 151_936)}  # N, H, V


def full_logits(student: Tensor, student_head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    log_p = F.log_softmax(teacher_head(teacher).float(), -1)
    log_q = F.log_softmax(student_head(student).float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def trl(student: Tensor, student_head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    heads = (student_head.weight, None, teacher, teacher_head.weight, None)
    values, _ = ChunkedDivergenceFunction.apply(student, *heads, 0.0, 1.0)
    return values.sum()


def ours(student: Tensor, student_head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    return Divergence.apply(student, student_head.weight, teacher, teacher_head.weight, 1.0, 0.0)


def liger(student: Tensor, student_head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
    tensors = [tensor.to(dtype) for tensor in (student, student_head.weight, teacher, teacher_head.weight)]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=student.is_cuda)
    with torch.autocast(device, enabled=False):
        return loss(*tensors, torch.zeros(len(student), dtype=torch.long, device=student.device)) * len(student)


FORMS: dict[str, Callable[..., Tensor]] = {"full logits": full_logits, "TRL chunked": trl, "ours": ours}
if LigerFusedLinearJSDLoss is not None:
    FORMS["Liger chunked"] = liger


def measure(shape: tuple[int, int, int], train_head: bool, dtype: torch.dtype, repeats: int) -> dict[str, dict]:
    n, h, v = shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student, teacher = torch.randn(n, h, device=device, requires_grad=True), torch.randn(n, h, device=device)
    student_head, teacher_head = (nn.Linear(h, v, bias=False, device=device) for _ in range(2))
    student_head.weight.requires_grad_(train_head)
    teacher_head.weight.requires_grad_(False)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    gradients: dict[str, Tensor] = {}
    values: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, form in FORMS.items():
            student.grad = student_head.weight.grad = None
            start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.no_grad():
                fixed = teacher.clone()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                value = form(student, student_head, fixed, teacher_head)
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            gradients[name], values[name] = student.grad.clone(), value.item()
    reference, whole = gradients["full logits"], values["full logits"]
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio_to_full_logits": statistics.median(times) / statistics.median(seconds["full logits"]),
            "value_difference": abs(values[name] - whole) / whole,
            "gradient_difference": ((gradients[name] - reference).norm() / reference.norm()).item(),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--positions", type=int, help="Measure this many positions in place of each shape's own.")
    args = parser.parse_args()
    liger = importlib.metadata.version("liger-kernel") if LigerFusedLinearJSDLoss is not None else "not installed"
    print(f"liger-kernel: {liger}")
    results = {}
    for name, shape in SHAPES.items():
        shape = (args.positions or shape[0], *shape[1:])
        for train_head in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                key = f"{name} {shape}, head {'trained' if train_head else 'frozen'}, {str(dtype)[6:]}"
                results[key] = measure(shape, train_head, dtype, args.repeats)
                print(key)
                for form, row in results[key].items():
                    print(f"  {form:13} {row['seconds']:8.3f} s  {row['ratio_to_full_logits']:5.2f}x  "
                          f"gradient {row['gradient_difference']:.1e}")  # fmt: skip
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"command": "python benchmarks/kl.py", "environment": environment() | {"liger-kernel": liger}}
        write_atomically(args.output, to_json(about | {"results": results}))


if __name__ == "__main__":
    main()
