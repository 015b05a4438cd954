"""Whether a generator copies: how near its samples come to single training images, and how near real images come to
others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.reading.real_images import resized

# Pixels of the side that images are compared at, and how many are held against memory at once.
COMPARED_AT = 32
AT_ONCE = 8192
# A sample counts as a copy that is nearer to a training image than this share of real images is: of those that are
# none, 0.01 do.
QUANTILE = 0.99
# From this share of such samples on a generator is said to copy.
COPIES = 0.1


@dataclass(frozen=True)
class Nearest:
    """Of N pictures the nearest training images: how alike they are, the correlation of their pixels, float32 `[N]` in
    -1..1, and which they are, int64 `[N]`."""

    likeness: Tensor
    index: Tensor


def nearest(pictures: Tensor, training: Tensor, own: Tensor | None = None) -> Nearest:
    """The training image that each picture is most like, either way round.

    Args:
        pictures: uint8 `[N, 3, s, s]`.
        training: uint8 `[M, 3, s, s]`.
        own: int64 `[N]`, a training image for each picture that does not count, for it is the same.
    """
    wanted = torch.cat([_standardised(pictures), _standardised(pictures.flip(-1))])
    best = torch.full((len(wanted),), -2.0, device=wanted.device)
    index = torch.zeros(len(wanted), dtype=torch.int64, device=wanted.device)
    for first in range(0, len(training), AT_ONCE):
        likeness = wanted @ _standardised(training[first : first + AT_ONCE]).T
        if own is not None:
            inside = (own.repeat(2) >= first) & (own.repeat(2) < first + likeness.shape[1])
            likeness[inside.nonzero().flatten(), own.repeat(2)[inside] - first] = -2
        found, where = likeness.max(dim=1)
        index = torch.where(found > best, where + first, index)
        best = torch.maximum(found, best)
    either, which = best.view(2, -1).max(dim=0)
    return Nearest(either, index.view(2, -1).gather(0, which[None])[0])


def share_of_copies(samples: Nearest, real: Nearest) -> float:
    """The share of samples that are nearer to a training image than QUANTILE of real images are to another."""
    return (samples.likeness > real.likeness.quantile(QUANTILE)).float().mean().item()


def _standardised(pixels: Tensor) -> Tensor:
    """Rows of norm 1 and mean 0, float32 `[N, 3 * COMPARED_AT**2]`, whose products are correlations."""
    rows = resized(pixels, COMPARED_AT).flatten(1).float()
    rows = rows - rows.mean(dim=1, keepdim=True)
    return F.normalize(rows)
