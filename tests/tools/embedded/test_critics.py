"""Critics: they learn the classes, and judge repeatably in favour of pictures that look like the real ones."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from submission.tasks import load_task
from tools.embedded import critics as module
from tools.embedded.critics import SIZE, Critics, Features, judge, make_critics, squared_distance

TASK = load_task("cifar100")
CLASSES = torch.arange(10)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """To compile would take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        yield


def stripes(classes: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Noisy pictures `[C, each, 3, 32, 32]` in -1..1 whose every second column has the class's own colour."""
    colours = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    pictures = torch.randn(len(classes), each, 3, SIZE, SIZE, generator=generator) * 0.1
    pictures[..., ::2] += colours[classes].view(-1, 1, 3, 1, 1)
    return pictures.clamp(-1, 1)


@pytest.fixture(scope="module")
def features() -> Features:
    return Features()


@pytest.fixture(scope="module")
def critics(features: Features) -> Iterator[Critics]:
    """Critics of ten classes of stripes, before and after they have learnt them."""
    pixels = ((stripes(CLASSES, 20, torch.Generator().manual_seed(1)) + 1) * 127.5).byte()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AGES", (0, 16))
        patch.setattr(module, "MEAN_OF", 4)
        before = torch.get_rng_state()
        made = make_critics(TASK, pixels, features, seed=3)
        assert torch.equal(torch.get_rng_state(), before), "the global random numbers have moved"
        yield made


def test_a_critic_is_kept_at_each_of_its_ages_with_what_it_makes_of_real_images(critics: Critics) -> None:
    first, last = critics.weights
    assert not torch.equal(first["classifier.weight"], last["classifier.weight"])
    assert critics.means.shape == critics.squares.shape == (2, 6, 10, 128 * (SIZE // 8) ** 2)
    assert not torch.equal(critics.means[0], critics.means[1])
    assert (critics.squares > critics.means.square()).float().mean() > 0.99


def test_a_judgement_prefers_pictures_of_the_right_class_and_says_how_to_get_there(
    critics: Critics, features: Features
) -> None:
    generator = torch.Generator().manual_seed(4)
    right, wrong = (stripes(classes, 8, generator) for classes in (CLASSES, CLASSES.roll(1)))
    for seed in range(12):  # several critics and operations

        def judged(pictures: Tensor, seed: int = seed) -> tuple[Tensor, Tensor | None]:
            judgement = judge(critics, features, pictures, CLASSES, torch.Generator().manual_seed(seed))
            return judgement.means + judgement.squares, judgement.cross_entropy

        (good, sure), (bad, unsure) = judged(right), judged(wrong.requires_grad_())
        assert good < bad
        loss = bad
        if sure is not None and unsure is not None:
            assert sure < unsure
            loss = bad + unsure
        (gradient,) = torch.autograd.grad(loss, wrong)
        better, _ = judged((wrong - 2 * gradient / gradient.norm()).detach())
        assert better < bad


def test_a_judgement_is_a_function_of_its_generator(critics: Critics, features: Features) -> None:
    made = stripes(CLASSES, 2, torch.Generator().manual_seed(6))

    def mismatch(seed: int) -> float:
        torch.rand(seed)  # what the global generator has been through does not matter
        return judge(critics, features, made, CLASSES, torch.Generator().manual_seed(seed)).means.item()

    assert mismatch(8) == mismatch(8)
    assert len({mismatch(seed) for seed in range(6)}) > 1


def test_the_distance_of_an_expectation_is_estimated_without_bias() -> None:
    generator = torch.Generator().manual_seed(7)
    target, centre = torch.randn(2, 1, 16, generator=generator)
    values = centre + torch.randn(20_000, 3, 16, generator=generator)
    distances = squared_distance(values, target.expand(20_000, 16))
    error = distances.mean() - (centre - target).square().sum()
    assert error.abs() < 4 * distances.std() / len(distances) ** 0.5
