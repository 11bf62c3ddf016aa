"""Muon in float32: momentum whose update is made orthogonal, for the matrices of a small model."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Moves the singular values of a matrix towards one, by Newton-Schulz iteration.

    Args:
        matrix: ``(rows, columns)``, float32; bfloat16, as elsewhere, is slow on CPUs.
        steps: Iterations.

    Source: https://kellerjordan.github.io/posts/muon, its quintic coefficients.
    """
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, scaled by the matrix's shape; decoupled weight decay."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, decay: float = 0.01):
        """Takes matrices only.

        Args:
            params: Parameters with two axes.
            lr: Step length; the update's singular values are near one.
            momentum: Share of the past in the running gradient.
            decay: Weight decay, relative to ``lr``.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                running = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonal(p.grad + group["momentum"] * running)
                scale = max(1, p.size(0) / p.size(1)) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * scale)
