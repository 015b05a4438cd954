"""Latents from noise: a scheduler of diffusers around a UNet, for any number of steps, with guidance or without.

An image is a function of its seed, class and round: what chance decides is drawn for each one alone.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from submission.errors import CheckpointError, UsageError, first_line
from submission.model.checkpoint import Checkpoint
from submission.model.pipeline import Conditioning, load_unet
from submission.model.recipe import Sampling

# Streams of random numbers drawn for an image: noise to begin with, noise that steps add, guidance. Copies have 1
# (`submission.dataset.augment`).
NOISE_STREAM, STEP_STREAM, GUIDANCE_STREAM = 0, 2, 3


@dataclass(frozen=True)
class Sampler:
    """A UNet, and how it is stepped, for canvases of `resolution` pixels and latents [4, side, side].

    Whether steps are `noisy` says that they add noise. `time_ids` [6] are the sizes that SDXL's UNet is told; None for
    others.
    """

    unet: Any
    scheduler: Any
    sampling: Sampling
    noisy: bool
    resolution: int
    side: int
    time_ids: Tensor | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Draws:
    """What chance decides of N images: the noise they begin with, float32 [N, 4, side, side]; a generator for the noise
    that steps add to each, where they do; the guidance of each, float32 [N]."""

    noise: Tensor
    generators: list[torch.Generator]
    guidance: Tensor


def load_sampler(checkpoint: Checkpoint, resolution: int, device: torch.device, dtype: torch.dtype) -> Sampler:
    """Loads the UNet and the scheduler. Raises CheckpointError, and UsageError for settings that the scheduler does not
    take."""
    scheduler, noisy = load_scheduler(checkpoint)
    unet = load_unet(checkpoint, device, dtype)
    if unet.config.time_cond_proj_dim is not None:
        raise CheckpointError(f"{checkpoint.path}: a UNet that is told its guidance is not supported")
    sampler = Sampler(unet, scheduler, checkpoint.sampling, noisy, 0, 0, None, dtype, device)
    return at_resolution(sampler, checkpoint, resolution)


def at_resolution(sampler: Sampler, checkpoint: Checkpoint, resolution: int) -> Sampler:
    """The same UNet and steps for canvases of `resolution` pixels."""
    size, sdxl = [resolution, resolution, 0, 0, resolution, resolution], len(checkpoint.text_encoders) > 1
    time_ids = torch.tensor(size, device=sampler.device, dtype=sampler.dtype) if sdxl else None
    return replace(sampler, resolution=resolution, side=resolution // checkpoint.vae_factor, time_ids=time_ids)


def in_float32(sampler: Sampler, conditioning: Conditioning) -> tuple[Sampler, Conditioning]:
    """The same UNet, which is changed, and its steps in float32."""
    embeds, pooled, time_ids = conditioning.embeds, conditioning.pooled, sampler.time_ids
    return (
        replace(
            sampler,
            unet=sampler.unet.float(),
            time_ids=None if time_ids is None else time_ids.float(),
            dtype=torch.float32,
        ),
        Conditioning(
            embeds.float() if embeds.is_floating_point() else embeds, None if pooled is None else pooled.float()
        ),
    )


def load_scheduler(checkpoint: Checkpoint) -> tuple[Any, bool]:
    """The scheduler that the checkpoint's recipe names, or its own; and whether its steps add noise.

    Raises UsageError where it does not take what it is told, which is tried on latents of zeros, and CheckpointError
    where the checkpoint's own makes no sense.
    """
    import diffusers  # noqa: PLC0415  # slow to import

    # It would advise on settings that a scheduler has in common with no other, and on every use of a few timesteps.
    diffusers.utils.logging.set_verbosity_error()
    sampling, config = checkpoint.sampling, checkpoint.configs["scheduler"]
    name = sampling.scheduler or config.get("_class_name")
    kind: Any = getattr(diffusers, str(name), None)
    where = f"{checkpoint.recipe.name}: scheduler {name}"
    if lacking := getattr(kind, "_backends", None):  # what diffusers has in the place of one that it cannot import
        packages = " ".join(one for one in lacking if one != "torch")
        raise UsageError(f"{where} needs what is not installed: pip install {packages}")
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    known = known and hasattr(kind, "set_timesteps") and hasattr(kind, "step")
    if not known:
        wrong = UsageError if sampling.scheduler else CheckpointError
        raise wrong(f"{where}: diffusers has no scheduler of that name, such as EulerDiscreteScheduler")
    if not sampling.scheduler:
        try:
            kind.from_config(config)
        except Exception as error:  # of any class: what it computes with is the checkpoint's
            raise CheckpointError(f"{where} does not take its scheduler_config.json ({first_line(error)})") from error
    unknown = set(sampling.settings) - set(inspect.signature(kind).parameters)
    if unknown:
        raise UsageError(f"{where} has no setting {min(unknown)!r}")
    if sampling.timesteps and "timesteps" not in inspect.signature(kind.set_timesteps).parameters:
        raise UsageError(f"{where} takes no timesteps, but a number of steps")
    if sampling.eta is not None and "eta" not in inspect.signature(kind.step).parameters:
        raise UsageError(f"{where} takes no eta: TCDScheduler and DDIMScheduler do")
    try:
        scheduler = kind.from_config(config, **sampling.settings)
        last = scheduler.config.num_train_timesteps - 1
        if max(sampling.timesteps, default=0) > last:
            raise UsageError(f"{where}: timesteps reach from 0 to {last}, and {sampling.timesteps[0]} lies outside")
        if (sampling.count or 1) > last + 1:
            raise UsageError(f"{where}: {sampling.count} steps, and there are {last + 1} timesteps: --steps 4 to 50 do")
        ends = []
        for seed in (0, 1):
            latents, noise = torch.zeros(1, 4, 2, 2) * scheduler.init_noise_sigma, [torch.Generator().manual_seed(seed)]
            for timestep in _timesteps(scheduler, sampling, torch.device("cpu")):
                seen = scheduler.scale_model_input(latents, timestep)
                latents = _step(scheduler, sampling, torch.zeros_like(seen), timestep, latents, noise)
            ends.append(latents)
    except UsageError:
        raise
    except Exception as error:  # of any class: what it computes with is the user's
        raise UsageError(f"{where} does not take {sampling.settings or sampling} ({first_line(error)})") from error
    noisy = not torch.equal(*ends)
    if noisy and "generator" not in inspect.signature(kind.step).parameters:
        raise UsageError(f"{where} draws noise for a whole batch, and images here are drawn one by one: choose another")
    return scheduler, noisy


def draw(sampler: Sampler, seed: int, classes: Sequence[int], rounds: Sequence[int]) -> Draws:
    """Standard normal noise and all else: image by image a function of (seed, class, round) alone."""
    shape = (4, sampler.side, sampler.side)
    keys = list(zip(classes, rounds, strict=True))

    def stream(number: int, key: tuple[int, int]) -> np.random.Generator:
        return np.random.default_rng((seed, number, *key))

    noise = [stream(NOISE_STREAM, key).standard_normal(shape, dtype=np.float32) for key in keys]
    low, high = sampler.sampling.guidance
    guidance = [stream(GUIDANCE_STREAM, key).uniform(low, high) if low < high else low for key in keys]
    seeds = [int(stream(STEP_STREAM, key).integers(1 << 63)) for key in keys if sampler.noisy]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return Draws(torch.from_numpy(np.stack(noise)), generators, torch.tensor(guidance, dtype=torch.float32))


@torch.inference_mode()
def sample(sampler: Sampler, conditioning: Conditioning, prompts: Tensor, draws: Draws) -> Tensor:
    """Clean latents float32 [N, 4, side, side]. `prompts` [N] indexes `conditioning`.

    One pass of the UNet per step or, with guidance g, one of twice the batch: negative + g * (positive - negative), as
    diffusers weighs what Ho & Salimans (2022) proposed. Images whose guidance is 1 or less get their own prompt alone.
    """
    scheduler, guided = sampler.scheduler, sampler.sampling.guided
    timesteps = _timesteps(scheduler, sampler.sampling, sampler.device)
    latents: Tensor = draws.noise.to(sampler.device) * scheduler.init_noise_sigma
    strength = draws.guidance.clamp_min(1).to(sampler.device).view(-1, 1, 1, 1)
    if guided:
        prompts = torch.cat([torch.full_like(prompts, len(conditioning.embeds) - 1), prompts])
    prompts = prompts.to(conditioning.embeds.device)
    told: dict[str, Any] = {"encoder_hidden_states": conditioning.embeds[prompts].to(sampler.device)}
    if conditioning.pooled is not None and sampler.time_ids is not None:
        time_ids = sampler.time_ids.expand(len(prompts), -1)
        pooled = conditioning.pooled[prompts.to(conditioning.pooled.device)].to(sampler.device)
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    for timestep in timesteps:
        seen = scheduler.scale_model_input(latents, timestep).to(sampler.dtype)
        seen = torch.cat([seen, seen]) if guided else seen
        output: Tensor = sampler.unet(seen, timestep, return_dict=False, **told)[0].float()
        if guided:
            negative, positive = output.chunk(2)
            output = negative + strength * (positive - negative)
        latents = _step(scheduler, sampler.sampling, output, timestep, latents, draws.generators)
    return latents


def _timesteps(scheduler: Any, sampling: Sampling, device: torch.device) -> Tensor:
    """Sets the scheduler to the first of its steps, and returns the times of all."""
    if sampling.timesteps:
        scheduler.set_timesteps(timesteps=list(sampling.timesteps), device=device)
    else:
        scheduler.set_timesteps(sampling.count, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # it would look its first step up on the device, and wait for that
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def _step(
    scheduler: Any, sampling: Sampling, output: Tensor, timestep: Tensor, latents: Tensor, noise: list[torch.Generator]
) -> Tensor:
    """One step of the scheduler. The noise that it adds comes from one generator per image, if there are any."""
    takes = inspect.signature(scheduler.step).parameters
    told: dict[str, Any] = {} if sampling.eta is None else {"eta": sampling.eta}
    if noise and "generator" in takes:
        told["generator"] = noise
    after: Tensor = scheduler.step(output, timestep, latents, **told, return_dict=False)[0]
    return after
