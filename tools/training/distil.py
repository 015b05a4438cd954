"""The student: what the teacher makes in many steps, in the one step that the job takes.

First it learns where the teacher leads from each noise (Luhman & Luhman 2021, knowledge distillation). What is fine in
a sample gets lost there, for the error is squared; then its samples are made as likely to the teacher as they are to a
second diffusion model that learns from the student alone (Yin et al. 2024, distribution matching distillation, with the
two rates of DMD2 in place of its regression).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.scoring.recorded import recorded
from tools.training.diffusion import Teacher, denoise, denoise_guided, solver_of, velocity_step
from tools.training.layout import LATENT_SHAPE, Conditioning, Networks, one_step_latents
from tools.training.progress import Progress, optimisers_of, record, steps, update
from tools.training.prompts import Prompts

PAIRS = 120_000  # of noise and sample
SOLVED_AT_ONCE = 2000

DISTIL_BATCH = 1024
DISTIL_RATE = 2e-3

MATCH_BATCH = 512
MATCH_RATE = 5e-4
RIVAL_RATE = 1e-3
RIVAL_STEPS = 2  # of the rival for each of the student
# Timesteps that samples are compared at: at the ends, all of a sample is left to see or nothing.
COMPARED = (20, 980)
LEAST_DISTANCE = 1e-3  # mean absolute, from a sample to what the teacher makes of it; its inverse is a weight


@dataclass(frozen=True)
class Pairs:
    """`noise` and `latents`, float16 `[N, 4, h, w]`, `rows` of the prompts, int64 `[N]`."""

    noise: Tensor
    latents: Tensor
    rows: Tensor


def make_pairs(teacher: Teacher, prompts: Prompts, generator: torch.Generator) -> Pairs:
    """What the teacher makes of noise, for prompts at random."""
    solve = solver_of(teacher)
    rows = prompts.draw(PAIRS, generator)
    noise = torch.randn(PAIRS, *LATENT_SHAPE, device=generator.device, generator=generator).half()
    latents = torch.empty_like(noise)
    for first in range(0, PAIRS, SOLVED_AT_ONCE):
        part = slice(first, first + SOLVED_AT_ONCE)
        latents[part] = solve(noise[part].float(), rows[part])
        if first % (PAIRS // 10) < SOLVED_AT_ONCE:
            print(f"pairs {first + SOLVED_AT_ONCE} of {PAIRS}", flush=True)
    return Pairs(noise, latents, rows)


def train_distil(
    networks: Networks, progress: Progress, encoded: Conditioning, pairs: Pairs, total: int, on_save: Callable[[], None]
) -> None:
    """Train the student, `networks.unet`, for `total` steps on pairs."""
    device = pairs.noise.device
    parameters, optimisers = optimisers_of(networks.unet, DISTIL_RATE)

    def learn(noise: Tensor, latents: Tensor, rows: Tensor) -> Tensor:
        loss = (one_step_latents(networks, noise, encoded.of(rows)) - latents).square().mean()
        update(optimisers, parameters, loss)
        return loss.detach()

    step = recorded(learn, device)
    for _ in steps(progress, optimisers, total, on_save):
        chosen = torch.randint(len(pairs.rows), (DISTIL_BATCH,), device=device, generator=progress.generator)
        loss = step(pairs.noise[chosen].float(), pairs.latents[chosen].float(), pairs.rows[chosen])
        record(progress, error=loss)


def train_match(
    networks: Networks,
    teacher: Teacher,
    rival: Any,
    progress: Progress,
    prompts: Prompts,
    total: int,
    on_save: Callable[[], None],
) -> None:
    """Train the student, `networks.unet`, for `total` steps against a rival that is the teacher's UNet at first."""
    schedule, encoded, generator = teacher.schedule, teacher.encoded, progress.generator
    device = generator.device
    students, student_optimisers = optimisers_of(networks.unet, MATCH_RATE)
    rivals, rival_optimisers = optimisers_of(rival, RIVAL_RATE)

    def learn(start: Tensor, rows: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        made = one_step_latents(networks, start, encoded.of(rows))
        with torch.no_grad():
            noisy = schedule.noisy(made, timesteps, noise)
            wanted = denoise_guided(teacher, noisy, timesteps, rows)
            distance = (made - wanted).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=LEAST_DISTANCE)
            gap = (denoise(rival, schedule, noisy, timesteps, encoded.of(rows)) - wanted) / distance
        # The gradient of this to what was made is, up to a factor, the gap: the score difference of Yin et al.,
        # equation 7, with the weight of equation 8.
        update(student_optimisers, students, (made * gap).mean())
        return gap.square().mean()

    def learn_rival(start: Tensor, rows: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            made = one_step_latents(networks, start, encoded.of(rows))
        return velocity_step(rival, schedule, made, timesteps, noise, encoded.of(rows), rival_optimisers, rivals)

    def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        start, noise = torch.randn(2, MATCH_BATCH, *LATENT_SHAPE, device=device, generator=generator)
        timesteps = torch.randint(*COMPARED, (MATCH_BATCH,), device=device, generator=generator)
        return start, prompts.draw(MATCH_BATCH, generator), timesteps, noise

    step, rival_step = recorded(learn, device), recorded(learn_rival, device)
    for _ in steps(progress, [*student_optimisers, *rival_optimisers], total, on_save):
        for _ in range(RIVAL_STEPS):
            of_rival = rival_step(*draw())
        record(progress, gap=step(*draw()), rival=of_rival)
