"""The networks the one-step generator is judged by: the evaluator's own, caught at several ages of their training.

What a picture is worth is decided by such a network that learns from it. Of a class its last layer sees, in the first
place, the mean of the features under the evaluator's augmentation; so made pictures of a class are held to the mean
that real ones have (distribution matching, Zhao & Bilen 2023), and to the mean of the squares, since pictures all alike
would have the mean as well. One network is not enough: a generator would find what is peculiar to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from submission.tasks import Task
from tools import dsa
from tools.convnet import ConvNet
from tools.embedded.vae import to_unit
from tools.training import Measure, Schedule, train

SIZE = 32  # pixels of the pictures that critics see
# SGD steps after which a critic is kept: from one that has not learnt yet to one trained as long as by the evaluation.
AGES = (0, 100, 300, 750, 1500)
MEAN_OF = 64  # real images that the mean features of a class are taken over
PROGRESS_EVERY = 50  # steps


@dataclass(frozen=True)
class Critics:
    """The critics of a task: their `weights`, one state an age, and what they make of real images.

    `means` and `squares` are those of the features of a class, and of the features squared: float32
    `[ages, operations of the augmentation, classes, features]`.
    """

    task: Task
    weights: list[dict[str, Tensor]]
    means: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Judgement:
    """What one critic thinks of made pictures: scalars with gradients.

    `means` is the squared distance of the classes' mean features from the real ones', over the variance of these among
    classes; `squares` the same of the squared features. `cross_entropy`, in nats, is None from a critic that has not
    learnt the classes.
    """

    means: Tensor
    squares: Tensor
    cross_entropy: Tensor | None


class Features:
    """A critic's features, float32 `[N, features]`, compiled once; critics of all tasks take turns in it."""

    def __init__(self) -> None:
        self._network = ConvNet(1, SIZE).features.requires_grad_(False)
        self._compiled = in_bf16(torch.compile(self._network))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Become another critic. Gradients have to be taken before."""
        prefix = "features."
        self._network.load_state_dict(
            {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        )

    def __call__(self, images: Tensor) -> Tensor:
        return self._compiled(images).flatten(1)


def in_bf16(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same in bf16 where torch's autocast finds that safe, for speed on a CPU; the result is float32."""

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(images).float()

    return forward


def make_critics(task: Task, images: Tensor, features: Features, seed: int) -> Critics:
    """Critics that learnt real images, uint8 `[classes, n, 3, SIZE, SIZE]`.

    Draws from torch's global generators, seeded by `seed`, and leaves them as they were.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = _train(task, images)
        means, squares = _moments(task, images[:, :MEAN_OF], weights, features)
    return Critics(task, weights, means, squares)


def _train(task: Task, images: Tensor) -> list[dict[str, Tensor]]:
    """Weights of one ConvNet at each of AGES, trained as the evaluator trains."""
    labels = torch.arange(len(images)).repeat_interleave(images.shape[1])
    pixels = torch.cat([normalised(to_unit(of_class), task).half() for of_class in images])
    critic = ConvNet(len(images), SIZE)

    def weights() -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in critic.state_dict().items()}

    kept = [weights()]  # of age 0

    def keep(step: int, measure: Measure) -> None:
        if step in AGES:
            kept.append(weights())
        if step % PROGRESS_EVERY == 0:
            print(f"critic {task.name} {step} loss={measure.loss:.3f} accuracy={measure.accuracy:.3f}", flush=True)

    train(critic, pixels, labels, Schedule(max_steps=max(AGES)), keep, forward=in_bf16(torch.compile(critic)))
    return kept


@torch.no_grad()
def _moments(task: Task, images: Tensor, weights: list[dict[str, Tensor]], features: Features) -> tuple[Tensor, Tensor]:
    """What critics make of real images: `means` and `squares` of Critics."""
    classes, each = images.shape[:2]
    moments: tuple[list[Tensor], list[Tensor]] = ([], [])
    for of_age in weights:
        features.load(of_age)
        for operation in dsa.OPERATIONS:
            # Two classes at a time: as many images as a judgement has, for which the features are compiled.
            parts = torch.split(images.flatten(0, 1), 2 * each)
            seen = torch.cat([features(operation(normalised(to_unit(part), task))) for part in parts])
            for power, kept in enumerate(moments, start=1):
                kept.append((seen**power).view(classes, each, -1).mean(dim=1))
    means, squares = (torch.stack(kept).view(len(weights), len(dsa.OPERATIONS), classes, -1) for kept in moments)
    return means, squares


def normalised(pixels: Tensor, task: Task) -> Tensor:
    """Pixels in -1..1, `[N, 3, h, w]`, as the evaluator gets them: less the task's mean, over its std."""
    mean = torch.tensor(task.mean, dtype=pixels.dtype).view(3, 1, 1)
    std = torch.tensor(task.std, dtype=pixels.dtype).view(3, 1, 1)
    return (pixels / 2 + 0.5 - mean) / std


def judge(critics: Critics, features: Features, made: Tensor, classes: Tensor, generator: torch.Generator) -> Judgement:
    """What one critic, drawn at random, thinks of made pictures `[C, m, 3, SIZE, SIZE]`, -1..1, of `classes` `[C]`.

    They go through one operation of the evaluator's augmentation, drawn as well. Gradients have to be taken before the
    next judgement.
    """
    age, operation, seed = (
        int(torch.randint(most, (), generator=generator)) for most in (len(AGES), len(dsa.OPERATIONS), 2**31)
    )
    weights = critics.weights[age]
    features.load(weights)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pictures = dsa.OPERATIONS[operation](normalised(made.flatten(0, 1).clamp(-1, 1), critics.task))
    seen = features(pictures)
    by_class = seen.view(*made.shape[:2], -1)
    means, squares = (
        squared_distance(values, real[age, operation, classes]).mean() / real[age, operation].var(dim=0).sum()
        for values, real in ((by_class, critics.means), (by_class.square(), critics.squares))
    )
    if not AGES[age]:
        return Judgement(means, squares, None)
    logits = F.linear(seen, weights["classifier.weight"], weights["classifier.bias"])
    return Judgement(means, squares, F.cross_entropy(logits, classes.repeat_interleave(made.shape[1])))


def squared_distance(values: Tensor, target: Tensor) -> Tensor:
    """That of the expectation behind `values`, `[C, m, D]`, from `target`, `[C, D]`, estimated without bias: `[C]`.

    The distance of the mean of m values has the variance of one, over m, on top, and would be least for values that
    are all alike; so only products of different values count.
    """
    m = values.shape[1]
    total = values.sum(dim=1)
    products = total.square().sum(dim=1) - values.square().sum(dim=(1, 2))
    return products / (m * (m - 1)) - 2 * (total / m * target).sum(dim=1) + target.square().sum(dim=1)
