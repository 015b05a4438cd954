"""Where the one-step generator begins: per class, a Gaussian of its latents, fitted in closed form."""

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
