"""Muon (Jordan et al. 2024): momentum whose every matrix is made orthogonal, so that weak directions are learnt too.

Torch's own Muon takes matrices alone; the UNet's weights are convolutions for the most part, here matrices of output
channels by all else, those of one shape together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from tools.training.arithmetic import compute_dtype

MOMENTUM = 0.95
# The quintic that takes singular values in 0..1 to about 1 within five turns, and the factor that gives an update the
# size of Adam's (0.2 is the RMS of Adam's updates): Jordan et al. 2024; Liu et al. 2025, "Muon is scalable".
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5
ADAMS_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions or more; `lr`, a scalar tensor beside the weights, is on Adam's scale."""

    def __init__(self, weights: Iterable[Tensor], lr: Tensor) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                gradients = [weight.grad for weight in weights if weight.grad is not None]
                momenta = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_mul_(momenta, MOMENTUM)
                torch._foreach_add_(momenta, gradients)
                ahead = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)
                updates = orthogonal(torch.stack([matrix.flatten(1) for matrix in ahead]))
                updates = updates * (group["lr"] * ADAMS_SIZE * max(updates.shape[1:]) ** 0.5)
                torch._foreach_sub_(
                    weights, [update.view(weight.shape) for weight, update in zip(weights, updates, strict=True)]
                )


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices whose singular values are all 1, `[n, rows, columns]`, by Newton-Schulz, which bears
    few digits."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(compute_dtype(matrices.device))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(TURNS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = (x.mT if tall else x).float()
    return result
