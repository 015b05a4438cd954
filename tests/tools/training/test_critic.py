"""The critic, and the real images it learns."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from submission.log import Log
from submission.plan.budget import Budget
from tools.training.critic import SIZE, Critic, difference, load_critic, train_critic
from tools.training.images import RealImages
from tools.training.progress import Progress, StoppedError

CLASSES, EACH = 4, 8
EXACTLY = "donot_use_mm_for_euclid_dist"


@pytest.fixture(scope="module")
def images() -> RealImages:
    """Classes that differ in colour; noise on top."""
    torch.manual_seed(0)
    colours = torch.randint(60, 200, (CLASSES, 1, 3, 1, 1))
    noise = torch.randint(-50, 50, (CLASSES, EACH, 3, SIZE, SIZE))
    return RealImages((colours + noise).byte().flatten(0, 1), torch.full((CLASSES,), EACH))


def begin(images: RealImages, seed: int) -> Progress:
    """A training that has all the time for a critic of three steps."""
    settings = {"seed": seed}
    budget = Budget(100.0, 0.0, lambda: 0.0)
    progress = Progress(Path(), budget, Log("kept", budget), {}, torch.Generator(), settings)
    progress.place.until, progress.place.ends = 100.0, 3
    return progress


@pytest.fixture(scope="module")
def weights(images: RealImages) -> dict[str, Tensor]:
    return train_critic(begin(images, 3), [images])


@pytest.fixture
def critic(weights: dict[str, Tensor]) -> Critic:
    return load_critic(weights, torch.device("cpu"))


def test_a_critic_is_a_function_of_its_seed_and_leaves_the_callers_numbers_alone(
    images: RealImages, weights: dict[str, Tensor]
) -> None:
    before = torch.get_rng_state()
    again, other = train_critic(begin(images, 3), [images]), train_critic(begin(images, 4), [images])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not torch.equal(other["classifier.weight"], weights["classifier.weight"])


def test_a_critic_stops_when_told(images: RealImages) -> None:
    progress = begin(images, 3)
    progress.budget.hurry()
    with pytest.raises(StoppedError):
        train_critic(progress, [images])


def test_a_critic_that_is_late_is_left_as_it_is(images: RealImages) -> None:
    """Though it has begun with more steps, in a state, or on a machine that was faster."""
    seconds = itertools.count().__next__
    budget = Budget(100.0, 0.0, seconds)
    progress = Progress(Path(), budget, Log("kept", budget), {}, torch.Generator(), {"seed": 3})
    progress.place.until, progress.place.ends = 20.0, 1000
    assert train_critic(progress, [images])
    assert 3 < progress.place.step < 20


def test_a_critic_sees_less_difference_the_more_alike_pictures_are(critic: Critic, images: RealImages) -> None:
    real = images.draw(8, torch.Generator().manual_seed(0))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    differences = [difference(critic, real + share * noise, real).item() for share in (0.0, 0.1, 0.5)]
    assert differences[0] == 0
    assert differences[0] < differences[1] < differences[2]
    made = (real + 0.1 * noise).requires_grad_()
    difference(critic, made, real).backward()  # type: ignore[no-untyped-call]
    assert made.grad is not None and made.grad.abs().sum() > 0


def test_real_images_are_drawn_of_all_either_way_round(images: RealImages) -> None:
    drawn = images.draw(400, torch.Generator().manual_seed(0))
    known = torch.cat([images.pixels, images.pixels.flip(-1)]).float().flatten(1)
    distance, nearest = torch.cdist((drawn.flatten(1) + 1) * 127.5, known, compute_mode=EXACTLY).min(dim=1)
    assert distance.max() < 1
    assert len(set(nearest.tolist())) > 1.9 * len(images.pixels), "not all, or all the same way round"
