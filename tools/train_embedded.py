"""Train the embedded checkpoint: a text-to-image model of SDXL-Turbo's layout that knows the built-in tasks' prompts.

The story, top to bottom: the critic, a network like the evaluator's, learns to tell the real images apart; the VAE
learns to keep what the critic sees in them; the teacher, a UNet, and both text encoders learn to take noise away from
latents, a little at a time; the student, another, learns to make in the one step the job takes what the teacher makes
in many: first where the teacher leads from each noise, then samples that are as likely as the teacher's.

    ./run.sh train-embedded --data ../shared/data --output outputs/embedded

`OUTPUT/checkpoint` is the checkpoint, `OUTPUT/training.log` the losses, `OUTPUT/state.pt` what `--resume` goes on from,
`OUTPUT/*.png` sample sheets. On a CPU, the same command, seed and thread count repeat the same losses, killed and
resumed or not; a GPU adds up in another order each time.
"""

import argparse
import copy
import json
import logging
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torchvision.utils import save_image
from transformers import PreTrainedModel

from submission.arguments import Parser, add_device, exit_code_of, number_from
from submission.errors import InputFileError, OutputError
from submission.machine.device import choose_device
from submission.machine.memory import keep_freed_memory
from submission.tasks import Task, load_task
from tools.reading.training_data import SOURCES, load_training_images
from tools.training import diffusion, distil, vae
from tools.training.critic import STEPS, Critic, load_critic, train_critic
from tools.training.diffusion import Teacher, noise_schedule, train_diffusion
from tools.training.distil import Pairs, make_pairs, train_distil, train_match
from tools.training.images import RealImages
from tools.training.layout import (
    CANVAS,
    LATENT_SHAPE,
    TRAINED,
    Networks,
    build_networks,
    encode,
    one_step_latents,
    save_networks,
    token_ids,
)
from tools.training.progress import Progress, begin_stage, save_whole, start
from tools.training.prompts import Prompts, all_prompts, encode_prompts, prompts_of

TASKS = ("cifar100", "tinyimagenet")
STAGES = ("vae", "diffusion", "distil", "match")
SHRUNK_AT_ONCE = 2048  # images
SHEET_CLASSES, SHEET_IMAGES = 10, 8


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    options = build_parser().parse_args(argv)
    return exit_code_of(lambda: run(options))


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh train-embedded",
        description="Trains the embedded checkpoint on real images: minutes on a large GPU, a day on two cores, to be "
        "stopped and resumed.",
        epilog="example:\n  ./run.sh train-embedded --data DATA --output outputs/embedded --resume\n\n"
        "exit codes: 0 trained; 2 usage; 5 output cannot be written; 6 the images were refused",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="real images: cifar100/train, tinyimagenet/*.zip")
    add("--output", type=Path, required=True, metavar="DIR", help="gets checkpoint, log, state and sample sheets")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random")
    for name, steps, of_what in (
        ("--vae-steps", 5000, f"optimiser steps of {vae.BATCH} images for the VAE"),
        ("--diffusion-steps", 6500, f"those of {diffusion.BATCH} latents for teacher and text encoders"),
        ("--distil-steps", 600, f"those of {distil.DISTIL_BATCH} for the student, where the teacher leads"),
        ("--match-steps", 600, f"those of {distil.MATCH_BATCH} for the student, as likely as the teacher's"),
        ("--save-every", 500, "steps between saves of the state, and of sample sheets once there is a student"),
    ):
        add(name, type=number_from(1), default=steps, metavar="N", help=f"{of_what} (default: {steps})")
    add("--resume", action="store_true", help="go on from OUTPUT/state.pt where there is one")
    add_device(parser)
    add("--threads", type=number_from(1), default=2, metavar="N", help="CPU threads, on which results depend")
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises InputFileError for the data, OutputError for the folder."""
    try:
        train(options)
    except (OSError, SafetensorError) as error:  # not the data's: what reads them has an error of its own
        raise OutputError(
            f"cannot write to {options.output} ({getattr(error, 'strerror', None) or error}): make room and go on with "
            "--resume, or choose another --output"
        ) from error


def train(options: argparse.Namespace) -> None:
    """All stages, or what is left of them. Raises InputFileError for the data; OutputError, OSError for the folder."""
    keep_freed_memory()
    device = choose_device(options.device)
    torch.backends.cudnn.benchmark = True  # the steps of a stage have batches of one shape
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tasks = [load_task(name) for name in TASKS]
    networks = build_networks(all_prompts(tasks))
    unet, rival = copy.deepcopy(networks.unet), copy.deepcopy(networks.unet)  # the teacher's, and its rival
    trained = {name: getattr(networks, name) for name in TRAINED} | {"teacher": unet, "rival": rival}
    for network in trained.values():
        network.to(device)
        if device.type == "cpu" and not isinstance(network, PreTrainedModel):
            network.to(memory_format=torch.channels_last)  # about three times as fast in these narrow convolutions
    progress = Progress(
        options.output,
        options.save_every,
        trained,
        torch.Generator(device).manual_seed(options.seed),
        {"device": device.type, "seed": options.seed, **steps_of(options)},
    )
    start(progress, resume=options.resume)
    images = real_images(options.data, tasks, device)
    if progress.stage == "vae":
        vae.train_vae(networks, critic_of(options, images), progress, images, options.vae_steps)
        begin_stage(progress, "diffusion")
    prompts = prompts_of(networks, tasks, images.counts)
    if progress.stage == "diffusion":
        # Mirrored too: a class is as likely to be seen so.
        both = torch.cat([vae.encode_images(networks.vae, p) for p in (images.pixels, images.pixels.flip(-1))])
        train_diffusion(networks, unet, progress, prompts, both, images.labels.repeat(2), options.diffusion_steps)
        for follower in (networks.unet, rival):
            follower.load_state_dict(unet.state_dict())
        begin_stage(progress, "distil")
    teacher = Teacher(unet, noise_schedule(networks.scheduler, device), encode_prompts(networks, prompts))
    on_save = partial(draw_samples, options, networks, tasks)
    if progress.stage == "distil":
        pairs = pairs_of(options, teacher, prompts, device)
        train_distil(networks, progress, teacher.encoded, pairs, options.distil_steps, on_save)
        begin_stage(progress, "match")
    train_match(networks, teacher, rival, progress, prompts, options.match_steps, on_save)
    write_checkpoint(options, networks, progress)


def steps_of(options: argparse.Namespace) -> dict[str, int]:
    """Optimiser steps of each stage."""
    return {stage: getattr(options, f"{stage}_steps") for stage in STAGES}


def real_images(data: Path, tasks: list[Task], device: torch.device) -> RealImages:
    """Every training image of the tasks, CANVAS px wide. Raises InputFileError."""
    pixels, counts = [], []
    for task in tasks:
        images, labels = load_training_images(data, task.name, task.size)
        counts.append(labels.bincount(minlength=len(task.classes)))
        if not counts[-1].all():
            raise InputFileError(f"{task.name}: class {counts[-1].argmin()} has no images")
        order = labels.argsort(stable=True)
        pixels += [shrunk(images[part]) for part in torch.split(order, SHRUNK_AT_ONCE)]
    return RealImages(torch.cat(pixels).to(device), torch.cat(counts).to(device))


def shrunk(pixels: Tensor) -> Tensor:
    """uint8 images at CANVAS px, antialiased."""
    if pixels.shape[-1] == CANVAS:
        return pixels
    return F.interpolate(pixels, size=(CANVAS, CANVAS), mode="bilinear", antialias=True)


def critic_of(options: argparse.Namespace, images: RealImages) -> Critic:
    """The critic; the output keeps it for a resumed run."""
    kept = options.output / "critic.pt"
    if not kept.exists():
        save_whole(train_critic(images, options.seed), kept)
    return load_critic(torch.load(kept, weights_only=True), images.pixels.device)


def pairs_of(options: argparse.Namespace, teacher: Teacher, prompts: Prompts, device: torch.device) -> Pairs:
    """What the teacher makes of noise; the output keeps it for a resumed run."""
    kept = options.output / "pairs.pt"
    if not kept.exists():
        generator = torch.Generator(device).manual_seed(options.seed)
        save_whole(vars(make_pairs(teacher, prompts, generator)), kept)
    return Pairs(**torch.load(kept, map_location=device, weights_only=True))


@torch.no_grad()
def draw_samples(options: argparse.Namespace, networks: Networks, tasks: list[Task]) -> None:
    """A sheet per task, `OUTPUT/samples_TASK.png`: classes down, samples of the described prompt across."""
    device = networks.unet.device
    for task in tasks:
        prompts = [c.described for c in task.classes][:: len(task.classes) // SHEET_CLASSES]
        conditioning = encode(networks, token_ids(networks, prompts).to(device))
        rows = torch.arange(len(prompts), device=device).repeat_interleave(SHEET_IMAGES)
        noise = torch.randn(len(rows), *LATENT_SHAPE, generator=torch.Generator().manual_seed(options.seed))
        latents = one_step_latents(networks, noise.to(device), conditioning.of(rows))
        pixels = vae.decode_latents(networks.vae, latents).cpu()
        sheet = options.output / f"samples_{task.name}.png"
        save_image(pixels, sheet, nrow=SHEET_IMAGES, padding=0, normalize=True, value_range=(-1, 1))


def write_checkpoint(options: argparse.Namespace, networks: Networks, progress: Progress) -> None:
    """`OUTPUT/checkpoint`: the fp16 checkpoint, and beside it `training.json` and the log."""
    folder = options.output / "checkpoint"
    save_networks(networks, folder)
    summary = {
        "resolutions": [CANVAS],  # the job reads this; the rest is for people
        "data": {name: SOURCES[name] for name in TASKS},
        "objective": "VAE: L1 + KL + critic's features; teacher: v-prediction; "
        "student: regression to the teacher's guided samples, then distribution matching",
        "seed": options.seed,
        "steps": {"critic": STEPS, **steps_of(options)},
        "device": torch.cuda.get_device_name() if networks.unet.device.type == "cuda" else "cpu",
        "threads": options.threads,
        "seconds": round(progress.seconds),
        "losses": progress.journal.lines[-1:],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "training.log").write_text("".join(line + "\n" for line in progress.journal.lines))
    print(f"{folder}: written after {progress.seconds:.0f} s of training", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
