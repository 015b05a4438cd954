"""Critics: they see squares of the images, learn the classes, and judge repeatably in favour of the real."""

import pytest
import torch
from torch import Tensor

from submission.tasks import load_task
from tools import embedded_critics
from tools.convnet import ConvNet
from tools.embedded_critics import SQUARE, Judge, judge_pictures, squares, train_critics
from tools.training_data import LabelledImages

TASK = load_task("cifar100")


def stripes(classes: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Noisy pictures `[C, each, 3, 32, 32]` in -1..1 whose every second column has the class's own colour."""
    colours = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    pictures = torch.randn(len(classes), each, 3, SQUARE, SQUARE, generator=generator) * 0.1
    pictures[..., ::2] += colours[classes].view(-1, 1, 3, 1, 1)
    return pictures.clamp(-1, 1)


def test_squares_are_the_quarters_of_an_image_row_by_row() -> None:
    images = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64)
    cut = squares(images)
    expected = [images[n, :, top : top + 32, left : left + 32] for n in range(2) for top in (0, 32) for left in (0, 32)]
    assert torch.equal(cut, torch.stack(expected))
    assert torch.equal(squares(images[..., :32, :32]), images[..., :32, :32])


@pytest.fixture(scope="module")
def critics() -> list[dict[str, Tensor]]:
    """Two ages of a critic of ten classes of stripes."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(10)
    pixels = ((stripes(classes, 20, generator) + 1) * 127.5).byte().flatten(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_critics, "AGES", (2, 16))
        patch.setattr(torch, "compile", lambda network: network)  # it would take longer than the training
        return train_critics(LabelledImages(pixels, classes.repeat_interleave(20)), TASK, seed=3)


def judge_of(weights: list[dict[str, Tensor]]) -> Judge:
    network = ConvNet(100, SQUARE).requires_grad_(False)
    return Judge(TASK, weights, network, network.features)


def test_a_critic_is_kept_at_each_of_its_ages(critics: list[dict[str, Tensor]]) -> None:
    assert len(critics) == 2
    assert not torch.equal(critics[0]["classifier.weight"], critics[1]["classifier.weight"])


def test_training_critics_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pixels = torch.zeros(8, 3, SQUARE, SQUARE, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_critics, "AGES", (1,))
        patch.setattr(torch, "compile", lambda network: network)
        train_critics(LabelledImages(pixels, torch.arange(8)), TASK, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_judgement_prefers_pictures_of_the_right_class_and_says_how_to_get_there(
    critics: list[dict[str, Tensor]],
) -> None:
    judge, classes = judge_of(critics[1:]), torch.arange(10)
    generator = torch.Generator().manual_seed(4)
    real = stripes(classes, 8, generator)
    right = judge_pictures(judge, stripes(classes, 8, generator), real, classes, torch.Generator().manual_seed(5))
    other = stripes(classes.roll(1), 8, generator).requires_grad_()
    wrong = judge_pictures(judge, other, real, classes, torch.Generator().manual_seed(5))
    assert right.accuracy > 0.5 > wrong.accuracy
    assert right.energy < wrong.energy
    assert right.cross_entropy < wrong.cross_entropy

    (gradient,) = torch.autograd.grad(wrong.energy + wrong.cross_entropy, other)
    step = (other - 20 * gradient / gradient.norm()).detach()
    better = judge_pictures(judge, step, real, classes, torch.Generator().manual_seed(5))
    assert better.energy + better.cross_entropy < wrong.energy + wrong.cross_entropy


def test_a_judgement_is_a_function_of_its_generator(critics: list[dict[str, Tensor]]) -> None:
    judge, classes = judge_of(critics), torch.arange(10)
    made, real = (stripes(classes, 2, torch.Generator().manual_seed(seed)) for seed in (6, 7))

    def energy(seed: int) -> float:
        torch.rand(seed)  # what the global generator has been through does not matter
        return judge_pictures(judge, made, real, classes, torch.Generator().manual_seed(seed)).energy.item()

    assert energy(8) == energy(8)
    assert len({energy(seed) for seed in range(6)}) > 1
