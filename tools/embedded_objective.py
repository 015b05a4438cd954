"""What the one-step generator is held to: per class, a Gaussian fitted in closed form, and the energy distance."""

from dataclasses import dataclass

import torch
from torch import Tensor

OWN_DIRECTIONS = 128  # principal directions in which a class has a covariance of its own; beyond, all share one


@dataclass(frozen=True)
class ClassGaussians:
    """Gaussians over flattened latents of D numbers, as maps that take standard noise n to mean + A n.

    A is the symmetric root of the covariance: of all maps to that Gaussian the one that moves the noise least, hence
    the easiest to learn. A = basis own basis^T + shared.
    """

    means: Tensor  # [classes, D]
    basis: Tensor  # [D, K], orthonormal columns
    own: Tensor  # [classes, K, K]
    shared: Tensor  # [D, D]


def fit_class_gaussians(latents: Tensor) -> ClassGaussians:
    """From latents `[classes, n, ...]`, float32.

    A class's covariance is shrunk towards the mean of all by K / (K + n): n images say little of K x K numbers.
    """
    flat = latents.flatten(2)
    n, dimensions = flat.shape[1:]
    means = flat.mean(dim=1)
    centred = flat - means.unsqueeze(1)
    everyone = centred.flatten(0, 1)
    spread, directions = torch.linalg.eigh(everyone.T @ everyone / len(everyone))
    kept = min(OWN_DIRECTIONS, dimensions)
    basis = directions[:, -kept:]
    rest = directions[:, : dimensions - kept]
    shared = (rest * spread[: dimensions - kept].clamp(min=0).sqrt()) @ rest.T
    scores = centred @ basis
    covariances = scores.transpose(1, 2) @ scores / n
    shrinkage = kept / (kept + n)
    covariances = (1 - shrinkage) * covariances + shrinkage * torch.diag(spread[-kept:])
    values, vectors = torch.linalg.eigh(covariances)
    own = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    return ClassGaussians(means, basis, own, shared)


def sample_class_gaussians(gaussians: ClassGaussians, classes: Tensor, noise: Tensor) -> Tensor:
    """Samples in the shape of `noise`, `[C, m, ...]`, of the Gaussians numbered `classes`, `[C]`."""
    flat = noise.flatten(2)
    own = (flat @ gaussians.basis) @ gaussians.own[classes] @ gaussians.basis.T
    return (gaussians.means[classes].unsqueeze(1) + own + flat @ gaussians.shared).view_as(noise)


def energy_distance(made: Tensor, real: Tensor) -> Tensor:
    """Mean energy distance of `made` to `real`, both `[C, m, channels, h, h]`, less a part that `made` cannot change.

    Between two distributions, 2 E|x - y| - E|x - x'| - E|y - y'|, zero only where they are equal (Szekely & Rizzo
    2013). It is taken over whole latents, over their quarters and over the quarters of those, since the distance of
    long vectors sees little of how neighbouring numbers hang together. Distances are per root of their dimension.
    """
    total = made.new_zeros(())
    scales = 3
    for scale in range(scales):
        width = made.shape[-1] >> scale
        a, b = _patches(made, width), _patches(real, width)
        m = a.shape[-2]
        across = torch.cdist(a, b).mean()
        # Squared by hand: cdist has no gradient at the zeros of the diagonal.
        among = (a.unsqueeze(-2) - a.unsqueeze(-3)).square().sum(-1).add(1e-12).sqrt().sum((-1, -2)).mean()
        total = total + (2 * across - among / (m * (m - 1))) / a.shape[-1] ** 0.5
    return total / scales


def _patches(latents: Tensor, width: int) -> Tensor:
    """`[C, m, c, h, h]` in squares of `width`: `[C, squares, m, c * width * width]`."""
    c, m, channels, height, _ = latents.shape
    n = height // width
    cut = latents.view(c, m, channels, n, width, n, width).permute(0, 3, 5, 1, 2, 4, 6)
    return cut.reshape(c, n * n, m, channels * width * width)
