"""Train the embedded checkpoint: a text-to-image model of SDXL-Turbo's layout that knows the built-in tasks' prompts.

The story, top to bottom: the critic, a network like the evaluator's, learns to tell the real images apart; the VAE
learns to keep what the critic sees in them; the UNet and both text encoders together learn to turn noise and a prompt,
in the one step the job takes, into a sample of the Gaussian that latents of the prompt's class have; then they are
sharpened: a critic that has not learnt much yet is to learn from the samples what real classes look like.

    ./run.sh train-embedded --data ../shared/data --output outputs/embedded

`OUTPUT/checkpoint` is the checkpoint, `OUTPUT/training.log` the losses, `OUTPUT/state.pt` what `--resume` goes on from,
`OUTPUT/*.png` sample sheets. The same command, seed and thread count repeat the same losses, killed and resumed or not.
"""

import json
import logging
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from submission.cli import Parser
from submission.errors import InputFileError, UsageError
from submission.tasks import Task, load_task
from tools.command import exit_code_of
from tools.embedded import vae
from tools.embedded.critic import STEPS, Critic, load_critic, train_critic
from tools.embedded.gaussians import fit_class_gaussians
from tools.embedded.images import RealImages
from tools.embedded.layout import TRAINED, Networks, build_networks, save_networks, token_ids
from tools.embedded.one_step import CANVAS, STYLE_SHARES, Batch, make, prompts_of, train_one_step
from tools.embedded.progress import Progress, begin_stage, save_whole, start
from tools.embedded.sharpen import train_sharpen
from tools.training import keep_freed_memory
from tools.training_data import SOURCES, load_training_images

TASKS = ("cifar100", "tinyimagenet")
SHRUNK_AT_ONCE = 2048  # images
SHEET_CLASSES, SHEET_IMAGES = 10, 8


@dataclass(frozen=True)
class Options:
    """What the command line asks for. Steps are optimiser steps; `save_every` counts those of every stage."""

    data: Path
    output: Path
    seed: int
    vae_steps: int
    steps: int
    sharpen_steps: int
    save_every: int
    resume: bool
    threads: int


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return exit_code_of(lambda: train(parse(argv)))


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh train-embedded",
        description="Trains the embedded checkpoint on real images: hours on two cores, to be stopped and resumed.",
        epilog="example:\n  ./run.sh train-embedded --data DATA --output outputs/embedded --resume\n\n"
        "exit codes: 0 trained; 2 usage; 5 output cannot be written; 6 the images were refused",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="real images: cifar100/train, tinyimagenet/*.zip"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets checkpoint, log, state and sample sheets"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
    parser.add_argument(
        "--vae-steps",
        type=int,
        default=2400,
        metavar="N",
        help=f"optimiser steps of {vae.BATCH} images for the VAE (default: 2400)",
    )
    parser.add_argument(
        "--steps", type=int, default=3500, metavar="N", help="those of UNet and text encoders (default: 3500)"
    )
    parser.add_argument(
        "--sharpen-steps",
        type=int,
        default=50,
        metavar="N",
        help="those of the same, judged by critics (default: 50)",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=200,
        metavar="N",
        help="steps between saves of state and sample sheets (default: 200)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/state.pt where there is one")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        metavar="N",
        help="CPU threads; part of what makes a run repeatable (default: 2)",
    )
    return parser


def parse(argv: list[str] | None) -> Options:
    """Raises UsageError."""
    options = Options(**vars(build_parser().parse_args(argv)))
    if min(options.vae_steps, options.steps, options.sharpen_steps, options.save_every, options.threads) < 1:
        raise UsageError("--vae-steps, --steps, --sharpen-steps, --save-every and --threads must be at least 1")
    return options


def train(options: Options) -> None:
    """All stages, or what is left of them. Raises InputFileError for the data, OutputError for the folder."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tasks = [load_task(name) for name in TASKS]
    networks = build_networks(all_prompts(tasks))
    # Channels last is about three times as fast in these narrow convolutions on a CPU.
    for network in (networks.unet, networks.vae):
        network.to(memory_format=torch.channels_last)
    progress = Progress(options.output, options.save_every, {name: getattr(networks, name) for name in TRAINED})
    progress.generator.manual_seed(options.seed)
    start(progress, resume=options.resume)
    images = real_images(options.data, tasks)
    *early_critics, critic = critics_of(options, images)
    if progress.stage == "vae":
        vae.train_vae(networks, critic, progress, images, options.vae_steps)
        begin_stage(progress, "one_step")
    networks.vae.requires_grad_(False)
    gaussians = fit_class_gaussians([vae.encode_images(networks.vae, mirrored_too(c)) for c in images.by_class()])
    prompts = prompts_of(networks, tasks, images.counts)
    on_save = partial(draw_samples, options, networks, tasks)
    if progress.stage == "one_step":
        train_one_step(networks, progress, prompts, gaussians, options.steps, on_save)
        begin_stage(progress, "sharpen")
    train_sharpen(networks, progress, prompts, gaussians, early_critics, images, options.sharpen_steps, on_save)
    write_checkpoint(options, networks, progress)


def all_prompts(tasks: list[Task]) -> list[str]:
    """What the tokenizer learns its words from."""
    return [
        prompt for task in tasks for style in STYLE_SHARES for phrasing in task.prompts(style) for prompt in phrasing
    ]


def real_images(data: Path, tasks: list[Task]) -> RealImages:
    """Every training image of the tasks, CANVAS px wide. Raises InputFileError."""
    pixels, counts = [], []
    for task in tasks:
        images = load_training_images(data, task.name, task.size)
        counts.append(images.labels.bincount(minlength=len(task.classes)))
        if not counts[-1].all():
            raise InputFileError(f"{task.name}: class {counts[-1].argmin()} has no images")
        order = images.labels.argsort(stable=True)
        pixels += [shrunk(images.pixels[part]) for part in torch.split(order, SHRUNK_AT_ONCE)]
    return RealImages(torch.cat(pixels), torch.cat(counts))


def mirrored_too(pixels: Tensor) -> Tensor:
    """The images and their mirror images, in which a class is as likely to be seen."""
    return torch.cat([pixels, pixels.flip(-1)])


def shrunk(pixels: Tensor) -> Tensor:
    """uint8 images at CANVAS px, antialiased."""
    if pixels.shape[-1] == CANVAS:
        return pixels
    return F.interpolate(pixels, size=(CANVAS, CANVAS), mode="bilinear", antialias=True)


def critics_of(options: Options, images: RealImages) -> list[Critic]:
    """The critic, several times early in its training and at its end; the output keeps it for a resumed run."""
    kept = options.output / "critic.pt"
    if not kept.exists():
        save_whole(train_critic(images, options.seed), kept)
    return [load_critic(weights) for weights in torch.load(kept, weights_only=True)]


@torch.no_grad()
def draw_samples(options: Options, networks: Networks, tasks: list[Task]) -> None:
    """A sheet a task, `OUTPUT/samples_TASK.png`: classes down, samples of the described prompt across."""
    for task in tasks:
        prompts = [c.described for c in task.classes]
        chosen = torch.arange(0, len(prompts), len(prompts) // SHEET_CLASSES)
        shape = (len(chosen), SHEET_IMAGES, 4, CANVAS // 4, CANVAS // 4)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
        made = make(networks, Batch(chosen, token_ids(networks, [prompts[i] for i in chosen]), noise))
        pixels = vae.decode_latents(networks.vae, made.flatten(0, 1))
        tiles = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().view(*shape[:2], 3, CANVAS, CANVAS)
        sheet = tiles.permute(0, 3, 1, 4, 2).reshape(-1, SHEET_IMAGES * CANVAS, 3).numpy()
        Image.fromarray(np.ascontiguousarray(sheet)).save(options.output / f"samples_{task.name}.png")


def write_checkpoint(options: Options, networks: Networks, progress: Progress) -> None:
    """`OUTPUT/checkpoint`: the fp16 checkpoint, and beside it `training.json` and the log."""
    folder = options.output / "checkpoint"
    save_networks(networks, folder)
    summary = {
        "resolutions": [CANVAS],  # the job reads this; the rest is for people
        "data": {name: SOURCES[name] for name in TASKS},
        "objective": "VAE: L1 + KL + critic's features; one step: regression to the class Gaussian, "
        "then ridge regression from samples to real images",
        "seed": options.seed,
        "steps": {
            "critic": STEPS,
            "vae": options.vae_steps,
            "one_step": options.steps,
            "sharpen": options.sharpen_steps,
        },
        "threads": options.threads,
        "seconds": round(progress.seconds),
        "losses": progress.log[-1:],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "training.log").write_text("".join(line + "\n" for line in progress.log))
    print(f"{folder}: written after {progress.seconds:.0f} s of training", flush=True)


if __name__ == "__main__":
    sys.exit(main())
