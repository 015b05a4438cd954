"""Where the one-step generator begins: per class, a Gaussian of its latents, fitted in closed form."""

from collections.abc import Sequence
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


def fit_class_gaussians(latents: Sequence[Tensor]) -> ClassGaussians:
    """From the latents of each class, float32 `[n, ...]`.

    A class's covariance is shrunk towards the mean of all by K / (K + n): n images say little of K x K numbers.
    """
    flat = [of_class.flatten(1) for of_class in latents]
    means = torch.stack([of_class.mean(dim=0) for of_class in flat])
    centred = [of_class - mean for of_class, mean in zip(flat, means, strict=True)]
    spread, directions = torch.linalg.eigh(torch.stack([c.T @ c / len(c) for c in centred]).mean(dim=0))
    kept = min(OWN_DIRECTIONS, len(spread))
    basis = directions[:, -kept:]
    rest = directions[:, : len(spread) - kept]
    shared = (rest * spread[: len(spread) - kept].clamp(min=0).sqrt()) @ rest.T
    covariances = []
    for of_class in centred:
        scores = of_class @ basis
        shrinkage = kept / (kept + len(scores))
        covariances.append((1 - shrinkage) * scores.T @ scores / len(scores) + shrinkage * torch.diag(spread[-kept:]))
    values, vectors = torch.linalg.eigh(torch.stack(covariances))
    own = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    return ClassGaussians(means, basis, own, shared)


def sample_class_gaussians(gaussians: ClassGaussians, classes: Tensor, noise: Tensor) -> Tensor:
    """Samples in the shape of `noise`, `[C, m, ...]`, of the Gaussians numbered `classes`, `[C]`."""
    flat = noise.flatten(2)
    own = (flat @ gaussians.basis) @ gaussians.own[classes] @ gaussians.basis.T
    return (gaussians.means[classes].unsqueeze(1) + own + flat @ gaussians.shared).view_as(noise)
