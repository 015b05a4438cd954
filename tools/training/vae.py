"""The VAE: learnt on the real images, then brought to the scale of SDXL's latents."""

from typing import Any

import torch
from torch import Tensor

from tools.scoring.recorded import recorded
from tools.training.arithmetic import computing
from tools.training.critic import Critic, difference
from tools.training.images import RealImages, to_unit
from tools.training.layout import LATENT_SCALE, LATENT_SHAPE, Networks
from tools.training.progress import Progress, adam, record, steps, update

BATCH = 128
RATE = 2e-3
SEEN_WEIGHT = 3.0  # of what the critic sees, a share of its variance; ten times less kept less that classes are told by
KL_WEIGHT = 1e-3  # per latent, against an L1 of pixels in -1..1: keeps latents smooth, costs next to no detail
NORMALISE_ON = 7  # images of each class that the latents' mean and std are taken from
ENCODED_AT_ONCE = 256


def train_vae(networks: Networks, critic: Critic, progress: Progress, images: RealImages, total: int) -> None:
    """Reconstruct images for `total` steps: L1 on pixels, what the critic sees, and a light KL term, the
    reparameterised posterior in between. Then normalise the latents."""
    vae, generator = networks.vae, progress.generator
    device = generator.device
    parameters = list(vae.parameters())
    optimisers: list[torch.optim.Optimizer] = [adam(parameters, RATE)]

    def reconstruct(batch: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(batch).latent_dist
        made: Tensor = vae.decode(posterior.mean + posterior.std * noise).sample
        kl: Tensor = posterior.kl()
        return made, kl

    reconstruct = torch.compile(reconstruct, disable=device.type != "cpu")

    def learn(batch: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with computing(device):
            made, kl = reconstruct(batch, noise)
        made, kl = made.float(), kl.float().mean() / noise[0].numel()
        error = (made - batch).abs().mean()
        seen = difference(critic, made, batch)
        update(optimisers, parameters, error + SEEN_WEIGHT * seen + KL_WEIGHT * kl)
        decibels = -10 * ((made - batch).square().mean() / 4).log10()
        return error.detach(), seen.detach(), kl.detach(), decibels.detach()

    step = recorded(learn, device)
    labels = images.labels
    for _ in steps(progress, optimisers, total):
        classes = labels[torch.randint(len(labels), (BATCH,), device=device, generator=generator)]
        batch = images.draw(classes, 1, generator)
        noise = torch.randn(BATCH, *LATENT_SHAPE, device=device, generator=generator)
        record(progress, **dict(zip(("loss", "seen", "kl", "psnr"), step(batch, noise), strict=True)))
    normalise_latents(vae, images.draw(torch.arange(len(images.counts), device=device), NORMALISE_ON, generator))


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
    """Posterior means at unit scale, float32 `[n, 4, s/4, s/4]`, of images, uint8 `[n, 3, s, s]`."""
    means = []
    for part in torch.split(pixels, ENCODED_AT_ONCE):
        means.append(vae.encode(to_unit(part).contiguous(memory_format=torch.channels_last)).latent_dist.mean)
    return torch.cat(means) * LATENT_SCALE


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures in about -1..1, float32 `[n, 3, 4h, 4w]`, of latents of unit scale, `[n, 4, h, w]`."""
    with computing(latents.device):
        pictures: Tensor = vae.decode(latents.contiguous(memory_format=torch.channels_last) / LATENT_SCALE).sample
    return pictures.float()
