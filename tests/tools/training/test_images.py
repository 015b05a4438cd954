"""What the training draws from the real images."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.training.images import RealImages


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 2**31))
def test_an_image_that_is_drawn_of_a_class_is_of_that_class(counts: list[int], first: int, seed: int) -> None:
    images = RealImages(torch.empty(sum(counts), 3, 1, 1), torch.tensor(counts), first)
    generator = torch.Generator().manual_seed(seed)
    labels = images.draw_labels(50, generator)
    assert torch.equal(images.labels[images.draw_of(labels, generator)], labels)


def test_every_image_of_a_class_is_drawn_as_often() -> None:
    images = RealImages(torch.empty(12, 3, 1, 1), torch.tensor([4, 8]))
    drawn = images.draw_of(torch.tensor([0, 1]).repeat(4000), torch.Generator().manual_seed(1)).bincount(minlength=12)
    torch.testing.assert_close(drawn[:4].float(), torch.full((4,), 1000.0), atol=120, rtol=0)
    torch.testing.assert_close(drawn[4:].float(), torch.full((8,), 500.0), atol=90, rtol=0)
