"""The teacher: a diffusion model of the latents, which makes a sample in many steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.scoring.recorded import recorded
from tools.training.arithmetic import computing
from tools.training.layout import Conditioning, Networks, encode, predict_v
from tools.training.progress import Progress, optimisers_of, record, steps, update
from tools.training.prompts import Prompts

BATCH = 1024
RATE = 3e-3
UNPROMPTED = 0.1  # share of samples learnt with the empty prompt, for guidance (Ho & Salimans 2022)
GUIDANCE = 1.5  # of 1, 1.5 and 2.5 what an evaluator's network learnt most from: 0.324, 0.348, 0.311 of test_dev
SOLVER_STEPS = 20


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = alpha x + sigma n, the noise's share rising with the timestep; both `[timesteps]`."""

    alphas: Tensor
    sigmas: Tensor

    def noisy(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Latents `[N, 4, h, w]` at timesteps `[N]`."""
        return column(self.alphas[timesteps]) * latents + column(self.sigmas[timesteps]) * noise


def column(values: Tensor) -> Tensor:
    """`[N]` to `[N, 1, 1, 1]`."""
    return values.view(-1, 1, 1, 1)


def noise_schedule(scheduler: Any, device: torch.device) -> NoiseSchedule:
    """That of the checkpoint's scheduler."""
    kept = scheduler.alphas_cumprod.to(device)
    return NoiseSchedule(kept.sqrt(), (1 - kept).sqrt())


@dataclass(frozen=True)
class Teacher:
    """A diffusion model, and the prompts it can be asked for, by row; the last is the empty one."""

    unet: Any
    schedule: NoiseSchedule
    encoded: Conditioning


def train_diffusion(
    networks: Networks, unet: Any, progress: Progress, prompts: Prompts, latents: Tensor, labels: Tensor, total: int
) -> None:
    """Train a teacher's UNet and both text encoders, for `total` steps, to predict v from noisy latents.

    Args:
        latents: those of the real images, `[N, 4, h, w]`, of unit scale.
        labels: int64 `[N]`, their classes.
    """
    device, generator = latents.device, progress.generator
    schedule = noise_schedule(networks.scheduler, device)
    parameters, optimisers = optimisers_of(unet, RATE, networks.text_encoder, networks.text_encoder_2)

    def learn(clean: Tensor, ids: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        with computing(device):
            conditioning = encode(networks, ids)
        return velocity_step(unet, schedule, clean, timesteps, noise, conditioning, optimisers, parameters)

    step = recorded(learn, device)
    for _ in steps(progress, optimisers, total):
        chosen = torch.randint(len(latents), (BATCH,), device=device, generator=generator)
        rows = prompts.draw_phrasings(labels[chosen], generator)
        silent = torch.rand(BATCH, device=device, generator=generator) < UNPROMPTED
        ids = prompts.ids[rows.where(~silent, prompts.empty)]
        clean = latents[chosen]
        timesteps = torch.randint(len(schedule.alphas), (BATCH,), device=device, generator=generator)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        record(progress, v=step(clean, ids, timesteps, noise))


def velocity_step(
    unet: Any,
    schedule: NoiseSchedule,
    clean: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
    optimisers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[Tensor],
) -> Tensor:
    """One step towards predicting v = alpha n - sigma x (Salimans & Ho 2022); returns the squared error."""
    alpha, sigma = column(schedule.alphas[timesteps]), column(schedule.sigmas[timesteps])
    noisy = schedule.noisy(clean, timesteps, noise)
    error = predict_v(unet, noisy, timesteps, conditioning) - (alpha * noise - sigma * clean)
    loss = error.square().mean()
    update(optimisers, parameters, loss)
    return loss.detach()


@torch.no_grad()
def denoise(unet: Any, schedule: NoiseSchedule, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The clean latents that are to be expected, `[N, 4, h, w]`, as the UNet sees it."""
    v = predict_v(unet, noisy, timesteps, conditioning)
    return column(schedule.alphas[timesteps]) * noisy - column(schedule.sigmas[timesteps]) * v


def denoise_guided(teacher: Teacher, noisy: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
    """The same, GUIDANCE times as far from what is expected without a prompt as with those in `rows`."""
    both = torch.cat([rows, torch.full_like(rows, len(teacher.encoded.pooled) - 1)])
    prompted, unprompted = denoise(
        teacher.unet,
        teacher.schedule,
        torch.cat([noisy, noisy]),
        torch.cat([timesteps, timesteps]),
        teacher.encoded.of(both),
    ).chunk(2)
    return unprompted + GUIDANCE * (prompted - unprompted)


def solver_of(teacher: Teacher) -> Callable[[Tensor, Tensor], Tensor]:
    """Where the teacher leads from noise, in SOLVER_STEPS steps of DDIM (Song et al. 2020) without noise added.

    Returns:
        A function of standard normal noise `[N, 4, h, w]` and the rows of prompts `[N]`, to latents; N stays the same.
    """
    schedule, device = teacher.schedule, teacher.schedule.alphas.device

    @torch.no_grad()
    def step(noisy: Tensor, timesteps: Tensor, alpha: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        clean = denoise_guided(teacher, noisy, timesteps, rows)
        noise = (noisy - column(schedule.alphas[timesteps]) * clean) / column(schedule.sigmas[timesteps])
        return alpha * clean + sigma * noise

    replayed = recorded(step, device)
    stops = torch.linspace(len(schedule.alphas) - 1, 0, SOLVER_STEPS + 1, device=device).round().long()
    # Where each step leads: the last one to latents without noise.
    alphas = torch.cat([schedule.alphas[stops[1:-1]], torch.ones(1, device=device)])
    sigmas = torch.cat([schedule.sigmas[stops[1:-1]], torch.zeros(1, device=device)])

    def solve(noise: Tensor, rows: Tensor) -> Tensor:
        noisy = noise
        for stop, alpha, sigma in zip(stops[:-1], alphas, sigmas, strict=True):
            noisy = replayed(noisy, stop.expand(len(noise)), alpha, sigma, rows)
        return noisy.clone()

    return solve
