"""The optimiser Muon in float32: momentum with orthogonalised updates, for matrices.

`torch.optim.Muon` computes in bfloat16. On a CPU without bfloat16 units a step would take minutes
instead of 0.3 s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Moves the singular values of a matrix towards one, by Newton-Schulz iteration.

    Args:
        matrix: ``(..., rows, columns)``, float32, since bfloat16 is slow on CPUs.
        steps: Number of iterations.

    Source: https://kellerjordan.github.io/posts/muon, for the quintic coefficients.
    """
    wide = matrix.mT if matrix.size(-2) > matrix.size(-1) else matrix
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.size(-2) > matrix.size(-1) else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, scaled by the matrix's shape; decoupled weight decay."""

    def __init__(
        self, params, lr: float | Tensor = 0.02, momentum: float = 0.95, decay: float = 0.01
    ):
        """Takes matrices only.

        Args:
            params: Parameters with two axes.
            lr: Learning rate, a number or a scalar tensor; singular values of updates are near one.
            momentum: Momentum factor.
            decay: Weight decay, relative to ``lr``.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                _step(params, group, self.state)


def _step(params: list[nn.Parameter], group: dict, states: dict) -> None:
    """Updates all matrices of one shape in a batch, since kernel launches dominate on a GPU."""
    momenta = [states[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
    grads = [p.grad for p in params]
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, grads)
    ahead = torch.stack(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
    updates = list(orthogonal(ahead).unbind())
    rows, columns = params[0].shape
    torch._foreach_mul_(updates, -group["lr"] * max(1, rows / columns) ** 0.5)
    torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
    torch._foreach_add_(params, updates)
