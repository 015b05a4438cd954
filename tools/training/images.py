"""The real images, all tasks' classes in one row: what every part of the training draws from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealImages:
    """`pixels` uint8 `[N, 3, s, s]`, class after class; `counts` int64 `[classes]`, the images of each."""

    pixels: Tensor
    counts: Tensor

    @property
    def labels(self) -> Tensor:
        """int64 `[N]`."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)

    def by_class(self) -> Sequence[Tensor]:
        """The pixels of each class."""
        return torch.split(self.pixels, self.counts.tolist())

    def draw(self, classes: Tensor, each: int, generator: torch.Generator) -> Tensor:
        """`each` images at random of each of `classes`, mirrored by a coin: float32 in -1..1, `[C * each, 3, s, s]`."""
        first = self.counts.cumsum(0) - self.counts
        chosen = classes.repeat_interleave(each)
        places = (torch.rand(len(chosen), device=generator.device, generator=generator) * self.counts[chosen]).long()
        pixels = to_unit(self.pixels[first[chosen] + places])
        heads = torch.rand(len(chosen), 1, 1, 1, device=generator.device, generator=generator) < 0.5
        return torch.where(heads, pixels.flip(-1), pixels).contiguous(memory_format=torch.channels_last)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in -1..1."""
    return pixels.float() / 127.5 - 1
