"""The VAE: learnt on the real images, then brought to the scale of SDXL's latents."""

import math
from typing import Any

import torch
from torch import Tensor

from tools.embedded.layout import LATENT_SCALE, Networks
from tools.embedded.progress import Progress, record, steps, update

BATCH = 48
RATE = 2e-3
KL_WEIGHT = 1e-3  # per latent, against an L1 of pixels in -1..1: keeps latents smooth, costs next to no detail
NORMALISE_ON = 2048  # images the latents' mean and std are taken from
ENCODED_AT_ONCE = 256


def train_vae(networks: Networks, progress: Progress, pixels: Tensor, total: int) -> None:
    """Reconstruct images, uint8 `[N, 3, s, s]`, for `total` steps: L1 on pixels plus a light KL term, the
    reparameterised posterior in between. Then normalise the latents."""
    vae = networks.vae
    parameters = list(vae.parameters())
    optimisers = [torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)]
    for _ in steps(progress, networks, optimisers, total):
        batch = draw(pixels, BATCH, progress.generator)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=progress.generator)
        reconstructed = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (reconstructed - batch).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        update(optimisers, parameters, error + KL_WEIGHT * kl)
        decibels = -10 * math.log10((reconstructed.detach() - batch).square().mean().item() / 4)
        record(progress, loss=error.item(), kl=kl.item(), psnr=decibels)
    normalise_latents(vae, draw(pixels, NORMALISE_ON, progress.generator))


def draw(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the images at random, mirrored by a coin, float32 in -1..1 as diffusers' VAEs expect them."""
    chosen = to_unit(pixels[torch.randint(len(pixels), (count,), generator=generator)])
    heads = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(heads, chosen.flip(-1), chosen).contiguous(memory_format=torch.channels_last)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in -1..1."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def normalise_latents(vae: Any, pixels: Tensor) -> None:
    """Change the VAE so that every latent channel has mean 0 and std 1 / LATENT_SCALE over `pixels`, decoded the same.

    The layout has one scaling factor and no shift; the two 1x1 convolutions next to the latents take up the rest.
    """
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in torch.split(pixels, ENCODED_AT_ONCE)])
    centre = means.mean(dim=(0, 2, 3))
    gain = 1 / (LATENT_SCALE * means.std(dim=(0, 2, 3)))
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(gain)
    into.bias[:channels] = (into.bias[:channels] - centre) * gain
    into.weight[:channels] *= gain.view(-1, 1, 1, 1)
    into.bias[channels:] += 2 * gain.log()  # the log variances
    out_of.bias += out_of.weight[:, :, 0, 0] @ centre
    out_of.weight /= gain.view(1, -1, 1, 1)


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Posterior means at unit scale, float32 `[..., 4, s/4, s/4]`, of images, uint8 `[..., 3, s, s]`."""
    means = []
    for part in torch.split(pixels.flatten(0, -4), ENCODED_AT_ONCE):
        means.append(vae.encode(to_unit(part).contiguous(memory_format=torch.channels_last)).latent_dist.mean)
    latents = torch.cat(means) * LATENT_SCALE
    return latents.view(*pixels.shape[:-3], *latents.shape[1:])
