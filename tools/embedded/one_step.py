"""UNet and text encoders: from noise and a prompt to a latent of the prompt's class, in the one step the job takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from submission.tasks import PromptStyle, Task
from tools.embedded.arithmetic import autocast
from tools.embedded.gaussians import ClassGaussians, sample_class_gaussians
from tools.embedded.layout import LATENT_CHANNELS, LATENT_SHRINK, Networks, encode, one_step_latents, token_ids
from tools.embedded.muon import Muon
from tools.embedded.progress import Progress, record, steps, update

CANVAS = 32  # pixels that all pictures are made on; larger ones are enlarged from it, for a quarter of the work
# How often a class is asked for in each style. `described` is the default; `diverse` has eight phrasings to learn.
STYLE_SHARES: dict[PromptStyle, float] = {"label": 0.2, "described": 0.55, "diverse": 0.25}

CLASSES_IN_BATCH, IMAGES_OF_CLASS = 16, 16  # a batch: classes, images of each
RATE = 3e-3
MEAN_WEIGHT = 2.0  # of the error of a class's mean among the errors of its samples, where it would be lost
ADAMS_SHARE = 1 / 3  # of the rate, for what Muon does not take: text encoders, biases and norms


@dataclass(frozen=True)
class Prompts:
    """What is asked for: token ids by style, `[phrasings, classes of all tasks, tokens]`, and how often each class is
    drawn, `[classes]`."""

    ids: dict[PromptStyle, Tensor]
    shares: Tensor


@dataclass(frozen=True)
class Batch:
    """`classes` `[C]`, their token ids `[C, tokens]`, noise `[C, m, 4, h, w]`."""

    classes: Tensor
    ids: Tensor
    noise: Tensor


def prompts_of(networks: Networks, tasks: list[Task], counts: Tensor) -> Prompts:
    """The prompts of all classes of the tasks, in a row, each drawn in proportion to its real images."""
    ids = {
        style: torch.cat(
            [torch.stack([token_ids(networks, phrasing) for phrasing in task.prompts(style)]) for task in tasks], dim=1
        )
        for style in STYLE_SHARES
    }
    return Prompts(ids, counts.float())


def train_one_step(
    networks: Networks,
    progress: Progress,
    prompts: Prompts,
    gaussians: ClassGaussians,
    total: int,
    on_save: Callable[[], None],
) -> None:
    """Train UNet and text encoders, for `total` steps, to a map that is known: the one that takes the same noise to a
    sample of the class's own Gaussian."""
    parameters, optimisers = optimisers_of(networks, RATE)
    for _ in steps(progress, optimisers, total, on_save):
        batch = draw_batch(prompts, CLASSES_IN_BATCH, IMAGES_OF_CLASS, progress.generator)
        target = sample_class_gaussians(gaussians, batch.classes, batch.noise)
        regression, of_mean = errors(make(networks, batch), target)
        update(optimisers, parameters, regression + of_mean)
        record(progress, regression=regression.item())


def errors(made: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error of latents `[C, m, ...]`, and MEAN_WEIGHT times that of each class's mean."""
    error = made - target
    return error.square().mean(), MEAN_WEIGHT * error.mean(dim=1).square().mean()


def optimisers_of(networks: Networks, rate: float) -> tuple[list[Tensor], list[torch.optim.Optimizer]]:
    """What is trained to make latents, UNet and text encoders, and what trains it, at Muon's `rate`."""
    weights = [p for p in networks.unet.parameters() if p.ndim > 1]
    rest = [p for p in networks.unet.parameters() if p.ndim == 1]
    rest += [p for network in (networks.text_encoder, networks.text_encoder_2) for p in network.parameters()]
    adam = torch.optim.AdamW(rest, lr=rate * ADAMS_SHARE, betas=(0.9, 0.99), weight_decay=0.01)
    return weights + rest, [Muon(weights, lr=rate), adam]


def make(networks: Networks, batch: Batch) -> Tensor:
    """Latents of unit scale, float32, in the shape of the batch's noise."""
    # The fused attention of torch is slow at so few tokens: its backward pass alone took a quarter of a step.
    with autocast(), sdpa_kernel(SDPBackend.MATH):
        conditioning = encode(networks, batch.ids)
        each = type(conditioning)(*(part.repeat_interleave(batch.noise.shape[1], dim=0) for part in conditioning))
        latents = one_step_latents(networks, batch.noise.flatten(0, 1), each, CANVAS)
    return latents.float().view_as(batch.noise)


def draw_batch(prompts: Prompts, classes: int, images: int, generator: torch.Generator) -> Batch:
    """Classes without repetition, a style and a phrasing for each, and noise for several images of each."""
    chosen = torch.multinomial(prompts.shares, classes, generator=generator)
    styles = list(STYLE_SHARES)
    shares = torch.tensor(list(STYLE_SHARES.values()))
    picks = torch.multinomial(shares, len(chosen), replacement=True, generator=generator).tolist()
    turns = torch.randint(2**31, (len(chosen),), generator=generator).tolist()
    rows = []
    for label, pick, turn in zip(chosen.tolist(), picks, turns, strict=True):
        of_style = prompts.ids[styles[pick]]
        rows.append(of_style[turn % len(of_style), label])
    side = CANVAS // LATENT_SHRINK
    noise = torch.randn(len(chosen), images, LATENT_CHANNELS, side, side, generator=generator)
    return Batch(chosen, torch.stack(rows), noise)
