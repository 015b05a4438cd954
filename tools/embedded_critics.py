"""The networks the one-step generator is judged by: the evaluator's own, caught at several ages of their training.

What a picture is worth is decided by such a network that learns from it, so its features are the space in which made
and real pictures have to agree. One network is not enough: a generator would find what is peculiar to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submission.tasks import Task
from tools import dsa
from tools.convnet import ConvNet
from tools.embedded_objective import energy_distance
from tools.training import Measure, Schedule, train
from tools.training_data import LabelledImages

SQUARE = 32  # pixels; critics see the four quarters of a 64 px image one by one, at the scale the evaluator sees
AGES = (100, 300, 750, 1500)  # SGD steps after which a critic is kept; the last is as long as the quick evaluation
PROGRESS_EVERY = 50  # steps


def squares(images: Tensor) -> Tensor:
    """Images `[N, c, s, s]` cut into squares of SQUARE pixels, `[N * (s / SQUARE)^2, c, SQUARE, SQUARE]`, row-major."""
    n = images.shape[-1] // SQUARE
    cut = images.view(len(images), -1, n, SQUARE, n, SQUARE)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def normalised(pixels: Tensor, task: Task) -> Tensor:
    """Pixels in -1..1, `[N, 3, h, w]`, as the evaluator gets them: less the task's mean, over its std."""
    mean = torch.tensor(task.mean, dtype=pixels.dtype).view(3, 1, 1)
    std = torch.tensor(task.std, dtype=pixels.dtype).view(3, 1, 1)
    return (pixels / 2 + 0.5 - mean) / std


def train_critics(images: LabelledImages, task: Task, seed: int) -> list[dict[str, Any]]:
    """Weights of one ConvNet at each of AGES, trained on squares of the real images as the evaluator trains.

    Draws from torch's global generators, seeded by `seed`, and leaves them as they were.
    """
    tiles = squares(images.pixels)
    each = len(tiles) // len(images.pixels)
    labels = images.labels.repeat_interleave(each)
    real = torch.cat([normalised(part.float() / 127.5 - 1, task).half() for part in torch.split(tiles, 4096)])
    kept: list[dict[str, Any]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critic = ConvNet(len(task.classes), SQUARE)

        def keep(step: int, measure: Measure) -> None:
            if step in AGES:
                kept.append({name: weight.clone() for name, weight in critic.state_dict().items()})
            if step % PROGRESS_EVERY == 0:
                print(f"critic {task.name} {step} loss={measure.loss:.3f} accuracy={measure.accuracy:.3f}", flush=True)

        train(critic, real, labels, Schedule(max_steps=max(AGES)), keep, forward=quick(critic))
    return kept


def quick(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network's forward pass compiled, in bf16 where torch's autocast finds that safe: for speed on a CPU."""
    compiled = torch.compile(network)

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = compiled(images)
        return result.float()

    return forward


@dataclass(frozen=True)
class Judgement:
    """`energy` and `cross_entropy` are scalars with gradients to the made pictures; `accuracy` is 0..1."""

    energy: Tensor
    cross_entropy: Tensor
    accuracy: float


@dataclass(frozen=True)
class Judge:
    """A task's critics, taking turns in one compiled network."""

    task: Task
    weights: list[dict[str, Any]]
    network: ConvNet
    features: Callable[[Tensor], Tensor]  # float32 `[B, 3, SQUARE, SQUARE]` to `[B, 128, SQUARE / 8, SQUARE / 8]`


def make_judge(task: Task, weights: list[dict[str, Any]]) -> Judge:
    network = ConvNet(len(task.classes), SQUARE).requires_grad_(False)
    return Judge(task, weights, network, quick(network.features))


def judge_pictures(judge: Judge, made: Tensor, real: Tensor, classes: Tensor, generator: torch.Generator) -> Judgement:
    """What one critic, drawn at random, thinks of made and real pictures of `classes`, `[C, m, 3, SQUARE, SQUARE]`.

    Pixels are in -1..1. Both go through the same operation of the evaluator's augmentation. Gradients have to be taken
    before the next judgement, which puts other weights into the same network.
    """
    age, seed = (int(torch.randint(most, (), generator=generator)) for most in (len(judge.weights), 2**31))
    judge.network.load_state_dict(judge.weights[age])
    both = normalised(torch.cat([made.clamp(-1, 1), real]).flatten(0, 1), judge.task)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        both = dsa.augment(both)
    count = len(both) // 2
    features_made = judge.features(both[:count])
    with torch.no_grad():
        features_real = judge.features(both[count:])
    logits = judge.network.classifier(features_made.flatten(1))
    labels = classes.repeat_interleave(made.shape[1])
    size = made.shape[:2]
    return Judgement(
        energy_distance(*(f.view(*size, *f.shape[1:]) for f in (features_made, features_real))),
        F.cross_entropy(logits, labels),
        (logits.argmax(dim=1) == labels).float().mean().item(),
    )
