"""Train the embedded checkpoint: a text-to-image model of SDXL-Turbo's layout that knows the built-in tasks' prompts.

The story, top to bottom: the VAE learns the real images; critics, the evaluator's network at several ages, learn them
too; then the UNet and both text encoders together learn to turn noise and a prompt into a latent of the prompt's class,
in the one step the job takes: first into one of the class's Gaussian, then into one whose picture means to the critics
what real ones of the class do.

    ./run.sh train-embedded --data ../shared/data --output outputs/embedded

`OUTPUT/checkpoint` is the checkpoint, `OUTPUT/training.log` the losses, `OUTPUT/state.pt` what `--resume` goes on from,
`OUTPUT/*.png` sample sheets. The same command, seed and thread count repeat the same losses, killed and resumed or not.
"""

import json
import logging
import sys
from dataclasses import dataclass
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
from tools.embedded.critics import Critics, Features, make_critics
from tools.embedded.gaussians import fit_class_gaussians
from tools.embedded.layout import LATENT_SCALE, Networks, build_networks, save_networks, token_ids
from tools.embedded.one_step import CANVAS, STYLE_SHARES, Batch, Lesson, make, token_ids_of, train_one_step
from tools.embedded.progress import Progress, begin_stage, save_whole, start
from tools.training import keep_freed_memory
from tools.training_data import SOURCES, load_training_images

TASKS = ("cifar100", "tinyimagenet")
SHRUNK_AT_ONCE = 2048  # images
SHEET_CLASSES, SHEET_IMAGES = 10, 8


@dataclass(frozen=True)
class Options:
    """What the command line asks for. Steps are optimiser steps; `save_every` counts those of both stages."""

    data: Path
    output: Path
    seed: int
    vae_steps: int
    steps: int
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
        "--steps", type=int, default=4000, metavar="N", help="those of UNet and text encoders (default: 4000)"
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
    if min(options.vae_steps, options.steps, options.save_every, options.threads) < 1:
        raise UsageError("--vae-steps, --steps, --save-every and --threads must be at least 1")
    return options


def train(options: Options) -> None:
    """Both stages, or what is left of them. Raises InputFileError for the data, OutputError for the folder."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tasks = [load_task(name) for name in TASKS]
    networks = build_networks(all_prompts(tasks))
    # Channels last is about three times as fast in these narrow convolutions on a CPU.
    for network in (networks.unet, networks.vae):
        network.to(memory_format=torch.channels_last)
    progress = Progress(options.output, options.save_every)
    progress.generator.manual_seed(options.seed)
    start(progress, networks, resume=options.resume)
    images = [real_images(options.data, task) for task in tasks]

    if progress.stage == "vae":
        vae.train_vae(networks, progress, torch.cat([of_task.flatten(0, 1) for of_task in images]), options.vae_steps)
        begin_stage(progress, networks, "one_step")
    features = Features()
    lessons = [
        Lesson(
            task,
            token_ids_of(networks, task),
            fit_class_gaussians(vae.encode_images(networks.vae, pixels)),
            all_critics(options, task, pixels, features),
        )
        for task, pixels in zip(tasks, images, strict=True)
    ]
    train_one_step(
        networks, progress, lessons, features, options.steps, lambda: draw_samples(options, networks, lessons)
    )
    write_checkpoint(options, networks, progress)


def all_prompts(tasks: list[Task]) -> list[str]:
    """What the tokenizer learns its words from."""
    return [
        prompt for task in tasks for style in STYLE_SHARES for phrasing in task.prompts(style) for prompt in phrasing
    ]


def real_images(data: Path, task: Task) -> Tensor:
    """Every training image of a task by class, CANVAS px wide: uint8 `[classes, n, 3, CANVAS, CANVAS]`, every other
    one mirrored. Raises InputFileError."""
    images = load_training_images(data, task.name, task.size)
    counts = images.labels.bincount()
    if counts.min() != counts.max():
        raise InputFileError(
            f"{task.name}: classes have {counts.min()} to {counts.max()} images, expected as many of each"
        )
    order = images.labels.argsort(stable=True)
    pixels = torch.cat([shrunk(images.pixels[part]) for part in torch.split(order, SHRUNK_AT_ONCE)])
    pixels = pixels.view(len(counts), -1, 3, CANVAS, CANVAS)
    pixels[:, 1::2] = pixels[:, 1::2].flip(-1)
    return pixels


def shrunk(pixels: Tensor) -> Tensor:
    """uint8 images at CANVAS px, antialiased."""
    if pixels.shape[-1] == CANVAS:
        return pixels
    return F.interpolate(pixels, size=(CANVAS, CANVAS), mode="bilinear", antialias=True)


def all_critics(options: Options, task: Task, pixels: Tensor, features: Features) -> Critics:
    """The critics of a task, kept in the output for a resumed run."""
    kept = options.output / f"critics_{task.name}.pt"
    if not kept.exists():
        critics = make_critics(task, pixels, features, options.seed)
        save_whole({"weights": critics.weights, "means": critics.means, "squares": critics.squares}, kept)
    return Critics(task, **torch.load(kept, weights_only=True))


@torch.no_grad()
def draw_samples(options: Options, networks: Networks, lessons: list[Lesson]) -> None:
    """A sheet a task, `OUTPUT/samples_TASK.png`: classes down, samples of the described prompt across."""
    for lesson in lessons:
        prompts = [c.described for c in lesson.task.classes]
        chosen = torch.arange(0, len(prompts), len(prompts) // SHEET_CLASSES)
        shape = (len(chosen), SHEET_IMAGES, 4, CANVAS // 4, CANVAS // 4)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
        made = make(networks, Batch(chosen, token_ids(networks, [prompts[i] for i in chosen]), noise))
        pixels = networks.vae.decode(made.flatten(0, 1) / LATENT_SCALE).sample
        tiles = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().view(*shape[:2], 3, CANVAS, CANVAS)
        sheet = tiles.permute(0, 3, 1, 4, 2).reshape(-1, SHEET_IMAGES * CANVAS, 3).numpy()
        Image.fromarray(np.ascontiguousarray(sheet)).save(options.output / f"samples_{lesson.task.name}.png")


def write_checkpoint(options: Options, networks: Networks, progress: Progress) -> None:
    """`OUTPUT/checkpoint`: the fp16 checkpoint, and beside it `training.json` and the log."""
    folder = options.output / "checkpoint"
    save_networks(networks, folder)
    summary = {
        "resolutions": [CANVAS],  # the job reads this; the rest is for people
        "data": {name: SOURCES[name] for name in TASKS},
        "objective": "VAE: L1 + KL; one step: class Gaussian regression, then mean features of critics",
        "seed": options.seed,
        "steps": {"vae": options.vae_steps, "one_step": options.steps},
        "threads": options.threads,
        "seconds": round(progress.seconds),
        "losses": progress.log[-1:],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "training.log").write_text("".join(line + "\n" for line in progress.log))
    print(f"{folder}: written after {progress.seconds:.0f} s of training", flush=True)


if __name__ == "__main__":
    sys.exit(main())
