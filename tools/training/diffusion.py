"""The teacher: a diffusion model of the latents, which makes a sample in many steps."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from submission.errors import first_line
from tools.scoring.recorded import recorded
from tools.training import processes
from tools.training.arithmetic import computing
from tools.training.images import RealImages
from tools.training.layout import Conditioning, Networks, latent_shape, predict_v
from tools.training.progress import (
    Progress,
    batch_for,
    mean_batch,
    optimisers_of,
    pick,
    record,
    share_over,
    steps,
    stop_if_told,
    update,
)
from tools.training.prompts import Prompts, encode_rows
from tools.training.vae import ENCODED_AT_ONCE, encode_images

BATCH = 1024
RATE = 3e-3
# Images of a step that share a prompt. With one each, the text encoders took a fourth of an H200's step; on two cores a
# step for CIFAR-100's classes is 11% shorter so.
ALIKE = 4
UNPROMPTED = 0.1  # share of samples learnt with the empty prompt, for guidance (Ho & Salimans 2022)
GUIDANCE = 1.5  # of 1, 1.25, 1.5 and 2.5 what an evaluator's network learnt most from (submission/embedded/README.md)
SOLVER_STEPS = 10
# On these devices the UNet is compiled where the stage has so many seconds left for every canvas. Each takes half a
# minute, and an H200's steps are a third shorter then (docs/own-data.md); on a CPU it has not been tried.
COMPILES_FROM = {"cuda": 100.0}
# A CPU encodes images ahead for so much of the stage's time, and the others when a step asks for them; always so many
# at a time, for the same latents whatever is asked for beside them: a training that is resumed repeats itself.
ENCODING_SHARE, ENCODED_TOGETHER = 0.1, 16


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
    solver: Any  # the configuration of the checkpoint's scheduler


class Latents:
    """Those of all images, and then of all images mirrored, float32 `[2 N, 4, h, w]`, encoded at the latest when they
    are asked for: of many images a short stage comes to few."""

    def __init__(self, vae: Any, images: RealImages) -> None:
        self._vae, self._pixels = vae, images.pixels
        count, device = 2 * len(images.pixels), images.pixels.device
        self._kept = torch.empty(count, *latent_shape(images.canvas), device=device)
        self._waiting = torch.ones(count, dtype=torch.bool, device=device)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Those of these numbers, int64 `[n]`."""
        self.encode(numbers)
        return self._kept[numbers]

    def encode(self, numbers: Tensor) -> None:
        """Encodes those of these numbers that have not been."""
        missing = torch.unique(numbers[self._waiting[numbers]])
        for first in range(0, len(missing), ENCODED_TOGETHER):
            part = missing[first : first + ENCODED_TOGETHER]
            mirrored, which = part.div(len(self._pixels), rounding_mode="floor"), part % len(self._pixels)
            pixels = self._pixels[which]
            pixels = torch.where(mirrored.bool().view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            filled = pixels[torch.arange(ENCODED_TOGETHER, device=part.device) % len(part)]
            self._kept[part] = encode_images(self._vae, filled)[: len(part)]
            self._waiting[part] = False


def train_diffusion(
    networks: Networks,
    unet: Any,
    progress: Progress,
    prompts: Prompts,
    images: Sequence[RealImages],
    on_save: Callable[[], None],
) -> None:
    """Train a teacher's UNet and both text encoders, for the stage's time, to predict v from the latents of images, and
    of mirrored ones: a class is as likely to be seen so. A step is about one canvas. Raises StoppedError."""
    device, generator = progress.generator.device, progress.generator
    schedule = noise_schedule(networks.scheduler, device)
    parameters, optimisers = optimisers_of(unet, RATE, networks.text_encoder, networks.text_encoder_2)

    def draw(canvas: int) -> tuple[Tensor, ...]:
        of_canvas, batch = images[canvas], batch_for(BATCH, images[canvas].canvas, device)
        labels = of_canvas.draw_labels(-(-batch // ALIKE), generator)
        rows = F.pad(prompts.draw_phrasings(labels, generator), (0, 1), value=prompts.empty)
        which = torch.arange(batch, device=device) // ALIKE  # of the rows is that of an image
        chosen = of_canvas.draw_of(labels[which], generator)
        mirrored = torch.randint(2, (batch,), device=device, generator=generator)
        clean = latents[canvas][chosen + mirrored * len(of_canvas.pixels)]
        silent = torch.rand(batch, device=device, generator=generator) < UNPROMPTED
        which = which.where(~silent, len(labels))
        timesteps = torch.randint(len(schedule.alphas), (batch,), device=device, generator=generator)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        return clean, timesteps, noise, rows, which

    def error(model: Any, clean: Tensor, timesteps: Tensor, noise: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        with computing(device):
            conditioning = encode_rows(networks, prompts, rows).of(which)
        return velocity_error(model, schedule, clean, timesteps, noise, conditioning)

    def learn(*drawn: Tensor) -> Tensor:
        loss = error(model, *drawn)
        update(optimisers, parameters, loss)
        return loss.detach()

    latents = [_latents(networks.vae, of_canvas, progress) for of_canvas in images]
    model = unet
    if progress.place.until - progress.budget.elapsed >= COMPILES_FROM.get(device.type, math.inf) * len(images):
        model = _compiled(unet, lambda tried: (error(tried, *draw(canvas)) for canvas in range(len(images))), progress)
    run = [recorded(learn, device) for _ in images]  # one each: their shapes differ
    for _ in steps(progress, optimisers, mean_batch(BATCH, images, device), on_save):
        canvas = pick(progress, images)
        record(progress, v=run[canvas](*draw(canvas)))


def _compiled(unet: Any, tries: Callable[[Any], Iterator[Tensor]], progress: Progress) -> Any:
    """The UNet, compiled for what the losses of `tries` hand it; as it is, with a warning, where torch cannot."""
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers asks a version
    compiled = torch.compile(unet, dynamic=False)
    progress.log.say("compiling the UNet: about half a minute for each canvas")
    try:
        for loss in tries(compiled):
            torch.autograd.backward(loss)
            stop_if_told(progress)
    except torch._dynamo.exc.TorchDynamoException as error:  # looked up late: to import it takes as long as torch
        progress.log.warn(f"torch cannot compile the UNet here ({first_line(error)}): its steps take longer")
        return unet
    return compiled


def _latents(vae: Any, images: RealImages, progress: Progress) -> Tensor | Latents:
    """Those of all images, and of all images mirrored. A GPU encodes them at once, in seconds: to know which are
    missing, a step would have to wait for it. Raises StoppedError."""
    if images.pixels.device.type == "cpu":
        latents = Latents(vae, images)
        for numbers in torch.split(torch.arange(2 * len(images.pixels)), ENCODED_AT_ONCE):
            stop_if_told(progress)
            if processes.agreed(share_over(progress) > ENCODING_SHARE):
                break
            latents.encode(numbers)
        return latents
    parts = []
    for pixels in (images.pixels, images.pixels.flip(-1)):
        for part in torch.split(pixels, ENCODED_AT_ONCE):
            stop_if_told(progress)
            parts.append(encode_images(vae, part))
    return torch.cat(parts)


def velocity_error(
    unet: Any, schedule: NoiseSchedule, clean: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Conditioning
) -> Tensor:
    """The squared error of a UNet that predicts v = alpha n - sigma x (Salimans & Ho 2022), a scalar."""
    alpha, sigma = column(schedule.alphas[timesteps]), column(schedule.sigmas[timesteps])
    noisy = schedule.noisy(clean, timesteps, noise)
    return (predict_v(unet, noisy, timesteps, conditioning) - (alpha * noise - sigma * clean)).square().mean()


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
    """Where the teacher leads from noise, in SOLVER_STEPS steps of DPM-Solver++ (Lu et al. 2022) of second order.

    Returns:
        A function of standard normal noise `[N, 4, h, w]` and the rows of prompts `[N]`, to latents; N stays the same.
    """
    guided = recorded(partial(denoise_guided, teacher), teacher.schedule.alphas.device)
    # Handed what is clean, it needs no prediction type of the checkpoint's.
    # On Gaussians, steps even in the log of the signal-to-noise ratio leave a fifth of the error of even timesteps.
    solver = DPMSolverMultistepScheduler.from_config(teacher.solver, prediction_type="sample", use_lu_lambdas=True)

    @torch.no_grad()
    def solve(noise: Tensor, rows: Tensor) -> Tensor:
        solver.set_timesteps(SOLVER_STEPS)
        noisy = noise
        for timestep in solver.timesteps:
            # A copy, for the solver looks back at it when the next call has written over it.
            clean = guided(noisy, timestep.expand(len(noise)).to(noise.device), rows).clone()
            noisy = solver.step(clean, timestep, noisy, return_dict=False)[0]
        return noisy

    return solve
