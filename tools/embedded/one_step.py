"""UNet and text encoders: from noise and a prompt to a latent of the prompt's class, in the one step the job takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from submission.tasks import PromptStyle, Task
from tools.embedded.critics import Critics, Features, in_bf16, judge
from tools.embedded.gaussians import ClassGaussians, sample_class_gaussians
from tools.embedded.layout import (
    LATENT_CHANNELS,
    LATENT_SCALE,
    LATENT_SHRINK,
    Networks,
    encode,
    one_step_latents,
    token_ids,
)
from tools.embedded.progress import Progress, record, steps, update

CANVAS = 32  # pixels that all pictures are made on; larger ones are enlarged from it, for a quarter of the work
CLASSES_IN_BATCH = 16
IMAGES_OF_CLASS = 16
RATE = 1e-3
# How often a class is asked for in each style. `described` is the default; `diverse` has eight phrasings to learn.
STYLE_SHARES: dict[PromptStyle, float] = {"label": 0.2, "described": 0.55, "diverse": 0.25}
REGRESSION_SHARE = 0.1  # of the steps, before critics judge
MEAN_WEIGHT = 2.0  # of the error of a class's mean among the errors of its samples, where it would be lost
ANCHOR_WEIGHT = 0.1  # of the regression beside the critics
LABEL_WEIGHT = 0.01  # of the cross entropy, nats; not tuned


@dataclass(frozen=True)
class Lesson:
    """What is learnt of one task: token ids by style, `[phrasings, classes, tokens]`, Gaussians, and critics."""

    task: Task
    ids: dict[PromptStyle, Tensor]
    gaussians: ClassGaussians
    critics: Critics


@dataclass(frozen=True)
class Batch:
    """`classes` `[C]`, their token ids `[C, tokens]`, noise `[C, m, 4, h, w]`."""

    classes: Tensor
    ids: Tensor
    noise: Tensor


def token_ids_of(networks: Networks, task: Task) -> dict[PromptStyle, Tensor]:
    """Token ids `[phrasings, classes, tokens]` by style."""
    return {
        style: torch.stack([token_ids(networks, phrasing) for phrasing in task.prompts(style)])
        for style in STYLE_SHARES
    }


def train_one_step(
    networks: Networks,
    progress: Progress,
    lessons: list[Lesson],
    features: Features,
    total: int,
    on_save: Callable[[], None],
) -> None:
    """Train UNet and text encoders for `total` steps, the lessons in turns.

    At first the target is a map that is known: the class's own Gaussian, which takes the same noise to a sample of
    itself (low variance, so the classes are told apart within a few hundred steps). Then the VAE decodes what is made,
    and critics judge the pictures. The Gaussian stays as an anchor: it keeps pictures of one class apart.
    """
    networks.vae.requires_grad_(False)
    decode = in_bf16(torch.compile(lambda latents: networks.vae.decode(latents).sample))
    trained = (networks.unet, networks.text_encoder, networks.text_encoder_2)
    parameters = [p for network in trained for p in network.parameters()]
    optimisers = [torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)]
    for step in steps(progress, networks, optimisers, total, on_save):
        lesson = lessons[step % len(lessons)]
        batch = draw_batch(lesson.ids, progress.generator)
        made = make(networks, batch)
        error = made - sample_class_gaussians(lesson.gaussians, batch.classes, batch.noise)
        regression = error.square().mean()
        losses = {"regression": regression.item()}
        if step < REGRESSION_SHARE * total:
            loss = regression + MEAN_WEIGHT * error.mean(dim=1).square().mean()
        else:
            latents = (made / LATENT_SCALE).flatten(0, 1).contiguous(memory_format=torch.channels_last)
            pictures = decode(latents).view(*made.shape[:2], 3, CANVAS, CANVAS)
            judgement = judge(lesson.critics, features, pictures, batch.classes, progress.generator)
            loss = judgement.means + judgement.squares + ANCHOR_WEIGHT * regression
            losses |= {"means": judgement.means.item(), "squares": judgement.squares.item()}
            if judgement.cross_entropy is not None:
                loss = loss + LABEL_WEIGHT * judgement.cross_entropy
                losses["label"] = judgement.cross_entropy.item()
        update(optimisers, parameters, loss)
        record(progress, **{f"{lesson.task.name}_{kind}": value for kind, value in losses.items()})


def make(networks: Networks, batch: Batch) -> Tensor:
    """Latents of unit scale, float32, in the shape of the batch's noise."""
    with torch.autocast("cpu", torch.bfloat16):
        conditioning = encode(networks, batch.ids)
        each = type(conditioning)(*(part.repeat_interleave(batch.noise.shape[1], dim=0) for part in conditioning))
        latents = one_step_latents(networks, batch.noise.flatten(0, 1), each, CANVAS)
    return latents.float().view_as(batch.noise)


def draw_batch(ids: dict[PromptStyle, Tensor], generator: torch.Generator) -> Batch:
    """Classes without repetition, a style and a phrasing for each, and noise for several images of each."""
    classes = next(iter(ids.values())).shape[1]
    chosen = torch.randperm(classes, generator=generator)[:CLASSES_IN_BATCH]
    styles = list(STYLE_SHARES)
    shares = torch.tensor(list(STYLE_SHARES.values()))
    picks = torch.multinomial(shares, len(chosen), replacement=True, generator=generator).tolist()
    turns = torch.randint(2**31, (len(chosen),), generator=generator).tolist()
    rows = []
    for label, pick, turn in zip(chosen.tolist(), picks, turns, strict=True):
        of_style = ids[styles[pick]]
        rows.append(of_style[turn % len(of_style), label])
    side = CANVAS // LATENT_SHRINK
    noise = torch.randn(len(chosen), IMAGES_OF_CLASS, LATENT_CHANNELS, side, side, generator=generator)
    return Batch(chosen, torch.stack(rows), noise)
