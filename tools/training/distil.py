"""The student: what the teacher makes in many steps, in the one step that the job takes.

First it learns where the teacher leads from each noise (Luhman & Luhman 2021, knowledge distillation). What is fine in
a sample gets lost there, for the error is squared; then its samples are made as likely to the teacher as they are to a
second diffusion model that learns from the student alone (Yin et al. 2024, distribution matching distillation, with the
two rates of DMD2 in place of its regression), unless the training was long (`MATCHED_BELOW`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.scoring.recorded import recorded
from tools.training import processes
from tools.training.diffusion import Teacher, denoise, denoise_guided, solver_of, velocity_error
from tools.training.images import RealImages
from tools.training.layout import Conditioning, Networks, latent_shape, one_step_latents
from tools.training.progress import (
    Pace,
    Progress,
    batch_for,
    mean_batch,
    optimisers_of,
    pick,
    record,
    seed_step,
    steps,
    stop_if_told,
    update,
)
from tools.training.prompts import Prompts

PAIRS = 200_000  # of noise and sample, at most
SOLVED_AT_ONCE = 1024

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
    """Of one canvas: `noise` and `latents`, float16 `[N, 4, h, w]`, and `rows` of the prompts, int64 `[N]`."""

    noise: Tensor
    latents: Tensor
    rows: Tensor


def make_pairs(teacher: Teacher, progress: Progress, prompts: Prompts, images: Sequence[RealImages]) -> list[Pairs]:
    """What the teacher makes of noise, for prompts at random, in the stage's time, PAIRS at most: of every canvas as
    many as it has a share of the images. Raises StoppedError."""
    place, generator = progress.place, progress.generator
    solve = [solver_of(teacher) for _ in images]  # one each: their shapes differ
    made: list[list[Pairs]] = [[] for _ in images]
    place.step = 0
    while True:
        counts = [sum(len(part.rows) for part in done) for done in made]
        # The canvas that is most behind.
        canvas = min(range(len(images)), key=lambda c: counts[c] / len(images[c].pixels))
        stop_if_told(progress)
        late = processes.agreed(progress.budget.elapsed >= place.until)
        if counts[canvas] and (late or sum(counts) >= PAIRS):
            break
        seed_step(progress, place.step, processes.number())
        count = batch_for(SOLVED_AT_ONCE, images[canvas].canvas, generator.device)
        rows = prompts.draw(images[canvas], count, generator)
        noise = torch.randn(count, *latent_shape(images[canvas].canvas), device=generator.device, generator=generator)
        noise = noise.half()
        made[canvas].append(Pairs(noise, solve[canvas](noise.float(), rows).half(), rows))
        place.step += 1
        mean = (sum(counts) + count) / place.step
        progress.log.status(Pace(place, mean, (0, place.began), progress.budget.elapsed))
    return [
        Pairs(*(torch.cat([getattr(part, name) for part in done]) for name in ("noise", "latents", "rows")))
        for done in made
    ]


def train_distil(
    networks: Networks,
    progress: Progress,
    encoded: Conditioning,
    pairs: Sequence[Pairs],
    images: Sequence[RealImages],
    on_save: Callable[[], None],
) -> None:
    """Train the student, `networks.unet`, for the stage's time on the pairs of each canvas."""
    device, generator = progress.generator.device, progress.generator
    parameters, optimisers = optimisers_of(networks.unet, DISTIL_RATE)

    def learn(noise: Tensor, latents: Tensor, rows: Tensor) -> Tensor:
        loss = (one_step_latents(networks, noise, encoded.of(rows)) - latents).square().mean()
        update(optimisers, parameters, loss)
        return loss.detach()

    run = [recorded(learn, device) for _ in images]
    for _ in steps(progress, optimisers, mean_batch(DISTIL_BATCH, images, device), on_save):
        canvas = pick(progress, images)
        known, batch = pairs[canvas], batch_for(DISTIL_BATCH, images[canvas].canvas, device)
        chosen = torch.randint(len(known.rows), (batch,), device=device, generator=generator)
        loss = run[canvas](known.noise[chosen].float(), known.latents[chosen].float(), known.rows[chosen])
        record(progress, error=loss)


def train_match(
    networks: Networks,
    teacher: Teacher,
    rival: Any,
    progress: Progress,
    prompts: Prompts,
    images: Sequence[RealImages],
    on_save: Callable[[], None],
) -> None:
    """Train the student, `networks.unet`, for the stage's time against a rival that is the teacher's UNet at first."""
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
        loss = velocity_error(rival, schedule, made, timesteps, noise, encoded.of(rows))
        update(rival_optimisers, rivals, loss)
        return loss.detach()

    def draw(of_canvas: RealImages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = batch_for(MATCH_BATCH, of_canvas.canvas, device)
        start, noise = torch.randn(2, batch, *latent_shape(of_canvas.canvas), device=device, generator=generator)
        timesteps = torch.randint(*COMPARED, (batch,), device=device, generator=generator)
        return start, prompts.draw(of_canvas, batch, generator), timesteps, noise

    run = [recorded(learn, device) for _ in images]
    run_rival = [recorded(learn_rival, device) for _ in images]
    batch = mean_batch(MATCH_BATCH, images, device)
    for _ in steps(progress, [*student_optimisers, *rival_optimisers], batch, on_save):
        canvas = pick(progress, images)
        for _ in range(RIVAL_STEPS):
            of_rival = run_rival[canvas](*draw(images[canvas]))
        record(progress, gap=run[canvas](*draw(images[canvas])), rival=of_rival)
