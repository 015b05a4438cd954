"""The VAE: the embedded checkpoint's, taught the real images, then brought to the scale of SDXL's latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.scoring.recorded import recorded
from tools.training.arithmetic import computing
from tools.training.critic import Critic, difference
from tools.training.images import RealImages, to_unit
from tools.training.layout import LATENT_SCALE, Networks, latent_shape
from tools.training.progress import Progress, adam, batch_for, mean_batch, pick, record, seed_step, steps, update

BATCH = 128
RATE = 5e-4  # a fourth of what suits weights that have learnt nothing yet
SEEN_WEIGHT = 3.0  # of what the critic sees, a share of its variance; ten times less kept less that classes are told by
KL_WEIGHT = 1e-3  # per latent, against an L1 of pixels in -1..1: keeps latents smooth, costs next to no detail
NORMALISE_ON = 2048  # images of 32 px, or as many latents of a larger canvas, that their mean and std are taken from
ENCODED_AT_ONCE = 256


def train_vae(networks: Networks, critic: Critic, progress: Progress, images: Sequence[RealImages]) -> None:
    """Reconstruct images for the stage's time: L1 on pixels, what the critic sees, and a light KL term, the
    reparameterised posterior in between. Then normalise the latents. A step is about one canvas."""
    vae, generator = networks.vae, progress.generator
    device = generator.device
    parameters = list(vae.parameters())
    optimisers: list[torch.optim.Optimizer] = [adam(parameters, RATE)]

    def learn(batch: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with computing(device):
            posterior = vae.encode(batch).latent_dist
            made, kl = vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()
        made, kl = made.float(), kl.float().mean() / noise[0].numel()
        error = (made - batch).abs().mean()
        seen = difference(critic, made, batch)
        update(optimisers, parameters, error + SEEN_WEIGHT * seen + KL_WEIGHT * kl)
        decibels = -10 * ((made - batch).square().mean() / 4).log10()
        return error.detach(), seen.detach(), kl.detach(), decibels.detach()

    run = [recorded(learn, device) for _ in images]  # one each: their shapes differ
    for _ in steps(progress, optimisers, mean_batch(BATCH, images, device)):
        canvas = pick(progress, images)
        count = batch_for(BATCH, images[canvas].canvas, device)
        batch = images[canvas].draw(count, generator)
        noise = torch.randn(count, *latent_shape(images[canvas].canvas), device=device, generator=generator)
        record(progress, **dict(zip(("loss", "seen", "kl", "psnr"), run[canvas](batch, noise), strict=True)))
    if progress.place.step:
        seed_step(progress, progress.place.step, process=0)  # the same images in all of them
        pictures = [of_canvas.draw(NORMALISE_ON * 32**2 // of_canvas.canvas**2, generator) for of_canvas in images]
        normalise_latents(vae, pictures)


@torch.no_grad()
def normalise_latents(vae: Any, pictures: Sequence[Tensor]) -> None:
    """Change the VAE so that every channel of latents has mean 0 and std 1 / LATENT_SCALE over `pictures`.

    What it decodes stays the same. The layout has one scaling factor and no shift; the two 1x1 convolutions next to the
    latents take up the rest.
    """
    # `[channels, numbers]`, of every canvas.
    means = torch.cat(
        [
            vae.encode(batch).latent_dist.mean.transpose(0, 1).flatten(1)
            for of_canvas in pictures
            for batch in torch.split(of_canvas, ENCODED_AT_ONCE)
        ],
        dim=1,
    )
    centre = means.mean(dim=1)
    gain = 1 / (LATENT_SCALE * means.std(dim=1))
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
        with computing(pixels.device):
            means.append(vae.encode(to_unit(part).contiguous(memory_format=torch.channels_last)).latent_dist.mean)
    return torch.cat(means).float() * LATENT_SCALE


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures in about -1..1, float32 `[n, 3, 4h, 4w]`, of latents of unit scale, `[n, 4, h, w]`."""
    with computing(latents.device):
        pictures: Tensor = vae.decode(latents.contiguous(memory_format=torch.channels_last) / LATENT_SCALE).sample
    return pictures.float()
