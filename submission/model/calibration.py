"""Which decoder: the rungs of the ladder, fitted to and measured on some of the job's own images.

More images make a better training set, up to the cap, and less faithful ones a worse one. So what a rung is worth is
counted in doublings of the images per class: those that it comes to by the deadline, less the price of its error.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from submission.errors import UsageError
from submission.log import Log
from submission.model.decoder import (
    STEPS,
    Decoder,
    Rung,
    canvases,
    is_sound,
    ladder,
    psnr,
    random_student,
    train_student,
)
from submission.model.generator import Generator
from submission.plan.batch_size import pays_back

# Images to fit to, and others to measure on: the most with which all of it takes no more than this share of the time
# left, or else the fewest.
SAMPLES = ((64, 16), (8, 4))
SAMPLING_SHARE = 0.03
# Steps of training that are timed beforehand.
TRIED_STEPS = 5
# Images made at a time on a GPU, which a single one would leave idle.
GPU_SAMPLES = 8
# What a mean square error of 1, where pixels reach from 0 to 1, would cost in doublings of the images per class.
# docs/gpu.md has the evidence: at 26.7 dB, an error of 0.0021, a training set loses 8% of its accuracy, and a doubling
# between 50 and 200 images per class brings 3%. At 32.9 dB nothing was seen to be lost.
ERROR_PRICE = 1250.0


@dataclass(frozen=True)
class Sample:
    """Latents [n, 4, h, w] and the VAE's pixels for them [n, 3, size, size], float32; seconds per image for both."""

    latents: Tensor
    pixels: Tensor
    sampling: float
    decoding: float


def worth(rounds: float, cap: int, decibels: float) -> float:
    """What a rung is worth, in doublings of the images per class, where it comes to so many rounds of at most `cap` and
    keeps so many dB of peak signal-to-noise ratio."""
    return math.log2(min(cap, rounds)) - ERROR_PRICE * 10 ** (-decibels / 10)


def choose_decoder(
    generator: Generator,
    wanted: Rung | Literal["auto"],
    tiny: Any | None,
    *,
    left: float,
    cap: int,
    devices: int = 1,
    log: Log,
) -> Decoder:
    """The rung that is wanted or, with `auto`, the one that is worth most in `left` seconds of so many `devices`, for
    `cap` rounds at most.

    `tiny` is the AutoencoderTiny that lies beside the checkpoint, if one does. The generator decodes by its VAE as yet.
    Which rung is worth most, and how many images it is fitted to, depends on the time. Raises UsageError where the
    wanted rung cannot be had.
    """
    full, classes = generator.decoder, len(generator.task.classes)
    if wanted == "vae":
        return full
    if wanted == "tiny" and tiny is None:
        raise UsageError("--decoder tiny: the checkpoint's folder has no AutoencoderTiny in taesdxl/")
    if wanted == "auto" and generator.sampler.side < full.size:
        log.say("decoder: vae (the latents are coarser than the pixels, so that nothing cheaper comes near)")
        return full
    drawing = draw(generator, log)
    samples = [next(drawing), next(drawing)]
    sampling, decoding = samples[1].sampling, samples[1].decoding  # the first of everything is slow
    each = sampling + decoding
    if wanted == "auto" and devices * left >= each * classes * cap:
        log.say(f"decoder: vae (there is time for all {cap} images per class by it)")
        return full
    latents, pixels = gather(samples, drawing, 0)
    training = STEPS * _seconds_per_step(latents, pixels) if is_sound(pixels).all() else 0.0
    affordable = (n for n in SAMPLES if sum(n) * each + training <= SAMPLING_SHARE * left)
    fitted, held_out = next(affordable, SAMPLES[-1])
    takes = (fitted + held_out) * each + training
    if wanted == "auto" and not pays_back(takes, each / sampling, left):
        log.warn(f"no time to look for a faster decoder than the VAE: it would take about {takes:.0f} s")
        return full
    latents, pixels = gather(samples, drawing, fitted + held_out)
    if not is_sound(pixels).all():
        log.warn("no decoder could be measured, since the VAE's own images are broken: the VAE stays")
        return full
    fidelity: dict[Rung, float] = {}
    best, most = full, worth(devices * left / (each * classes), cap, math.inf)
    for rung in ladder(wanted, tiny, latents[:fitted], pixels[:fitted]):
        canvases(rung, latents[fitted:])
        began = time.perf_counter()
        fidelity[rung.rung] = psnr(canvases(rung, latents[fitted:]), pixels[fitted:])
        pace = sampling + (time.perf_counter() - began) / len(latents[fitted:])
        value = worth(devices * left / (pace * classes), cap, fidelity[rung.rung])
        if rung.rung == wanted or value > most:
            best, most = rung, value
    told = ", ".join(f"{name} {decibels:.1f} dB" for name, decibels in fidelity.items())
    log.say(f"decoder: {best.rung} (fidelity to the VAE, fitted to {fitted} images: {told})")
    return replace(best, fidelity=fidelity, fitted_to=fitted if best.student else 0)


def gather(samples: list[Sample], drawing: Iterator[Sample], count: int) -> tuple[Tensor, Tensor]:
    """Latents and pixels of at least so many images: of these samples, and of as many more as it takes."""
    while sum(len(sample.latents) for sample in samples) < count:
        samples.append(next(drawing))
    return torch.cat([sample.latents for sample in samples]), torch.cat([sample.pixels for sample in samples])


def _seconds_per_step(latents: Tensor, pixels: Tensor) -> float:
    """What a step of a network's training takes: the difference of one and of a few more, once warm."""
    seconds, student = [], random_student(latents, pixels.shape[-1])
    for steps in (1, 1, 1 + TRIED_STEPS):
        began = time.perf_counter()
        train_student(student, latents, pixels, steps)
        seconds.append(time.perf_counter() - began)
    return max(0.0, seconds[2] - seconds[1]) / TRIED_STEPS


def draw(generator: Generator, log: Log) -> Iterator[Sample]:
    """Images of classes far apart, without end; fewer at a time where they do not fit into a GPU's memory."""
    stride = max(1, len(generator.task.classes) // sum(SAMPLES[0]))
    group = GPU_SAMPLES if generator.sampler.device.type == "cuda" else 1
    first = 0
    while True:
        began = time.perf_counter()
        try:
            # A copy may be trained on, which what inference mode makes may not.
            latents = generator.latents(stride * np.arange(first, first + group), log).clone()
            between = time.perf_counter()
            pixels = canvases(generator.decoder, latents)
        except torch.OutOfMemoryError:
            if group == 1:
                raise
            group //= 2
            torch.cuda.empty_cache()
            continue
        ended = time.perf_counter()
        yield Sample(latents, pixels, (between - began) / group, (ended - between) / group)
        first += group
