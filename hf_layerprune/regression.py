"""Ridge regression in closed form, over tokens that come a batch at a time.

Shapes: N tokens, I inputs, H outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LayerPruneError


class Inputs:
    """What a projection reads, A `(N, I)`: sums of its products, A'A or, for fewer tokens than inputs, A itself.

    N is `num_tokens`, over all calls of `add`.
    """

    def __init__(self, num_inputs: int, num_tokens: int, device: torch.device) -> None:
        self.num_inputs, self.num_tokens, self.num_added = num_inputs, num_tokens, 0
        self.few_tokens = num_tokens < num_inputs
        self.left = torch.zeros(min(num_tokens, num_inputs), num_inputs, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        """Add some tokens, in float32."""
        self._add(self.left, rows, rows)
        self.num_added += len(rows)

    def _add(self, sums: Tensor, rows: Tensor, others: Tensor) -> None:
        if self.few_tokens:
            sums[self.num_added : self.num_added + len(rows)] = others
        else:
            sums.addmm_(rows.T, others)  # in place, so that autocast leaves it in float32

    def gram(self) -> Tensor:
        """A'A `(I, I)`."""
        return self.left.T @ self.left if self.few_tokens else self.left

    def leverage(self, ridge: float) -> Tensor:
        """Ridge leverage scores `(I,)`: how little of each input the others can replace, with a penalty of `ridge`
        mean eigenvalues of A'A. They are the diagonal of A'A (A'A + c)^-1 = A' (AA' + c)^-1 A.
        """
        left = self.left.to(_device(self.left), torch.float64)
        factor, penalty = _factor(left @ left.T if self.few_tokens else left, ridge, self.num_inputs)
        if penalty == 0:  # no input is ever active
            return torch.zeros_like(self.left[0])
        if self.few_tokens:
            scores = (left * torch.cholesky_solve(left, factor)).sum(dim=0)
        else:
            scores = 1 - penalty * torch.cholesky_inverse(factor).diagonal()
        return scores.to(self.left)


class Regression(Inputs):
    """Finds the weight W + C, `(H, I)`, for which |E - A C'|^2 + c |C|^2 is least, for inputs A `(N, I)` and what the
    outputs lack, E `(N, H)`. The penalty, c = ridge |A|^2 / N, holds on to W.

    C' = (A'A + c)^-1 A'E = A' (AA' + c)^-1 E. The first form has I equations, and needs only sums over the tokens. The
    second has N, and is used if there are fewer tokens than inputs.
    """

    def __init__(self, weight: Tensor, num_tokens: int) -> None:
        super().__init__(weight.shape[1], num_tokens, weight.device)
        self.weight = weight
        self.right = self.left.new_zeros(len(self.left), len(weight))  # A'E; of few tokens E

    @staticmethod
    def num_bytes(weight: Tensor, num_tokens: int) -> int:
        """What `left` and `right` take."""
        return 4 * min(num_tokens, weight.shape[1]) * sum(weight.shape)

    def add(self, rows: Tensor, missing: Tensor) -> None:  # type: ignore[override]
        """Add some tokens: rows of A and of E, in float32."""
        self._add(self.right, rows, missing)
        super().add(rows)

    def solve(self, ridge: float) -> Tensor:
        """The new weight `(H, I)`, in the dtype of the present one."""
        with torch.autocast(self.left.device.type, enabled=False):
            gram = self.left @ self.left.T if self.few_tokens else self.left
            solution = solve_ridge(gram, self.right, ridge, self.num_tokens)
            correction = self.left.T @ solution if self.few_tokens else solution  # (I, H)
        return (self.weight.float() + correction.T).to(self.weight.dtype)


def solve_ridge(gram: Tensor, right: Tensor, ridge: float, num_tokens: int) -> Tensor:
    """Solve (G + c) X = R for symmetric G, `(I, I)`, where c = ridge trace(G) / `num_tokens`; X and R are `(I, H)`."""
    factor, penalty = _factor(gram, ridge, num_tokens)
    if penalty == 0:  # nothing was read, so nothing can be changed
        return torch.zeros_like(right)
    solution = torch.cholesky_solve(right.to(factor), factor).to(gram)
    if not solution.isfinite().all():
        raise _unsolved(ridge)
    return solution


def _factor(gram: Tensor, ridge: float, count: int) -> tuple[Tensor, float]:
    """Return the Cholesky factor of G + c I in float64, and c = ridge trace(G) / `count`; if c is 0, G itself."""
    regular = gram.to(_device(gram), torch.float64, copy=True)
    if penalty := ridge * regular.trace().item() / count:
        regular.diagonal().add_(penalty)
        regular, failed = torch.linalg.cholesky_ex(regular)
        if failed:
            raise _unsolved(ridge)
    return regular, penalty


def _unsolved(ridge: float) -> LayerPruneError:
    return LayerPruneError(
        f"ridge={ridge} is too small for this data, or the model's states are not finite; choose a larger ridge"
    )


def _device(tensor: Tensor) -> torch.device | str:
    return "cpu" if tensor.device.type == "mps" else tensor.device  # float64 is missing there
