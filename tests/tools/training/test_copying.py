"""Copies are found, and nothing else is taken for one."""

import pytest
import torch
from torch import Tensor

from tools.training.copying import nearest, share_of_copies


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Smooth ones, as photographs are: uint8 `[600, 3, 48, 48]`."""
    coarse = torch.rand(600, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(0, 255).byte()


def test_the_nearest_image_is_found_brighter_and_the_other_way_round(pictures: Tensor) -> None:
    training = pictures[:400]
    copies = (training[[7, 399]].flip(-1).float() * 0.5 + 60).byte()
    found = nearest(copies, training)
    assert found.index.tolist() == [7, 399] and (found.likeness > 0.99).all()


def test_an_image_itself_does_not_count(pictures: Tensor) -> None:
    training = pictures[:400]
    own = torch.tensor([0, 399])
    found = nearest(training[own], training, own)
    assert not torch.isin(found.index, own).all() and (found.likeness < 0.9).all()


def test_copies_are_told_from_new_pictures(pictures: Tensor) -> None:
    training, new = pictures[:400], pictures[400:]
    own = torch.arange(200)
    held_out = nearest(training[own], training, own)
    assert share_of_copies(nearest(new, training), held_out) < 0.05
    noisy = (training[:200].float() + 10 * torch.randn(200, 3, 48, 48)).clamp(0, 255).byte()
    assert share_of_copies(nearest(noisy, training), held_out) == 1
