"""What a training leaves: the checkpoint for the job, and sheets and a page for people."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from submission.errors import OutputError, first_line
from submission.machine.disk import write_json, write_whole
from submission.tasks import Task
from tools.training import processes
from tools.training.copying import COPIES, Nearest, nearest, share_of_copies
from tools.training.images import RealImages
from tools.training.layout import Conditioning, Networks, canvas_for, save_networks
from tools.training.page import render
from tools.training.progress import CHECKPOINT, DONE, LOG, STAGES, Progress
from tools.training.prompts import Prompts, encode_prompts
from tools.training.samples import DRAWN_AT_ONCE, SHEET_IMAGES, draw, sheet_of_pictures, shown_classes, to_bytes
from tools.training.vae import decode_latents, encode_images

# In the output.
PAGE, SAMPLES = "train.html", "samples"
# Samples of a canvas, and real images, that are compared with its training images to see whether it copies.
CHECKED = 256
# Of the samples so many are shown beside the training images nearest to them.
SHOWN = 16


@dataclass(frozen=True)
class Subject:
    """What is trained, and on what: `tasks` in the order of their canvases, `images` of each canvas; and the `command`
    that draws with it."""

    tasks: list[Task]
    networks: Networks
    prompts: Prompts
    images: list[RealImages]
    command: str


def can_draw(progress: Progress) -> bool:
    """Whether the training is so far that there are pictures: the teacher has begun."""
    place = progress.place
    return "diffusion" in progress.journal.steps or (place.stage == "diffusion" and place.step > 0)


def forget_sheets(output: Path, tasks: Sequence[Task]) -> None:
    """Remove what an earlier training of these tasks drew there."""
    for task in tasks:
        for stage in STAGES:
            sheet_of(output, task, stage).unlink(missing_ok=True)


def recover(output: Path) -> None:
    """Put the checkpoint back where a kill came while it was replaced."""
    if not (output / CHECKPOINT).exists() and (old := output / f"{CHECKPOINT}.old").exists():
        old.rename(output / CHECKPOINT)


def publish(subject: Subject, progress: Progress) -> None:
    """Write the checkpoint as it stands, and a sheet of samples for every task."""
    if processes.is_first():
        _write_sheets(subject, progress, encode_prompts(subject.networks, subject.prompts))
        _write_checkpoint(subject, progress, progress.log.warnings)


def write_result(subject: Subject, progress: Progress) -> str | None:
    """Write the same, with what is found about copying, and the page. Returns a warning where it copies."""
    if not processes.is_first():
        return None
    encoded = encode_prompts(subject.networks, subject.prompts)
    _write_sheets(subject, progress, encoded)
    found = [_compare(subject, images, encoded) for images in subject.images]
    share = sum(share_of_copies(samples, real) for samples, real, _ in found) / len(found)
    progress.journal.copying = {
        "share_of_copies": round(share, 4),
        "likeness_of_samples": [round(samples.likeness.median().item(), 3) for samples, _, _ in found],
        "likeness_of_real_images": [round(real.likeness.median().item(), 3) for _, real, _ in found],
    }
    warning = None
    if share >= COPIES:
        warning = (
            f"it copies: {share:.0%} of its pictures are nearer to an image it was trained on than 99% of real images "
            "are to another; give it more images, or less time"
        )
    facts = _write_checkpoint(subject, progress, [*progress.log.warnings, *([warning] if warning else [])])
    sheets: dict[str, dict[str, bytes]] = {}
    for stage in STAGES:
        files = {task.name: sheet_of(progress.output, task, stage) for task in subject.tasks}
        sheets[stage] = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    page = render(facts, subject.command, progress.journal.lines, sheets, [pictures for _, _, pictures in found])
    write_whole(progress.output / PAGE, page.encode())
    return warning


def sheet_of(output: Path, task: Task, stage: str) -> Path:
    """Where the sheet of a task stands that was drawn last in a stage."""
    return output / SAMPLES / f"{task.name}_{stage}.png"


def _write_sheets(subject: Subject, progress: Progress, encoded: Conditioning) -> None:
    stage = [*progress.journal.steps][-1] if progress.place.stage == DONE else progress.place.stage
    for task, images, first in _places(subject):
        rows = subject.prompts.described[[first + index for index in shown_classes(len(task.classes))]]
        pictures = draw(subject.networks, encoded, rows.repeat_interleave(SHEET_IMAGES), images.canvas, seed=0)
        file = sheet_of(progress.output, task, stage)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, sheet_of_pictures(pictures))


def _places(subject: Subject) -> Iterator[tuple[Task, RealImages, int]]:
    """Each task with the images of its canvas, and the number of its first class."""
    first = 0
    for task in subject.tasks:
        images = next(one for one in subject.images if one.canvas == canvas_for(task.size))
        yield task, images, first
        first += len(task.classes)


def _compare(subject: Subject, images: RealImages, encoded: Conditioning) -> tuple[Nearest, Nearest, Tensor]:
    """How near samples of a canvas's classes, and real images, come to the training images; and some of the samples
    with the images nearest to them, uint8 `[SHOWN, 2, 3, s, s]`.

    A real image stands for one that was not trained on: it has passed through the VAE as a sample has, and is compared
    with all training images but itself.
    """
    device, training = images.pixels.device, images.pixels
    classes = torch.arange(CHECKED, device=device) * len(images.counts) // CHECKED
    rows = subject.prompts.described[images.first + classes]
    samples = draw(subject.networks, encoded, rows, images.canvas, seed=1).to(device)
    own = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[:CHECKED].to(device)
    with torch.no_grad():
        latents = encode_images(subject.networks.vae, training[own])
        parts = [decode_latents(subject.networks.vae, part) for part in torch.split(latents, DRAWN_AT_ONCE)]
    kept = torch.cat([to_bytes(part) for part in parts])
    of_samples, of_real = nearest(samples, training), nearest(kept.to(device), training, own)
    shown = of_samples.likeness.argsort(descending=True)[:SHOWN]
    beside = torch.stack([samples[shown], training[of_samples.index[shown]]], dim=1)
    return of_samples, of_real, beside.cpu()


def _write_checkpoint(subject: Subject, progress: Progress, warnings: Sequence[str]) -> dict[str, Any]:
    """The checkpoint, `training.json` and the log in it, in place of the one before. Returns what the JSON says."""
    place, journal, tasks = progress.place, progress.journal, subject.tasks
    device = subject.networks.unet.device
    facts = {
        "resolutions": sorted({images.canvas for images in subject.images}),  # the job reads this, and the next
        "classes": {task.name: [one.name for one in task.classes] for task in tasks},
        "images": {
            task.name: int(images.counts[first - images.first :][: len(task.classes)].sum())
            for task, images, first in _places(subject)
        },
        "settings": progress.settings,
        "steps": journal.steps | ({} if place.stage == DONE else {place.stage: place.step}),
        "finished": place.stage == DONE,
        "seconds": round(progress.budget.elapsed),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} cores",
        "torch": torch.__version__,
        "losses": journal.lines[-1:],
        "copying": journal.copying,
        "warnings": list(warnings),
    }
    folder = progress.output / CHECKPOINT
    new, old = folder.with_name(CHECKPOINT + ".new"), folder.with_name(CHECKPOINT + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        save_networks(subject.networks, new)
    except Exception as error:  # of any class: libraries have their own for a full disk
        raise OutputError(f"cannot write {new} ({first_line(error)}): make room, and go on with --resume") from error
    write_json(new / "training.json", facts)
    (new / LOG).write_text("".join(line + "\n" for line in journal.lines))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # a folder that holds something cannot be replaced at once
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return facts
