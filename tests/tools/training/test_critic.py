"""The critic, and the real images it learns."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tools.training import critic as module
from tools.training.critic import SIZE, Critic, difference, load_critic, train_critic
from tools.training.images import RealImages

CLASSES, EACH = 4, 8


@pytest.fixture(scope="module")
def images() -> RealImages:
    """Classes that differ in colour; noise on top."""
    torch.manual_seed(0)
    colours = torch.randint(60, 200, (CLASSES, 1, 3, 1, 1))
    noise = torch.randint(-50, 50, (CLASSES, EACH, 3, SIZE, SIZE))
    return RealImages((colours + noise).byte().flatten(0, 1), torch.full((CLASSES,), EACH))


@pytest.fixture(scope="module")
def weights(images: RealImages) -> Iterator[dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 3)
        patch.setattr(torch, "compile", lambda function, **_: function)  # takes longer than to train so little
        yield train_critic(images, seed=3)


@pytest.fixture
def critic(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Critic:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return load_critic(weights, torch.device("cpu"))


def test_a_critic_is_a_function_of_its_seed_and_leaves_the_callers_numbers_alone(
    images: RealImages, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    before = torch.get_rng_state()
    again, other = train_critic(images, seed=3), train_critic(images, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not torch.equal(other["classifier.weight"], weights["classifier.weight"])


def test_a_critic_sees_less_difference_the_more_alike_pictures_are(critic: Critic, images: RealImages) -> None:
    real = images.draw(torch.arange(CLASSES), 2, torch.Generator().manual_seed(0))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    differences = [difference(critic, real + share * noise, real).item() for share in (0.0, 0.1, 0.5)]
    assert differences[0] == 0
    assert differences[0] < differences[1] < differences[2]
    made = (real + 0.1 * noise).requires_grad_()
    difference(critic, made, real).backward()  # type: ignore[no-untyped-call]
    assert made.grad is not None and made.grad.abs().sum() > 0


def test_real_images_are_drawn_of_the_classes_asked_for_either_way_round(images: RealImages) -> None:
    drawn = images.draw(torch.tensor([2, 0]), 50, torch.Generator().manual_seed(0))
    of_class = images.by_class()
    for label, part in zip((2, 0), torch.split(drawn, 50), strict=True):
        known = torch.cat([of_class[label], of_class[label].flip(-1)]).float().flatten(1)
        distance, nearest = ((part.flatten(1).unsqueeze(1) + 1) * 127.5 - known).abs().amax(dim=2).min(dim=1)
        assert distance.max() < 1
        assert len(set(nearest.tolist())) > EACH, "all the same way round"
