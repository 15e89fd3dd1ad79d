"""Ridge regression that refits a linear layer, by whichever system of equations is smaller.

Shapes: N tokens, I inputs and H outputs of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LayerPruneError


class Regression:
    """Finds the weight W + C for which |E - A C'|^2 + c |C|^2 is least, for inputs A `(N, I)` and what the outputs
    lack, E `(N, H)`. The penalty, c = ridge |A|^2 / N, holds on to W.

    C' = (A'A + c)^-1 A'E = A' (AA' + c)^-1 E. The first form has I equations, and needs only sums over the tokens. The
    second has N, and is used if there are fewer tokens than inputs.

    Args:
        weight (`Tensor` of shape `(H, I)`): W.
        num_tokens (`int`): N, over all calls of `add`.
    """

    def __init__(self, weight: Tensor, num_tokens: int) -> None:
        outputs, inputs = weight.shape
        self.weight, self.num_tokens, self.num_added = weight, num_tokens, 0
        self.few_tokens = num_tokens < inputs
        size = min(num_tokens, inputs)
        self.left = weight.new_zeros(size, inputs, dtype=torch.float32)  # A'A; of few tokens A
        self.right = weight.new_zeros(size, outputs, dtype=torch.float32)  # A'E; of few tokens E

    @staticmethod
    def num_bytes(weight: Tensor, num_tokens: int) -> int:
        """What `left` and `right` take."""
        return 4 * min(num_tokens, weight.shape[1]) * sum(weight.shape)

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Add some tokens: rows of A and of E, in float32."""
        if self.few_tokens:
            rows = slice(self.num_added, self.num_added + len(inputs))
            self.left[rows], self.right[rows] = inputs, missing
        else:
            self.left.addmm_(inputs.T, inputs)  # in place, so that autocast leaves it in float32
            self.right.addmm_(inputs.T, missing)
        self.num_added += len(inputs)

    def solve(self, ridge: float) -> Tensor:
        """The new weight `(H, I)`, in the dtype of the present one.

        Raises:
            [`LayerPruneError`]: if the equations cannot be solved.
        """
        device = "cpu" if self.left.device.type == "mps" else self.left.device  # float64 is missing there
        with torch.autocast(self.left.device.type, enabled=False):
            gram = self.left @ self.left.T if self.few_tokens else self.left
            gram, right = (matrix.to(device, torch.float64) for matrix in (gram, self.right))
            gram.diagonal().add_(ridge * gram.trace() / self.num_tokens)
            factor, failed = torch.linalg.cholesky_ex(gram)
            solution = torch.cholesky_solve(right, factor).to(self.left)
            if failed or not solution.isfinite().all():
                raise LayerPruneError(
                    f"ridge={ridge} is too small for this data, or the model's states are not finite; choose a larger "
                    "ridge"
                )
            correction = self.left.T @ solution if self.few_tokens else solution  # (I, H)
        return (self.weight.float() + correction.T).to(self.weight.dtype)
