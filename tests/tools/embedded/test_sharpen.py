"""What samples are judged by: whether the classes of real images follow from them."""

import torch

from tools.embedded.sharpen import augmented, disagreement

CLASSES, EACH, FEATURES = 4, 6, 32


def features(spread: float, seed: int) -> torch.Tensor:
    """Of a class a direction, with noise of `spread` about it."""
    centres = torch.eye(CLASSES, FEATURES).repeat_interleave(EACH, dim=0)
    return centres + spread * torch.randn(centres.shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


def test_samples_that_show_the_classes_disagree_less() -> None:
    real = features(0.1, seed=0)
    told = [disagreement(features(spread, seed=1), real, LABELS).item() for spread in (0.05, 0.3, 3.0)]
    assert told[0] < told[1] < told[2]
    wrong = features(0.05, seed=1).roll(EACH, dims=0)
    assert disagreement(wrong, real, LABELS) > 1, "further from the truth than to know nothing"


def test_following_the_gradient_helps() -> None:
    real = features(0.1, seed=0)
    made = features(1.0, seed=1).requires_grad_()
    before = disagreement(made, real, LABELS)
    (gradient,) = torch.autograd.grad(before, made)
    assert disagreement(made - gradient, real, LABELS) < before


def test_augmentation_is_drawn_from_the_generator_alone() -> None:
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again, other = (augmented(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
