"""The critic: the evaluator's own network, after it has learnt to tell the real classes of all tasks apart.

What a picture is worth is decided by such a network that learns from it. What this one sees in a picture, the VAE is
held to keep: the latents then have more of it, and of what no such network sees, less.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submission.dataset.dataset_file import mean_and_std
from submission.distillation.convnet import ConvNet
from submission.tasks import load_task
from tools.scoring.training import Measure, Schedule, train
from tools.training.arithmetic import computing
from tools.training.images import RealImages, to_unit

SIZE = 32  # pixels of the pictures it sees
STEPS = 1000  # of SGD; its accuracy on images of 300 classes still rises slowly then
PROGRESS_EVERY = 50  # steps

# What the critic sees in normalised pictures `[N, 3, SIZE, SIZE]`: the output of each of its blocks, float32 `[N, 128,
# w, w]` with w SIZE/2, SIZE/4 and SIZE/8.
Critic = Callable[[Tensor], list[Tensor]]


def train_critic(images: RealImages, seed: int) -> dict[str, Tensor]:
    """Weights of a ConvNet that learnt images SIZE px wide as the evaluator trains.

    Draws from torch's global generators, seeded by `seed`, and leaves them as they were.
    """
    device = images.pixels.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ConvNet(len(images.counts), SIZE).to(device)
        compiled = torch.compile(network, disable=device.type != "cpu")

        def forward(batch: Tensor) -> Tensor:
            with computing(device):
                logits: Tensor = compiled(batch)
            return logits.float()

        def tell(step: int, measure: Measure) -> None:
            if step % PROGRESS_EVERY == 0:
                print(f"critic {step} loss={measure.loss:.3f} accuracy={measure.accuracy:.3f}", flush=True)

        pixels = torch.cat([normalised(to_unit(of_class)).half() for of_class in images.by_class()])
        train(network, pixels, images.labels, Schedule(max_steps=STEPS), tell, forward)
    weights: dict[str, Tensor] = network.state_dict()
    return weights


def load_critic(weights: dict[str, Tensor], device: torch.device) -> Critic:
    """The critic of these weights. Gradients go to the pictures alone."""
    network = ConvNet(len(weights["classifier.bias"]), SIZE).requires_grad_(False)
    network.load_state_dict(weights)
    network.to(device)
    run = torch.compile(_blocks, dynamic=False, disable=device.type != "cpu")

    def critic(pictures: Tensor) -> list[Tensor]:
        with computing(device):
            return [block.float() for block in run(network, pictures)]

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
