"""The real images, those of one canvas together: what every part of the training draws from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealImages:
    """Images of the classes that are drawn on one canvas of s pixels: `pixels` uint8 `[N, 3, s, s]`, class after class;
    `counts` int64 `[classes]`, the images of each; `first`, the number of its first class among those of all canvases.
    """

    pixels: Tensor
    counts: Tensor
    first: int = 0

    @property
    def canvas(self) -> int:
        """Pixels of an image's side."""
        return self.pixels.shape[-1]

    @property
    def labels(self) -> Tensor:
        """int64 `[N]`, numbers among the classes of all canvases."""
        classes = torch.arange(self.first, self.first + len(self.counts), device=self.counts.device)
        return classes.repeat_interleave(self.counts)

    def draw_labels(self, count: int, generator: torch.Generator) -> Tensor:
        """So many classes at random, in proportion to their images: int64 `[count]`, as in `labels`."""
        return self.first + torch.multinomial(self.counts.float(), count, replacement=True, generator=generator)

    def draw_of(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The number of an image at random for each of `labels` `[N]`, among `pixels`: int64 `[N]`."""
        counts = self.counts[labels - self.first]
        within = (torch.rand(len(labels), device=generator.device, generator=generator) * counts).long()
        # In float32 a product with nearly 1 may be rounded up.
        return (self.counts.cumsum(0) - self.counts)[labels - self.first] + within.minimum(counts - 1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many images at random, mirrored by a coin: float32 in -1..1, `[count, 3, s, s]`."""
        device = generator.device
        pixels = to_unit(self.pixels[torch.randint(len(self.pixels), (count,), device=device, generator=generator)])
        heads = torch.rand(count, 1, 1, 1, device=device, generator=generator) < 0.5
        return torch.where(heads, pixels.flip(-1), pixels).contiguous(memory_format=torch.channels_last)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in -1..1."""
    return pixels.float() / 127.5 - 1
