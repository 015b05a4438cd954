"""What the student draws: pictures of classes, and sheets of them for people."""

import io
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import save_image

from tools.training.layout import Conditioning, Networks, latent_shape, one_step_latents
from tools.training.vae import decode_latents

SHEET_CLASSES, SHEET_IMAGES = 10, 8
DRAWN_AT_ONCE = 128


@torch.no_grad()
def draw(networks: Networks, encoded: Conditioning, rows: Tensor, canvas: int, seed: int) -> Tensor:
    """Pictures of prompts, whose rows of `encoded` are int64 `[N]`, as the job draws them: uint8 `[N, 3, canvas,
    canvas]` on the CPU. A function of seed, rows and networks."""
    device = rows.device
    noise = torch.randn(len(rows), *latent_shape(canvas), generator=torch.Generator().manual_seed(seed)).to(device)
    pictures = []
    for part, start in zip(torch.split(rows, DRAWN_AT_ONCE), torch.split(noise, DRAWN_AT_ONCE), strict=True):
        latents = one_step_latents(networks, start, encoded.of(part))
        pictures.append(to_bytes(decode_latents(networks.vae, latents)))
    return torch.cat(pictures)


def to_bytes(pictures: Tensor) -> Tensor:
    """Pixels in about -1..1 to uint8 on the CPU."""
    return ((pictures / 2 + 0.5) * 255).round().clamp(0, 255).byte().cpu()


def shown_classes(classes: int) -> Sequence[int]:
    """SHEET_CLASSES of so many, evenly spread; all where there are no more."""
    return (
        [index * classes // SHEET_CLASSES for index in range(SHEET_CLASSES)]
        if classes > SHEET_CLASSES
        else range(classes)
    )


def sheet_of_pictures(pictures: Tensor) -> bytes:
    """A PNG of pictures, uint8 `[classes * SHEET_IMAGES, 3, s, s]`: classes down, pictures of each across."""
    file = io.BytesIO()
    save_image(pictures.float() / 255, file, "PNG", nrow=SHEET_IMAGES, padding=0)
    return file.getvalue()
