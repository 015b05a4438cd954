"""Train the embedded checkpoint: a text-to-image model of SDXL-Turbo's layout that knows the built-in tasks' prompts.

The story, top to bottom: the VAE learns the real images; every image becomes a latent; critics, the evaluator's network
at several ages, learn the real images too; the UNet and both text encoders together learn to turn noise and a prompt
into a latent of the prompt's class, in the one step the job takes: first into one of the class's Gaussian, then into
one whose picture the critics cannot tell from real ones of the class.

    python -m tools.train_embedded --data ../shared/data --output outputs/embedded

`OUTPUT/checkpoint` is the checkpoint, `OUTPUT/training.log` the losses, `OUTPUT/state.pt` what `--resume` goes on from,
`OUTPUT/*.png` sample sheets. The same command, seed and thread count repeat the same losses, killed and resumed or not.
"""

import argparse
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from submission.errors import BankoError, InputFileError, OutputError, UsageError
from submission.tasks import PromptStyle, Task, load_task
from tools.embedded_critics import SQUARE, judge_pictures, make_judge, train_critics
from tools.embedded_layout import (
    LATENT_SCALE,
    LATENT_SHRINK,
    Networks,
    build_networks,
    encode,
    one_step_latents,
    save_networks,
    token_ids,
)
from tools.embedded_objective import fit_class_gaussians, sample_class_gaussians
from tools.training import keep_freed_memory
from tools.training_data import SOURCES, LabelledImages, load_training_images

TASKS = ("cifar100", "tinyimagenet")

VAE_BATCH = 48
VAE_RATE = 2e-3
VAE_CROP = 32  # pixels; the VAE is convolutional, so crops of the larger images teach it as much and cost a quarter
KL_WEIGHT = 1e-3  # per latent, against an L1 of pixels in -1..1: keeps latents smooth, costs next to no detail
NORMALISE_ON = 2048  # images the latents' mean and std are taken from

# Classes in a batch, images of each, by task. A 64 px sample costs as much as four of 32 px, so there are fewer.
CLASSES_IN_BATCH = {"cifar100": 16, "tinyimagenet": 20}
IMAGES_OF_CLASS = {"cifar100": 8, "tinyimagenet": 4}
TURNS = ("cifar100", "tinyimagenet")
ONE_STEP_RATE = 1.5e-3
# How often a class is asked for in each style. `described` is the default; `diverse` has eight phrasings to learn.
STYLE_SHARES: dict[PromptStyle, float] = {"label": 0.15, "described": 0.6, "diverse": 0.25}
REGRESSION_SHARE = 0.2  # of the steps, before critics judge as well
MEAN_WEIGHT = 2.0  # of the error of a class's mean among the errors of its samples, where it would be lost
ANCHOR_WEIGHT = 0.5  # of the Gaussian when the judging begins; it falls to nothing
ENERGY_WEIGHT = 5.0
LABEL_WEIGHT = 0.3

WARM_UP = 50  # steps
CLIP_NORM = 1.0
LOG_EVERY = 25  # steps; odd, so that the tasks take turns in the log as well

TRAINED = ("text_encoder", "text_encoder_2", "unet", "vae")


@dataclass(frozen=True)
class Options:
    """What the command line asks for. Steps are optimiser steps; `save_every` counts those of both stages."""

    data: Path
    output: Path
    seed: int
    vae_steps: int
    steps: int
    images_per_class: int
    save_every: int
    resume: bool
    threads: int


@dataclass
class Progress:
    """Where the training stands; with the networks, all that a resumed one needs."""

    stage: str = "vae"
    step: int = 0  # done in this stage
    seconds: float = 0.0  # spent so far, loading included, over all starts
    optimiser: dict[str, Any] | None = None
    log: list[str] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        train(parse(argv))
    except BankoError as error:
        print(f"train-embedded: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="train-embedded", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real images: cifar100/, tinyimagenet/")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, log, state, sample sheets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1500, help=f"optimiser steps of {VAE_BATCH} images")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of UNet and text encoders")
    parser.add_argument(
        "--images-per-class", type=int, default=500, help="real images the second stage learns from, at most"
    )
    parser.add_argument("--save-every", type=int, default=200, help="steps between saves of state and sample sheet")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/state.pt where there is one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; part of what makes a run repeatable")
    options = Options(**vars(parser.parse_args(argv)))
    if min(options.vae_steps, options.steps, options.images_per_class, options.save_every, options.threads) < 1:
        raise UsageError("--vae-steps, --steps, --images-per-class, --save-every and --threads must be at least 1")
    return options


def train(options: Options) -> None:
    """Both stages, or what is left of them. Raises InputFileError for the data, OutputError for the folder."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tasks = {name: load_task(name) for name in TASKS}
    networks = build_networks(all_prompts(tasks))
    # Channels last is about three times as fast in these narrow convolutions on a CPU.
    for network in (networks.unet, networks.vae):
        network.to(memory_format=torch.channels_last)
    progress = Progress()
    progress.generator.manual_seed(options.seed)
    start_output(options, networks, progress)
    images = {name: load_training_images(options.data, name, task.size) for name, task in tasks.items()}

    if progress.stage == "vae":
        train_vae(options, networks, progress, images)
        normalise_latents(networks.vae, torch.cat(list(vae_crops(images, NORMALISE_ON, progress.generator))))
        progress.stage, progress.step, progress.optimiser = "one_step", 0, None
        save_state(options, networks, progress)
    real = {name: real_images(options, networks, name, images[name]) for name in tasks}
    critics = {name: all_critics(options, tasks[name], images[name]) for name in tasks}
    train_one_step(options, networks, progress, tasks, real, critics)
    write_checkpoint(options, networks, progress)


def all_prompts(tasks: dict[str, Task]) -> list[str]:
    return [
        prompt
        for task in tasks.values()
        for style in STYLE_SHARES
        for phrasing in task.prompts(style)
        for prompt in phrasing
    ]


# The VAE


def train_vae(options: Options, networks: Networks, progress: Progress, images: dict[str, LabelledImages]) -> None:
    """Reconstruct crops: L1 on pixels plus a light KL term, the reparameterised posterior in between."""
    vae = networks.vae
    optimiser = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=0.0)
    for _ in steps(options, networks, progress, optimiser, options.vae_steps, VAE_RATE):
        pixels = torch.cat(list(vae_crops(images, VAE_BATCH, progress.generator)))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=progress.generator)
        reconstructed = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (reconstructed - pixels).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        update(optimiser, error + KL_WEIGHT * kl)
        decibels = -10 * math.log10((reconstructed.detach() - pixels).square().mean().item() / 4)
        record(options, progress, loss=error.item(), kl=kl.item(), psnr=decibels)


def vae_crops(images: dict[str, LabelledImages], count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Per task, its share of `count` random crops `[n, 3, 32, 32]` in -1..1, mirrored by a coin."""
    for of_task in images.values():
        n = count // len(images)
        room = of_task.pixels.shape[-1] - VAE_CROP + 1
        chosen = torch.randint(len(of_task.pixels), (n,), generator=generator)
        corners = torch.randint(room, (n, 2), generator=generator).tolist()
        crops = torch.stack(
            [
                of_task.pixels[index, :, top : top + VAE_CROP, left : left + VAE_CROP]
                for index, (top, left) in zip(chosen.tolist(), corners, strict=True)
            ]
        )
        yield mirrored(to_unit(crops), generator)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in -1..1, as diffusers' VAEs expect."""
    return pixels.float() / 127.5 - 1


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mirrored left to right with probability one half."""
    heads = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return torch.where(heads, pixels.flip(-1), pixels)


@torch.no_grad()
def normalise_latents(vae: Any, pixels: Tensor) -> None:
    """Change the VAE so that every latent channel has mean 0 and std 1 / LATENT_SCALE over `pixels`, decoded the same.

    The layout has one scaling factor and no shift; the two 1x1 convolutions next to the latents take up the rest.
    """
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in torch.split(pixels, 128)])
    centre = means.mean(dim=(0, 2, 3))
    gain = 1 / (LATENT_SCALE * means.std(dim=(0, 2, 3)))
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(gain)
    into.bias[:channels] = (into.bias[:channels] - centre) * gain
    into.weight[:channels] *= gain.view(-1, 1, 1, 1)
    into.bias[channels:] += 2 * gain.log()  # the log variances
    out_of.bias += out_of.weight[:, :, 0, 0] @ centre
    out_of.weight /= gain.view(1, -1, 1, 1)


# The latents


@dataclass(frozen=True)
class Real:
    """Real images of a task by class: `pixels` uint8 `[classes, n, 3, size, size]`, `latents` as `all_latents` says."""

    pixels: Tensor
    latents: Tensor


def real_images(options: Options, networks: Networks, task: str, images: LabelledImages) -> Real:
    """The first images of every class, every other one mirrored, and their latents. All classes must have as many."""
    counts = images.labels.bincount()
    if counts.min() != counts.max():
        raise InputFileError(f"{task}: classes have {counts.min()} to {counts.max()} images, expected as many of each")
    n = min(int(counts[0]), options.images_per_class)
    order = images.labels.argsort(stable=True).view(len(counts), -1)[:, :n]
    pixels = images.pixels[order]
    pixels[:, 1::2] = pixels[:, 1::2].flip(-1)
    return Real(pixels, all_latents(options, networks, task, pixels))


@torch.no_grad()
def all_latents(options: Options, networks: Networks, task: str, pixels: Tensor) -> Tensor:
    """Posterior means of the images of a task, unit scale, float16 `[classes, n, 4, size/4, size/4]`.

    Kept in the output for a resumed run.
    """
    kept = options.output / f"latents_{task}.pt"
    if kept.exists():
        loaded: Tensor = torch.load(kept, weights_only=True)
        if loaded.shape[:2] == pixels.shape[:2]:
            return loaded
    batches: list[Tensor] = []
    for part in torch.split(pixels.flatten(0, 1), 128):
        unit = to_unit(part).contiguous(memory_format=torch.channels_last)
        batches.append((networks.vae.encode(unit).latent_dist.mean * LATENT_SCALE).half())
    latents = torch.cat(batches).contiguous()
    latents = latents.view(*pixels.shape[:2], *latents.shape[1:])
    save_whole(latents, kept)
    return latents


# The critics


def all_critics(options: Options, task: Task, images: LabelledImages) -> list[dict[str, Any]]:
    """Weights of the critics of a task, kept in the output for a resumed run."""
    kept = options.output / f"critics_{task.name}.pt"
    if not kept.exists():
        save_whole(train_critics(images, task, options.seed), kept)
    weights: list[dict[str, Any]] = torch.load(kept, weights_only=True)
    return weights


# The one-step generator


def train_one_step(
    options: Options,
    networks: Networks,
    progress: Progress,
    tasks: dict[str, Task],
    real: dict[str, Real],
    critics: dict[str, list[dict[str, Any]]],
) -> None:
    """UNet and text encoders, from noise and prompt to a latent of the class.

    At first the target is a map that is known: the class's own Gaussian, which takes the same noise to a sample of
    itself (low variance, so the classes are told apart within a few hundred steps). Then the VAE decodes what is made,
    and a critic compares it with real pictures: the energy distance between their features, which knows of more than
    two moments, and how sure it is of the class. The Gaussian stays as an anchor, with less and less weight.
    """
    gaussians = {name: fit_class_gaussians(of_task.latents.float()) for name, of_task in real.items()}
    ids = {name: token_ids_of(networks, task) for name, task in tasks.items()}
    judges = {name: make_judge(tasks[name], critics[name]) for name in tasks}
    networks.vae.requires_grad_(False)
    trained = (networks.unet, networks.text_encoder, networks.text_encoder_2)
    parameters = [p for network in trained for p in network.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=ONE_STEP_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step in steps(options, networks, progress, optimiser, options.steps, ONE_STEP_RATE):
        name = TURNS[step % len(TURNS)]
        batch = draw_batch(real[name], ids[name], name, progress.generator)
        conditioning = encode(networks, batch.ids)
        each = type(conditioning)(*(part.repeat_interleave(batch.noise.shape[1], dim=0) for part in conditioning))
        made = one_step_latents(networks, batch.noise.flatten(0, 1), each, tasks[name].size).view_as(batch.noise)
        error = made - sample_class_gaussians(gaussians[name], batch.classes, batch.noise)
        regression = error.square().mean()
        loss = regression + MEAN_WEIGHT * error.mean(dim=1).square().mean()
        losses = {"regression": regression.item()}
        judged = (step / options.steps - REGRESSION_SHARE) / (1 - REGRESSION_SHARE)
        if judged >= 0:
            pictures, originals = same_square(networks, made, batch.real, progress.generator)
            judgement = judge_pictures(judges[name], pictures, originals, batch.classes, progress.generator)
            loss = (
                ANCHOR_WEIGHT * (1 - judged) * loss
                + ENERGY_WEIGHT * judgement.energy
                + LABEL_WEIGHT * judgement.cross_entropy
            )
            losses |= {"energy": judgement.energy.item(), "accuracy": judgement.accuracy}
        update(optimiser, loss)
        record(options, progress, **{f"{name}_{kind}": value for kind, value in losses.items()})


def same_square(
    networks: Networks, latents: Tensor, pixels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same square, drawn at random, of made latents, decoded, and of real pixels: `[C, m, 3, SQUARE, SQUARE]`.

    To decode a quarter of a 64 px image costs a quarter of the time, which is better spent on more images.
    """
    side = SQUARE // LATENT_SHRINK
    top, left = (int(torch.randint(latents.shape[-1] // side, (), generator=generator)) for _ in range(2))
    cut = latents[..., top * side : (top + 1) * side, left * side : (left + 1) * side].flatten(0, 1)
    made = networks.vae.decode(cut.contiguous(memory_format=torch.channels_last) / LATENT_SCALE).sample
    part = pixels[..., top * SQUARE : (top + 1) * SQUARE, left * SQUARE : (left + 1) * SQUARE]
    return made.view(*latents.shape[:2], *made.shape[1:]), to_unit(part)


def token_ids_of(networks: Networks, task: Task) -> dict[PromptStyle, Tensor]:
    """Token ids `[phrasings, classes, tokens]` by style."""
    return {
        style: torch.stack([token_ids(networks, phrasing) for phrasing in task.prompts(style)])
        for style in STYLE_SHARES
    }


@dataclass(frozen=True)
class Batch:
    """`classes` `[C]`, their token ids `[C, tokens]`, noise `[C, m, 4, h, w]`, real pixels uint8 `[C, m, 3, s, s]`."""

    classes: Tensor
    ids: Tensor
    noise: Tensor
    real: Tensor


def draw_batch(real: Real, ids: dict[PromptStyle, Tensor], task: str, generator: torch.Generator) -> Batch:
    """Classes without repetition, a style and a phrasing for each, and real images of each."""
    chosen = torch.randperm(len(real.pixels), generator=generator)[: CLASSES_IN_BATCH[task]]
    styles = list(STYLE_SHARES)
    shares = torch.tensor(list(STYLE_SHARES.values()))
    picks = torch.multinomial(shares, len(chosen), replacement=True, generator=generator).tolist()
    turns = torch.randint(2**31, (len(chosen),), generator=generator).tolist()
    rows = []
    for label, pick, turn in zip(chosen.tolist(), picks, turns, strict=True):
        of_style = ids[styles[pick]]
        rows.append(of_style[turn % len(of_style), label])
    members = torch.randint(real.pixels.shape[1], (len(chosen), IMAGES_OF_CLASS[task]), generator=generator)
    noise = torch.randn(*members.shape, *real.latents.shape[2:], generator=generator)
    return Batch(chosen, torch.stack(rows), noise, real.pixels[chosen.unsqueeze(1), members])


# Steps, saves, logs


def steps(
    options: Options, networks: Networks, progress: Progress, optimiser: torch.optim.Optimizer, total: int, rate: float
) -> Iterator[int]:
    """Numbers of the steps left to do, the learning rate set before each, the state saved after some.

    The rate rises linearly over WARM_UP steps and falls to nothing along half a cosine.
    """
    if progress.optimiser is not None:
        optimiser.load_state_dict(progress.optimiser)
    for step in range(progress.step, total):
        started = time.monotonic()
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / total))
        yield step
        progress.step = step + 1
        progress.seconds += time.monotonic() - started
        if progress.step % options.save_every == 0 or progress.step == total:
            progress.optimiser = optimiser.state_dict()
            save_state(options, networks, progress)
            draw_samples(options, networks, progress)


def update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parameters = itertools.chain.from_iterable(group["params"] for group in optimiser.param_groups)
    torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    optimiser.step()


def record(options: Options, progress: Progress, **losses: float) -> None:
    """One line in the log and on the screen every LOG_EVERY steps (the first ones too, for a quick look)."""
    done = progress.step + 1
    if done % LOG_EVERY and done > len(TURNS):
        return
    line = f"{progress.stage} {done} " + " ".join(f"{name}={value:.5f}" for name, value in losses.items())
    progress.log.append(line)
    with (options.output / "training.log").open("a") as log:
        log.write(line + "\n")
    print(f"{line} ({progress.seconds:.0f} s)", flush=True)


def start_output(options: Options, networks: Networks, progress: Progress) -> None:
    """Make the folder ready: with --resume take up its state, else refuse one that holds a training already."""
    kept = options.output / "state.pt"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if kept.exists() and not options.resume:
            raise OutputError(f"{kept} is there from another training: go on with --resume, or choose another --output")
        if kept.exists():
            load_state(kept, networks, progress)
        else:
            for other in (*options.output.glob("latents_*.pt"), *options.output.glob("critics_*.pt")):
                other.unlink()  # of another training
        (options.output / "training.log").write_text("".join(line + "\n" for line in progress.log))
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written: {error.strerror}") from error


def save_state(options: Options, networks: Networks, progress: Progress) -> None:
    """Put everything a resumed run needs in one file."""
    state = {
        "networks": {name: getattr(networks, name).state_dict() for name in TRAINED},
        "stage": progress.stage,
        "step": progress.step,
        "seconds": progress.seconds,
        "optimiser": progress.optimiser,
        "log": progress.log,
        "generator": progress.generator.get_state(),
    }
    save_whole(state, options.output / "state.pt")


def save_whole(value: Any, path: Path) -> None:
    """Save beside the place and move in: a kill leaves what was there before, or the whole of the new."""
    unfinished = path.with_name(path.name + ".part")
    torch.save(value, unfinished)
    unfinished.replace(path)


def load_state(path: Path, networks: Networks, progress: Progress) -> None:
    state = torch.load(path, weights_only=True)
    for name in TRAINED:
        getattr(networks, name).load_state_dict(state["networks"][name])
    progress.stage, progress.step, progress.seconds = state["stage"], state["step"], state["seconds"]
    progress.optimiser, progress.log = state["optimiser"], state["log"]
    progress.generator.set_state(state["generator"])


@torch.no_grad()
def draw_samples(options: Options, networks: Networks, progress: Progress) -> None:
    """A sheet a task, `OUTPUT/samples_TASK.png`: ten classes down, eight samples of the described prompt across."""
    if progress.stage == "vae":
        return
    for name in TASKS:
        task = load_task(name)
        chosen = range(0, len(task.classes), len(task.classes) // 10)
        conditioning = encode(networks, token_ids(networks, [task.classes[i].described for i in chosen]))
        each = type(conditioning)(*(part.repeat_interleave(8, dim=0) for part in conditioning))
        side = task.size // LATENT_SHRINK
        noise = torch.randn(len(each.pooled), 4, side, side, generator=torch.Generator().manual_seed(options.seed))
        pixels = networks.vae.decode(one_step_latents(networks, noise, each, task.size) / LATENT_SCALE).sample
        tiles = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().view(-1, 8, 3, task.size, task.size)
        sheet = tiles.permute(0, 3, 1, 4, 2).reshape(-1, 8 * task.size, 3).numpy()
        Image.fromarray(np.ascontiguousarray(sheet)).save(options.output / f"samples_{name}.png")


def write_checkpoint(options: Options, networks: Networks, progress: Progress) -> None:
    """`OUTPUT/checkpoint`: the fp16 checkpoint, and beside it `training.json` and the log."""
    folder = options.output / "checkpoint"
    save_networks(networks, folder)
    summary = {
        "resolutions": sorted({load_task(name).size for name in TASKS}),  # the job reads this; the rest is for people
        "data": {name: SOURCES[name] for name in TASKS},
        "objective": "VAE: L1 + KL; one step: class Gaussian regression, then energy distance and label by critics",
        "seed": options.seed,
        "steps": {"vae": options.vae_steps, "one_step": options.steps},
        "images_per_class": options.images_per_class,
        "threads": options.threads,
        "seconds": round(progress.seconds),
        "losses": progress.log[-len(TURNS) :],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "training.log").write_text("".join(line + "\n" for line in progress.log))
    print(f"{folder}: written after {progress.seconds:.0f} s of training", flush=True)


if __name__ == "__main__":
    sys.exit(main())
