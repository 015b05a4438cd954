"""The critic: the evaluator's own network, after it has learnt to tell the real classes of all tasks apart.

What a picture is worth is decided by such a network that learns from it. What this one sees in a picture, the VAE is
held to keep: the latents then have more of it, and of what no such network sees, less.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submission.dataset.dataset_file import mean_and_std
from submission.distillation.convnet import ConvNet
from submission.tasks import load_task
from tools.reading.real_images import resized
from tools.scoring.training import BATCH_SIZE, Measure, Schedule, train
from tools.training import processes
from tools.training.arithmetic import computing
from tools.training.images import RealImages, to_unit
from tools.training.progress import OVERRUN, Pace, Progress, save, stop_if_told

SIZE = 32  # pixels of the pictures it sees
STEPS = 1000  # of SGD, at most; its accuracy on images of 300 classes still rises slowly then
PROBED = 4  # steps that tell how many the stage's time allows

# What the critic sees in normalised pictures `[N, 3, SIZE, SIZE]`: the output of each of its blocks, float32 `[N, 128,
# w, w]` with w SIZE/2, SIZE/4 and SIZE/8.
Critic = Callable[[Tensor], list[Tensor]]


class _LateError(Exception):
    """The stage's time is over."""


def train_critic(progress: Progress, images: Sequence[RealImages]) -> dict[str, Tensor]:
    """Weights of a ConvNet that learnt the images, SIZE px wide, as the evaluator trains, in the stage's time, STEPS at
    most; one that turns out to be late is left as it is then. One that begins anew, in a resumed training, has all of
    the time again. Raises StoppedError.

    Draws from torch's global generators, seeded by the training's seed, and leaves them as they were.
    """
    place, device, began = progress.place, progress.generator.device, progress.budget.elapsed
    pixels = torch.cat([normalised(to_unit(resized(of_canvas.pixels, SIZE))).half() for of_canvas in images])
    labels = torch.cat([of_canvas.labels for of_canvas in images])

    def tell(step: int, measure: Measure) -> None:
        place.step = step
        progress.log.status(Pace(place, BATCH_SIZE, (0, place.began), progress.budget.elapsed))
        stop_if_told(progress)
        if processes.agreed(progress.budget.elapsed - began > (1 + OVERRUN) * (place.until - place.began)):
            raise _LateError

    def learn(steps: int) -> dict[str, Tensor]:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(progress.settings["seed"])
            network = ConvNet(int(labels.max()) + 1, SIZE).to(device)

            def forward(batch: Tensor) -> Tensor:
                with computing(device):
                    logits: Tensor = network(batch)
                return logits.float()

            with suppress(_LateError):
                train(network, pixels, labels, Schedule(max_steps=steps), tell, forward)
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    if place.ends is None:
        learn(1)  # allocates
        probing = progress.budget.elapsed
        learn(PROBED)
        pace = max((progress.budget.elapsed - probing) / PROBED, 1e-9)
        left = place.until - progress.budget.elapsed
        place.ends = processes.agreed(min(STEPS, max(1, int(left / pace))))
        save(progress)
    return learn(place.ends)


def load_critic(weights: dict[str, Tensor], device: torch.device) -> Critic:
    """The critic of these weights. Gradients go to the pictures alone."""
    network = ConvNet(len(weights["classifier.bias"]), SIZE).requires_grad_(False)
    network.load_state_dict(weights)
    network.to(device).to(memory_format=torch.channels_last)

    def critic(pictures: Tensor) -> list[Tensor]:
        with computing(device):
            return [block.float() for block in _blocks(network, pictures)]

    return critic


def _blocks(network: ConvNet, pictures: Tensor) -> list[Tensor]:
    blocks = []
    for layer in network.features:
        # Not in place: the gradient needs what came in.
        pictures = F.relu(pictures) if isinstance(layer, nn.ReLU) else layer(pictures)
        if isinstance(layer, nn.AvgPool2d):
            blocks.append(pictures)
    return blocks


def difference(critic: Critic, made: Tensor, real: Tensor) -> Tensor:
    """How differently the critic sees two batches of pictures in -1..1: the squared error of each block's output over
    its variance in the real ones, the mean of the blocks. A scalar with the gradient to `made`."""
    errors = []
    for block in critic(normalised(torch.cat([made, real]))):
        of_made, of_real = block.chunk(2)
        errors.append((of_made - of_real).square().mean() / of_real.var())
    return torch.stack(errors).mean()


def normalised(pictures: Tensor) -> Tensor:
    """Pixels in -1..1, `[N, 3, h, w]`, as the critic gets them: normalised as CIFAR-100's, whatever the task."""
    mean, std = _cifar100_mean_and_std(pictures.device)
    return (pictures / 2 + 0.5 - mean) / std


@functools.cache
def _cifar100_mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = mean_and_std(load_task("cifar100"))
    return mean.to(device), std.to(device)
