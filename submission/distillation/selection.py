"""Which images of a pool go into the file: those whose mean feature stays nearest to that of the whole class.

Herding (Welling, "Herding dynamical weights to learn", 2009): one image after the other, each the one that takes the
mean of those chosen so far closest to the mean of all. Features are what small convolutional networks with random
weights make of an image, as distribution matching uses them (Zhao & Bilen, arXiv 2110.04181): nothing is trained, and
nothing real is looked at.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from submission.dataset.dataset_file import mean_and_std
from submission.dataset.rounds import Rounds
from submission.tasks import Task

# So many networks, each of so many blocks of convolution, norm, ReLU and pooling, which halve the sides, with so many
# channels. What is left is averaged to so many pixels each way.
NETWORKS, DEPTH, WIDTH, SIDE = 4, 3, 32, 4
# Images that go through them at a time: what 256 make of themselves does not stay in a core's cache, and took twice as
# long each.
BATCH = 64


class Selector:
    """Chooses images of a task on a device. The networks have the same weights every time."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self._mean, self._std = (figure.to(device) for figure in mean_and_std(task))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._networks = [_network().to(device).to(memory_format=torch.channels_last) for _ in range(NETWORKS)]

    def seconds_per_image(self) -> float:
        """What an image of the pool takes, measured on noise."""
        size = self.task.size
        noise = np.random.default_rng(0).integers(0, 256, (BATCH, 3, size, size), dtype=np.uint8)
        seconds = []
        for _ in range(3):  # the first one is slow
            began = time.perf_counter()
            self.features(noise)[0, 0].item()  # which waits for a GPU
            seconds.append(time.perf_counter() - began)
        return min(seconds) / BATCH

    def choose(
        self, pool: Rounds, count: int, pace: float, seconds_left: Callable[[], float]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rounds int64 [count, classes] to take each class's images from, and from how many of the first rounds each
        was chosen, int64 [classes]: from fewer where `seconds_left`, which is asked all the time, is too short for all
        the classes still to come, and from `count`, which is no choice, where it is over. `pace` is what an image is
        expected to take, in seconds."""
        classes, end = len(self.task.classes), len(pool)
        numbers = np.repeat(np.arange(count)[:, None], classes, axis=1)
        looked_at = np.full(classes, count)
        spent, seen = BATCH * pace, BATCH
        for label in range(classes):
            fitting = seconds_left() / (classes - label) * seen / spent
            end = max(count, int(min(fitting, end)))  # never more than for the class before: the last would starve
            parts, began = [], time.perf_counter()
            for start in range(0, end, BATCH):
                if seconds_left() <= 0:
                    return numbers, looked_at
                rounds = np.arange(start, min(start + BATCH, end))
                parts.append(self.features(pool[rounds, np.full(len(rounds), label)]))
            numbers[:, label], looked_at[label] = herd(torch.cat(parts), count), end
            spent, seen = spent + time.perf_counter() - began, seen + end
        return numbers, looked_at

    @torch.inference_mode()
    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Float32 [n, features] of images uint8 [n, 3, H, W], on the device."""
        pixels = torch.from_numpy(images).to(self.device).float() / 255
        normalised = ((pixels - self._mean) / self._std).to(memory_format=torch.channels_last)
        return torch.cat([network(normalised).flatten(1) for network in self._networks], dim=1)


def herd(features: Tensor, count: int) -> NDArray[np.int64]:
    """Int64 [count]: which rows of `features` [n, d] to choose, in order; n is at least count."""
    features = features - features.mean(0)
    squares, total = features.square().sum(1), torch.zeros_like(features[0])
    chosen = np.empty(count, np.int64)
    for place in range(count):
        # |total + x|^2 less what does not depend on x.
        distances = squares + 2 * (features @ total)
        distances[chosen[:place]] = torch.inf
        chosen[place] = int(distances.argmin())
        total += features[chosen[place]]
    return chosen


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for block in range(DEPTH):
        convolution = nn.Conv2d(WIDTH if block else 3, WIDTH, 3, padding=1)
        layers += [convolution, nn.GroupNorm(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(SIDE))
