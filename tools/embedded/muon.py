"""Muon (Jordan et al. 2024): momentum whose every matrix is made orthogonal, so that weak directions are learnt too.

What the UNet learns first, a linear map of the noise for each class, is mostly weak directions. Torch's own Muon takes
matrices alone; the UNet's weights are convolutions for the most part, here matrices of output channels by all else.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from tools.embedded.arithmetic import compute_dtype

MOMENTUM = 0.95
# The quintic that takes singular values in 0..1 to about 1 within five turns, and the factor that gives an update the
# size of Adam's (0.2 is the RMS of Adam's updates): Jordan et al. 2024; Liu et al. 2025, "Muon is scalable".
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5
ADAMS_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions or more; `lr` is on Adam's scale."""

    def __init__(self, weights: Iterable[Tensor], lr: float) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.mul_(MOMENTUM).add_(weight.grad)
                update = orthogonal((weight.grad + MOMENTUM * momentum).flatten(1))
                size = ADAMS_SIZE * max(update.shape) ** 0.5
                weight.sub_(update.view(weight.shape), alpha=group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1, by Newton-Schulz, which bears few digits."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(compute_dtype())
    x = x / (x.norm() + 1e-7)
    for _ in range(TURNS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.T if tall else x).float()
    return result
